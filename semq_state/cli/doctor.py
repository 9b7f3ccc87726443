"""`semq-state doctor`: can this model's state be kept here, and what of it?"""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import transformers
import typer

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.cli.models import load_alone


def doctor(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or smollm2.")],
    device: Annotated[str, typer.Option(help="torch's name of a device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="torch's name of a dtype, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Generates a few tokens, interrupts and resumes. Exit code 0 where that was exact, 1 where the state cannot be
    kept."""
    found = sq.supports(load_alone(model, dtype=dtype, device=device))
    told = {**found.as_dict(), **_machine(device)}
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        for name, value in _words(found, told).items():
            print(f"{name:<10} {value}")
    if not found:
        raise typer.Exit(1)


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {
            "semq_state": sq.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _words(found: sq.Support, told: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    words = {"model": found.model_name, "versions": versions}
    if found.families:
        layers = ", ".join(f"{n} {family}" for family, n in found.families.items())
        words |= {
            "kept": f"{found.cache} cache ({layers}){''.join(f' + {other}' for other in found.others)}",
            "size": f"{found.bytes_per_token:,} bytes a token and {found.fixed_bytes:,} beside, for each row, raw",
            "crop": found.crop,
        }
    return {**words, "missing": found.missing or "nothing: resumed in the middle, the same logits bit for bit"}
