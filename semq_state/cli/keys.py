"""`semq-state keygen`: keys to seal with, and to sign with."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from semq_state.sealing import create_key_file, create_key_pair


class Kind(str, Enum):
    """What can be made."""

    x25519 = "x25519"
    key_file = "key-file"
    ed25519 = "ed25519"
    ecdsa = "ecdsa"


def keygen(
    out: Annotated[Path, typer.Argument(help="The private key's file; the public one gets `.pub` behind it.")],
    kind: Annotated[
        Kind,
        typer.Option(help="x25519 (pair) or key-file (one secret) to seal with; ed25519 or ecdsa (P-256) to sign."),
    ] = Kind.x25519,
) -> None:
    """Makes a new key, readable by its owner only. Never replaces a file."""
    if kind is Kind.key_file:
        create_key_file(out)
        print(f"secret key: {out}; whoever has it opens what was sealed to it")
        return
    public = create_key_pair(out, kind.value)
    print(f"private key: {out}\npublic key:  {public}")
