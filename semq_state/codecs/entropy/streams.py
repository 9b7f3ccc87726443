"""Where a tensor of symbols is cut, so that every stream holds symbols of nearly one distribution.

Rows (axis -2) come sorted by spread, or all alike. A stream pays for its own table, and a mixed stream for being
mixed; dynamic programming over some 200 candidate cuts finds those that are cheapest together. For spreads that
fall geometrically that comes out at about three streams an octave, and at one stream for rows that are alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_STREAM_BITS = 500.0  # what one more stream costs: its table, its line in the manifest, its time
_CUTS = 96  # candidates by equal shares of symbols, and as many by equal shares of bits
_LONGEST_UNIT = 1 << 18


def cuts(symbols: Symbols, row: int) -> list[int]:
    """Bounds of the streams, from 0 to the number of symbols.

    Args:
        symbols: flat, at least one.
        row: symbols in a row. Longer rows than 2¹⁸ may be cut inside.
    """
    unit = row if 0 < row <= _LONGEST_UNIT else _LONGEST_UNIT
    ends = np.append(np.arange(unit, len(symbols), unit), len(symbols)).astype(np.int64)
    sums = np.concatenate([[0.0], np.cumsum(_magnitudes(symbols, unit))])
    counts = np.concatenate([[0], ends])
    edges = _candidates(counts, sums)
    counts, sums = counts[edges], sums[edges]
    n = (counts[None, :] - counts[:, None]).astype(np.float64)
    total = sums[None, :] - sums[:, None]
    cost = np.full(n.shape, np.inf)
    ahead = n > 0
    cost[ahead] = n[ahead] * entropy(total[ahead] / n[ahead]) + _STREAM_BITS
    return [int(counts[i]) for i in _cheapest_path(cost)]


def entropy(mean: _Floats) -> _Floats:
    """Bits per symbol of the two-sided geometric distribution whose mean magnitude is `mean`.

    P(q) = P(0)·θ^|q| with P(0) = (1 - θ)/(1 + θ) has the mean magnitude 2θ/(1 - θ²).
    """
    mean = np.maximum(mean, 1e-12)
    theta = mean / (1 + np.sqrt(1 + mean * mean))
    bits: _Floats = np.log2((1 + theta) / (1 - theta)) - mean * np.log2(theta)
    return bits


def _magnitudes(symbols: Symbols, unit: int) -> _Floats:
    """The sum of |q| over each unit."""
    unsigned = np.abs(symbols).view(f"u{symbols.itemsize}")  # so -32768 is 32768
    whole = len(symbols) // unit * unit
    sums = unsigned[:whole].reshape(-1, unit).sum(axis=1, dtype=np.uint64)
    rest = [unsigned[whole:].sum(dtype=np.uint64)] if whole < len(symbols) else []
    return np.append(sums, rest).astype(np.float64)


def _candidates(counts: _Ints, sums: _Floats) -> _Ints:
    """Indices of the bounds between which streams are sought: close where there are many symbols or many bits."""
    n_units = len(counts) - 1
    if n_units <= 2 * _CUTS:
        return np.arange(n_units + 1)
    n = np.diff(counts)
    bits = np.concatenate([[0.0], np.cumsum(n * entropy(np.diff(sums) / n))])
    by_bits = np.searchsorted(bits, np.linspace(0, bits[-1], _CUTS))
    by_count = np.linspace(0, n_units, _CUTS).astype(np.int64)
    return np.unique(np.concatenate([by_bits, by_count, [0, n_units]]))


def _cheapest_path(cost: _Floats) -> list[int]:
    """The nodes from the first to the last whose steps cost least together; `cost[i, j]` is that of i to j."""
    last = len(cost) - 1
    best, came_from = np.zeros(last + 1), np.zeros(last + 1, np.int64)
    for j in range(1, last + 1):
        through = best[:j] + cost[:j, j]
        came_from[j] = through.argmin()
        best[j] = through[came_from[j]]
    path = [last]
    while path[-1]:
        path.append(int(came_from[path[-1]]))
    return path[::-1]
