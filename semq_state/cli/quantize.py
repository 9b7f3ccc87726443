"""`semq-state quantize`: a model's weights as symbols, in a folder that `run` takes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.cli.generating import Device, Dtype, Json
from semq_state.cli.progress import bytes_bar, steps_bar
from semq_state.errors import SemqStateError

TextFile = Annotated[
    Path | None, typer.Option("--text", help="A text to read while quantising. rtn, neuqi and semq do without.")
]
Windows = Annotated[int, typer.Option(min=1, help="Pieces of the text that are read.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of each.")]
EmbeddingBits = Annotated[int, typer.Option(help="Of embeddings and output layer; 0 leaves them as they are.")]
QuantizationSeed = Annotated[int, typer.Option(help="Of the order in which --distill takes the pieces.")]


@contextlib.contextmanager
def as_parameters() -> Iterator[None]:
    """Tells an argument that is out of range as typer tells its own."""
    try:
        yield
    except SemqStateError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def quantize(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a hub id.")] = "smollm2",
    method: Annotated[str, typer.Option(help="rtn, gptq, septq, neuqi, specquant or semq.")] = "neuqi",
    bits: Annotated[int, typer.Option(min=2, max=8, help="Of a weight.")] = 3,
    group: Annotated[int, typer.Option(min=0, help="Weights that share a scale; 0 for all of a channel.")] = 128,
    text: TextFile = None,
    embedding_bits: EmbeddingBits = 8,
    activation_bits: Annotated[
        int, typer.Option(help="Round the inputs of the layers too, token by token; 0 for not at all.")
    ] = 0,
    distill: Annotated[int, typer.Option(min=0, help="Steps in which scales are trained on the original.")] = 0,
    windows: Windows = 16,
    window: Window = 2048,
    seed: QuantizationSeed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantises a model's linear layers and writes them with tokenizer and configuration: `run FOLDER`."""
    from semq_state.cli.models import load_model
    from semq_state.weights.building import save_folder

    began = time.monotonic()
    read = text.read_text(encoding="utf-8") if text else None
    live, tokenizer = load_model(model, dtype=dtype, device=device)
    with steps_bar() as progress, as_parameters():
        sq.quantize(
            live,
            method,
            bits,
            group,
            read,
            tokenizer=tokenizer,
            embedding_bits=embedding_bits,
            activation_bits=activation_bits,
            distill_steps=distill,
            n_windows=windows,
            window=window,
            seed=seed,
            progress=progress,
        )
    with bytes_bar(f"saving {out.name}") as saving:
        info = save_folder(live.semq_weights, out, tokenizer=tokenizer, progress=saving)
    told: dict[str, Any] = {**info.as_dict(), "folder": str(out), "seconds": round(time.monotonic() - began, 1)}
    if as_json:
        print(json.dumps(told, indent=2))
        return
    print(f"{info.origin.model_name} as {method}, {bits} bits, in {out}")
    print(f"  {info.n_bytes / 1e6:.1f} MB, {info.bits_per_weight:.3f} bits a weight, in {told['seconds']:.0f} s")
    for words, each in told["stored"].items():
        print(f"  {each['n']:,} weights of {words} bits: {each['bits_per_weight']:.3f} bits each as stored")
    left, n_left = info.recipe.get("left") or [], info.recipe.get("n_left", 0)
    shown = ", ".join(left[:3]) + (" …" if len(left) > 3 else "")
    print(f"  left as they are: {n_left:,} parameters" + (f", the largest in {shown}" if left else ""))
    print(f"  {info.weights_id}")
