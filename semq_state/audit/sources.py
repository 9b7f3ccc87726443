"""What can be compared: a snapshot, a record of hidden states, or the file or folder of one."""

from __future__ import annotations

import os
from pathlib import Path

from semq_state import files
from semq_state.errors import UnsupportedOperationError
from semq_state.records import Record, open_record
from semq_state.sealing import Unlock
from semq_state.snapshot import Snapshot

Held = Snapshot | Record
"""What has been opened: a snapshot is in memory, the states of a record stay on the disk."""

Source = Held | str | os.PathLike[str]


def loaded(source: Source, unlock: Unlock | None = None, progress: files.Progress | None = None) -> Held:
    """The snapshot or record itself, or that of a file or folder.

    Raises:
        StoreError, FormatError: as `sq.load` and `open_record`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    if Path(source).is_dir():
        return open_record(source)
    return files.load(source, unlock=unlock, progress=progress)


def identity_of(held: Held) -> str:
    """The `state_id` of a snapshot, the `record_id` of a record."""
    return held.state_id if isinstance(held, Snapshot) else held.record_id


def refused(a: Held, b: Held) -> UnsupportedOperationError:
    """The error for a snapshot and a record, which cannot be compared."""
    ours, theirs = ("a snapshot" if isinstance(each, Snapshot) else "a record" for each in (a, b))
    return UnsupportedOperationError(
        "diff",
        expected="two snapshots or two records",
        found=f"{ours} and {theirs}",
        do="compare a record with one of the same tokens",
    )
