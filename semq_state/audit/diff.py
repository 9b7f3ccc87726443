"""`sq.diff`: where and by how much two states differ."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from semq_state import content, files
from semq_state.audit.cells import Rule, located_cell
from semq_state.audit.cells import percentile as percentile
from semq_state.audit.diff_records import diff_records
from semq_state.audit.hidden import compare_hidden
from semq_state.audit.pairing import Located, check_same_shape, structure_differences, vectors_of
from semq_state.audit.report import CellDiff, TokenDiff
from semq_state.audit.report import Diff as Diff
from semq_state.audit.sources import Source, loaded, refused
from semq_state.codecs.semq_rules import Quant, best_range
from semq_state.errors import Difference, ModelMismatchError
from semq_state.provenance import Provenance, advice, identity_differences
from semq_state.sealing import Unlock
from semq_state.snapshot import Snapshot

BINS = 8
"""Of each sign, of symbols, where nothing else is asked for: 4 bits."""


def diff(
    a: Source,
    b: Source,
    *,
    across_models: bool = False,
    bins: int = BINS,
    threshold: float = 0.0,
    unlock: Unlock | None = None,
    progress: files.Progress | None = None,
) -> Diff:
    """Compares two states of one model: tokens first, then each layer and kind of state at the positions that both
    hold. What stands at padding is not compared: it means nothing, and may be anything. Hidden states are compared
    row by row, by (document, position); of records, which are read a block at a time, there is nothing else.

    Vectors whose bits differ are compared by symbols (SEMQ's `quant` of their directions, and their norm in steps
    of 2^-11), by cosine and by value.

    Args:
        a: a snapshot or its file, or a record or its folder; the reference, by which relative errors are taken.
        b: another of the same kind.
        across_models: compare states of two models of one shape as well.
        bins: of each sign, 2 to 64; 8 are symbols of 4 bits.
        threshold: relative error of a token's vectors beyond which it counts as parted; at 0 any bit does.
        unlock: what opens sealed files, as `sq.load` takes it.
        progress: of records: called with the bytes that have been compared, and how many there are in all.

    Raises:
        ModelMismatchError: the states are of two models, or of two shapes; every difference is listed.
        UnsupportedOperationError: `bins` out of its limits, or one is a snapshot and the other a record.
        StoreError, FormatError: as `sq.load` and `open_record`, for files and folders.

    Example:
        >>> report = sq.diff("before.safetensors", "after.safetensors")  # doctest: +SKIP
        >>> report.equal, report.first_token, report.first_layer  # doctest: +SKIP
        (False, 17, 0)
    """
    if not threshold >= 0:
        raise ValueError(f"`threshold` must be at least 0, got {threshold!r}")
    Quant(1, bins)  # refuses bins out of their limits, before anything is read
    a, b = loaded(a, unlock), loaded(b, unlock)
    if isinstance(a, Snapshot) != isinstance(b, Snapshot):
        raise refused(a, b)
    changed = list(identity_differences(a.provenance, b.provenance))
    if changed and not across_models:
        raise ModelMismatchError(
            changed, do="pass across_models=True (CLI --across-models) to compare two models of the same shape"
        )
    rule = Rule(bins, best_range(bins), float(threshold))
    origins = (*changed, *advice(a.provenance, b.provenance), *_names(a.provenance, b.provenance))
    if not isinstance(a, Snapshot) and not isinstance(b, Snapshot):
        return diff_records(a, b, origins, rule, progress)
    assert isinstance(a, Snapshot) and isinstance(b, Snapshot)
    return _of_snapshots(a, b, origins, rule)


def _of_snapshots(a: Snapshot, b: Snapshot, origins: tuple[Difference, ...], rule: Rule) -> Diff:
    check_same_shape(a, b)
    left, right = vectors_of(a), vectors_of(b)
    pairs = [(x, right[key]) for key, x in left.items() if key in right]
    padding = _padding(a, b)
    with ThreadPoolExecutor(content.n_workers()) as pool:
        cells = tuple(pool.map(lambda pair: located_cell(pair[0], pair[1], padding, rule), pairs))
    hidden = compare_hidden(a, b, rule)
    return Diff(
        a=a.state_id,
        b=b.state_id,
        bins=rule.bins,
        c=rule.c,
        threshold=rule.threshold,
        tokens=_tokens(a.generation.input_ids, b.generation.input_ids),
        cells=(*cells, *hidden.cells),
        others=_others(a, b, {*left, *right}) | hidden.others,
        structure=(*structure_differences(a, b), *_dtypes(pairs), *hidden.structure),
        missing=_missing(left, right, cells) | hidden.missing,
        provenance=origins,
    )


def _padding(a: Snapshot, b: Snapshot) -> torch.Tensor | None:
    """The padding of both, at the positions that both have."""
    left, right = a.padding(), b.padding()
    if left is None or right is None:
        return left if right is None else right
    n = min(left.shape[1], right.shape[1])
    return left[:, :n] | right[:, :n]


def _tokens(a: torch.Tensor, b: torch.Tensor) -> TokenDiff:
    n_common = min(a.shape[1], b.shape[1])
    unequal = a[:, :n_common].cpu() != b[:, :n_common].cpu()
    first = tuple(int(row.int().argmax()) if bool(row.any()) else None for row in unequal)
    found = TokenDiff(int(a.shape[1]), int(b.shape[1]), first)
    if found.row is None or found.earliest is None:
        return found
    values = (int(a[found.row, found.earliest]), int(b[found.row, found.earliest]))
    return TokenDiff(found.n_a, found.n_b, first, values)


def _others(a: Snapshot, b: Snapshot, vectors: set[str]) -> dict[str, str]:
    """Tensors that are not compared as vectors, and differ."""
    left, right = a.tensors(), b.tensors()
    found = {}
    for name in (*left, *(n for n in right if n not in left)):
        if name in vectors or name == "generation.input_ids" or name.startswith(("trace.", "hidden.")):
            continue
        words = _difference(left.get(name), right.get(name))
        if words:
            found[name] = words
    return found


def _difference(a: torch.Tensor | None, b: torch.Tensor | None) -> str:
    if a is None or b is None:
        return f"only in {'b' if a is None else 'a'}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{_described(a)} in a, {_described(b)} in b"
    ours, theirs = content.raw_bytes(a), content.raw_bytes(b)
    if np.array_equal(ours, theirs):
        return ""
    n = int((ours.reshape(-1, a.element_size()) != theirs.reshape(-1, a.element_size())).any(axis=1).sum())
    return f"{n} of {a.numel()} values"


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _dtypes(pairs: list[tuple[Located, Located]]) -> Iterator[Difference]:
    for a, b in pairs:
        if a.tensor.dtype != b.tensor.dtype:
            ours, theirs = (str(each.tensor.dtype).removeprefix("torch.") for each in (a, b))
            yield Difference(f"{a.key}.dtype", ours, theirs)


def _missing(left: dict[str, Located], right: dict[str, Located], cells: tuple[CellDiff, ...]) -> dict[str, str]:
    found = {key: "only in a" for key in left if key not in right}
    found |= {key: "only in b" for key in right if key not in left}
    for cell in cells:
        if not cell.n_vectors and (cell.n_only_a or cell.n_only_b):
            ours, theirs = (_span(each[cell.key].positions) for each in (left, right))
            found[cell.key] = f"no position in common: {ours} in a, {theirs} in b"
    return found


def _span(positions: range) -> str:
    return f"{positions.start} to {positions.stop - 1}" if positions else "none"


def _names(a: Provenance, b: Provenance) -> Iterator[Difference]:
    if a.model_name != b.model_name:
        yield Difference("model_name", a.model_name, b.model_name)
