"""`sq.measure_floor`: how far states vary when nothing was changed on purpose, and whether a difference is noise.

The rule is SEMQ's, in integers: per cell the worst share of changed vectors over the null runs, compared by
cross-multiplication, and the worst 99th percentile of their Hamming distances; and, since a change of scale changes
one symbol of many, that of their norms as well. A candidate is within if it exceeds none of these in any cell. Over
60 cells and 20 null runs, that alone refuses most held-out null runs: some cell always has its largest count in the
new run. So by default twice the floor is allowed, and a little more (`MARGIN`).

How often each rule refuses held-out null runs of a real model is in `benchmarks/results/audit.md`. Take 20 null
runs where that matters.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from semq_state.audit.cells import natural
from semq_state.audit.diff import BINS, diff
from semq_state.audit.report import CellDiff, Diff
from semq_state.audit.sources import Source, identity_of, loaded
from semq_state.audit.verdict import Verdict
from semq_state.errors import FloorError
from semq_state.provenance import IDENTITY
from semq_state.sealing import Unlock

MARGIN = (2, 8)
"""By how much the floor may be exceeded: a factor, and so many vectors and symbols beside (an eighth of a cell's at
most). `(1, 0)` is SEMQ's own rule."""

_SMALL = 8  # of a cell with few vectors or symbols, the addend is at most one in so many


@dataclass(frozen=True)
class FloorCell:
    """The envelope of one layer and kind of state.

    Args:
        name: as in a report, `layers.3.keys`.
        changed: changed vectors of the null run with the largest share of them.
        total: its vectors.
        p99: the largest 99th percentile of changed vectors' Hamming distances, over all null runs.
        p99_norm: the same of the change of their norms, in steps of 2^-11.
        n_units: symbols of a vector.
    """

    name: str
    changed: int
    total: int
    p99: int
    p99_norm: int
    n_units: int

    def widened(self, found: CellDiff) -> FloorCell:
        """The envelope of this and one more null run."""
        # Shares are compared without dividing, so that no rounding decides.
        is_worse = found.n_changed * self.total > self.changed * found.n_vectors
        changed, total = (found.n_changed, found.n_vectors) if is_worse else (self.changed, self.total)
        p99, p99_norm = max(self.p99, found.p99), max(self.p99_norm, found.p99_norm)
        return FloorCell(self.name, changed, total, p99, p99_norm, self.n_units)


