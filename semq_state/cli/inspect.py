"""`semq-state inspect`: what a file says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.capsules import inspect_capsule
from semq_state.cli.generating import Json
from semq_state.cli.kinds import kind_of
from semq_state.cli.showing import show_capsule, show_info, show_record, show_weights
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of
from semq_state.weights.file import inspect_weights


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A snapshot, a capsule, a file of quantised weights, or the folder of a record.")
    ],
    tensors: Annotated[bool, typer.Option(help="List every tensor too.")] = False,
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Shows header and manifest; reads no tensors and proves nothing: `verify` does."""
    if file.is_dir():
        show_record(sq.open_record(file), as_json=as_json)
        return
    kind = kind_of(file)
    if kind == "capsule":
        show_capsule(inspect_capsule(file), as_json=as_json)
        return
    if kind == "weights":
        show_weights(inspect_weights(file), as_json=as_json)
        return
    info = sq.inspect(file, unlock=unlock_of(passphrase_file, key_file, private_key))
    show_info(info, as_json=as_json)
    if as_json:
        return
    if tensors:
        for name, entry in info.manifest.tensors.items():
            print(f"  {name:<36} {entry.spec.dtype:<8} {list(entry.spec.shape)}")
