"""Rounding of activations, as a machine with integer products would; computed in floats."""

from __future__ import annotations

import torch


def per_token(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Each vector `(…, dim)` rounded to its own asymmetric grid from its least to its largest value."""
    wide = values.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round_()
    symbols = (wide / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return symbols.sub_(zero).mul_(scale).to(values.dtype)
