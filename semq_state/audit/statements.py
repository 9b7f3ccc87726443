"""in-toto statements: what a signature says of a file, and whether that is so."""

from __future__ import annotations

import math
from typing import Any

from semq_state.audit.envelope import parsed, rendered
from semq_state.container import Manifest, shown
from semq_state.errors import SignatureError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:semq-state:provenance:v1"


def statement_of(manifest: Manifest, digest: str) -> dict[str, Any]:
    """What is said of a file.

    Args:
        manifest: its manifest.
        digest: SHA-256 of the bytes that are signed, in hex.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": "snapshot", "digest": {"sha256": digest}},
            {"name": "state", "digest": {"sha256": manifest.state_id.removeprefix("sha256:")}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "provenance": _in_json(manifest.provenance),
            "codec": manifest.codec,
            "writer": manifest.writer,
            "format_version": manifest.format_version,
            "content_digest": manifest.content_digest,
            "report": _in_json(manifest.report),
        },
    }


def hold(payload: bytes, manifest: Manifest, digest: str, where: str) -> None:
    """Holds a statement against the file that it should be about.

    Args:
        payload: the statement, not trusted.
        manifest: of the file.
        digest: SHA-256 of the bytes that should be signed, in hex.
        where: the statement's place, for messages.

    Raises:
        SignatureError: it is no statement, of another type, or about something else.
    """
    expected = statement_of(manifest, digest)
    try:
        told = parsed(payload)
        if not isinstance(told, dict) or told.keys() != expected.keys():
            raise ValueError("other fields")
        # As text, in which 1, 1.0 and true differ.
        said = {name: rendered(value) for name, value in told.items()}
        bytes_told, state_told = map(rendered, told["subject"])
    except (ValueError, TypeError, RecursionError) as error:
        raise refused(
            where,
            "an in-toto statement with the subjects snapshot and state",
            f"{type(error).__name__}: {error}"[:200],
        ) from error
    if told["_type"] != STATEMENT_TYPE:
        raise refused(where, f"a statement of type {STATEMENT_TYPE}", f"another type, {shown(told['_type'])}")
    if told["predicateType"] != PREDICATE_TYPE:
        raise refused(where, f"a predicate of type {PREDICATE_TYPE}", f"another, {shown(told['predicateType'])}")
    if bytes_told != rendered(expected["subject"][0]):
        raise refused(where, f"a statement about a file of SHA-256 {digest}", f"other bytes, {bytes_told[:200]!r}")
    if state_told != rendered(expected["subject"][1]):
        raise refused(where, f"a statement about the state {manifest.state_id}", f"another, {state_told[:200]!r}")
    if said["predicate"] != rendered(expected["predicate"]):
        raise refused(where, "what the file says of its provenance", "another provenance in the statement")


def _in_json(value: Any) -> Any:
    """Plain values, with the numbers that JSON does not have as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _in_json(item) for name, item in value.items()}
    return [_in_json(item) for item in value] if isinstance(value, list) else value


def refused(where: str, expected: str, found: str) -> SignatureError:
    """What is raised where file and signature do not go together."""
    return SignatureError(
        where, expected=expected, found=found, do="file and signature do not belong together, or one was changed"
    )
