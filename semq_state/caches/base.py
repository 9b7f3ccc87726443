"""What a cache family promises: one kind of transformers cache layer, taken apart and put together again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from semq_state.errors import IncompleteStateError
from semq_state.layouts import FamilyLayout, layout_of
from semq_state.snapshot import LayerState

Mark = Any
"""What a family remembers of a layer so that `dump` can give the state at that moment later on."""

AGAIN = "the file was put together wrongly; take the snapshot again"


class AbstractFamily(ABC):
    """One kind of cache layer.

    A file names the family's `id`, never a class. `names` lists every tensor that a filled layer needs; a state
    that lacks one is refused both when it is taken and when it is restored.

    Attributes:
        id: the family's name in files, a promise that later versions rebuild it.
        layer_type: the exact class of the live layer, or its `module.Class` where importing that module for
            everyone would cost too much.
        names: tensors of every filled layer.
        optional: tensors that some filled layers have besides; `conv.*` stands for all that begin so.
        counts: name to smallest value of the counters that `meta` must hold.
        layout: kinds and axes of the tensors. Families of this package stand in `semq_state.layouts`.
    """

    id: ClassVar[str]
    layer_type: ClassVar[type | str]
    names: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[dict[str, int]] = {}

    @property
    def layout(self) -> FamilyLayout:
        return layout_of(self.id)

    @property
    def layer_path(self) -> str:
        """The layer's class as `module.Class`."""
        kind = self.layer_type
        return kind if isinstance(kind, str) else path_of(kind)

    @abstractmethod
    def mark(self, layer: Any) -> Mark:
        """Remembers where `layer` stands now: no more is copied than what the next step writes over."""

    @abstractmethod
    def dump(self, layer: Any, mark: Mark) -> LayerState:
        """The state of `layer` when `mark` was made, even if a later step was cut short. Shares memory.

        Raises:
            IncompleteStateError: the layer has lost that state since.
        """

    def rebuild(self, state: LayerState, device: torch.device) -> Any:
        """The inverse of `dump`: a new layer that shares `state`'s memory where it may."""
        layer = self.empty(state)
        self.fill(layer, state, device)
        return layer

    @abstractmethod
    def empty(self, state: LayerState) -> Any:
        """A new layer of the settings in `state.meta`, without tensors."""

    @abstractmethod
    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        """Gives an empty layer the tensors and counters of `state`."""

    @abstractmethod
    def n_cached(self, state: LayerState) -> int | None:
        """How many tokens the layer has seen; None where it does not count them."""

    def newest(self, layer: Any) -> torch.Tensor | None:
        """The newest key of a layer that is marked by its length alone, `(batch, kv_heads, head_dim)`."""
        return None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        """Refuses a state that `rebuild` could not make a working layer from.

        Raises:
            IncompleteStateError: a tensor is missing, or shapes contradict each other.
        """
        for count, least in self.counts.items():
            value = state.meta.get(count)
            if type(value) is not int or value < least:
                raise IncompleteStateError(
                    where, expected=f"{count} of {least} or more", found=repr(value), do=AGAIN
                )
        if not state.tensors and not self.needs_tensors(state):
            return
        missing = set(self.names) - set(state.tensors)
        others = [n for n in state.tensors if n not in self.names and not _listed(n, self.optional)]
        if missing or others:
            raise IncompleteStateError(
                where,
                expected=f"{', '.join(self.names)} for a {self.id!r} layer",
                found=", ".join(sorted(state.tensors)) or "none",
                do="the state cannot go on without them; take the snapshot again",
            )
        layout = self.layout
        for name, tensor in state.tensors.items():
            axis = layout.of(name).batch_axis
            if axis is not None and (tensor.ndim <= axis or tensor.shape[axis] != batch_size):
                raise IncompleteStateError(
                    f"{where}, {name}",
                    expected=f"{batch_size} rows on axis {axis}",
                    found=str(tuple(tensor.shape)),
                    do=AGAIN,
                )
        self.check_attention(state, batch_size, where)

    def check_attention(self, state: LayerState, batch_size: int, where: str) -> None:
        """Holds keys and values against each other, where the family has them."""
        names = [name for name in ("keys", "values") if name in state.tensors]
        for name in names:
            if state.tensors[name].ndim != 4:
                raise IncompleteStateError(
                    f"{where}, {name}",
                    expected=f"({batch_size}, kv_heads, seq, head_dim)",
                    found=str(tuple(state.tensors[name].shape)),
                    do=AGAIN,
                )
        if len({state.tensors[name].shape[1:3] for name in names}) > 1:
            raise IncompleteStateError(
                where,
                expected=f"{' and '.join(names)} of one length",
                found=", ".join(str(tuple(state.tensors[name].shape)) for name in names),
                do=AGAIN,
            )

    def needs_tensors(self, state: LayerState) -> bool:
        """Whether a layer in this state must hold tensors (a layer that was never used need not)."""
        return bool(state.meta.get("filled", True))


def require_length(tensor: torch.Tensor, axis: int, expected: int, where: str) -> None:
    """Refuses a tensor that does not hold `expected` tokens.

    Raises:
        IncompleteStateError: it does not.
    """
    if tensor.shape[axis] != expected:
        raise IncompleteStateError(where, expected=f"{expected} tokens", found=f"{tensor.shape[axis]}", do=AGAIN)


def path_of(kind: type) -> str:
    """`module.Class` of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _listed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in patterns)
