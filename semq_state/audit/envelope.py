"""DSSE envelopes and JSON as bytes. Each has one rendering, and no other is read: no edit goes unnoticed."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semq_state.errors import SignatureError

PAYLOAD_TYPE = "application/vnd.in-toto+json"

_KEY_ID = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope, its signatures unproved.

    Args:
        payload: what is signed.
        payload_type: what the payload is.
        signatures: key id to signature.
    """

    payload: bytes
    payload_type: str
    signatures: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """The inverse of `read_envelope`."""
        return rendered(
            {
                "payload": _text(self.payload),
                "payloadType": self.payload_type,
                "signatures": [{"keyid": id, "sig": _text(sig)} for id, sig in sorted(self.signatures.items())],
            }
        )


def read_envelope(data: bytes, where: str) -> Envelope:
    """The inverse of `Envelope.to_bytes`.

    Args:
        data: bytes that are not trusted.
        where: their place, for messages.

    Raises:
        SignatureError: they are no envelope, or an envelope in another rendering.
    """
    try:
        told = parsed(data)
        envelope = Envelope(
            _bytes(told["payload"]),
            told["payloadType"],
            {entry["keyid"]: _bytes(entry["sig"]) for entry in told["signatures"]},
        )
        # Equal bytes prove what was not asked above: the kinds and names of fields, their order, and the base64.
        if envelope.to_bytes() != data:
            raise ValueError("another rendering of it")
        if not envelope.signatures or not all(_KEY_ID.match(id) for id in envelope.signatures):
            raise ValueError("no signatures, or key ids that are none")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SignatureError(
            where,
            expected="a DSSE envelope in its one canonical rendering",
            found=f"{type(error).__name__}: {error}"[:200],
            do="it was edited or damaged; use another copy, or sign again",
        ) from error
    return envelope


def rendered(value: Any) -> bytes:
    """Canonical JSON: names in ascending order, no spaces, UTF-8, no NaN and no infinity.

    Raises:
        ValueError: a number has no place in JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def parsed(data: bytes) -> Any:
    """JSON without names that stand twice in an object.

    Raises:
        ValueError, RecursionError: it is not that.
    """
    return json.loads(data.decode(), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)
