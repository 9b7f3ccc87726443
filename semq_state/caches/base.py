"""What a cache family promises: one kind of transformers cache layer, taken apart and put together again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState

Mark = Any
"""What a family remembers of a layer so that `dump` can give the state at that moment later on."""


class AbstractFamily(ABC):
    """One kind of cache layer.

    A file names the family's `id`, never a class. `names` lists every tensor that a filled layer needs; a state
    that lacks one is refused both when it is taken and when it is restored.
    """

    id: ClassVar[str]
    layer_type: ClassVar[type]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def mark(self, layer: Any) -> Mark:
        """Remembers where `layer` stands now, in constant time and memory."""

    @abstractmethod
    def dump(self, layer: Any, mark: Mark) -> LayerState:
        """The state of `layer` when `mark` was made, even if a later step was cut short. Shares memory.

        Raises:
            IncompleteStateError: the layer has lost that state since.
        """

    @abstractmethod
    def rebuild(self, state: LayerState, device: torch.device) -> Any:
        """The inverse of `dump`: a new layer that shares `state`'s memory where it may."""

    @abstractmethod
    def n_cached(self, state: LayerState) -> int | None:
        """How many tokens the layer has seen; None where it does not count them."""

    def can_step_back(self, state: LayerState) -> bool:
        """Whether a layer in this state can give back its last token, to have it computed again."""
        return True

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        """Refuses a state that `rebuild` could not make a working layer from.

        Raises:
            IncompleteStateError: a tensor is missing, or shapes contradict each other.
        """
        if not state.tensors and not self.needs_tensors(state):
            return
        missing = set(self.names) - set(state.tensors)
        if missing:
            raise IncompleteStateError(
                where,
                expected=f"{', '.join(self.names)} for a {self.id!r} layer",
                found=", ".join(sorted(state.tensors)) or "none",
                do="the state cannot go on without them; take the snapshot again",
            )
        for name in self.names:
            tensor = state.tensors[name]
            if tensor.ndim != 4 or tensor.shape[0] != batch_size:
                raise IncompleteStateError(
                    f"{where}, {name}",
                    expected=f"({batch_size}, kv_heads, seq, head_dim)",
                    found=str(tuple(tensor.shape)),
                    do="the file was put together wrongly; take the snapshot again",
                )
        lengths = {state.tensors[name].shape[1:3] for name in self.names}
        if len(lengths) > 1:
            raise IncompleteStateError(
                where,
                expected=f"{' and '.join(self.names)} of one length",
                found=", ".join(str(tuple(state.tensors[name].shape)) for name in self.names),
                do="the file was put together wrongly; take the snapshot again",
            )

    def needs_tensors(self, state: LayerState) -> bool:
        """Whether a layer in this state must hold tensors (a layer that was never used need not)."""
        return bool(state.meta.get("filled", True))
