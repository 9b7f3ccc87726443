"""`MiniMaxCache`: keys and values of some layers, and the linear-attention states of the others beside them."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from semq_state.caches.base import AGAIN, Mark
from semq_state.caches.kinds.base import AbstractKind, DeviceOf
from semq_state.caches.kinds.layered import Dynamic
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import CacheState, LayerState


@final
class MiniMax(AbstractKind):
    """Layers as in a dynamic cache; in the part `linear` one layer each with a `state`, or an empty one."""

    id: ClassVar[str] = "minimax"
    path: ClassVar[str] = "transformers.models.minimax.modeling_minimax.MiniMaxCache"

    def mark(self, cache: Any) -> Mark:
        return Dynamic().mark(cache), tuple(cache.linear_cache)

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        layers = Dynamic().dump(cache, mark[0])
        # The model replaces these tensors at each step.
        linear = tuple(
            LayerState("minimax-linear", {"state": state} if isinstance(state, torch.Tensor) else {})
            for state in mark[1]
        )
        return CacheState(self.id, layers.layers, layers.meta, {"linear": CacheState("minimax-linear", linear)})

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        from transformers.models.minimax.modeling_minimax import MiniMaxCache

        cache = MiniMaxCache()
        cache.layers = Dynamic().rebuild(state, device_of).layers
        cache.linear_cache = [
            layer.tensors["state"].to(device_of(i)) if layer.tensors else []
            for i, layer in enumerate(state.parts["linear"].layers)
        ]
        return cache

    def n_cached(self, state: CacheState) -> int | None:
        return Dynamic().n_cached(state)

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        linear = state.parts.get("linear")
        if linear is None:
            raise IncompleteStateError(where, expected="the linear-attention states", found="none", do=AGAIN)
        for i, layer in enumerate(linear.layers):
            check_rows(layer, ("state",) if layer.tensors else (), batch_size, f"{where}, linear, layer {i}")
            if not layer.tensors and not (i < len(state.layers) and state.layers[i].tensors):
                raise IncompleteStateError(
                    f"{where}, layer {i}",
                    expected="keys and values, or a linear-attention state",
                    found="neither",
                    do="the layer would start anew; take the snapshot again",
                )
        if any(layer.tensors for layer in state.layers):
            Dynamic().check(state, batch_size, n_cached, where)


def check_rows(layer: LayerState, names: tuple[str, ...], batch_size: int, where: str) -> None:
    """Holds a layer's tensors against the names that it needs and the rows that there are.

    Raises:
        IncompleteStateError: one is missing, or has other rows.
    """
    if set(layer.tensors) != set(names):
        raise IncompleteStateError(
            where, expected=", ".join(names) or "no tensors", found=", ".join(layer.tensors) or "none", do=AGAIN
        )
    for name, tensor in layer.tensors.items():
        axis = layer.layout.of(name).batch_axis
        if tensor.numel() and axis is not None and (tensor.ndim <= axis or tensor.shape[axis] != batch_size):
            raise IncompleteStateError(
                f"{where}, {name}", expected=f"{batch_size} rows", found=str(tuple(tensor.shape)), do=AGAIN
            )
