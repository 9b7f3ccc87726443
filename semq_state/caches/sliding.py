"""`DynamicSlidingWindowLayer`: the last `window - 1` tokens' keys and values, and how many went before."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from semq_state.caches.base import AbstractFamily, Mark
from semq_state.caches.dynamic import fill
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState


@final
class Sliding(AbstractFamily):
    """The tokens within a sliding window or attention chunk."""

    id: ClassVar[str] = "sliding"
    layer_type: ClassVar[type] = DynamicSlidingWindowLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")

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

    def rebuild(self, state: LayerState, device: torch.device) -> Any:
        layer = DynamicSlidingWindowLayer(sliding_window=state.meta["window"])
        fill(layer, state, device)
        layer.cumulative_length = state.meta["n_seen"]
        return layer

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def can_step_back(self, state: LayerState) -> bool:
        # A full window has dropped the token that would come back in.
        return int(state.meta["n_seen"]) < int(state.meta["window"])

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        window, n_seen = state.meta.get("window"), state.meta.get("n_seen")
        if type(window) is not int or type(n_seen) is not int or window < 2 or n_seen < 0:
            raise IncompleteStateError(
                where, expected="a window and a count of tokens", found=f"{window!r}, {n_seen!r}"
            )
        for name, tensor in state.tensors.items():
            if tensor.shape[-2] != min(n_seen, window - 1):
                raise IncompleteStateError(
                    f"{where}, {name}",
                    expected=f"{min(n_seen, window - 1)} tokens of a window of {window} after {n_seen}",
                    found=str(tensor.shape[-2]),
                    do="the file was put together wrongly; take the snapshot again",
                )
