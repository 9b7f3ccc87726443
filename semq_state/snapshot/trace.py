"""A run token by token, small enough to keep for each: what was chosen, from what, and a print of the last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.snapshot.cache import Tensors, take_rows

NAMES = ("tokens", "top_ids", "top_logits", "norms", "prints")


@dataclass(frozen=True, eq=False)
class Trace:
    """Evidence of a run, per generated token.

    Args:
        begin: tokens of each row before the first one that is traced.
        tokens: the chosen tokens, `(batch, n)` int64.
        top_ids: the ids with the largest raw logits, largest first, `(batch, n, k)` int32.
        top_logits: those logits, before any processor, `(batch, n, k)` float32.
        norms: norm of the last hidden state from which they were computed, `(batch, n)` float32.
        prints: packed symbols of its direction, `(batch, n, n_bytes)` uint8.
        rule: how the symbols are made.
        rng: torch's random state before the first traced token was chosen, by device.
    """

    begin: int
    tokens: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor
    norms: torch.Tensor
    prints: torch.Tensor
    rule: Mapping[str, Any]
    rng: Tensors = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Traced tokens of each row."""
        return int(self.tokens.shape[1])

    @property
    def bytes_per_token(self) -> int:
        """Raw size of what is kept of one token of one row."""
        row = (self.tokens, self.top_ids, self.top_logits, self.norms, self.prints)
        return sum(t.element_size() * t.shape[2:].numel() for t in row)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its name in a file."""
        named = {f"trace.{name}": getattr(self, name) for name in NAMES}
        return named | {f"trace.rng.{name}": t for name, t in sorted(self.rng.items())}

    def structure(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        return {"begin": self.begin, "rule": dict(self.rule), "rng": sorted(self.rng)}

    def crop(self, n_tokens: int) -> Trace | None:
        """What it tells of the first `n_tokens` tokens of each row; None where that is nothing."""
        n = min(self.n_tokens, n_tokens - self.begin)
        return self._mapped(lambda t: t[:, :n]) if n > 0 else None

    def select(self, rows: torch.Tensor) -> Trace:
        """What it tells of these rows."""
        return self._mapped(lambda t: take_rows(t, rows))

    def _mapped(self, function: Any) -> Trace:
        return Trace(self.begin, *(function(getattr(self, name)) for name in NAMES), self.rule, self.rng)
