"""`neuqi`, `septq` and `specquant`: what they promise beyond the suite of `test_conformance`, what they refuse."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from workers.made import calibration, dynamic, layer_set, state

import semq_state as sq
from semq_state.codecs import AbstractWeightedCodec, Neuqi, Septq, Specquant, Uniform
from semq_state.codecs.symbolic import Symbolic, Symbols
from semq_state.content import TensorSpec
from semq_state.errors import IntegrityError
from semq_state.rotary import Rotary
from semq_state.symbolic.groups import Stack
from semq_state.symbolic.importances import importance_of
from semq_state.testing.states import small_state

CLASSES: list[Any] = [Neuqi, Septq, Specquant]
SHAPE = (2, 3, 96, 64)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """What keys are like: a mean of each channel, channels of other sizes, a few values far out."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=rng)
    values *= torch.rand(shape[-1], generator=rng) * 2 + 0.2
    values += 4 * torch.randn(shape[-1], generator=rng)
    values += 12 * values * (torch.rand(shape, generator=rng) < 0.004)
    return values.bfloat16().float()


def error(
    codec: AbstractWeightedCodec, values: torch.Tensor, weights: torch.Tensor | None = None, **by: Any
) -> float:
    off = (codec.decode(codec.encode(values, **by), tuple(values.shape)) - values).double().square()
    return float((off if weights is None else off * weights).sum())


@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
@pytest.mark.parametrize("along", ["token", "channel"])
def test_error_falls_with_bits(codec: Any, along: str) -> None:
    values = states(*SHAPE)
    found = [error(codec(bits=bits, along=along), values) for bits in (2, 3, 4, 6)]
    assert all(more < 0.6 * less for less, more in pairwise(found)), found


@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
@pytest.mark.parametrize("along", ["token", "channel"])
def test_error_is_below_that_of_the_baseline(codec: Any, along: str) -> None:
    values = states(*SHAPE)
    assert error(codec(bits=3, along=along), values) < 0.85 * error(Uniform(bits=3, along=along), values)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["neuqi", "septq", "specquant"])
def test_words_go_through_a_file(word: str, tmp_path: Path) -> None:
    snapshot, path = small_state(64), tmp_path / "state.safetensors"
    sq.save(snapshot, path, codec=word)
    loaded = sq.load(path)
    assert loaded.coding is not None and loaded.coding.codec == word
    assert loaded.coding.picked["keys"] == loaded.coding.picked["values"] == word
    assert all(0 < told.relative < 0.12 for told in loaded.coding.errors.values())


def test_symbols_are_the_nearest_of_what_is_kept() -> None:
    values = states(*SHAPE)
    for along, axis in (("token", -1), ("channel", -2)):
        symbolic = Neuqi(bits=3, along=along, group=32).encode(values)
        scale, minimum = (symbolic.exact[name].float().repeat_interleave(32, axis) for name in ("scale", "minimum"))
        levels = minimum[..., None] + scale[..., None] * torch.arange(8)
        nearest = (levels - values[..., None]).abs().amin(-1)
        found = (Neuqi().decode(symbolic, SHAPE) - values).abs()
        assert symbolic.exact["scale"].dtype == torch.float16
        assert torch.allclose(found, nearest, atol=1e-5)


def test_channels_of_one_value_are_exact() -> None:
    values = states(*SHAPE)
    values[..., 7] = 3.25
    for codec in (
        Neuqi(bits=2, along="channel"),
        Septq(bits=2, along="channel"),
        Specquant(bits=2, along="channel"),
    ):
        found = codec.decode(codec.encode(values), SHAPE)
        assert float((found[..., 7] - 3.25).abs().max()) < (2e-2 if isinstance(codec, Specquant) else 1e-6)


def test_escapes_are_exact_and_the_worst() -> None:
    values, codec = states(1, 1, 96, 64), Septq(bits=2, share=0.02)
    symbolic = codec.encode(values)
    mask = symbolic.symbols["mask"].values.bool()
    assert int(mask.sum()) == int(0.02 * values.numel()) and symbolic.exact["kept"].dtype == torch.bfloat16
    found = codec.decode(symbolic, tuple(values.shape))
    assert torch.equal(found[mask], values[mask])
    without = dataclasses.replace(codec, share=0.0)
    off = (without.decode(without.encode(values), tuple(values.shape)) - values).abs()
    assert float(off[mask].min()) >= float(off[~mask].max())
    assert torch.equal(found[~mask], without.decode(without.encode(values), tuple(values.shape))[~mask])


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.0, torch.bfloat16), (1 + 2**-9, torch.float16), (1 + 2**-20, torch.float32)]
)
def test_escapes_are_kept_as_narrow_as_is_exact(factor: float, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2.0, 32.0, 0.5]).repeat(3, 8) * factor
    symbolic = Septq(bits=2, group=32, share=0.25).encode(values)
    assert symbolic.exact["kept"].dtype == dtype
    mask = symbolic.symbols["mask"].values.bool()
    assert torch.equal(Septq().decode(symbolic, tuple(values.shape))[mask], values[mask])


