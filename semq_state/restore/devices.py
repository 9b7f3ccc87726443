"""On which device each layer of a model computes."""

from __future__ import annotations

from typing import Any

import torch


def device_of(model: Any, layer: int) -> torch.device:
    """The device of decoder layer number `layer`; the model's own where it is not spread over several."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        blocks = getattr(decoder, "layers", None)
        if blocks is not None and layer < len(blocks):
            return torch.device(next(blocks[layer].parameters()).device)
    return torch.device(model.device)
