"""`sq.seal` and `unseal`: a snapshot file to a sealed one and back, byte for byte, a few megabytes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from semq_state import container
from semq_state.container import MANIFEST
from semq_state.errors import FormatError, UnsupportedOperationError
from semq_state.sealing.keys import SealTo
from semq_state.sealing.layout import is_sealed
from semq_state.sealing.reading import SealedFile
from semq_state.sealing.table import Seal, Unlock, new_seal
from semq_state.sealing.writing import SegmentWriter
from semq_state.stores import LocalFile, atomic_write

Progress = Callable[[int, int], None]


def seal(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, to: SealTo, progress: Progress | None = None
) -> None:
    """Encrypts a snapshot file, as it is; `save(…, seal=…)` writes no plain file in the first place.

    The plain file stays where it is: removing it, and what the disk keeps of it, is up to you.

    Args:
        path: a snapshot file.
        out: the sealed file to write; an existing one is replaced.
        to: a passphrase, key file or recipient, or several, each of which opens the file alone.
        progress: called with the bytes done and the bytes in all.

    Raises:
        StoreError: there is no such file, or the folder or disk refused; nothing was changed.
        FormatError: it is not a snapshot, or a newer one.
        UnsupportedOperationError: it is sealed already, or the package cryptography is missing.

    Example:
        >>> sq.seal("chat.safetensors", "chat.sealed", to=Passphrase("correct horse"))  # doctest: +SKIP
    """
    with LocalFile(path) as file:
        header = container.read_header(file.read, file.size, str(path))
        state_id = _state_id(file, header)
        made = new_seal(to)
        done = 0
        with atomic_write(out, check=lambda hidden: _check(hidden, made)) as target:
            writer = SegmentWriter(target, made, state_id)
            sizes = [("", header.data_start), *((name, s.n_bytes) for name, s in header.sections.items())]
            for name, n_bytes in sizes:
                for segment in writer.announce(name, n_bytes):
                    writer.write(segment, file.read(segment.begin, segment.n_bytes))
                    done += segment.n_bytes
                    if progress:
                        progress(done, file.size)
            writer.finish()


def unseal(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, unlock: Unlock, progress: Progress | None = None
) -> None:
    """The inverse of `seal`: writes the plain file, with the very bytes that were sealed.

    Args:
        path: a sealed file.
        out: the plain file to write; an existing one is replaced.
        unlock: a key that it was sealed to, or several to try.
        progress: called with the bytes done and the bytes in all.

    Raises:
        StoreError: there is no such file, or the folder or disk refused; nothing was changed.
        FormatError: it is no sealed file.
        DecryptionError: no key opens it, or it was changed or damaged.

    Example:
        >>> unseal("chat.sealed", "chat.safetensors", unlock=Passphrase("correct horse"))  # doctest: +SKIP
    """
    with LocalFile(path) as local:
        header = container.read_header(local.read, local.size, str(path))
        if not is_sealed(header):
            raise FormatError(
                str(path), expected="a sealed file", found="another safetensors file", do="it needs no unsealing"
            )
        file = SealedFile(local, header, unlock)
        with atomic_write(out) as target:
            for segment in file.segments:
                target.write(file.opened(segment))
                if progress:
                    progress(segment.end, file.size)


def _state_id(file: LocalFile, header: container.Header) -> str:
    """Of a file that its manifest proves to be a snapshot."""
    where, section = str(file.path), header.sections.get(MANIFEST)
    if is_sealed(header):
        raise UnsupportedOperationError(
            where, expected="a plain snapshot", found="a sealed one", do="unseal it first"
        )
    if header.metadata.get("format") != "semq_state" or section is None:
        raise FormatError(
            where,
            expected="a semq_state snapshot",
            found=f"another safetensors file, of format {container.shown(header.metadata.get('format'))}",
            do="name a file that semq_state saved",
        )
    data = file.read(header.data_start + section.begin, section.n_bytes)
    return container.read_manifest(data, header, where).state_id


def _check(hidden: Path, made: Seal) -> None:
    """Reads a finished file again: what decrypts is what was encrypted."""
    with LocalFile(hidden) as local:
        file = SealedFile(local, container.read_header(local.read, local.size, str(hidden)), made)
        for segment in file.segments:
            file.opened(segment)
