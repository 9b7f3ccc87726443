"""Every byte of a record read again and held against its digests and its journal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from semq_state import files
from semq_state.errors import SemqStateError
from semq_state.files import Progress, counter
from semq_state.records.journal import Shard
from semq_state.records.layout import Layout, check_alike, read_ids, read_layout
from semq_state.records.plan import Plan


def failures_of(
    folder: Path, plan: Plan, shards: Sequence[Shard], progress: Progress | None
) -> dict[str, SemqStateError]:
    """What does not hold, by file, in the order of the journal."""
    advance = counter(progress, sum(shard.n_bytes for shard in shards))
    failures: dict[str, SemqStateError] = {}
    first: Layout | None = None
    for shard in shards:
        try:
            layout = read_layout(folder, shard, plan)
            first = first or layout
            check_alike(layout, first)
            _check_content(folder / shard.name)
            read_ids(folder, shard, plan)
        except SemqStateError as error:
            failures[shard.name] = error
        advance(shard.n_bytes)
    return failures


def _check_content(path: Path) -> None:
    with files.open_snapshot(path) as (file, header, manifest):
        for failure in files.failures_of(file, header, manifest, None, lambda _: None).values():
            raise failure
