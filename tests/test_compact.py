"""Compact snapshots: what stays exact whatever the codec, what a file of symbols is, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile import Change, Draft, cases, drop, little_memory, put, put_together, signed, taken_apart
from workers.made import calibration, dynamic, layer_set, random, state

import semq_state as sq
from conftest import tiny_model
from semq_state import files, symbolic
from semq_state.calibration import Calibration, save_calibration
from semq_state.codecs import Rotated, Semq, Transform, Uniform
from semq_state.content import raw_bytes
from semq_state.errors import (
    FormatError,
    IncompleteStateError,
    IntegrityError,
    SemqStateError,
    UnknownCodecError,
)
from semq_state.snapshot import CacheState, LayerState, Snapshot
from semq_state.snapshot.whole import Checkpoint
from semq_state.symbolic import Policy, everywhere

pytestmark = pytest.mark.timeout(120)

VECTORS: dict[str, Any] = {
    "rotated": Rotated(),
    "lloyd-max": Rotated(quantiser="lloyd-max"),
    "uniform": Uniform(),
    "channel": Uniform(along="channel", group=7, symmetric=True),
    "semq": Semq(),
}
EVERY = [*VECTORS, "transform"]
MAIN = ["rotated", "uniform", "semq", "transform"]


def policy(name: str, *, n_sinks: int = 4, n_recent: int = 0, step: float = 0.2) -> Policy:
    """One of `EVERY`; the transform falls back to a vector codec where it takes nothing."""
    if name == "transform":
        found = Policy(everywhere(Rotated()).codecs, Transform(calibration(), step=step))
    else:
        found = everywhere(VECTORS[name])
    return dataclasses.replace(found, n_sinks=n_sinks, n_recent=n_recent)


def reloaded(snapshot: Snapshot, path: Path, codec: files.Codec, made: Calibration | None = None) -> Snapshot:
    """Through a file and back, with everything held that every compact file promises."""
    info = sq.save(snapshot, path, codec=codec)
    loaded = sq.load(path, calibration=made or calibration())
    assert loaded.state_id == info.state_id and loaded.coding is not None and loaded.coding == info.coding
    assert loaded.coding.source == snapshot.state_id
    assert sq.verify(path).passed and json.dumps(info.as_dict())
    before, after = snapshot.tensors(), loaded.tensors()
    assert after.keys() == before.keys() - loaded.coding.left_out.keys()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        if name not in loaded.coding.errors:
            assert same(tensor, before[name]), name
    return loaded


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaNs included."""
    return raw_bytes(a).tobytes() == raw_bytes(b).tobytes()


def changed(snapshot: Snapshot, change: Callable[[torch.Tensor], torch.Tensor]) -> Snapshot:
    return dataclasses.replace(snapshot, cache=snapshot.cache.map(lambda t: change(t.clone())))


def coded(loaded: Snapshot) -> set[str]:
    assert loaded.coding is not None
    return set(loaded.coding.errors)


KV = {f"layers.{i}.{kind}" for i in range(2) for kind in ("keys", "values")}


# What stays exact


@pytest.mark.parametrize("name", MAIN)
def test_sinks_and_the_recent_window_are_exact(name: str, path: Path) -> None:
    snapshot = state()
    loaded = reloaded(snapshot, path, policy(name, n_recent=5))
    assert coded(loaded) == KV
    for tensor, before in ((loaded.tensors()[n], snapshot.tensors()[n]) for n in KV):
        assert same(tensor[..., :4, :], before[..., :4, :]) and same(tensor[..., 35:, :], before[..., 35:, :])
        between = (tensor != before)[..., 4:35, :].any(-1)
        assert between.float().mean() > 0.9
        assert not same(tensor[..., 4:5, :], before[..., 4:5, :])
        assert not same(tensor[..., 34:35, :], before[..., 34:35, :])


@pytest.mark.parametrize("name", MAIN)
def test_sinks_of_rows_that_begin_with_padding_are_exact(name: str, path: Path) -> None:
    padding = (0, 5, 38)
    snapshot = state(batch=3, padding=padding)
    loaded = reloaded(snapshot, path, policy(name))
    for row, first in enumerate(padding):
        for tensor, before in ((loaded.tensors()[n][row], snapshot.tensors()[n][row]) for n in KV):
            assert same(tensor[:, first : first + 4], before[:, first : first + 4])
            if first == 5:
                assert not same(tensor[:, 4:5], before[:, 4:5]) and not same(tensor[:, 9:10], before[:, 9:10])
    # Eight tensors of heads of the second row hold four late sinks each, those of the third the last two tokens.
    assert loaded.coding and loaded.coding.n_exact_vectors == 4 * 2 * (4 + 2)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(("n_seen", "n_exact"), [(40, 0), (18, 2), (16, 4)], ids=["past", "begins", "within"])
