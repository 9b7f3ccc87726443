"""Signatures that are there, inside a file and beside it, and their check."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semq_state import files
from semq_state.audit import keys
from semq_state.audit.envelope import PAYLOAD_TYPE, Envelope, read_envelope
from semq_state.audit.keys import KeyFile
from semq_state.audit.statements import hold, refused
from semq_state.container import MAX_SIGNATURE_BYTES, SIGNATURE, Header, Manifest, shown
from semq_state.errors import SignatureError
from semq_state.files import signature as places
from semq_state.sealing import Unlock
from semq_state.stores import LocalFile, ReadableFile

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True)
class Placed:
    """An envelope that was found, unproved.

    Args:
        where: its place, for messages.
        envelope: what it says.
        n_bytes: over how many bytes of the snapshot file its statement should be.
    """

    where: str
    envelope: Envelope
    n_bytes: int


def check_signature(
    path: str | os.PathLike[str], key: KeyFile | Sequence[KeyFile], *, unlock: Unlock | None = None
) -> tuple[str, ...]:
    """Whether the owners of `key` vouch for the bytes of a file; `verify` proves what the bytes say as well.

    Args:
        path: the file.
        key: a public key, or several of which each must have signed: PEM files.
        unlock: what opens it where it is sealed.

    Returns:
        The ids of the keys.

    Raises:
        SignatureError: there is no signature; or it was edited, is over other bytes, by another key, or of another
            type.
        FormatError: the file is not a snapshot, or a damaged one.
        StoreError: there is no such file.
    """
    publics = public_keys(key)
    with files.open_snapshot(path, unlock) as (file, header, manifest):
        check(file, header, manifest, placed(file, header), publics)
    return tuple(public.keyid for public in publics)


def public_keys(key: KeyFile | Sequence[KeyFile]) -> list[SSlibKey]:
    """The public keys to check with.

    Raises:
        SignatureError, StoreError: one of them is none, or not there.
    """
    several = [key] if isinstance(key, (str, os.PathLike)) else list(key)
    if not several:
        raise SignatureError("key", expected="at least one public key", found="none", do="name one")
    return [keys.public_key_of(each) for each in several]


def placed(file: ReadableFile, header: Header) -> list[Placed]:
    """The envelopes inside a file and beside it.

    Raises:
        SignatureError: one of them cannot be read.
    """
    found = [placed_inside(file, header)]
    place = places.beside(file.path)
    if place.exists():
        found.append(Placed(str(place), read_beside(place), file.size))
    return [each for each in found if each]


def placed_inside(file: ReadableFile, header: Header) -> Placed | None:
    """The envelope inside a file, if it has one.

    Raises:
        SignatureError: it cannot be read.
    """
    data = places.inside(file, header)
    if data is None:
        return None
    where = f"{file.path}, section {SIGNATURE!r}"
    return Placed(where, read_envelope(data, where), places.signed_bytes(file, header))


def read_beside(place: Path) -> Envelope:
    """The envelope in a file of its own.

    Raises:
        SignatureError: it cannot be read.
    """
    with LocalFile(place) as file:
        if file.size > MAX_SIGNATURE_BYTES:
            raise refused(str(place), f"an envelope of at most {MAX_SIGNATURE_BYTES} bytes", f"{file.size}")
        return read_envelope(file.read(0, file.size), str(place))


def check(
    file: ReadableFile, header: Header, manifest: Manifest, found: Sequence[Placed], publics: Sequence[SSlibKey]
) -> None:
    """Proves that each of the keys vouches for a file.

    Raises:
        SignatureError: one of them does not.
    """
    if not found:
        raise SignatureError(
            str(file.path),
            expected="a signature",
            found="none, inside the file or beside it",
            do="ask whoever made the file to sign it",
        )
    digest = functools.cache(functools.partial(places.digest_of, file))
    for public in publics:
        own = next((each for each in found if public.keyid in each.envelope.signatures), found[-1])
        _check_one(own, public)
        hold(own.envelope.payload, manifest, digest(own.n_bytes), own.where)


def _check_one(found: Placed, public: SSlibKey) -> None:
    """Proves that a key signed an envelope that is of our type."""
    from securesystemslib.dsse import Envelope as Library
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import Signature

    envelope, id = found.envelope, public.keyid
    if envelope.payload_type != PAYLOAD_TYPE:
        raise refused(
            found.where, f"a payload of type {PAYLOAD_TYPE}", f"another type, {shown(envelope.payload_type)}"
        )
    if id not in envelope.signatures:
        raise SignatureError(
            found.where,
            expected=f"a signature by key {id}",
            found=f"another key's: {', '.join(sorted(envelope.signatures)):.500}",
            do="nobody with that key vouches for this file",
        )
    told = {id: Signature(id, envelope.signatures[id].hex())}
    try:
        Library(envelope.payload, envelope.payload_type, told).verify([public], 1)
    except VerificationError as error:
        raise refused(found.where, f"a signature by key {id}", "one that does not hold") from error
