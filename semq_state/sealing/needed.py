"""The optional package behind sealing, imported when first needed; without it, an error with the line to type."""

from __future__ import annotations

import importlib
from typing import Any

from semq_state.errors import UnsupportedOperationError


def module(name: str) -> Any:
    """A module of `cryptography`, `hazmat.primitives.hpke` say.

    Raises:
        UnsupportedOperationError: the package is missing or too old.
    """
    try:
        return importlib.import_module(f"cryptography.{name}")
    except ImportError as error:
        raise UnsupportedOperationError(
            "sealing",
            expected="the package cryptography, version 48 or later",
            found=str(error),
            do="pip install 'semq-state[seal]'",
        ) from error


def aes_gcm(key: bytes) -> Any:
    """AES-256-GCM under a key of 32 bytes."""
    return module("hazmat.primitives.ciphers.aead").AESGCM(key)


def hkdf(key: bytes, *, salt: bytes, info: bytes, n_bytes: int = 32) -> bytes:
    """HKDF with SHA-256 (RFC 5869)."""
    sha256 = module("hazmat.primitives.hashes").SHA256()
    derived = module("hazmat.primitives.kdf.hkdf").HKDF(sha256, n_bytes, salt, info).derive(key)
    assert isinstance(derived, bytes)
    return derived


def invalid_tag() -> type[Exception]:
    """What an authenticated decryption raises when it fails."""
    kind: type[Exception] = module("exceptions").InvalidTag
    return kind
