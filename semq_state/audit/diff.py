"""`sq.diff`: where and by how much two states differ."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from semq_state import content, files
from semq_state.audit.pairing import (
    Located,
    check_same_shape,
    structure_differences,
    vectors_of,
    without_padding,
)
from semq_state.audit.report import CellDiff, PerToken, TokenDiff
from semq_state.audit.report import Diff as Diff
from semq_state.audit.vectors import Integers, Measured, measure
from semq_state.codecs.semq_rules import MAX_DIM, Quant, best_range
from semq_state.errors import Difference, ModelMismatchError
from semq_state.provenance import advice, identity_differences
from semq_state.sealing import Unlock
from semq_state.snapshot import Snapshot

BINS = 8
"""Of each sign, of symbols, where nothing else is asked for: 4 bits."""


def diff(
    a: Snapshot | str | os.PathLike[str],
    b: Snapshot | str | os.PathLike[str],
    *,
    across_models: bool = False,
    bins: int = BINS,
    threshold: float = 0.0,
    unlock: Unlock | None = None,
) -> Diff:
    """Compares two states of one model: tokens first, then each layer and kind of state at the positions that both
    hold. What stands at padding is not compared: it means nothing, and may be anything.

    Vectors whose bits differ are compared by symbols (SEMQ's `quant` of their directions, and their norm in steps
    of 2^-11), by cosine and by value.

    Args:
        a: a snapshot or its file; the reference, by which relative errors are taken.
        b: another.
        across_models: compare states of two models of one shape as well.
        bins: of each sign, 2 to 64; 8 are symbols of 4 bits.
        threshold: relative error of a token's vectors beyond which it counts as parted; at 0 any bit does.
        unlock: what opens sealed files, as `sq.load` takes it.

    Raises:
        ModelMismatchError: the states are of two models, or of two shapes; every difference is listed.
        UnsupportedOperationError: `bins` out of its limits.
        StoreError, FormatError: as `sq.load`, for files.

    Example:
        >>> report = sq.diff("before.safetensors", "after.safetensors")  # doctest: +SKIP
        >>> report.equal, report.first_token, report.first_layer  # doctest: +SKIP
        (False, 17, 0)
    """
    if not threshold >= 0:
        raise ValueError(f"`threshold` must be at least 0, got {threshold!r}")
    Quant(1, bins)  # refuses bins out of their limits, before anything is read
    a, b = loaded(a, unlock), loaded(b, unlock)
    changed = list(identity_differences(a.provenance, b.provenance))
    if changed and not across_models:
        raise ModelMismatchError(
            changed, do="pass across_models=True (CLI --across-models) to compare two models of the same shape"
        )
    check_same_shape(a, b)
    left, right = vectors_of(a), vectors_of(b)
    pairs = [(x, right[key]) for key, x in left.items() if key in right]
    c = best_range(bins)
    padding = _padding(a, b)
    with ThreadPoolExecutor(content.n_workers()) as pool:
        cells = tuple(pool.map(lambda pair: _cell(pair[0], pair[1], padding, bins, c, threshold), pairs))
    return Diff(
        a=a.state_id,
        b=b.state_id,
        bins=bins,
        c=c,
        threshold=float(threshold),
        tokens=_tokens(a.generation.input_ids, b.generation.input_ids),
        cells=cells,
        others=_others(a, b, {*left, *right}),
        structure=(*structure_differences(a, b), *_dtypes(pairs)),
        missing=_missing(left, right, cells),
        provenance=(*changed, *advice(a.provenance, b.provenance), *_names(a, b)),
    )


def loaded(state: Snapshot | str | os.PathLike[str], unlock: Unlock | None = None) -> Snapshot:
    """The snapshot itself, or that of a file."""
    if isinstance(state, Snapshot):
        return state
    return files.load(state, unlock=unlock)


def percentile(distances: Integers) -> int:
    """The 99th percentile as SEMQ takes it: the `m - floor(m / 100)`-th smallest of `m`, 0 of none."""
    m = len(distances)
    return int(np.partition(distances, m - m // 100 - 1)[m - m // 100 - 1]) if m else 0


def _padding(a: Snapshot, b: Snapshot) -> torch.Tensor | None:
    """The padding of both, at the positions that both have."""
    left, right = a.padding(), b.padding()
    if left is None or right is None:
        return left if right is None else right
    n = min(left.shape[1], right.shape[1])
    return left[:, :n] | right[:, :n]


def _cell(a: Located, b: Located, padding: torch.Tensor | None, bins: int, c: float, threshold: float) -> CellDiff:
    start, stop = max(a.positions.start, b.positions.start), min(a.positions.stop, b.positions.stop)
    n_tokens = max(0, stop - start)
    x, y = (each.tensor if a.token_axis is None else _at(each, start, n_tokens) for each in (a, b))
    n_padding = 0
    if padding is not None:
        (x, n_padding), (y, _) = (without_padding(a, each, padding, start) for each in (x, y))
    found = measure(x, y, a.token_axis, bins, c)
    dim = x.shape[-1]
    n_each = math.prod(a.shape_apart_from_tokens[:-1])
    relative = np.array([_ratio(e, s) for e, s in zip(found.errors, found.squares, strict=True)])
    beyond = relative > threshold if threshold else found.bits_changed > 0
    has_tokens = a.token_axis is not None
    n_all = found.n_vectors - n_padding
    return CellDiff(
        where=a.where,
        name=a.name,
        kind=a.kind,
        layer=a.layer,
        of_sequence=a.of_sequence,
        n_units=dim + -(-dim // MAX_DIM),
        n_vectors=n_all,
        n_only_a=(len(a.positions) - n_tokens) * n_each,
        n_only_b=(len(b.positions) - n_tokens) * n_each,
        n_bits_changed=found.n_bits_changed,
        n_changed=len(found.distances),
        n_not_finite=found.n_not_finite,
        hamming=int(found.hamming.sum()),
        p99=percentile(found.distances),
        p99_norm=percentile(found.norm_steps),
        min_cosine=found.min_cosine,
        mean_cosine=(found.sum_cosine - n_padding) / n_all if n_all else 1.0,
        relative=_ratio(found.errors.sum(), found.squares.sum()),
        max_abs=float(found.max_abs.max(initial=0.0)),
        beyond=bool(beyond.any()),
        first_token=start + int(beyond.argmax()) if has_tokens and beyond.any() else None,
        per_token=_per_token(start, found, relative) if has_tokens else None,
    )


def _at(located: Located, start: int, n_tokens: int) -> torch.Tensor:
    assert located.token_axis is not None
    first = min(max(0, start - located.offset), len(located.positions))
    return located.tensor.narrow(located.token_axis, first, n_tokens)


def _per_token(start: int, found: Measured, relative: Any) -> PerToken:
    return PerToken(start, found.hamming, relative, found.max_abs)


def _ratio(error: float, square: float) -> float:
    """A relative error from two squares."""
    if not error:
        return 0.0
    return math.sqrt(error / square) if square and math.isfinite(square) else math.inf


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
        if name in vectors or name == "generation.input_ids" or name.startswith("trace."):
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


def _names(a: Snapshot, b: Snapshot) -> Iterator[Difference]:
    if a.provenance.model_name != b.provenance.model_name:
        yield Difference("model_name", a.provenance.model_name, b.provenance.model_name)
