"""`semq-state calibrate`: measure a model once, for compact snapshots of its states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.calibration import place_for
from semq_state.cli.generating import Device, Dtype, Json
from semq_state.cli.progress import steps_bar


def calibrate(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a hub id.")] = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text to run it on; several in equal shares. Without any the model writes its own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it, instead of the cache folder.")] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Measure as well what exact-predicted needs; for bfloat16 models.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of labels, signs and samples.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measures how a model's keys and values vary and which of them matter. Takes minutes, once for a model."""
    from semq_state.cli.models import load_model

    texts = [path.read_text(encoding="utf-8") for path in text or ()]
    live, tokenizer = load_model(model, dtype=dtype, device=device)
    with steps_bar() as progress:
        made = sq.calibrate(
            live, tokenizer, text=texts or None, into=out, seed=seed, lossless=lossless, progress=progress
        )
    path = out or place_for(made.weights)
    if as_json:
        print(json.dumps(_told(made, path), indent=2))
        return
    print(f"calibration of {made.model_name} in {path}")
    about = made.about
    print(f"  {made.n_bytes / 1e6:.1f} MB, made in {about['seconds']:.0f} s from {about['n_tokens']:,} tokens")
    print(f"  {made.digest}")
    for point in made.curve:
        print(f"  {16 / point.bits_per_value:6.1f} times smaller than 16 bits a value at KL {point.kl:.5f}")


def _told(made: sq.Calibration, path: Path) -> dict[str, Any]:
    return {
        "file": str(path),
        "digest": made.digest,
        "weights": made.weights,
        "model": made.model_name,
        "n_bytes": made.n_bytes,
        "curve": [{"step": p.step, "bits_per_value": p.bits_per_value, "kl": p.kl} for p in made.curve],
        "about": dict(made.about),
    }
