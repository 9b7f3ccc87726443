"""`DynamicIndexedLayer`: keys, values, and the keys of the indexer that chooses among them (sparse attention)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import DynamicIndexedLayer

from semq_state.caches.base import AbstractFamily, Mark, require_length
from semq_state.caches.dynamic import fill, grown, length_of, newest_key
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState

OPTIONAL = ("keys", "values", "index_keys", "index_positions")


@final
class Indexed(AbstractFamily):
    """Every token's keys and values; `index_keys`, `(batch, seq, index_head_dim)`, where the layer has an indexer
    of its own; and `index_positions`, `(position_dims, batch, seq)`, where positions are of several dimensions.
    A layer that reuses another's keys has only the indexer's. `holds` lists what there must be."""

    id: ClassVar[str] = "indexed"
    layer_type: ClassVar[type | str] = DynamicIndexedLayer
    names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = OPTIONAL

    def mark(self, layer: Any) -> Mark:
        n_index = layer.indexer_keys.shape[1] if layer.is_indexer_initialized else 0
        return length_of(layer), n_index, layer.indexer_position_ids

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        n_tokens, n_index, positions = mark
        tensors = grown(layer, n_tokens) if n_tokens else {}
        if n_index:
            tensors["index_keys"] = layer.indexer_keys[:, :n_index]
        if positions is not None:
            tensors["index_positions"] = positions
        return LayerState(self.id, tensors, {"filled": bool(tensors), "holds": sorted(tensors)})

    def empty(self, state: LayerState) -> Any:
        return DynamicIndexedLayer()

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill(layer, state, device)
        if "index_keys" in state.tensors:
            keys = state.tensors["index_keys"].to(device)
            layer.lazy_initialization_indexer(keys)
            layer.indexer_keys = keys
        if "index_positions" in state.tensors:
            layer.indexer_position_ids = state.tensors["index_positions"].to(device)

    def n_cached(self, state: LayerState) -> int | None:
        return indexed_length(state)

    def newest(self, layer: Any) -> torch.Tensor | None:
        return newest_key(layer)

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_index(state, where)


def indexed_length(state: LayerState) -> int | None:
    """The tokens that a layer holds, by its keys or its indexer's."""
    name = next((name for name in ("keys", "index_keys") if name in state.tensors), None)
    return None if name is None else int(state.tensors[name].shape[-2])


def check_index(state: LayerState, where: str) -> None:
    """Holds an indexer's tensors against what the layer held, and against its keys.

    Raises:
        IncompleteStateError: one is missing, or of another length.
    """
    if state.meta.get("holds") != sorted(state.tensors):
        raise IncompleteStateError(
            where,
            expected=", ".join(map(str, state.meta.get("holds") or ())) or "a list of what the layer holds",
            found=", ".join(sorted(state.tensors)) or "none",
            do="sparse attention cannot choose its keys without them; take the snapshot again",
        )
    for name, axis in (("index_keys", -2), ("index_positions", -1)):
        if name in state.tensors:
            require_length(state.tensors[name], axis, indexed_length(state) or 0, f"{where}, {name}")
