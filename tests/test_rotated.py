"""The rotated codec: its rotation, its quantisers, what it promises of the error, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state.codecs import hadamard, lloyd_max
from semq_state.codecs.rotated import Rotated
from semq_state.codecs.symbolic import Symbolic, Symbols
from semq_state.errors import IntegrityError

DIMS = [1, 2, 3, 7, 64, 80, 96, 112, 192, 257, 511, 512, 576]
CODECS = st.builds(
    Rotated, quantiser=st.sampled_from(["uniform", "lloyd-max"]), step=st.floats(1 / 256, 2),
    bits=st.integers(1, 4), centred=st.booleans(), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=2).flatmap(
    lambda lead: st.tuples(*map(st.just, lead), st.integers(0, 7), st.integers(0, 11))
)
MAGNITUDES = [1e-44, 1e-30, 1e-12, 1.0, 1e12, 1e30, 3.4e38]


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(codec: Rotated, values: torch.Tensor) -> float:
    restored = codec.decode(codec.encode(values), tuple(values.shape))
    return float((restored - values).square().sum() / values.square().sum())


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_orthogonal_and_has_an_inverse(dim: int) -> None:
    rotated = hadamard.rotate(torch.eye(dim), 5)
    assert torch.allclose(rotated @ rotated.T, torch.eye(dim), atol=1e-5)
    assert torch.allclose(hadamard.rotate_back(rotated, 5), torch.eye(dim), atol=1e-5)
    # No channel keeps its energy to itself: no entry is larger than Hartley's cas over the root of the length.
    assert float(rotated.abs().max()) <= math.sqrt(2 / dim) + 1e-5


def test_signs_are_the_same_everywhere() -> None:
    # The test vector that goes round for splitmix64 seeded with 1234567: 6457827717110365317, 3203168211198807973,
    # 9817491932198370423, 4593380528125082431, 16408922859458223821. Then other seeds in Python's integers.
    assert hadamard.signs(5, 1234567).tolist() == [1, 1, -1, 1, -1]
    for seed in (0, 1, 2**64 - 1):
        expected = []
        for i in range(1, 100):
            z = (seed + i * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            expected.append(-1 if z ^ (z >> 31) >= 2**63 else 1)
        assert hadamard.signs(99, seed).tolist() == expected


def test_levels_are_those_of_the_literature() -> None:
    # Max, "Quantizing for minimum distortion" (1960), table I: 2, 4 and 8 levels.
    assert lloyd_max.levels(1) == pytest.approx([-0.7979, 0.7979], abs=1e-4)
    assert lloyd_max.levels(2)[2:] == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert lloyd_max.levels(3)[4:] == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_nearest_level(bits: int) -> None:
    levels = torch.tensor(lloyd_max.levels(bits))
    values = torch.cat([vectors(3000), torch.tensor([-1e9, -20.0, 20.0, 1e9])])
    best = (values.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.allclose((values - levels[lloyd_max.nearest(values, bits)]).abs(), best, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(CODECS, SHAPES, st.sampled_from(MAGNITUDES), st.integers(0, 99), st.sampled_from([0, 5]))
def test_error_is_bounded(codec: Rotated, shape: tuple[int, ...], magnitude: float, seed: int, offset: int) -> None:
    values = ((vectors(*shape, seed=seed) + offset).double() * magnitude).clamp(-3.4e38, 3.4e38).float()
    symbolic = codec.encode(values)
    restored = codec.decode(symbolic, shape)
    assert restored.shape == shape and restored.dtype == torch.float32 and bool(torch.isfinite(restored).all())
    made = symbolic.symbols["values"]
    if made.values.numel():
        assert made.lowest <= int(made.values.min()) and int(made.values.max()) <= made.highest
    if codec.quantiser == "uniform" and magnitude < 1e38:
        off = (restored.double() - values.double()).norm(dim=-1)
        largest = values.double().norm(dim=-1).amax(-1, keepdim=True) if shape[-2] else off
        # Half a step of a scale that is at most an eighth of an octave above the rms, in every one of dim numbers.
        bound = codec.step / 2 * 2**0.125 * largest * (2 if codec.centred else 1)
        assert bool((off <= bound * 1.001 + largest * 1e-5 + 1e-42).all())


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 192, 577])
def test_error_is_what_theory_says(dim: int) -> None:
    values = vectors(2, 300, dim) * torch.logspace(-1, 1, dim)  # channels as unequal as those of keys
    assert relative_error(Rotated(step=0.3), values) == pytest.approx(0.3**2 / 12, rel=0.05)
    # Max (1960), table I: 0.1175 for 4 levels and 0.009497 for 16.
    assert relative_error(Rotated(quantiser="lloyd-max", bits=2), values) == pytest.approx(0.1175, rel=0.12)
    assert relative_error(Rotated(quantiser="lloyd-max", bits=4), values) == pytest.approx(0.0095, rel=0.12)


def test_every_vector_has_its_scale() -> None:
    values = vectors(1, 40, 64) * torch.logspace(-15, 0, 40).unsqueeze(-1)
    codec = Rotated(step=0.25, centred=False)
    restored = codec.decode(codec.encode(values), (1, 40, 64))
    assert bool(((restored - values).norm(dim=-1) < 0.1 * values.norm(dim=-1)).all())


def test_offsets_of_channels_cost_nothing() -> None:
    values = vectors(2, 200, 64)
    offsets = 30 * vectors(2, 1, 64, seed=1)
    off = [
        float((codec.decode(codec.encode(values + offsets), (2, 200, 64)) - values - offsets).square().mean())
        for codec in (Rotated(), Rotated(centred=False))
    ]
    assert off[0] < 0.012 and off[1] > 50 * off[0]


def test_zeros_stay_zero() -> None:
    values = vectors(2, 3, 5)
    values[0, 1] = 0
    values[1] = 0
    for quantiser in ("uniform", "lloyd-max"):
        codec = Rotated(quantiser=quantiser, centred=False)
        symbolic = codec.encode(values)
        assert (symbolic.symbols["norm"].values == 0).tolist() == [[False, True, False], [True] * 3]
        restored = codec.decode(symbolic, (2, 3, 5))
        assert not restored[0, 1].any() and not restored[1].any()


def test_fine_steps_take_int16() -> None:
    fine, coarse = Rotated(step=1 / 256), Rotated(step=0.5)
    values = vectors(1, 8, 64)
    symbols = [codec.encode(values).symbols["values"] for codec in (fine, coarse)]
    assert [made.values.dtype for made in symbols] == [torch.int16, torch.int8]
    assert [made.highest == int(made.values.abs().max()) == -made.lowest for made in symbols] == [True, True]
    assert relative_error(fine, values) < 2e-6


def test_another_instance_decodes() -> None:
    values = vectors(2, 4, 6)
    for codec in (Rotated(seed=9, step=0.1, centred=False), Rotated(quantiser="lloyd-max", bits=3, seed=2**64 - 1)):
        symbolic = codec.encode(values)
        assert torch.equal(Rotated().decode(symbolic, (2, 4, 6)), codec.decode(symbolic, (2, 4, 6)))


def test_blocks_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, codec = vectors(5, 3, 8), Rotated()
    whole = codec.encode(values)
    monkeypatch.setattr("semq_state.codecs.rotated._BLOCK", 48)
    assert torch.equal(codec.encode(values).symbols["values"].values, whole.symbols["values"].values)
    assert torch.equal(codec.encode(values[3:4]).symbols["values"].values, whole.symbols["values"].values[3:4])


@pytest.mark.parametrize(
    "argument",
    [
        {"quantiser": "vector"},
        {"step": 0.0},
        {"step": math.nan},
        {"bits": 0},
        {"bits": 9},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
    ids=str,
)
def test_arguments_are_checked(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        Rotated(**argument)


def _hostile() -> dict[str, Symbolic]:
    good, levelled = Rotated().encode(vectors(2, 3, 4)), Rotated(quantiser="lloyd-max").encode(vectors(2, 3, 4))
    made, norms, levels = good.symbols["values"], good.symbols["norm"], levelled.params["levels"]
    found = {
        f"{name}-{value!r:.20}": dataclasses.replace(good, params={**good.params, name: value})
        for name, value in [
            ("seed", -1), ("seed", 1 << 64), ("seed", 0.0), ("seed", True), ("step", 0.0), ("step", 1),
            ("step", "1"), ("step", math.nan), ("step", math.inf), ("levels", levels), ("more", 1),
        ]
    }  # fmt: skip
    for name, value in {
        "none": None,
        "fifteen": levels[1:],
        "not-rising": levels[::-1],
        "nan": [math.nan, *levels[1:]],
        "huge": [*levels[:-1], 1e300],
        "text": [*levels[:-1], "9"],
        "one": [0.0],
        "eight": levels[:8],
    }.items():
        found[f"levels-{name}"] = dataclasses.replace(levelled, params={"seed": 0, "levels": value})
    found["params-none"] = dataclasses.replace(good, params={})
    found["symbols-of-the-other"] = dataclasses.replace(good, symbols=levelled.symbols)
    found["norm-missing"] = dataclasses.replace(good, symbols={"values": made})
    for name, symbols in {
        "shape": Symbols(made.values[:1], made.lowest, made.highest),
        "unequal": Symbols(made.values, made.lowest - 1, made.highest),
        "too-many": Symbols(made.values, -200, 200),
    }.items():
        found[f"values-{name}"] = dataclasses.replace(good, symbols={"values": symbols, "norm": norms})
    for name, values in {"shape": norms.values[:, :2], "dtype": norms.values.to(torch.int8)}.items():
        found[f"norm-{name}"] = dataclasses.replace(good, symbols={"values": made, "norm": Symbols(values, 0, 255)})
    top, mean = good.exact["top"], good.exact["mean"]
    for name, exact in {
        "top-missing": {"mean": mean},
        "top-shape": {"mean": mean, "top": top[:1]},
        "top-dtype": {"mean": mean, "top": top.int()},
        "top-high": {"mean": mean, "top": top * 0 + 512},
        "top-low": {"mean": mean, "top": top * 0 - 32768},
        "mean-shape": {"mean": mean[:, :2], "top": top},
        "mean-dtype": {"mean": mean.float(), "top": top},
        "mean-nan": {"mean": mean * math.nan, "top": top},
        "mean-infinite": {"mean": mean * math.inf, "top": top},
        "exact-more": {"mean": mean, "top": top, "more": top},
    }.items():
        found[name] = dataclasses.replace(good, exact=exact)
    return found


@pytest.mark.parametrize("name", list(_hostile()))
def test_refuses_what_it_never_made(name: str) -> None:
    with pytest.raises(IntegrityError, match="rotated codec"):
        Rotated().decode(_hostile()[name], (2, 3, 4))


def test_refuses_a_shape_without_tokens() -> None:
    with pytest.raises(IntegrityError, match="vectors"):
        Rotated().decode(Rotated().encode(vectors(2, 3)), (6,))


def test_extreme_numbers_in_a_file_stay_finite() -> None:
    symbolic = Rotated(step=16.0).encode(vectors(2, 3, 4))
    made = torch.full((2, 3, 4), 32767, dtype=torch.int16)
    norms = torch.full((2, 3), 255, dtype=torch.uint8)
    symbolic = dataclasses.replace(
        symbolic,
        symbols={"values": Symbols(made, -32767, 32767), "norm": Symbols(norms, 0, 255)},
        exact={"top": torch.full((2,), 511, dtype=torch.int16), "mean": torch.full((2, 4), -3e38).bfloat16()},
    )
    assert bool(torch.isfinite(Rotated().decode(symbolic, (2, 3, 4))).all())