def test_a_window_has_the_sinks_that_it_still_holds(name: str, n_seen: int, n_exact: int, path: Path) -> None:
    meta = {"window": 17, "n_seen": n_seen}
    layers = [dynamic(seq=16, family="sliding", meta=meta, seed=i) for i in range(2)]
    snapshot = state(*layers, n_cached=n_seen)
    loaded = reloaded(snapshot, path, policy(name))
    assert coded(loaded) == KV
    for tensor, before in ((loaded.tensors()[n], snapshot.tensors()[n]) for n in KV):
        assert same(tensor[..., :n_exact, :], before[..., :n_exact, :])
        assert not same(tensor[..., n_exact : n_exact + 1, :], before[..., n_exact : n_exact + 1, :])
    groups = sq.inspect(path).manifest.structure["coded"]
    assert {tuple(group["tokens"]) for group in groups} == {(n_exact, 16)}
    if name == "transform":
        assert [group["params"]["begin"] for group in groups] == [n_seen - 16]


def test_the_recent_window_is_that_of_the_sequence(path: Path) -> None:
    """An image's keys and values end where they like."""
    layers = (dynamic(seed=0), dynamic(seq=30, seed=1, meta={"fixed": True}))
    loaded = reloaded(state(*layers), path, dataclasses.replace(policy("uniform"), n_recent=6))
    spans = {tuple(g["tokens"]) for g in sq.inspect(path).manifest.structure["coded"]}
    assert spans == {(4, 34), (4, 30)} and coded(loaded) == KV


@pytest.mark.parametrize("name", MAIN)
def test_parts_of_an_encoder_decoder(name: str, path: Path) -> None:
    parts = {
        part: CacheState("dynamic", (dynamic(seq=seq, seed=seq),), {"grows": False})
        for part, seq in (("self", 12), ("cross", 23))
    }
    cache = CacheState("encoder-decoder", (), {"is_updated": [[0, True]]}, parts)
    loaded = reloaded(dataclasses.replace(state(n_cached=12), cache=cache), path, policy(name))
    assert coded(loaded) == {f"{p}.layers.0.{k}" for p in parts for k in ("keys", "values")}
    for name_, tensor in loaded.cache.tensors().items():
        assert same(tensor[..., :4, :], cache.tensors()[name_][..., :4, :])


def linear() -> LayerState:
    return LayerState(
        "linear",
        {"conv.0": random(1, 6, 4), "recurrent.0": random(1, 2, 5, 8, seed=3)},
        {"n_states": 1, "has_previous": [True], "kernel_sizes": [4], "recurrent": [True], "filled": True},
    )


@pytest.mark.parametrize("name", MAIN)
def test_states_that_fold_the_past_are_exact(name: str, path: Path) -> None:
    loaded = reloaded(state(linear(), dynamic(seed=1)), path, policy(name))
    assert coded(loaded) == {"layers.1.keys", "layers.1.values"}
    assert loaded.coding and loaded.coding.picked["recurrent"] == loaded.coding.picked["convolution"] == "exact"


@pytest.mark.parametrize("kind", ["recurrent", "convolution"])
def test_states_that_fold_the_past_are_coded_where_they_are_named(kind: str, path: Path) -> None:
    snapshot = state(linear(), linear(), dynamic(batch=1, seed=1), padding=(7,))
    loaded = reloaded(snapshot, path, Policy({kind: Rotated(step=0.01)}, n_recent=2))
    tensor = "conv.0" if kind == "convolution" else "recurrent.0"
    assert coded(loaded) == {f"layers.{i}.{tensor}" for i in range(2)}
    assert loaded.coding and loaded.coding.n_exact_vectors == 0
    assert loaded.coding.picked == {"keys": "exact", "values": "exact", "convolution": "exact", "recurrent": "exact"
                                    } | {kind: "rotated"}  # fmt: skip
    # Not a token of it is a sink, and it is no less exact for that.
    assert all(0 < error.relative < 0.01 for error in loaded.coding.errors.values())
    assert all((loaded.tensors()[n] != snapshot.tensors()[n]).any(-1).all() for n in coded(loaded))


@pytest.mark.parametrize("name", MAIN)
def test_an_index_is_exact_and_packed_layers_are_left_alone(name: str, path: Path) -> None:
    index = {"index_keys": random(1, 40, 6), "index_positions": torch.zeros(1, 1, 40, dtype=torch.int64)}
    indexed = dynamic(seed=4)
    holds = {"holds": ["index_keys", "index_positions", "keys", "values"]}
    packed = {
        "keys": random(1, 2, 40, 8).to(torch.float8_e4m3fn),
        "values": random(1, 2, 40, 8, seed=1).to(torch.float8_e4m3fn),
        "key_scale": torch.tensor(0.5),
        "value_scale": torch.tensor(0.25),
    }
    snapshot = state(
        LayerState("indexed", {**indexed.tensors, **index}, {**indexed.meta, **holds}),
        LayerState("fp8", packed, {"n_seen": 40, "dtype": "float32", "filled": True}),
        LayerState("hqq", {**dynamic(seq=9).tensors, "key_codes": torch.ones(3).byte()}, {"n_seen": 40}),
        LayerState("dummy", {}),
    )
    loaded = reloaded(snapshot, path, policy(name))
    assert coded(loaded) == {"layers.0.keys", "layers.0.values"}
    assert loaded.coding and loaded.coding.picked["index"] == "exact"
    assert loaded.coding.picked["keys"].startswith("exact and ")


