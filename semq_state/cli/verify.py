"""`semq-state verify`: is this file whole, and who vouches for it?"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.capsules import inspect_capsule, verify_capsule
from semq_state.cli.generating import Json
from semq_state.cli.kinds import kind_of
from semq_state.cli.progress import bytes_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of
from semq_state.errors import SemqStateError
from semq_state.files import Progress
from semq_state.weights.file import damage, open_weights_file


def verify(
    file: Annotated[
        Path, typer.Argument(help="A snapshot, a capsule, a file of quantised weights, or a record's folder.")
    ],
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
    kind = "" if file.is_dir() else kind_of(file)
    if kind and key:
        raise typer.BadParameter(f"a {kind} file carries no signature", param_hint="--key")
    with bytes_bar(f"reading {file.name}") as progress:
        if kind:
            found = _of_other(file, kind, progress)
        else:
            found = sq.verify(file, unlock=unlock, key=key or None, predictor=predictor, progress=progress)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found, "shards" if file.is_dir() else "parts" if kind == "capsule" else "sections")
    if found.failures or found.vouched is False:
        raise typer.Exit(1)
    if found.unchecked:
        raise typer.Exit(2)


def _of_other(file: Path, kind: str, progress: Progress) -> sq.Verification:
    """The verdict on a capsule or a file of quantised weights."""
    wrong = verify_capsule(file, progress) if kind == "capsule" else damage(file, progress)
    identity, n = "", 0
    with contextlib.suppress(SemqStateError):
        if kind == "capsule":
            capsule = inspect_capsule(file)
            identity, n = capsule.capsule_id, len(capsule.stored)
        else:
            with open_weights_file(file) as (_, header, manifest, _):
                identity, n = manifest.state_id, len(header.sections) - 1
    return sq.Verification(str(file), identity, n, wrong, signature="no signature")


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
