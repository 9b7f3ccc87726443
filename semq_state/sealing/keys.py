"""The keys that a file is sealed to and opened with, as values; no repr shows what they hide."""

from __future__ import annotations

import base64
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from semq_state.errors import DecryptionError
from semq_state.sealing import needed
from semq_state.stores import LocalFile, create_new

KEY_BYTES = 32

PAIRS = ("x25519", "ed25519", "ecdsa")
"""What `create_key_pair` makes: a pair to seal with, and two to sign with (`ecdsa` on P-256)."""

_MAX_FILE_BYTES = 64 << 10
_KEY_FILE = re.compile(rb"semq_state key 1\n([A-Za-z0-9+/]{43}=)\n\Z")


@final
@dataclass(frozen=True)
class Passphrase:
    """Words that a person remembers, stretched by scrypt: 128 MiB and about half a second at each use.

    Args:
        text: the words; forms of Unicode that look alike count as one (NFC).
    """

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a passphrase must have at least one character")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Passphrase:
        """The first line of a text file.

        Raises:
            StoreError: there is no such file.
            DecryptionError: its first line is empty, or it is no text.
        """
        try:
            line = _content(path).decode().split("\n")[0].removesuffix("\r")
        except UnicodeDecodeError as error:
            raise _refused(path, "a passphrase in UTF-8") from error
        if not line:
            raise _refused(path, "a passphrase in the first line", "an empty line")
        return cls(line)

    def secret(self) -> bytes:
        """What goes into scrypt."""
        return unicodedata.normalize("NFC", self.text).encode()


@final
@dataclass(frozen=True)
class KeyFile:
    """A file with 32 random bytes that seals and opens; `create_key_file` makes one.

    Args:
        path: the file, read at each use.
    """

    path: str | os.PathLike[str]

    @staticmethod
    def is_at(path: str | os.PathLike[str]) -> bool:
        """Whether a file is a key file.

        Raises:
            StoreError: there is no such file.
        """
        return bool(_KEY_FILE.match(_content(path)))

    def secret(self) -> bytes:
        """The 32 bytes.

        Raises:
            StoreError: there is no such file.
            DecryptionError: it is no key file.
        """
        found = _KEY_FILE.match(_content(self.path))
        if not found:
            raise _refused(self.path, "a key file that `semq-state keygen --kind key-file` made")
        return base64.b64decode(found[1])


@final
@dataclass(frozen=True)
class Recipient:
    """Someone's X25519 public key: it seals, and only the private key opens.

    Args:
        public: its 32 bytes.
    """

    public: bytes

    def __post_init__(self) -> None:
        _check_length(self.public)

    @classmethod
    def from_pem(cls, path: str | os.PathLike[str]) -> Recipient:
        """A public key in PEM (SubjectPublicKeyInfo).

        Raises:
            StoreError: there is no such file.
            DecryptionError: it holds no X25519 public key.
        """
        key = _pem(path, "load_pem_public_key", "X25519PublicKey")
        return cls(key.public_bytes_raw())


@final
@dataclass(frozen=True)
class PrivateKey:
    """An X25519 private key: it opens what was sealed to its public half.

    Args:
        private: its 32 bytes.
    """

    private: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_length(self.private)

    @classmethod
    def from_pem(cls, path: str | os.PathLike[str]) -> PrivateKey:
        """A private key in PEM (PKCS #8, not encrypted).

        Raises:
            StoreError: there is no such file.
            DecryptionError: it holds no X25519 private key.
        """
        key = _pem(path, "load_pem_private_key", "X25519PrivateKey", None)
        return cls(key.private_bytes_raw())

    @property
    def recipient(self) -> Recipient:
        kind = needed.module("hazmat.primitives.asymmetric.x25519").X25519PrivateKey
        return Recipient(kind.from_private_bytes(self.private).public_key().public_bytes_raw())


SealingKey: TypeAlias = Passphrase | KeyFile | Recipient
"""What a file can be sealed to."""

OpeningKey: TypeAlias = Passphrase | KeyFile | PrivateKey
"""What a sealed file can be opened with."""

SealTo: TypeAlias = SealingKey | Sequence[SealingKey]
"""One key or several: each alone opens the file."""


def create_key_file(path: str | os.PathLike[str]) -> KeyFile:
    """A new key file, readable by its owner only.

    Raises:
        StoreError: something stands there already, or the folder refused.

    Example:
        >>> key = create_key_file("chats.key")  # doctest: +SKIP
    """
    create_new(path, b"semq_state key 1\n" + base64.b64encode(os.urandom(KEY_BYTES)) + b"\n", mode=0o600)
    return KeyFile(path)


def create_key_pair(path: str | os.PathLike[str], kind: str = "x25519") -> Path:
    """A new private key at `path` (PKCS #8 PEM, readable by its owner only), its public half at `path` + `.pub`.

    Args:
        path: where the private key shall be.
        kind: one of `PAIRS`.

    Returns:
        The path of the public key.

    Raises:
        StoreError: something stands at one of the two already, or the folder refused.
    """
    if kind not in PAIRS:
        raise ValueError(f"`kind` must be one of {PAIRS}, got {kind!r}")
    asymmetric, forms = "hazmat.primitives.asymmetric", needed.module("hazmat.primitives.serialization")
    if kind == "ecdsa":
        curves = needed.module(f"{asymmetric}.ec")
        key = curves.generate_private_key(curves.SECP256R1())
    else:
        key = getattr(needed.module(f"{asymmetric}.{kind}"), f"{kind.capitalize()}PrivateKey").generate()
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    beside = Path(f"{os.fspath(path)}.pub")
    create_new(beside, public, mode=0o644)
    try:
        create_new(path, private, mode=0o600)
    except BaseException:
        beside.unlink()
        raise
    return beside


def _pem(path: str | os.PathLike[str], load: str, kind: str, *password: None) -> Any:
    wanted = needed.module("hazmat.primitives.asymmetric.x25519")
    data = _content(path)
    try:
        key = getattr(needed.module("hazmat.primitives.serialization"), load)(data, *password)
    except (ValueError, TypeError, needed.module("exceptions").UnsupportedAlgorithm) as error:
        raise _refused(path, f"an {kind} in PEM, not encrypted", "something else") from error
    if not isinstance(key, getattr(wanted, kind)):
        raise _refused(path, f"an {kind} in PEM", type(key).__name__)
    return key


def _content(path: str | os.PathLike[str]) -> bytes:
    with LocalFile(path) as file:
        if file.size > _MAX_FILE_BYTES:
            raise _refused(path, "a key", f"a file of {file.size} bytes")
        return file.read(0, file.size)


def _refused(path: str | os.PathLike[str], expected: str, found: str = "something else") -> DecryptionError:
    return DecryptionError(
        str(path), expected=expected, found=found, do="name a key's file; semq-state keygen makes one"
    )


def _check_length(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"an X25519 key has {KEY_BYTES} bytes")