def test_an_index_is_coded_where_it_is_named(path: Path) -> None:
    layer = dynamic(seed=4)
    tensors = {**layer.tensors, "index_keys": random(1, 40, 6)}
    layer = LayerState("indexed", tensors, {"holds": ["index_keys", "keys", "values"], **layer.meta})
    loaded = reloaded(state(layer), path, Policy({"index": Uniform()}))
    assert coded(loaded) == {"layers.0.index_keys"}


def test_kinds_get_their_own_codecs(path: Path) -> None:
    loaded = reloaded(state(), path, Policy({"keys": Uniform(along="channel"), "values": Semq()}))
    assert loaded.coding and loaded.coding.picked == {"keys": "uniform", "values": "semq"}
    only = reloaded(state(), path, Policy({"values": Semq()}))
    assert coded(only) == {"layers.0.values", "layers.1.values"}
    assert only.coding and only.coding.picked == {"keys": "exact", "values": "semq"}


def test_companions_are_coded_and_checkpoints_are_not(path: Path) -> None:
    snapshot = state()
    assistant = CacheState("dynamic", (dynamic(seed=8),), {"grows": False})
    earlier = CacheState(
        "dynamic",
        (dynamic(seq=16, family="sliding", meta={"window": 17, "n_seen": 20}), LayerState("dummy", {})),
        {},
    )
    snapshot = dataclasses.replace(
        snapshot,
        generation=dataclasses.replace(snapshot.generation, companions={"assistant": assistant}),
        checkpoints=(Checkpoint(21, earlier),),
    )
    loaded = reloaded(snapshot, path, policy("transform"))
    other = {f"generation.companions.assistant.layers.0.{kind}" for kind in ("keys", "values")}
    assert coded(loaded) == KV | other


@pytest.mark.parametrize("name", MAIN)
def test_logits_stay_only_where_the_next_token_is_chosen_from_them(name: str, path: Path) -> None:
    needed = reloaded(state(n_tokens=40), path, policy(name))
    assert needed.coding and needed.coding.left_out == {} and needed.generation.logits is not None
    loaded = reloaded(state(), path, policy(name))
    assert loaded.coding and loaded.generation.logits is None
    assert loaded.coding.left_out.keys() == {"generation.logits"} and all(loaded.coding.left_out.values())
    without = reloaded(state(logits=None), path, policy(name))
    assert without.coding and without.coding.left_out == {}


# Bad and small input


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("seq", [1, 3, 4, 5, 6])
def test_few_tokens(name: str, seq: int, path: Path) -> None:
    loaded = reloaded(state(n_cached=seq), path, policy(name))
    assert coded(loaded) == (KV if seq > 4 else set())
    assert loaded.coding
    if seq <= 4:
        assert loaded.coding.picked == {"keys": "exact", "values": "exact"} and loaded.coding.bits_per_value == 0
        assert loaded.coding.worst == "" and "coded" not in sq.inspect(path).manifest.structure
        # Nothing of it is lossy but the logits, so without them it is the state itself.
        bare = state(n_cached=seq, logits=None)
        assert reloaded(bare, path, policy(name)).state_id == bare.state_id


@pytest.mark.parametrize("name", MAIN)
def test_a_state_without_tokens_or_layers(name: str, path: Path) -> None:
    for snapshot in (
        state(LayerState("dynamic", {}, {"filled": False}), n_cached=0),
        state(dynamic(seq=0), n_cached=0),
        state(dynamic(dims=(8, 0), seed=1), logits=None),
        state(dynamic(heads=0)),
        dataclasses.replace(state(), cache=CacheState("none", (), {})),
    ):
        reloaded(snapshot, path, policy(name))


@pytest.mark.parametrize("name", MAIN)
def test_zero_vectors(name: str, path: Path) -> None:
    loaded = reloaded(changed(state(), torch.zero_), path, policy(name, step=0.001))
    for tensor in (loaded.tensors()[n] for n in KV):
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 0.05
        assert name == "transform" or not tensor.any()


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_vectors_that_no_codec_takes_are_kept_with_their_bits(name: str, dtype: torch.dtype, path: Path) -> None:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    snapshot = changed(state(), lambda t: t.to(dtype))
    keys = snapshot.cache.layers[0].tensors["keys"]
    payload = keys.new_tensor(float("nan")).view(width) | 5
    keys.view(width)[0, 0, 11, 2] = payload  # a NaN of its own
    keys[0, 1, 12, 0], keys[0, 1, 39, 7] = float("inf"), -float("inf")
    loaded = reloaded(snapshot, path, policy(name))
    again = loaded.tensors()["layers.0.keys"]
    for head, token in ((0, 11), (1, 12), (1, 39)):
        assert same(again[0, head, token], keys[0, head, token])
    assert loaded.coding and loaded.coding.n_exact_vectors == 3
    assert int((~torch.isfinite(again)).sum()) == 3
    others = (again != keys).any(-1)[0, :, 4:]
    assert others.float().mean() > 0.9
    errors = loaded.coding.errors["layers.0.keys"]
    assert 0 < errors.relative < 1 and 0 < errors.cosine < 1


