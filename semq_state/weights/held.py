"""The quantised weights of a model as one value: what a file of them holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.provenance import Provenance
from semq_state.weights.matrix import QuantizedMatrix


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """A model's weights, most of them as symbols.

    Args:
        recipe: how they were made, plain values: method, bits, group, calibration, seed, what distillation did.
        origin: the model that they were made from; its `weights` is the digest of the original ones.
        config: the model's configuration as transformers writes it.
        generation_config: the same of its generation.
        matrices: name of a module to its weight; `embedding` modules as well.
        plain: every other parameter and persistent buffer by its name in the state dict, as it is.
        tied: names in the state dict to the name of the tensor that they share.
        activation_bits: to which the inputs of these layers are rounded, token by token; 0 for not at all.
    """

    recipe: Mapping[str, Any]
    origin: Provenance
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    matrices: Mapping[str, QuantizedMatrix]
    plain: Mapping[str, torch.Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    activation_bits: int = 0

    def provenance(self) -> dict[str, Any]:
        """What a state's provenance says of the weights that made it: how they were quantised, and from which."""
        told = ("method", "bits", "group", "embedding_bits", "distill_steps")
        return {
            **{name: self.recipe.get(name) for name in told},
            "activation_bits": self.activation_bits,
            "original": self.origin.weights,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that a file holds, by name; made anew, one matrix after the other, at each call."""
        named = {f"plain.{name}": tensor for name, tensor in self.plain.items()}
        for name, matrix in self.matrices.items():
            named |= {f"matrix.{name}.{part}": tensor for part, tensor in matrix.tensors().items()}
        return named
