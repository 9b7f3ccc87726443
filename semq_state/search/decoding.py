"""Packed rows to float32, by a table of bytes where no symbol lies across two of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import AbstractOperator, Floats, blocks

Bytes = NDArray[np.uint8]

_ITEMS = {1: np.uint32, 2: np.uint64, 4: np.complex128}
"""A type as wide as so many float32, which are then copied as one."""


class Decoder:
    """What the packed rows of one operator stand for.

    Args:
        operator: the rule.
    """

    def __init__(self, operator: AbstractOperator) -> None:
        self.operator = operator
        self._table = _byte_table(operator)

    def __call__(self, packed: Bytes) -> Floats:
        """float32 `(n, dim)`, not normalised, of canonical rows `(n, n_bytes)`."""
        if self._table is None:
            return self.operator.decode(self.operator.unpack(packed))
        items = np.empty(packed.shape, self._table.dtype)
        self._table.take(packed, out=items, mode="clip")
        return items.view(np.float32).reshape(len(packed), -1)[:, : self.operator.dim]

    def scales(self, packed: Bytes) -> Floats:
        """`(n,)`: what brings each decoded row to norm 1; 0 for rows of which nothing is left."""
        scales = np.empty(len(packed), np.float32)
        for block in blocks(packed):
            decoded = self(packed[block])
            lengths = np.sqrt(np.einsum("ij,ij->i", decoded, decoded, dtype=np.float64))
            scales[block] = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return scales


def _byte_table(operator: AbstractOperator) -> NDArray[Any] | None:
    """The float32 values of each byte as one item, `(256,)`."""
    n_bits = operator.n_bits
    if 8 % n_bits:
        return None
    values = np.zeros((1 << n_bits, operator.dim // operator.n_units), np.float32)
    values[: operator.n_symbols] = operator.representatives()
    of_byte = np.arange(256)[:, None] >> np.arange(0, 8, n_bits) & (1 << n_bits) - 1
    table = np.ascontiguousarray(values[of_byte].reshape(256, -1))
    return table.view(_ITEMS[table.shape[1]])[:, 0]
