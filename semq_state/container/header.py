"""The safetensors header: rendered into a reserved space, and read back strictly.

We read it ourselves, because the safetensors library gives tensors but not the offsets that parallel reads
need, and reads through a memory map, where a file that shrinks meanwhile ends the process. Every file is also
opened with that library in the tests, and both must refuse the same hostile headers.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semq_state.content import DTYPES, TensorSpec
from semq_state.errors import FormatError

MANIFEST = "manifest"
"""The section that describes all others."""

SIGNATURE = "signature"
"""The section, the last one, that vouches for all before it."""

SIGNED_SINCE = 4
"""The first format version that has one."""

MAX_SIGNATURE_BYTES = 1 << 20

MAX_HEADER_BYTES = 16 << 20

_WIDEST = 10**15  # offsets never get longer than this; it sets the space reserved for the header

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Section:
    """A named run of bytes in the data part of the file."""

    name: str
    spec: TensorSpec
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a safetensors header says: metadata, sections in file order, and where the data part begins."""

    metadata: Mapping[str, str]
    sections: Mapping[str, Section]
    data_start: int


def reserved_bytes(names: Sequence[str], n_dims: int, metadata: Mapping[str, str]) -> int:
    """Size of the header, length field included, that any section sizes fit into."""
    shape = (_WIDEST,) * max(n_dims, 1)
    widest = [Section(name, TensorSpec("F8_E4M3", shape), _WIDEST, _WIDEST) for name in names]
    return 8 + -(-len(_json(widest, metadata)) // 8) * 8


def render_header(sections: Sequence[Section], metadata: Mapping[str, str], size: int) -> bytes:
    """The header, padded with spaces (as safetensors allows) to exactly `size` bytes."""
    text = _json(sections, metadata)
    assert len(text) + 8 <= size
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def read_header(read: Callable[[int, int], bytes], size: int, where: str) -> Header:
    """The inverse of `render_header`.

    Args:
        read: `(offset, n_bytes)` to bytes.
        size: size of the whole file.
        where: the file's name, for messages.

    Raises:
        FormatError: the header breaks a rule of safetensors, or of `FORMAT.md`.
    """

    def refuse(expected: str, found: str) -> FormatError:
        return FormatError(
            where,
            expected=expected,
            found=found,
            do="this is not a whole snapshot file; use another copy",
        )

    if size < 8:
        raise refuse("at least 8 bytes", f"{size}")
    n_header = int.from_bytes(read(0, 8), "little")
    if n_header > min(MAX_HEADER_BYTES, size - 8):
        raise refuse(f"a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes", f"{n_header}")
    try:
        parsed = json.loads(read(8, n_header).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise refuse("a JSON header", f"{type(error).__name__}: {error}") from error
    if not isinstance(parsed, dict):
        raise refuse("a JSON object as header", type(parsed).__name__)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("metadata of strings", shown(metadata))

    data_start, at = 8 + n_header, 0
    entries = [_section(name, entry, refuse) for name, entry in parsed.items()]
    entries.sort(key=lambda section: (section.begin, section.end))
    for section in entries:
        if section.begin != at:
            raise refuse(f"section {shown(section.name)} to begin at byte {at}", f"{section.begin}")
        if section.n_bytes != section.spec.n_bytes:
            raise refuse(f"{section.spec.n_bytes} bytes in section {shown(section.name)}", f"{section.n_bytes}")
        at = section.end
    if data_start + at != size:
        raise refuse(f"a file of {data_start + at} bytes", f"{size}")
    return Header(metadata, {section.name: section for section in entries}, data_start)


def shown(value: Any) -> str:
    """An untrusted value in a message: short, printable, and safe to print however deep it is."""
    return f"{_SHORT.repr(value):.120}"


def _section(name: str, entry: Any, refuse: Callable[[str, str], FormatError]) -> Section:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"dtype, shape and data_offsets for section {shown(name)}", shown(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"a known dtype in section {shown(name)}", shown(dtype))
    if not _counts(shape) or len(shape) > 16 or math.prod(shape) > 1 << 62:
        raise refuse(f"a shape in section {shown(name)}", shown(shape))
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"two offsets in section {shown(name)}", shown(offsets))
    return Section(name, TensorSpec(dtype, tuple(shape)), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)


def _json(sections: Sequence[Section], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for s in sections:
        header[s.name] = {
            "dtype": s.spec.dtype,
            "shape": list(s.spec.shape),
            "data_offsets": [s.begin, s.end],
        }
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found
