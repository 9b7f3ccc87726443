"""Rows as they are stored: norms, packed symbols, and the scales with which these are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import AbstractOperator, Floats
from semq_state.search.decoding import Bytes, Decoder
from semq_state.search.vectors import rows_of, unit_blocks

Stored = tuple[Floats, Bytes, Floats]
"""Norms `(n,)`, packed rows `(n, n_bytes)`, scales `(n,)`."""


class Table:
    """Rows of one operator, in the order in which they came.

    Args:
        operator: the rule.
    """

    def __init__(self, operator: AbstractOperator) -> None:
        self.decoder = Decoder(operator)
        empty = np.empty(0, np.float32)
        self._parts: list[Stored] = [(empty, np.empty((0, operator.n_bytes), np.uint8), empty)]

    def append(self, norms: Floats, packed: Bytes) -> None:
        self._parts.append((norms, packed, self.decoder.scales(packed)))

    def keep(self, kept: NDArray[np.bool_]) -> None:
        norms, packed, scales = self.stored()
        self._parts = [(norms[kept], packed[kept], scales[kept])]

    def stored(self) -> Stored:
        """All rows, in one piece from the first time that they are asked for."""
        if len(self._parts) > 1:
            norms, packed, scales = zip(*self._parts, strict=True)
            self._parts = [(np.concatenate(norms), np.concatenate(packed), np.concatenate(scales))]
        return self._parts[0]


def encoded(operator: AbstractOperator, vectors: object, where: str) -> tuple[Floats, Bytes]:
    """Norms and packed rows of vectors.

    Raises:
        UnsupportedOperationError: another shape or dtype, NaN, infinity or zeros in a row.
    """
    values = rows_of(vectors, operator.dim, where)
    norms, packed = np.empty(len(values), np.float32), np.empty((len(values), operator.n_bytes), np.uint8)
    for block, unit, lengths in unit_blocks(values, where, as_semq=True):
        norms[block] = lengths
        packed[block] = operator.pack(operator.symbols(unit))
    return norms, packed


def units(operator: AbstractOperator, vectors: object, where: str) -> Floats:
    """float32 `(n, dim)`: vectors over their norms; errors as for `encoded`."""
    values = rows_of(vectors, operator.dim, where)
    rows = np.empty(values.shape, np.float32)
    for block, unit, _ in unit_blocks(values, where, as_semq=False):
        rows[block] = unit
    return rows
