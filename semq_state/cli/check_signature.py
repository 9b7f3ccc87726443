"""`semq-state check-signature`: does the owner of this key vouch for a file?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from semq_state.audit import signatures
from semq_state.cli.generating import Json
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of
from semq_state.errors import SignatureError


def check_signature(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    key: Annotated[list[Path], typer.Option(help="A public key, PEM. Of several each must have signed.")],
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Checks signature and bytes of a file, not what the bytes say: `verify --key` does both.

    Exit code 0 where each key signed it, 1 where one did not.
    """
    unlock = unlock_of(passphrase_file, key_file, private_key)
    signatures.public_keys(key)  # a key that is none is no answer
    words = ""
    signers: tuple[str, ...] = ()
    try:
        signers = signatures.check_signature(file, key, unlock=unlock)
    except SignatureError as error:
        words = str(error)
    if as_json:
        print(json.dumps({"passed": not words, "signers": list(signers), "words": words}, indent=2))
    else:
        print(words or f"signed by {', '.join(signers)}")
    if words:
        raise typer.Exit(1)
