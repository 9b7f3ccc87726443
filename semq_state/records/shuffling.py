"""In which order rows are read: in order, or each once in an order drawn from a seed, in bounded memory.

Drawing rows one by one would read a page of the disk for each. Plain shards are cut into runs of neighbouring rows,
which are drawn from everywhere; a few blocks' worth of runs make a pool, and rows are drawn from the pool. Coded
shards are decoded whole, so there a run is a shard, and a few of them make a pool.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from semq_state.records.gathering import Block, Gathered, copy_span, dtypes_of, empty
from semq_state.records.layout import Ints
from semq_state.records.shards import Shards

RUN_ROWS = 256
"""Neighbouring rows of a plain shard that are drawn together."""

POOL_BLOCKS = 4
"""Blocks' worth of runs in a pool, at least."""

POOL_SHARDS = 4
"""Coded shards in a pool."""

Span = tuple[int, int]
"""Rows `start` to `stop`."""


def ordered(shards: Shards, size: int, sites: tuple[str, ...]) -> Iterator[Block]:
    """All rows in order, `size` at a time."""
    for start in range(0, shards.n_rows, size):
        stop = min(start + size, shards.n_rows)
        _prove(shards, start, stop)
        into = empty(shards, stop - start, sites)
        copy_span(shards, (start, stop), into, 0)
        yield into.block(dtypes_of(shards, sites))


def shuffled(shards: Shards, size: int, sites: tuple[str, ...], seed: int) -> Iterator[Block]:
    """All rows, each once, in an order that depends on rows per shard, `size` and `seed` alone."""
    chance = np.random.Generator(np.random.PCG64(seed))
    shards.prove(range(len(shards)))
    dtypes = dtypes_of(shards, sites) if len(shards) else {}
    left: Gathered | None = None
    for spans in _pools(shards, size, chance):
        n_left = len(left) if left is not None else 0
        pool = empty(shards, n_left + sum(stop - start for start, stop in spans), sites)
        if left is not None:
            _put(left, pool)
        at = n_left
        for span in spans:
            at = copy_span(shards, span, pool, at)
        order = chance.permutation(len(pool))
        n_whole = len(pool) - len(pool) % size
        for start in range(0, n_whole, size):
            yield pool.take(order[start : start + size]).block(dtypes)
        left = pool.take(order[n_whole:])
    if left is not None and len(left):
        yield left.block(dtypes)


def runs_of(starts: Ints, n_rows: int) -> Ints:
    """Runs of up to `n_rows` rows, none across two shards: `(n, 2)`, start and stop."""
    bounds = list(itertools.pairwise(starts.tolist()))
    begins = [np.arange(start, stop, n_rows) for start, stop in bounds]
    ends = [np.minimum(begin + n_rows, stop) for begin, (_, stop) in zip(begins, bounds, strict=True)]
    return np.stack([np.concatenate(begins), np.concatenate(ends)], 1) if begins else np.empty((0, 2), np.int64)


def _pools(shards: Shards, size: int, chance: np.random.Generator) -> Iterator[Sequence[Span]]:
    """The spans of each pool."""
    if not len(shards):
        return
    mapped = shards.is_mapped(0)
    runs = runs_of(shards.starts, RUN_ROWS) if mapped else np.stack([shards.starts[:-1], shards.starts[1:]], 1)
    pool: list[Span] = []
    n_pooled = 0
    for number in chance.permutation(len(runs)):
        pool.append((int(runs[number, 0]), int(runs[number, 1])))
        n_pooled += pool[-1][1] - pool[-1][0]
        if (n_pooled >= POOL_BLOCKS * size) if mapped else (len(pool) == POOL_SHARDS):
            yield pool
            pool, n_pooled = [], 0
    if pool:
        yield pool


def _prove(shards: Shards, start: int, stop: int) -> None:
    first, last = np.searchsorted(shards.starts, [start, stop - 1], "right") - 1
    shards.prove(range(int(first), int(last) + 1))


def _put(left: Gathered, into: Gathered) -> None:
    n = len(left)
    into.rows[:n], into.token_ids[:n] = left.rows, left.token_ids
    for name, bits in left.states.items():
        into.states[name][:n] = bits
