"""Save, load and inspect: what comes back is what was saved, under every codec and whatever the disk does."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import semq_state as sq
from semq_state import codecs, container, content
from semq_state.codecs import AbstractCodec, Encoded
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.errors import IncompleteStateError, IntegrityError, StoreError, UnknownCodecError
from semq_state.files import writing
from semq_state.provenance import Provenance
from semq_state.snapshot import CacheState, GenerationState, LayerState, ProcessorState, Snapshot, assemble
from semq_state.stores import LocalFile, atomic_write, check_writable, local

PRESETS = ["exact", "exact-max", "raw"]

each_preset = pytest.mark.parametrize("codec", PRESETS)


def bits(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bit patterns; as floats, NaNs and denormals among them."""
    spec = TensorSpec(dtype, shape)
    data = np.random.default_rng([seed, *shape]).integers(0, 256, spec.n_bytes, np.uint8)
    data = data & 1 if dtype == "BOOL" else data
    if not data.size:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.from_numpy(data).view(DTYPES[dtype]).reshape(shape)


def origin(**changed: Any) -> Provenance:
    known = {
        "weights": f"sha256:{'ab' * 32}",
        "config": {"model_type": "llama", "hidden_size": 32, "rope_theta": 1e4, "tied": True, "pad": None},
        "rope": {"rope_type": "default"},
        "tokenizer": None,
        "adapters": {"a": {"r": 8}},
        "quantization": {},
        "dtype": "bfloat16",
        "model_name": "tiny llama ✓",
        "versions": {"torch": "2.6"},
        "attention": "sdpa",
        "device": "cpu",
        "threads": 2,
        "created": "2025-01-01T00:00:00+00:00",
    }
    return Provenance(**(known | changed))


def state(n_tokens: int = 37, *, seed: int = 0, provenance: Provenance | None = None) -> Snapshot:
    """A snapshot with one of everything that a snapshot may hold."""

    def cached(dtype: str, tokens: int = n_tokens) -> dict[str, torch.Tensor]:
        return {name: bits(dtype, 2, 3, tokens, 8, seed=seed + i) for i, name in enumerate(("keys", "values"))}

    layers = (
        LayerState("dynamic", cached("BF16")),
        LayerState("sliding", cached("F32", 5), {"sliding_window": 6, "cumulative_length": n_tokens}),
        LayerState(
            "dynamic", {"keys": bits("F8_E4M3", 2, 3, n_tokens, 8), "values": bits("I8", 2, 3, n_tokens, 1)}
        ),
        LayerState("dynamic", {"values": torch.empty(2, 3, 0, 8), "keys": bits("F16", 2, 3, n_tokens, 8).mT}),
    )
    generation = GenerationState(
        input_ids=torch.arange(2 * (n_tokens + 1)).reshape(2, -1),
        prompt_length=max(0, n_tokens - 4),
        n_cached=n_tokens,
        finished=torch.tensor([True, False]),
        logits=bits("F32", 2, 99, seed=seed),
        step_inputs={"position_ids": bits("I32", 1, 1), "attention_mask": bits("BOOL", 2, n_tokens + 1)},
        step_values={"use_cache": True, "cutoff": 0.1, "none": None, "list": [1, "two", {"three": 3.0}]},
        rng={"cpu": bits("U8", 5056), "cuda:0": bits("U8", 16)},
        config={"do_sample": True, "temperature": 0.7},
        processors=(
            ProcessorState("logits", "Watermark", {"seen": bits("U64", 3), "key": bits("F64")}, {"step": 3}),
            ProcessorState("stopping", "Budget", {}, {"left": -1}),
        ),
    )
    return Snapshot(CacheState("dynamic", layers, {"grows": False}), generation, provenance or origin())


def raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors as values that `==` compares bit for bit."""
    specs = dict(content.specs_of(tensors))
    return {
        name: (specs[name].dtype, specs[name].shape, content.raw_bytes(t).tobytes()) for name, t in tensors.items()
    }


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    assert raw(found.tensors()) == raw(expected.tensors())
    assert found.structure() == expected.structure()
    assert found.provenance == expected.provenance
    assert found.state_id == expected.state_id


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".partial")]


# There and back


@each_preset
def test_everything_comes_back(codec: str, path: Path) -> None:
    expected = state()
    info = sq.save(expected, path, codec=codec)
    found = sq.load(path)
    assert_same(found, expected)
    assert found.known_digests == dict(expected.known_digests or content.all_digests(expected.tensors()))
    assert replace(found, known_digests={}).state_id == info.state_id == expected.state_id
    assert [layer.family for layer in found.cache.layers] == ["dynamic", "sliding", "dynamic", "dynamic"]
    assert (found.n_tokens, found.n_new_tokens, found.batch_size) == (38, 5, 2)


@each_preset
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(codec: str, dtype: str, path: Path) -> None:
    shapes = [(), (3,), (0,), (2, 0, 4), (1, 2, 7, 5)]
    layers = tuple(LayerState("mine", {"x": bits(dtype, *shape)}) for shape in shapes)
    expected = replace(state(2), cache=CacheState("dynamic", layers))
    sq.save(expected, path, codec=codec, verify=False)
    assert_same(sq.load(path), expected)


@each_preset
def test_everything_comes_back_on_a_big_endian_machine(
    codec: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    monkeypatch.setattr(content, "CHUNK_BYTES", 1000)
    sq.save(state(), path, codec=codec)
    assert_same(sq.load(path), state())


def test_least_state_comes_back(path: Path) -> None:
    empty = torch.empty(0, 0, dtype=torch.int64)
    least = GenerationState(empty, prompt_length=0, n_cached=0, finished=torch.empty(0, dtype=torch.bool))
    expected = Snapshot(CacheState("none", ()), least, origin())
    sq.save(expected, path)
    assert_same(sq.load(path), expected)


def test_loaded_tensors_can_be_written_to(path: Path) -> None:
    for codec in PRESETS:
        sq.save(state(), path, codec=codec)
        for tensor in sq.load(path).tensors().values():
            tensor.zero_()


def test_saving_a_loaded_snapshot_gives_the_same_file(path: Path) -> None:
    sq.save(state(), path)
    first = path.read_bytes()
    sq.save(sq.load(path), path)
    assert path.read_bytes() == first


# Identity


def test_identity_is_pinned() -> None:
    tensors = {"x": torch.tensor([[1, 2]], dtype=torch.int16)}
    digests = content.all_digests(tensors)
    whole = content.content_digest({"b": 1, "a": [0.5, None]}, dict(content.specs_of(tensors)), digests)
    assert digests == {"x": ("sha256:7b11c1133330cd161071bf23a0c9b6ce5320a8f3a0f83620035a72be46df4104",)}
    assert whole == "sha256:8794bd5e674f1c8d2762832bd1fba31bf9f4d3f5a7606bd6bdf102d9f63deb72"
    assert content.state_id(whole, {"dtype": "bfloat16"}) == (
        "sha256:0c59e1b07a566b6b8ae8cdd7216143b68ed9a0f91c113be764f06f6f04acaaed"
    )


def test_identity_depends_on_no_codec(tmp_path: Path) -> None:
    expected = state()
    ids = {sq.save(expected, tmp_path / codec, codec=codec).state_id for codec in PRESETS}
    assert ids == {expected.state_id} == {sq.load(tmp_path / codec).state_id for codec in PRESETS}


@pytest.mark.parametrize("n_workers", [1, 2, 7])
@each_preset
def test_identity_and_bytes_depend_on_no_thread_count(
    n_workers: int, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sq.save(state(), tmp_path / "a", codec=codec)
    monkeypatch.setattr(content, "n_workers", lambda: n_workers)
    sq.save(state(), tmp_path / "b", codec=codec)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert state().state_id == sq.inspect(tmp_path / "a").state_id
    assert_same(sq.load(tmp_path / "a"), state())


@each_preset
def test_file_depends_on_no_order_of_names(codec: str, tmp_path: Path) -> None:
    expected = state()
    layers = tuple(replace(x, tensors=dict(reversed(x.tensors.items()))) for x in expected.cache.layers)
    generation = replace(
        expected.generation,
        step_inputs=dict(reversed(expected.generation.step_inputs.items())),
        rng=dict(reversed(expected.generation.rng.items())),
        step_values=dict(reversed(expected.generation.step_values.items())),
        config=dict(reversed(expected.generation.config.items())),
    )
    turned = Snapshot(
        replace(expected.cache, layers=layers),
        generation,
        origin(config=dict(reversed(origin().config.items()))),
    )
    sq.save(expected, tmp_path / "a", codec=codec)
    sq.save(turned, tmp_path / "b", codec=codec)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    data = content.raw_bytes(tensor).copy()
    data[-1] ^= 1
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


CHANGES: dict[str, Callable[[Snapshot], Snapshot]] = {
    "a bit of a tensor": lambda s: replace(
        s, generation=replace(s.generation, logits=flipped(s.generation.logits))
    ),
    "a shape": lambda s: replace(
        s, generation=replace(s.generation, input_ids=s.generation.input_ids.reshape(1, -1))
    ),
    "a dtype": lambda s: replace(s, generation=replace(s.generation, logits=s.generation.logits.view(torch.int32))),
    "a value": lambda s: replace(s, generation=replace(s.generation, step_values={"use_cache": 1})),
    "a count": lambda s: replace(s, generation=replace(s.generation, prompt_length=0)),
    "a layer's window": lambda s: replace(
        s, cache=replace(s.cache, layers=(*s.cache.layers[:-1], replace(s.cache.layers[-1], meta={"x": 1})))
    ),
    "a layer's family": lambda s: replace(
        s, cache=replace(s.cache, layers=(replace(s.cache.layers[0], family="static"), *s.cache.layers[1:]))
    ),
    "the logits' presence": lambda s: replace(s, generation=replace(s.generation, logits=None)),
    "the weights": lambda s: replace(s, provenance=origin(weights="sha256:00")),
    "the configuration": lambda s: replace(s, provenance=origin(config={})),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_identity_depends_on(change: Callable[[Snapshot], Snapshot]) -> None:
    assert change(state()).state_id != state().state_id


def test_identity_depends_on_no_circumstance() -> None:
    elsewhere = origin(model_name="x", versions={}, attention="eager", device="cuda", threads=64, created="")
    assert state(provenance=elsewhere).state_id == state().state_id


# The file


@each_preset
def test_safetensors_opens_every_file(codec: str, path: Path) -> None:
    info = sq.save(state(), path, codec=codec)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "semq_state",
            "format_version": "5",
            "model": "tiny llama ✓",
            "state_id": info.state_id,
        }
        sections = {entry.section for t in info.manifest.tensors.values() for entry in t.sections}
        assert set(file.keys()) == sections | {"manifest"}
        assert file.get_tensor("manifest").numpy().tobytes() == info.manifest.to_bytes()


def test_raw_file_is_plain_tensors(path: Path) -> None:
    expected = state()
    sq.save(expected, path, codec="raw")
    found = load_file(path)
    del found["manifest"]
    assert raw(dict(sorted(found.items()))) == raw(dict(sorted(expected.tensors().items())))


def test_raw_tensors_are_aligned(path: Path) -> None:
    sq.save(state(), path, codec="raw")
    with LocalFile(path) as file:
        header = container.read_header(file.read, file.size, str(path))
    for section in header.sections.values():
        assert (header.data_start + section.begin) % section.spec.itemsize == 0


def test_inspect_tells_what_was_saved(path: Path) -> None:
    expected = state()
    info = sq.save(expected, path, codec="exact-max")
    assert info.as_dict() == sq.inspect(path).as_dict()
    shown = info.as_dict()
    assert shown["codec"] == "exact-max" and shown["families"] == ["dynamic", "sliding"]
    assert (shown["n_tokens"], shown["prompt_length"], shown["n_cached"], shown["n_layers"]) == (38, 33, 37, 4)
    assert shown["raw_bytes"] == sum(t.nbytes for t in expected.tensors().values())
    assert shown["cache_bytes"] == expected.cache.n_bytes
    assert shown["n_bytes"] == path.stat().st_size
    assert shown["provenance"] == expected.provenance.as_dict()
    assert shown["tensors"]["layers.1.keys"] == {"dtype": "F32", "shape": [2, 3, 5, 8]}


def test_inspect_reads_no_tensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = sq.save(state(), path)
    with LocalFile(path) as file:
        header = container.read_header(file.read, file.size, str(path))
    data = bytearray(path.read_bytes())
    for name, section in header.sections.items():
        if name != "manifest":
            data[header.data_start + section.begin : header.data_start + section.end] = b"?" * section.n_bytes
    path.write_bytes(data)
    read, n_read = LocalFile.read, []
    monkeypatch.setattr(LocalFile, "read", lambda *a: n_read.append(a[2]) or read(*a))
    assert sq.inspect(path).as_dict() == info.as_dict()
    assert sum(n_read) < header.data_start + header.sections["manifest"].n_bytes + 1
    with pytest.raises(IntegrityError):
        sq.load(path)


def test_presets_and_codec_values_are_taken(path: Path) -> None:
    assert sq.save(state(), path, codec=codecs.Planes(layout="channel")).codec == "planes"
    assert_same(sq.load(path), state())
    with pytest.raises(UnknownCodecError, match="exact-max"):
        sq.save(state(), path, codec="zip")
    assert_same(sq.load(path), state())


# Chunks


@pytest.mark.parametrize("codec", PRESETS)
def test_large_tensor_comes_back_in_chunks(codec: str, path: Path) -> None:
    keys = torch.randn(1, 3, 15_000, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = state(3)
    expected = replace(expected, cache=CacheState("dynamic", (LayerState("dynamic", {"keys": keys}),)))
    info = sq.save(expected, path, codec=codec, verify=False)
    entry = info.manifest.tensors["layers.0.keys"]
    assert entry.spec.chunks() == [(0, 10922), (10922, 15000)]
    assert len(entry.digests) == 2
    assert [s.section for s in entry.sections] == (
        ["layers.0.keys"] if codec == "raw" else ["layers.0.keys#0", "layers.0.keys#1"]
    )
    assert_same(sq.load(path), expected)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000])
@each_preset
def test_small_chunks_come_back(chunk_bytes: int, codec: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", chunk_bytes)
    expected = state()
    info = sq.save(expected, path, codec=codec)
    assert any(len(entry.digests) > 1 for entry in info.manifest.tensors.values())
    assert_same(sq.load(path), expected)
    assert sq.verify(path).passed


@pytest.mark.parametrize("shape", [(), (5,), (0,), (1, 0, 3), (1, 1), (3, 1000, 7), (2, 1001, 1000), (1, 10**6)])
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 8 << 20])
def test_chunks_cover_each_token_once(
    shape: tuple[int, ...], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", chunk_bytes)
    spec = TensorSpec("BF16", shape)
    bounds = spec.chunks()
    assert len(bounds) == spec.n_chunks
    assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert (bounds[0][0], bounds[-1][1]) == (0, spec.n_tokens)
    assert sum(spec.chunk(*each).n_bytes for each in bounds) == spec.n_bytes
    per_token = spec.n_bytes // spec.n_tokens if spec.n_tokens else spec.n_bytes
    assert all(spec.chunk(*each).n_bytes <= max(chunk_bytes, per_token) for each in bounds)


# The disk


def test_existing_file_is_replaced_in_one_step(path: Path) -> None:
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        sq.save(state(), path)
        assert reader.read() == b"old"
    assert_same(sq.load(path), state())
    assert names(path.parent) == [path.name]


def test_new_file_gets_the_usual_rights(path: Path) -> None:
    mask = os.umask(0o027)
    try:
        sq.save(state(), path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.fixture
def old(path: Path) -> Iterator[bytes]:
    """A file that each failing save must leave as it was, with nothing beside it."""
    sq.save(state(3), path)
    before = path.read_bytes()
    yield before
    assert path.read_bytes() == before
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_full_disk_leaves_the_old_file(old: bytes, path: Path, room: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(StoreError, match="nothing was changed") as refusal:
            sq.save(state(500), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(refusal.value.__cause__, OSError) and str(path) in str(refusal.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_disk_leaves_the_old_file(
    old: bytes, path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fails)
    with pytest.raises(StoreError, match="No space left"):
        sq.save(state(), path)
    monkeypatch.undo()


def test_interrupted_save_leaves_the_old_file(old: bytes, path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.save(state(), path, progress=interrupt)


def test_refusal_of_the_check_is_passed_on(old: bytes, path: Path) -> None:
    refusal = StoreError("elsewhere")

    def check(hidden: Path) -> None:
        raise refusal

    with pytest.raises(StoreError) as found, atomic_write(path, check=check):
        pass
    assert found.value is refusal


def test_cores_are_counted_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert content.n_workers() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert content.n_workers() == os.cpu_count()


class Forgetful(AbstractCodec):
    """Writes something else than it was given."""

    id = "forgetful"

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        return Encoded((np.zeros_like(data),), {})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        out[:] = payload


def test_wrongly_coded_file_is_never_seen(old: bytes, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs.DECODERS, "forgetful", Forgetful())
    with pytest.raises(IntegrityError, match=r"section .* sha256"):
        sq.save(state(), path, codec=Forgetful())


def test_file_changed_while_it_is_written_is_never_seen(
    old: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = writing._compare

    def other(hidden: Path, *rest: Any) -> None:
        sq.save(state(4), hidden.with_suffix(".other"), verify=False)
        hidden.write_bytes(hidden.with_suffix(".other").read_bytes())
        hidden.with_suffix(".other").unlink()
        compare(hidden, *rest)

    monkeypatch.setattr(writing, "_compare", other)
    with pytest.raises(IntegrityError, match="manifest just written"):
        sq.save(state(), path)


def test_unverified_save_does_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs.DECODERS, "forgetful", Forgetful())
    sq.save(state(), path, codec=Forgetful(), verify=False)
    with pytest.raises(IntegrityError):
        sq.load(path)


@pytest.mark.parametrize(
    "place",
    [
        lambda folder: folder / "missing" / "state",
        lambda folder: folder / "file" / "state",
        lambda folder: folder,
        lambda folder: folder / ("x" * 300),
        lambda folder: Path("/proc/state"),
        lambda folder: folder / "nul\0byte",
    ],
    ids=["missing folder", "under a file", "folder", "long name", "proc", "nul"],
)
def test_impossible_path_is_refused(place: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for refused in (lambda: sq.save(state(3), place(tmp_path)), lambda: check_writable(place(tmp_path))):
        with pytest.raises(StoreError) as refusal:
            refused()
        assert str(place(tmp_path)) in str(refusal.value)
    assert names(tmp_path) == ["file"]


def test_writable_path_is_left_as_it_was(path: Path) -> None:
    check_writable(path)
    assert names(path.parent) == []


@pytest.mark.parametrize(
    "place",
    [
        lambda folder: folder / "missing",
        lambda folder: folder / "file" / "state",
        lambda folder: folder,
        lambda folder: Path("/dev/null"),
        lambda folder: folder / "nul\0byte",
    ],
    ids=["missing", "under a file", "folder", "device", "nul"],
)
@pytest.mark.parametrize("read", [sq.load, sq.inspect, sq.verify])
def test_path_without_a_file_is_refused(read: Callable[[Path], Any], place: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="readable file") as refusal:
        read(place(tmp_path))
    assert str(place(tmp_path)) in str(refusal.value)


def test_refused_paths_leave_no_file_open(tmp_path: Path) -> None:
    before = names(Path("/proc/self/fd"))
    refusals = []
    for place in (tmp_path, Path("/dev/null"), tmp_path / "missing"):
        with pytest.raises(StoreError) as refusal:
            LocalFile(place)
        refusals.append(refusal)
    assert names(Path("/proc/self/fd")) == before


@pytest.mark.timeout(10)
def test_pipe_is_refused_without_waiting(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(StoreError, match="readable file"):
        sq.load(path)


def test_failed_read_is_a_store_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    sq.save(state(), path)
    for name in ("preadv", "pread"):
        monkeypatch.setattr(os, name, fails)
        with pytest.raises(StoreError, match="Input/output error") as refusal:
            sq.load(path)
        assert str(path) in str(refusal.value)


def test_file_is_read_without_pread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sq.save(state(), path)
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "preadv")
    assert_same(sq.load(path), state())


def test_short_reads_are_joined(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sq.save(state(), path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n_bytes, at: pread(file, min(n_bytes, 300), at))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:300]], at))
    assert_same(sq.load(path), state())


def test_file_that_shrinks_while_read_is_refused(path: Path) -> None:
    sq.save(state(), path)
    with LocalFile(path) as file:
        os.truncate(path, 1000)
        assert len(file.read(0, 1000)) == 1000
        with pytest.raises(StoreError, match="shorter"):
            file.read(900, 200)
        with pytest.raises(StoreError, match="shorter"):
            file.read(5000, 1)
        with pytest.raises(StoreError, match=r"expected 200 bytes at 900, found 100.*shorter"):
            file.read_into(900, memoryview(bytearray(200)))


# Leftovers of killed writers


def test_leftovers_are_removed_but_not_a_live_writers_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.safetensors"
    dead = [tmp_path / f".{path.name}.{i}.partial" for i in range(3)]
    others = [
        tmp_path / ".a1x.safetensors.0.partial",
        tmp_path / f".{path.name}.partial.txt",
        tmp_path / ".b.0.partial",
    ]
    for file in (*dead, *others):
        file.write_bytes(b"left")
    with atomic_write(path) as live:
        live.write(b"live")
        before = hidden(tmp_path)
        sq.save(state(3), path)
        assert hidden(tmp_path) == before
        assert len({*before} - {file.name for file in others}) == 1
    assert path.read_bytes() == b"live"
    assert all(file.exists() for file in others) and not any(file.exists() for file in dead)


def test_systems_without_locks_keep_leftovers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "fcntl", None)
    left = path.with_name(f".{path.name}.0.partial")
    left.write_bytes(b"left")
    sq.save(state(3), path)
    assert_same(sq.load(path), state(3))
    assert hidden(path.parent) == [left.name]


def test_killed_writer_is_cleaned_up_after(path: Path) -> None:
    path.write_bytes(b"old")
    script = (
        "import sys, time\n"
        "from semq_state.stores import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(bytes(1 << 21))\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout and writer.stdout.readline() == b"writing\n"
            with atomic_write(path) as file:
                assert len(hidden(path.parent)) == 2
                file.write(b"new")
            assert len(hidden(path.parent)) == 1
        finally:
            writer.kill()
    assert len(hidden(path.parent)) == 1
    sq.save(state(3), path)
    assert hidden(path.parent) == []
    assert_same(sq.load(path), state(3))


# Progress


@pytest.mark.parametrize("verify", [True, False])
@each_preset
def test_progress_reaches_the_whole(codec: str, verify: bool, path: Path) -> None:
    n_bytes = sum(t.nbytes for t in state().tensors().values())
    saved: list[tuple[int, int]] = []
    loaded: list[tuple[int, int]] = []
    verified: list[tuple[int, int]] = []
    sq.save(state(), path, codec=codec, verify=verify, progress=lambda *x: saved.append(x))
    sq.load(path, progress=lambda *x: loaded.append(x))
    sq.verify(path, progress=lambda *x: verified.append(x))
    for calls, total in ((saved, n_bytes * (1 + verify)), (loaded, n_bytes), (verified, n_bytes)):
        assert calls[-1] == (total, total)
        assert calls == sorted(calls) and {whole for _, whole in calls} == {total}


def test_failing_progress_ends_the_load(path: Path) -> None:
    sq.save(state(), path)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sq.load(path, progress=fail)


# Assembly


def test_missing_or_spare_tensor_is_named() -> None:
    whole = state()
    for name in whole.tensors():
        fewer = {key: tensor for key, tensor in whole.tensors().items() if key != name}
        with pytest.raises(IncompleteStateError, match=name):
            assemble(whole.structure(), fewer, whole.provenance, {})
    with pytest.raises(IncompleteStateError, match=r"layers\.9\.keys"):
        assemble(whole.structure(), whole.tensors() | {"layers.9.keys": bits("U8", 1)}, whole.provenance, {})
    spare = {f"layers.{i}.keys": bits("U8", 1) for i in range(9, 1000)}
    with pytest.raises(IncompleteStateError) as refusal:
        assemble(whole.structure(), whole.tensors() | spare, whole.provenance, {})
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64)])
def test_tensor_without_a_place_in_a_file_is_refused(tensor: torch.Tensor, old: bytes, path: Path) -> None:
    layers = (LayerState("dynamic", {"keys": tensor}),)
    with pytest.raises(sq.UnsupportedModelError, match=r"layers\.0\.keys"):
        sq.save(replace(state(), cache=CacheState("dynamic", layers)), path)