def test_every_head_has_its_escapes() -> None:
    values = states(1, 2, 96, 64) * torch.tensor([1.0, 1000.0])[:, None, None]
    per_head = Septq(bits=2, share=0.02).encode(values).symbols["mask"].values.sum((-2, -1))
    assert int(per_head.min()) > 60


def test_branch_keeps_offsets_of_channels() -> None:
    rng = torch.Generator().manual_seed(2)
    offsets = 50 * torch.randn(64, generator=rng)
    values = torch.randn(1, 2, 256, 64, generator=rng) + offsets
    codec = Specquant(bits=2)
    found = codec.decode(codec.encode(values), tuple(values.shape))
    assert float((found.mean(-2) - values.mean(-2)).abs().max()) < 0.2
    # Groups across channels are as wide as the offsets without the branch, and as the rest with it.
    assert error(codec, values) < 0.02 * error(Neuqi(bits=2), values)


def test_branch_follows_what_is_slow() -> None:
    time = torch.arange(256) / 256
    slow = torch.stack([torch.cos(2 * torch.pi * (i % 3 + 1) * time + i) for i in range(32)], 1)
    noise = 0.1 * torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    made = Specquant(bits=2, share=0.95, budget=1).encode(slow + noise)
    assert int(made.exact["counts"].min()) >= 2 and int(made.exact["counts"].max()) <= 4
    # White noise: too little of it is slow, so that only the mean is kept.
    alone = Specquant(bits=2, share=0.95, budget=1).encode(noise)
    assert alone.exact["counts"].eq(1).all() and len(alone.exact["coefficients"]) == 32
    budget = Specquant(bits=2, share=1.0, budget=0.25).encode(slow + noise)
    assert len(budget.exact["coefficients"]) * 16 <= 0.25 * slow.numel()


@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
def test_importance_lowers_the_error_that_counts(codec: Any) -> None:
    values = states(*SHAPE)
    rng = torch.Generator().manual_seed(4)
    for along, shape in (("token", (1, 1, 1, 64)), ("channel", (1, 1, 96, 1)), ("token", SHAPE)):
        weights = torch.rand(shape, generator=rng) ** 6
        one = codec(bits=2, along=along)
        plain, told = error(one, values, weights), error(one, values, weights, importance=weights)
        assert told < 0.97 * plain, (along, shape)


@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
def test_even_importance_is_none(codec: Any) -> None:
    values = states(1, 1, 96, 64)
    plain, told = codec(bits=3).encode(values), codec(bits=3).encode(values, torch.full((1, 1, 1, 64), 3.0))
    assert error(codec(bits=3), values) == pytest.approx(
        error(codec(bits=3), values, importance=torch.full((1, 1, 1, 64), 3.0)), rel=0.01
    )
    assert plain.params == told.params


@pytest.mark.parametrize(
    "argument", [{"bits": 1}, {"bits": 9}, {"along": "head"}, {"group": 0}, {"share": 2.0}, {"budget": -1}], ids=str
)
@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
def test_arguments_are_checked(codec: Any, argument: dict[str, Any]) -> None:
    if next(iter(argument)) in {field.name for field in dataclasses.fields(codec)}:
        with pytest.raises(ValueError, match=next(iter(argument))):
            codec(**argument)


def _hostile(codec: Any) -> dict[str, Symbolic]:
    given = {"share": 0.2} if codec is Septq else {}
    good = codec(bits=3, group=4, **given).encode(states(8, 6))
    made, exact, params = dict(good.symbols), dict(good.exact), dict(good.params)
    found = {
        f"param-{name}-{value!r}": dataclasses.replace(good, params={**params, name: value})
        for name, value in [
            ("bits", 9), ("bits", True), ("bits", 4.0), ("bits", 5), ("along", "channel"), ("along", []),
            ("group", 0), ("group", 1 << 40), ("group", 2), ("more", 1),
        ]
    }  # fmt: skip
    found["param-missing"] = dataclasses.replace(good, params={})
    for name, symbols in made.items():
        for what, other in {
            "shape": Symbols(symbols.values[:1], symbols.lowest, symbols.highest),
            "dtype": Symbols(symbols.values.to(torch.int8), symbols.lowest, symbols.highest),
            "alphabet": Symbols(symbols.values, 0, 200),
        }.items():
            found[f"{name}-{what}"] = dataclasses.replace(good, symbols={**made, name: other})
        missing = {other: kept for other, kept in made.items() if other != name}
        found[f"{name}-missing"] = dataclasses.replace(good, symbols=missing)
    for name, tensor in exact.items():
        others = {"shape": tensor[:-1], "dtype": tensor.double()}
        if tensor.is_floating_point():
            others["nan"] = tensor * float("nan")
        for what, tampered in others.items():
            found[f"{name}-{what}"] = dataclasses.replace(good, exact={**exact, name: tampered})
        missing_exact = {other: kept for other, kept in exact.items() if other != name}
        found[f"{name}-missing"] = dataclasses.replace(good, exact=missing_exact)
    found["scale-negative"] = dataclasses.replace(good, exact={**exact, "scale": -exact["scale"]})
    if "counts" in exact:
        for value in (-1, 6, 32767):
            counts = exact["counts"].clone()
            counts[0] = value
            found[f"counts-{value}"] = dataclasses.replace(good, exact={**exact, "counts": counts})
        counts = exact["counts"].clone()
        counts[0] = 9  # of which 8 tokens have none, and as many coefficients as it takes
        longer = torch.ones(int((2 * counts.long() - 1).sum()), dtype=torch.float16)
        found["counts-told-alike"] = dataclasses.replace(
            good, exact={**exact, "counts": counts, "coefficients": longer}
        )
    return found


