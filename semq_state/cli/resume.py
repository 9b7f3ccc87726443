"""`semq-state resume`: go on from a file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.cli import generating
from semq_state.cli.generating import CalibrationFile, Codec, Device, Dtype, Every, Json, Seed
from semq_state.cli.kinds import kind_of
from semq_state.cli.progress import bytes_bar
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
from semq_state.errors import UnsupportedOperationError


def resume(
    file: Annotated[Path, typer.Argument(help="A snapshot, or a capsule, which brings its own model.")],
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")] = "smollm2",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="How many more tokens; without it up to the recorded end.")
    ] = None,
    append: Annotated[str, typer.Option(help="Text of the next turn.")] = "",
    seed: Seed = None,
    trace: Annotated[bool, typer.Option("--trace", help="Keep evidence of each token, for `replay`.")] = False,
    save: Annotated[Path | None, typer.Option(help="Where to keep the newest state from here on.")] = None,
    every: Every = 64,
    codec: Codec = "exact",
    calibration: CalibrationFile = None,
    allow: Annotated[list[str] | None, typer.Option(help="Accept a difference by name, `weights` say.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    dequantize: Annotated[
        str, typer.Option(help="Of a capsule: dequantise its weights once (load), or at each call (call).")
    ] = "load",
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    seal_to: SealTo = None,
    seal_passphrase_file: SealPassphraseFile = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Goes on generating from a snapshot, as if never interrupted. Refuses another model than the one that
    made it. From a capsule its own quantised model goes on, and says so."""
    from semq_state.cli.models import load_model

    unlock, seal = unlock_of(passphrase_file, key_file, private_key), seal_of(seal_to, seal_passphrase_file)
    is_capsule = kind_of(file) == "capsule"
    if save is not None and not is_capsule:
        require_sealed_again(file, unlock, seal, plain=plain)
    if is_capsule:
        resumed, live, tokenizer = _from_capsule(file, device, dequantize)
        snapshot = resumed.snapshot
    else:
        with bytes_bar(f"loading {file.name}") as progress:
            snapshot = sq.load(file, calibration=calibration, unlock=unlock, progress=progress)
        live, tokenizer = load_model(model, dtype=dtype, device=device)
        resumed = sq.restore(snapshot, live, tokenizer=tokenizer, allow=tuple(allow or ()))
    options: dict[str, Any] = {} if tokens is None else {"max_new_tokens": tokens}
    if append:
        options["append"] = tokenizer(append, add_special_tokens=False)["input_ids"]
    planned = tokens or max(0, int(snapshot.generation.config.get("max_length") or 0) - snapshot.n_tokens)
    try:
        with (
            generating.streamer(tokenizer, planned, as_json=as_json, with_prompt=True) as shown,
            sq.capture(live, tokenizer=tokenizer, autosave=save, every=every, codec=codec, seal=seal, trace=trace),
        ):
            out = resumed.generate(seed=seed, streamer=shown, **options)
    except KeyboardInterrupt:
        raise generating.interrupted(save) from None
    generating.report(
        out,
        tokenizer,
        snapshot.n_tokens,
        save,
        as_json=as_json,
        sealed=seal is not None,
        reused_tokens=resumed.reused_tokens,
    )


def _from_capsule(file: Path, device: str, dequantize: str) -> tuple[sq.Resumed, Any, Any]:
    """The resumed state of a capsule, its model and its tokenizer."""
    if dequantize not in ("load", "call"):
        raise typer.BadParameter("load or call", param_hint="--dequantize")
    with bytes_bar(f"opening {file.name}") as progress:
        capsule = sq.open_capsule(file, dequantize="call" if dequantize == "call" else "load", progress=progress)
    if capsule.tokenizer is None:
        raise UnsupportedOperationError(
            str(file),
            expected="a capsule with a tokenizer",
            found="none",
            do="pack it with one, or go on in Python: sq.open_capsule(…).resume()",
        )
    capsule.model.to(device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed = capsule.resume()
    for warning in said:
        print(f"semq-state: {warning.message}", file=sys.stderr)
    return resumed, capsule.model, capsule.tokenizer
