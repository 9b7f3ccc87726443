"""What `run` and `resume` share: options, a generation that is saved as it goes, and its report."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.cli.progress import TokensBar, bytes_bar

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="The model's dtype; `auto` takes the checkpoint's own.")]
Every = Annotated[int, typer.Option(min=1, help="Tokens between two saves.")]
Codec = Annotated[
    str,
    typer.Option(
        help="Lossless: exact, exact-max, exact-predicted, raw. "
        "Compact: near, compact, tiny, kl=0.002, ratio=20, or a codec's id."
    ),
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="A calibration's file, instead of the cache folder's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")]
Seed = Annotated[int | None, typer.Option(help="Start a new random stream with this seed.")]


def streamer(tokenizer: Any, n_tokens: int, *, as_json: bool, with_prompt: bool = False) -> Any:
    """Shows a generation while it runs: its text on stdout, or a bar on stderr where stdout is for JSON."""
    from transformers import TextStreamer

    if as_json:
        return TokensBar(n_tokens)
    return contextlib.nullcontext(TextStreamer(tokenizer, skip_prompt=not with_prompt, skip_special_tokens=True))


def save(snapshot: sq.Snapshot, path: Path, codec: str) -> None:
    with bytes_bar(f"saving {path.name}") as progress:
        sq.save(snapshot, path, codec=codec, progress=progress)


def report(
    tokens: Any,
    tokenizer: Any,
    prompt_length: int,
    path: Path | None,
    *,
    as_json: bool,
    sealed: bool = False,
    **more: Any,
) -> None:
    """Prints what came out, and where its state is. What was sealed to others cannot be read again here."""
    row = tokens[0].tolist()
    is_there = path is not None and path.exists()
    info = sq.inspect(path) if path is not None and is_there and not sealed else None
    if as_json:
        answer = {
            "text": tokenizer.decode(row[prompt_length:], skip_special_tokens=True),
            "tokens": row,
            "prompt_length": prompt_length,
            **more,
            "file": str(path) if path else None,
            "sealed": sealed and is_there,
            "state_id": info.state_id if info else None,
            "n_bytes": info.n_bytes if info else None,
        }
        print(json.dumps(answer, indent=2))
        return
    if sealed and is_there:
        print(f"\nsealed state in {path}; go on with: semq-state resume {path} and the key", file=sys.stderr)
    if info is not None:
        print(
            f"\nstate after {info.n_tokens} tokens in {path} ({info.n_bytes / 1e6:.1f} MB); "
            f"go on with: semq-state resume {path}",
            file=sys.stderr,
        )


def interrupted(path: Path | None) -> typer.Exit:
    """What Ctrl-C ends in: the state is on disk, if a place for it was named."""
    words = f"interrupted; go on with: semq-state resume {path}" if path else "interrupted, nothing was saved"
    print(f"\n{words}", file=sys.stderr)
    return typer.Exit(1)
