"""How the hidden states of two sources differ, site by site: a block of rows at a time, on all cores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semq_state.audit.cells import Rule, n_units, natural, ratio, ratios
from semq_state.audit.report import HIDDEN, CellDiff, PerToken
from semq_state.audit.rows import At, Rows, paired, row_id
from semq_state.audit.vectors import (
    MOST_STEPS,
    Doubles,
    Flags,
    Integers,
    Measured,
    measure,
    row_squares,
)
from semq_state.errors import Difference
from semq_state.files.pipeline import in_order

VALUES = 1 << 19
"""Numbers of each side that are read at a time, by each core."""

MAX_POSITIONS = 1 << 20
"""Longer documents have no numbers for each position: these would have to be held in memory."""

_LAYER = re.compile(r"hidden_states\.(\d{1,9})")


@dataclass(frozen=True, eq=False)
class RowsFound:
    """What comparing two sources gave.

    Args:
        cells: one for each site of both, in the order of layers.
        missing: sites of one alone, and sites without a row in common, to why.
        structure: sites whose dtypes differ.
        others: what else differs, to how.
    """

    cells: tuple[CellDiff, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    structure: tuple[Difference, ...] = ()
    others: dict[str, str] = field(default_factory=dict)


def compare_rows(
    where: str, a: Rows, b: Rows, rule: Rule, advance: Callable[[int], None] = lambda n_bytes: None
) -> RowsFound:
    """Compares two sources at the rows that both have. Whatever their size, a few blocks are in memory at a time.

    Args:
        where: what the cells are called by, `hidden.sequence`.
        a: the first; relative errors are taken by it.
        b: the second, whose sites have the dims of the first's.
        rule: by what vectors are compared; its threshold is of one row.
        advance: called with the bytes of the first side as they have been compared.
    """
    names = [*sorted(a.sites, key=natural), *sorted((n for n in b.sites if n not in a.sites), key=natural)]
    both = [name for name in names if name in a.sites and name in b.sites]
    missing = {f"{where}.{n}": f"only in {'a' if n in a.sites else 'b'}" for n in names if n not in both}
    structure = tuple(_dtypes(where, both, a, b))
    if a.pool != b.pool:
        # A row for a whole document and one for its first token have the same id.
        words = f"{_pooled(a)} in a, {_pooled(b)} in b"
        return RowsFound((), missing | {f"{where}.{name}": words for name in both}, structure)
    totals = _totals(both, a, b, rule, advance)
    cells = tuple(totals[name].cell(where, name, a, b) for name in both)
    for cell in cells:
        if not cell.n_vectors and (cell.n_only_a or cell.n_only_b):
            missing[cell.key] = f"no row in common: {len(a)} in a, {len(b)} in b"
    return RowsFound(cells, missing, structure)


def _totals(
    names: Sequence[str], a: Rows, b: Rows, rule: Rule, advance: Callable[[int], None]
) -> dict[str, _Totals]:
    totals = {name: _Totals(n_units(a.sites[name].shape[-1]), rule, has_tokens=not a.pool) for name in names}
    for block, found in in_order(lambda block: _measured(block, a, b, rule), _blocks(names, a, b)):
        totals[block.name].add(block, a, found)
        advance(found.n_vectors * a.sites[block.name].shape[-1] * a.sites[block.name].dtype.itemsize)
    # Equal blocks were passed over quickly. Where others differ their norms are needed after all.
    parted = [name for name in names if totals[name].n_bits_changed]
    again = (block for block in _blocks(parted, a, b) if block.number in totals[block.name].passed_over)
    for block, squares in in_order(lambda block: row_squares(a.sites[block.name][block.a]), again):
        totals[block.name].add_squares(a.places(block.a), squares)
    return totals


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows of one site: the number of the block, and the numbers of its rows on each side."""

    name: str
    number: int
    a: At
    b: At


