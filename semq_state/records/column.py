"""One site of a record as a matrix that is read where it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.content import DTYPES
from semq_state.errors import UnsupportedOperationError
from semq_state.records.gathering import span_of, states_at
from semq_state.records.layout import Ints
from semq_state.records.shards import Shards

RowNumbers = int | slice | Sequence[int] | NDArray[Any] | torch.Tensor


@final
class Column:
    """States of one site, `(n_rows, dim)`, read where they are asked: never more shards than the rows stand in.

    What it gives are copies; plain shards are read in place and their digests not compared (`Record.verify` does),
    coded ones are decoded and checked whole.

    Args:
        shards: the record's shards.
        site: the site.

    Example:
        >>> record["hidden_states.12"][:1000].mean(0)  # doctest: +SKIP
    """

    def __init__(self, shards: Shards, site: str) -> None:
        self._shards, self.site = shards, site

    def __len__(self) -> int:
        return self._shards.n_rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._shards.spec(self.site).shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._shards.spec(self.site).dtype]

    def __getitem__(self, rows: RowNumbers) -> torch.Tensor:
        """States of rows, on the CPU.

        Args:
            rows: a number (gives `(dim,)`), a slice, or several numbers or a mask of all rows as a list, array or
                tensor (`(n, dim)`, in the order asked); negative numbers count from the end.

        Raises:
            UnsupportedOperationError: there are no such rows.
            StoreError, FormatError, IntegrityError: a shard is missing, damaged, or not the one that was written.
        """
        if isinstance(rows, slice):
            return self._slice(rows)
        numbers = row_numbers(rows, len(self), self.site)
        if numbers.ndim == 0:
            return states_at(self._shards, self.site, numbers[None])[0]
        return states_at(self._shards, self.site, numbers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Row by row; `Record.blocks` is faster."""
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"Column({self.site!r}, {len(self)} rows)"

    def _slice(self, rows: slice) -> torch.Tensor:
        try:
            start, stop, step = rows.indices(len(self))
        except (TypeError, ValueError) as error:
            raise _refused(self.site, "a slice of numbers", f"{rows!r:.80}") from error
        wanted = range(start, stop, step)
        if step == 1 or not len(wanted):
            return span_of(self._shards, self.site, start, max(start, stop) if step == 1 else start)
        first, last = sorted((wanted[0], wanted[-1]))
        starts = self._shards.starts
        held = np.searchsorted(starts, [first, last], "right") - 1
        self._shards.prove(range(int(held[0]), int(held[1]) + 1))
        return states_at(self._shards, self.site, np.arange(start, stop, step, dtype=np.int64))


def row_numbers(rows: object, n: int, where: str) -> Ints:
    """Numbers of rows from 0, of any kind that names rows; `()` for one number, else `(n,)`.

    Raises:
        UnsupportedOperationError: it names none, or one that is not there.
    """
    values = np.asarray(rows.detach().cpu() if isinstance(rows, torch.Tensor) else rows)
    if values.dtype == np.bool_ and values.shape == (n,):
        return np.flatnonzero(values).astype(np.int64)
    if values.shape == (0,):
        return np.empty(0, np.int64)
    if values.dtype.kind not in "iu" or values.ndim > 1:
        raise _refused(where, "numbers of rows, or a mask of all rows", f"{rows!r:.80}")
    if values.size and not -n <= int(values.min()) <= int(values.max()) < n:
        outside = values[(values < -n) | (values >= n)].reshape(-1)[0]
        raise _refused(where, f"rows 0 to {n - 1}" if n else "no rows, for there are none", f"{outside}")
    numbers = values.astype(np.int64)
    return np.where(numbers < 0, numbers + n, numbers)


def _refused(where: str, expected: str, found: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(where, expected=expected, found=found, do="name rows that are there")
