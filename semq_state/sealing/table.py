"""The public table of a sealed file, and the key that it leads to: made anew, and opened again."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgpack

from semq_state import container, content
from semq_state.errors import DecryptionError
from semq_state.sealing import needed, wrapping
from semq_state.sealing.keys import KEY_BYTES, KeyFile, OpeningKey, Passphrase, Recipient, SealingKey, SealTo
from semq_state.sealing.wrapping import CONTEXT

CIPHER = "AES-256-GCM"
MAX_TABLE_BYTES = 64 << 10
MAX_KEYS = 64
MAX_PASSPHRASES = 4
"""Each one costs a reader half a second."""

_ID_BYTES = 16


@dataclass(frozen=True)
class Seal:
    """One file's seal, its key included.

    Args:
        seal_id: random, new for each file, as hex.
        table: the public table, as it stands in the file.
        key: encrypts the segments; never in the file.
    """

    seal_id: str
    table: bytes
    key: bytes = field(repr=False)


Unlock: TypeAlias = OpeningKey | Sequence[OpeningKey] | Seal
"""What opens a sealed file: a key, several to try, or the seal itself, which only its maker has."""


def check_keys(to: SealTo) -> list[SealingKey]:
    """The keys as a list, each of them fit to seal to.

    Raises:
        ValueError, TypeError: no key, too many, or a value that is none to seal to.
        StoreError, DecryptionError: a key's file is missing or none.
        UnsupportedOperationError: the package cryptography is missing.
    """
    keys = list(to) if isinstance(to, Sequence) else [to]
    if not 1 <= len(keys) <= MAX_KEYS or sum(isinstance(key, Passphrase) for key in keys) > MAX_PASSPHRASES:
        raise ValueError(
            f"a file is sealed to 1 to {MAX_KEYS} keys, {MAX_PASSPHRASES} passphrases at most among them, "
            f"not to {len(keys)}"
        )
    for key in keys:
        if not isinstance(key, (Passphrase, KeyFile, Recipient)):
            raise TypeError(
                f"a file is sealed to a Passphrase, KeyFile or Recipient, not to a {type(key).__name__}"
            )
        if isinstance(key, KeyFile):
            key.secret()
    needed.module("hazmat.primitives.hpke")
    return keys


def new_seal(to: SealTo) -> Seal:
    """A new data key, wrapped for each of the keys.

    Raises:
        ValueError, TypeError, StoreError, DecryptionError, UnsupportedOperationError: as `check_keys`.
    """
    keys = check_keys(to)
    seal_id, data_key = os.urandom(_ID_BYTES).hex(), os.urandom(KEY_BYTES)
    key, commitment = _derived(data_key, seal_id)
    table = content.pack(
        {
            "version": 1,
            "cipher": CIPHER,
            "seal_id": seal_id,
            "commitment": commitment.hex(),
            "keys": [wrapping.wrap(each, data_key, seal_id) for each in keys],
        }
    )
    return Seal(seal_id, table, key)


def open_seal(table: bytes, unlock: Unlock | None, where: str) -> Seal:
    """The inverse of `new_seal`: every key is tried on every stanza of its kind.

    Raises:
        DecryptionError: no key was given, none fits, or the table is damaged.
    """
    fields = _read_table(table, where)
    if unlock is None:
        raise DecryptionError(
            where,
            expected="a key, for the file is sealed",
            found="none",
            do="pass unlock=… (command line: --passphrase-file, --key-file or --private-key)",
        )
    seal_id = fields["seal_id"]
    if isinstance(unlock, Seal):
        if unlock.table != table:
            raise _none_opens(where)
        return unlock
    for key in list(unlock) if isinstance(unlock, Sequence) else [unlock]:
        for stanza in fields["keys"]:
            data_key = wrapping.unwrap(stanza, key, seal_id)
            if data_key is None:
                continue
            derived, commitment = _derived(data_key, seal_id)
            if not hmac.compare_digest(commitment.hex(), fields["commitment"]):
                raise _damaged(where, "a data key that the table commits to", "another one")
            return Seal(seal_id, table, derived)
    raise _none_opens(where)


def _read_table(table: bytes, where: str) -> dict[str, Any]:
    try:
        fields = container.unpacked(table)
        canonical = content.pack(fields) == table
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _damaged(where, "a table in msgpack", f"{type(error).__name__}") from error
    if not canonical or not isinstance(fields, dict):
        raise _damaged(where, "a table in canonical msgpack", "another encoding")
    if (version := fields.get("version")) != 1 or type(version) is not int:
        raise DecryptionError(
            f"{where}, seal",
            expected="version 1",
            found=container.shown(version),
            do="update semq_state to read it",
        )
    if fields.keys() != {"version", "cipher", "seal_id", "commitment", "keys"} or fields["cipher"] != CIPHER:
        raise _damaged(where, f"version, cipher {CIPHER}, seal_id, commitment and keys", "another table")
    if not wrapping.is_hex(fields["seal_id"], _ID_BYTES) or not wrapping.is_hex(fields["commitment"], KEY_BYTES):
        raise _damaged(where, "an identity and a commitment in hex", "something else")
    keys = fields["keys"]
    if not isinstance(keys, list) or not 1 <= len(keys) <= MAX_KEYS:
        raise _damaged(where, f"1 to {MAX_KEYS} keys", "something else")
    for stanza in keys:
        wrapping.check(stanza, where)
    if sum(stanza["kind"] == "passphrase" for stanza in keys) > MAX_PASSPHRASES:
        raise _damaged(where, f"at most {MAX_PASSPHRASES} passphrases", "more")
    return fields


def _derived(data_key: bytes, seal_id: str) -> tuple[bytes, bytes]:
    """The key of the segments, and a commitment: GCM alone would let one file open as two under two keys."""
    both = needed.hkdf(data_key, salt=bytes.fromhex(seal_id), info=CONTEXT.encode(), n_bytes=2 * KEY_BYTES)
    return both[:KEY_BYTES], both[KEY_BYTES:]


def _none_opens(where: str) -> DecryptionError:
    return DecryptionError(
        where,
        expected="a key that the file was sealed to",
        found="none of the given keys opens it",
        do="give the right passphrase or key; if it is the right one, the file is damaged",
    )


def _damaged(where: str, expected: str, found: str) -> DecryptionError:
    return DecryptionError(
        f"{where}, seal", expected=expected, found=found, do="the file was changed or damaged; use another copy"
    )
