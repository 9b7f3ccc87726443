"""`RecordWriter`: rows in, shard by shard; what is on the disk is whole whatever ends the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import final

import filelock
import torch

from semq_state import files
from semq_state.content import TensorSpec, spec_of
from semq_state.errors import (
    IncompleteStateError,
    IntegrityError,
    SemqStateError,
    StoreError,
    UnsupportedOperationError,
)
from semq_state.files.forms import Codec
from semq_state.provenance import Provenance
from semq_state.records import description as descriptions
from semq_state.records.checks import MOST_DOCUMENTS, MOST_POSITIONS, is_digest
from semq_state.records.description import Description, read_description, write_description
from semq_state.records.journal import Complete, Journal, Row, Shard, key, read_journal, shard_name
from semq_state.records.layout import read_layout
from semq_state.records.plan import Plan
from semq_state.snapshot import ABSENT, CacheState, GenerationState, HiddenRows, Snapshot

LOCK = ".lock"


@final
class RecordWriter:
    """Writes a record, one shard a call; holds its lock until it is closed.

    Args:
        folder: the record.
        description: what it is of.
        provenance: the model as it is now, for the shards to come.
        codec: what `save` takes.
        verify: read each shard again before it counts.
        lock: the lock, held.

    Example:
        >>> with RecordWriter.open("states", plan, provenance) as writer:  # doctest: +SKIP
        ...     writer.append(rows, next=(12, 0), n_read=12, dataset=digest)
        ...     writer.finish(12)
    """

    def __init__(
        self,
        folder: Path,
        description: Description,
        provenance: Provenance,
        codec: Codec,
        verify: bool,
        lock: filelock.BaseFileLock,
    ) -> None:
        self.folder, self.plan, self.provenance = folder, description.plan, provenance
        self._description, self._codec, self._verify, self._lock = description, codec, verify, lock
        entries = read_journal(folder, description)
        self._shards, self._complete = list(entries.shards), entries.complete
        self._check_files()
        self._specs = self._first_specs()
        self._journal = Journal(folder, entries.n_bytes)
        self._closed = False

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        plan: Plan,
        provenance: Provenance,
        *,
        codec: Codec = "raw",
        verify: bool = True,
    ) -> RecordWriter:
        """Begins a record in a new or empty folder, or goes on with the one that is there.

        Args:
            folder: the record; made where there is none.
            plan: what is recorded.
            provenance: the model.
            codec: how shards are coded; see `save`.
            verify: read each shard again, decode it and compare every digest before it counts.

        Raises:
            StoreError: another writer is at it, the folder holds other files, or the disk refused.
            UnsupportedOperationError: the folder holds another record; the message names every difference.
            FormatError, IntegrityError: the record that is there is damaged.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_folder(folder)
        except OSError as error:
            raise error if isinstance(error, StoreError) else _refused(folder, error) from error
        lock = _locked(folder)
        try:
            description = _begun(folder, Description(plan, provenance))
            return cls(folder, description, provenance, codec, verify, lock)
        except BaseException:
            lock.release()
            raise

    @property
    def next(self) -> Row:
        """Document and position at which the recording goes on."""
        return self._shards[-1].next if self._shards else (0, 0)

    @property
    def n_read(self) -> int:
        """Items of the dataset that the rows so far come from."""
        return self._shards[-1].n_read if self._shards else 0

    @property
    def dataset(self) -> str:
        """Digest of these items; empty at the start."""
        return self._shards[-1].dataset if self._shards else ""

    @property
    def n_rows(self) -> int:
        return sum(shard.n_rows for shard in self._shards)

    @property
    def n_bytes(self) -> int:
        """Size of all shards' files."""
        return sum(shard.n_bytes for shard in self._shards)

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def complete(self) -> bool:
        """Whether `finish` was called, now or earlier: nothing more can be added."""
        return self._complete is not None

    @property
    def n_documents(self) -> int | None:
        """How many documents a complete record was made of; None while it is not complete."""
        return None if self._complete is None else self._complete.n_documents

    @property
    def record_id(self) -> str:
        """Identity of the record so far."""
        return self._description.record_id([shard.state_id for shard in self._shards])

    def append(self, rows: HiddenRows, *, next: Row, n_read: int, dataset: str) -> None:
        """Writes one shard; when this returns it is on the disk, and when it raises nothing was added.

        Args:
            rows: its rows, all after those that are there.
            next: document and position at which the recording goes on.
            n_read: items that were read from the dataset so far.
            dataset: digest of these, `sha256:…`.

        Raises:
            IncompleteStateError: sites, dims or dtypes are not those of the plan and of earlier shards, or rows do
                not increase.
            UnsupportedOperationError: the record is complete or closed, or another argument is out of its limits.
            StoreError: the disk refused; what was there before is whole, and more can be appended.
        """
        self._require_open("append")
        specs = self._check_rows(rows)
        self._check_progress(rows, next, n_read, dataset)
        number = len(self._shards)
        path = self.folder / shard_name(number)
        info = files.save(self._snapshot(rows), path, codec=self._codec, verify=self._verify)
        ids = rows.rows[[0, -1]].tolist()
        shard = Shard(
            number, info.state_id, len(rows), info.n_bytes, (*ids[0],), (*ids[1],), (*next,), n_read, dataset
        )  # fmt: skip
        self._journal.append(shard)
        self._shards.append(shard)
        self._specs = specs

    def finish(self, n_documents: int) -> None:
        """Marks the record as complete.

        Args:
            n_documents: how many documents were read, those without rows included.

        Raises:
            UnsupportedOperationError: it is complete or closed already, or there are rows of later documents.
            StoreError: the disk refused.
        """
        self._require_open("finish")
        least = self._shards[-1].last[0] + 1 if self._shards else 0
        if type(n_documents) is not int or not least <= n_documents <= MOST_DOCUMENTS:
            raise UnsupportedOperationError(
                "n_documents", expected=f"{least} or more", found=f"{n_documents!r:.80}", do="count all documents"
            )
        # A writer that was ended before it could tell of its last shard has left one.
        with contextlib.suppress(OSError):
            (self.folder / shard_name(len(self._shards))).unlink()
        complete = Complete(n_documents, self.n_rows, len(self._shards), self.record_id)
        self._journal.append(complete)
        self._complete = complete

    def close(self) -> None:
        """Gives the lock back; the record can be gone on with."""
        self._closed = True
        self._lock.release()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        ended = "complete" if self.complete else "closed" if self._closed else "open"
        return f"RecordWriter({str(self.folder)!r}, {self.n_rows} rows in {self.n_shards} shards, {ended})"

    def _snapshot(self, rows: HiddenRows) -> Snapshot:
        return Snapshot(
            cache=CacheState(ABSENT),
            generation=GenerationState(
                input_ids=torch.zeros(1, 0, dtype=torch.int64),
                prompt_length=0,
                n_cached=0,
                finished=torch.zeros(1, dtype=torch.bool),
            ),
            provenance=self.provenance,
            hidden={self.plan.stream: rows},
        )

    def _require_open(self, where: str) -> None:
        if self._closed or self.complete:
            raise UnsupportedOperationError(
                where,
                expected="a record that is being written",
                found="one that is complete" if self.complete else "one that was closed",
                do="choose another folder" if self.complete else "open it again",
            )

    def _check_progress(self, rows: HiddenRows, next: Row, n_read: int, dataset: str) -> None:
        wrong = [
            name
            for name, right in {
                "next": len(next) == 2 and _is_row(*next),
                "n_read": type(n_read) is int and 0 <= n_read < 1 << 48,
                "dataset": is_digest(dataset),
            }.items()
            if not right
        ]
        if not wrong and key(next) <= key((*rows.rows[-1].tolist(),)):
            wrong = ["next"]
        if wrong:
            raise UnsupportedOperationError(
                ", ".join(wrong),
                expected="a (document, position) after the last row, a count, and sha256:…",
                found=f"{next!r:.80}, {n_read!r:.80}, {dataset!r:.80}",
                do="tell how far the dataset was read",
            )

    def _check_rows(self, rows: HiddenRows) -> dict[str, TensorSpec]:
        """The spec of a row of each site, once all is as in the shards before."""
        rows.check("rows")
        if not len(rows):
            raise _incomplete("rows", "one at least", "none")
        for name in ("tokens", "pool"):
            if getattr(rows, name) != getattr(self.plan, name):
                raise _incomplete(name, repr(getattr(self.plan, name)), f"{getattr(rows, name)!r:.80}")
        if sorted(rows.states) != list(self.plan.states):
            raise _incomplete("states", f"{self.plan.states!r:.200}", f"{sorted(rows.states)!r:.200}")
        specs = {name: _row_spec(spec_of(rows.states[name], name)) for name in self.plan.states}
        for name, spec in specs.items():
            wanted = self._specs.get(name, spec)
            if spec != wanted or spec.shape == (0,):
                raise _incomplete(f"states.{name:.80}", f"{wanted} a row", f"{spec}")
            if self.plan.dtype not in ("", str(rows.states[name].dtype)[6:]):
                raise _incomplete(f"states.{name:.80}", self.plan.dtype, str(rows.states[name].dtype)[6:])
        first, last = rows.rows[0].tolist(), rows.rows[-1].tolist()
        before = key(self._shards[-1].last) if self._shards else -1
        if key((*first,)) <= before or last[0] >= MOST_DOCUMENTS or int(rows.rows[:, 1].max()) >= MOST_POSITIONS:
            after = f"after {self._shards[-1].last}, " if self._shards else ""
            raise _incomplete(
                "rows", f"{after}documents below 2^31", f"(document, position) {(*first,)} to {(*last,)}"
            )
        return specs

    def _check_files(self) -> None:
        """Refuses to go on where a shard is missing."""
        for shard in self._shards:
            path = self.folder / shard.name
            size = path.stat().st_size if path.is_file() else -1
            if size < shard.n_bytes:  # a signature may have been added
                raise IntegrityError(
                    str(path),
                    expected=f"a file of {shard.n_bytes} bytes",
                    found="none" if size < 0 else f"{size}",
                    do="use another copy of the record",
                )

    def _first_specs(self) -> Mapping[str, TensorSpec]:
        if not self._shards:
            return {}
        layout = read_layout(self.folder, self._shards[0], self.plan)
        return {name: _row_spec(spec) for name, spec in layout.specs.items()}


