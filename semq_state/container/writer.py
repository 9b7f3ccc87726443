"""Writes sections one after the other; the header, which needs all sizes, goes into a reserved space at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO, Protocol

from semq_state.container.header import Section, render_header, reserved_bytes
from semq_state.content import Bytes, TensorSpec


class Sink(Protocol):
    """Where a file goes while it is written: to the disk as it is, or sealed on its way there."""

    def reserve(self, n_bytes: int) -> None:
        """Leaves room for the header; called first."""

    def append(self, name: str, pieces: Sequence[bytes | Bytes]) -> None:
        """Takes the next section."""

    def finish(self, header: bytes) -> None:
        """Puts the header, which fills the room exactly, in its place; called last."""


class PlainSink:
    """A file as it is.

    Args:
        file: an empty file, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def reserve(self, n_bytes: int) -> None:
        self._file.write(bytes(n_bytes))

    def append(self, name: str, pieces: Sequence[bytes | Bytes]) -> None:
        for piece in pieces:
            self._file.write(piece if isinstance(piece, bytes) else piece.data)

    def finish(self, header: bytes) -> None:
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()


class SectionWriter:
    """A safetensors file in the making.

    Args:
        sink: where it goes.
        names: the sections to come.
        n_dims: the most dimensions that one of them has.
        metadata: a first version of the metadata, as long as the last one.
    """

    def __init__(self, sink: Sink, names: Sequence[str], n_dims: int, metadata: Mapping[str, str]) -> None:
        self._sink = sink
        self._sections: list[Section] = []
        self._at = 0
        self._reserved = reserved_bytes(names, n_dims, metadata)
        sink.reserve(self._reserved)

    def write(self, name: str, pieces: Sequence[bytes | Bytes], spec: TensorSpec | None = None) -> None:
        """Appends a section: a plain tensor of `spec`, or without one a run of coded bytes."""
        # Where the size is known, pieces may be made as they are taken.
        n_bytes = spec.n_bytes if spec else sum(len(piece) for piece in pieces)
        self._sink.append(name, pieces)
        spec = spec or TensorSpec("U8", (n_bytes,))
        self._sections.append(Section(name, spec, self._at, self._at + n_bytes))
        self._at += n_bytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Puts the header in its place."""
        self._sink.finish(render_header(self._sections, metadata, self._reserved))
