"""Segments, the units of encryption: how a snapshot file is cut into them, and what each one is bound to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from semq_state import container, content
from semq_state.errors import DecryptionError, UnsupportedOperationError
from semq_state.sealing.wrapping import CONTEXT

PART_BYTES = 8 << 20
"""A section is cut into parts of this size; the last may be shorter."""

TAG_BYTES = 16

INDEX_NONCE = b"\xff" * 12

MAX_INDEX_BYTES = 4 << 20
MAX_SECTIONS = 1 << 16

_LONGEST_PADDING = 4 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a section of the plain file.

    Args:
        name: the section; empty for the header.
        part: which part of the section, from 0.
        n_parts: how many parts the section has.
        position: which segment of the file, from 0.
        begin: where it begins in the plain file.
        end: where it ends there.
    """

    name: str
    part: int
    n_parts: int
    position: int
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin

    @property
    def sealed_begin(self) -> int:
        """Where its ciphertext begins in the section `sealed.data`."""
        return self.begin + TAG_BYTES * self.position

    @property
    def nonce(self) -> bytes:
        """12 bytes, used once under a key: the key is new in each file, the position in it."""
        return self.position.to_bytes(12, "big")

    def bound_to(self, seal_id: str, state_id: str) -> bytes:
        """The associated data."""
        place = [self.name, self.part, self.n_parts, self.position, self.begin, self.end]
        return content.pack([CONTEXT, seal_id, state_id, *place])

    @property
    def words(self) -> str:
        part = f", part {self.part + 1} of {self.n_parts}" if self.n_parts > 1 else ""
        return f"section {self.name!r:.200}{part}" if self.name else f"the sealed header{part}"


def cut(name: str, n_bytes: int, *, position: int, begin: int) -> Iterator[Segment]:
    """The segments of one section; none where it is empty."""
    n_parts = -(-n_bytes // PART_BYTES)
    for part in range(n_parts):
        start = part * PART_BYTES
        stop = min(start + PART_BYTES, n_bytes)
        yield Segment(name, part, n_parts, position + part, begin + start, begin + stop)


@dataclass(frozen=True)
class Index:
    """What the segments of a file are; the first thing to be decrypted.

    Args:
        state_id: of the snapshot.
        names: the sections of the plain file in order, first its header under the empty name.
        sizes: their bytes.
    """

    state_id: str
    names: Sequence[str]
    sizes: Sequence[int]

    def segments(self) -> Iterator[Segment]:
        position = begin = 0
        for name, n_bytes in zip(self.names, self.sizes, strict=True):
            yield from cut(name, n_bytes, position=position, begin=begin)
            position += -(-n_bytes // PART_BYTES)
            begin += n_bytes

    @property
    def n_bytes(self) -> int:
        """The size of the plain file."""
        return sum(self.sizes)

    @property
    def n_sealed(self) -> int:
        """The size of all ciphertexts together."""
        return self.n_bytes + TAG_BYTES * sum(-(-n_bytes // PART_BYTES) for n_bytes in self.sizes)

    def to_bytes(self, n_others: int) -> bytes:
        """Its length, itself, and zeros up to a size that tells little of the file's.

        Args:
            n_others: bytes of the sealed file besides the index.
        """
        told = content.pack({"state_id": self.state_id, "names": list(self.names), "sizes": list(self.sizes)})
        if len(told) > MAX_INDEX_BYTES or len(self.names) > MAX_SECTIONS:
            raise UnsupportedOperationError(
                "sealing",
                expected=f"at most {MAX_SECTIONS} sections, and {MAX_INDEX_BYTES} bytes of names and sizes",
                found=f"{len(self.names)} and {len(told)}",
                do="save it under another codec",
            )
        least = n_others + 8 + len(told) + TAG_BYTES
        return len(told).to_bytes(8, "little") + told + bytes(padded(least) - least)


def index_of(data: bytes, n_sealed: int, where: str) -> Index:
    """The inverse of `Index.to_bytes`, held against the size of the ciphertexts.

    Raises:
        DecryptionError: it breaks a rule; whoever sealed the file did not use this library.
    """

    def refused(expected: str, found: str) -> DecryptionError:
        return DecryptionError(
            f"{where}, sealed.index",
            expected=expected,
            found=found,
            do="no writer makes such a file; do not trust it",
        )

    n_told = int.from_bytes(data[:8], "little")
    if n_told > min(len(data) - 8, MAX_INDEX_BYTES) or data.count(0, 8 + n_told) != len(data) - 8 - n_told:
        raise refused("an index and zeros after it", f"one of {n_told} bytes in {len(data)}")
    told = data[8 : 8 + n_told]
    try:
        fields: Any = container.unpacked(told)
        canonical = content.pack(fields) == told
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise refused("an index in msgpack", type(error).__name__) from error
    if not canonical or not isinstance(fields, dict) or fields.keys() != {"state_id", "names", "sizes"}:
        raise refused("state_id, names and sizes in canonical msgpack", "something else")
    state_id, names, sizes = fields["state_id"], fields["names"], fields["sizes"]
    if type(state_id) is not str or not _is_list(names, str) or not _is_list(sizes, int):
        raise refused("names and sizes", "something else")
    if not 1 <= len(names) == len(sizes) <= MAX_SECTIONS or min(sizes) < 0 or names[0]:
        raise refused("a size for each section, first the header's", f"{len(names)} names, {len(sizes)} sizes")
    index = Index(state_id, names, sizes)
    if index.n_sealed != n_sealed:
        raise refused(f"segments of {n_sealed} bytes in all", f"{container.shown(index.n_sealed)}")
    return index


def padded(n_bytes: int) -> int:
    """A size of at least `n_bytes` of which many share each value (Padmé), at most 4 MiB above it."""
    exponent = max(1, n_bytes).bit_length() - 1
    step = min(1 << max(0, exponent - exponent.bit_length()), _LONGEST_PADDING)
    return -(-n_bytes // step) * step


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
