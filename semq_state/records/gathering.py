"""Rows by their numbers, from whichever shards they stand in; each shard is opened once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.content import DTYPES
from semq_state.records.layout import Ints
from semq_state.records.shards import Bits, Shards, floats_of


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a record, in any order.

    Args:
        rows: the id of each row, (document, position), `(n, 2)` int64.
        token_ids: the token at which each row stands, `(n,)` int64; -1 where it is pooled or has no id.
        states: the name of each site to its states, `(n, dim)`.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    states: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_bytes(self) -> int:
        """Raw size of the states."""
        return sum(t.numel() * t.element_size() for t in self.states.values())


@dataclass(frozen=True, eq=False)
class Gathered:
    """Rows that were copied out of shards, states still as integers."""

    rows: Ints
    token_ids: Ints
    states: dict[str, Bits]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Ints | slice) -> Gathered:
        return Gathered(self.rows[at], self.token_ids[at], {name: b[at] for name, b in self.states.items()})

    def block(self, dtypes: dict[str, str]) -> Block:
        return Block(
            torch.from_numpy(np.ascontiguousarray(self.rows, np.int64)),
            torch.from_numpy(np.ascontiguousarray(self.token_ids, np.int64)),
            {name: floats_of(bits, dtypes[name]) for name, bits in self.states.items()},
        )


def empty(shards: Shards, n: int, sites: tuple[str, ...]) -> Gathered:
    """Room for `n` rows."""
    return Gathered(
        np.empty((n, 2), np.int64),
        np.empty(n, np.int64),
        {name: _room(shards, n, name) for name in sites},
    )


def copy_span(shards: Shards, span: tuple[int, int], into: Gathered, at: int) -> int:
    """Copies rows `start` to `stop`, of one or more shards, to `into` from row `at`; gives the next row."""
    for number, local, n in pieces(shards, *span):
        opened = shards.opened(number)
        into.rows[at : at + n] = opened.rows[local]
        into.token_ids[at : at + n] = opened.token_ids[local]
        for name, room in into.states.items():
            room[at : at + n] = opened.states[name][local]
        at += n
    return at


def pieces(shards: Shards, start: int, stop: int) -> Iterator[tuple[int, slice, int]]:
    """The shards that rows `start` to `stop` stand in: number, rows in it, how many."""
    number = int(np.searchsorted(shards.starts, start, "right")) - 1
    while start < stop:
        first, end = int(shards.starts[number]), min(stop, int(shards.starts[number + 1]))
        yield number, slice(start - first, end - first), end - start
        start, number = end, number + 1


def span_of(shards: Shards, site: str, start: int, stop: int) -> torch.Tensor:
    """States of rows `start` to `stop`, in order: `(stop - start, dim)`."""
    held = [number for number, _, _ in pieces(shards, start, stop)]
    shards.prove(range(held[0], held[-1] + 1) if held else range(0))
    room, at = _room(shards, stop - start, site), 0
    for number, local, n in pieces(shards, start, stop):
        room[at : at + n] = shards.opened(number).states[site][local]
        at += n
    return floats_of(room, shards.spec(site).dtype)


def states_at(shards: Shards, site: str, numbers: Ints) -> torch.Tensor:
    """States of rows by number, in the order asked: `(n, dim)`."""
    room = _room(shards, len(numbers), site)
    for number, at, local in by_shard(shards, numbers):
        room[at] = shards.opened(number).states[site][local]
    return floats_of(room, shards.spec(site).dtype)


def rows_at(shards: Shards, sites: tuple[str, ...], numbers: Ints) -> Gathered:
    """All of rows by number, in the order asked."""
    found = empty(shards, len(numbers), sites)
    for number, at, local in by_shard(shards, numbers):
        opened = shards.opened(number)
        found.rows[at], found.token_ids[at] = opened.rows[local], opened.token_ids[local]
        for name, room in found.states.items():
            room[at] = opened.states[name][local]
    return found


def by_shard(shards: Shards, numbers: Ints) -> Iterator[tuple[int, NDArray[np.intp], Ints]]:
    """The shards of rows: number, which of the rows asked for stand in it, and where."""
    if not len(numbers):
        return
    of = np.searchsorted(shards.starts, numbers, "right") - 1
    order = np.argsort(of, kind="stable")
    cuts = np.flatnonzero(np.diff(of[order])) + 1
    for at in np.split(order, cuts):
        number = int(of[at[0]])
        yield number, at, numbers[at] - shards.starts[number]


def dtypes_of(shards: Shards, sites: tuple[str, ...]) -> dict[str, str]:
    return {name: shards.spec(name).dtype for name in sites}


def _room(shards: Shards, n: int, site: str) -> NDArray[Any]:
    spec = shards.spec(site)
    return np.empty((n, *spec.shape), f"i{DTYPES[spec.dtype].itemsize}")
