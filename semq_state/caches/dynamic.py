"""`DynamicLayer`: keys and values that grow by concatenation; the default of most decoders."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import DynamicLayer

from semq_state.caches.base import AbstractFamily, Mark
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState


@final
class Dynamic(AbstractFamily):
    """Every token's keys and values, `(batch, kv_heads, seq, head_dim)`."""

    id: ClassVar[str] = "dynamic"
    layer_type: ClassVar[type] = DynamicLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")

    def mark(self, layer: Any) -> Mark:
        # The layer only ever appends, so its length is enough to come back to this moment.
        return int(layer.get_seq_length())

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        if not mark:
            return LayerState(self.id, {}, {"filled": False})
        if layer.get_seq_length() < mark:
            raise IncompleteStateError(
                "cache",
                expected=f"the {mark} tokens that it held after the last finished one",
                found=f"{layer.get_seq_length()}: it was cut since",
                do="take the snapshot before the cache is used for something else",
            )
        return LayerState(
            self.id,
            {"keys": layer.keys[:, :, :mark, :], "values": layer.values[:, :, :mark, :]},
            {"filled": True},
        )

    def rebuild(self, state: LayerState, device: torch.device) -> Any:
        layer = DynamicLayer()
        fill(layer, state, device)
        return layer

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.tensors["keys"].shape[-2]) if state.tensors else None


def fill(layer: Any, state: LayerState, device: torch.device) -> None:
    """Gives a new dynamic layer the tensors of `state`, without copying on the same device.

    Sharing is safe because these layers replace their tensors at each update and never write into them.
    """
    if not state.tensors:
        return
    keys, values = state.tensors["keys"].to(device), state.tensors["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
