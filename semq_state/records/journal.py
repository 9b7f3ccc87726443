"""`shards.jsonl`: a line for each whole shard, and one at the end; written and read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semq_state.container import shown
from semq_state.errors import FormatError, IntegrityError, StoreError
from semq_state.records.checks import MOST_DOCUMENTS, MOST_POSITIONS, Fields, parse, render
from semq_state.records.description import Description
from semq_state.stores import LocalFile, atomic_write

NAME = "shards.jsonl"

MAX_BYTES = 1 << 30
"""Larger files are refused unread."""

Row = tuple[int, int]
"""A document and a position."""

_FIELDS = ("number", "state_id", "n_rows", "n_bytes", "first", "last", "next", "n_read", "dataset")
_COMPLETE = ("n_documents", "n_rows", "n_shards", "record_id")


@dataclass(frozen=True)
class Shard:
    """What the journal says of a shard.

    Args:
        number: its place, from 0.
        state_id: identity of its file.
        n_rows: how many rows it holds.
        n_bytes: size of its file when it was written.
        first: document and position of its first row.
        last: of its last row.
        next: where the recording goes on after it.
        n_read: items that had been read from the dataset by then.
        dataset: digest of these.
    """

    number: int
    state_id: str
    n_rows: int
    n_bytes: int
    first: Row
    last: Row
    next: Row
    n_read: int
    dataset: str

    @property
    def name(self) -> str:
        """Its file."""
        return shard_name(self.number)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file or for JSON."""
        told = {name: getattr(self, name) for name in _FIELDS}
        return told | {name: list(told[name]) for name in ("first", "last", "next")}


@dataclass(frozen=True)
class Complete:
    """What the journal says when nothing more will come.

    Args:
        n_documents: how many documents were read, those without rows included.
        n_rows: rows of all shards.
        n_shards: how many there are.
        record_id: identity of the record.
    """

    n_documents: int
    n_rows: int
    n_shards: int
    record_id: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file or for JSON."""
        return {"complete": {name: getattr(self, name) for name in _COMPLETE}}


@dataclass(frozen=True)
class Entries:
    """What a journal holds.

    Args:
        shards: the whole ones, in order.
        complete: the last line, where there is one.
        n_bytes: size of all whole lines; what follows was torn.
    """

    shards: tuple[Shard, ...] = ()
    complete: Complete | None = None
    n_bytes: int = 0


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:06d}.safetensors"


def key(row: Row) -> int:
    """A document and a position as one number, in the same order."""
    return row[0] * MOST_POSITIONS + row[1]


def read_journal(folder: Path, description: Description) -> Entries:
    """The inverse of `Journal`, of a folder from anyone. A line that was torn off counts as not written.

    Raises:
        StoreError: the disk failed.
        FormatError: a line, other than a torn last one, is none of ours.
        IntegrityError: lines do not fit each other.
    """
    path = folder / NAME
    if not path.exists() and not path.is_symlink():  # its writer was ended before it made one
        return Entries()
    with LocalFile(path) as file:
        if file.size > MAX_BYTES:
            raise Fields(str(path)).refused(f"at most {MAX_BYTES} bytes", f"{file.size}")
        data = file.read(0, file.size)
    shards: list[Shard] = []
    complete: Complete | None = None
    n_bytes = 0
    for i, (line, is_last) in enumerate(_lines(data)):
        where = f"{path}, line {i + 1}"
        try:
            told = parse(line)
        except ValueError as error:
            if is_last:
                break
            raise Fields(where).refused("a line of our JSON", f"{error!s:.200}") from error
        if complete:
            raise Fields(where).refused("nothing after the last line", shown(told))
        if type(told) is dict and told.keys() == {"complete"}:
            complete = _complete(told["complete"], Fields(where))
        else:
            shards.append(_shard(told, Fields(where)))
            _check_next(shards, where)
        n_bytes += len(line)
    if complete:
        _check_complete(complete, shards, description, str(path))
    return Entries(tuple(shards), complete, n_bytes)


class Journal:
    """The journal of a record that is being written: each line is on the disk when its call returns, or not there.

    Args:
        folder: the record.
        n_bytes: size of the lines that are whole; what follows is dropped with the next line.

    Raises:
        StoreError: the folder or disk refused.
    """

    def __init__(self, folder: Path, n_bytes: int) -> None:
        self._path, self._n_bytes = folder / NAME, n_bytes
        if not self._path.exists():
            with atomic_write(self._path):
                pass

    def append(self, line: Shard | Complete) -> None:
        """Adds a line.

        Raises:
            StoreError: the disk refused; the journal is as it was.
        """
        data = render(line.as_dict())
        try:
            with open_for_lines(self._path) as handle:
                try:
                    os.ftruncate(handle, self._n_bytes)
                    os.lseek(handle, self._n_bytes, os.SEEK_SET)
                    _write_all(handle, data)
                    os.fsync(handle)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, self._n_bytes)
                    raise
        except OSError as error:
            raise StoreError(
                str(self._path),
                expected="room for a line",
                found=error.strerror or str(error),
                do="the record holds what came before; free some space and go on",
            ) from error
        self._n_bytes += len(data)


@contextlib.contextmanager
def open_for_lines(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
    try:
        yield handle
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _lines(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Each line with its newline, and whether nothing follows; what lacks its newline is left out."""
    start = 0
    while (end := data.find(b"\n", start) + 1) > 0:
        yield data[start:end], end == len(data)
        start = end