@pytest.mark.parametrize("name", MAIN)
def test_numbers_beyond_float32_are_kept(name: str, path: Path) -> None:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.double()
        t[0, 0, 9, 1], t[0, 0, 10, 1] = 1e300, -3e39
        return t

    snapshot = changed(state(), change)
    loaded = reloaded(snapshot, path, policy(name))
    for tensor, before in ((loaded.tensors()[n], snapshot.tensors()[n]) for n in KV):
        assert same(tensor[0, 0, 9:11], before[0, 0, 9:11])
    assert loaded.coding and loaded.coding.n_exact_vectors == 8


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.999, 1e-3])
def test_the_largest_numbers_stay_finite(name: str, dtype: torch.dtype, share: float, path: Path) -> None:
    most = torch.finfo(dtype).max * share

    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.to(dtype)
        t[:, 0], t[:, 1, 20, 3] = most, -most
        return t

    loaded = reloaded(changed(state(), change), path, policy(name))
    assert loaded.coding
    for n in KV:
        assert torch.isfinite(loaded.tensors()[n]).all()
        assert loaded.coding.errors[n].relative < 0.7 and loaded.coding.errors[n].cosine > 0.9


@pytest.mark.parametrize("outlier", [1e3, 1e7, 1e30, 3e38])
def test_tokens_out_of_the_transforms_reach_are_kept(outlier: float, path: Path) -> None:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[0, 0, 20, 3] = outlier
        return t

    plain, snapshot = reloaded(state(), path, policy("transform")), changed(state(), change)
    loaded = reloaded(snapshot, path, policy("transform"))
    assert loaded.coding and plain.coding and plain.coding.n_exact_vectors == 0
    # A token is one vector of all layers: all that it has is kept, in each layer and head, or nothing.
    assert loaded.coding.n_exact_vectors == (8 if outlier > 1e5 else 0)
    for n in KV:
        if outlier > 1e5:
            assert same(loaded.tensors()[n][..., 20, :], snapshot.tensors()[n][..., 20, :])
        others = torch.arange(40) != 20
        assert torch.equal(loaded.tensors()[n][..., others, :], plain.tensors()[n][..., others, :])


