"""Two records of hidden states: `diff` where states stay on the disk."""

from __future__ import annotations

from collections.abc import Iterator

from semq_state import files
from semq_state.audit.cells import Rule
from semq_state.audit.pairing import value_differences
from semq_state.audit.report import Diff, TokenDiff
from semq_state.audit.row_cells import compare_rows
from semq_state.audit.rows import dim_differences, rows_of_record, tokens_of
from semq_state.errors import Difference, ModelMismatchError
from semq_state.records import Record

MEANING = ("stream", "tokens", "pool")
"""What of a plan says which rows these are. Sites are compared one by one; the rest tells how it was recorded."""


def diff_records(
    a: Record, b: Record, origins: tuple[Difference, ...], rule: Rule, progress: files.Progress | None = None
) -> Diff:
    """Compares two records row by row.

    Args:
        a: the reference.
        b: another.
        origins: in what their models differ.
        rule: by what vectors are compared.
        progress: called with the bytes of the first that have been compared, and how many there are in all.

    Raises:
        ModelMismatchError: a site has vectors of other lengths.
    """
    ours, theirs = rows_of_record(a), rows_of_record(b)
    where = f"hidden.{ours.stream}"
    changed = list(dim_differences(where, ours.sites, theirs.sites))
    if changed:
        raise ModelMismatchError(changed, do="only states of one shape, whatever their lengths, can be compared")
    tokens = tokens_of(ours, theirs)
    n_bytes = sum(x.shape[-1] * x.dtype.itemsize for name, x in ours.sites.items() if name in theirs.sites)
    advance = files.counter(progress, tokens.n_rows * n_bytes)
    found = compare_rows(where, ours, theirs, rule, advance)
    plans = [each.plan.as_dict() for each in (a, b)]
    meaning = ({name: plan[name] for name in MEANING} for plan in plans)
    manner = ({name: plan[name] for name in plan if name not in (*MEANING, "states")} for plan in plans)
    earliest = tokens.earliest
    return Diff(
        a=a.record_id,
        b=b.record_id,
        bins=rule.bins,
        c=rule.c,
        threshold=rule.threshold,
        tokens=TokenDiff(
            len(ours),
            len(theirs),
            (earliest[1] if earliest else None,),
            tokens.values,
            earliest[0] if earliest else None,
            of_records=True,
        ),
        cells=found.cells,
        others=found.others,
        structure=(*value_differences("plan", *meaning), *found.structure),
        missing=found.missing | dict(_unfinished(a, b)),
        provenance=(*origins, *value_differences("plan", *manner)),
    )


def _unfinished(a: Record, b: Record) -> Iterator[tuple[str, str]]:
    for side, record in (("a", a), ("b", b)):
        if not record.complete:
            yield f"end of {side}", f"the record is incomplete, {len(record)} rows so far"
