"""Hidden states of chosen tokens: one row each, padding left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.errors import IncompleteStateError, UnsupportedOperationError
from semq_state.snapshot.cache import Tensors

SEQUENCE, ENCODER = "sequence", "encoder"
"""The streams of tokens that a model may have: what it reads or writes, and what an encoder beside reads."""

MAX_DOCUMENT, MAX_POSITION = 1 << 31, 1 << 32
"""Documents and positions are smaller, so that both fit into one int64."""


@dataclass(frozen=True, eq=False)
class HiddenRows:
    """Hidden states of one stream of tokens.

    Args:
        rows: the id of each row, (document, position), `(n, 2)` int64, increasing. In a snapshot documents are the
            rows of the batch. Positions count a document's own tokens from 0, so padding never moves them; what is
            pooled over a document stands at position 0.
        token_ids: the token at which each row stands, `(n,)` int64; -1 where it is pooled or has no id.
        states: the name of each site, `hidden_states.12` or the path of a module, to its states, `(n, dim)`.
        tokens: which were kept: `all`, `generated`, `last`, positions as in a slice (`0:64:`, `-8::`), or `chosen`
            by a rule that looks at each alone.
        pool: `mean` or `last` over each document; empty where each token has its own row.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    states: Tensors
    tokens: str = "all"
    pool: str = ""

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    @property
    def n_bytes(self) -> int:
        """Raw size of the states."""
        return sum(t.numel() * t.element_size() for t in self.states.values())

    def of(self, document: int) -> HiddenRows:
        """The rows of one document, in order; none where it has none. Shares memory."""
        at = (self.rows[:, 0] == document).nonzero().flatten()
        if not len(at):
            return self._mapped(lambda t: t[:0])
        start, stop = int(at[0]), int(at[-1]) + 1
        return self._mapped(lambda t: t[start:stop])

    def check(self, where: str, n_documents: int = MAX_DOCUMENT) -> None:
        """Refuses tensors that do not belong together; for what a file tells.

        Args:
            where: what they are called.
            n_documents: documents are smaller.

        Raises:
            IncompleteStateError: they do not.
        """
        n = self.rows.shape[0] if self.rows.ndim else 0
        wanted = {"rows": (torch.int64, (n, 2)), "token_ids": (torch.int64, (n,))}
        for name, (dtype, shape) in wanted.items():
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise _wrong(f"{where}.{name}", f"{dtype} {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
        for name, tensor in self.states.items():
            if not tensor.is_floating_point() or tensor.ndim != 2 or tensor.shape[0] != n:
                raise _wrong(
                    f"{where}.states.{name:.80}", f"floats ({n}, dim)", f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        ids = self.rows
        if n and int(ids[:, 0].max()) >= n_documents:
            raise _wrong(f"{where}.rows", f"documents below {n_documents}", str(int(ids[:, 0].max())))
        if n and (int(ids.min()) < 0 or int(ids.max()) >= MAX_POSITION or not bool((keys(ids).diff() > 0).all())):
            raise _wrong(f"{where}.rows", "(document, position), increasing from 0", "others")

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every tensor under its name in a file."""
        named = {f"{prefix}rows": self.rows, f"{prefix}token_ids": self.token_ids}
        return named | {f"{prefix}states.{name}": t for name, t in sorted(self.states.items())}

    def structure(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        return {"states": sorted(self.states), "tokens": self.tokens, "pool": self.pool}

    def crop(self, n_tokens: Sequence[int]) -> HiddenRows:
        """The rows of the first `n_tokens[document]` tokens of each document.

        Raises:
            UnsupportedOperationError: what was kept cannot be told for fewer tokens.
        """
        if self.pool or self.tokens == "last" or "-" in self.tokens:
            raise UnsupportedOperationError(
                "hidden states",
                expected="a row for each token",
                found=f"pool={self.pool!r}" if self.pool else f"tokens={self.tokens!r}",
                do="drop them first: dataclasses.replace(snapshot, hidden={})",
            )
        at = self.rows.cpu()
        kept = at[:, 1] < torch.tensor(n_tokens)[at[:, 0]]
        return self._mapped(lambda t: t[kept.to(t.device)])

    def select(self, documents: Sequence[int]) -> HiddenRows:
        """The rows of these documents, which are numbered anew from 0; one may be named more than once."""
        found = [self.of(document) for document in documents]
        ids = [torch.stack([torch.full_like(r.rows[:, 0], i), r.rows[:, 1]], 1) for i, r in enumerate(found)]
        return dataclasses.replace(
            self,
            rows=torch.cat(ids),
            token_ids=torch.cat([each.token_ids for each in found]),
            states={name: torch.cat([each.states[name] for each in found]) for name in self.states},
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> HiddenRows:
        """The rows with `function` applied to each tensor of states."""
        return dataclasses.replace(self, states={name: function(t) for name, t in self.states.items()})

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> HiddenRows:
        changed = {name: function(t) for name, t in self.states.items()}
        return dataclasses.replace(
            self, rows=function(self.rows), token_ids=function(self.token_ids), states=changed
        )


def keys(rows: torch.Tensor) -> torch.Tensor:
    """Row ids `(n, 2)` as one int64 each, in the same order."""
    return rows[:, 0] * MAX_POSITION + rows[:, 1]


def hidden_tensors(hidden: Mapping[str, HiddenRows]) -> dict[str, torch.Tensor]:
    """Every tensor of all streams under its name in a file."""
    return {n: t for name, each in sorted(hidden.items()) for n, t in each.tensors(f"hidden.{name}.").items()}


def _wrong(where: str, expected: str, found: str) -> IncompleteStateError:
    return IncompleteStateError(
        where, expected=expected, found=found, do="the file was put together wrongly; use another copy"
    )
