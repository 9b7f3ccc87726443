"""`.semq` files, version 2: rows of symbols under ids, a manifest, and two digests that name the whole.

An independent implementation from the public description (`file-format.md` of The-SEMQ-Group/semq); not affiliated
with or endorsed by its owner. All integers are little-endian, nothing is padded:

    `SEMQ` u16 2 | config u8 u32 u32 u32 | u8 id kind | u64 n | ids | rows | manifest | content_digest state_id
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import OPERATORS, SEMQ_RANGE, AbstractOperator, Floats, Quant
from semq_state.errors import FormatError, IntegrityError, UnsupportedOperationError
from semq_state.stores import LocalFile, atomic_write

MAGIC = b"SEMQ"
VERSION = 2
MAX_ID = 4096
MAX_KEY = 256
MAX_VALUE = 65_536
MAX_PAIRS = 4096
MAX_MANIFEST = 16 << 20

_HEAD = struct.Struct("<4sHBIIIBQ")
_CONFIG = struct.Struct("<BIII")
_N_ROWS = struct.Struct("<BQ")
_FOOTER = 64
_U64, _UTF8 = 0, 1

Ids = NDArray[np.uint64] | tuple[str, ...]


@final
@dataclass(frozen=True, eq=False)
class SemqFile:
    """What a `.semq` file holds. Two of them are equal when their `state_id` is.

    Ids are sorted, with their rows, when a value is made.

    Args:
        operator: the rule; a `Quant` with SEMQ's own range.
        ids: uint64 numbers as an array, or strings of 1 to 4,096 bytes. An empty array has numbers, an empty tuple
            strings.
        rows: packed symbols, uint8 `(n, operator.n_bytes)`.
        manifest: strings by string, not interpreted here.

    Raises:
        UnsupportedOperationError: a limit of the format is passed, ids repeat, or rows are not canonical.
    """

    operator: AbstractOperator
    ids: Ids
    rows: NDArray[np.uint8]
    manifest: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.operator, Quant) and self.operator.c != SEMQ_RANGE:
            raise _unfit("operator", f"`c` of {SEMQ_RANGE}", repr(self.operator))
        ids, order = _sorted_ids(self.ids)
        rows = np.asarray(self.rows)
        if rows.dtype != np.uint8 or rows.shape != (len(ids), self.operator.n_bytes):
            raise _unfit(
                "rows", f"uint8 of shape {(len(ids), self.operator.n_bytes)}", f"{rows.dtype} {rows.shape}"
            )
        rows = rows[order]
        self.operator.unpack(rows)  # refuses what is not canonical
        for array in (ids, rows):
            if isinstance(array, np.ndarray):
                array.setflags(write=False)
        manifest = MappingProxyType(dict(self.manifest))
        _manifest_bytes(manifest)
        for name, value in (("ids", ids), ("rows", rows), ("manifest", manifest)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_vectors(
        cls,
        ids: Sequence[int] | Sequence[str] | NDArray[Any],
        vectors: Floats,
        *,
        operator: AbstractOperator,
        manifest: Mapping[str, str] | None = None,
    ) -> SemqFile:
        """The file of unit vectors.

        Args:
            ids: one for each vector; all numbers or all strings.
            vectors: float32 `(n, operator.dim)`, of norm 1.

        Raises:
            UnsupportedOperationError: as for the class, or a vector has NaN, infinity or another norm.
        """
        rows = operator.pack(operator.encode(np.asarray(vectors)))
        return cls(operator, _ids_of(ids), rows, manifest or {})

    def symbols(self) -> NDArray[np.uint8]:
        """uint8 `(n, operator.n_units)`."""
        return self.operator.unpack(self.rows)

    def decoded(self) -> Floats:
        """float32 `(n, operator.dim)`, as the operator decodes: not normalised."""
        return self.operator.decode(self.symbols())

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over the rule, the ids and the rows, in hexadecimal."""
        digest = hashlib.sha256()
        for part in _content(self):
            digest.update(part)
        return digest.hexdigest()

    @cached_property
    def state_id(self) -> str:
        """SHA-256 over the content digest and the manifest, in hexadecimal."""
        return hashlib.sha256(bytes.fromhex(self.content_digest) + _manifest_bytes(self.manifest)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.state_id == other.state_id if isinstance(other, SemqFile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.state_id)


def write_semq(path: str | os.PathLike[str], file: SemqFile) -> None:
    """Writes a `.semq` file, whole or not at all.

    Raises:
        StoreError: the folder is missing or read-only, or the disk is full.
    """
    with atomic_write(path) as out:
        out.write(MAGIC + struct.pack("<H", VERSION))
        for part in _content(file):
            out.write(part)
        out.write(_manifest_bytes(file.manifest))
        out.write(bytes.fromhex(file.content_digest) + bytes.fromhex(file.state_id))


def read_semq(path: str | os.PathLike[str]) -> SemqFile:
    """Reads a `.semq` file and checks all of it; sizes that it claims are held against its own first.

    Raises:
        StoreError: the file cannot be read.
        FormatError: a section is not what the format says; the message says which.
        IntegrityError: one of the digests does not hold.
    """
    with LocalFile(path) as opened:
        return _parsed(memoryview(opened.read(0, opened.size)), str(path))


def _parsed(data: memoryview, where: str) -> SemqFile:
    """The sections in the order of the format's own reader: each is bounded before it is touched."""
    if len(data) < _HEAD.size + 4 + _FOOTER:
        raise _wrong(f"{where}: framing", f"at least {_HEAD.size + 4 + _FOOTER} bytes", f"{len(data)}")
    magic, version, code, dim, parameter, revision, kind, n = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise _wrong(f"{where}: framing", f"{MAGIC!r}, version {VERSION}", f"{magic!r}, version {version}")
    operator = _operator(code, dim, parameter, revision, f"{where}: config")
    if kind not in (_U64, _UTF8):
        raise _wrong(f"{where}: id kind", f"{_U64} or {_UTF8}", str(kind))

    end = len(data) - _FOOTER
    ids_end = _end_of_ids(data, kind, n, end, f"{where}: ids")
    rows_end = ids_end + n * operator.n_bytes
    if rows_end + 4 > end:
        raise _wrong(f"{where}: rows", f"{n} of {operator.n_bytes} bytes", f"{end - ids_end - 4} bytes for them")
    ids = _read_ids(data[_HEAD.size : ids_end], kind, n, f"{where}: ids")
    manifest = _read_manifest(data[rows_end:end], f"{where}: manifest")

    content = hashlib.sha256(data[6:rows_end]).digest()
    state = hashlib.sha256(content + data[rows_end:end]).digest()
    for name, digest, at in (("content_digest", content, end), ("state_id", state, end + 32)):
        if data[at : at + 32] != digest:
            raise IntegrityError(
                f"{where}: {name}",
                expected=digest.hex(),
                found=data[at : at + 32].hex(),
                do="the file is damaged; use another copy of it",
            )
    rows = np.frombuffer(data[ids_end:rows_end], np.uint8).reshape(n, operator.n_bytes)
    try:
        return SemqFile(operator, ids, rows, manifest)
    except UnsupportedOperationError as error:  # everything else was checked above
        raise _wrong(f"{where}: rows", error.expected, error.found) from error


def _operator(code: int, dim: int, parameter: int, revision: int, where: str) -> AbstractOperator:
    kinds = {kind.code: kind for kind in OPERATORS.values()}
    if code not in kinds or revision != 0:
        raise _wrong(where, "operator 0, 1 or 2 and rule revision 0", f"operator {code}, rule revision {revision}")
    try:
        return kinds[code](dim, parameter)
    except UnsupportedOperationError as error:
        raise _wrong(f"{where}: {error.where}", error.expected, error.found) from error


def _end_of_ids(data: memoryview, kind: int, n: int, end: int, where: str) -> int:
    """Where the ids end, if that is within the file."""
    at = _HEAD.size + 8 * (n if kind == _U64 else n + 1)
    if at > end:
        raise _wrong(where, f"{n} of them", f"{end - _HEAD.size} bytes for everything up to the footer")
    if kind == _UTF8:
        at += int.from_bytes(data[at - 8 : at], "little")
    if at > end:
        raise _wrong(where, "an end within the file", f"an end at byte {at}")
    return at


def _read_ids(section: memoryview, kind: int, n: int, where: str) -> Ids:
    """The ids of their section, in increasing order."""
    numbers = np.frombuffer(section[: 8 * (n if kind == _U64 else n + 1)], "<u8").astype(np.uint64)
    increasing = bool((numbers[1:] > numbers[:-1]).all())
    if kind == _U64:
        if not increasing:
            raise _wrong(where, "increasing numbers", "one that does not increase")
        return numbers
    if numbers[0] != 0 or not increasing:
        raise _wrong(where, "increasing offsets from 0", "others")
    text, offsets = bytes(section[8 * (n + 1) :]), numbers.tolist()
    pieces = [text[start:stop] for start, stop in itertools.pairwise(offsets)]
    for before, piece in zip([b"", *pieces], pieces, strict=False):
        if len(piece) > MAX_ID or piece <= before:
            raise _wrong(where, f"increasing ids of 1 to {MAX_ID} bytes", f"{piece[:40]!r}")
    return tuple(_text(piece, where) for piece in pieces)


def _read_manifest(section: memoryview, where: str) -> dict[str, str]:
    """The pairs, which fill their section exactly."""
    n_pairs = int.from_bytes(section[:4], "little")
    if n_pairs > MAX_PAIRS or len(section) > MAX_MANIFEST:
        raise _wrong(where, f"at most {MAX_PAIRS} pairs in {MAX_MANIFEST} bytes", f"{n_pairs} in {len(section)}")
    manifest, at, before = {}, 4, b""
    for _ in range(n_pairs):
        key, at = _field(section, at, MAX_KEY, where)
        value, at = _field(section, at, MAX_VALUE, where)
        if key <= before:
            raise _wrong(where, "keys of 1 byte or more in increasing order", f"{key[:40]!r} after {before[:40]!r}")
        before = key
        manifest[_text(key, where)] = _text(value, where)
    if at != len(section):
        raise _wrong(where, f"an end after {n_pairs} pairs", f"{len(section) - at} bytes more")
    return manifest


def _field(section: memoryview, at: int, most: int, where: str) -> tuple[bytes, int]:
    """The bytes of a key or value, and where the next begins."""
    start = at + 4
    n_bytes = int.from_bytes(section[at:start], "little")
    if n_bytes > most or start + n_bytes > len(section):
        raise _wrong(where, f"a text of at most {most} bytes within the manifest", f"one of {n_bytes} at {at}")
    return bytes(section[start : start + n_bytes]), start + n_bytes


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(where, "UTF-8", f"{data[:40]!r}") from error
    if "\0" in text:
        raise _wrong(where, "a text without NUL", f"{data[:40]!r}")
    return text


def _content(file: SemqFile) -> Iterator[bytes | memoryview]:
    """The bytes from the config to the rows."""
    operator, ids = file.operator, file.ids
    yield _CONFIG.pack(operator.code, operator.dim, operator.parameter, 0)
    if isinstance(ids, np.ndarray):
        yield _N_ROWS.pack(_U64, len(ids)) + ids.astype("<u8").tobytes()
    else:
        pieces = [text.encode("utf-8") for text in ids]
        offsets = np.cumsum([0, *map(len, pieces)], dtype="<u8")
        yield _N_ROWS.pack(_UTF8, len(ids)) + offsets.tobytes()
        yield b"".join(pieces)
    yield file.rows.reshape(-1).data


def _manifest_bytes(manifest: Mapping[str, str]) -> bytes:
    """The manifest section.

    Raises:
        UnsupportedOperationError: a limit is passed.
    """
    parts = [struct.pack("<I", len(manifest))]
    pairs = sorted((_utf8("manifest", k, MAX_KEY), _utf8("manifest", v, MAX_VALUE)) for k, v in manifest.items())
    for pair in pairs:
        for text in pair:
            parts += [struct.pack("<I", len(text)), text]
    section = b"".join(parts)
    if len(pairs) > MAX_PAIRS or len(section) > MAX_MANIFEST or (pairs and not pairs[0][0]):
        raise _unfit(
            "manifest",
            f"at most {MAX_PAIRS} pairs in {MAX_MANIFEST} bytes, no key empty",
            f"{len(pairs)} in {len(section)}",
        )
    return section


def _ids_of(ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> Ids:
    """Numbers as an array, strings as a tuple."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if isinstance(ids, np.ndarray) and not listed:
        return np.empty(0, np.uint64)
    if all(isinstance(each, str) for each in listed):
        return tuple(listed)
    if not all(isinstance(each, int | np.integer) and 0 <= each < 1 << 64 for each in listed):
        raise _unfit("ids", "all strings, or all numbers of 64 bits", "others")
    return np.array(listed, np.uint64)


def _sorted_ids(ids: Ids) -> tuple[Ids, NDArray[np.intp]]:
    """The ids in increasing order, and the order itself."""
    if isinstance(ids, np.ndarray):
        if ids.dtype != np.uint64 or ids.ndim != 1:
            raise _unfit("ids", "a row of uint64", f"{ids.dtype} {ids.shape}")
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        if (ordered[1:] == ordered[:-1]).any():
            raise _unfit("ids", "no id twice", str(ordered[1:][ordered[1:] == ordered[:-1]][0]))
        return ordered, order
    pieces = [_utf8("ids", text, MAX_ID) for text in ids]
    order = np.array(sorted(range(len(pieces)), key=pieces.__getitem__), np.intp)
    for before, after in itertools.pairwise(order):
        if pieces[before] == pieces[after]:
            raise _unfit("ids", "no id twice", repr(ids[after])[:80])
    if pieces and not pieces[order[0]]:
        raise _unfit("ids", "at least 1 byte each", "an empty one")
    return tuple(ids[i] for i in order), order


def _utf8(where: str, text: object, most: int) -> bytes:
    try:
        data = text.encode("utf-8") if isinstance(text, str) else b"\0"
    except UnicodeEncodeError:  # half a surrogate pair
        data = b"\0"
    if len(data) > most or b"\0" in data:
        raise _unfit(where, f"texts of at most {most} bytes of UTF-8 without NUL", f"{text!r:.80}")
    return data


def _wrong(where: str, expected: str, found: str) -> FormatError:
    return FormatError(where, expected=expected, found=found, do="use another copy of the file")


def _unfit(where: str, expected: str, found: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f".semq {where}", expected=expected, found=found, do="change it or leave it out"
    )
