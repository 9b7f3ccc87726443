"""A run token by token: what was chosen, from what, and a print of the last hidden state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.errors import IncompleteStateError
from semq_state.snapshot.cache import Tensors, take_rows

NAMES = ("tokens", "top_ids", "top_logits", "norms", "prints")
_KINDS = ((torch.int64, 2), (torch.int32, 3), (torch.float32, 3), (torch.float32, 2), (torch.uint8, 3))


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

    def check(self, n_rows: int) -> None:
        """Refuses tensors that do not belong together; for what a file tells.

        Raises:
            IncompleteStateError: they do not.
        """
        n, kinds = self.tokens.shape[-1] if self.tokens.ndim else 0, dict(zip(NAMES, _KINDS, strict=True))
        for name, (dtype, n_dims) in kinds.items():
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.ndim != n_dims or tuple(tensor.shape[:2]) != (n_rows, n):
                raise IncompleteStateError(
                    f"trace.{name}",
                    expected=f"{dtype} of {n_dims} axes, ({n_rows}, {n}) first",
                    found=f"{tensor.dtype} {tuple(tensor.shape)}",
                    do="the file was put together wrongly; use another copy",
                )
        if self.top_ids.shape != self.top_logits.shape:
            raise IncompleteStateError("trace.top_ids", expected="as many ids as logits", found="others")

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

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Trace:
        changed = {name: function(getattr(self, name)) for name in NAMES}
        return Trace(begin=self.begin, rule=self.rule, rng=self.rng, **changed)
