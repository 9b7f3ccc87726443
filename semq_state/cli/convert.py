"""`semq-state convert`: the same state under another codec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import CalibrationFile, Codec, Json
from semq_state.cli.progress import bytes_bar
from semq_state.cli.showing import show_info
from semq_state.cli.unlocking import (
    KeyFiles,
    PassphraseFile,
    Plain,
    PrivateKeys,
    SealPassphraseFile,
    SealTo,
    require_sealed_again,
    seal_of,
    unlock_of,
)


def convert(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    codec: Codec = "compact",
    calibration: CalibrationFile = None,
    embed_calibration: Annotated[bool, typer.Option(help="Carry the calibration along.")] = False,
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    seal_to: SealTo = None,
    seal_passphrase_file: SealPassphraseFile = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Writes a snapshot again under another codec, and says what that cost. A sealed one is sealed
    again, to whom is to be told, or written --plain."""
    unlock, seal = unlock_of(passphrase_file, key_file, private_key), seal_of(seal_to, seal_passphrase_file)
    require_sealed_again(file, unlock, seal, plain=plain)
    with bytes_bar(f"loading {file.name}") as progress:
        snapshot = sq.load(file, calibration=calibration, unlock=unlock, progress=progress)
    with bytes_bar(f"saving {out.name}") as progress:
        info = sq.save(
            snapshot,
            out,
            codec=codec,
            calibration=calibration,
            embed_calibration=embed_calibration,
            seal=seal,
            progress=progress,
        )
    show_info(info, as_json=as_json)
