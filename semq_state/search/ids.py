"""Ids of rows: all numbers of 0 to 2^63 - 1, or all strings; which row each has, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from semq_state.errors import UnsupportedOperationError

MAX_TEXT = 4096
"""Bytes of UTF-8 of a string."""

_MOST = (1 << 63) - 1

IdArray: TypeAlias = NDArray[Any]
"""int64, or str as objects: `(n,)`."""


class Ids:
    """The ids of the rows of an index, in their order.

    Args:
        values: ids that `check_ids` takes, none twice.
    """

    _parts: list[IdArray]
    _n: int
    _largest: int
    _rows: dict[int | str, int] | None

    def __init__(self, values: IdArray) -> None:
        self._set(values)

    @property
    def values(self) -> IdArray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def __len__(self) -> int:
        return self._n

    def fresh(self, ids: object, n: int) -> IdArray:
        """Ids for `n` new rows: those given, or the numbers after the largest.

        Raises:
            UnsupportedOperationError: an id repeats, is taken, or is of the other kind; or there are not `n`.
        """
        if ids is None:
            return self._following(n)
        found = check_ids(ids)
        if len(found) != n:
            raise refused("ids", f"{n}, one for each row", f"{len(found)}", "give as many")
        if n and self._n and found.dtype != self._parts[0].dtype:
            raise refused("ids", f"{_kind(self._parts[0])}, as the index has them", _kind(found), "use one kind")
        listed = found.tolist()
        if len(set(listed)) != n:
            raise refused("ids", "each once", "one that repeats", "leave out what is there twice")
        taken = next((each for each in listed if each in self._by_id()), None)
        if taken is not None:
            raise refused("ids", "new ones", f"{taken!r:.80}, which has a row", "remove it first")
        return found

    def append(self, ids: IdArray) -> None:
        """Takes what `fresh` gave."""
        if not self._n:
            self._set(ids)
        elif len(ids):
            if self._rows is not None:
                self._rows.update(zip(ids.tolist(), range(self._n, self._n + len(ids)), strict=True))
            self._parts.append(ids)
            self._n += len(ids)
            self._largest = max(self._largest, _largest(ids))

    def keep(self, kept: NDArray[np.bool_]) -> None:
        self._set(self.values[kept])

    def rows(self, ids: object) -> NDArray[np.intp]:
        """The row of each id.

        Raises:
            UnsupportedOperationError: an id has none.
        """
        by_id, listed = self._by_id(), check_ids(ids).tolist()
        rows = [by_id.get(each, -1) for each in listed]
        if -1 in rows:
            raise refused("ids", "ids of the index", f"{listed[rows.index(-1)]!r:.80}", "leave it out")
        return np.array(rows, np.intp)

    def _set(self, values: IdArray) -> None:
        self._parts, self._n, self._largest = [values], len(values), _largest(values)
        self._rows = None

    def _following(self, n: int) -> IdArray:
        if self._n and self._parts[0].dtype == object:
            raise refused("ids", "strings, as the index has them", "none", "give the new rows ids")
        first = self._largest + 1
        if first + n - 1 > _MOST:
            raise refused("ids", f"numbers up to {_MOST}", f"{first} and on", "give the new rows ids")
        return np.arange(first, first + n, dtype=np.int64)

    def _by_id(self) -> dict[int | str, int]:
        # Made when it is first needed: continuing numbers that are only searched do without.
        if self._rows is None:
            self._rows = dict(zip(self.values.tolist(), range(self._n), strict=True))
        return self._rows


def check_ids(ids: object) -> IdArray:
    """Ids as an array.

    Raises:
        UnsupportedOperationError: not all numbers of 0 to 2^63 - 1, nor all strings of 1 to 4,096 bytes of UTF-8.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise refused("ids", "several", f"{ids!r:.80}", "put it in a list")
    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(listed, list):
        raise refused("ids", "several", f"{listed!r:.80}", "put it in a list")
    if all(isinstance(each, str) for each in listed):
        for each in listed:
            _check_text(each)
        found = np.empty(len(listed), object if listed else np.int64)
        found[:] = listed
        return found
    numbers = [int(each) for each in listed if isinstance(each, int | np.integer) and not isinstance(each, bool)]
    if len(numbers) != len(listed) or not 0 <= min(numbers) <= max(numbers) <= _MOST:
        raise refused("ids", f"all numbers of 0 to {_MOST}, or all strings", f"{listed!r:.80}", "choose others")
    return np.array(numbers, np.int64)


def canonical_order(ids: IdArray) -> NDArray[np.intp]:
    """Rows by increasing id: numbers by size, strings by their bytes in UTF-8, which is the order of `str`."""
    return np.argsort(ids, kind="stable")


def _check_text(text: str) -> None:
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:  # half a surrogate pair
        n_bytes = 0
    if not 1 <= n_bytes <= MAX_TEXT or "\0" in text:
        raise refused(
            "ids", f"strings of 1 to {MAX_TEXT} bytes of UTF-8 without NUL", f"{text!r:.80}", "choose others"
        )


def _largest(ids: IdArray) -> int:
    return int(ids.max()) if len(ids) and ids.dtype != object else -1


def _kind(ids: IdArray) -> str:
    return "strings" if ids.dtype == object else "numbers"


def refused(where: str, expected: str, found: str, do: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(where, expected=expected, found=found, do=do)
