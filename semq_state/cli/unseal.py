"""`semq-state unseal`: the plain file inside a sealed one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semq_state import sealing
from semq_state.cli.progress import bytes_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, prompted, unlock_of


def unseal(
    file: Annotated[Path, typer.Argument(help="A sealed snapshot.")],
    out: Annotated[Path, typer.Argument(help="The plain file to write.")],
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
) -> None:
    """Writes the plain file, with the very bytes that were sealed."""
    keys = unlock_of(passphrase_file, key_file, private_key) or [prompted(twice=False)]
    with bytes_bar(f"unsealing {file.name}") as progress:
        sealing.unseal(file, out, unlock=keys, progress=progress)
    print(f"unsealed: {out} ({out.stat().st_size:,} bytes)")
