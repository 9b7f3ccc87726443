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
    layer_type: ClassVar[type | str] = DynamicLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values")

    def mark(self, layer: Any) -> Mark:
        # The layer only ever appends, so its length is enough to come back to this moment.
        return length_of(layer)

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        if not mark:
            return LayerState(self.id, {}, {"filled": False})
        return LayerState(self.id, grown(layer, mark), {"filled": True})

    def empty(self, state: LayerState) -> Any:
        return DynamicLayer()

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        fill(layer, state, device)

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.tensors["keys"].shape[-2]) if state.tensors else None

    def newest(self, layer: Any) -> torch.Tensor | None:
        return newest_key(layer)


def length_of(layer: Any) -> int:
    """Tokens that a layer holds. transformers' own count is zero for keys of zero width, which some layers have."""
    return int(layer.keys.shape[-2]) if layer.is_initialized and layer.keys.ndim == 4 else 0


def grown(layer: Any, n_tokens: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """The first `n_tokens` tokens of a layer that only appends.

    Args:
        layer: a layer with `keys` and `values`.
        n_tokens: how many it held.
        length: how many it holds now; as many as its keys by default.

    Raises:
        IncompleteStateError: it holds fewer now.
    """
    length = length_of(layer) if length is None else length
    if length < n_tokens:
        raise IncompleteStateError(
            "cache",
            expected=f"the {n_tokens} tokens that it held after the last finished one",
            found=f"{length}: it was cut since",
            do="take the snapshot before the cache is used for something else",
        )
    return {"keys": layer.keys[:, :, :n_tokens, :], "values": layer.values[:, :, :n_tokens, :]}


def fill(layer: Any, state: LayerState, device: torch.device) -> None:
    """Gives a new dynamic layer the keys and values of `state`, without copying on the same device.

    Sharing is safe because these layers replace their tensors at each update and never write into them.
    """
    if "keys" not in state.tensors:
        return
    keys, values = state.tensors["keys"].to(device), state.tensors["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def newest_key(layer: Any) -> torch.Tensor | None:
    keys = layer.keys
    return keys[:, :, -1].clone() if keys is not None and keys.numel() else None
