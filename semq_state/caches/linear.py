"""`LinearAttentionLayer`, alone and together with attention: convolution and recurrent states (Mamba, Gated
DeltaNet, LFM's convolutions …).

transformers writes into these tensors at every step, so a mark copies them. They do not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from semq_state.caches.base import AGAIN, AbstractFamily, Mark
from semq_state.caches.dynamic import Dynamic
from semq_state.caches.sliding import Sliding
from semq_state.caches.static import Static, StaticSliding
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState

_STATES = {"conv": "conv_states", "recurrent": "recurrent_states"}
_FLAGS = {"conv": "is_conv_states_initialized", "recurrent": "is_recurrent_states_initialized"}


@final
class Linear(AbstractFamily):
    """`conv.N` and `recurrent.N`, batch first, of as many states as the layer has; mostly one of each."""

    id: ClassVar[str] = "linear"
    layer_type: ClassVar[type | str] = LinearAttentionLayer
    names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("conv.*", "recurrent.*")
    counts: ClassVar[dict[str, int]] = {"n_states": 1}

    def mark(self, layer: Any) -> Mark:
        return dict(_copies(layer)), _settings(layer)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        tensors, meta = mark
        return LayerState(self.id, tensors, {**meta, "filled": bool(tensors)})

    def empty(self, state: LayerState) -> Any:
        return LinearAttentionLayer(number_of_states=state.meta["n_states"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        for name, tensor in state.tensors.items():
            kind, _, number = name.partition(".")
            if kind not in _STATES:
                continue
            at = int(number)
            # A copy: the layer will write into it, and the snapshot must stay as it is.
            getattr(layer, _STATES[kind])[at] = tensor.to(device, copy=True)
            getattr(layer, _FLAGS[kind])[at] = True
            if layer.device is None:
                layer.dtype, layer.device = tensor.dtype, device
        layer.has_previous_state = dict(enumerate(state.meta["has_previous"]))
        layer.conv_kernel_size = dict(enumerate(state.meta["kernel_sizes"]))

    def n_cached(self, state: LayerState) -> int | None:
        return None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_linear(state, where)


class LinearAnd(AbstractFamily):
    """A linear-attention state and the keys and values of attention in one layer.

    Args:
        family_id: the id in files.
        layer_type: transformers' class of both together.
        attention: the family of the attention part.
        make: the empty layer from its scalars.
    """

    names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("conv.*", "recurrent.*", "keys", "values")

    def __init__(
        self,
        family_id: str,
        layer_type: type,
        attention: AbstractFamily,
        make: Callable[[Any], Any],
    ) -> None:
        self.id, self.layer_type = family_id, layer_type  # type: ignore[misc]
        self.counts = {**Linear.counts, **attention.counts}  # type: ignore[misc]
        self._attention, self._make, self._linear = attention, make, Linear()

    def mark(self, layer: Any) -> Mark:
        return self._linear.mark(layer), self._attention.mark(layer)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        linear, attention = self._linear.dump(layer, mark[0]), self._attention.dump(layer, mark[1])
        tensors = {**linear.tensors, **attention.tensors}
        meta = {**linear.meta, **attention.meta, "filled": bool(tensors), "attends": bool(attention.tensors)}
        return LayerState(self.id, tensors, meta)

    def empty(self, state: LayerState) -> Any:
        return self._make(state.meta)

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        self._linear.fill(layer, state, device)
        if "keys" in state.tensors:
            self._attention.fill(layer, state, device)

    def n_cached(self, state: LayerState) -> int | None:
        return self._attention.n_cached(state) if "keys" in state.tensors else None

    def newest(self, layer: Any) -> torch.Tensor | None:
        return self._attention.newest(layer)

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_linear(state, where)
        if state.meta.get("attends") is not ("keys" in state.tensors and "values" in state.tensors):
            raise IncompleteStateError(
                where,
                expected="keys and values" if state.meta.get("attends") else "no keys",
                found=", ".join(sorted(state.tensors)) or "none",
                do="its attention would start anew; take the snapshot again",
            )
        if "keys" in state.tensors:
            attention = {name: state.tensors[name] for name in ("keys", "values") if name in state.tensors}
            self._attention.check(LayerState(self._attention.id, attention, state.meta), batch_size, where)


COMBINED = (
    LinearAnd(
        "linear+dynamic",
        LinearAttentionAndFullAttentionLayer,
        Dynamic(),
        lambda meta: LinearAttentionAndFullAttentionLayer(meta["n_states"]),
    ),
    LinearAnd(
        "linear+sliding",
        LinearAttentionAndSlidingWindowAttentionLayer,
        Sliding(),
        lambda meta: LinearAttentionAndSlidingWindowAttentionLayer(meta["window"], meta["n_states"]),
    ),
    LinearAnd(
        "linear+static",
        LinearAttentionAndStaticFullAttentionLayer,
        Static(),
        lambda meta: LinearAttentionAndStaticFullAttentionLayer(meta["max_length"], meta["n_states"]),
    ),
    LinearAnd(
        "linear+static-sliding",
        LinearAttentionAndStaticSlidingWindowAttentionLayer,
        StaticSliding(),
        lambda meta: LinearAttentionAndStaticSlidingWindowAttentionLayer(
            meta["max_length"], meta["max_length"], meta["n_states"]
        ),
    ),
)
"""Layers that hold both."""


def check_linear(state: LayerState, where: str) -> None:
    """Holds the lists of a linear layer against its number of states.

    Raises:
        IncompleteStateError: they contradict each other, or a state that was there is missing.
    """
    meta, n_states = state.meta, state.meta["n_states"]
    lists: dict[str, Any] = {"has_previous": bool, "kernel_sizes": (int, type(None)), "recurrent": bool}
    for name, kinds in lists.items():
        value = meta.get(name)
        if type(value) is not list or len(value) != n_states or not all(isinstance(v, kinds) for v in value):
            raise IncompleteStateError(where, expected=f"{n_states} values of {name}", found=repr(value), do=AGAIN)
    expected = {f"recurrent.{i}" for i, there in enumerate(meta["recurrent"]) if there}
    expected |= {f"conv.{i}" for i, size in enumerate(meta["kernel_sizes"]) if size is not None}
    found = {name for name in state.tensors if name.partition(".")[0] in _STATES}
    if expected != found:
        raise IncompleteStateError(
            where,
            expected=", ".join(sorted(expected)) or "no states",
            found=", ".join(sorted(found)) or "none",
            do="without its convolution and recurrent states the layer would start anew; take the snapshot again",
        )


def _copies(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for kind, states in _STATES.items():
        for i in range(layer.number_of_states):
            if getattr(layer, _FLAGS[kind])[i]:
                tensor = getattr(layer, states)[i]
                yield f"{kind}.{i}", tensor.clone()


def _settings(layer: Any) -> dict[str, Any]:
    states = range(layer.number_of_states)
    return {
        "n_states": layer.number_of_states,
        "has_previous": [bool(layer.has_previous_state[i]) for i in states],
        "kernel_sizes": [layer.conv_kernel_size[i] for i in states],
        "recurrent": [bool(layer.is_recurrent_states_initialized[i]) for i in states],
    }
