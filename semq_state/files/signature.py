"""Where a signature stands, and over which bytes: beside a snapshot file, or as its last section."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from semq_state.container import MANIFEST, SIGNATURE, Header, Manifest, Section
from semq_state.container.header import render_header, reserved_bytes
from semq_state.content import TensorSpec
from semq_state.stores import ReadableFile

SUFFIX = ".intoto.json"

_BLOCK = 8 << 20


def beside(path: str | os.PathLike[str]) -> Path:
    """The file that holds the signatures of `path`."""
    return Path(f"{os.fspath(path)}{SUFFIX}")


def inside(file: ReadableFile, header: Header) -> bytes | None:
    """The envelope in a file's last section, without the zeros that follow it; None where there is none."""
    section = header.sections.get(SIGNATURE)
    if section is None:
        return None
    return file.read(header.data_start + section.begin, section.n_bytes).rstrip(b"\0")


def signed_bytes(file: ReadableFile, header: Header) -> int:
    """How many bytes of a file a signature inside it is over: all that stand before it."""
    return header.data_start + header.sections[SIGNATURE].begin


def digest_of(file: ReadableFile, stop: int) -> str:
    """SHA-256 of the first `stop` bytes, in hex."""
    return _hashed(blocks(file, 0, stop))


def copy_with_room(
    file: ReadableFile, header: Header, manifest: Manifest, n_bytes: int, target: BinaryIO
) -> tuple[int, str]:
    """Writes a file once more, with an empty last section for a signature.

    Args:
        file: a snapshot file.
        header: its header.
        manifest: the manifest of the copy.
        n_bytes: size of the section.
        target: an empty file, open for writing and reading.

    Returns:
        Where the section begins, and the SHA-256 of all bytes before it, in hex.
    """
    told = manifest.to_bytes()
    kept = [section for name, section in header.sections.items() if name not in (MANIFEST, SIGNATURE)]
    sections: list[Section] = []
    at = 0
    for name, spec in (
        *((section.name, section.spec) for section in kept),
        (MANIFEST, TensorSpec("U8", (len(told),))),
        (SIGNATURE, TensorSpec("U8", (n_bytes,))),
    ):
        sections.append(Section(name, spec, at, at + spec.n_bytes))
        at += spec.n_bytes
    metadata = {**header.metadata, "format_version": str(manifest.format_version)}
    n_dims = max(len(section.spec.shape) for section in sections)
    size = reserved_bytes([section.name for section in sections], n_dims, metadata)
    target.write(render_header(sections, metadata, size))
    for section in kept:
        for block in blocks(file, header.data_start + section.begin, header.data_start + section.end):
            target.write(block)
    target.write(told + bytes(n_bytes))
    target.flush()
    stop = target.tell() - n_bytes
    target.seek(0)
    return stop, _hashed(target.read(min(_BLOCK, stop - at)) for at in range(0, stop, _BLOCK))


def blocks(file: ReadableFile, start: int, stop: int) -> Iterator[bytes]:
    """A run of a file's bytes, a few at a time."""
    for at in range(start, stop, _BLOCK):
        yield file.read(at, min(_BLOCK, stop - at))


def _hashed(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
