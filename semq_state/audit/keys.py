"""Keys to sign and to check with: PEM files of Ed25519 and ECDSA keys, through securesystemslib."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from semq_state.errors import SignatureError, StoreError, UnsupportedOperationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from securesystemslib.signer import CryptoSigner, SSlibKey

KeyFile: TypeAlias = str | os.PathLike[str]
Passphrase: TypeAlias = str | Callable[[], str]
"""A passphrase, or what asks for it where a key needs one."""

SCHEMES = ("ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")

_MOST_BYTES = 1 << 16


def require_library() -> None:
    """Refuses where the packages of the extra are missing.

    Raises:
        UnsupportedOperationError: with the line that installs them.
    """
    try:
        import cryptography  # noqa: F401
        import securesystemslib.signer  # noqa: F401
    except ImportError as error:
        raise UnsupportedOperationError(
            "signatures",
            expected="the packages securesystemslib and cryptography",
            found=f"none ({error})",
            do="pip install 'semq-state[sign]'",
        ) from error


def signer_of(key: KeyFile, passphrase: Passphrase | None = None) -> CryptoSigner:
    """What signs with a private key.

    Args:
        key: a PEM file.
        passphrase: of an encrypted one.

    Raises:
        SignatureError: it is no such key, of another type, or the passphrase is missing or wrong.
        StoreError: there is no such file.
    """
    require_library()
    from securesystemslib.signer import CryptoSigner

    private = _private_key(key, passphrase)
    try:
        signer = CryptoSigner(private)
    except ValueError as error:
        raise _refused(key, "an Ed25519 or ECDSA key", f"another type, {type(private).__name__}") from error
    if signer.public_key.scheme not in SCHEMES:
        raise _refused(key, "an Ed25519 or ECDSA key", f"another type, {signer.public_key.scheme}")
    return signer


def public_key_of(key: KeyFile) -> SSlibKey:
    """What checks with a public key.

    Args:
        key: a PEM file.

    Raises:
        SignatureError: it is no such key, or of another type.
        StoreError: there is no such file.
    """
    require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        found = SSlibKey.from_crypto(load_pem_public_key(_content(key)))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refused(key, "a public key in PEM, Ed25519 or ECDSA", f"{error}"[:200]) from error
    if found.scheme not in SCHEMES:
        raise _refused(key, "an Ed25519 or ECDSA key", f"another type, {found.scheme}")
    return found


def _private_key(key: KeyFile, passphrase: Passphrase | None) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _content(key)
    try:
        try:
            return load_pem_private_key(data, None)
        except TypeError as error:  # it is encrypted
            if passphrase is None:
                raise _refused(key, "a passphrase", "none, and the key is encrypted") from error
            told = passphrase if isinstance(passphrase, str) else passphrase()
            return load_pem_private_key(data, told.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if isinstance(error, SignatureError):
            raise
        raise _refused(key, "a private key in PEM and its passphrase", f"{error}"[:200]) from error


def _content(key: KeyFile) -> bytes:
    try:
        with Path(key).open("rb") as file:
            return file.read(_MOST_BYTES)
    except (OSError, ValueError) as error:
        raise StoreError(str(key), expected="a key's file", found=str(error), do="check the path") from error


def _refused(key: KeyFile, expected: str, found: str) -> SignatureError:
    return SignatureError(
        f"key {os.fspath(key)}", expected=expected, found=found, do="make one with: semq-state keygen"
    )
