"""`semq-state replay`: run again what a snapshot says happened."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import semq_state as sq
from semq_state.audit.floor_files import load_floor
from semq_state.audit.replay import NOT_ASKED, PARTS, Replay
from semq_state.cli.generating import CalibrationFile, Device, Json
from semq_state.cli.progress import bytes_bar, steps_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of


def replay(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")] = "smollm2",
    start: Annotated[Path | None, typer.Option(help="An earlier snapshot of the same run.")] = None,
    floor: Annotated[Path | None, typer.Option(help="A noise floor of this snapshot, from `floor`.")] = None,
    how: Annotated[
        Literal["steps", "once"],
        typer.Option(help="`steps` as the run did; `once` in one pass: cheaper, rounds otherwise, wants a floor."),
    ] = "steps",
    part: Annotated[
        list[str] | None, typer.Option(help="What to look at: determinism, cold, trace. All by default.")
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Look past a difference by name, `weights` say.")] = None,
    calibration: CalibrationFile = None,
    dtype: Annotated[str, typer.Option(help="The model's dtype; by default the recorded one.")] = "",
    device: Device = "cpu",
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Goes on from the recorded start, computes the state from its tokens, compares the trace. Takes the recorded
    number of threads and attention implementation. Exit code 0 where all that could be evaluated holds, 1 where
    something differs, 2 where nothing could be evaluated."""
    import torch

    from semq_state.cli.models import load_model

    if unknown := sorted({*(part or ())} - {*PARTS}):
        raise typer.BadParameter(f"--part takes {', '.join(PARTS)}, got {', '.join(unknown)}")
    unlock = unlock_of(passphrase_file, key_file, private_key)
    with bytes_bar(f"loading {file.name}") as progress:
        snapshot = sq.load(file, calibration=calibration, unlock=unlock, progress=progress)
    earlier = sq.load(start, unlock=unlock) if start else None
    limits = load_floor(floor) if floor else None
    recorded = snapshot.provenance
    live, tokenizer = load_model(model, dtype=dtype or recorded.dtype, device=device)
    if recorded.attention and recorded.attention != live.config._attn_implementation:
        live.set_attn_implementation(recorded.attention)
    torch.set_num_threads(recorded.threads or torch.get_num_threads())
    with steps_bar() as told:
        found = sq.replay(
            snapshot, live, start=earlier, floor=limits, how=how, parts=tuple(part or PARTS), tokenizer=tokenizer,
            allow=tuple(allow or ()), told=lambda n: told("replaying", n, snapshot.n_tokens),
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found)
    if not found.passed:
        is_evaluated = any(verdict.outcome != "not evaluated" for verdict in found.verdicts.values())
        if not is_evaluated:
            print("semq-state: nothing could be evaluated", file=sys.stderr)
        raise typer.Exit(1 if is_evaluated else 2)


def _show(found: Replay) -> None:
    for name, verdict in found.verdicts.items():
        if verdict.reasons == NOT_ASKED:
            continue
        print(f"{name.replace('_', ' '):<17} {verdict.outcome}")
        for reason in verdict.reasons:
            print(f"{'':<17}   {reason}")
    for circumstance in found.circumstances:
        print(f"{'circumstance':<17} {circumstance}")
