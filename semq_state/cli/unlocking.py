"""The options that open a sealed file, and those that seal one. A passphrase comes from a file, the environment or
a prompt; on the command line every other program could read it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.sealing import KeyFile, OpeningKey, Passphrase, PrivateKey, Recipient, SealingKey

ENVIRONMENT = "SEMQ_STATE_PASSPHRASE"

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help=f"Opens a sealed file: its first line. Or set {ENVIRONMENT}."),
]
KeyFiles = Annotated[
    list[Path] | None, typer.Option("--key-file", help="Opens a sealed file: a key file of `keygen`.")
]
PrivateKeys = Annotated[
    list[Path] | None, typer.Option("--private-key", help="Opens a sealed file: an X25519 private key, PEM.")
]
SealTo = Annotated[
    list[Path] | None,
    typer.Option(
        "--seal-to", help="Encrypt what is written: an X25519 public key (PEM) or a key file. Repeatable."
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Write what comes from a sealed file unencrypted, with no --seal-to.")
]
SealPassphraseFile = Annotated[
    Path | None, typer.Option("--seal-passphrase-file", help="Encrypt what is written: a passphrase's file.")
]


def unlock_of(
    passphrase_file: Path | None, key_files: list[Path] | None, private_keys: list[Path] | None
) -> list[OpeningKey] | None:
    """What these options name, the environment last; None where there is nothing.

    Raises:
        StoreError: one of the files is missing.
        DecryptionError: one of them is no key.
    """
    keys: list[OpeningKey] = [PrivateKey.from_pem(path) for path in private_keys or ()]
    keys += [KeyFile(path) for path in key_files or ()]
    if passphrase_file is not None:
        keys.append(Passphrase.from_file(passphrase_file))
    elif words := os.environ.get(ENVIRONMENT):
        keys.append(Passphrase(words))
    return keys or None


def seal_of(seal_to: list[Path] | None, passphrase_file: Path | None) -> list[SealingKey] | None:
    """What a file is sealed to by these options; None where it is to stay plain.

    Raises:
        StoreError: one of the files is missing.
        DecryptionError: one of them is no key.
    """
    keys: list[SealingKey] = [_sealing_key(path) for path in seal_to or ()]
    if passphrase_file is not None:
        keys.append(Passphrase.from_file(passphrase_file))
    return keys or None


def require_sealed_again(file: Path, unlock: list[OpeningKey] | None, seal: object, *, plain: bool) -> None:
    """Refuses to write in the open what was sealed, unless told to.

    Raises:
        typer.BadParameter: the file is sealed and nothing says to whom the next one shall be.
    """
    if seal is None and not plain and sq.inspect(file, unlock=unlock).sealed:
        raise typer.BadParameter(
            f"{file} is sealed: name --seal-to or --seal-passphrase-file for what is written, or --plain"
        )


def prompted(*, twice: bool) -> Passphrase:
    """A passphrase from the environment, or from a person at the terminal.

    Raises:
        typer.BadParameter: there is neither.
    """
    if words := os.environ.get(ENVIRONMENT):
        return Passphrase(words)
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"give --passphrase-file, --key-file or another key, or set {ENVIRONMENT}")
    return Passphrase(typer.prompt("passphrase", hide_input=True, confirmation_prompt=twice, err=True))


def _sealing_key(path: Path) -> SealingKey:
    return KeyFile(path) if KeyFile.is_at(path) else Recipient.from_pem(path)
