"""The calibrated transform, its curve, and calibrations as files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from workers.made import CURVE, N_VOCAB, WEIGHTS, calibration, dynamic, layer_set, random, state

import semq_state as sq
from semq_state import content
from semq_state.calibration import (
    Calibration,
    LayerSet,
    Measured,
    bits_at,
    find,
    kl_at,
    load_calibration,
    place_for,
    save_calibration,
    step_for_bits,
    step_for_kl,
)
from semq_state.codecs import Rotated, Symbolic, Symbols, Transform, transform
from semq_state.codecs.transform import CLASSES, Tokens
from semq_state.errors import CalibrationError, IntegrityError, SemqStateError
from semq_state.rotary import Rotary
from semq_state.snapshot import Snapshot
from semq_state.symbolic import NotCalibratedWarning, Policy, everywhere
from semq_state.symbolic.transforming import tokens_of

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens_for(batch: int, seq: int, n_features: int = 5, *, padding: int = 0) -> Tokens:
    positions = torch.arange(seq)[None].expand(batch, seq) - padding
    features = torch.randint(-90, 90, (batch, seq, n_features), generator=torch.Generator().manual_seed(3)).float()
    return Tokens(features, positions)


def vectors(layers: LayerSet, batch: int, seq: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(layers.layers), batch, layers.n_heads, seq)
    return random(*shape, layers.key_dim, seed=seed), random(*shape, layers.value_dim, seed=seed + 1)


def there_and_back(
    layers: LayerSet, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    made = Transform(calibration(layers), step=step).encode(layers, keys, values, tokens)
    return transform.decode(layers, made, tokens, torch.float32)


def distance(layers: LayerSet, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], tokens: Tokens) -> float:
    """Root mean square of the error in units of importance."""
    lost = []
    for row in range(tokens.positions.shape[0]):
        where = (row, slice(0, tokens.positions.shape[1]))
        pair = [transform.gathered(layers, *each, tokens, where) * layers.scale for each in (a, b)]
        lost.append((pair[0] - pair[1]).square().mean())
    return float(torch.stack(lost).mean().sqrt())


# The codec


@pytest.mark.parametrize("step", [0.3, 0.1, 0.01, 0.001])
def test_the_error_is_that_of_the_step(step: float) -> None:
    layers = layer_set()
    plain = dataclasses.replace(layers, matters=torch.zeros_like(layers.matters))
    tokens, bodies = tokens_for(2, 60), vectors(layers, 2, 60)
    rms = distance(plain, bodies, there_and_back(plain, *bodies, tokens, step), tokens)
    # Uniform within a step, and what is put back a little nearer to zero.
    assert rms == pytest.approx(step / 12**0.5, rel=0.08)
    rms = distance(layers, bodies, there_and_back(layers, *bodies, tokens, step), tokens)
    assert step / 12**0.5 / 4 < rms < step / 12**0.5 * 4


def test_tokens_that_matter_get_finer_steps() -> None:
    layers = layer_set()
    matters = torch.zeros_like(layers.matters)
    n_features = 5
    matters[-1 - n_features] = 0.1  # log2 of the importance, by the first feature
    layers = dataclasses.replace(layers, matters=matters)
    features = torch.zeros(1, 41, n_features)
    features[0, :, 0] = torch.arange(-100, 105, 5)
    tokens = Tokens(features, torch.arange(41)[None])
    bodies = vectors(layers, 1, 41)
    made = Transform(calibration(layers), step=0.01).encode(layers, *bodies, tokens)
    steps = made.symbols["steps"].values.int()
    assert (steps.diff() <= 0).all() and steps[0] == CLASSES - 1 and steps[-1] == 0 and steps[20] == CLASSES // 2
    decoded = transform.decode(layers, made, tokens, torch.float32)
    lost = [(a - b).square().sum(dim=(0, 1, 2, 4)) for a, b in zip(bodies, decoded, strict=True)]
    first, last = (float((lost[0] + lost[1])[part].mean()) for part in (slice(0, 5), slice(-5, None)))
    assert first > 50 * last


ROTARIES: dict[str, Rotary | None] = {
    "none": None,
    "half": Rotary("half", 0, 8, (1.0, 0.3, 0.1, 0.01)),
    "interleaved": Rotary("interleaved", 0, 8, (1.0, 0.3, 0.1, 0.01)),
    "the first four": Rotary("half", 0, 4, (1.0, 0.1)),
    "the last four": Rotary("interleaved", 4, 4, (1.0, -0.1)),
}


@pytest.mark.parametrize("rotary", ROTARIES.values(), ids=list(ROTARIES))
def test_every_rotary_layout_comes_back(rotary: Rotary | None) -> None:
    layers = layer_set(rotary=rotary)
    tokens, bodies = tokens_for(2, 50), vectors(layers, 2, 50)
    decoded = there_and_back(layers, *bodies, tokens, 3e-3)
    for before, after in zip(bodies, decoded, strict=True):
        assert (before - after).abs().max() < 0.05
    # A key that is one vector turned to each position is the same symbols at each.
    if rotary is not None:
        layers = dataclasses.replace(layers, matters=torch.zeros_like(layers.matters))
        one = random(2, 1, 2, 1, 8).expand(2, 1, 2, 50, 8)
        tokens = Tokens(torch.zeros(1, 50, 5), torch.arange(50)[None])
        turned = rotary.redo(one, tokens.positions[0])
        where = (0, slice(0, 50))
        back = transform.gathered(layers, turned, torch.zeros(2, 1, 2, 50, 8), tokens, where)
        assert (back - back[:1]).abs().max() < 1e-5 and not torch.equal(turned[..., 1, :], turned[..., 9, :])


def test_layers_turn_in_their_own_ways_and_values_too() -> None:
    """Gemma's windows have another base; latent attention keeps what it rotates as values."""
    layers = layer_set([0, 2, 5])
    pairs = ((ROTARIES["half"], None), (ROTARIES["interleaved"], None), (None, ROTARIES["the last four"]))
    layers = dataclasses.replace(layers, rotaries=pairs)
    tokens, bodies = tokens_for(1, 30), vectors(layers, 1, 30)
    for before, after in zip(bodies, there_and_back(layers, *bodies, tokens, 1e-3), strict=True):
        assert (before - after).abs().max() < 0.02
    again = Calibration.of(json.loads(json.dumps(calibration(layers).as_dict())), calibration(layers).tensors())
    assert again.sets[0].rotaries == pairs


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7),
    st.integers(1, 7), st.sampled_from([1e-5, 0.05, 0.5, 40.0]), st.integers(1, 9), st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_whatever_the_shape(
    batch: int, seq: int, n_layers: int, heads: int, key_dim: int, value_dim: int, step: float, span: int, run: int,
    seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Odd sizes, and spans and runs so short that rows and streams are cut anywhere."""
    layers = layer_set(range(n_layers), n_heads=heads, dims=(key_dim, value_dim), rotary=None, seed=seed)
    tokens, bodies = tokens_for(batch, seq), vectors(layers, batch, seq, seed)
    codec = Transform(calibration(layers), step=step)
    whole = codec.encode(layers, *bodies, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "_SPAN", span)
        patch.setattr(transform, "_RUN", run)
        made = codec.encode(layers, *bodies, tokens)
        n_runs = -(-batch * seq // run)
        assert made.symbols.keys() == {"steps", *(f"components.{i}" for i in range(n_runs))}
        for symbols in made.symbols.values():
            found = symbols.values.int()
            assert not found.numel() or symbols.lowest <= int(found.min()) <= int(found.max()) <= symbols.highest
        cut = transform.decode(layers, made, tokens, dtype)
    for part, other in zip(cut, transform.decode(layers, whole, tokens, dtype), strict=True):
        assert part.dtype == dtype and torch.isfinite(part).all()
        if step < 0.1:  # in coarser steps what is rare in a run is left out
            assert torch.allclose(part.float(), other.float(), rtol=0.02, atol=1e-3 + 0.1 * step)
    assert transform.clipped(layers, whole, tokens) is not None or step > 1e-5 or layers.n_dims < 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, CLASSES - 1), max_size=12), st.lists(st.integers(-9, 9), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99), st.sampled_from([1, 20, 100]),
    st.sampled_from([torch.int8, torch.int16]),
)  # fmt: skip
def test_streams_come_back(
    classes: list[int], bands: list[int], share: float, seed: int, most: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(classes), len(bands))
    table = torch.randint(-most, most + 1, shape, generator=generator) * (
        torch.rand(shape, generator=generator) < share
    )
    steps = torch.tensor(classes, dtype=torch.uint8)
    falling = torch.tensor(sorted(bands, reverse=True), dtype=torch.int16)
    stream, lowest = transform._streamed(table.to(dtype), steps, falling)
    assert len(stream) <= table.numel() and stream.dtype == dtype
    levels = falling[None].int() - steps[:, None].int()
    kept = levels >= lowest if len(stream) else torch.zeros(shape, dtype=torch.bool)
    back = transform._unstreamed(stream, steps, falling, lowest)
    assert torch.equal(torch.nn.functional.pad(back, (0, shape[1] - back.shape[1])), (table * kept).to(dtype))
    assert sorted(stream.tolist()) == sorted(table[kept].tolist())
    # What is left out is rare and small.
    for level in levels[~kept].unique():
        own = table[levels == level]
        assert int((own != 0).sum()) * 12 <= len(own) and not (own.abs() >= 16).any()
    if len(stream) > 1:
        with pytest.raises(IntegrityError):
            transform._unstreamed(stream[:-1], steps, falling, lowest)


def test_streams_are_sorted_by_spread_and_end_where_only_zeros_follow() -> None:
    classes = torch.tensor([0, 12, 0], dtype=torch.uint8)
    bands = torch.tensor([20, 20, 3], dtype=torch.int16)
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int16)
    # Levels: 20 for the first two columns of class 0, 8 for those of class 12; 3 and -9 for the last column.
    stream, lowest = transform._streamed(table, classes, bands)
    assert stream.tolist() == [1, 7, 2, 8, 4, 5, 3, 9, 6] and lowest == -9
    table[1, 2] = 0
    stream, lowest = transform._streamed(table, classes, bands)
    assert stream.tolist() == [1, 7, 2, 8, 4, 5, 3, 9] and lowest == 3


@pytest.mark.parametrize("outlier", [100.0, 1e4, 1e7, 1e30])
@pytest.mark.parametrize("step", [0.3, 30.0])
def test_one_token_far_out_is_coded_or_named(outlier: float, step: float) -> None:
    """However rare its symbols are among those of the other tokens."""
    layers = layer_set()
    layers = dataclasses.replace(layers, matters=torch.zeros_like(layers.matters))
    tokens, (keys, values) = tokens_for(1, 600), vectors(layers, 1, 600)
    keys[0, 0, 0, 300, 3] = outlier
    made = Transform(calibration(layers), step=step).encode(layers, keys, values, tokens)
    beyond = transform.clipped(layers, made, tokens)
    decoded = transform.decode(layers, made, tokens, torch.float32)[0]
    if outlier / step < 25_000:
        assert beyond is None and (decoded - keys)[..., 300, :].abs().max() < 20 * step
    else:
        assert beyond is not None and beyond.nonzero().tolist() == [[0, 300]]


def test_coarse_steps_are_bytes_and_fine_ones_are_wider() -> None:
    layers = layer_set()
    tokens, bodies = tokens_for(1, 40), vectors(layers, 1, 40)
    for step, dtype in ((0.5, torch.int8), (0.005, torch.int16)):
        made = Transform(calibration(layers), step=step).encode(layers, *bodies, tokens)
        components = made.symbols["components.0"]
        assert components.values.dtype == dtype and components.lowest == -components.highest
        assert components.highest == int(components.values.int().abs().max())
    coarse = Transform(calibration(layers), step=1e4).encode(layers, *bodies, tokens)
    assert len(coarse.symbols["components.0"].values) == 0
    decoded = transform.decode(layers, coarse, tokens, torch.float32)
    assert all(torch.isfinite(t).all() for t in decoded)


def test_features_follow_the_ids() -> None:
    made = calibration()
    ids = torch.tensor([[3, 4, -7, 5, 10**9, N_VOCAB, 6]])
    told = tokens_of(made, ids, 6, 0, [0], (0, 6)).features[0]
    assert torch.equal(told[0], torch.cat([made.now[3], torch.zeros(2)]))
    assert torch.equal(told[1], torch.cat([made.now[4], made.before[3]]))
    assert torch.equal(told[2], torch.cat([torch.zeros(3), made.before[4]]))
    assert torch.equal(told[3], torch.cat([made.now[5], torch.zeros(2)]))
    assert not told[5].any() and not told[4, :3].any()
    later = tokens_of(made, ids, 6, 0, [0], (1, 6))
    assert torch.equal(later.features[0], told[1:]) and later.positions.tolist() == [[1, 2, 3, 4, 5]]
    moved = tokens_of(made, ids, 6, 2, [1], (0, 3))
    assert torch.equal(moved.features[0], told[2:5]) and moved.positions.tolist() == [[1, 2, 3]]
    # Where the cache holds other tokens besides, no id is known for any of them.
    for odd in (
        (None, 6, 0), (ids, 8, 0), (ids, 6, 3), (ids.int(), 6, 0), (ids[0], 6, 0), (ids.expand(2, -1), 6, 0),
    ):  # fmt: skip
        assert not tokens_of(made, odd[0], odd[1], odd[2], [0], (0, 6)).features.any()


@pytest.mark.parametrize("padding", [(), (0, 9, 33)], ids=["full", "padded"])
def test_rows_with_padding_and_odd_ids(padding: tuple[int, ...], path: Path) -> None:
    batch = len(padding) or 2
    snapshot = state(batch=batch, padding=padding)
    snapshot.generation.input_ids[0, 7:9] = torch.tensor([-100, 1 << 40])
    made = calibration()
    sq.save(snapshot, path, codec=Transform(made, step=0.01))
    loaded = sq.load(path, calibration=made)
    for name, tensor in loaded.cache.tensors().items():
        assert 0 < (tensor - snapshot.tensors()[name]).abs().max() < 0.1
    group = sq.inspect(path).manifest.structure["coded"][0]
    assert group["params"]["padding"] == list(padding or (0,) * batch)


def test_layers_that_a_calibration_does_not_fit_take_the_other_codec(path: Path) -> None:
    made = calibration(layer_set([0, 1]), layer_set([2], dims=(4, 8), rotary=None), layer_set([7]))
    layers = (*(dynamic(seed=i) for i in range(2)), dynamic(dims=(4, 8), seed=2), dynamic(seed=3))
    snapshot = state(*layers)
    policy = Policy(everywhere(Rotated()).codecs, Transform(made, step=0.1))
    sq.save(snapshot, path, codec=policy)
    groups = sq.inspect(path).manifest.structure["coded"]
    assert [g["codec"] for g in groups] == ["transform", "transform", "rotated", "rotated"]
    assert [g["params"].get("set") for g in groups] == [0, 1, None, None]
    assert sq.load(path, calibration=made).coding is not None
    for odd in (
        state(dynamic(), dynamic(heads=3)),
        state(dynamic(), dynamic(dtype=torch.bfloat16)),
        state(dynamic(), dynamic(seq=16, family="sliding", meta={"window": 17, "n_seen": 40})),
        state(dynamic()),
        state(dynamic(), dynamic(meta={"fixed": True})),
    ):
        info = sq.save(odd, path, codec=policy)
        assert info.coding and set(info.coding.picked.values()) == {"rotated"} and info.coding.calibration == ""


def test_only_one_quality_is_asked_for() -> None:
    made = calibration()
    for wrong in ({}, {"kl": 0.1, "step": 1.0}, {"kl": -1.0}, {"ratio": float("inf")}, {"step": float("nan")}):
        with pytest.raises(ValueError, match="one positive number"):
            Transform(made, **wrong)
    assert Transform(made, kl=3e-3).step == pytest.approx(0.1)
    assert Transform(made, ratio=4).step == pytest.approx(0.03)


# Untrusted symbols and parameters


def hostile(symbolic: Symbolic, **changes: Any) -> Symbolic:
    return dataclasses.replace(symbolic, **changes)


def test_symbols_that_it_never_made_are_refused() -> None:
    layers = layer_set()
    tokens, bodies = tokens_for(1, 20), vectors(layers, 1, 20)
    good = Transform(calibration(layers), step=0.1).encode(layers, *bodies, tokens)
    steps, stream = good.symbols["steps"], good.symbols["components.0"]

    def with_symbols(**other: Symbols) -> Symbolic:
        return hostile(good, symbols={**good.symbols, **{n.replace("_", "."): s for n, s in other.items()}})

    def with_params(**other: Any) -> Symbolic:
        return hostile(good, params={**good.params, **other})

    lies = [
        hostile(good, params={}),
        with_params(surplus=1),
        *(with_params(step=step) for step in (0.0, -1.0, 1e31, 1e-31, float("nan"), float("inf"), 1, "1", None)),
        *(with_params(shrink=shrink) for shrink in (-0.1, 1.0, float("nan"), 0, None)),
        *(with_params(lowest=low) for low in ([], [0, 0], [0.0], 0, [1 << 70], [None], [True], [99])),
        hostile(good, exact={"x": torch.zeros(1)}),
        hostile(good, symbols={"steps": steps}),
        hostile(good, symbols={"components.0": stream}),
        hostile(good, symbols={**good.symbols, "components.1": stream}),
        with_symbols(steps=Symbols(steps.values[1:], 0, CLASSES - 1)),
        with_symbols(steps=Symbols(steps.values, 0, CLASSES)),
        with_symbols(steps=Symbols(steps.values.char(), 0, CLASSES - 1)),
        with_symbols(steps=Symbols(steps.values[None], 0, CLASSES - 1)),
        with_symbols(components_0=Symbols(stream.values[1:], stream.lowest, stream.highest)),
        with_symbols(components_0=Symbols(stream.values[None], stream.lowest, stream.highest)),
        with_symbols(components_0=Symbols(stream.values.byte(), 0, 255)),
        with_symbols(components_0=Symbols(torch.cat([stream.values] * 9), stream.lowest, stream.highest)),
    ]
    for lie in lies:
        with pytest.raises(IntegrityError, match="transform codec"):
            transform.decode(layers, lie, tokens, torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        {"set": 1}, {"set": -1}, {"set": "0"}, {"set": True}, {"begin": -1}, {"begin": 1 << 41}, {"begin": None},
        {"padding": []}, {"padding": [-1]}, {"padding": [0, 0]}, {"padding": [0.0]}, {"padding": 0},
        {"calibration": "sha256:0"}, {"calibration": None}, {"lowest": None}, {"step": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_params_of_a_group_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    from semq_state import symbolic

    snapshot, made = state(), calibration()
    coded = next(symbolic.symbolise(snapshot, Policy(transform=Transform(made, step=0.1))))
    group = dataclasses.replace(coded.group, params={**coded.group.params, **change})

    def known(digest: str) -> Calibration:
        if digest != made.digest:
            raise CalibrationError("calibration", expected=digest, found="none")
        return made

    with pytest.raises((IntegrityError, CalibrationError)):
        symbolic.restored(group, coded.tensors, snapshot.tensors(), 40, known)
    told = symbolic.restored(coded.group, coded.tensors, snapshot.tensors(), 40, known)
    assert told.keys() == coded.errors.keys()


# Quality to step


def test_the_curve_goes_through_what_was_measured_and_on() -> None:
    made = calibration()
    for point in CURVE:
        assert kl_at(made, point.step) == pytest.approx(point.kl)
        assert bits_at(made, point.step) == pytest.approx(point.bits_per_value)
        assert step_for_kl(made, point.kl) == pytest.approx(point.step)
        assert step_for_bits(made, point.bits_per_value) == pytest.approx(point.step)
    # Beyond the ends KL goes on with the square of the step, and a halved step is a bit.
    assert kl_at(made, 0.001) == pytest.approx(1e-6) and kl_at(made, 3.0) == pytest.approx(3.0)
    assert bits_at(made, 0.0025) == pytest.approx(10.0) and bits_at(made, 0.6) == pytest.approx(0.25)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-8, 1e6), st.floats(1.001, 1e3), st.booleans())
def test_the_curve_is_monotone_and_inverted(step: float, factor: float, single: bool) -> None:
    made = dataclasses.replace(calibration(), curve=CURVE[1:2] if single else tuple(reversed(CURVE)))
    assert kl_at(made, step) < kl_at(made, step * factor)
    assert bits_at(made, step) > bits_at(made, step * factor) > 0
    assert step_for_kl(made, kl_at(made, step)) == pytest.approx(step, rel=1e-6)
    assert step_for_bits(made, bits_at(made, step)) == pytest.approx(step, rel=1e-6)


def test_without_a_curve_only_a_step_can_be_asked_for(path: Path) -> None:
    made = dataclasses.replace(calibration(), curve=())
    for codec in ("compact", "kl=0.01", "ratio=9"):
        with pytest.raises(CalibrationError, match="measured curve"):
            sq.save(state(), path, codec=codec, calibration=made)
    assert Transform(made, step=0.1).step == 0.1


# Presets


def test_presets_take_the_calibration_of_the_weights(path: Path) -> None:
    made = calibration()
    save_calibration(made, place_for(WEIGHTS))
    sizes = {}
    for codec in ("near", "compact", "tiny", "kl=0.0003", "kl=1e-3", "ratio=8", "ratio=.5e1"):
        info = sq.save(state(), path, codec=codec)
        assert info.codec == codec and info.coding and info.coding.calibration == made.digest
        assert info.coding.picked == {"keys": "transform", "values": "transform"}
        sizes[codec] = info.coding.bits_per_value
        assert sq.load(path).coding == info.coding
        if codec.startswith("kl="):
            assert info.coding.kl == pytest.approx(float(codec[3:]))
        if codec.startswith("ratio="):
            assert info.coding.kl == pytest.approx(kl_at(made, step_for_bits(made, 16 / float(codec[6:]))))
    assert sizes["tiny"] < sizes["compact"] < sizes["near"] == sizes["kl=0.0003"]


def test_presets_without_a_calibration_say_so(path: Path) -> None:
    sizes = []
    for codec in ("near", "compact", "tiny"):
        with pytest.warns(NotCalibratedWarning, match="semq-state calibrate tiny"):
            info = sq.save(state(), path, codec=codec)
        assert info.coding and info.coding.picked == {"keys": "rotated", "values": "rotated"}
        assert info.coding.kl is None and info.coding.calibration == ""
        assert sq.load(path).coding == info.coding
        sizes.append(info.coding.bits_per_value)
    assert sizes == sorted(sizes, reverse=True)
    for codec in ("kl=0.002", "ratio=20"):
        with pytest.raises(CalibrationError, match="semq-state calibrate"):
            sq.save(state(), path, codec=codec)


def test_layers_without_a_calibration_are_no_worse(path: Path) -> None:
    save_calibration(calibration(layer_set([0])), place_for(WEIGHTS))
    steps = []
    for codec in ("near", "compact", "tiny"):
        sq.save(state(), path, codec=codec)
        groups = sq.inspect(path).manifest.structure["coded"]
        assert [g["codec"] for g in groups] == ["transform", "rotated", "rotated"]
        steps.append(groups[1]["params"]["step"])
    assert steps == sorted(steps) and len(set(steps)) == 3


# Calibrations as files


def test_a_calibration_comes_back(tmp_path: Path) -> None:
    made = calibration(layer_set([0, 2]), layer_set([1], dims=(4, 6), rotary=None))
    path = save_calibration(made, tmp_path / "new" / "folder" / "x")
    assert [each.name for each in path.parent.iterdir()] == ["x"]
    found = load_calibration(path)
    assert found.digest == made.digest == load_calibration(path, digest=made.digest).digest
    assert found.as_dict() == made.as_dict() and found.curve == made.curve
    assert all(torch.equal(t, found.tensors()[n]) and t.dtype == found.tensors()[n].dtype
               for n, t in made.tensors().items())  # fmt: skip
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "semq_state calibration", "format_version": "1", "model": "tiny", "digest": made.digest
        }  # fmt: skip


def test_the_digest_is_of_what_decoding_needs() -> None:
    made = calibration()
    same = dataclasses.replace(made, about={"seconds": 9}, model_name="other")
    assert same.digest == made.digest
    mean = made.sets[0].mean.clone()
    mean[3] += 1
    others = [
        dataclasses.replace(made, weights=f"sha256:{'cd' * 32}"),
        dataclasses.replace(made, curve=CURVE[:2]),
        dataclasses.replace(made, now=made.now + 1),
        dataclasses.replace(made, sets=(dataclasses.replace(made.sets[0], mean=mean),)),
        dataclasses.replace(made, sets=(dataclasses.replace(made.sets[0], layers=(0, 2)),)),
    ]
    assert len({made.digest, *(each.digest for each in others)}) == 6


def test_calibrations_have_their_places(folder: Path) -> None:
    base = folder / "semq_state" / "calibrations"
    assert place_for(WEIGHTS) == base / f"sha256-{'ab' * 32}.safetensors"
    assert place_for(f"sampled:{'01' * 32}") == base / f"sampled-{'01' * 32}.safetensors"
    assert find(WEIGHTS) is None
    for wrong in (
        "",
        "sha256:",
        f"sha256:{'../' * 21}a",
        f"md5:{'ab' * 32}",
        f"sha256:{'AB' * 32}",
        WEIGHTS + "\n",
    ):
        with pytest.raises(CalibrationError):
            place_for(wrong)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_calibration(calibration(), tmp_path / "calibration")


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    other = tmp_path / "other"
    for data in (b"", b"x", bytes(100), good[:50], good[:-1], good + b"x", b"\xff" * 300):
        other.write_bytes(data)
        with pytest.raises(CalibrationError, match="other"):
            load_calibration(other)
    for where in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CalibrationError) as refusal:
            load_calibration(where)
        assert str(where) in str(refusal.value) and refusal.value.do
    save_file({"x": torch.zeros(3)}, other)
    with pytest.raises(CalibrationError, match="another file"):
        load_calibration(other)
    sq.save(state(), other)
    with pytest.raises(CalibrationError, match="another file"):
        load_calibration(other)
    with pytest.raises(CalibrationError, match=r"sha256:cdcd"):
        load_calibration(file, digest=f"sha256:{'cd' * 32}")


def test_every_damaged_byte_of_a_calibration_is_refused_or_tells_nothing(file: Path) -> None:
    made, good = calibration(), file.read_bytes()
    for at in range(0, len(good), 23):
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with contextlib.suppress(CalibrationError):
            assert load_calibration(file).digest == made.digest


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object], **meta: str) -> None:
    """The file with another table and tensors, under a digest that fits them where there is one."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = {**opened.metadata(), **meta}
    table = msgpack.unpackb(bytes(tensors.pop("calibration").tolist()))
    change(table, tensors)
    packed = msgpack.packb(table)
    with contextlib.suppress(Exception):
        metadata["digest"] = Calibration.of(table, tensors).digest
    tensors["calibration"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    save_file(tensors, file, metadata)


def puts(*way: Any, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(table: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        at: Any = table
        for step in way[:-1]:
            at = at[step]
        at[way[-1]] = value

    return change


def gives(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], object]:
    def change(table: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


N_DIMS = 64
LIES: dict[str, Any] = {
    "no sets": puts("sets", value=3),
    "an empty set": puts("sets", value=[{}]),
    "weights that are no text": puts("weights", value=3),
    "a name that is no text": puts("model_name", value=None),
    "about that is no table": puts("about", value=5),
    "a curve of texts": puts("curve", value=["abc"]),
    "a curve of pairs": puts("curve", value=[[1.0, 2.0]]),
    "a step of zero": puts("curve", value=[[0.0, 1.0, 1.0]]),
    "no bits": puts("curve", value=[[1.0, -1.0, 1.0]]),
    "a curve without numbers": puts("curve", value=[[1.0, 1.0, float("nan")]]),
    "a curve without end": puts("curve", value=[[float("inf"), 1.0, 1.0]]),
    "no layers": puts("sets", 0, "layers", value=[]),
    "a layer that is no number": puts("sets", 0, "layers", value=["0", "1"]),
    "more layers": puts("sets", 0, "layers", value=[0, 1, 2]),
    "more heads": puts("sets", 0, "n_heads", value=1 << 30),
    "wider keys": puts("sets", 0, "key_dim", value=9),
    "more blocks": puts("sets", 0, "n_blocks", value=1 << 60),
    "fewer blocks": puts("sets", 0, "n_blocks", value=1),
    "blocks that are no count": puts("sets", 0, "n_blocks", value="2"),
    "no rotary embedding": puts("sets", 0, "rotaries", value=[{}]),
    "a rotary embedding outside": puts("sets", 0, "rotaries", 0, "begin", value=4),
    "a rotary embedding too fast": puts("sets", 0, "rotaries", 0, "inv_freq", value=[9.0] * 4),
    "rotary embeddings of others": puts("sets", 0, "rotary_of", value=[[7, -1], [7, -1]]),
    "rotary embeddings missing": puts("sets", 0, "rotary_of", value=[[0, -1]]),
    "a tensor missing": gives("sets.0.mix", None),
    "a tensor besides": gives("surplus", torch.zeros(1)),
    "a tensor of another set": gives("sets.7.mix", torch.zeros(1)),
    "no features": gives("now", torch.zeros(0, 3, dtype=torch.int8)),
    "other features": gives("now", torch.zeros(N_VOCAB, 9, dtype=torch.int8)),
    "fewer features": gives("before", torch.zeros(N_VOCAB - 1, 2, dtype=torch.int8)),
    "features with fractions": gives("now", torch.zeros(N_VOCAB, 3)),
    "another scale": gives("sets.0.scale", torch.ones(N_DIMS - 1)),
    "a scale of zero": gives("sets.0.scale", torch.zeros(N_DIMS)),
    "a scale that is no number": gives("sets.0.scale", torch.full((N_DIMS,), float("nan"))),
    "a mean without end": gives("sets.0.mean", torch.full((N_DIMS,), float("inf"))),
    "a mean of halves": gives("sets.0.mean", torch.zeros(N_DIMS, dtype=torch.float16)),
    "other bands": gives("sets.0.bands", torch.zeros(3, dtype=torch.int16)),
    "a flat mix": gives("sets.0.mix", torch.zeros(3, dtype=torch.float16)),
    "a mix of one number": gives("sets.0.mix", torch.tensor(1.0, dtype=torch.float16)),
    "another head": gives("sets.0.heads.0", torch.zeros(5, 5, dtype=torch.float16)),
    "a head of one number": gives("sets.0.heads.0", torch.tensor(1.0, dtype=torch.float16)),
    "another tail": gives("sets.0.tails.1", torch.zeros(5, 5, dtype=torch.int8)),
    "fewer to matter": gives("sets.0.matters", torch.zeros(2)),
}


@pytest.mark.parametrize("change", LIES.values(), ids=list(LIES))
def test_lies_of_a_calibration_are_refused(change: Any, file: Path, path: Path) -> None:
    made = calibration()
    sq.save(state(), path, codec=Transform(made, step=0.1))
    rewritten(file, change)
    with pytest.raises(CalibrationError, match="calibration") as refusal:
        load_calibration(file)
    assert refusal.value.expected and refusal.value.found and refusal.value.do and len(str(refusal.value)) < 1000
    with pytest.raises(CalibrationError):
        sq.load(path, calibration=file)


def test_tables_that_are_no_msgpack_are_refused(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    good = bytes(tensors["calibration"].tolist())
    deep = b"\x91" * 5000 + b"\xc0"
    for table in (
        b"",
        good[:-1],
        good[:40],
        good + b"x",
        b"\xdd\xff\xff\xff\xff",
        deep,
        b"\x81\xa1\xff\xc0",
        b"\xc1",
    ):
        tensors["calibration"] = torch.frombuffer(bytearray(table or b"\0"), dtype=torch.uint8)[: len(table)]
        save_file(tensors, file, metadata)
        with pytest.raises(CalibrationError):
            load_calibration(file)
    tensors["calibration"] = torch.zeros(3)
    save_file(tensors, file, metadata)
    with pytest.raises(CalibrationError):
        load_calibration(file)


def test_versions_to_come_are_refused(file: Path) -> None:
    rewritten(file, lambda table, tensors: None, format_version="2")
    with pytest.raises(CalibrationError, match="version 1"):
        load_calibration(file)
    rewritten(file, lambda table, tensors: None, format_version="1")
    assert load_calibration(file).digest == calibration().digest


# The calibration of a snapshot


def other() -> Calibration:
    return calibration(weights=f"sha256:{'cd' * 32}")


def test_a_calibration_of_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    place = save_calibration(other(), tmp_path / "other")
    for arguments in (
        {"codec": "compact", "calibration": other()},
        {"codec": "kl=0.01", "calibration": place},
        {"codec": "compact", "calibration": str(place)},
        {"codec": Transform(other(), step=0.1)},
        {"codec": Policy(transform=Transform(other(), step=0.1))},
    ):
        with pytest.raises(CalibrationError, match="made this state") as refusal:
            sq.save(state(), path, **arguments)  # type: ignore[arg-type]
        assert other().digest[:24] in str(refusal.value) and not path.exists()


def test_a_missing_calibration_is_named_and_where_it_was_looked_for(path: Path, folder: Path) -> None:
    made = calibration()
    info = sq.save(state(), path, codec=Transform(made, step=0.1))
    assert sq.verify(path).passed and sq.inspect(path).coding == info.coding

    def assert_missing(**arguments: Any) -> str:
        with pytest.raises(CalibrationError) as refusal:
            sq.load(path, **arguments)
        assert str(refusal.value).count(str(path)) == 1 and made.digest in str(refusal.value)
        assert refusal.value.expected and refusal.value.found and refusal.value.do
        return str(refusal.value)

    assert str(place_for(WEIGHTS)) in assert_missing()
    save_calibration(dataclasses.replace(made, curve=CURVE[:2]), place_for(WEIGHTS))
    assert str(place_for(WEIGHTS)) in assert_missing()
    place_for(WEIGHTS).write_bytes(b"damaged")
    assert str(place_for(WEIGHTS)) in assert_missing()
    assert other().digest in assert_missing(calibration=other())
    save_calibration(made, place_for(WEIGHTS))
    assert sq.load(path).state_id == info.state_id


def test_a_calibration_that_is_carried_along(path: Path, folder: Path, tmp_path: Path) -> None:
    made, snapshot = calibration(), state()
    plain = sq.save(snapshot, path, codec="compact", calibration=made)
    expected = sq.load(path, calibration=made)
    info = sq.save(snapshot, path, codec="compact", calibration=made, embed_calibration=True)
    assert not folder.exists()
    loaded = sq.load(path)
    # It is no part of the state, and its size is not counted as the state's.
    assert loaded.state_id == info.state_id == plain.state_id and loaded.coding == info.coding == plain.coding
    assert info.n_bytes > plain.n_bytes + made.n_bytes / 2 and info.raw_bytes == plain.raw_bytes
    assert all(torch.equal(t, expected.tensors()[n]) for n, t in loaded.tensors().items())
    assert loaded.tensors().keys() == expected.tensors().keys() and sq.verify(path).passed
    # One that is named comes first, and must be the right one.
    assert sq.load(path, calibration=made).state_id == info.state_id
    with pytest.raises(CalibrationError):
        sq.load(path, calibration=other())
    # Carried on as a plain state it is gone.
    sq.save(loaded, tmp_path / "exact")
    assert not any(name.startswith("embedded") for name in sq.inspect(tmp_path / "exact").manifest.tensors)


def test_damage_of_a_calibration_that_is_carried_along_is_refused(path: Path) -> None:
    from test_hostile import drop, put_together, signed, taken_apart

    sq.save(state(), path, codec="compact", calibration=calibration(), embed_calibration=True)
    good = path.read_bytes()
    state_id = sq.load(path).state_id
    sections = taken_apart(good)["sections"]
    names = [name for name in sections if name.startswith("embedded.")]
    assert len(names) > 8
    for name in names:
        draft = taken_apart(good)
        data = bytearray(draft["sections"][name]["data"])
        if data:
            data[len(data) // 2] ^= 4
            draft["sections"][name]["data"] = bytes(data)
            path.write_bytes(put_together(draft))
            with pytest.raises(IntegrityError, match="embedded"):
                sq.load(path)
            assert not sq.verify(path).passed
        draft = taken_apart(good)
        drop("sections", name)(draft)
        drop("manifest", "tensors", name)(draft)
        path.write_bytes(put_together(draft))
        with pytest.raises(CalibrationError, match="calibration") as refusal:
            sq.load(path)
        assert str(refusal.value).count(str(path)) == 1 and sq.inspect(path).state_id == state_id
    # Another calibration in its place, whole and with digests that fit, is not the one that the state names.
    sq.save(state(), path, codec="compact", calibration=calibration(), embed_calibration=True)
    draft, whole = taken_apart(path.read_bytes()), taken_apart(path.read_bytes())
    changed = dataclasses.replace(calibration(), curve=CURVE[:3])
    sq.save(state(), path, codec="compact", calibration=changed, embed_calibration=True)
    for name, section in taken_apart(path.read_bytes())["sections"].items():
        if name.startswith("embedded."):
            draft["sections"][name] = section
            draft["manifest"]["tensors"][name] = taken_apart(path.read_bytes())["manifest"]["tensors"][name]
    assert draft != whole
    path.write_bytes(put_together(signed(draft)))
    with pytest.raises(SemqStateError):
        sq.load(path)


def test_a_calibration_is_no_larger_in_memory_than_in_its_file() -> None:
    made = calibration()
    assert made.n_bytes == sum(content.spec_of(t).n_bytes for t in made.tensors().values())
    assert isinstance(made.curve[0], Measured) and isinstance(state(), Snapshot)
