"""`sq.sign`: in-toto statements in DSSE envelopes, beside a snapshot file or inside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semq_state import files
from semq_state.audit import keys
from semq_state.audit.envelope import PAYLOAD_TYPE, Envelope, rendered
from semq_state.audit.keys import KeyFile, Passphrase
from semq_state.audit.signatures import check, placed_inside, read_beside
from semq_state.audit.statements import hold, statement_of
from semq_state.audit.verify import UNPROVED
from semq_state.container import MAX_SIGNATURE_BYTES, SIGNATURE, SIGNED_SINCE, Header, Manifest
from semq_state.errors import SemqStateError, SignatureError, UnsupportedOperationError
from semq_state.files import signature as places
from semq_state.sealing import SealedFile, Unlock
from semq_state.stores import ReadableFile, atomic_write

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

_ROOM = 512  # for the signatures of others, in the section of a signed file


@dataclass(frozen=True)
class Signed:
    """What `sign` made.

    Args:
        path: the file in which the signature stands.
        key_id: the id of the key.
        digest: of the bytes that were signed.
        state_id: the identity of the state in them.
    """

    path: str
    key_id: str
    digest: str
    state_id: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"path": self.path, "key_id": self.key_id, "digest": self.digest, "state_id": self.state_id}


def sign(
    path: str | os.PathLike[str],
    key: KeyFile,
    *,
    inside: bool = False,
    out: str | os.PathLike[str] | None = None,
    passphrase: Passphrase | None = None,
    unlock: Unlock | None = None,
) -> Signed:
    """Vouches for a snapshot file: its bytes, the state in it, and where that comes from.

    The file is verified first. Signing again with another key adds to the signatures that are there. What is signed
    is an in-toto statement in a DSSE envelope; no host, user, path or text is in it.

    Args:
        path: the file.
        key: a private key, Ed25519 or ECDSA: a PEM file.
        inside: put the signature into the file, as its last section, and not beside it.
        out: the file to write: by default `path` itself for `inside`, `path.intoto.json` otherwise, which is where
            `verify` looks.
        passphrase: of an encrypted key, or what asks for it.
        unlock: what opens a sealed file. The signature is over the plain file inside it, and stands beside it.

    Raises:
        SignatureError: the key is none, or the signatures that are there are of other bytes.
        FormatError: the file is not a snapshot, or damaged.
        StoreError: a file is missing, or cannot be written; nothing was changed.
        UnsupportedOperationError: `inside` a sealed file; or `pip install 'semq-state[sign]'` is needed.

    Example:
        >>> sq.sign("chat.safetensors", "me.pem")  # doctest: +SKIP
    """
    signer = keys.signer_of(key, passphrase)
    with files.open_snapshot(path, unlock) as (file, header, manifest):
        if not inside:
            return _sign_beside(file, header, manifest, signer, places.beside(path) if out is None else Path(out))
        place = Path(path if out is None else out)
        if isinstance(file, SealedFile):
            raise UnsupportedOperationError(
                str(path),
                expected="a plain file to put a signature into",
                found="a sealed one",
                do="sign it before it is sealed, or beside it",
            )
        if places.beside(place).exists():
            raise SignatureError(
                str(place),
                expected="no signatures beside a file that is to change",
                found=str(places.beside(place)),
                do="sign beside it as well, or remove those",
            )
        return _sign_inside(file, header, manifest, signer, place)


def _sign_beside(
    file: ReadableFile, header: Header, manifest: Manifest, signer: CryptoSigner, place: Path
) -> Signed:
    _require_whole(file, header, manifest)
    digest = places.digest_of(file, file.size)
    if place.exists():
        before = read_beside(place)
        hold(before.payload, manifest, digest, str(place))
    else:
        before = _unsigned(manifest, digest)
    data = _with_signature(before, signer).to_bytes()
    if len(data) > MAX_SIGNATURE_BYTES:
        raise _no_room(str(place), len(data), MAX_SIGNATURE_BYTES)
    with atomic_write(place) as target:
        target.write(data)
    return Signed(str(place), signer.public_key.keyid, f"sha256:{digest}", manifest.state_id)


def _sign_inside(
    file: ReadableFile, header: Header, manifest: Manifest, signer: CryptoSigner, place: Path
) -> Signed:
    def proved(hidden: Path) -> None:
        with files.open_snapshot(hidden) as (written, its_header, its_manifest):
            _require_whole(written, its_header, its_manifest)
            inner = placed_inside(written, its_header)
            check(written, its_header, its_manifest, [inner] if inner else [], [signer.public_key])

    before = placed_inside(file, header)
    with atomic_write(place, check=proved) as target:
        if before:
            digest, n_bytes = places.digest_of(file, before.n_bytes), header.sections[SIGNATURE].n_bytes
            hold(before.envelope.payload, manifest, digest, before.where)
            envelope = before.envelope
            for block in places.blocks(file, 0, before.n_bytes):
                target.write(block)
        else:
            manifest = replace(manifest, format_version=max(SIGNED_SINCE, manifest.format_version))
            # Written once for its size: a digest has one length, and only signatures vary by a byte or two.
            trial = _with_signature(_unsigned(manifest, "0" * 64), signer).to_bytes()
            n_bytes = -(-(len(trial) + _ROOM) // _ROOM) * _ROOM
            if n_bytes > MAX_SIGNATURE_BYTES:
                raise _no_room(str(place), n_bytes, MAX_SIGNATURE_BYTES)
            begin, digest = places.copy_with_room(file, header, manifest, n_bytes, target)
            envelope = _unsigned(manifest, digest)
            target.seek(begin)
        data = _with_signature(envelope, signer).to_bytes()
        if len(data) > n_bytes:
            raise _no_room(str(file.path), len(data), n_bytes)
        target.write(data.ljust(n_bytes, b"\0"))
    return Signed(str(place), signer.public_key.keyid, f"sha256:{digest}", manifest.state_id)


def _require_whole(file: ReadableFile, header: Header, manifest: Manifest) -> None:
    for error in files.failures_of(file, header, manifest, None, lambda n_bytes: None).values():
        if not isinstance(error, UNPROVED):
            raise error


def _unsigned(manifest: Manifest, digest: str) -> Envelope:
    return Envelope(rendered(statement_of(manifest, digest)), PAYLOAD_TYPE, {})


def _with_signature(envelope: Envelope, signer: CryptoSigner) -> Envelope:
    from securesystemslib.dsse import Envelope as Library

    made = Library(envelope.payload, envelope.payload_type, {}).sign(signer)
    return replace(envelope, signatures={**envelope.signatures, made.keyid: bytes.fromhex(made.signature)})


def _no_room(where: str, n_bytes: int, most: int) -> SemqStateError:
    return SignatureError(
        where, expected=f"at most {most} bytes of signatures", found=f"{n_bytes}", do="sign beside the file"
    )
