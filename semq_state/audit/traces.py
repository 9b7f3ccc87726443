"""Two traces of the same tokens, held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.audit.vectors import NORM_SHIFT
from semq_state.errors import UnsupportedOperationError
from semq_state.sketch import symbols_of
from semq_state.snapshot import Trace


@dataclass(frozen=True, eq=False)
class TraceDiff:
    """How two traces differ, by generated token.

    Args:
        begin: tokens of each row before the first one that both trace.
        n_units: symbols of a print, its norm included.
        hamming: symbols that differ, `(batch, n)`.
        logits: the largest difference among the logits that both list, `(batch, n)`; infinite where they have no id
            in common.
        tokens: whether the chosen tokens differ, `(batch, n)`.
    """

    begin: int
    n_units: int
    hamming: NDArray[np.int64]
    logits: NDArray[np.float32]
    tokens: NDArray[np.bool_]

    @property
    def equal(self) -> bool:
        return not (self.hamming.any() or self.logits.any() or self.tokens.any())

    def first_token(self, *, hamming: int = 0, logits: float = 0.0) -> int | None:
        """The first token, counted from the beginning of the sequence, at which more than this differs."""
        beyond = (self.hamming > hamming) | (self.logits > logits) | self.tokens
        found = np.flatnonzero(beyond.any(axis=0))
        return self.begin + int(found[0]) if len(found) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        logits = float(self.logits.max(initial=0.0))
        return {
            "begin": self.begin,
            "n_tokens": int(self.hamming.shape[1]),
            "first_token": self.first_token(),
            "n_units": self.n_units,
            "n_changed": int((self.hamming > 0).sum()),
            "hamming_max": int(self.hamming.max(initial=0)),
            "logits_max": logits if np.isfinite(logits) else None,
            "n_other_tokens": int(self.tokens.sum()),
        }


def compare_traces(a: Trace, b: Trace) -> TraceDiff:
    """Holds two traces against each other where both have tokens.

    Raises:
        UnsupportedOperationError: they have no token in common, or other rules or rows.
        FormatError: a rule is unknown.
    """
    begin, end = max(a.begin, b.begin), min(a.begin + a.n_tokens, b.begin + b.n_tokens)
    if begin >= end or dict(a.rule) != dict(b.rule) or a.tokens.shape[0] != b.tokens.shape[0]:
        raise UnsupportedOperationError(
            "traces",
            expected="tokens in common, the same rule and rows",
            found=f"tokens {a.begin} to {a.begin + a.n_tokens} and {b.begin} to {b.begin + b.n_tokens}, "
            f"{a.tokens.shape[0]} and {b.tokens.shape[0]} rows",
            do="compare traces of the same run",
        )
    ours, theirs = _part(a, begin, end), _part(b, begin, end)
    shape = ours.tokens.shape
    symbols = [symbols_of(t.prints.flatten(0, 1), t.rule) for t in (ours, theirs)]
    norms = [t.norms.contiguous().numpy().view(np.uint32) >> NORM_SHIFT for t in (ours, theirs)]
    hamming = (symbols[0] != symbols[1]).sum(axis=1).reshape(shape) + (norms[0] != norms[1])
    return TraceDiff(
        begin,
        symbols[0].shape[1] + 1,
        hamming.astype(np.int64),
        _logits(ours, theirs),
        (ours.tokens != theirs.tokens).numpy(),
    )


def _part(trace: Trace, begin: int, end: int) -> Trace:
    cropped = trace.crop(end)
    assert cropped is not None
    n = end - begin
    names = ("tokens", "top_ids", "top_logits", "norms", "prints")
    part = {name: getattr(cropped, name)[:, -n:] for name in names}
    return Trace(begin=begin, rule=trace.rule, rng=trace.rng, **part)


def _logits(a: Trace, b: Trace) -> NDArray[np.float32]:
    same = a.top_ids[..., :, None] == b.top_ids[..., None, :]
    left, right = a.top_logits[..., :, None], b.top_logits[..., None, :]
    # NaN on one side only is a difference; on both it is none, and neither are equal infinities.
    alike = (left == right) | (left.isnan() & right.isnan())
    difference = torch.where(alike, 0.0, (left - right).abs().nan_to_num(float("inf"), float("inf")))
    largest = torch.where(same, difference, -1.0).amax(dim=(-2, -1))
    found: NDArray[np.float32] = torch.where(largest < 0, float("inf"), largest).numpy().astype(np.float32)
    return found
