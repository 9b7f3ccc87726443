"""A diff as grids of layer by token, ready to be drawn: `heatmap_png.py` and `heatmap_html.py` do so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semq_state.audit.report import HIDDEN, CellDiff, Diff
from semq_state.errors import UnsupportedOperationError

MAX_COLUMNS = 1000
"""More tokens than these share columns, which then show the worst of theirs."""

METRICS = {"relative": "relative error", "share": "symbols changed", "max_abs": "largest absolute error"}
"""What can be drawn, and how it is named."""

STOPS = ("#fcf1bd", "#fed395", "#fd9668", "#f1605d", "#c83e73", "#982d80", "#641a80", "#331067", "#0b0724")
"""Colours of small to large differences, evenly spaced on a logarithmic scale."""

EQUAL, ABSENT, INFINITE = "#e9ecef", "#ffffff", "#00b4d8"
"""Colours of equal vectors, of positions that one side lacks, and of NaN or infinity."""

_LEAST = math.sqrt(10)  # of the colour scale to each side of its middle

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind of state: rows are layers, columns are tokens or a few of them.

    Args:
        name: `keys`, or with the part of the cache before it, `self.keys`; of hidden states `hidden.sequence`.
        layers: number of each row's layer.
        start: absolute position of the first token.
        stop: position behind the last.
        width: tokens of a column.
        values: metric to `(layers, columns)`: 0 for equal, NaN where a side has no token, infinite for NaN.
    """

    name: str
    layers: tuple[int, ...]
    start: int
    stop: int
    width: int
    values: dict[str, Doubles]


def panels_of(report: Diff) -> list[Panel]:
    """Every kind of state that has tokens.

    Raises:
        UnsupportedOperationError: none has.
    """
    groups: dict[str, list[CellDiff]] = {}
    for cell in report.cells:
        if cell.per_token is not None and len(cell.per_token.hamming) and cell.layer is not None:
            groups.setdefault(_group(cell), []).append(cell)
    if not groups:
        raise UnsupportedOperationError(
            "heat map", expected="states with tokens in common", found="none", do="read the table instead"
        )
    return [_panel(name, cells) for name, cells in groups.items()]


def scale_of(values: Iterable[Doubles]) -> tuple[float, float]:
    """Bounds of a logarithmic colour scale: all but the smallest and largest few differences, a decade at least."""
    found = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values])
    if not len(found):
        return 1e-3, 1.0
    low, high = (float(x) for x in np.quantile(found, (0.02, 0.998), method="nearest"))
    middle = math.sqrt(low * high)
    return min(low, middle / _LEAST), max(high, middle * _LEAST)


def heading(report: Diff) -> str:
    """What the picture shows, in one line."""
    if report.equal:
        return "equal, bit for bit"
    said = []
    if report.tokens.earliest is not None:
        said.append(f"tokens part at {report.tokens.earliest}")
    if report.first_cell is not None:
        since = "" if report.first_token is None else f" from token {report.first_token} on"
        said.append(f"states differ{since}, lowest in {report.first_cell.key}")
    return "; ".join(said) or "no layer differs beyond the threshold"


def _group(cell: CellDiff) -> str:
    if cell.kind == HIDDEN:
        return cell.where
    prefix = cell.where.removesuffix(f"layers.{cell.layer}")
    return prefix.removeprefix("generation.companions.") + cell.name


def _panel(name: str, cells: list[CellDiff]) -> Panel:
    spans = [(x.per_token.start, x.per_token.start + len(x.per_token.hamming)) for x in cells if x.per_token]
    start, stop = min(first for first, _ in spans), max(last for _, last in spans)
    width = -(-(stop - start) // MAX_COLUMNS)
    n_columns = -(-(stop - start) // width)
    values = {metric: np.full((len(cells), n_columns), np.nan) for metric in METRICS}
    for row, cell in enumerate(cells):
        numbers = cell.per_token
        assert numbers is not None
        n = len(numbers.hamming)
        n_each = cell.n_vectors // n if numbers.n_vectors is None else numbers.n_vectors
        with np.errstate(invalid="ignore"):
            share = numbers.hamming / (n_each * cell.n_units)
        found = {
            "relative": numbers.relative,
            "share": share,
            "max_abs": numbers.max_abs,
        }
        at = numbers.start - start
        for metric, each in found.items():
            padded = np.full(n_columns * width, np.nan)
            padded[at : at + n] = each
            # fmax passes over the positions that are not there.
            values[metric][row] = np.fmax.reduce(padded.reshape(n_columns, width), axis=1)
    return Panel(name, tuple(cell.layer or 0 for cell in cells), start, stop, width, values)
