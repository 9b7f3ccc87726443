"""`DummyLayer`: a layer without a state of its own (it reuses another layer's keys, or has no attention)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import DummyLayer

from semq_state.caches.base import AbstractFamily, Mark
from semq_state.snapshot import LayerState


@final
class Dummy(AbstractFamily):
    """Nothing, on purpose: it keeps the layers' numbering."""

    id: ClassVar[str] = "dummy"
    layer_type: ClassVar[type | str] = DummyLayer
    names: ClassVar[tuple[str, ...]] = ()

    def mark(self, layer: Any) -> Mark:
        return None

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        return LayerState(self.id, {})

    def empty(self, state: LayerState) -> Any:
        return DummyLayer()

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None: ...

    def n_cached(self, state: LayerState) -> int | None:
        return None
