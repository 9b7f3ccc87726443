"""`semq-state seal`: a snapshot file, encrypted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.progress import bytes_bar
from semq_state.cli.unlocking import prompted
from semq_state.sealing import KeyFile, Passphrase, Recipient, SealingKey


def seal(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    out: Annotated[Path, typer.Argument(help="The sealed file to write.")],
    passphrase_file: Annotated[Path | None, typer.Option(help="Its first line is the passphrase.")] = None,
    key_file: Annotated[list[Path] | None, typer.Option(help="A key file of `keygen`. Repeatable.")] = None,
    recipient: Annotated[list[Path] | None, typer.Option(help="An X25519 public key, PEM. Repeatable.")] = None,
) -> None:
    """Encrypts a snapshot, to each of the given keys. Without one it asks for a passphrase, twice."""
    keys: list[SealingKey] = [Recipient.from_pem(path) for path in recipient or ()]
    keys += [KeyFile(path) for path in key_file or ()]
    if passphrase_file is not None:
        keys.append(Passphrase.from_file(passphrase_file))
    with bytes_bar(f"sealing {file.name}") as progress:
        sq.seal(file, out, to=keys or [prompted(twice=True)], progress=progress)
    n_keys = max(1, len(keys))
    print(
        f"sealed to {n_keys} key{'s' * (n_keys > 1)}: {out} ({out.stat().st_size:,} bytes); {file} is still there"
    )