def test_a_step_too_fine_for_symbols_keeps_everything(path: Path) -> None:
    snapshot = state()
    loaded = reloaded(snapshot, path, policy("transform", step=1e-9))
    assert loaded.coding and loaded.coding.n_exact_vectors == 4 * 2 * 36
    assert all(same(loaded.tensors()[n], snapshot.tensors()[n]) for n in KV)
    assert all(e.relative == 0 and e.cosine == 1 for e in loaded.coding.errors.values())


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
MAGNITUDES = st.sampled_from([0.0, 1e-45, 1e-38, 1e-7, 1.0, 6e4, 1e20, 3e38, float("inf"), float("nan")])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(VECTORS)), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
    DTYPES, MAGNITUDES, st.integers(0, 5), st.integers(0, 5), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_whatever_the_shape_and_the_numbers(
    name: str, batch: int, heads: int, seq: int, dim: int, dtype: torch.dtype, magnitude: float, n_sinks: int,
    n_recent: int, seed: int, padded: bool,
) -> None:  # fmt: skip
    dim += dim % 2 if name == "semq" else 0
    layer = dynamic(batch, seq, heads=heads, dims=(dim, dim), seed=seed)
    padding = [(seed * 7 + row) % (seq + 1) for row in range(batch)] if padded else ()
    snapshot = state(layer, batch=batch, n_cached=seq, padding=padding)
    places = torch.rand(layer.tensors["keys"].shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    snapshot = changed(snapshot, lambda t: (t.double() * torch.where(places, magnitude, 1.0)).to(dtype))
    tensors = snapshot.tensors()
    for made in symbolic.symbolise(snapshot, policy(name, n_sinks=n_sinks, n_recent=n_recent)):
        for part, bounds in made.group.alphabets.items():
            symbols = made.tensors[f"symbols.{part}"]
            assert not symbols.numel() or bounds[0] <= int(symbols.min()) <= int(symbols.max()) <= bounds[1]
        plain = json.loads(json.dumps(made.group.as_dict()))
        again = symbolic.restored(symbolic.Group.from_dict(plain), made.tensors, {}, seq, lambda _: calibration())
        assert again.keys() == made.errors.keys()
        for n, tensor in again.items():
            before = tensors[n]
            assert (tensor.dtype, tensor.shape) == (before.dtype, before.shape)
            odd = ~torch.isfinite(before.float()).all(-1)
            assert same(tensor[odd], before[odd]) and torch.isfinite(tensor[~odd]).all()
            assert same(tensor[..., :n_sinks, :], before[..., :n_sinks, :])
            assert same(tensor[..., seq - n_recent :, :], before[..., seq - n_recent :, :]) or n_recent > seq


# Files and identity


@pytest.mark.parametrize("name", MAIN)
def test_the_same_state_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    infos = [sq.save(state(), at, codec=policy(name)) for at in (first, second)]
    assert first.read_bytes() == second.read_bytes() and infos[0].state_id == infos[1].state_id
    other = sq.save(changed(state(), lambda t: t * 1.5), second, codec=policy(name))
    assert other.state_id != infos[0].state_id != state().state_id


@pytest.mark.parametrize("name", MAIN)
def test_what_was_loaded_is_a_state_of_its_own(name: str, path: Path) -> None:
    loaded = reloaded(state(), path, policy(name))
    sq.save(loaded, path)
    exact = sq.load(path)
    assert exact.coding is None and exact.state_id not in (loaded.state_id, state().state_id)
    assert all(same(t, loaded.tensors()[n]) for n, t in exact.tensors().items())
    assert exact.tensors().keys() == loaded.tensors().keys()
    # Coded once more it names the coded state as what it was made of.
    again = reloaded(loaded, path, everywhere(Uniform(bits=2)))
    assert again.coding and again.coding.source == loaded.state_id != again.state_id


def test_what_is_made_of_a_loaded_state_was_coded_no_more(path: Path) -> None:
    loaded = reloaded(state(batch=2), path, policy("rotated"))
    made = {
        "crop": loaded.crop(30),
        "select": loaded.select([1]),
        "fork": loaded.fork(2, seeds=(1, 2))[0],
        "to": loaded.to(dtype=torch.bfloat16),
    }
    assert all(each.coding is None and each.state_id != loaded.state_id for each in made.values())
    assert len({each.state_id for each in made.values()}) == 4
    for each in (loaded.crop(41), *loaded.fork(2), loaded.to("cpu")):
        assert each.coding == loaded.coding and each.state_id == loaded.state_id
    for each in made.values():
        sq.save(each, path)
        assert sq.load(path).state_id == each.state_id


def test_groups_are_of_a_bounded_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = state(*(dynamic(seed=i) for i in range(5)))
    whole = reloaded(snapshot, path, policy("uniform"))
    monkeypatch.setattr("semq_state.symbolic.states._GROUP_BYTES", 2 * 2 * 40 * 8 * 4)
    parts = reloaded(snapshot, path, policy("uniform"))
    groups = sq.inspect(path).manifest.structure["coded"]
    assert [len(g["stacks"][0]["names"]) for g in groups] == [2, 2, 1, 2, 2, 1]
    assert all(same(t, whole.tensors()[n]) for n, t in parts.tensors().items())


@pytest.mark.parametrize("name", MAIN)
def test_the_report_is_what_can_be_measured(name: str, path: Path) -> None:
    snapshot = changed(state(batch=2, padding=(0, 3)), lambda t: t.to(torch.bfloat16))
    loaded = reloaded(snapshot, path, policy(name))
    assert loaded.coding
    for n, error in loaded.coding.errors.items():
        before, after = (s.tensors()[n][..., 4:, :].double() for s in (snapshot, loaded))
        before[1, :, :3], after[1, :, :3] = 0, 0  # late sinks, which are not counted
        assert error.relative == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-3)
        cosine = float((before * after).sum() / before.norm() / after.norm())
        assert error.cosine == pytest.approx(cosine, rel=1e-3)
    info = sq.inspect(path)
    sections = taken_apart(path.read_bytes())["sections"]
    bits = 8 * sum(len(s["data"]) for n, s in sections.items() if n.startswith("coded."))
    n_values = sum(snapshot.tensors()[n].numel() for n in KV)
    assert loaded.coding.bits_per_value == pytest.approx(bits / n_values)
    raw = sum(t.numel() * t.element_size() for t in snapshot.tensors().values())
    assert loaded.coding.ratio == pytest.approx(raw / sum(len(s["data"]) for s in sections.values()))
    assert info.cache_bytes == snapshot.cache.n_bytes
    assert loaded.coding.worst == max(KV, key=lambda n: loaded.coding.errors[n].relative if loaded.coding else 0)


@pytest.mark.parametrize(
    "codec", ["gzip", "kl=", "kl=-1", "kl=0", "kl=1e400", "ratio=0", "ratio=x", "", "Exact", 3, None]
)
def test_words_that_mean_nothing_are_refused(codec: Any, path: Path) -> None:
    with pytest.raises(UnknownCodecError) as refusal:
        sq.save(state(), path, codec=codec, calibration=calibration())
    assert refusal.value.expected and refusal.value.found and refusal.value.do and not path.exists()


def test_counts_of_a_policy_are_counts() -> None:
    with pytest.raises(ValueError, match="n_sinks"):
        Policy(n_sinks=-1)
    with pytest.raises(ValueError, match="n_recent"):
        Policy(n_recent=-1)


# Hostile files


def small() -> Snapshot:
    """A state of few bytes, with an infinity, a late sink and a recent window, so that a file has every part."""
    snapshot = state(dynamic(2, 20, heads=1, dims=(4, 4)), batch=2, n_cached=20, padding=(0, 6), logits=None)
    keys = snapshot.cache.layers[0].tensors["keys"]
    keys[0, 0, 15, 1] = float("inf")
    return snapshot


def small_calibration() -> Calibration:
    return calibration(layer_set([0], n_heads=1, dims=(4, 4), rotary=None))


