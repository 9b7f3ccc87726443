"""States outlive the process that made them, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workers import smollm2, tiny
from workers.outcome import assert_same

import semq_state as sq

# A server that has imported everything once forks each process in milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "transformers.models.gemma3.modeling_gemma3",
        "transformers.generation.utils",
        "semq_state.capture.recorder",
        "semq_state.restore.continuation",
    ]
)


def start(target: Callable[..., None], *args: Any) -> tuple[BaseProcess, Any]:
    """A process that has come to its run, and the pipe in which it says when it is done."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=target, args=(theirs, *args))
    process.start()
    theirs.close()
    assert ours.poll(60) and ours.recv() == "begins"
    return process, ours


def finish(target: Callable[..., None], *args: Any) -> None:
    process = FORKS.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def is_done(pipe: Any) -> bool:
    try:
        return bool(pipe.poll(0) and pipe.recv() == "done")
    except EOFError:
        return False


def duration(path: Path, every: int) -> float:
    """How long the whole run takes."""
    process, pipe = start(tiny.autosaving, path, every)
    began = time.perf_counter()
    assert pipe.poll(120) and pipe.recv() == "done"
    process.join(60)
    path.unlink()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of the tiny model, in a process of its own."""
    out = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    finish(tiny.uninterrupted, out)
    return out


@pytest.mark.parametrize(("every", "n_kills", "n_states"), [(1, 14, 4), (4, 8, 2), (20, 5, 1)])
def test_a_killed_run_goes_on(every: int, n_kills: int, n_states: int, reference: Path, tmp_path: Path) -> None:
    path, chance, seen, n_partial = tmp_path / "state.safetensors", random.Random(every), set(), 0
    whole = duration(path, every)
    for kill in range(n_kills):
        process, pipe = start(tiny.autosaving, path, every)
        time.sleep(chance.uniform(0, whole))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL or is_done(pipe)
        left = list(tmp_path.glob(".*.partial"))
        n_partial += len(left)
        assert len(left) <= 1
        if not path.exists():
            continue
        assert sq.verify(path).passed
        snapshot = sq.load(path)
        seen.add(snapshot.n_new_tokens)
        if snapshot.n_new_tokens < tiny.N_TOKENS:
            out = tmp_path / f"{kill}.outcome"
            finish(tiny.resumed, path, out)
            assert_same(out, reference)
    assert len(seen) >= n_states
    assert every > 1 or n_partial


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(reference: Path, tmp_path: Path) -> None:
    path, chance = tmp_path / "state.safetensors", random.Random(0)
    whole, lengths = duration(path, 1), [0]
    for _ in range(5):
        process, _ = start(tiny.going_on, path, 1)
        time.sleep(chance.uniform(0.05, 0.15) * whole)
        process.kill()
        process.join(60)
        lengths.append(sq.inspect(path).n_tokens if path.exists() else 0)
        assert len(list(tmp_path.glob(".*.partial"))) <= 1
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    process, pipe = start(tiny.going_on, path, 1)
    assert pipe.poll(60) and pipe.recv() == "done"
    process.join(60)
    assert torch.equal(sq.load(path).generation.input_ids, load_file(reference)["sequences"])
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("n_tokens", [2, 15, 40])
def test_an_interrupt_from_the_keyboard_saves_the_last_token(
    n_tokens: int, reference: Path, tmp_path: Path
) -> None:
    path, counted, out = tmp_path / "state.safetensors", tmp_path / "n", tmp_path / "outcome"
    counted.touch()
    process, pipe = start(tiny.autosaving, path, 1000, counted)
    while int(counted.read_text() or 0) < n_tokens:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1 and not is_done(pipe)
    n = sq.load(path).n_new_tokens
    assert n_tokens <= n < tiny.N_TOKENS and n - int(counted.read_text()) in (0, 1)
    finish(tiny.resumed, path, out)
    assert_same(out, reference)


@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_a_fresh_process_goes_on_with_the_demo_model(tmp_path: Path) -> None:
    threads = "1"
    for what in ("reference", "capture", "resume"):
        command = [sys.executable, "-W", "error", "-m", "workers.smollm2", what, str(tmp_path), threads]
        subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=240)
    for name in smollm2.CASES:
        state = sq.load(tmp_path / f"{name}.state.safetensors")
        assert state.n_new_tokens == smollm2.N_BEFORE
        assert_same(tmp_path / f"{name}.resumed.safetensors", tmp_path / f"{name}.reference.safetensors")
