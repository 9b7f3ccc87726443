"""From two tensors that belong together to the cell of a report that tells how they differ."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from semq_state.audit.pairing import Located, without_padding
from semq_state.audit.report import CellDiff, PerToken
from semq_state.audit.vectors import Doubles, Integers, measure
from semq_state.codecs.semq_rules import MAX_DIM


@dataclass(frozen=True)
class Rule:
    """By what vectors are compared.

    Args:
        bins: of each sign, of SEMQ's `quant`.
        c: its range factor.
        threshold: relative error of a token's vectors beyond which it counts as parted; at 0 any bit does.
    """

    bins: int
    c: float
    threshold: float = 0.0


def located_cell(a: Located, b: Located, padding: torch.Tensor | None, rule: Rule) -> CellDiff:
    """Compares two tensors at the positions that both have.

    Args:
        a: a tensor of the first state.
        b: its counterpart, of one shape apart from tokens.
        padding: of both, `(batch, seq)`; what stands there is not compared.
        rule: by what.
    """
    start, stop = max(a.positions.start, b.positions.start), min(a.positions.stop, b.positions.stop)
    n_tokens = max(0, stop - start)
    x, y = (each.tensor if a.token_axis is None else _at(each, start, n_tokens) for each in (a, b))
    n_padding = 0
    if padding is not None:
        (x, n_padding), (y, _) = (without_padding(a, each, padding, start) for each in (x, y))
    found = measure(x, y, a.token_axis, rule.bins, rule.c)
    n_each = math.prod(a.shape_apart_from_tokens[:-1])
    relative = ratios(found.errors, found.squares)
    beyond = relative > rule.threshold if rule.threshold else found.bits_changed > 0
    has_tokens = a.token_axis is not None
    n_all = found.n_vectors - n_padding
    return CellDiff(
        where=a.where,
        name=a.name,
        kind=a.kind,
        layer=a.layer,
        of_sequence=a.of_sequence,
        n_units=n_units(x.shape[-1]),
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
        relative=ratio(found.errors.sum(), found.squares.sum()),
        max_abs=float(found.max_abs.max(initial=0.0)),
        beyond=bool(beyond.any()),
        first_token=start + int(beyond.argmax()) if has_tokens and beyond.any() else None,
        per_token=PerToken(start, found.hamming, relative, found.max_abs) if has_tokens else None,
    )


def n_units(dim: int) -> int:
    """Symbols of a vector: one of each number, and one of the norm of each piece."""
    return dim + -(-dim // MAX_DIM)


def percentile(distances: Integers) -> int:
    """The 99th percentile as SEMQ takes it: the `m - floor(m / 100)`-th smallest of `m`, 0 of none."""
    m = len(distances)
    return int(np.partition(distances, m - m // 100 - 1)[m - m // 100 - 1]) if m else 0


def ratio(error: float, square: float) -> float:
    """A relative error from two squares."""
    return float(ratios(np.array([error]), np.array([square]))[0])


def ratios(errors: Doubles, squares: Doubles) -> Doubles:
    """Relative errors from squared norms: of a difference, and of what it is taken by, each `(n,)`."""
    with np.errstate(all="ignore"):
        found = np.sqrt(errors / squares)
    found[(squares == 0) | ~np.isfinite(squares)] = np.inf
    found[errors == 0] = 0.0
    return found


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key by which `layers.2` comes before `layers.10`."""
    numbers = [re.fullmatch(r"[0-9]{1,9}", part) for part in name.split(".")]
    return tuple(
        (n is not None, int(n[0]) if n else 0, part) for n, part in zip(numbers, name.split("."), strict=True)
    )


def _at(located: Located, start: int, n_tokens: int) -> torch.Tensor:
    assert located.token_axis is not None
    first = min(max(0, start - located.offset), len(located.positions))
    return located.tensor.narrow(located.token_axis, first, n_tokens)
