"""`StaticLayer`, `StaticSlidingWindowLayer` and `StaticIndexedLayer`: buffers of a fixed length, written in place.

Only the tokens that are there are kept: the rest of a buffer is zeros. The length of the buffer is kept as well,
for attention over a longer one rounds otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import StaticIndexedLayer, StaticLayer, StaticSlidingWindowLayer

from semq_state.caches.base import AbstractFamily, Mark, require_length
from semq_state.caches.dynamic import grown
from semq_state.caches.indexed import OPTIONAL, check_index, indexed_length
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState


@final
class Static(AbstractFamily):
    """The tokens at the start of a buffer of `max_length`."""

    id: ClassVar[str] = "static"
    layer_type: ClassVar[type | str] = StaticLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")
    counts: ClassVar[dict[str, int]] = {"max_length": 1, "n_seen": 0}

    def mark(self, layer: Any) -> Mark:
        return _length(layer)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        meta = {"max_length": layer.max_cache_len, "n_seen": mark, "filled": bool(mark)}
        if not mark:
            return LayerState(self.id, {}, meta)
        # The buffer will be written over by the model's next call of `generate`.
        tensors = {name: t.clone() for name, t in grown(layer, mark, _length(layer)).items()}
        return LayerState(self.id, tensors, meta)

    def empty(self, state: LayerState) -> Any:
        return StaticLayer(state.meta["max_length"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill_buffers(layer, state, device)

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def newest(self, layer: Any) -> torch.Tensor | None:
        n_tokens = _length(layer)
        return layer.keys[:, :, n_tokens - 1].clone() if n_tokens else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_buffers(state, where)


@final
class StaticSliding(AbstractFamily):
    """The tokens of a buffer that is as long as the window, and moves on once it is full."""

    id: ClassVar[str] = "static-sliding"
    layer_type: ClassVar[type | str] = StaticSlidingWindowLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")
    counts: ClassVar[dict[str, int]] = {"max_length": 1, "n_seen": 0, "n_counted": 0}

    def mark(self, layer: Any) -> Mark:
        if not layer.is_initialized:
            return None
        kept = min(layer.cumulative_length_int, layer.max_cache_len)
        tensors = {"keys": layer.keys[:, :, :kept].clone(), "values": layer.values[:, :, :kept].clone()}
        return tensors, layer.cumulative_length_int, int(layer.cumulative_length)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        tensors, n_seen, n_counted = mark or ({}, 0, 0)
        # transformers stops counting in the tensor, though not beside it, once the window is full.
        meta = {"max_length": layer.max_cache_len, "n_seen": n_seen, "n_counted": n_counted, "filled": bool(n_seen)}
        return LayerState(self.id, tensors if n_seen else {}, meta)

    def empty(self, state: LayerState) -> Any:
        length = state.meta["max_length"]
        return StaticSlidingWindowLayer(max_cache_len=length, sliding_window=length)

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill_buffers(layer, state, device)
        layer.cumulative_length.fill_(state.meta["n_counted"])
        layer.cumulative_length_int = state.meta["n_seen"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_buffers(state, where)


@final
class StaticIndexed(AbstractFamily):
    """A `static` layer with the keys of an indexer beside it, as an `indexed` one."""

    id: ClassVar[str] = "static-indexed"
    layer_type: ClassVar[type | str] = StaticIndexedLayer
    names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = OPTIONAL
    counts: ClassVar[dict[str, int]] = {"max_length": 1, "n_seen": 0}

    def mark(self, layer: Any) -> Mark:
        n_index = int(layer.indexer_cumulative_length) if layer.is_indexer_initialized else 0
        return _length(layer), n_index, layer.indexer_position_ids

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        n_tokens, n_index, positions = mark
        tensors = grown(layer, n_tokens, _length(layer)) if n_tokens else {}
        if n_index:
            tensors["index_keys"] = layer.indexer_keys[:, :n_index]
        if positions is not None:
            tensors["index_positions"] = positions
        meta = {"max_length": layer.max_cache_len, "n_seen": n_tokens, "filled": bool(tensors)}
        kept = {name: t.clone() for name, t in tensors.items()}
        return LayerState(self.id, kept, {**meta, "holds": sorted(kept)})

    def empty(self, state: LayerState) -> Any:
        return StaticIndexedLayer(state.meta["max_length"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        if "keys" in state.tensors:
            fill_buffers(layer, state, device)
        if "index_keys" in state.tensors:
            keys = state.tensors["index_keys"].to(device)
            layer.lazy_initialization_indexer(keys)
            layer.indexer_keys[:, : keys.shape[1]] = keys
            layer.indexer_cumulative_length.fill_(keys.shape[1])
        if "index_positions" in state.tensors:
            layer.indexer_position_ids = state.tensors["index_positions"].to(device)

    def n_cached(self, state: LayerState) -> int | None:
        return indexed_length(state)

    def newest(self, layer: Any) -> torch.Tensor | None:
        n_tokens = _length(layer)
        return layer.keys[:, :, n_tokens - 1].clone() if n_tokens else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_buffers(state, where)
        check_index(state, where)


def fill_buffers(layer: Any, state: LayerState, device: torch.device) -> None:
    """Allocates an empty static layer's buffers and writes the kept tokens to their start."""
    if not state.tensors:
        return
    keys, values = state.tensors["keys"].to(device), state.tensors["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys[:, :, : keys.shape[-2]] = keys
    layer.values[:, :, : values.shape[-2]] = values
    layer.cumulative_length.fill_(keys.shape[-2])


def check_buffers(state: LayerState, where: str) -> None:
    """Holds the kept tokens against the counters.

    Raises:
        IncompleteStateError: they contradict each other.
    """
    length, n_seen = state.meta["max_length"], state.meta["n_seen"]
    if state.layout.cropping == "tokens" and n_seen > length:
        raise IncompleteStateError(where, expected=f"at most {length} tokens", found=str(n_seen))
    for name in ("keys", "values"):
        if name in state.tensors:
            require_length(state.tensors[name], -2, min(n_seen, length), f"{where}, {name} of {length}")


def _length(layer: Any) -> int:
    return int(layer.cumulative_length) if layer.is_initialized else 0
