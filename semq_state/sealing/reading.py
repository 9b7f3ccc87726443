"""A sealed file, read by range as if it were the plain one."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

from semq_state.container import Header, Section
from semq_state.errors import DecryptionError, StoreError
from semq_state.sealing import needed
from semq_state.sealing.layout import read_outer
from semq_state.sealing.segments import INDEX_NONCE, TAG_BYTES, Segment, index_of
from semq_state.sealing.table import Unlock, open_seal
from semq_state.stores import LocalFile


class SealedFile:
    """The plain file inside a sealed one, decrypted where it is read, from any thread.

    Args:
        file: the sealed file; closed with this one.
        header: its header.
        unlock: a key, several to try, or the file's own seal.

    Raises:
        DecryptionError: no key was given, none opens it, or header, table or index were changed.
        StoreError: a key's file is missing.
    """

    def __init__(self, file: LocalFile, header: Header, unlock: Unlock | None) -> None:
        self.path = file.path
        self._file = file
        outer, table, (data, index) = read_outer(file, header)
        self._seal = open_seal(table, unlock, str(file.path))
        self._aes = needed.aes_gcm(self._seal.key)
        self._data_start = header.data_start + data.begin
        bound = hashlib.sha256(outer + table).digest()
        told = index_of(self._index(header, index, bound), data.n_bytes, str(file.path))
        self.state_id = told.state_id
        self.segments = list(told.segments())
        self._begins = [segment.begin for segment in self.segments]
        self.size = told.n_bytes
        # The plain header is read twice, for its length and for itself.
        self._first: bytes | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` of the plain file from `offset`.

        Raises:
            DecryptionError: a section was changed, exchanged or damaged.
            StoreError: the file ends before, or the disk fails.
        """
        end = offset + n_bytes
        pieces = []
        for segment in self._touched(offset, end):
            pieces.append(self.opened(segment)[max(0, offset - segment.begin) : end - segment.begin])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`, which is made of bytes, from `offset`.

        Raises:
            DecryptionError, StoreError: as `read`.
        """
        for segment in self._touched(offset, offset + len(into)):
            start, stop = max(offset, segment.begin), min(offset + len(into), segment.end)
            part = into[start - offset : stop - offset]
            if segment.position and len(part) == segment.n_bytes:
                self._decrypt_into(segment, part)
            else:
                part[:] = self.opened(segment)[start - segment.begin : stop - segment.begin]

    def _touched(self, begin: int, end: int) -> Iterator[Segment]:
        if not 0 <= begin <= end <= self.size:
            raise StoreError(
                str(self.path),
                expected=f"{end - begin} bytes at {begin}",
                found=f"a sealed snapshot of {self.size}",
                do="use another copy",
            )
        at = bisect_right(self._begins, begin) - 1
        while begin < end:
            yield self.segments[at]
            begin, at = self.segments[at].end, at + 1

    def opened(self, segment: Segment) -> bytes:
        """The plain bytes of one segment.

        Raises:
            DecryptionError: it was changed, exchanged or damaged.
        """
        if segment.position:
            return self._decrypted(segment)
        with self._lock:
            if self._first is None:
                self._first = self._decrypted(segment)
            return self._first

    def _decrypted(self, segment: Segment) -> bytes:
        plain = self._checked(partial(self._aes.decrypt, *self._sealed(segment)), segment.words)
        assert isinstance(plain, bytes)
        return plain

    def _decrypt_into(self, segment: Segment, into: memoryview) -> None:
        self._checked(partial(self._aes.decrypt_into, *self._sealed(segment), into), segment.words)

    def _sealed(self, segment: Segment) -> tuple[bytes, bytes, bytes]:
        """Nonce, ciphertext and associated data."""
        sealed = self._file.read(self._data_start + segment.sealed_begin, segment.n_bytes + TAG_BYTES)
        return segment.nonce, sealed, segment.bound_to(self._seal.seal_id, self.state_id)

    def _index(self, header: Header, section: Section, bound: bytes) -> bytes:
        sealed = self._file.read(header.data_start + section.begin, section.n_bytes)
        plain = self._checked(partial(self._aes.decrypt, INDEX_NONCE, sealed, bound), "header, seal and index")
        assert isinstance(plain, bytes)
        return plain

    def _checked(self, decrypt: Callable[[], Any], words: str) -> Any:
        try:
            return decrypt()
        except needed.invalid_tag() as error:
            raise DecryptionError(
                f"{self.path}, {words}",
                expected="the bytes that were sealed at this place of this file",
                found="others",
                do="the file was changed or damaged; use another copy",
            ) from error

    def __enter__(self) -> SealedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)
