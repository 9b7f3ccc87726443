"""How two runs of vectors differ: bits, SEMQ symbols, directions and values, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import MAX_DIM, TINY, Quant

BLOCK = 1 << 15
"""Values worked on at a time, so that temporaries stay in the cache and torch starts no threads of its own."""

NORM_SHIFT = 12
"""Bits of a float32 norm that its symbol leaves out: what stays are relative steps of 2^-11."""

MOST_STEPS = 1 << (31 - NORM_SHIFT)
"""Between any two norms."""

_NONE = np.zeros(0, np.int64)
_MAX = float(np.finfo(np.float32).max)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Measured:
    """What two aligned tensors of `n_tokens * n_each` vectors differ in. Arrays are `(n_tokens,)`.

    Args:
        n_vectors: vectors compared.
        n_bits_changed: how many of them differ in any bit.
        n_not_finite: how many hold NaN or infinity on either side.
        distances: Hamming distance of each vector whose symbols differ, in no order.
        norm_steps: by how many steps the norm's symbol of each of these changed.
        bits_changed: of each token, how many vectors differ in any bit.
        hamming: of each token, the sum of its vectors' Hamming distances.
        squares: of each token, the squared norm of the first side's vectors.
        errors: of each token, the squared norm of the difference; infinite where a vector is not finite.
        max_abs: of each token, the largest absolute difference; infinite where a vector is not finite.
        min_cosine: the smallest cosine of a vector with its counterpart.
        sum_cosine: the sum of all cosines.
        same: whether both are the same bytes throughout; then `squares` was not computed, and is 0.
    """

    n_vectors: int
    n_bits_changed: int
    n_not_finite: int
    distances: Integers
    norm_steps: Integers
    bits_changed: Integers
    hamming: Integers
    squares: Doubles
    errors: Doubles
    max_abs: Doubles
    min_cosine: float
    sum_cosine: float
    same: bool = False


def measure(a: torch.Tensor, b: torch.Tensor, axis: int | None, bins: int, c: float) -> Measured:
    """Compares vectors along the last axis.

    Args:
        a: floating tensor.
        b: one of the same shape; of another dtype, both are compared as float32.
        axis: the axis of tokens; None for none, and all vectors then count as one token's.
        bins: of each sign, of SEMQ's `quant`.
        c: its range factor.
    """
    a, b = a.detach().cpu(), b.detach().cpu()
    n_tokens = 1 if axis is None else a.shape[axis]
    n_each = a.numel() // max(1, n_tokens * a.shape[-1])
    totals = _Totals(n_tokens, n_each)
    same = not a.numel() or _same_bytes(a, b)
    if not same:
        for start, stop, x, y in _blocks(a, b, axis):
            totals.add(start, stop, x, y, bins, c)
    return totals.measured(same)


def row_squares(rows: torch.Tensor) -> Doubles:
    """The squared norm of each row of `(n, dim)`, as `measure` tells it of rows that differ; `(n,)`."""
    rows = rows.detach().cpu()
    step = max(1, BLOCK // max(1, rows.shape[-1]))
    blocks = [_squares(_as_float32(rows[start : start + step])) for start in range(0, len(rows), step)]
    return np.concatenate([np.zeros(0), *blocks])


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    x, y = _bits(a), _bits(b)
    if not (x.is_contiguous() and y.is_contiguous()):
        return torch.equal(x, y)
    # More at a time would start torch's own threads, on cores that have work already.
    x, y = x.view(-1), y.view(-1)
    return all(torch.equal(x[i : i + BLOCK], y[i : i + BLOCK]) for i in range(0, len(x), BLOCK))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same size; NaNs then are equal to themselves, and zeros have signs."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def _blocks(
    a: torch.Tensor, b: torch.Tensor, axis: int | None
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Vectors `(n, dim)` of tokens `start` to `stop` of both; without a token axis a few at a time, as of one."""
    dim = a.shape[-1]
    if axis is None:
        x, y = a.reshape(-1, dim), b.reshape(-1, dim)
        step = max(1, BLOCK // dim)
        for start in range(0, len(x), step):
            yield 0, 1, x[start : start + step], y[start : start + step]
        return
    n_tokens = a.shape[axis]
    step = max(1, BLOCK // max(1, a.numel() // n_tokens))
    for start in range(0, n_tokens, step):
        n = min(step, n_tokens - start)
        x, y = (t.narrow(axis, start, n).movedim(axis, 0).reshape(-1, dim) for t in (a, b))
        yield start, start + n, x, y


class _Totals:
    """Sums over blocks."""

    def __init__(self, n_tokens: int, n_each: int) -> None:
        self._n_vectors = n_tokens * n_each
        self._n_bits_changed = self._n_not_finite = 0
        self._distances: list[Integers] = []
        self._norm_steps: list[Integers] = []
        self._bits_changed, self._hamming = np.zeros(n_tokens, np.int64), np.zeros(n_tokens, np.int64)
        self._squares, self._errors = np.zeros(n_tokens), np.zeros(n_tokens)
        self._max_abs = np.zeros(n_tokens)
        self._lost_cosine, self._min_cosine = 0.0, 1.0

    def add(self, start: int, stop: int, x: torch.Tensor, y: torch.Tensor, bins: int, c: float) -> None:
        tokens = slice(start, stop)
        ours, theirs = _as_float32(x), _as_float32(y)
        if x.dtype == y.dtype:
            changed: Flags = (_bits(x).numpy() != _bits(y).numpy()).any(axis=1)
        else:
            changed = (ours.view(np.uint32) != theirs.view(np.uint32)).any(axis=1)
        squares = _squares(ours)
        self._squares[tokens] += _per_token(squares, stop - start)
        at = np.flatnonzero(changed)
        if not len(at):
            return
        compared = _compared(ours[at], theirs[at], squares[at], bins, c)
        self._n_bits_changed += len(at)
        self._n_not_finite += int(np.count_nonzero(~compared.finite))
        differs = compared.hamming > 0
        self._distances.append(compared.hamming[differs])
        self._norm_steps.append(compared.norm_steps[differs])
        self._lost_cosine += float((1 - compared.cosines).sum())
        self._min_cosine = min(self._min_cosine, float(compared.cosines.min()))
        where = start + at // (len(changed) // (stop - start))
        np.add.at(self._bits_changed, where, 1)
        np.add.at(self._hamming, where, compared.hamming)
        np.add.at(self._errors, where, compared.errors)
        np.maximum.at(self._max_abs, where, compared.max_abs)

    def measured(self, same: bool) -> Measured:
        n = self._n_vectors
        return Measured(
            n_vectors=n,
            n_bits_changed=self._n_bits_changed,
            n_not_finite=self._n_not_finite,
            distances=np.concatenate([_NONE, *self._distances]),
            norm_steps=np.concatenate([_NONE, *self._norm_steps]),
            bits_changed=self._bits_changed,
            hamming=self._hamming,
            squares=self._squares,
            errors=self._errors,
            max_abs=self._max_abs,
            min_cosine=self._min_cosine,
            sum_cosine=n - self._lost_cosine,
            same=same,
        )


@dataclass(frozen=True, eq=False)
class _Compared:
    """Of each vector of two lists."""

    finite: Flags
    hamming: Integers
    norm_steps: Integers
    cosines: Doubles
    errors: Doubles
    max_abs: Doubles


def _compared(a: Floats, b: Floats, a_squares: Doubles, bins: int, c: float) -> _Compared:
    b_squares = _squares(b)
    with np.errstate(all="ignore"):
        apart = a.astype(np.float64)
        apart -= b
        dots = np.einsum("ij,ij->i", a, b, dtype=np.float64)
        errors = np.einsum("ij,ij->i", apart, apart)
        max_abs = np.abs(apart, out=apart).max(axis=1)
        lengths = np.sqrt(a_squares) * np.sqrt(b_squares)
        cosines = np.where(lengths > 0, dots / lengths, (a_squares == b_squares).astype(np.float64))
        finite = np.isfinite(a_squares) & np.isfinite(b_squares)
    hamming, norm_steps = np.zeros(len(a), np.int64), np.zeros(len(a), np.int64)
    for start in range(0, a.shape[1], MAX_DIM):
        part = slice(start, start + MAX_DIM)
        whole = a.shape[1] <= MAX_DIM
        x, y = (a, b) if whole else (a[:, part], b[:, part])
        squares = (a_squares, b_squares) if whole else (_squares(x), _squares(y))
        changed, steps = _hamming(x, y, *squares, finite, bins, c)
        hamming += changed
        norm_steps = np.maximum(norm_steps, steps)
    n_units = a.shape[1] + -(-a.shape[1] // MAX_DIM)
    return _Compared(
        finite,
        np.where(finite, hamming, n_units),
        np.where(finite, norm_steps, MOST_STEPS),
        np.where(finite, np.clip(cosines, -1, 1), 0.0),
        np.where(finite, errors, np.inf),
        np.where(finite, max_abs, np.inf),
    )


def _hamming(
    a: Floats, b: Floats, a_squares: Doubles, b_squares: Doubles, finite: Flags, bins: int, c: float
) -> tuple[Integers, Integers]:
    """Units of two lists of vectors that differ, the symbols of the directions and the norm; and by how many steps
    the norm does. 0 for those that are not finite."""
    rule = Quant(a.shape[1], bins, c)
    symbols, norms = [], []
    for values, squares in ((a, a_squares), (b, b_squares)):
        norm = np.where(finite, np.minimum(np.sqrt(squares, where=finite, out=np.zeros_like(squares)), _MAX), 0)
        norm = norm.astype(np.float32)
        norm[norm < TINY] = 0
        with np.errstate(all="ignore"):
            units: Floats = values / np.where(norm > 0, norm, 1).astype(np.float32)[:, None]
        if not finite.all():
            units[~finite] = 0
        symbols.append(rule.symbols(units))
        norms.append((norm.view(np.uint32) >> np.uint32(NORM_SHIFT)).astype(np.int64))
    changed: Integers = np.count_nonzero(symbols[0] != symbols[1], axis=1).astype(np.int64)
    changed += norms[0] != norms[1]
    return changed, np.abs(norms[0] - norms[1])


def _as_float32(vectors: torch.Tensor) -> Floats:
    if vectors.dtype == torch.bfloat16:
        bits = vectors.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        bits <<= np.uint32(16)
        floats: Floats = bits.view(np.float32)
        return floats
    return np.ascontiguousarray(vectors.float().numpy())


def _squares(vectors: Floats) -> Doubles:
    with np.errstate(all="ignore"):
        squares: Doubles = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return squares


def _per_token(values: NDArray[Any], n_tokens: int) -> NDArray[Any]:
    summed: NDArray[Any] = values.reshape(n_tokens, -1).sum(axis=1)
    return summed
