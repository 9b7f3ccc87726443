"""Hostile files: whatever the bytes say, reading them ends in a named error of ours and takes little memory."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
import resource
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import semq_state as sq
from semq_state import content
from semq_state.codecs import Planes
from semq_state.errors import (
    FormatError,
    IncompleteStateError,
    IntegrityError,
    SemqStateError,
    StoreError,
    UnknownCodecError,
)
from semq_state.provenance import IDENTITY, Provenance
from semq_state.snapshot import CacheState, GenerationState, LayerState, ProcessorState, Snapshot

pytestmark = pytest.mark.timeout(60)

MEMORY = 64 << 20
Draft = dict[str, Any]
Change = Callable[[Draft], object]


def tiny() -> Snapshot:
    """The smallest state that has one of everything; layer 0 has a plane worth coding."""
    keys = torch.arange(160).reshape(1, 1, 40, 4).to(torch.bfloat16)
    layers = (
        LayerState("dynamic", {"keys": keys, "values": keys[:, :, :1]}, {"filled": True}),
        LayerState("dummy", {}),
    )
    generation = GenerationState(
        input_ids=torch.arange(41)[None],
        prompt_length=4,
        n_cached=40,
        finished=torch.tensor([False]),
        logits=torch.zeros(1, 3),
        step_inputs={"attention_mask": torch.ones(1, 2, dtype=torch.int64)},
        step_values={"use_cache": True},
        rng={"cpu": torch.arange(9, dtype=torch.uint8)},
        config={"top_k": 5},
        processors=(ProcessorState("logits", "Counting", {"seen": torch.ones(1)}, {"n": 3}),),
    )
    provenance = Provenance("sha256:ab", {"n": 1}, {}, None, {}, {}, "bfloat16", "small", {"torch": "2"}, "sdpa")
    return Snapshot(CacheState("dynamic", layers, {"grows": False}), generation, provenance)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("good") / "state"
    made = {}
    for codec in ("exact", "exact-max", "raw"):
        sq.save(tiny(), path, codec=codec)
        made[codec] = path.read_bytes()
    return made


# A file in pieces, and together again with its digests made to fit


def taken_apart(data: bytes) -> Draft:
    n_header = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_header])
    metadata = header.pop("__metadata__")
    start = 8 + n_header
    sections = {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data": data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        }
        for name, entry in header.items()
    }
    manifest = msgpack.unpackb(sections.pop("manifest")["data"])
    return {"metadata": metadata, "sections": sections, "manifest": manifest}


def put_together(draft: Draft, *, manifest: bytes | None = None) -> bytes:
    header, data = {"__metadata__": draft["metadata"]}, b""
    packed = content.pack(draft["manifest"]) if manifest is None else manifest
    last = {"dtype": "U8", "shape": [len(packed)], "data": packed}
    for name, section in {**draft["sections"], "manifest": last}.items():
        offsets = [len(data), len(data) + len(section["data"])]
        header[name] = {"dtype": section["dtype"], "shape": section["shape"], "data_offsets": offsets}
        data += section["data"]
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def signed(draft: Draft) -> Draft:
    """Digests that fit the lies; where the lies leave nothing to sign, the old ones stay."""
    manifest = draft["manifest"]
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
        tensors = {name: [t["dtype"], t["shape"], t["digests"]] for name, t in manifest["tensors"].items()}
        manifest["content_digest"] = sha256({"structure": manifest["structure"], "tensors": tensors})
        identity = {name: manifest["provenance"][name] for name in IDENTITY}
        manifest["state_id"] = sha256({"content": manifest["content_digest"], "identity": identity})
        draft["metadata"]["state_id"] = manifest["state_id"]
    return draft


def sha256(value: Any) -> str:
    return content.digest(np.frombuffer(content.pack(value), np.uint8))


def put(*way: Any, value: Any) -> Change:
    """A change that sets one field, `put("manifest", "codec", value=3)` say."""

    def change(draft: Draft) -> None:
        at: Any = draft
        for step in way[:-1]:
            at = at[step]
        at[way[-1]] = copy.deepcopy(value)

    return change


def drop(*way: Any) -> Change:
    def change(draft: Draft) -> None:
        at: Any = draft
        for step in way[:-1]:
            at = at[step]
        del at[way[-1]]

    return change


def both(*changes: Change) -> Change:
    return lambda draft: [change(draft) for change in changes]


# What every refusal must be


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Fails what takes much memory: Python's and numpy's by count, torch's because the address space is short."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), limits[1]))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_refused(path: Path, data: bytes, kind: type[SemqStateError]) -> None:
    path.write_bytes(data)
    with little_memory():
        with pytest.raises(SemqStateError) as refusal:
            sq.load(path)
        assert type(refusal.value) is kind, refusal.value
        assert str(refusal.value).count(str(path)) == 1 and len(str(refusal.value)) < 1000
        assert refusal.value.expected and refusal.value.found and refusal.value.do
        verdict = sq.verify(path)
        assert not verdict.passed and all(str(path) in text for text in verdict.failures.values())
        assert json.dumps(verdict.as_dict())
        try:
            info = sq.inspect(path)
        except SemqStateError as error:
            assert type(error) is kind
        else:
            assert json.dumps(info.as_dict())


def cases(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table)


@pytest.mark.parametrize("codec", ["exact", "exact-max", "raw"])
def test_pieces_put_together_are_the_same_state(codec: str, good: dict[str, bytes], path: Path) -> None:
    path.write_bytes(put_together(signed(taken_apart(good[codec]))))
    assert sq.load(path).state_id == tiny().state_id
    assert sq.verify(path).passed


# Damage by chance


@pytest.mark.parametrize("codec", ["exact", "raw"])
def test_truncated_file_is_refused(codec: str, good: dict[str, bytes], path: Path) -> None:
    path.write_bytes(good[codec])
    for n_bytes in reversed(range(len(good[codec]))):
        with path.open("r+b") as file:
            file.truncate(n_bytes)
        with pytest.raises(FormatError, match=re.escape(str(path))):
            sq.load(path)
        if n_bytes % 97 == 0:
            assert sq.verify(path).failures.keys() == {"file"}


def test_truncated_at_every_boundary_is_refused(good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little")
    ends = {start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    for end in sorted(ends | {0, 8, start}):
        if end < len(data):
            assert_refused(path, data[:end], FormatError)


@pytest.mark.parametrize("n_bytes", [1, 8, 4096])
def test_trailing_bytes_are_refused(n_bytes: int, good: dict[str, bytes], path: Path) -> None:
    assert_refused(path, good["exact"] + bytes(n_bytes), FormatError)


def free_text(data: bytes) -> set[int]:
    """Offsets of what no digest covers: names and circumstances for people, which prove nothing (FORMAT.md)."""
    shown = {
        "header": rb'"(format_version":"5","model":"small)"',
        # 4 is a version too, and says the same of a state without hidden states.
        "version": rb"\xaeformat_version(\x05)",
        "codec": rb"\xa5codec\xa5(exact)",
        "writer": rb"\xa6writer.(.*)\Z",
        "attention": rb"\xa9attention\xa4(sdpa)",
        "model": rb"\xaamodel_name\xa5(small)",
        "threads": rb"\xa7threads(\x00)",
        "versions": rb"\xa8versions\x81\xa5(torch)\xa1(2)",
    }
    found = [re.search(pattern, data, re.DOTALL) for pattern in shown.values()]
    groups = [match.span(i) for match in found if match for i in range(1, 1 + (match.lastindex or 0))]
    return {at for span in groups for at in range(*span)}


def taken_when_flipped(data: bytes, path: Path, mask: Callable[[int], int]) -> set[int]:
    """Offsets of the bytes that may change without a refusal; the state is the same each time."""
    taken = set()
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(data):
            file.seek(at)
            file.write(bytes([byte ^ mask(at)]))
            try:
                assert sq.load(path).state_id == tiny().state_id
                taken.add(at)
            except SemqStateError as error:
                assert str(path) in str(error)
            file.seek(at)
            file.write(bytes([byte]))
    assert sq.verify(path).passed
    return taken


def test_every_byte_counts_but_the_names_for_people(good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    taken, free = taken_when_flipped(data, path, lambda at: 1), free_text(data)
    quotes = {at for at in free if data[at] in b'":,'}
    assert free - quotes <= taken <= free, [(at, data[at - 20 : at + 20]) for at in sorted(taken ^ free)]


def test_every_bit_counts_but_one_that_zstandard_ignores(good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    unused = data.index(b"\x28\xb5\x2f\xfd") + 4
    taken = taken_when_flipped(data, path, lambda at: 0x10 if at == unused else 1 << at % 8)
    assert taken <= free_text(data) | {unused}
    assert unused in taken


@pytest.mark.parametrize("codec", ["exact", "exact-max", "raw"])
def test_damaged_section_is_named(codec: str, good: dict[str, bytes], path: Path) -> None:
    n_damaged = 0
    for name, section in taken_apart(good[codec])["sections"].items():
        for at in range(0, len(section["data"]), 7):
            draft = taken_apart(good[codec])
            damaged = bytearray(section["data"])
            damaged[at] ^= 0x55
            draft["sections"][name]["data"] = bytes(damaged)
            path.write_bytes(put_together(draft))
            with pytest.raises(IntegrityError, match=re.escape(f"{path}, section {name!r}")):
                sq.load(path)
            verdict = sq.verify(path)
            assert verdict.failures.keys() == {name} and str(path) in verdict.failures[name]
            assert verdict.n_sections == len(draft["sections"]) and verdict.state_id == tiny().state_id
            assert sq.inspect(path).state_id == tiny().state_id
            n_damaged += 1
    assert n_damaged > 50


def test_every_damaged_section_is_named(good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["raw"])
    for section in draft["sections"].values():
        section["data"] = bytes(byte ^ 1 for byte in section["data"])
    path.write_bytes(put_together(draft))
    assert sq.verify(path).failures.keys() == draft["sections"].keys()


def test_random_damage_is_refused(good: dict[str, bytes], path: Path) -> None:
    random = np.random.default_rng(3)
    for _ in range(400):
        data = bytearray(good["exact"])
        at, n_bytes = int(random.integers(len(data))), int(random.integers(1, 64))
        junk = random.integers(0, 256, n_bytes, np.uint8).tobytes()
        how = random.integers(3)
        data[at : at + (n_bytes if how else 0)] = junk if how < 2 else b""
        path.write_bytes(data)
        with contextlib.suppress(SemqStateError):
            assert sq.load(path).state_id == tiny().state_id
        assert isinstance(sq.verify(path).passed, bool)


# Other files


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("state", "x" * 100)
    return file.getvalue()


def torch_saved() -> bytes:
    file = io.BytesIO()
    torch.save({"keys": torch.zeros(3)}, file)
    return file.getvalue()


OTHER_FILES = {
    "empty": b"",
    "one byte": b"\0",
    "eight zeros": bytes(8),
    "many zeros": bytes(100_000),
    "ones": b"\xff" * 1000,
    "text": b"Dear reader, this is no snapshot.\n" * 100,
    "json": b'{"__metadata__":{"format":"semq_state"}}',
    "pickle": pickle.dumps({"keys": list(range(1000))}),
    "zip": zipped(),
    "torch": torch_saved(),
    "msgpack": content.pack({"format_version": 1}),
    "header only": with_header(b"{}", b""),
    "metadata only": with_header(b'{"__metadata__":{"format":"semq_state"}}', b""),
}


@cases(OTHER_FILES)
def test_other_file_is_refused(case: bytes, path: Path) -> None:
    assert_refused(path, case, FormatError)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "x" * 10**5}, {"format": "semq_state"}])
def test_plain_weights_are_refused(metadata: dict[str, str] | None, path: Path) -> None:
    save_file({"weight": torch.zeros(1000, 10)}, path, metadata)
    assert_refused(path, path.read_bytes(), FormatError)


# Headers that lie


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def field(name: str, key: str, value: Any) -> Change:
    return put(name, key, value=value)


def moved(by: tuple[int, int], name: str = "layers.0.values") -> Change:
    def change(header: Draft) -> None:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + by[0], end + by[1]]

    return change


HEADER_LIES: dict[str, Change] = {
    "overlap": moved((-4, -4)),
    "overlap by one": moved((-1, 0)),
    "overlap that adds up": both(moved((-1, 0)), lambda h: h["layers.0.values"].update(shape=[9])),
    "gap": moved((1, 0)),
    "shorter": moved((0, -1)),
    "longer": moved((0, 1)),
    "out of the file": moved((1 << 40, 1 << 40)),
    "ends past the file": moved((0, 1 << 50), "manifest"),
    "the same bytes twice": lambda h: h["layers.0.values"].update(data_offsets=h["layers.0.keys"]["data_offsets"]),
    "negative": field("layers.0.keys", "data_offsets", [-8, 0]),
    "backwards": field("layers.0.keys", "data_offsets", [8, 0]),
    "beyond 64 bits": field("layers.0.keys", "data_offsets", [0, 1 << 64]),
    "hundreds of digits": field("layers.0.keys", "data_offsets", [0, 10**900]),
    "float offsets": field("layers.0.keys", "data_offsets", [0.0, 8.0]),
    "bool offsets": field("layers.0.keys", "data_offsets", [False, True]),
    "text offsets": field("layers.0.keys", "data_offsets", ["0", "8"]),
    "no offsets": field("layers.0.keys", "data_offsets", None),
    "three offsets": field("layers.0.keys", "data_offsets", [0, 4, 8]),
    "one offset": field("layers.0.keys", "data_offsets", [0]),
    "offsets in a table": field("layers.0.keys", "data_offsets", {"0": 0}),
    "unknown dtype": field("layers.0.keys", "dtype", "F4"),
    "lower case dtype": field("layers.0.keys", "dtype", "u8"),
    "dtype a number": field("layers.0.keys", "dtype", 8),
    "dtype a list": field("layers.0.keys", "dtype", ["U8"]),
    "dtype a table": field("layers.0.keys", "dtype", {"U8": 1}),
    "no dtype": drop("layers.0.keys", "dtype"),
    "no shape": drop("layers.0.keys", "shape"),
    "more besides": field("layers.0.keys", "more", 1),
    "shape a number": field("layers.0.keys", "shape", 8),
    "shape none": field("layers.0.keys", "shape", None),
    "negative shape": field("layers.0.keys", "shape", [-1, -8]),
    "float shape": field("layers.0.keys", "shape", [8.0]),
    "bool shape": field("layers.0.keys", "shape", [True]),
    "huge shape": field("layers.0.keys", "shape", [1 << 60]),
    "overflowing shape": field("layers.0.keys", "shape", [1 << 32, 1 << 32]),
    "overflowing shape of nothing": field("layers.0.keys", "shape", [1 << 63, 1 << 63, 0]),
    "many dimensions": field("layers.0.keys", "shape", [1] * 10_000),
    "negative shape that adds up": field("layers.0.values", "shape", [-1, -8]),
    "float shape that adds up": field("layers.0.values", "shape", [8.0]),
    "bool shape that adds up": field("layers.0.values", "shape", [True, 8]),
    "many dimensions that add up": field("layers.0.values", "shape", [8] + [1] * 16),
    "float offsets that add up": lambda h: h["layers.0.values"].update(
        data_offsets=[float(at) for at in h["layers.0.values"]["data_offsets"]]
    ),
    "long shape": field("layers.0.keys", "shape", [10**900] * 16),
    "nested shape": field("layers.0.keys", "shape", [[8]]),
    "section a list": put("layers.0.keys", value=[]),
    "section a number": put("layers.0.keys", value=1),
    "section none": put("layers.0.keys", value=None),
    "section gone": drop("layers.0.keys"),
    "section besides": put("more", value={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "manifest gone": drop("manifest"),
    "long name": put("x" * 10**6, value={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "long junk": put("layers.0.keys", value=["x" * 10**6]),
    "long metadata": put("__metadata__", "format", value="x" * 10**6),
    "metadata a list": put("__metadata__", value=[]),
    "metadata none": put("__metadata__", value=None),
    "metadata of numbers": put("__metadata__", "format_version", value=1),
    "metadata nested": put("__metadata__", "format", value={"semq_state": "1"}),
    "metadata gone": drop("__metadata__"),
    "no format": drop("__metadata__", "format"),
    "another format": put("__metadata__", "format", value="pt"),
}

HEADER_KINDS = {"section besides": IntegrityError, "long name": IntegrityError}


@pytest.mark.parametrize("name", HEADER_LIES)
def test_lying_header_is_refused(name: str, good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    header = header_of(data)
    HEADER_LIES[name](header)
    lie = with_header(json.dumps(header).encode(), data[8 + int.from_bytes(data[:8], "little") :])
    assert_refused(path, lie, HEADER_KINDS.get(name, FormatError))


def test_section_named_twice_is_refused(good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    n_header = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + n_header].decode()
    entry = json.dumps(header_of(data)["layers.0.values"])
    twice = text.rstrip()[:-1] + f',"layers.0.values":{entry}}}'
    assert json.loads(twice) == json.loads(text)
    assert_refused(path, with_header(twice.encode(), data[8 + n_header :]), FormatError)


@pytest.mark.parametrize("name", ["state_id", "gone"])
def test_header_and_manifest_must_name_the_same_state(name: str, good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["exact"])
    change = {"state_id": put("metadata", "state_id", value="sha256:00"), "gone": drop("metadata", "state_id")}
    change[name](draft)
    assert_refused(path, put_together(draft), IntegrityError)


HEADER_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "text": b'"manifest"',
    "two objects": b"{}{}",
    "cut": b'{"manifest":',
    "no json": b"manifest: 1",
    "not UTF-8": b'{"\xff\xfe":{}}',
    "UTF-16": '{"manifest":{}}'.encode("utf-16"),
    "overlong UTF-8": b'{"\xc0\x80":{}}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested metadata": b'{"__metadata__":{"a":' + b"[" * 900 + b"]" * 900 + b"}}",
    "nested whole": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "not a number": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,Infinity]}}',
    "a number too long": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    "a name twice": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}',
    "a field twice": b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "metadata twice": b'{"__metadata__":{"format":"semq_state"},"__metadata__":{"format":"pt"}}',
    "lone surrogate": b'{"__metadata__":{"format":"\\ud800"}}',
    "terminal escapes": b'{"__metadata__":{"format":"\\u001b[2J\\u0007"}}',
}


@cases(HEADER_TEXTS)
def test_odd_header_text_is_refused(case: bytes, path: Path) -> None:
    assert_refused(path, with_header(case, b""), FormatError)
    with pytest.raises(FormatError) as refusal:
        sq.load(path)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("depth", range(880, 1010))
@pytest.mark.parametrize("where", ["section", "metadata"])
def test_nesting_near_the_recursion_limit_is_refused(depth: int, where: str, path: Path) -> None:
    nested = "[" * depth + "]" * depth
    text = {"section": f'{{"a":{nested}}}', "metadata": f'{{"__metadata__":{nested}}}'}[where]
    path.write_bytes(with_header(text.encode(), b""))
    with pytest.raises(FormatError):
        sq.load(path)


@pytest.mark.parametrize("n_header", [1, 1 << 20, (16 << 20) + 1, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_claimed_header_length_is_refused(n_header: int, good: dict[str, bytes], path: Path) -> None:
    assert_refused(path, n_header.to_bytes(8, "little") + good["exact"][8:], FormatError)


def test_header_over_the_limit_is_refused_unread(path: Path) -> None:
    size = (16 << 20) + 8
    path.write_bytes(with_header(b'{"__metadata__":{"format":"semq_state"}}'.ljust(size), b""))
    with pytest.raises(FormatError, match="at most 16777216 bytes"):
        sq.load(path)


def test_safetensors_refuses_the_same_headers(good: dict[str, bytes], path: Path) -> None:
    ours = {"more besides", "section besides", "long name", "manifest gone", "long metadata", "metadata none"}
    ours |= {"metadata gone", "no format", "another format", "many dimensions that add up"}
    data = good["exact"]
    for name, change in HEADER_LIES.items():
        header = header_of(data)
        change(header)
        path.write_bytes(with_header(json.dumps(header).encode(), data[8 + int.from_bytes(data[:8], "little") :]))
        try:
            with safe_open(path, framework="pt") as file:
                taken = bool(file.keys())
        except SafetensorError:
            taken = False
        assert taken == (name in ours and name != "manifest gone"), name


# Manifests that lie, with digests that fit the lies

KEYS = ("manifest", "tensors", "layers.0.keys")
IDS = ("manifest", "tensors", "generation.input_ids")
CACHE = ("manifest", "structure", "cache")
STATE = ("manifest", "structure", "generation")
ORIGIN = ("manifest", "provenance")
DIGEST = f"sha256:{'0' * 64}"


def shape(*sizes: Any) -> Change:
    return put(*KEYS, "shape", value=list(sizes))


def section_of_keys(index: int, value: Any) -> Change:
    return put(*KEYS, "sections", 0, index, value=value)


def tokens(n_tokens: int) -> Change:
    return both(shape(1, 1, n_tokens, 4), section_of_keys(2, n_tokens))


MANIFEST_LIES: dict[str, tuple[type[SemqStateError], Change]] = {
    # format
    "newer format": (FormatError, put("manifest", "format_version", value=6)),
    "older format": (FormatError, put("manifest", "format_version", value=0)),
    "format in text": (FormatError, put("manifest", "format_version", value="1")),
    "format a float": (FormatError, put("manifest", "format_version", value=1.0)),
    "format a bool": (FormatError, put("manifest", "format_version", value=True)),
    "format long text": (FormatError, put("manifest", "format_version", value="1" * 10**5)),
    "no format": (FormatError, drop("manifest", "format_version")),
    "no writer": (FormatError, drop("manifest", "writer")),
    "no tensors": (FormatError, drop("manifest", "tensors")),
    "more fields": (FormatError, put("manifest", "more", value=1)),
    "long field": (FormatError, put("manifest", "x" * 10**5, value=1)),
    "writer a number": (FormatError, put("manifest", "writer", value=1)),
    "preset none": (FormatError, put("manifest", "codec", value=None)),
    "tensors a list": (FormatError, put("manifest", "tensors", value=[])),
    "tensors empty": (IntegrityError, put("manifest", "tensors", value={})),
    "structure a list": (FormatError, put("manifest", "structure", value=[])),
    "provenance a list": (FormatError, put("manifest", "provenance", value=[])),
    # tensors
    "tensor none": (FormatError, put(*KEYS, value=None)),
    "tensor a list": (FormatError, put(*KEYS, value=[])),
    "tensor without digests": (FormatError, drop(*KEYS, "digests")),
    "tensor with more": (FormatError, put(*KEYS, "more", value=1)),
    "unknown dtype": (FormatError, put(*KEYS, "dtype", value="F4")),
    "dtype a list": (FormatError, put(*KEYS, "dtype", value=["BF16"])),
    "dtype none": (FormatError, put(*KEYS, "dtype", value=None)),
    "another dtype": (IntegrityError, put(*KEYS, "dtype", value="F64")),
    "shape a number": (FormatError, put(*KEYS, "shape", value=8)),
    "shape none": (FormatError, put(*KEYS, "shape", value=None)),
    "negative shape": (FormatError, shape(1, 1, -40, 4)),
    "two negative sizes": (FormatError, shape(-1, -1, 40, 4)),
    "float shape": (FormatError, shape(1, 1, 40.0, 4)),
    "bool shape": (FormatError, shape(True, True, 40, 4)),
    "absurdly many tokens": (FormatError, shape(1, 1, 1 << 60, 4)),
    "many tokens": (FormatError, shape(1, 1, 1 << 40, 4)),
    "too many tokens": (IntegrityError, tokens(1 << 20)),
    "wide tokens": (FormatError, shape(1, 1, 1, 1 << 47)),
    "overflow": (FormatError, shape(1 << 47, 1 << 47, 1 << 47, 1 << 47)),
    "overflow of nothing": (FormatError, shape(1 << 47, 1 << 47, 0, 1 << 47)),
    "many dimensions": (FormatError, shape(*[1] * 17)),
    "very many dimensions": (FormatError, shape(*[1] * 10**5)),
    "one token more": (IntegrityError, tokens(41)),
    "one token less": (IntegrityError, tokens(39)),
    "no tokens": (IntegrityError, tokens(0)),
    "claims more than 256 times its size": (IntegrityError, shape(1000, 1, 40, 4)),
    "no digests": (FormatError, put(*KEYS, "digests", value=[])),
    "more digests": (FormatError, put(*KEYS, "digests", value=[DIGEST, DIGEST])),
    "wrong digest": (IntegrityError, put(*KEYS, "digests", value=[DIGEST])),
    "short digest": (FormatError, put(*KEYS, "digests", value=["sha256:00"])),
    "upper case digest": (FormatError, put(*KEYS, "digests", value=[f"sha256:{'A' * 64}"])),
    "long digest": (FormatError, put(*KEYS, "digests", value=[f"{DIGEST}\n"])),
    "digest a number": (FormatError, put(*KEYS, "digests", value=[0])),
    "digests a table": (FormatError, put(*KEYS, "digests", value={})),
    # sections
    "no sections": (FormatError, put(*KEYS, "sections", value=[])),
    "sections a table": (FormatError, put(*KEYS, "sections", value={})),
    "section a number": (FormatError, put(*KEYS, "sections", 0, value=1)),
    "section of four": (FormatError, drop(*KEYS, "sections", 0, 4)),
    "section with a bool": (FormatError, section_of_keys(1, False)),
    "section from one": (FormatError, section_of_keys(1, 1)),
    "section too long": (FormatError, section_of_keys(2, 41)),
    "section too short": (FormatError, section_of_keys(2, 39)),
    "section to minus one": (FormatError, section_of_keys(2, -1)),
    "section with a list as name": (FormatError, section_of_keys(0, [])),
    "section not there": (IntegrityError, section_of_keys(0, "layers.9.keys")),
    "section of another": (IntegrityError, section_of_keys(0, "layers.0.values")),
    "the manifest as section": (IntegrityError, section_of_keys(0, "manifest")),
    "section twice": (
        FormatError,
        lambda d: d["manifest"]["tensors"]["layers.0.keys"]["sections"].append(
            d["manifest"]["tensors"]["layers.0.keys"]["sections"][0]
        ),
    ),
    "unknown codec": (UnknownCodecError, section_of_keys(3, "zip")),
    "long codec": (UnknownCodecError, section_of_keys(3, "x" * 10**5)),
    "another codec": (IntegrityError, section_of_keys(3, "raw")),
    "codec none": (FormatError, section_of_keys(3, None)),
    "parameters none": (FormatError, section_of_keys(4, None)),
    "parameters empty": (IntegrityError, section_of_keys(4, {})),
    "parameters long": (IntegrityError, section_of_keys(4, {"layout": "x" * 10**5})),
    "another layout": (IntegrityError, section_of_keys(4, {"layout": "row", "planes": []})),
    "planes out of the section": (
        IntegrityError,
        section_of_keys(4, {"layout": "token", "planes": [["raw", 160], ["raw", 160]]}),
    ),
    # tensors that the structure does not name, and the reverse
    "no input_ids": (FormatError, both(drop(*IDS), drop("sections", "generation.input_ids"))),
    "tensor too few": (IncompleteStateError, both(drop(*KEYS), drop("sections", "layers.0.keys"))),
    "tensor too many": (IncompleteStateError, put(*CACHE, "layers", 0, "tensors", value=["keys"])),
    "tensor not there": (IncompleteStateError, put(*CACHE, "layers", 0, "tensors", value=["k", "keys", "values"])),
    "logits not told": (IncompleteStateError, put(*STATE, "has_logits", value=False)),
    "layer gone": (IncompleteStateError, put(*CACHE, "layers", value=[])),
    "random state not told": (IncompleteStateError, put(*STATE, "rng", value=[])),
    "tensor of a thousand names": (
        IncompleteStateError,
        put(*STATE, "rng", value=[f"cuda:{i}" for i in range(1000)]),
    ),
}


@pytest.mark.parametrize("name", MANIFEST_LIES)
def test_lying_manifest_is_refused(name: str, good: dict[str, bytes], path: Path) -> None:
    kind, change = MANIFEST_LIES[name]
    draft = taken_apart(good["exact"])
    change(draft)
    assert_refused(path, put_together(signed(draft)), kind)


def nested_parts(depth: int) -> dict[str, Any]:
    """A cache without layers, of caches of caches."""
    inner = {"parts": {"self": nested_parts(depth - 1)}} if depth else {}
    return {"kind": "dynamic", "meta": {}, "layers": [], **inner}


STRUCTURE_LIES: dict[str, Change] = {
    "nothing": put("manifest", "structure", value={}),
    "more": put("manifest", "structure", "more", value={}),
    "no cache": drop(*CACHE),
    "cache a list": put(*CACHE, value=[]),
    "cache none": put(*CACHE, value=None),
    "cache with more": put(*CACHE, "more", value=1),
    "kind a number": put(*CACHE, "kind", value=1),
    "cache meta none": put(*CACHE, "meta", value=None),
    "cache meta a list": put(*CACHE, "meta", value=[]),
    "layers a number": put(*CACHE, "layers", value=3),
    "layers none": put(*CACHE, "layers", value=None),
    "layers a table": put(*CACHE, "layers", value={}),
    "layer none": put(*CACHE, "layers", 1, value=None),
    "layer a list": put(*CACHE, "layers", 1, value=["dummy", {}, []]),
    "layer text": put(*CACHE, "layers", 1, value="dummy"),
    "layer with more": put(*CACHE, "layers", 1, "more", value=1),
    "family none": put(*CACHE, "layers", 1, "family", value=None),
    "family a list": put(*CACHE, "layers", 1, "family", value=["dummy"]),
    "layer meta none": put(*CACHE, "layers", 1, "meta", value=None),
    "layer meta text": put(*CACHE, "layers", 1, "meta", value=""),
    "layer tensors a table": put(*CACHE, "layers", 0, "tensors", value={"keys": 1, "values": 2}),
    "layer tensors text": put(*CACHE, "layers", 1, "tensors", value=""),
    "layer tensors none": put(*CACHE, "layers", 1, "tensors", value=None),
    "layer tensors of numbers": put(*CACHE, "layers", 0, "tensors", value=[0, 1]),
    "layer tensors unsorted": put(*CACHE, "layers", 0, "tensors", value=["values", "keys"]),
    "parts a list": put(*CACHE, "parts", value=[]),
    "parts empty": put(*CACHE, "parts", value={}),
    "part none": put(*CACHE, "parts", value={"self": None}),
    "part a list": put(*CACHE, "parts", value={"self": []}),
    "parts in parts": put(*CACHE, "parts", value=nested_parts(9)),
    "checkpoints a table": put("manifest", "structure", "checkpoints", value={}),
    "checkpoints empty": put("manifest", "structure", "checkpoints", value=[]),
    "checkpoint none": put("manifest", "structure", "checkpoints", value=[None]),
    "checkpoint without a cache": put(
        "manifest", "structure", "checkpoints", value=[{"n_tokens": 3, "rng": [], "attributes": []}]
    ),
    "checkpoint at minus one": put(
        "manifest",
        "structure",
        "checkpoints",
        value=[{"n_tokens": -1, "cache": nested_parts(0), "rng": [], "attributes": []}],
    ),
    "search text": put(*STATE, "search", value="scores"),
    "search empty": put(*STATE, "search", value=[]),
    "search of numbers": put(*STATE, "search", value=[1]),
    "companions a list": put(*STATE, "companions", value=[]),
    "companion none": put(*STATE, "companions", value={"assistant": None}),
    "attributes a table": put(*STATE, "attributes", value={}),
    "attributes of numbers": put(*STATE, "attributes", value=[0]),
    "cache argument none": put(*STATE, "cache_argument", value=None),
    "cache argument the usual": put(*STATE, "cache_argument", value="past_key_values"),
    "generator a number": put(*STATE, "generator", value=1),
    "generator empty": put(*STATE, "generator", value=""),
    "generation none": put(*STATE, value=None),
    "generation a list": put(*STATE, value=[]),
    "generation with more": put(*STATE, "more", value=1),
    "no prompt length": drop(*STATE, "prompt_length"),
    "prompt length text": put(*STATE, "prompt_length", value="4"),
    "prompt length a bool": put(*STATE, "prompt_length", value=True),
    "prompt length a float": put(*STATE, "prompt_length", value=4.0),
    "prompt length none": put(*STATE, "prompt_length", value=None),
    "prompt length negative": put(*STATE, "prompt_length", value=-1),
    "n_cached text": put(*STATE, "n_cached", value="40"),
    "n_cached negative": put(*STATE, "n_cached", value=-40),
    "has_logits a number": put(*STATE, "has_logits", value=1),
    "has_logits text": put(*STATE, "has_logits", value="yes"),
    "inputs a table": put(*STATE, "inputs", value={"attention_mask": 1}),
    "inputs none": put(*STATE, "inputs", value=None),
    "values a list": put(*STATE, "values", value=[]),
    "values none": put(*STATE, "values", value=None),
    "values of bytes": put(*STATE, "values", "more", value=b"x"),
    "rng text": put(*STATE, "rng", value="cpu"),
    "config none": put(*STATE, "config", value=None),
    "config a list": put(*STATE, "config", value=[["top_k", 5]]),
    "processors a table": put(*STATE, "processors", value={"0": 1}),
    "processors none": put(*STATE, "processors", value=None),
    "processor none": put(*STATE, "processors", value=[None]),
    "processor empty": put(*STATE, "processors", value=[{}]),
    "processor with more": put(*STATE, "processors", 0, "more", value=1),
    "processor role none": put(*STATE, "processors", 0, "role", value=None),
    "processor name a number": put(*STATE, "processors", 0, "name", value=1),
    "processor meta none": put(*STATE, "processors", 0, "meta", value=None),
    "processor tensors text": put(*STATE, "processors", 0, "tensors", value="seen"),
    "weights none": put(*ORIGIN, "weights", value=None),
    "weights gone": drop(*ORIGIN, "weights"),
    "config of the model a list": put(*ORIGIN, "config", value=[]),
    "rope none": put(*ORIGIN, "rope", value=None),
    "tokenizer a number": put(*ORIGIN, "tokenizer", value=1),
    "adapters text": put(*ORIGIN, "adapters", value="a"),
    "quantization none": put(*ORIGIN, "quantization", value=None),
    "dtype a number": put(*ORIGIN, "dtype", value=16),
    "model name a table": put(*ORIGIN, "model_name", value={}),
    "versions none": put(*ORIGIN, "versions", value=None),
    "attention none": put(*ORIGIN, "attention", value=None),
    "device a number": put(*ORIGIN, "device", value=0),
    "threads text": put(*ORIGIN, "threads", value="2"),
    "threads a bool": put(*ORIGIN, "threads", value=True),
    "created a number": put(*ORIGIN, "created", value=0),
    "origin with more": put(*ORIGIN, "more", value=1),
    "origin with self": put(*ORIGIN, "self", value=1),
}


@cases(STRUCTURE_LIES)
def test_wrong_structure_is_refused(case: Change, good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["exact"])
    case(draft)
    assert_refused(path, put_together(signed(draft)), FormatError)


TENSOR_KINDS = {
    "input_ids of one axis": ("generation.input_ids", "I64", (41,)),
    "input_ids without axes": ("generation.input_ids", "I64", ()),
    "input_ids of floats": ("generation.input_ids", "F64", (1, 41)),
    "input_ids of int32": ("generation.input_ids", "I32", (1, 41)),
    "finished of bytes": ("generation.finished", "U8", (1,)),
    "finished of two axes": ("generation.finished", "BOOL", (1, 1)),
    "finished of another batch": ("generation.finished", "BOOL", (2,)),
}


@cases(TENSOR_KINDS)
def test_wrong_kind_of_tokens_is_refused(case: tuple[str, str, tuple[int, ...]], good: Any, path: Path) -> None:
    name, dtype, sizes = case
    draft = taken_apart(good["raw"])
    spec = content.TensorSpec(dtype, sizes)
    data = bytes(spec.n_bytes)
    draft["sections"][name] = {"dtype": dtype, "shape": list(sizes), "data": data}
    digest = content.digest(np.frombuffer(data, np.uint8))
    draft["manifest"]["tensors"][name] |= {"dtype": dtype, "shape": list(sizes), "digests": [digest]}
    draft["manifest"]["tensors"][name]["sections"][0][1:3] = [0, spec.n_tokens]
    assert_refused(path, put_together(signed(draft)), FormatError)


RAW_LIES: dict[str, Change] = {
    "another shape": both(shape(1, 1, 4, 40), section_of_keys(2, 4)),
    "another dtype": put(*KEYS, "dtype", value="F16"),
    "coded bytes under raw": lambda d: d["sections"]["layers.0.keys"].update(dtype="U8", shape=[320]),
    "a plain tensor under planes": both(
        section_of_keys(3, "planes"),
        section_of_keys(4, {"layout": "token", "planes": [["raw", 160], ["raw", 160]]}),
    ),
    "parameters for raw": section_of_keys(4, {"layout": "token"}),
}


@cases(RAW_LIES)
def test_lying_raw_file_is_refused(case: Change, good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["raw"])
    case(draft)
    assert_refused(path, put_together(signed(draft)), IntegrityError)


@pytest.mark.parametrize("dtype", ["I8", "BF16", "U8"])
def test_manifest_of_another_kind_is_refused(dtype: str, good: dict[str, bytes], path: Path) -> None:
    data = good["exact"]
    header = header_of(data)
    n_bytes = header["manifest"]["shape"][0]
    assert n_bytes % 2 == 0
    sizes = {"I8": [n_bytes], "BF16": [n_bytes // 2], "U8": [2, n_bytes // 2]}[dtype]
    header["manifest"] |= {"dtype": dtype, "shape": sizes}
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert_refused(path, with_header(json.dumps(header).encode(), body), FormatError)


def test_unsigned_lies_are_refused(good: dict[str, bytes], path: Path) -> None:
    for change in (
        put(*STATE, "prompt_length", value=5),
        put(*KEYS, "digests", value=[DIGEST]),
        put(*CACHE, "layers", 0, "meta", value={}),
        put(*ORIGIN, "weights", value="sha256:cd"),
        put("manifest", "content_digest", value=DIGEST),
        put("manifest", "state_id", value=DIGEST),
        both(put("manifest", "state_id", value=DIGEST), put("metadata", "state_id", value=DIGEST)),
    ):
        draft = taken_apart(good["exact"])
        change(draft)
        assert_refused(path, put_together(draft), IntegrityError)


@pytest.mark.parametrize("name", ["content_digest", "state_id"])
@pytest.mark.parametrize("change", [drop, lambda *way: put(*way, value=1), lambda *way: put(*way, value=None)])
def test_missing_identity_is_refused(name: str, change: Any, good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["exact"])
    change("manifest", name)(draft)
    assert_refused(path, put_together(draft), FormatError)


def test_tensors_swapped_between_names_are_refused(good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["raw"])
    names = ("generation.inputs.attention_mask", "generation.input_ids")
    tensors = draft["manifest"]["tensors"]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    assert_refused(path, put_together(draft), IntegrityError)
    path.write_bytes(put_together(signed(draft)))
    assert sq.load(path).state_id != tiny().state_id


# Every field of the manifest, set to every kind of value

VALUES = [None, True, -1, 0, 1 << 63, 1.5, "x", b"x", [], {}, {"x": 1}]
FREE = re.compile(
    r"""
    writer | codec
    | structure/cache/(kind | meta/\w+)
    | structure/cache/layers/\d/(family | meta | meta/\w+)
    | structure/generation/(prompt_length | n_cached | values/\w+ | config/\w+)
    | structure/generation/processors/0/(role | name | meta/\w+)
    | structure/(cache/meta | generation/values | generation/config | generation/processors/0/meta)
    | provenance/(weights | tokenizer | dtype | model_name | attention | device | threads | created)
    | provenance/(config | rope | adapters | quantization | versions)(/\w+)?
    | structure/cache/layers/1                # one layer fewer
    | tensors/layers\.0\.keys/shape/[01]      # one axis fewer
    """,
    re.VERBOSE,
)


def ways(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ways(item, (*way, key))


def test_no_field_takes_a_wrong_value(good: dict[str, bytes], path: Path) -> None:
    manifest = taken_apart(good["exact"])["manifest"]
    manifest["tensors"] = {name: manifest["tensors"][name] for name in ("layers.0.keys", "generation.input_ids")}
    fields = [way for way in ways(manifest) if way[0] not in ("content_digest", "state_id")]
    assert len(fields) > 120
    taken = set()
    for way in fields:
        for change in [drop("manifest", *way), *(put("manifest", *way, value=value) for value in VALUES)]:
            draft = taken_apart(good["exact"])
            change(draft)
            data = put_together(signed(draft))
            if data == put_together(taken_apart(good["exact"])):
                continue
            path.write_bytes(data)
            try:
                found = sq.load(path)
            except SemqStateError as error:
                assert str(path) in str(error)
                continue
            taken.add("/".join(map(str, way)))
            assert sq.verify(path).passed and json.dumps(sq.inspect(path).as_dict())
            assert content.pack(found.structure()) == content.pack(draft["manifest"]["structure"])
            assert Snapshot(found.cache, found.generation, found.provenance).state_id == sq.inspect(path).state_id
    assert {"writer", "provenance/config/n"} <= taken
    assert [way for way in sorted(taken) if not FREE.fullmatch(way)] == []


# Manifests that are not canonical msgpack


MANIFEST_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "nil": lambda data: b"\xc0",
    "never used byte": lambda data: b"\xc1",
    "a list": lambda data: b"\x90",
    "a number": lambda data: b"\x01",
    "an empty table": lambda data: b"\x80",
    "json": lambda data: json.dumps(msgpack.unpackb(data)).encode(),
    "zeros": lambda data: bytes(len(data)),
    "cut": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "more behind": lambda data: data + b"\xc0",
    "twice": lambda data: data * 2,
    "unsorted": lambda data: msgpack.packb(dict(reversed(msgpack.unpackb(data).items()))),
    "long length": lambda data: b"\xde\x00" + bytes([data[0] & 15]) + data[1:],
    "long number": lambda data: data.replace(b"format_version\x05", b"format_version\xcc\x05"),
    "short float": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xca\x40\xa0\x00\x00"),
    "text as bytes": lambda data: data.replace(b"\xa6writer\xb0", b"\xa6writer\xc4\x10"),
    "bytes as key": lambda data: data.replace(b"\x81\xa5top_k\x05", b"\x81\xc4\x05top_k\x05"),
    "number as key": lambda data: data.replace(b"\x81\xa5top_k\x05", b"\x81\x01\x05"),
    "nil as key": lambda data: data.replace(b"\x81\xa5top_k\x05", b"\x81\xc0\x05"),
    "list as key": lambda data: data.replace(b"\x81\xa5top_k\x05", b"\x81\x90\x05"),
    "a key twice": lambda data: data.replace(b"\x81\xa5top_k\x05", b"\x82\xa5top_k\x05\xa5top_k\x05"),
    "not UTF-8": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_\xff\x05"),
    "a surrogate": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5to\xed\xa0\x80\x05"),
    "an empty extension": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xc7\x00\x05"),
    "an extension": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xd4\x05\x00"),
    "a timestamp": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xd6\xff\x00\x00\x00\x01"),
    "an empty timestamp": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xc7\x00\xff"),
    "a huge extension": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xc9\xff\xff\xff\xff\x05"),
    "a huge list": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xdd\xff\xff\xff\xff"),
    "a huge table": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xdf\xff\xff\xff\xff"),
    "a huge text": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xdb\xff\xff\xff\xff"),
    "huge bytes": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k\xc6\xff\xff\xff\xff"),
    "lists in lists that claim": lambda data: (b"\xdd" + struct.pack(">I", 200_000)) * 900 + bytes(200_000),
    "lists in tables that claim": lambda data: (
        (b"\xdf" + struct.pack(">I", 100_000) + b"\xa1a") * 900 + bytes(200_000)
    ),
    "deep lists": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k" + b"\x91" * 10_000 + b"\x05"),
    "deep tables": lambda data: data.replace(b"\xa5top_k\x05", b"\xa5top_k" + b"\x81\xa1a" * 10_000 + b"\x05"),
    "nothing but deep lists": lambda data: b"\x91" * 100_000,
}


@cases(MANIFEST_BYTES)
def test_odd_msgpack_is_refused(case: Callable[[bytes], bytes], good: dict[str, bytes], path: Path) -> None:
    draft = taken_apart(good["exact"])
    damaged = case(content.pack(draft["manifest"]))
    assert damaged != content.pack(draft["manifest"])
    assert_refused(path, put_together(draft, manifest=damaged), FormatError)


@pytest.mark.parametrize("inner", ["lists", "tables"])
def test_deep_nesting_is_refused_at_every_depth(inner: str, good: dict[str, bytes], path: Path) -> None:
    for depth in range(80, 1100, 3):
        draft = taken_apart(good["exact"])
        nest = {"lists": b"\x91", "tables": b"\x81\xa1a"}[inner] * depth + b"\x05"
        manifest = content.pack(draft["manifest"]).replace(b"\xa5top_k\x05", b"\xa5top_k" + nest)
        path.write_bytes(put_together(draft, manifest=manifest))
        with pytest.raises(FormatError, match="msgpack"):
            sq.load(path)


def test_moderate_nesting_is_taken(good: dict[str, bytes], path: Path) -> None:
    nested: Any = 5
    for _ in range(40):
        nested = [nested]
    draft = taken_apart(good["exact"])
    draft["manifest"]["structure"]["generation"]["config"]["top_k"] = nested
    path.write_bytes(put_together(signed(draft)))
    assert sq.load(path).generation.config == {"top_k": nested}


# Claims of memory


def with_keys(draft: Draft, sizes: list[int], sections: list[bytes], digests: list[str], bounds: Any) -> bytes:
    """`draft` with other keys in its first layer: U8, coded, in the given sections."""
    del draft["sections"]["layers.0.keys"]
    entries = []
    for i, (data, (start, stop)) in enumerate(zip(sections, bounds, strict=True)):
        draft["sections"][f"k{i}"] = {"dtype": "U8", "shape": [len(data)], "data": data}
        params = {"layout": "token", "planes": [["zstd", len(data.rstrip(b"\0")) + 1]]}
        entries.append([f"k{i}", start, stop, "planes", params])
    draft["manifest"]["tensors"]["layers.0.keys"] = {
        "dtype": "U8",
        "shape": sizes,
        "digests": digests,
        "sections": entries,
    }
    return put_together(signed(draft))


def chunk_of_zeros() -> tuple[bytes, dict[str, Any], str]:
    data = np.zeros(content.CHUNK_BYTES, np.uint8)
    spec = content.TensorSpec("U8", (len(data), 1))
    coded = Planes().encode(data, spec)
    return b"".join(bytes(piece) for piece in coded.pieces), dict(coded.params), content.digest(data)


def test_later_chunks_must_be_there_before_a_tensor_is_made(good: dict[str, bytes], path: Path) -> None:
    payload, params, digest = chunk_of_zeros()
    n_chunks = 1000
    spec = content.TensorSpec("U8", (n_chunks * content.CHUNK_BYTES, 1))
    draft = taken_apart(good["exact"])
    data = with_keys(
        draft, list(spec.shape), [payload] + [b""] * (n_chunks - 1), [digest] * n_chunks, spec.chunks()
    )
    draft = taken_apart(data)
    draft["manifest"]["tensors"]["layers.0.keys"]["sections"][0][4] = params
    assert_refused(path, put_together(signed(draft)), IntegrityError)


@pytest.mark.parametrize("codec", ["exact", "raw"])
@pytest.mark.parametrize("sizes", [[1 << 40, 1 << 40, 0, 4], [0, 1 << 47, 1 << 47], [1 << 47, 1 << 16, 0]], ids=str)
def test_empty_tensor_of_huge_sizes_is_refused(
    codec: str, sizes: list[int], good: dict[str, bytes], path: Path
) -> None:
    draft = taken_apart(good[codec])
    told = {"dtype": "BF16", "shape": sizes} if codec == "raw" else {"dtype": "U8", "shape": [0]}
    draft["sections"]["layers.0.keys"] = {**told, "data": b""}
    params = {} if codec == "raw" else {"layout": "token", "planes": [["raw", 0], ["raw", 0]]}
    entry = draft["manifest"]["tensors"]["layers.0.keys"]
    entry |= {"shape": sizes, "digests": [content.digest(np.empty(0, np.uint8))]}
    entry["sections"] = [["layers.0.keys", 0, sizes[-2], entry["sections"][0][3], params]]
    assert_refused(path, put_together(signed(draft)), FormatError)


def test_frame_must_hold_what_its_section_claims(good: dict[str, bytes], path: Path) -> None:
    payload, params, digest = chunk_of_zeros()
    for n_chunks, kind in ((1, None), (2, IntegrityError)):
        spec = content.TensorSpec("U8", (content.CHUNK_BYTES * n_chunks, 1))
        stored = payload + bytes(len(payload) * (n_chunks - 1))
        data = with_keys(
            taken_apart(good["exact"]), list(spec.shape), [stored], [digest] * n_chunks, [(0, spec.n_tokens)]
        )
        draft = taken_apart(data)
        draft["manifest"]["tensors"]["layers.0.keys"]["sections"][0][4] = params
        if kind:
            assert_refused(path, put_together(signed(draft)), kind)
        else:
            path.write_bytes(put_together(signed(draft)))
            assert not sq.load(path).cache.layers[0].tensors["keys"].any()


def test_bomb_of_frames_is_refused(good: dict[str, bytes], path: Path) -> None:
    import zstandard

    n_bytes = 1 << 30
    coder = zstandard.ZstdCompressor(level=1).compressobj(size=n_bytes)
    frame = b"".join(coder.compress(bytes(1 << 24)) for _ in range(64)) + coder.flush()
    assert len(frame) < n_bytes // 256
    sizes = [1, n_bytes]
    data = with_keys(taken_apart(good["exact"]), sizes, [frame], [DIGEST], [(0, 1)])
    assert_refused(path, data, IntegrityError)


def test_absent_file_is_a_store_error(path: Path) -> None:
    for read in (sq.load, sq.inspect, sq.verify):
        with pytest.raises(StoreError):
            read(path)


def test_hidden_states_in_an_earlier_version_are_refused(path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "v5-exact.safetensors"
    draft = taken_apart(golden.read_bytes())
    path.write_bytes(put_together(draft))
    assert sorted(sq.load(path).hidden) == ["encoder", "sequence"]
    draft["manifest"]["format_version"] = 4
    assert_refused(path, put_together(draft), FormatError)