def _blocks(names: Sequence[str], a: Rows, b: Rows) -> Iterator[_Block]:
    """All sites of some rows before the next ones: a shard that has to be decoded has them all."""
    step = max(1, VALUES // max([1, *(a.sites[name].shape[-1] for name in names)]))
    for number, (x, y) in enumerate(paired(a, b, step) if names else ()):
        for name in names:
            yield _Block(name, number, x, y)


def _measured(block: _Block, a: Rows, b: Rows, rule: Rule) -> Measured:
    return measure(a.sites[block.name][block.a], b.sites[block.name][block.b], 0, rule.bins, rule.c)


class _Totals:
    """Sums over the blocks of one site, which come in order; so they do not depend on the number of threads."""

    def __init__(self, n_units: int, rule: Rule, *, has_tokens: bool) -> None:
        self._rule, self._n_units = rule, n_units
        self._n_vectors = self.n_bits_changed = self._n_not_finite = self._hamming = 0
        self._distances, self._norm_steps = _Histogram(n_units), _Histogram(MOST_STEPS)
        self._squares, self._errors, self._max_abs = 0.0, 0.0, 0.0
        self._lost_cosine, self._min_cosine = 0.0, 1.0
        self._first_row: tuple[int, int] | None = None
        self._first_place: int | None = None
        self._positions = _Positions() if has_tokens else None
        self.passed_over: set[int] = set()

    def add(self, block: _Block, rows: Rows, found: Measured) -> None:
        places = rows.places(block.a)
        self._n_vectors += len(places)
        if self._positions:
            self._positions.count(places)
        if found.same:
            self.passed_over.add(block.number)
            return
        self.n_bits_changed += found.n_bits_changed
        self._n_not_finite += found.n_not_finite
        self._hamming += int(found.hamming.sum())
        self._distances.add(found.distances)
        self._norm_steps.add(found.norm_steps)
        self._errors += float(found.errors.sum())
        self._max_abs = max(self._max_abs, float(found.max_abs.max(initial=0.0)))
        self._lost_cosine += found.n_vectors - found.sum_cosine
        self._min_cosine = min(self._min_cosine, found.min_cosine)
        if self._positions:
            self._positions.add(places, found)
        self.add_squares(places, found.squares)
        beyond = self._beyond(found)
        if beyond.any():
            self._first_row = self._first_row or row_id(rows.ids[block.a][int(beyond.argmax())])
            place = int(places[beyond].min())
            self._first_place = place if self._first_place is None else min(self._first_place, place)

    def add_squares(self, places: Integers, squares: Doubles) -> None:
        self._squares += float(squares.sum())
        if self._positions:
            self._positions.add_squares(places, squares)

    def cell(self, where: str, name: str, a: Rows, b: Rows) -> CellDiff:
        n = self._n_vectors
        layer = _LAYER.fullmatch(name)
        return CellDiff(
            where=where,
            name=name,
            kind=HIDDEN,
            layer=int(layer[1]) if layer else None,
            of_sequence=a.of_sequence,
            n_units=self._n_units,
            n_vectors=n,
            n_only_a=len(a) - n,
            n_only_b=len(b) - n,
            n_bits_changed=self.n_bits_changed,
            n_changed=self._distances.n,
            n_not_finite=self._n_not_finite,
            hamming=self._hamming,
            p99=self._distances.percentile(),
            p99_norm=self._norm_steps.percentile(),
            min_cosine=self._min_cosine,
            mean_cosine=1.0 - self._lost_cosine / n if n else 1.0,
            relative=ratio(self._errors, self._squares),
            max_abs=self._max_abs,
            beyond=self._first_row is not None,
            first_token=self._first_place if self._positions else None,
            per_token=self._positions.per_token() if self._positions else None,
            first_row=self._first_row,
        )

    def _beyond(self, found: Measured) -> Flags:
        if not self._rule.threshold:
            return found.bits_changed > 0
        beyond: Flags = ratios(found.errors, found.squares) > self._rule.threshold
        return beyond


class _Histogram:
    """Counts of small numbers, for percentiles over any number of them."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._counts: Integers = np.zeros(0, np.int64)
        self.n = 0

    def add(self, values: Integers) -> None:
        if len(values):
            counts = np.bincount(values, minlength=len(self._counts))
            assert len(counts) <= self._largest + 1
            counts[: len(self._counts)] += self._counts
            self._counts, self.n = counts, self.n + len(values)

    def percentile(self) -> int:
        """As `cells.percentile`."""
        return int(np.searchsorted(self._counts.cumsum(), self.n - self.n // 100)) if self.n else 0


class _Positions:
    """Sums at each position over all documents; forgotten where there are too many positions."""

    def __init__(self) -> None:
        self._is_short = True
        self._sums: dict[str, Any] = {
            name: np.zeros(0, np.int64 if name in ("n", "hamming") else np.float64)
            for name in ("n", "hamming", "squares", "errors", "max_abs")
        }

    def count(self, places: Integers) -> None:
        top = int(places.max(initial=-1)) + 1
        if top > MAX_POSITIONS:
            self._is_short, self._sums = False, {}
        if not self._is_short:
            return
        if top > len(self._sums["n"]):
            size = min(MAX_POSITIONS, 2 * top)
            self._sums = {name: np.pad(x, (0, size - len(x))) for name, x in self._sums.items()}
        np.add.at(self._sums["n"], places, 1)

    def add(self, places: Integers, found: Measured) -> None:
        if self._is_short:
            np.add.at(self._sums["hamming"], places, found.hamming)
            np.add.at(self._sums["errors"], places, found.errors)
            np.maximum.at(self._sums["max_abs"], places, found.max_abs)

    def add_squares(self, places: Integers, squares: Doubles) -> None:
        if self._is_short:
            np.add.at(self._sums["squares"], places, squares)

    def per_token(self) -> PerToken | None:
        if not self._is_short:
            return None
        held = np.flatnonzero(self._sums["n"])
        span = slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0, 0)
        n, hamming, squares, errors, max_abs = (self._sums[name][span] for name in self._sums)
        relative = ratios(errors, squares)
        # Positions at which no document has a row in both are not equal, but absent.
        relative[n == 0], max_abs[n == 0] = np.nan, np.nan
        return PerToken(span.start, hamming, relative, max_abs, n)


def _dtypes(where: str, names: Sequence[str], a: Rows, b: Rows) -> Iterator[Difference]:
    for name in names:
        ours, theirs = (str(each.sites[name].dtype).removeprefix("torch.") for each in (a, b))
        if ours != theirs and len(a) and len(b):
            yield Difference(f"{where}.{name}.dtype", ours, theirs)


def _pooled(rows: Rows) -> str:
    return f"pooled ({rows.pool})" if rows.pool else "a row for each token"
