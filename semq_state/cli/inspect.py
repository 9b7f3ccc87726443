"""`semq-state inspect`: what a file says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.files import SnapshotInfo


def inspect(
    file: Annotated[Path, typer.Argument(help="A snapshot.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor too.")] = False,
    as_json: Json = False,
) -> None:
    """Shows header and manifest; reads no tensors and proves nothing: `verify` does."""
    info = sq.inspect(file)
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    # Plain lines, whatever the width of the terminal: a digest must never be cut.
    for name, value in _summary(info).items():
        print(f"{name:<10} {value}")
    if tensors:
        for name, entry in info.manifest.tensors.items():
            print(f"  {name:<36} {entry.spec.dtype:<8} {list(entry.spec.shape)}")


def _summary(info: SnapshotInfo) -> dict[str, str]:
    said = info.as_dict()
    made_by = said["provenance"]
    return {
        "file": f"{info.path}, format {said['format_version']}, {said['writer']}",
        "state_id": info.state_id,
        "tokens": f"{info.n_tokens} ({said['prompt_length']} of them the prompt), batch of {said['batch_size']}",
        "cache": f"{said['n_layers']} layers ({', '.join(said['families'])}), {said['n_cached']} tokens cached",
        "size": f"{info.n_bytes:,} bytes as {info.codec}, {said['ratio']:.3f} times smaller than raw",
        "model": f"{made_by['model_name']}, {made_by['dtype']}, {made_by['attention']} attention",
        "weights": made_by["weights"],
        "tokenizer": made_by["tokenizer"] or "not recorded",
        "taken": f"{made_by['created']} on {made_by['device']} with {made_by['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(made_by["versions"].items())),
    }
