"""A part of a capsule: a window into its file that reads as a file of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from semq_state.errors import StoreError
from semq_state.stores import ReadableFile

_PIECE = 8 << 20


class Part:
    """`n_bytes` of a file from `begin`, read by range from any thread.

    Args:
        file: the whole file, which must stay open.
        name: of the part, for messages.
        begin: where it begins.
        n_bytes: its size.
    """

    def __init__(self, file: ReadableFile, name: str, begin: int, n_bytes: int) -> None:
        self.path = Path(f"{file.path}, part {name}")
        self.size = n_bytes
        self._file, self._begin = file, begin

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`.

        Raises:
            StoreError: the part ends before, or the disk fails.
        """
        self._check(offset, n_bytes)
        return self._file.read(self._begin + offset, n_bytes)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`, which is made of bytes, from `offset`.

        Raises:
            StoreError: as `read`.
        """
        self._check(offset, len(into))
        self._file.read_into(self._begin + offset, into)

    def _check(self, offset: int, n_bytes: int) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise StoreError(
                str(self.path),
                expected=f"{n_bytes} bytes at {offset}",
                found=f"a part of {self.size}",
                do="use another copy",
            )


class Pieces(Sequence[bytes]):
    """A whole file, a few MiB at a time, each read when it is asked for.

    Args:
        file: the file, which must stay open.
    """

    def __init__(self, file: ReadableFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return -(-self._file.size // _PIECE)

    @overload
    def __getitem__(self, i: int) -> bytes: ...

    @overload
    def __getitem__(self, i: slice) -> list[bytes]: ...

    def __getitem__(self, i: int | slice) -> bytes | list[bytes]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = i * _PIECE
        return self._file.read(at, min(_PIECE, self._file.size - at))


def digest_of(file: ReadableFile) -> str:
    """`sha256:…` of a whole file."""
    found = hashlib.sha256()
    for piece in Pieces(file):
        found.update(piece)
    return f"sha256:{found.hexdigest()}"
