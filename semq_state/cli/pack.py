"""`semq-state pack`: a conversation with the model that goes on with it, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.cli.generating import CalibrationFile, Device, Dtype, Json
from semq_state.cli.progress import bytes_bar, steps_bar
from semq_state.cli.quantize import EmbeddingBits, TextFile, Window, Windows, as_parameters
from semq_state.cli.showing import show_capsule


def pack(
    file: Annotated[Path, typer.Argument(help="A snapshot; its bytes are packed as they are.")],
    out: Annotated[Path, typer.Option(help="The capsule to write.")],
    weights: Annotated[
        str, typer.Option(help="METHOD:BITS or METHOD:BITS:GROUP, or what `semq-state quantize` wrote.")
    ] = "neuqi:3",
    model: Annotated[str, typer.Option(help="The snapshot's model: smollm2, a folder, or a hub id.")] = "smollm2",
    text: TextFile = None,
    embedding_bits: EmbeddingBits = 8,
    windows: Windows = 16,
    window: Window = 2048,
    tokenizer: Annotated[bool, typer.Option(help="Pack the tokenizer too.")] = True,
    calibration: CalibrationFile = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Packs a snapshot, quantised weights, configuration, tokenizer and calibration into one file that resumes
    with nothing else at hand: `resume CAPSULE`."""
    from semq_state.cli.models import load_model, load_tokenizer

    if Path(weights).exists():
        # A quantised folder has the tokenizer of its model.
        own = Path(weights) if Path(weights).is_dir() else None
        words = load_tokenizer(str(own) if own and (own / "tokenizer_config.json").is_file() else model)
        held: Any = Path(weights)
    else:
        method, bits, group = _recipe(weights)
        read = text.read_text(encoding="utf-8") if text else None
        live, words = load_model(model, dtype=dtype, device=device)
        with steps_bar() as progress, as_parameters():
            sq.quantize(
                live, method, bits, group, read,
                tokenizer=words, embedding_bits=embedding_bits, n_windows=windows, window=window, progress=progress,
            )  # fmt: skip
        held = live.semq_weights
    with bytes_bar(f"packing {out.name}") as packing:
        info = sq.pack(
            file,
            out,
            weights=held,
            tokenizer=words if tokenizer else None,
            calibration=calibration,
            progress=packing,
        )
    show_capsule(info, as_json=as_json)


def _recipe(words: str) -> tuple[str, int, int]:
    """Method, bits and group of `METHOD:BITS[:GROUP]`."""
    from semq_state.weights.recipes import METHODS

    method, *numbers = words.split(":")
    if method in METHODS and len(numbers) in (1, 2) and all(each.isdecimal() for each in numbers):
        bits, group = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 128
        if 2 <= bits <= 8:
            return method, bits, group
    known = ", ".join(METHODS)
    raise typer.BadParameter(
        f"{words!r} is neither METHOD:BITS[:GROUP], of {known} and 2 to 8 bits, nor a folder or file",
        param_hint="--weights",
    )
