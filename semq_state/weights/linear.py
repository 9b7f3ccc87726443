"""A linear layer whose weights are symbols."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from semq_state.content import DTYPES
from semq_state.quantizers.activations import per_token
from semq_state.quantizers.spectrum import Branch
from semq_state.weights.matrix import QuantizedMatrix

CONV1D = "Conv1D"
"""transformers' linear layer with the axes of its weight exchanged, by the name of its class."""

_PARTS = ("symbols", "scale", "zero", "smoothing", "escaped_at", "escaped")


class QuantizedLinear(nn.Module):
    """Computes with a quantised matrix: dequantised at each call, or once.

    With `activation_bits` the inputs are rounded too, token by token: `Q(x / s) Q(R)' + (x / s) B'`, where the
    branch `B` of low frequencies takes them as they are (SpecQuant, arXiv 2511.11663). Computed in floats.

    Args:
        matrix: its weight, `(out_features, in_features)`.
        bias: `(out_features,)`, or None.
        turned: it stands for a `Conv1D`, whose weight is `(in_features, out_features)`.
        activation_bits: of the inputs; 0 leaves them.
        hold: keep the dequantised matrices.
    """

    counts: torch.Tensor | None
    coefficients: torch.Tensor

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: nn.Parameter | None,
        *,
        turned: bool = False,
        activation_bits: int = 0,
        hold: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.turned, self.activation_bits = turned, activation_bits
        self._told = (matrix.rows, matrix.cols, matrix.bits, matrix.group, matrix.dtype)
        for name in _PARTS:
            self.register_buffer(name, getattr(matrix, name))
        self.register_buffer("counts", None if matrix.branch is None else matrix.branch.counts)
        self.register_buffer("coefficients", None if matrix.branch is None else matrix.branch.coefficients)
        self.bias = bias
        self._held = self._dense() if hold else None

    @property
    def matrix(self) -> QuantizedMatrix:
        """The weight as symbols, wherever its buffers are now."""
        parts = {name: getattr(self, name) for name in _PARTS}
        branch = None if self.counts is None else Branch(self.counts, self.coefficients)
        return QuantizedMatrix(*self._told, **parts, branch=branch)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, as the layer that this one stands for had it."""
        found = self.matrix.weight()
        return found.T.contiguous() if self.turned else found

    def plain_weights(self) -> dict[str, torch.Tensor]:
        """The parameters that this layer stands for, by name."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rounded, branch, smoothing = self._held or self._dense()
        if not self.activation_bits:
            return functional.linear(inputs, rounded, self.bias)
        even = inputs if smoothing is None else inputs / smoothing
        out = functional.linear(per_token(even, self.activation_bits), rounded, self.bias)
        return out if branch is None else out + functional.linear(even, branch)

    def _dense(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        matrix = self.matrix
        if not self.activation_bits or (matrix.smoothing is None and matrix.branch is None):
            return matrix.weight(), None, None
        dtype = DTYPES[matrix.dtype]
        branch = None if matrix.branch is None else matrix.branch.values(matrix.cols).to(dtype)
        smoothing = None if matrix.smoothing is None else matrix.smoothing.to(dtype)
        return matrix.residual().to(dtype), branch, smoothing


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, of torch or of transformers."""
    return type(module) is nn.Linear or type(module).__name__ == CONV1D


def is_turned(module: nn.Module) -> bool:
    """Whether its weight is `(in_features, out_features)`."""
    return type(module).__name__ == CONV1D
