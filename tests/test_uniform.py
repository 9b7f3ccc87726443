"""Uniform quantisation in groups: what it promises of the error, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state.codecs.symbolic import Symbolic, Symbols
from semq_state.codecs.uniform import Uniform
from semq_state.errors import IntegrityError

CODECS = st.builds(
    Uniform, bits=st.integers(2, 8), along=st.sampled_from(["token", "channel"]), group=st.integers(1, 9)
    | st.just(64), symmetric=st.booleans(),
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=2).flatmap(
    lambda lead: st.tuples(*map(st.just, lead), st.integers(0, 11), st.integers(0, 11))
)
MAGNITUDES = [1e-44, 1e-30, 1e-12, 1e-5, 1.0, 3e4, 1e12, 1e30, 3.4e38]


def vectors(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grouped(tensor: torch.Tensor, codec: Uniform) -> list[torch.Tensor]:
    """The groups along the last axis, in the straightforward way."""
    rows = tensor if codec.along == "token" else tensor.transpose(-1, -2)
    return list(rows.split(codec.group, -1)) if rows.numel() else []


@settings(max_examples=80, deadline=None)
@given(CODECS, SHAPES, st.sampled_from(MAGNITUDES), st.integers(0, 99), st.sampled_from([0, 1, 300]))
def test_error_is_half_a_step(
    codec: Uniform, shape: tuple[int, ...], magnitude: float, seed: int, offset: int
) -> None:
    values = ((vectors(shape, seed) + offset).double() * magnitude).clamp(-3.4e38, 3.4e38).float()
    symbolic = codec.encode(values)
    restored = codec.decode(symbolic, shape)
    assert restored.shape == shape and restored.dtype == torch.float32 and bool(torch.isfinite(restored).all())
    for group, again in zip(grouped(values, codec), grouped(restored, codec), strict=True):
        group, again = group.double(), again.double()
        if codec.symmetric:
            width = group.abs().amax(-1, keepdim=True) / (2 ** (codec.bits - 1) - 1)
        else:
            width = (group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)) / (2**codec.bits - 1)
        # Steps in float16 are at most 1/64 wider on average; rounding of float32 and of the smallest floats.
        slack = group.abs().amax(-1, keepdim=True) * 2**-11 * (width == 0) + group.abs() * 2**-21 + 1e-42
        widest = width * 0.5 * (1 + 1 / 64 * max(1, group.numel())) ** 0.5
        assert bool(((group - again).abs() <= widest + slack).all())
    made = symbolic.symbols["values"]
    if made.values.numel():
        assert made.lowest <= int(made.values.min()) and int(made.values.max()) <= made.highest


def test_symbols_of_a_group() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0, -7.0]])
    symbolic = Uniform(bits=2, group=4).encode(values)
    assert symbolic.symbols["values"].values.tolist() == [[0, 1, 2, 3, 0]]
    assert symbolic.exact["scale"].tolist() == [[1.0, 0.0]]
    assert symbolic.exact["minimum"].tolist() == [[0.0, -7.0]]
    assert symbolic.params == {"bits": 2, "along": "token", "group": 4, "symmetric": False}


def test_groups_of_a_channel_are_successive_tokens() -> None:
    values = torch.tensor([[0.0, 10.0], [3.0, 40.0], [5.0, 60.0]])
    symbolic = Uniform(bits=2, along="channel", group=2).encode(values)
    assert symbolic.exact["scale"].tolist() == [[1.0, 10.0], [0.0, 0.0]]
    assert torch.equal(Uniform().decode(symbolic, (3, 2)), values)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        pytest.param([[0.0, 1.0]], torch.float16, id="ordinary"),
        pytest.param([[1e6, 2e6]], torch.float32, id="too-large-for-float16"),
        pytest.param([[1e-9, 2e-9]], torch.float32, id="too-small-for-float16"),
        pytest.param([[1000.1, 1000.2]], torch.float32, id="narrow-group-far-from-zero"),
        pytest.param([[0.0, 0.0]], torch.float16, id="zeros"),
        pytest.param([[1e6, 1e6]], torch.float32, id="constant-too-large"),
    ],
)
def test_float16_only_where_it_holds(values: list[list[float]], dtype: torch.dtype) -> None:
    codec = Uniform(bits=8)
    symbolic = codec.encode(torch.tensor(values))
    assert {tensor.dtype for tensor in symbolic.exact.values()} == {dtype}
    assert torch.allclose(codec.decode(symbolic, (1, 2)), torch.tensor(values), rtol=1e-6, atol=1e-3)


def test_symmetric_keeps_zero() -> None:
    values = torch.tensor([[0.0, 0.3, -5.0, 1.0]])
    codec = Uniform(bits=3, symmetric=True)
    assert codec.decode(codec.encode(values), (1, 4))[0, 0] == 0


def test_views_are_taken() -> None:
    values = vectors((4, 6, 5)).transpose(0, 2)
    codec = Uniform(bits=8, along="channel", group=4)
    assert torch.equal(
        codec.decode(codec.encode(values), (5, 6, 4)), codec.decode(codec.encode(values.contiguous()), (5, 6, 4))
    )


@pytest.mark.parametrize("argument", [{"bits": 1}, {"bits": 9}, {"along": "head"}, {"group": 0}], ids=str)
def test_arguments_are_checked(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        Uniform(**argument)


def _hostile() -> dict[str, Symbolic]:
    good = Uniform(group=4).encode(vectors((2, 6)))
    made, exact, params = good.symbols["values"], dict(good.exact), dict(good.params)
    found = {
        f"param-{name}-{value!r}": dataclasses.replace(good, params={**params, name: value})
        for name, value in [
            ("bits", 9), ("bits", True), ("bits", 4.0), ("bits", 5), ("along", "channel"), ("along", []),
            ("group", 0), ("group", 1 << 40), ("group", 2), ("symmetric", 1), ("symmetric", True), ("more", 1),
        ]
    }  # fmt: skip
    found["param-missing"] = dataclasses.replace(good, params={})
    found["symbols-none"] = dataclasses.replace(good, symbols={})
    found["symbols-more"] = dataclasses.replace(good, symbols={"values": made, "more": made})
    for name, symbols in {
        "shape": Symbols(made.values[:1], 0, 15),
        "dtype": Symbols(made.values.to(torch.int8), 0, 15),
        "alphabet": Symbols(made.values, 0, 255),
    }.items():
        found[f"symbols-{name}"] = dataclasses.replace(good, symbols={"values": symbols})
    for name, scale in {
        "shape": exact["scale"][:, :1],
        "dtype": exact["scale"].double(),
        "nan": exact["scale"] * float("nan"),
        "infinite": exact["scale"] * float("inf"),
        "negative": -exact["scale"],
    }.items():
        found[f"scale-{name}"] = dataclasses.replace(good, exact={**exact, "scale": scale})
    found["minimum-missing"] = dataclasses.replace(good, exact={"scale": exact["scale"]})
    found["minimum-nan"] = dataclasses.replace(good, exact={**exact, "minimum": exact["minimum"] * float("nan")})
    return found


@pytest.mark.parametrize("name", list(_hostile()))
def test_refuses_what_it_never_made(name: str) -> None:
    with pytest.raises(IntegrityError, match="uniform codec"):
        Uniform().decode(_hostile()[name], (2, 6))


def test_refuses_a_shape_without_tokens() -> None:
    with pytest.raises(IntegrityError, match="vectors"):
        Uniform().decode(Uniform().encode(vectors((2, 6))), (12,))


def test_huge_steps_stay_finite() -> None:
    symbolic = Uniform(bits=8).encode(torch.tensor([[0.0, 1e38, 3.4e38]]))
    huge = {name: torch.full_like(tensor.float(), 3.4e38) for name, tensor in symbolic.exact.items()}
    restored = Uniform().decode(dataclasses.replace(symbolic, exact=huge), (1, 3))
    assert bool(torch.isfinite(restored).all())
