"""The shards of a record as arrays: plain ones mapped, coded ones decoded, a few of each held."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state import files
from semq_state.content import DTYPES, TensorSpec
from semq_state.errors import StoreError, UnsupportedOperationError
from semq_state.records.journal import Shard
from semq_state.records.layout import (
    ROWS,
    TOKEN_IDS,
    Ints,
    Layout,
    broken,
    check_alike,
    check_ids,
    read_ids,
    read_layout,
)
from semq_state.records.plan import Plan

MAX_MAPPED = 64
"""Plain shards that are mapped at a time."""

MAX_DECODED = 2
"""Coded shards that are held decoded at a time."""

Bits = NDArray[Any]
"""States `(n, dim)` as signed integers of their size: numpy has no bfloat16."""

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Opened:
    """A shard as arrays.

    Args:
        rows: row ids, `(n, 2)`.
        token_ids: `(n,)`.
        states: site to its states.
    """

    rows: Ints
    token_ids: Ints
    states: dict[str, Bits]

    @cached_property
    def keys(self) -> Ints:
        """Row ids as one number each, increasing."""
        return keys_of(self.rows)


@final
class Shards:
    """The shards of a record, read when they are asked for. Several threads may ask.

    Args:
        folder: the record.
        plan: what it is of.
        told: what the journal says of each shard.
    """

    def __init__(self, folder: Path, plan: Plan, told: Sequence[Shard]) -> None:
        self.folder, self.plan, self.told = folder, plan, told
        self.starts: Ints = np.zeros(len(told) + 1, np.int64)
        np.cumsum([shard.n_rows for shard in told], out=self.starts[1:])
        self._lock = threading.RLock()
        self._layouts: dict[int, Layout] = {}
        self._mapped: _Recent[Opened] = _Recent(MAX_MAPPED)
        self._decoded: _Recent[Opened] = _Recent(MAX_DECODED)

    def __len__(self) -> int:
        return len(self.told)

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def spec(self, site: str) -> TensorSpec:
        """Of a row of a site.

        Raises:
            UnsupportedOperationError: there are no rows yet.
        """
        if not self.told:
            raise UnsupportedOperationError(
                str(self.folder), expected="rows", found="none yet", do="open the record again when it has some"
            )
        spec = self.layout(0).specs[site]
        return TensorSpec(spec.dtype, spec.shape[1:])

    def layout(self, number: int) -> Layout:
        """Where the tensors of a shard stand; its header is read once.

        Raises:
            StoreError, FormatError, IntegrityError: it is missing, damaged, or not the one that was written.
        """
        with self._lock:
            if number not in self._layouts:
                found = read_layout(self.folder, self.told[number], self.plan)
                if number:
                    check_alike(found, self.layout(0))
                self._layouts[number] = found
            return self._layouts[number]

    def prove(self, numbers: range) -> None:
        """Holds what the journal claims of these shards against their files, before memory is taken for them."""
        for number in numbers:
            self.layout(number)

    def is_mapped(self, number: int) -> bool:
        """Whether a shard is plain, and so read in place."""
        return self.layout(number).begins is not None

    def opened(self, number: int) -> Opened:
        """A shard as arrays.

        Raises:
            StoreError, FormatError, IntegrityError: as `layout`.
        """
        with self._lock:
            layout = self.layout(number)
            if layout.begins is not None:
                return self._mapped.get(number, lambda: _map(layout, self.told[number].n_rows))
            return self._decoded.get(number, lambda: self._decode(number))

    def ids(self, number: int) -> tuple[Ints, Ints]:
        """Row ids and token ids of a shard; its states are not read."""
        if self.is_mapped(number):
            opened = self.opened(number)
            return opened.rows, opened.token_ids
        return read_ids(self.folder, self.told[number], self.plan)

    def keys(self, number: int) -> Ints:
        """Row ids of a shard as one number each, increasing; its states are not read."""
        with self._lock:
            if self.is_mapped(number) or number in self._decoded:
                return self.opened(number).keys
        return keys_of(read_ids(self.folder, self.told[number], self.plan)[0])

    def _decode(self, number: int) -> Opened:
        told, path = self.told[number], self.folder / self.told[number].name
        snapshot = files.load(path)
        if snapshot.state_id != told.state_id:
            raise broken(str(path), f"the shard {told.state_id}", snapshot.state_id)
        hidden = snapshot.hidden[self.plan.stream]
        rows = hidden.rows.numpy()
        check_ids(rows, told, str(path))
        return Opened(rows, hidden.token_ids.numpy(), {name: bits_of(t) for name, t in hidden.states.items()})


def keys_of(rows: Ints) -> Ints:
    """Row ids `(n, 2)` as one number each, in the same order."""
    found: Ints = (rows[:, 0] << 32) + rows[:, 1]
    return found


def bits_of(tensor: torch.Tensor) -> Bits:
    """Floats as signed integers of their size; shares memory."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    found: Bits = tensor.contiguous().view(kind).numpy()
    return found


def floats_of(bits: Bits, dtype: str) -> torch.Tensor:
    """The inverse of `bits_of`; shares memory where it can be written to."""
    native = np.ascontiguousarray(bits, bits.dtype.newbyteorder("="))
    if not native.flags.writeable:
        native = native.copy()
    return torch.from_numpy(native).view(DTYPES[dtype])


def _map(layout: Layout, n_rows: int) -> Opened:
    assert layout.begins is not None
    try:
        with layout.path.open("rb") as file:
            size = file.seek(0, 2)
            # What is mapped and then not there would end the process.
            if size < layout.size:
                raise broken(str(layout.path), f"{layout.size} bytes", f"{size}")
            data: NDArray[np.uint8] = np.memmap(file, np.uint8, "r", shape=(layout.size,)).view(np.ndarray)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(str(layout.path), found=str(error), do="check the disk") from error

    def view(name: str, itemsize: int, shape: tuple[int, ...]) -> Bits:
        assert layout.begins is not None
        begin = layout.begins[name]
        n_bytes = itemsize * int(np.prod(shape))
        return data[begin : begin + n_bytes].view(f"<i{itemsize}").reshape(shape)

    return Opened(
        view(ROWS, 8, (n_rows, 2)),
        view(TOKEN_IDS, 8, (n_rows,)),
        {name: view(f"states.{name}", spec.itemsize, spec.shape) for name, spec in layout.specs.items()},
    )


class _Recent(Generic[_T]):
    """The few things that were asked for last."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, OrderedDict[int, _T]()

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def get(self, number: int, make: Callable[[], _T]) -> _T:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        # Room first, so that no more than that are ever held.
        while len(self._held) >= self._most:
            self._held.popitem(last=False)
        self._held[number] = make()
        return self._held[number]