@dataclass(frozen=True)
class Floor:
    """The envelope of variation of a state over re-runs that changed nothing on purpose.

    Args:
        reference: identity of the state that the re-runs were compared with.
        n_nulls: how many there were.
        bins: of SEMQ's `quant`.
        c_thousandths: its range factor, in thousandths.
        cells: envelope of each layer and kind of state.
        varied: names of other tensors, values and missing parts that differed in a null run: the random state, say.
        margin: a factor and an addend by which the envelope may be exceeded.
    """

    reference: str
    n_nulls: int
    bins: int
    c_thousandths: int
    cells: tuple[FloorCell, ...]
    varied: tuple[str, ...] = ()
    margin: tuple[int, int] = MARGIN

    def judge(self, report: Diff) -> Verdict:
        """Whether a difference from the reference is noise.

        Returns:
            `equal`, `within`, or `different` with every reason, in the order of the layers.

        Raises:
            FloorError: the report is of another reference, or was made with other symbols.
        """
        self._require_fit(report)
        changed_origin = [d for d in report.provenance if d.name.partition(".")[0] in IDENTITY]
        if report.equal and not changed_origin:
            return Verdict("equal")
        reasons = [f"{d.name}: {d.expected} in the reference, {d.found} here" for d in changed_origin]
        reasons += self._reasons(report)
        return Verdict("different", tuple(reasons)) if reasons else Verdict("within")

    def allowed(self, cell: FloorCell) -> tuple[int, int, int]:
        """How many changed vectors of `cell.total` are noise, and which percentiles of distances and norm steps."""
        factor, more = self.margin
        return (
            factor * cell.changed + min(more, cell.total // _SMALL),
            factor * cell.p99 + min(more, cell.n_units // _SMALL),
            factor * cell.p99_norm + more,
        )

    def _require_fit(self, report: Diff) -> None:
        if report.a != self.reference:
            is_turned = report.b == self.reference
            raise FloorError(
                "floor",
                expected=f"a report whose first state is the reference {self.reference}",
                found=report.a,
                do="the reference is the second: pass it first"
                if is_turned
                else "pass the floor's reference first",
            )
        ours, theirs = (self.bins, self.c_thousandths), (report.bins, thousandths(report.c))
        if ours != theirs:
            raise FloorError(
                "floor",
                expected=f"a report with {ours[0]} bins up to {ours[1]}/1000",
                found=f"{theirs[0]} bins up to {theirs[1]}/1000",
                do=f"compare again with bins={self.bins}",
            )

    def _reasons(self, report: Diff) -> Iterator[str]:
        tokens, found = report.tokens, {cell.key: cell for cell in report.cells}
        if tokens.earliest is not None:
            yield f"tokens: part at {tokens.earliest}"
        if tokens.n_b < tokens.n_a:
            yield f"tokens: {tokens.n_b} of the reference's {tokens.n_a}"
        own = {cell.name: cell for cell in self.cells}
        for name in dict.fromkeys((*own, *found)):
            yield from self._cell_reasons(name, own.get(name), found.get(name))
        more = {**{name: words for name, words in report.missing.items() if name not in own}, **report.others}
        more |= {d.name: f"{d.expected} in the reference, {d.found} here" for d in report.structure}
        yield from (f"{name}: {words}" for name, words in more.items() if name not in self.varied)

    def _cell_reasons(self, name: str, cell: FloorCell | None, found: CellDiff | None) -> Iterator[str]:
        if found is None:
            if name not in self.varied:
                yield f"{name}: missing"
            return
        if cell is None:
            if not found.equal and name not in self.varied:
                yield f"{name}: not in the floor"
            return
        if found.n_only_a:
            n_all = found.n_vectors + found.n_only_a
            yield f"{name}: {found.n_vectors} of the reference's {n_all} vectors are here"
        if not found.n_vectors:
            return
        n_vectors, n_symbols, n_steps = self.allowed(cell)
        if found.n_changed * cell.total > n_vectors * found.n_vectors:
            most = n_vectors * found.n_vectors // cell.total
            yield f"{name}: {found.n_changed} of {found.n_vectors} vectors changed, the floor allows {most}"
        if found.p99 > n_symbols:
            yield f"{name}: changed vectors differ in {found.p99} symbols (99 %), the floor allows {n_symbols}"
        if found.p99_norm > n_steps:
            yield f"{name}: norms differ by {found.p99_norm} steps of 2^-11 (99 %), the floor allows {n_steps}"


def measure_floor(
    reference: Source,
    nulls: Iterable[Source | tuple[str, Source]],
    *,
    bins: int = BINS,
    margin: tuple[int, int] = MARGIN,
    unlock: Unlock | None = None,
) -> Floor:
    """Measures how far re-runs are from a reference when nothing was changed on purpose.

    Args:
        reference: a snapshot or its file, or a record of hidden states or its folder.
        nulls: others of the same kind and tokens, or pairs of a label and one, as `null_runs` gives them; taken one
            at a time.
        bins: of each sign, of the symbols.
        margin: a factor and an addend by which a candidate may exceed the envelope; `(1, 0)` is SEMQ's own rule.
        unlock: what opens sealed files, as `sq.load` takes it.

    Raises:
        FloorError: there is no null run, or one lacks tokens or layers of the reference; it is named.
        ModelMismatchError: a null run is of another model.
        UnsupportedOperationError: a null run is a record and the reference a snapshot, or the other way round.

    Example:
        >>> floor = sq.measure_floor("reference.safetensors", ["null1.safetensors"])  # doctest: +SKIP
        >>> sq.diff("reference.safetensors", "candidate.safetensors").within(floor).passed  # doctest: +SKIP
    """
    check_margin(margin)
    own = loaded(reference, unlock)
    cells: dict[str, FloorCell] = {}
    varied: set[str] = set()
    n_nulls, c = 0, 0.0
    for label, null in _labelled(nulls):
        n_nulls += 1
        report = diff(own, null, bins=bins, unlock=unlock)
        _require_same_tokens(report, label)
        c = report.c
        for found in report.cells:
            if found.n_vectors:
                start = FloorCell(found.key, 0, found.n_vectors, 0, 0, found.n_units)
                cells[found.key] = cells.get(found.key, start).widened(found)
        varied |= {*report.others, *report.missing, *(d.name for d in report.structure)}
    if not n_nulls:
        raise FloorError("floor", expected="at least one null run", found="none", do="run again without a change")
    order = sorted(cells.values(), key=lambda cell: _natural(cell.name))
    return Floor(
        identity_of(own), n_nulls, bins, thousandths(c), tuple(order), tuple(sorted(varied)), (margin[0], margin[1])
    )


def thousandths(c: float) -> int:
    """A range factor as an integer; `best_range` has three decimals."""
    return round(c * 1000)


def check_margin(margin: Any) -> None:
    """Refuses what is no margin.

    Raises:
        FloorError: it is not a factor of 1 to 64 and an addend of 0 to 65,536.
    """
    is_pair = isinstance(margin, (tuple, list)) and [type(x) for x in margin] == [int, int]
    if not is_pair or not 1 <= margin[0] <= 64 or not 0 <= margin[1] <= 1 << 16:
        raise FloorError(
            "margin", expected="a factor of 1 to 64 and an addend of 0 to 65,536", found=f"{margin!r:.80}"
        )


def _labelled(nulls: Iterable[Source | tuple[str, Source]]) -> Iterator[tuple[str, Source]]:
    for i, null in enumerate(nulls, 1):
        if isinstance(null, tuple):
            yield f"null run {i} ({null[0]})", null[1]
        else:
            named = f" ({os.fspath(null)})" if isinstance(null, (str, os.PathLike)) else ""
            yield f"null run {i}{named}", null


def _require_same_tokens(report: Diff, label: str) -> None:
    tokens = report.tokens
    found = ""
    if tokens.earliest is not None:
        found = f"others from {tokens.earliest} on"
    elif tokens.n_a != tokens.n_b:
        found = f"{tokens.n_b}"
    if found:
        raise FloorError(
            label, expected=f"the reference's {tokens.n_a} tokens", found=found, do="a null run changes nothing"
        )
    for cell in report.cells:
        if cell.n_only_a or cell.n_only_b:
            raise FloorError(
                f"{label}, {cell.key}",
                expected=f"{cell.n_vectors + cell.n_only_a} vectors at the reference's positions",
                found=f"{cell.n_vectors} of them, and {cell.n_only_b} others",
            )
    for name, words in report.missing.items():
        if not name.startswith("generation."):
            raise FloorError(f"{label}, {name}", expected="what the reference has", found=words)


def _natural(name: str) -> tuple[Any, ...]:
    """Orders what is no layer of the model's own cache last."""
    return name.startswith("generation."), natural(name)
