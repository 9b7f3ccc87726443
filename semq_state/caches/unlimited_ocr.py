"""Unlimited-OCR's reference layers: all of the prompt, and a sliding window over what was generated after it."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from semq_state.caches.base import AbstractFamily, Mark, require_length
from semq_state.snapshot import LayerState

_MODULE = "transformers.models.unlimited_ocr.modeling_unlimited_ocr"
_NAMES = ("keys", "values", "prefill_keys", "prefill_values")


@final
class ReferenceSliding(AbstractFamily):
    """`prefill_keys` and `prefill_values`, and the window's `keys` and `values`, all of the usual axes."""

    id: ClassVar[str] = "reference-sliding"
    layer_type: ClassVar[type | str] = f"{_MODULE}.UnlimitedOcrDynamicReferenceSlidingWindowLayer"
    names: ClassVar[tuple[str, ...]] = _NAMES
    counts: ClassVar[dict[str, int]] = {"window": 2, "n_decoded": 0, "n_prefill": 0}

    def mark(self, layer: Any) -> Mark:
        tensors = {name: getattr(layer, name) for name in _NAMES} if layer.is_initialized else {}
        return tensors, layer.cumulative_length, layer.prefill_cumulative_length, layer.prefill_length

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        tensors, n_decoded, n_prefill, prefill_length = mark
        meta = {
            "window": layer.sliding_window,
            "n_decoded": n_decoded,
            "n_prefill": n_prefill,
            "prefill_length": prefill_length,
            "filled": bool(n_prefill),
        }
        return LayerState(self.id, _shaped(tensors) if n_prefill else {}, meta)

    def empty(self, state: LayerState) -> Any:
        from transformers.models.unlimited_ocr.modeling_unlimited_ocr import (
            UnlimitedOcrDynamicReferenceSlidingWindowLayer,
        )

        return UnlimitedOcrDynamicReferenceSlidingWindowLayer(sliding_window=state.meta["window"])

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        tensors = {name: t.to(device) for name, t in state.tensors.items()}
        if tensors:
            layer.lazy_initialization(tensors["prefill_keys"], tensors["prefill_values"])
            for name, tensor in tensors.items():
                # transformers joins the window to a tensor without axes until the first token is in it.
                setattr(layer, name, tensor if tensor.numel() else getattr(layer, name))
        layer.cumulative_length = state.meta["n_decoded"]
        layer.prefill_cumulative_length = state.meta["n_prefill"]
        layer.prefill_length = state.meta["prefill_length"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_prefill"] + state.meta["n_decoded"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        if state.tensors:
            kept = min(state.meta["n_decoded"], state.meta["window"] - 1)
            require_length(state.tensors["prefill_keys"], -2, state.meta["n_prefill"], f"{where}, prefill_keys")
            require_length(state.tensors["keys"], -2, kept, f"{where}, keys")


@final
class ReferenceSlidingStatic(AbstractFamily):
    """The same in one buffer, written in place, of the prompt's length and the window's."""

    id: ClassVar[str] = "reference-sliding-static"
    layer_type: ClassVar[type | str] = f"{_MODULE}.UnlimitedOcrStaticReferenceSlidingWindowLayer"
    names: ClassVar[tuple[str, ...]] = _NAMES
    counts: ClassVar[dict[str, int]] = {
        "max_length": 1, "max_prefill": 0, "n_decoded": 0, "n_counted": 0, "n_prefill": 0, "prefill_length": 0,
    }  # fmt: skip

    def mark(self, layer: Any) -> Mark:
        if not layer.is_initialized:
            return None
        kept = min(layer.cumulative_length_int, layer.max_cache_len)
        lengths = {"keys": kept, "values": kept}
        tensors = {
            name: getattr(layer, name)[:, :, : lengths.get(name, layer.prefill_cumulative_length)].clone()
            for name in _NAMES
        }
        return (
            tensors, layer.cumulative_length_int, int(layer.cumulative_length),
            layer.prefill_cumulative_length, layer.prefill_length or 0,
        )  # fmt: skip

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        tensors, n_decoded, n_counted, n_prefill, prefill_length = mark or ({}, 0, 0, 0, 0)
        meta = {
            "max_length": layer.max_cache_len,
            "max_prefill": layer.prefill_max_cache_len,
            "n_decoded": n_decoded,
            "n_counted": n_counted,
            "n_prefill": n_prefill,
            "prefill_length": prefill_length,
            "filled": bool(n_prefill),
        }
        return LayerState(self.id, tensors if n_prefill else {}, meta)

    def empty(self, state: LayerState) -> Any:
        from transformers.models.unlimited_ocr.modeling_unlimited_ocr import (
            UnlimitedOcrStaticReferenceSlidingWindowLayer,
        )

        meta = state.meta
        return UnlimitedOcrStaticReferenceSlidingWindowLayer(
            max_cache_len=meta["max_prefill"] + meta["max_length"], sliding_window=meta["max_length"]
        )

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        meta = state.meta
        if not state.tensors:
            return
        layer.prefill_length = meta["prefill_length"]
        layer.lazy_initialization(
            state.tensors["prefill_keys"].to(device), state.tensors["prefill_values"].to(device)
        )
        for name, tensor in state.tensors.items():
            getattr(layer, name)[:, :, : tensor.shape[-2]] = tensor.to(device)
        layer.prefill_cumulative_length = meta["n_prefill"]
        layer.cumulative_length.fill_(meta["n_counted"])
        layer.cumulative_length_int = meta["n_decoded"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_prefill"] + state.meta["n_decoded"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        if state.tensors:
            kept = min(state.meta["n_decoded"], state.meta["max_length"])
            require_length(state.tensors["prefill_keys"], -2, state.meta["n_prefill"], f"{where}, prefill_keys")
            require_length(state.tensors["keys"], -2, kept, f"{where}, keys")


def _shaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with all their axes, also where a window is still a tensor without any."""
    like = {"keys": tensors["prefill_keys"], "values": tensors["prefill_values"]}
    return {name: tensor if tensor.ndim == 4 else like[name][:, :, :0] for name, tensor in tensors.items()}
