"""`semq-state verify`: is this file whole, and who vouches for it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.cli.progress import bytes_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of


def verify(
    file: Annotated[Path, typer.Argument(help="A snapshot, or a record's folder.")],
    key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key, PEM, whose owner must have signed the file. Of several each must."),
    ] = None,
    predictor: Annotated[
        Path | None, typer.Option(help="An exact-predicted file's predictor, instead of the cache folder's.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Computes every digest again.

    Exit code 0 where all hold and each --key signed it, 1 where one does not, 2 where one could not be checked.
    """
    unlock = unlock_of(passphrase_file, key_file, private_key)
    with bytes_bar(f"reading {file.name}") as progress:
        found = sq.verify(file, unlock=unlock, key=key or None, predictor=predictor, progress=progress)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found, "shards" if file.is_dir() else "sections")
    if found.failures or found.vouched is False:
        raise typer.Exit(1)
    if found.unchecked:
        raise typer.Exit(2)


def _show(found: sq.Verification, words: str) -> None:
    if found.failures:
        print(f"damaged: {len(found.failures)} failed")
    elif found.unchecked:
        print(f"could not be checked: {len(found.unchecked)} of {found.n_sections} {words}")
    else:
        print(f"whole: {found.n_sections} {words}, {found.state_id}")
    for section, words in {**found.failures, **found.unchecked}.items():
        print(f"  {section}: {words}")
    if found.vouched or (found.vouched is None and found.signers):
        print(found.signature)
    elif found.whole:
        print(f"whole, but nobody vouches for it: {found.signature}")
    elif found.signature:
        print(f"nobody vouches for it: {found.signature}")
