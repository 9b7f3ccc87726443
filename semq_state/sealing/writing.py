"""Writes a sealed file: segments in order, then the index, then the header; no plain byte reaches the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import BinaryIO

from semq_state.content import Bytes
from semq_state.sealing import needed
from semq_state.sealing.layout import HEADER_BYTES, outer_header
from semq_state.sealing.segments import INDEX_NONCE, TAG_BYTES, Index, Segment, cut
from semq_state.sealing.table import Seal


class SegmentWriter:
    """A sealed file in the making. Sections are announced in the order of the plain file; the segments of each
    can be written at any time.

    Args:
        file: an empty file, open for writing.
        seal: its seal; one seal is for one file only.
        state_id: of the snapshot.
    """

    def __init__(self, file: BinaryIO, seal: Seal, state_id: str) -> None:
        self._file, self._seal, self._state_id = file, seal, state_id
        self._aes = needed.aes_gcm(seal.key)
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._begin = self._n_segments = 0
        self._start = HEADER_BYTES + len(seal.table)
        file.write(bytes(HEADER_BYTES) + seal.table)
        self._at = self._start

    def announce(self, name: str, n_bytes: int) -> list[Segment]:
        """The segments of the next section."""
        segments = list(cut(name, n_bytes, position=self._n_segments, begin=self._begin))
        self._names.append(name)
        self._sizes.append(n_bytes)
        self._n_segments += len(segments)
        self._begin += n_bytes
        return segments

    def write(self, segment: Segment, data: bytes | memoryview) -> None:
        """Encrypts one announced segment; each once, for its nonce must never be used again."""
        sealed = self._aes.encrypt(segment.nonce, data, segment.bound_to(self._seal.seal_id, self._state_id))
        self._write_at(self._start + segment.sealed_begin, sealed)

    def finish(self) -> None:
        """Writes index and header."""
        index = Index(self._state_id, self._names, self._sizes)
        plain = index.to_bytes(self._start + index.n_sealed)
        header = outer_header((len(self._seal.table), index.n_sealed, len(plain) + TAG_BYTES))
        bound = hashlib.sha256(header + self._seal.table).digest()
        self._write_at(self._start + index.n_sealed, self._aes.encrypt(INDEX_NONCE, plain, bound))
        self._write_at(0, header)
        self._file.flush()

    def _write_at(self, offset: int, data: bytes) -> None:
        # Seeking flushes the buffer, so only where it must be.
        if offset != self._at:
            self._file.seek(offset)
        self._file.write(data)
        self._at = offset + len(data)


class SealedSink:
    """Where `SectionWriter` puts a snapshot that is sealed as it is written.

    Args:
        file, seal, state_id: as for `SegmentWriter`.
    """

    def __init__(self, file: BinaryIO, seal: Seal, state_id: str) -> None:
        self._writer = SegmentWriter(file, seal, state_id)
        self._header: list[Segment] = []

    def reserve(self, n_bytes: int) -> None:
        # Its ciphertext stands first but is written last, which a file with a hole in front allows.
        self._header = self._writer.announce("", n_bytes)

    def append(self, name: str, pieces: Sequence[bytes | Bytes]) -> None:
        views = [memoryview(piece) if isinstance(piece, bytes) else piece.data for piece in pieces]
        data = views[0] if len(views) == 1 else memoryview(b"".join(views))
        self._write(self._writer.announce(name, len(data)), data)

    def finish(self, header: bytes) -> None:
        self._write(self._header, memoryview(header))
        self._writer.finish()

    def _write(self, segments: Sequence[Segment], data: memoryview) -> None:
        for segment in segments:
            start = segment.begin - segments[0].begin
            self._writer.write(segment, data[start : start + segment.n_bytes])
