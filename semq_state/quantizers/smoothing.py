"""Smoothing: outliers of a layer's inputs moved into its weights, column by column."""

from __future__ import annotations

from collections.abc import Callable

import torch

STRENGTHS = tuple(i / 10 for i in range(1, 10))
"""What is tried for each layer."""

_LEAST = 1e-5


def factors(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """`max|X_j|**a / max|W_j|**(1-a)` of each input channel (SmoothQuant, arXiv 2211.10438, equation 4).

    Inputs are divided by it, columns of the weights multiplied. Its geometric mean is made 1, and it is rounded to
    float16, as it is kept.

    Args:
        inputs: largest magnitude of each channel, `(cols,)`.
        weights: largest magnitude of each column, `(cols,)`.
        strength: `a`, 0 to 1.
    """
    found = inputs.float().clamp(min=_LEAST) ** strength / weights.float().clamp(min=_LEAST) ** (1 - strength)
    found = found / found.log().mean().exp()
    return found.clamp(2**-12, 2**12).half()


def searched(
    inputs: torch.Tensor, weights: torch.Tensor, error: Callable[[torch.Tensor], float]
) -> tuple[torch.Tensor | None, float]:
    """The factors whose error is least, and their strength; None and 0 where no smoothing is better than any.

    Args:
        inputs: inputs of the layer, `(n, cols)`.
        weights: `(rows, cols)`.
        error: of a layer that is quantised with these factors.
    """
    most, largest = inputs.abs().amax(0), weights.abs().amax(0)
    best: tuple[torch.Tensor | None, float] = (None, 0.0)
    least = error(torch.ones_like(largest, dtype=torch.float16))
    for strength in STRENGTHS:
        tried = factors(most, largest, strength)
        lost = error(tried)
        if lost < least:
            least, best = lost, (tried, strength)
    return best
