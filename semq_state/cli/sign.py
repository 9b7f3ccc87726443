"""`semq-state sign`: vouch for a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of

ENVIRONMENT = "SEMQ_STATE_KEY_PASSPHRASE"


def sign(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    key: Annotated[
        Path,
        typer.Option(
            help=f"A private key, Ed25519 or ECDSA, PEM. Where it is encrypted: a prompt, or set {ENVIRONMENT}."
        ),
    ],
    inside: Annotated[bool, typer.Option(help="Put the signature into the file, not beside it.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write here: the signed copy, or the file beside it.")] = None,
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Signs a file and the provenance in it: an in-toto statement in FILE.intoto.json, or inside FILE.

    A further key adds its signature. The options that open a sealed file are those of `inspect`.
    """
    unlock = unlock_of(passphrase_file, key_file, private_key)
    made = sq.sign(file, key, inside=inside, out=out, passphrase=_passphrase, unlock=unlock)
    if as_json:
        print(json.dumps(made.as_dict(), indent=2))
    else:
        print(f"signed by {made.key_id} in {made.path}: {made.digest}")


def _passphrase() -> str:
    if words := os.environ.get(ENVIRONMENT):
        return words
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"the key is encrypted: set {ENVIRONMENT}")
    return str(typer.prompt("passphrase of the key", hide_input=True, err=True))
