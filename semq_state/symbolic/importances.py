"""What a calibration says about which keys and values matter, for codecs that weigh errors."""

from __future__ import annotations

import re

import torch

from semq_state.calibration import Calibration, LayerSet
from semq_state.rotary import Rotary
from semq_state.symbolic.groups import Stack

_OWN = re.compile(r"layers\.(\d+)\.(keys|values)")


def importance_of(stack: Stack, calibration: Calibration) -> torch.Tensor | None:
    """How much a squared error of each number of a stack matters, float32 `(n_tensors, 1, heads, 1, dim)`.

    None where the calibration does not have all of its layers, or has them in another shape.
    """
    sets = {layer: (layers, at) for layers in calibration.sets for at, layer in enumerate(layers.layers)}
    found = []
    for name in stack.names:
        told = _OWN.fullmatch(name)
        if told is None or int(told[1]) not in sets:
            return None
        layers, at = sets[int(told[1])]
        own = _of_layer(layers, at, told[2])
        shape = stack.spec.shape
        if len(shape) != 4 or (shape[1], shape[3]) != tuple(own.shape):
            return None
        found.append(own[None, :, None])
    return torch.stack(found)


def _of_layer(layers: LayerSet, at: int, kind: str) -> torch.Tensor:
    """Of one layer, `(heads, dim)`: squares of the calibration's scales."""
    whole = layers.scale.view(len(layers.layers), layers.n_heads, layers.key_dim + layers.value_dim)[at].square()
    is_keys = kind == "keys"
    own = whole[:, : layers.key_dim] if is_keys else whole[:, layers.key_dim :]
    rotary = layers.rotaries[at][0 if is_keys else 1]
    return own if rotary is None else _turned(own, rotary)


def _turned(importance: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The importance of rotated channels: those of a pair change places as it turns, so they share their mean."""
    shared = importance.clone()
    part = shared[:, rotary.begin : rotary.begin + rotary.n_dims]
    n_pairs, axis = rotary.n_dims // 2, 1 if rotary.layout == "half" else 2
    pairs = part.reshape(len(part), *((2, n_pairs) if axis == 1 else (n_pairs, 2)))
    part.copy_(pairs.mean(axis, keepdim=True).expand(pairs.shape).reshape(part.shape))
    return shared
