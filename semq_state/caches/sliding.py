"""`DynamicSlidingWindowLayer`: the last `window - 1` tokens' keys and values, and how many went before."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from semq_state.caches.base import AbstractFamily, Mark, require_length
from semq_state.caches.dynamic import fill
from semq_state.snapshot import LayerState


@final
class Sliding(AbstractFamily):
    """The tokens within a sliding window or attention chunk."""

    id: ClassVar[str] = "sliding"
    layer_type: ClassVar[type | str] = DynamicSlidingWindowLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")
    counts: ClassVar[dict[str, int]] = {"window": 2, "n_seen": 0}

    def mark(self, layer: Any) -> Mark:
        # Past its window the layer drops tokens, so a later length could not bring them back; it replaces
        # its tensors rather than writing into them, so holding these is enough, and they are small.
        return layer.keys, layer.values, layer.cumulative_length, layer.is_initialized

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        keys, values, n_seen, filled = mark
        meta = {"window": layer.sliding_window, "n_seen": n_seen, "filled": bool(filled and n_seen)}
        if not meta["filled"]:
            return LayerState(self.id, {}, meta)
        # A layer that records its past holds more than the next step can see.
        kept = min(n_seen, layer.sliding_window - 1)
        return LayerState(
            self.id,
            {
                "keys": keys[:, :, keys.shape[-2] - kept :, :],
                "values": values[:, :, values.shape[-2] - kept :, :],
            },
            meta,
        )

    def empty(self, state: LayerState) -> Any:
        return DynamicSlidingWindowLayer(sliding_window=state.meta["window"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill(layer, state, device)
        layer.cumulative_length = state.meta["n_seen"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        for name, tensor in state.tensors.items():
            if name in self.names:
                kept = min(state.meta["n_seen"], state.meta["window"] - 1)
                require_length(tensor, -2, kept, f"{where}, {name} of a window of {state.meta['window']}")
