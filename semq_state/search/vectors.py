"""The vectors of a caller as finite rows with norms, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import TINY, UNIT_TOLERANCE, Floats, blocks
from semq_state.errors import UnsupportedOperationError

Doubles = NDArray[np.float64]

_MAX = float(np.finfo(np.float32).max)


def rows_of(values: object, dim: int, where: str) -> NDArray[Any]:
    """A matrix `(n, dim)` of floats as float32, or float64 where it is that.

    Raises:
        UnsupportedOperationError: it is no array or tensor, not of floats, or of another shape.
    """
    if isinstance(values, torch.Tensor) and values.is_floating_point():
        values = values.detach().cpu()
        values = (values if values.dtype == torch.float64 else values.float()).numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        found = str(getattr(values, "dtype", type(values).__name__))
        raise _refused(where, "floats as a numpy array or tensor", found, "convert the vectors")
    if values.ndim != 2 or values.shape[1] != dim:
        raise _refused(
            where, f"shape (n, {dim})", f"{values.shape}", "give one vector a row, of the index's own dim"
        )
    return values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32, copy=False)


def unit_blocks(rows: NDArray[Any], where: str, *, as_semq: bool) -> Iterator[tuple[slice, Floats, Floats]]:
    """The rows over their norms, a few at a time: the slice, the directions `(m, dim)`, the norms `(m,)`.

    Args:
        as_semq: whether rows that SEMQ takes for unit rows are left as they are, with a norm of 1.

    Raises:
        UnsupportedOperationError: a row has NaN or infinity, or a norm outside float32's normal range.
    """
    for block in blocks(rows):
        values = rows[block].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = sums(values * values)
            norms = np.sqrt(squares)
        usable = (norms >= TINY) & (norms <= _MAX)
        if not usable.all():
            _refuse(values, norms, int(np.argmin(usable)), block.start, where)
        if as_semq:
            norms[np.abs(squares - 1) <= UNIT_TOLERANCE] = 1
        values /= norms[:, None]
        yield block, values.astype(np.float32), norms.astype(np.float32)


def sums(values: Doubles) -> Doubles:
    """The sum of each row `(n, dim)`, halves added to halves: one order of additions, so one result everywhere."""
    width = values.shape[1]
    while width > 1:
        half = -(-width // 2)
        upper, values = values[:, half:width], values[:, :half].copy()
        values[:, : width - half] += upper
        width = half
    return values[:, 0]


def _refuse(values: Doubles, norms: Doubles, row: int, start: int, where: str) -> None:
    finite = bool(np.isfinite(values[row]).all())
    raise _refused(
        f"{where}, row {start + row}",
        "a norm in float32's normal range" if finite else "finite values",
        f"a norm of {norms[row]:.6g}" if finite else "NaN or infinity",
        "leave the vector out: it has no direction"
        if finite and norms[row] < 1
        else "remove or replace the vector",
    )


def _refused(where: str, expected: str, found: str, do: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(where, expected=expected, found=found, do=do)
