"""Writes sections one after the other; the header, which needs all sizes, goes into a reserved space at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

from semq_state.container.header import Section, render_header, reserved_bytes
from semq_state.content import Bytes, TensorSpec


class SectionWriter:
    """A safetensors file in the making.

    Args:
        file: an empty file, open for writing.
        names: the sections to come.
        n_dims: the most dimensions that one of them has.
        metadata: a first version of the metadata, as long as the last one.
    """

    def __init__(self, file: BinaryIO, names: Sequence[str], n_dims: int, metadata: Mapping[str, str]) -> None:
        self._file = file
        self._sections: list[Section] = []
        self._at = 0
        self._reserved = reserved_bytes(names, n_dims, metadata)
        file.write(bytes(self._reserved))

    def write(self, name: str, pieces: Sequence[bytes | Bytes], spec: TensorSpec | None = None) -> None:
        """Appends a section: a plain tensor of `spec`, or without one a run of coded bytes."""
        n_bytes = sum(len(piece) for piece in pieces)
        for piece in pieces:
            self._file.write(piece if isinstance(piece, bytes) else piece.data)
        spec = spec or TensorSpec("U8", (n_bytes,))
        self._sections.append(Section(name, spec, self._at, self._at + n_bytes))
        self._at += n_bytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Puts the header in its place."""
        self._file.seek(0)
        self._file.write(render_header(self._sections, metadata, self._reserved))
        self._file.flush()
