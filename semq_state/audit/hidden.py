"""The hidden states of two snapshots, stream by stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from semq_state.audit.cells import Rule
from semq_state.audit.row_cells import RowsFound, compare_rows
from semq_state.audit.rows import rows_of_hidden, tokens_of
from semq_state.snapshot import Snapshot


def compare_hidden(a: Snapshot, b: Snapshot, rule: Rule) -> RowsFound:
    """Compares what two snapshots keep of hidden states, `hidden.sequence` and others, by (document, position)."""
    whole = RowsFound()
    for stream in sorted({*a.hidden} | {*b.hidden}):
        found = _of_stream(stream, a, b, rule)
        whole = RowsFound(
            (*whole.cells, *found.cells),
            whole.missing | found.missing,
            (*whole.structure, *found.structure),
            whole.others | found.others,
        )
    return whole


def _of_stream(stream: str, a: Snapshot, b: Snapshot, rule: Rule) -> RowsFound:
    where = f"hidden.{stream}"
    if stream not in a.hidden or stream not in b.hidden:
        own, words = (a.hidden[stream], "only in a") if stream in a.hidden else (b.hidden[stream], "only in b")
        return RowsFound(missing={f"{where}.{name}": words for name in sorted(own.states)})
    ours, theirs = rows_of_hidden(a, stream), rows_of_hidden(b, stream)
    found = compare_rows(where, ours, theirs, rule)
    tokens = tokens_of(ours, theirs)

    def others() -> Iterator[tuple[str, str]]:
        n_only = len(ours) - tokens.n_rows, len(theirs) - tokens.n_rows
        if any(n_only) and not found.cells:  # which would have told it
            yield f"{where}.rows", f"{n_only[0]} only in a, {n_only[1]} only in b"
        if tokens.first:
            document, position = tokens.first
            yield (
                f"{where}.token_ids",
                f"{tokens.n_parted} of {tokens.n_rows} rows, first (document {document}, position {position})",
            )

    return dataclasses.replace(found, others=dict(others()))
