"""What `capture(trace=True)` keeps of each generated token: see `Trace`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.errors import UnsupportedModelError, UnsupportedOperationError
from semq_state.generation.random import dump_rng
from semq_state.sketch import sketch_rule, sketched
from semq_state.snapshot import Trace

TOP_K = 8


@dataclass(frozen=True)
class _Token:
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor
    norms: torch.Tensor
    prints: torch.Tensor


def tracers(modules: Mapping[str, Any]) -> dict[str, Tracer]:
    """A tracer for each of the modules that generate, by path.

    Raises:
        UnsupportedModelError: none of them has output embeddings, whose input is the last hidden state.
    """
    heads = {path: _head(module) for path, module in modules.items()}
    found = {path: Tracer(modules[path], head) for path, head in heads.items() if head is not None}
    if not found:
        raise UnsupportedModelError(
            ", ".join(sorted({type(module).__name__ for module in modules.values()})),
            expected="output embeddings, whose input is the last hidden state",
            found="none",
            do="capture without trace=True",
        )
    return found


def _head(module: Any) -> torch.nn.Module | None:
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, torch.nn.Module) else None


class Tracer:
    """Takes notes of one model's run: hidden states from its output embeddings, logits and tokens from its loop.

    Args:
        model: the `PreTrainedModel` that generates.
        head: its output embeddings.
    """

    def __init__(self, model: Any, head: torch.nn.Module) -> None:
        self._model = model
        self._head = head
        self._hidden: torch.Tensor | None = None
        self.begin()

    @contextlib.contextmanager
    def listening(self, *, whole: bool = False) -> Iterator[None]:
        """Hears the last hidden state of each forward pass in the `with`, or with `whole` those of all tokens."""

        def hear(module: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                hidden = args[0].detach()
                self._hidden = hidden[:, -1] if hidden.ndim == 3 and not whole else hidden

        handle = self._head.register_forward_pre_hook(hear)
        try:
            yield
        finally:
            handle.remove()

    def heard(self) -> torch.Tensor:
        """What the last forward pass gave, `(batch, hidden)` or `(batch, seq, hidden)`."""
        assert self._hidden is not None
        return self._hidden

    def begin(self) -> None:
        """A new run begins."""
        self._begin: int | None = None
        self._tokens: list[_Token] = []
        self._dim = 0
        self._hidden = None
        self._rng = dump_rng(self._model)

    def finish(self, input_ids: torch.Tensor, logits: torch.Tensor | None) -> None:
        """Another token of each row was chosen.

        Raises:
            UnsupportedOperationError: it was not chosen from one step's logits.
        """
        hidden, self._hidden = self._hidden, None
        n_tokens = int(input_ids.shape[1])
        if logits is None or (self._begin is not None and n_tokens != self._begin + len(self._tokens) + 1):
            raise UnsupportedOperationError(
                "capture(trace=True)",
                expected="a loop that chooses one token of each row at a time",
                found="an assisted loop or a beam search",
                do="capture without trace=True",
            )
        if hidden is None or hidden.shape[0] != logits.shape[0]:
            # A resume that starts from kept logits computes nothing for its first token.
            self._rng = dump_rng(self._model)
            return
        self._begin = n_tokens - 1 if self._begin is None else self._begin
        self._dim = int(hidden.shape[-1])
        top = logits.detach().float().topk(min(TOP_K, logits.shape[-1]), dim=-1)
        norms, prints = sketched(hidden)
        self._tokens.append(
            _Token(input_ids[:, -1].cpu(), top.indices.to("cpu", torch.int32), top.values.cpu(), norms, prints)
        )

    def trace(self) -> Trace | None:
        """What was noted so far; None before the first token."""
        if self._begin is None:
            return None
        tokens = self._tokens
        return Trace(
            self._begin,
            torch.stack([t.chosen for t in tokens], 1),
            torch.stack([t.top_ids for t in tokens], 1),
            torch.stack([t.top_logits for t in tokens], 1),
            torch.stack([t.norms for t in tokens], 1),
            torch.stack([t.prints for t in tokens], 1),
            sketch_rule(self._dim),
            self._rng,
        )
