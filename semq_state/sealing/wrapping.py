"""A file's data key under a passphrase, a key file or an X25519 key: wrapped, and unwrapped again.

Every wrapping key is used once, since its salt is new in each file; so its nonce can be zero.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from semq_state import content
from semq_state.errors import DecryptionError
from semq_state.sealing import needed
from semq_state.sealing.keys import KEY_BYTES, KeyFile, OpeningKey, Passphrase, PrivateKey, Recipient, SealingKey

CONTEXT = "semq_state sealed 1"
"""Stands in everything that is derived or authenticated, so that nothing made for another purpose fits."""

LOG2_N, R, P = 17, 8, 1
"""What scrypt costs in files that we write: 128 MiB."""

MAX_LOG2_N = 18
"""What a file may ask scrypt for: 256 MiB, with `R` and `P` as ours."""

_SALT_BYTES = 16
_ZERO = bytes(12)
_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z")

_FIELDS: Mapping[str, Mapping[str, int]] = {
    "passphrase": {"salt": _SALT_BYTES, "log2_n": 0, "r": 0, "p": 0, "wrapped": KEY_BYTES + 16},
    "key-file": {"salt": _SALT_BYTES, "wrapped": KEY_BYTES + 16},
    "x25519": {"wrapped": 32 + KEY_BYTES + 16},
}
"""The fields of each kind of stanza: bytes as hex, of so many bytes, or a number where that is 0."""


_OPENED_BY: Mapping[str, type] = {"passphrase": Passphrase, "key-file": KeyFile, "x25519": PrivateKey}


def wrap(key: SealingKey, data_key: bytes, seal_id: str) -> dict[str, Any]:
    """One stanza: the data key under one key."""
    if isinstance(key, Recipient):
        stanza: dict[str, Any] = {"kind": "x25519"}
        public = needed.module("hazmat.primitives.asymmetric.x25519").X25519PublicKey.from_public_bytes(key.public)
        return stanza | {"wrapped": _suite().encrypt(data_key, public, _bound(seal_id, stanza)).hex()}
    if isinstance(key, Passphrase):
        stanza = {"kind": "passphrase", "salt": os.urandom(_SALT_BYTES).hex(), "log2_n": LOG2_N, "r": R, "p": P}
    else:
        stanza = {"kind": "key-file", "salt": os.urandom(_SALT_BYTES).hex()}
    wrapping = needed.aes_gcm(_wrapping_key(key, stanza))
    return stanza | {"wrapped": wrapping.encrypt(_ZERO, data_key, _bound(seal_id, stanza)).hex()}


def unwrap(stanza: Mapping[str, Any], key: OpeningKey, seal_id: str) -> bytes | None:
    """The data key; None where this key does not open this stanza. The stanza has passed `check`."""
    fixed = {name: value for name, value in stanza.items() if name != "wrapped"}
    wrapped, bound = bytes.fromhex(stanza["wrapped"]), _bound(seal_id, fixed)
    if _OPENED_BY[stanza["kind"]] is not type(key):
        return None
    if isinstance(key, PrivateKey):
        x25519 = needed.module("hazmat.primitives.asymmetric.x25519")
        private = x25519.X25519PrivateKey.from_private_bytes(key.private)
        opened = partial(_suite().decrypt, wrapped, private, bound)
    else:
        opened = partial(needed.aes_gcm(_wrapping_key(key, stanza)).decrypt, _ZERO, wrapped, bound)
    try:
        data_key = opened()
    except (needed.invalid_tag(), ValueError):  # the latter for points of low order
        return None
    assert isinstance(data_key, bytes)
    return data_key


def check(stanza: Any, where: str) -> None:
    """Proves a stanza's fields, and that it asks for no more work than ours do twice.

    Raises:
        DecryptionError: a field is missing, unknown or of the wrong kind, or scrypt would cost too much.
    """
    fields = _FIELDS.get(stanza.get("kind", "")) if isinstance(stanza, dict) else None
    if fields is None or stanza.keys() != {"kind", *fields}:
        raise _refused(where, f"the fields of a stanza, of kind {', '.join(_FIELDS)}", "others")
    for name, n_bytes in fields.items():
        if n_bytes and not is_hex(stanza[name], n_bytes):
            raise _refused(where, f"{n_bytes} bytes in hex as {name}", "something else")
    if stanza["kind"] == "passphrase":
        cost = [stanza[name] for name in ("log2_n", "r", "p")]
        if not all(type(x) is int for x in cost) or not 1 <= cost[0] <= MAX_LOG2_N or cost[1:] != [R, P]:
            raise _refused(where, f"scrypt with log2_n up to {MAX_LOG2_N}, r = {R} and p = {P}", f"{cost!r:.60}")


def is_hex(value: Any, n_bytes: int) -> bool:
    return isinstance(value, str) and len(value) == 2 * n_bytes and bool(_HEX.match(value))


def _wrapping_key(key: Passphrase | KeyFile, stanza: Mapping[str, Any]) -> bytes:
    salt = bytes.fromhex(stanza["salt"])
    if isinstance(key, KeyFile):
        return needed.hkdf(key.secret(), salt=salt, info=CONTEXT.encode())
    scrypt = needed.module("hazmat.primitives.kdf.scrypt").Scrypt
    made = scrypt(salt, KEY_BYTES, 1 << stanza["log2_n"], stanza["r"], stanza["p"]).derive(key.secret())
    assert isinstance(made, bytes)
    return made


def _suite() -> Any:
    hpke = needed.module("hazmat.primitives.hpke")
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def _bound(seal_id: str, stanza: Mapping[str, Any]) -> bytes:
    return content.pack([CONTEXT, seal_id, stanza])


def _refused(where: str, expected: str, found: str) -> DecryptionError:
    return DecryptionError(
        f"{where}, seal", expected=expected, found=found, do="the file was changed or damaged; use another copy"
    )