def small_policy(name: str) -> Policy:
    if name == "transform":
        return Policy(transform=Transform(small_calibration(), step=0.2), n_recent=2)
    return dataclasses.replace(policy(name), n_recent=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("compact") / "state"
    made = {}
    for name in EVERY:
        sq.save(small(), path, codec=small_policy(name))
        made[name] = path.read_bytes()
    return made


def load_small(path: Path) -> Snapshot:
    return sq.load(path, calibration=small_calibration())


@pytest.mark.parametrize("name", EVERY)
def test_pieces_put_together_are_the_same_state(name: str, good: dict[str, bytes], path: Path) -> None:
    path.write_bytes(put_together(signed(taken_apart(good[name]))))
    found = load_small(path)
    path.write_bytes(good[name])
    assert load_small(path).state_id == found.state_id and sq.verify(path).passed


@pytest.mark.parametrize("name", EVERY)
def test_damage_is_refused_by_name_or_harmless(name: str, good: dict[str, bytes], path: Path) -> None:
    """Flipped bytes all over the file: what is taken is the same state, but for what people are told."""
    data = good[name]
    path.write_bytes(data)
    whole = load_small(path)
    taken = []
    with path.open("r+b", buffering=0) as file:
        for at in range(EVERY.index(name), len(data), 31):
            file.seek(at)
            file.write(bytes([data[at] ^ (1 << at % 8)]))
            try:
                found = load_small(path)
                assert found.state_id == whole.state_id
                assert all(same(t, whole.tensors()[n]) for n, t in found.tensors().items())
                taken.append(at)
            except SemqStateError as error:
                assert str(path) in str(error) and error.expected and error.found and error.do
            file.seek(at)
            file.write(bytes([data[at]]))
    # No digest covers the report: a writer tells it, and a reader only shows it.
    begin = data.index(b"\xa6report")
    report = range(begin, data.index(b"\xa8state_id", begin))
    elsewhere = [at for at in taken if at not in report]
    assert len(elsewhere) < 8, [data[at - 10 : at + 10] for at in elsewhere]


@pytest.mark.parametrize("name", EVERY)
def test_truncated_files_are_refused(name: str, good: dict[str, bytes], path: Path) -> None:
    for n_bytes in range(0, len(good[name]), 101):
        path.write_bytes(good[name][:n_bytes])
        with pytest.raises(FormatError):
            load_small(path)


def assert_refused(path: Path, draft: Draft, *kinds: type[SemqStateError]) -> None:
    path.write_bytes(put_together(signed(draft)))
    with little_memory(), pytest.raises(SemqStateError) as refusal:
        load_small(path)
    assert type(refusal.value) in kinds, refusal.value
    assert str(refusal.value).count(str(path)) == 1 and len(str(refusal.value)) < 1500
    assert refusal.value.expected and refusal.value.found and refusal.value.do
    assert isinstance(sq.verify(path).passed, bool)
    with contextlib.suppress(SemqStateError):
        assert json.dumps(sq.inspect(path).as_dict())


def group(*way: Any, value: Any) -> Change:
    return put("manifest", "structure", "coded", 0, *way, value=value)


def again(draft: Draft) -> None:
    draft["manifest"]["structure"]["coded"] *= 2


def renamed(old: str, new: str) -> Change:
    def change(draft: Draft) -> None:
        tensors = draft["manifest"]["tensors"]
        tensors[new] = tensors.pop(old)

    return change


def part(name: str, dtype: torch.dtype, values: Any) -> Change:
    """Another tensor in place of a part, with digests that fit it."""

    def change(draft: Draft) -> None:
        tensor = torch.tensor(values, dtype=dtype)
        whole = dataclasses.replace(
            small(), generation=dataclasses.replace(small().generation, attributes={"x": tensor})
        )
        entry, section = _as_written(whole)
        section_name = draft["manifest"]["tensors"][name]["sections"][0][0]
        entry["sections"][0][0] = section_name
        draft["manifest"]["tensors"][name] = entry
        draft["sections"][section_name] = section

    return change


def _as_written(snapshot: Snapshot) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sq.save(snapshot, Path(folder) / "x", codec="exact", verify=False)
        draft = taken_apart((Path(folder) / "x").read_bytes())
    entry = draft["manifest"]["tensors"]["generation.attributes.x"]
    return entry, draft["sections"][entry["sections"][0][0]]


LIES: dict[str, tuple[Change, tuple[type[SemqStateError], ...]]] = {
    "no list": (put("manifest", "structure", "coded", value=3), (FormatError,)),
    "a list of numbers": (put("manifest", "structure", "coded", value=[3]), (FormatError,)),
    "no group at all": (put("manifest", "structure", "coded", value=[]), (IncompleteStateError,)),
    "nothing in it": (put("manifest", "structure", "coded", 0, value={}), (FormatError,)),
    "another codec": (group("codec", value="gzip"), (UnknownCodecError,)),
    "a codec that is no text": (group("codec", value=7), (FormatError,)),
    "a byte codec": (group("codec", value="planes"), (UnknownCodecError,)),
    "no stacks": (group("stacks", value=[]), (FormatError,)),
    "no names": (group("stacks", 0, "names", value=[]), (FormatError,)),
    "a name that is no text": (group("stacks", 0, "names", value=[1]), (FormatError,)),
    "a name twice": (group("stacks", 0, "names", value=["layers.0.keys"] * 2), (FormatError,)),
    "another tensor": (group("stacks", 0, "names", value=["layers.7.keys"]), (IncompleteStateError,)),
    "an exact tensor": (group("stacks", 0, "names", value=["generation.input_ids"]), (FormatError,)),
    "integers": (group("stacks", 0, "dtype", value="I64"), (FormatError,)),
    "booleans": (group("stacks", 0, "dtype", value="BOOL"), (FormatError,)),
    "eight bits": (group("stacks", 0, "dtype", value="F8_E4M3"), (FormatError,)),
    "another dtype": (group("stacks", 0, "dtype", value="F16"), (IntegrityError,)),
    "a flat shape": (group("stacks", 0, "shape", value=[20]), (FormatError,)),
    "a negative shape": (group("stacks", 0, "shape", value=[2, 1, 20, -4]), (FormatError,)),
    "a wider shape": (group("stacks", 0, "shape", value=[2, 1, 20, 8]), (IntegrityError,)),
    "no tokens": (group("stacks", 0, "shape", value=[2, 1, 0, 4]), (FormatError,)),
    "more tokens": (group("stacks", 0, "shape", value=[2, 1, 21, 4]), (FormatError, IntegrityError)),
    "oversized": (group("stacks", 0, "shape", value=[2, 1, 20, 1 << 30]), (IntegrityError,)),
    "overflowing": (group("stacks", 0, "shape", value=[1 << 40, 0, 20, 1 << 40]), (FormatError,)),
    "bounds backwards": (group("tokens", value=[18, 4]), (FormatError,)),
    "bounds outside": (group("tokens", value=[4, 21]), (FormatError,)),
    "bounds below": (group("tokens", value=[-1, 18]), (FormatError,)),
    "bounds elsewhere": (group("tokens", value=[5, 18]), (IntegrityError,)),
    "bounds shifted": (group("tokens", value=[3, 17]), (IntegrityError,)),
    "three bounds": (group("tokens", value=[4, 18, 20]), (FormatError,)),
    "fractional bounds": (group("tokens", value=[4.0, 18]), (FormatError,)),
    "nothing coded": (group("tokens", value=[4, 4]), (IntegrityError,)),
    "params that are a list": (group("params", value=[]), (FormatError,)),
    "no params": (group("params", value={}), (IntegrityError, sq.CalibrationError)),
    "a param besides": (group("params", "surplus", value=1), (IntegrityError,)),
    "no alphabets": (group("alphabets", value={}), (IncompleteStateError,)),
    "alphabets that are a list": (group("alphabets", value=[]), (FormatError, IncompleteStateError)),
    "an exact part besides": (group("exact", value=["surplus"]), (IncompleteStateError,)),
    "an exact part that is no text": (group("exact", value=[3]), (FormatError,)),
    "escapes of no stack": (group("escaped", value=[5]), (FormatError,)),
    "escapes twice": (group("escaped", value=[0, 0]), (FormatError,)),
    "no escapes": (group("escaped", value=[]), (IncompleteStateError,)),
    "a field besides": (group("surplus", value=1), (FormatError,)),
    "a field missing": (drop("manifest", "structure", "coded", 0, "escaped"), (FormatError,)),
    "coded twice": (again, (IncompleteStateError, FormatError)),
    "a part missing": (renamed("coded.0.first.0", "coded.9.first.0"), (IncompleteStateError,)),
    "a part of no group": (renamed("coded.0.first.0", "first.0"), (IncompleteStateError,)),
    "other first tokens": (part("coded.0.first.0", torch.float32, [1.0, 2.0]), (IntegrityError,)),
    "other last tokens": (part("coded.0.last.0", torch.float64, [[1.0, 2.0]]), (IntegrityError,)),
    "escapes outside": (part("coded.0.escaped_at.0", torch.int64, [28, 1, 2, 3, 4]), (IntegrityError,)),
    "escapes below": (part("coded.0.escaped_at.0", torch.int64, [-1, 1, 2, 3, 4]), (IntegrityError,)),
    "fewer escapes": (part("coded.0.escaped_at.0", torch.int64, [1]), (IntegrityError,)),
    "fractional escapes": (part("coded.0.escaped_at.0", torch.float32, [1, 2, 3, 4, 5.0]), (IntegrityError,)),
    "other escaped vectors": (part("coded.0.escaped.0", torch.float16, [[1.0] * 4] * 5), (IntegrityError,)),
    "a report of numbers": (put("manifest", "report", value={"codec": 1}), (FormatError,)),
    "a report without numbers": (put("manifest", "report", "ratio", value=float("nan")), (FormatError,)),
    "a report of odd errors": (put("manifest", "report", "errors", value={"x": [1.0]}), (FormatError,)),
    "a report with more": (put("manifest", "report", "surplus", value=1), (FormatError,)),
}


@pytest.mark.parametrize("name", ["uniform", "transform"])
@cases(LIES)
def test_lies_of_a_group_are_refused(name: str, case: Any, good: dict[str, bytes], path: Path) -> None:
    change, kinds = case
    draft = taken_apart(good[name])
    change(draft)
    assert_refused(path, draft, *kinds)


@pytest.mark.parametrize("name", EVERY)
def test_symbols_outside_their_alphabet_are_refused(name: str, good: dict[str, bytes], path: Path) -> None:
    alphabets = taken_apart(good[name])["manifest"]["structure"]["coded"][0]["alphabets"]
    for symbols, (lowest, highest) in alphabets.items():
        found = {(lowest + 1, highest), (lowest, highest - 1), (lowest, lowest), (highest, lowest), (0, 1 << 40)}
        refused = 0
        for bounds in sorted(found):
            draft = taken_apart(good[name])
            group("alphabets", symbols, value=list(bounds))(draft)
            path.write_bytes(put_together(signed(draft)))
            try:
                load_small(path)
            except FormatError:
                refused += 1
        assert refused >= 3, symbols


@pytest.mark.parametrize("name", EVERY)
def test_parts_of_another_dtype_or_shape_are_refused(name: str, good: dict[str, bytes], path: Path) -> None:
    tensors = taken_apart(good[name])["manifest"]["tensors"]
    parts = [n for n in tensors if ".symbols." in n or ".exact." in n]
    assert parts
    for n in parts:
        for change in (
            part(n, torch.int64, [1, 2, 3]),
            part(n, torch.int8, [0]),
            part(n, torch.uint8, [[0] * 4] * 28),
            part(n, torch.float32, [float("nan")] * 28),
            part(n, torch.int16, [] if ".components." not in n else [0]),
        ):
            draft = taken_apart(good[name])
            change(draft)
            assert_refused(path, draft, IntegrityError)


@pytest.mark.parametrize("name", EVERY)
def test_params_changed_at_random_never_end_in_another_error(name: str, good: dict[str, bytes], path: Path) -> None:
    generator = np.random.default_rng(5)
    params = taken_apart(good[name])["manifest"]["structure"]["coded"][0]["params"]
    values: list[Any] = [
        None, -1, 0, 1, 7, 1 << 40, 1 << 62, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "", "x" * 99, [], [0],
        [-(1 << 62)], [[]], {}, {"x": 1}, True, [0.0] * 3, [3, 4],
    ]  # fmt: skip
    for key in params:
        for i in generator.permutation(len(values))[:12]:
            draft = taken_apart(good[name])
            group("params", key, value=values[i])(draft)
            path.write_bytes(put_together(signed(draft)))
            with contextlib.suppress(SemqStateError):
                found = load_small(path)
                assert found.tensors()["layers.0.keys"].shape == (2, 1, 20, 4)


def test_a_file_of_nothing_but_claims_takes_no_memory(good: dict[str, bytes], path: Path) -> None:
    """Symbols of a value that is the same throughout cost little; what they stand for is bounded all the same."""
    n = 1 << 16
    zeros = torch.zeros(1, 1, n, 4)
    snapshot = state(LayerState("dynamic", {"keys": zeros, "values": zeros}, {"filled": True}), n_cached=n)
    sq.save(snapshot, path, codec=everywhere(Uniform()))
    draft = taken_apart(path.read_bytes())
    claims = {1 << 11: "1024 times", 1 << 20: "1024 times", 1 << 40: "a group of coded tensors"}
    for grown, expected in claims.items():
        group("stacks", 0, "shape", value=[grown, 1, n, 4])(draft)
        path.write_bytes(put_together(signed(draft)))
        with little_memory():
            for read in (sq.load, sq.inspect):
                with pytest.raises(FormatError, match=expected):
                    read(path)


# A run goes on from a compact file


RESUME = """
import sys, torch
sys.path[:0] = {paths}
import semq_state as sq
from conftest import tiny_model
torch.set_num_threads(1)
model = tiny_model()
for path in sys.argv[2:]:
    snapshot = sq.load(path, calibration=None if "rotated" in path else sys.argv[1])
    assert snapshot.coding is not None
    print(sq.restore(snapshot, model).generate(max_new_tokens=12, do_sample=False)[0].tolist())
"""


def test_a_run_goes_on_in_another_process(tmp_path: Path) -> None:
    """At a very fine step greedy tokens are those of a run that was never interrupted."""
    model = tiny_model()
    prompt = torch.randint(3, 190, (1, 40), generator=torch.Generator().manual_seed(4))
    greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(prompt, max_new_tokens=20, **greedy)
    with sq.capture(model) as run:
        model.generate(prompt, max_new_tokens=8, **greedy)
    snapshot = run.snapshot()
    made = calibration(layer_set(), weights=snapshot.provenance.weights)
    save_calibration(made, tmp_path / "calibration")
    sq.save(snapshot, tmp_path / "rotated", codec=everywhere(Rotated(step=2**-8)))
    sq.save(snapshot, tmp_path / "transform", codec=Transform(made, step=1e-3))
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", RESUME.format(paths=[str(here), str(here.parent)]),
         *(str(tmp_path / name) for name in ("calibration", "rotated", "transform"))],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert [json.loads(line) for line in found.stdout.splitlines()] == [whole[0].tolist()] * 2
