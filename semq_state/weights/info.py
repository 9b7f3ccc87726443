"""What a file of quantised weights says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semq_state.provenance import Provenance


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself, its tensors unread and so unproved.

    Args:
        path: the file.
        n_bytes: its size.
        weights_id: the identity of these weights.
        origin: the model that they were made from.
        recipe: how they were made.
        n_parameters: numbers of the model, its buffers among them, tied ones once.
        n_quantized: how many of them are symbols.
        stored: bits of a symbol to how many parameters have such, and how many bytes they take, scales included.
    """

    path: str
    n_bytes: int
    weights_id: str
    origin: Provenance
    recipe: Mapping[str, Any]
    n_parameters: int
    n_quantized: int
    stored: Mapping[int, tuple[int, int]]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, for each parameter of the model."""
        return 8 * self.n_bytes / max(1, self.n_parameters)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Of the quantised matrices alone, scales and kept values included."""
        return 8 * sum(n_bytes for _, n_bytes in self.stored.values()) / max(1, self.n_quantized)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "n_bytes": self.n_bytes,
            "weights_id": self.weights_id,
            "method": self.recipe.get("method"),
            "bits": self.recipe.get("bits"),
            "group": self.recipe.get("group"),
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bits_per_quantized_weight": round(self.bits_per_quantized_weight, 4),
            "stored": {
                str(bits): {"n": n, "n_bytes": n_bytes, "bits_per_weight": round(8 * n_bytes / max(1, n), 4)}
                for bits, (n, n_bytes) in sorted(self.stored.items())
            },
            "n_parameters": self.n_parameters,
            "n_quantized": self.n_quantized,
            "origin": self.origin.weights,
            "model": self.origin.model_name,
            "recipe": dict(self.recipe),
        }