def _shard(told: Any, fields: Fields) -> Shard:
    table = fields.table(told, _FIELDS)
    return Shard(
        number=fields.count(table["number"], "number"),
        state_id=fields.digest(table["state_id"], "state_id"),
        n_rows=fields.count(table["n_rows"], "n_rows", 1),
        n_bytes=fields.count(table["n_bytes"], "n_bytes", 1),
        first=fields.row(table["first"], "first"),
        last=fields.row(table["last"], "last"),
        next=fields.row(table["next"], "next"),
        n_read=fields.count(table["n_read"], "n_read"),
        dataset=fields.digest(table["dataset"], "dataset"),
    )


def _complete(told: Any, fields: Fields) -> Complete:
    table = fields.table(told, _COMPLETE)
    return Complete(
        n_documents=fields.count(table["n_documents"], "n_documents"),
        n_rows=fields.count(table["n_rows"], "n_rows"),
        n_shards=fields.count(table["n_shards"], "n_shards"),
        record_id=fields.digest(table["record_id"], "record_id"),
    )


def _check_next(shards: list[Shard], where: str) -> None:
    """Holds the last shard against the one before it and against itself."""
    shard = shards[-1]
    if shard.number != len(shards) - 1:
        raise _broken(where, f"shard {len(shards) - 1}", f"{shard.number}")
    before = key(shards[-2].last) if len(shards) > 1 else -1
    at = [before, key(shard.first), key(shard.last), key(shard.next)]
    span = at[2] - at[1] + 1
    if not (at[0] < at[1] <= at[2] < at[3] and shard.last[0] < MOST_DOCUMENTS and shard.n_rows <= span):
        raise _broken(
            where,
            f"{shard.n_rows} rows after {shards[-2].last if len(shards) > 1 else 'nothing'}",
            f"{shard.first} to {shard.last}, then {shard.next}",
        )


def _check_complete(complete: Complete, shards: list[Shard], description: Description, where: str) -> None:
    wanted = Complete(
        n_documents=max(complete.n_documents, shards[-1].last[0] + 1 if shards else 0),
        n_rows=sum(shard.n_rows for shard in shards),
        n_shards=len(shards),
        record_id=description.record_id([shard.state_id for shard in shards]),
    )
    if complete != wanted:
        raise _broken(f"{where}, last line", f"{wanted.as_dict()['complete']}", f"{complete.as_dict()['complete']}")


def _broken(where: str, expected: str, found: str) -> FormatError:
    return IntegrityError(
        where, expected=expected, found=found, do="the journal was changed; use another copy of the record"
    )
