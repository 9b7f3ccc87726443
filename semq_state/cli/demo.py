"""`semq-state demo`: a generation is killed and goes on in another process, before your eyes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import semq_state as sq
from semq_state.cli.generating import Json
from semq_state.errors import SemqStateError

PROMPT = "Here is what I learned about keeping the memory of a language model:"
MODES: dict[str, list[str]] = {
    "greedy": ["--repetition-penalty", "1.1"],
    "sampling": ["--sample", "--temperature", "0.8", "--top-p", "0.95", "--repetition-penalty", "1.1"],
}
LENGTHS = (256, 1024, 4096)
_DEADLINE_S = 180


@dataclass(frozen=True)
class Kill:
    """One generation, killed and resumed.

    Args:
        mode: greedy or sampling.
        text_before: what the file on disk held after the kill.
        n_before: how many tokens that was, without the prompt.
        text_after: what the new process added.
        n_after: how many tokens that was.
        identical: whether all tokens equal the uninterrupted run's.
    """

    mode: str
    text_before: str
    n_before: int
    text_after: str
    n_after: int
    identical: bool


def demo(
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")] = "smollm2",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of the uninterrupted run.")] = 64,
    as_json: Json = False,
) -> None:
    """Generates, kills the process with SIGKILL, and goes on in a new one; then compares, and measures a
    restore against a new prefill. Exit code 1 where anything differs."""
    console = Console(stderr=as_json, highlight=False)
    _fetch(model, console)
    with tempfile.TemporaryDirectory(prefix="semq-state-demo-") as folder:
        kills = [_killed(mode, model, tokens, Path(folder), console) for mode in MODES]
        rows = _restores(model, Path(folder), console)
    if as_json:
        print(json.dumps({"kills": [asdict(kill) for kill in kills], "restores": rows}, indent=2))
    else:
        console.print(_table(rows))
    if not all(kill.identical for kill in kills) or not all(row["identical"] for row in rows):
        console.print("[bold red]Something differs.[/]")
        raise typer.Exit(1)


def _fetch(model: str, console: Console) -> None:
    from semq_state.cli.models import DEMO_MODEL, demo_model_folder

    if model == DEMO_MODEL:
        with console.status("getting the model ready (the first time it is converted once)"):
            demo_model_folder()


def _killed(mode: str, model: str, tokens: int, folder: Path, console: Console) -> Kill:
    """The three processes of one mode: one runs through, one is killed, one goes on."""
    file = folder / f"{mode}.safetensors"
    common = ["run", model, "--prompt", PROMPT, "--tokens", str(tokens), "--seed", "7", *MODES[mode]]
    console.rule(f"[bold]{mode}")
    with console.status("a process generates without interruption, to compare with"):
        whole = _answer(common)
    with console.status("a process generates, and keeps its state on disk"):
        victim = _start([*common, "--save", str(file), "--every", "4"])
        n_killed_at = _kill_half_way(victim, file, whole["prompt_length"] + tokens // 2)
    n_before = n_killed_at - whole["prompt_length"]
    text_before = _text(whole["tokens"][whole["prompt_length"] : n_killed_at], model)
    console.print(f"[dim]{PROMPT}[/]{text_before}", markup=True)
    console.print(f"[bold red]kill -9[/] process {victim.pid}; on disk: {file.stat().st_size / 1e6:.2f} MB")
    with console.status("a new process goes on from the file"):
        resumed = _answer(["resume", str(file), "--model", model])
    console.print(f"[green]{resumed['text']}[/]")
    identical = resumed["tokens"] == whole["tokens"]
    console.print(
        f"resumed after {n_before} tokens, {len(resumed['tokens']) - n_killed_at} more; "
        f"identical to the uninterrupted run: [bold]{_yes(identical)}[/]"
    )
    n_after = len(resumed["tokens"]) - n_killed_at
    return Kill(mode, text_before, n_before, resumed["text"], n_after, identical)


def _kill_half_way(process: subprocess.Popen[str], file: Path, n_tokens: int) -> int:
    """Kills the process as soon as its file holds `n_tokens`; returns how many it does hold."""
    deadline = time.monotonic() + _DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and sq.inspect(file).n_tokens >= n_tokens:
            break
        time.sleep(0.02)
    ended = process.poll()
    if hasattr(signal, "SIGKILL"):
        os.kill(process.pid, signal.SIGKILL)
    else:
        process.kill()
    _, words = process.communicate()
    if ended is not None or not file.exists():
        raise SemqStateError(
            "demo", expected="a process to kill", found=f"one that ended with {ended}: {words[-400:]}"
        )
    return sq.inspect(file).n_tokens


def _restores(model: str, folder: Path, console: Console) -> list[dict[str, Any]]:
    console.rule("[bold]restore against prefill")
    lengths = [str(length) for length in LENGTHS]
    with console.status("a process reads texts of 256, 1,024 and 4,096 tokens and saves its state after each"):
        filled = _answer([model, str(folder), *lengths], module="semq_state.cli.demo_prefill")
    with console.status("a new process restores them"):
        restored = _answer([model, str(folder), *lengths], module="semq_state.cli.demo_restore")
    return [
        {**before, **after, "identical": before["next_tokens"] == after["next_tokens"]}
        for before, after in zip(filled, restored, strict=True)
    ]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("tokens", "raw cache", "file", "smaller", "prefill", "load + restore", "faster", "same tokens")
    for row in rows:
        table.add_row(
            f"{row['n_tokens']:,}",
            f"{row['cache_bytes'] / 1e6:.1f} MB",
            f"{row['n_bytes'] / 1e6:.1f} MB",
            f"{row['cache_bytes'] / row['n_bytes']:.2f}x",
            f"{row['prefill_s']:.2f} s",
            f"{row['restore_s']:.3f} s",
            f"{row['prefill_s'] / row['restore_s']:.0f}x",
            _yes(row["identical"]),
        )
    return table


def _answer(arguments: Sequence[str], *, module: str = "") -> Any:
    """The JSON that a process of its own prints."""
    process = _start(arguments if module else [*arguments, "--json"], module=module)
    out, words = process.communicate(timeout=_DEADLINE_S)
    if process.returncode:
        raise SemqStateError(f"process {' '.join(arguments)[:80]}", found=words[-800:], do="see above")
    return json.loads(out)


def _start(arguments: Sequence[str], *, module: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module or "semq_state", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _text(tokens: Sequence[int], model: str) -> str:
    from semq_state.cli.models import load_tokenizer

    return str(load_tokenizer(model).decode(tokens, skip_special_tokens=True))


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"
