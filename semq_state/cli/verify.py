"""`semq-state verify`: is this file whole?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.cli.progress import bytes_bar


def verify(file: Annotated[Path, typer.Argument(help="A snapshot.")], as_json: Json = False) -> None:
    """Computes every digest again. Exit code 0 where all hold, 1 where one does not."""
    with bytes_bar(f"reading {file.name}") as progress:
        found = sq.verify(file, progress=progress)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    elif found.passed:
        print(f"whole: {found.n_sections} sections, {found.state_id}")
    else:
        print(f"damaged: {len(found.failures)} failed")
        for section, words in found.failures.items():
            print(f"  {section}: {words}")
    if not found.passed:
        raise typer.Exit(1)