@pytest.mark.parametrize(
    ("codec", "name"), [(codec, name) for codec in CLASSES for name in _hostile(codec)],
    ids=lambda given: given if isinstance(given, str) else given.id,
)  # fmt: skip
def test_refuses_what_it_never_made(codec: Any, name: str) -> None:
    with pytest.raises(IntegrityError, match=f"{codec.id} codec"):
        codec().decode(_hostile(codec)[name], (8, 6))


@pytest.mark.parametrize("codec", CLASSES, ids=lambda codec: codec.id)
def test_extremes_stay_finite(codec: Any) -> None:
    largest = torch.tensor([[-3.4e38, 0.0, 3.4e38, 1e-45]]).repeat(6, 2)
    symbolic = codec(bits=4).encode(largest)
    restored = codec().decode(symbolic, (6, 8))
    assert bool(torch.isfinite(restored).all()) and error(codec(bits=4), largest) < 0.1 * float(
        largest.double().square().sum()
    )
    huge = {
        n: torch.full_like(t.float(), 3.4e38) if t.is_floating_point() else t for n, t in symbolic.exact.items()
    }
    assert bool(torch.isfinite(codec().decode(dataclasses.replace(symbolic, exact=huge), (6, 8))).all())


def weighted_calibration(snapshot: sq.Snapshot, *, matters: int) -> sq.Calibration:
    """One of the snapshot's model by which errors of one head count a thousandfold."""
    keys = snapshot.cache.layers[0].tensors["keys"]
    n_layers, heads, dim = len(snapshot.cache.layers), keys.shape[1], keys.shape[3]
    layers = layer_set(list(range(n_layers)), n_heads=heads, dims=(dim, dim), rotary=None)
    scale = torch.ones(n_layers, heads, 2 * dim)
    scale[:, matters] = 1000**0.5
    return calibration(dataclasses.replace(layers, scale=scale.flatten()), weights=snapshot.provenance.weights)


def test_a_calibration_says_where_escapes_go(tmp_path: Path) -> None:
    snapshot = state(*(dynamic(seq=300, dims=(16, 16), seed=i) for i in range(2)), n_cached=300)
    errors = []
    for i, made in enumerate([None, *(weighted_calibration(snapshot, matters=head) for head in (0, 1))]):
        path = tmp_path / f"{i}.safetensors"
        sq.save(snapshot, path, codec="septq", calibration=made)
        off = sq.load(path).cache.layers[1].tensors["keys"].double() - snapshot.cache.layers[1].tensors["keys"]
        errors.append(off.square().sum((0, 2, 3)))
    plain, first, second = errors
    assert float(first[0]) < 0.97 * float(plain[0]) and float(second[1]) < 0.97 * float(plain[1])
    assert float(first[1]) > float(plain[1]) and float(second[0]) > float(plain[0])


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    snapshot = small_state(16)
    with pytest.raises(sq.CalibrationError):
        sq.save(snapshot, tmp_path / "x.safetensors", codec="neuqi", calibration=calibration(layer_set()))


def test_rotated_pairs_share_their_importance() -> None:
    for layout, pairs in (("half", [(1, 3), (2, 4)]), ("interleaved", [(1, 2), (3, 4)])):
        rotary = Rotary(layout, 1, 4, (0.5, 0.25))
        layers = layer_set([3], n_heads=1, dims=(6, 6), rotary=rotary)
        scale = torch.arange(1.0, 13.0)
        made = calibration(dataclasses.replace(layers, scale=scale))
        spec = TensorSpec("F32", (1, 1, 9, 6))
        keys = importance_of(Stack("keys", ("layers.3.keys",), spec), made)
        assert keys is not None and keys.shape == (1, 1, 1, 1, 6)
        expected = scale[:6].square()
        for a, b in pairs:
            expected[a] = expected[b] = (expected[a] + expected[b]) / 2
        assert torch.equal(keys.flatten(), expected)
        values = importance_of(Stack("values", ("layers.3.values",), spec), made)
        assert values is not None and torch.equal(values.flatten(), scale[6:].square())
        for name, heads in (("layers.4.keys", 1), ("x.layers.3.keys", 1), ("layers.3.keys", 2)):
            assert importance_of(Stack("keys", (name,), TensorSpec("F32", (1, heads, 9, 6))), made) is None
