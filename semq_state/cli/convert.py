"""`semq-state convert`: the same state under another codec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import CalibrationFile, Codec, Json
from semq_state.cli.progress import bytes_bar
from semq_state.cli.showing import show_info


def convert(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    codec: Codec = "compact",
    calibration: CalibrationFile = None,
    embed_calibration: Annotated[bool, typer.Option(help="Carry the calibration along.")] = False,
    as_json: Json = False,
) -> None:
    """Writes a snapshot again under another codec, and says what that cost."""
    with bytes_bar(f"loading {file.name}") as progress:
        snapshot = sq.load(file, calibration=calibration, progress=progress)
    with bytes_bar(f"saving {out.name}") as progress:
        info = sq.save(
            snapshot,
            out,
            codec=codec,
            calibration=calibration,
            embed_calibration=embed_calibration,
            progress=progress,
        )
    show_info(info, as_json=as_json)
