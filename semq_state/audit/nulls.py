"""Null runs: the same tokens computed again, with nothing changed that should matter."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch

from semq_state import content
from semq_state.audit.rerun import recomputed
from semq_state.errors import UnsupportedOperationError
from semq_state.generation.seams import base_model
from semq_state.restore.checks import check_model
from semq_state.snapshot import Snapshot

AXES = ("threads", "chunks", "batch", "attention")
"""What null runs can vary: torch's number of threads; the prompt in one piece or in chunks of some size; other rows
in the batch; the attention implementation."""

_ATTENTION = ("sdpa", "eager")
_SMALLEST_CHUNK = 16


def null_runs(
    snapshot: Snapshot, model: Any, n_runs: int, *, vary: Collection[str] = AXES[:3], seed: int = 0
) -> Iterator[tuple[str, Snapshot]]:
    """Computes a state's tokens again, each time under other circumstances; for `measure_floor`.

    Args:
        snapshot: the reference.
        model: the model that made it; its threads and attention implementation are put back after each run.
        n_runs: how many.
        vary: of `AXES`; each run draws from all of them.
        seed: of these draws.

    Yields:
        What was varied in words, and the state.

    Raises:
        ValueError: an unknown axis.
        ModelMismatchError: it is another model.
        UnsupportedOperationError: the state does not follow from its tokens alone, or they are too few.

    Example:
        >>> floor = sq.measure_floor(snapshot, (s for _, s in null_runs(snapshot, model, 20)))  # doctest: +SKIP
    """
    unknown = sorted(set(vary) - set(AXES))
    if unknown or isinstance(vary, str) or n_runs < 1:
        raise ValueError(f"`vary` takes names of {AXES} and `n_runs` at least 1, got {vary!r} and {n_runs}")
    with warnings.catch_warnings():
        # Other circumstances are what null runs are for; another model would not be a null run.
        warnings.simplefilter("ignore")
        check_model(snapshot, base_model(model), wrapper=model)
    drawn = random.Random(seed)  # noqa: S311 - circumstances, not secrets
    for _ in range(n_runs):
        yield _run(snapshot, model, drawn, vary)


def _run(snapshot: Snapshot, model: Any, drawn: random.Random, vary: Collection[str]) -> tuple[str, Snapshot]:
    words: list[str] = []
    options: dict[str, Any] = {}
    n_tokens = max(1, snapshot.generation.n_cached)
    with contextlib.ExitStack() as stack:
        if "threads" in vary:
            n_threads = drawn.randint(1, max(2, content.n_workers()))
            stack.enter_context(_threads(n_threads))
            words.append(f"{n_threads} threads")
        if "attention" in vary:
            name = drawn.choice(_ATTENTION)
            stack.enter_context(_attention(model, name))
            words.append(name)
        if "chunks" in vary:
            options["in_steps"] = False
            if drawn.random() < 0.8 and n_tokens > _SMALLEST_CHUNK:
                options["chunk"] = drawn.randint(_SMALLEST_CHUNK, n_tokens - 1)
            words.append(f"chunks of {options['chunk']}" if "chunk" in options else "in one piece")
        if "batch" in vary:
            n_rows = drawn.randint(0, 3)
            if n_rows:
                options["neighbours"] = _neighbours(snapshot, n_rows, drawn)
            words.append(f"{n_rows} neighbours")
        return ", ".join(words), recomputed(snapshot, model, **options)


def _neighbours(snapshot: Snapshot, n_rows: int, drawn: random.Random) -> torch.Tensor:
    """Other rows for the batch: the tokens of the first one, each time in another order."""
    tokens = snapshot.generation.input_ids[0]
    if len(tokens) < 2:
        raise UnsupportedOperationError("neighbours", expected="2 tokens or more", found=str(len(tokens)))
    orders = [drawn.sample(range(len(tokens)), len(tokens)) for _ in range(n_rows)]
    return tokens[torch.tensor(orders)]


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    inner = base_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(name)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