def _is_row(document: object, position: object) -> bool:
    if type(document) is not int or type(position) is not int:
        return False
    return 0 <= document <= MOST_DOCUMENTS and 0 <= position < MOST_POSITIONS


def _row_spec(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.dtype, spec.shape[1:])


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    begun = f".{descriptions.NAME}."
    others = sorted(name for name in names if name != LOCK and not name.startswith(begun))
    if others and descriptions.NAME not in names:
        raise StoreError(
            str(folder),
            expected="a record, or an empty folder",
            found=f"other files: {', '.join(others)[:200]}",
            do="nothing was changed there; choose another folder",
        )


def _locked(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(str(folder / LOCK), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise StoreError(
            str(folder),
            expected="one writer at a time",
            found="another one that is writing this record",
            do="wait until it is done, or choose another folder",
        ) from error
    except OSError as error:
        raise _refused(folder, error) from error
    return lock


def _begun(folder: Path, wanted: Description) -> Description:
    """The description that the folder has, or has from now on."""
    if not (folder / descriptions.NAME).exists():
        write_description(folder, wanted)
    found = read_description(folder)
    if found.plan_id != wanted.plan_id:
        different = "; ".join(str(each) for each in descriptions.differences(found, wanted))
        raise UnsupportedOperationError(
            str(folder),
            expected="the record that is there",
            found=f"another: {different}",
            do="record it into another folder",
        )
    return found


def _incomplete(where: str, expected: str, found: str) -> IncompleteStateError:
    return IncompleteStateError(
        where, expected=expected, found=found, do="nothing was written; give rows that go on with the record"
    )


def _refused(folder: Path, error: SemqStateError | OSError) -> StoreError:
    return StoreError(
        str(folder),
        expected="a folder that can be written to",
        found=getattr(error, "strerror", None) or str(error),
        do="nothing was changed there; choose another folder",
    )
