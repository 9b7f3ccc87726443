"""MiniMax-M3's sparse layers: keys and values, and the keys of the index that chooses among them."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from semq_state.caches.base import AbstractFamily, Mark, require_length
from semq_state.caches.dynamic import fill, grown, length_of, newest_key
from semq_state.caches.static import check_buffers, fill_buffers
from semq_state.snapshot import LayerState

_MODULE = "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl"


@final
class MiniMaxSparse(AbstractFamily):
    """Every token's keys, values and `index_keys`, `(batch, 1, seq, index_head_dim)`."""

    id: ClassVar[str] = "minimax-m3-sparse"
    layer_type: ClassVar[type | str] = f"{_MODULE}.MiniMaxM3VLSparseCacheLayer"
    names: ClassVar[tuple[str, ...]] = ("keys", "values", "index_keys")

    def mark(self, layer: Any) -> Mark:
        return length_of(layer)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        if not mark:
            return LayerState(self.id, {}, {"filled": False})
        tensors = {**grown(layer, mark), "index_keys": layer.idx_keys[:, :, :mark]}
        return LayerState(self.id, tensors, {"filled": True})

    def empty(self, state: LayerState) -> Any:
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLSparseCacheLayer

        return MiniMaxM3VLSparseCacheLayer()

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill(layer, state, device)
        if state.tensors:
            layer.idx_keys = state.tensors["index_keys"].to(device)

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.tensors["keys"].shape[-2]) if state.tensors else None

    def newest(self, layer: Any) -> torch.Tensor | None:
        return newest_key(layer)

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        if state.tensors:
            require_length(state.tensors["index_keys"], -2, state.tensors["keys"].shape[-2], f"{where}, index_keys")


@final
class MiniMaxSparseStatic(AbstractFamily):
    """The same in buffers of `max_length`."""

    id: ClassVar[str] = "minimax-m3-sparse-static"
    layer_type: ClassVar[type | str] = f"{_MODULE}.MiniMaxM3VLSparseStaticCacheLayer"
    names: ClassVar[tuple[str, ...]] = ("keys", "values", "index_keys")
    counts: ClassVar[dict[str, int]] = {"max_length": 1, "n_seen": 0}

    def mark(self, layer: Any) -> Mark:
        return int(layer.cumulative_length) if layer.is_initialized else 0

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        meta = {"max_length": layer.max_cache_len, "n_seen": mark, "filled": bool(mark)}
        if not mark:
            return LayerState(self.id, {}, meta)
        tensors = {**grown(layer, mark, int(layer.cumulative_length)), "index_keys": layer.idx_keys[:, :, :mark]}
        return LayerState(self.id, {name: t.clone() for name, t in tensors.items()}, meta)

    def empty(self, state: LayerState) -> Any:
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLSparseStaticCacheLayer

        return MiniMaxM3VLSparseStaticCacheLayer(state.meta["max_length"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill_buffers(layer, state, device)
        if state.tensors:
            layer.update_index(state.tensors["index_keys"].to(device))

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def newest(self, layer: Any) -> torch.Tensor | None:
        n_tokens = self.mark(layer)
        return layer.keys[:, :, n_tokens - 1].clone() if n_tokens else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        check_buffers(state, where)
        if state.tensors:
            require_length(state.tensors["index_keys"], -2, state.meta["n_seen"], f"{where}, index_keys")
