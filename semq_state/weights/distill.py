"""Light distillation: symbols stay, scales and zero points are trained on the original's last hidden states.

NeUQI, arXiv 2505.17595: mean squared difference of the hidden states before the output layer, AdamW, a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from semq_state.content import DTYPES
from semq_state.quantizers.activations import per_token
from semq_state.quantizers.grid import stored
from semq_state.weights.calibrating import read
from semq_state.weights.linear import is_turned
from semq_state.weights.matrix import QuantizedMatrix

RATE = 3e-4
BETAS = (0.9, 0.95)
WARM_UP = 0.1  # of the steps

Tell = Callable[[str, int, int], None]


def targets(model: Any, ids: torch.Tensor, tell: Tell) -> list[torch.Tensor]:
    """The original's last hidden states of each window, `(1, length, hidden)`."""
    found = []
    with torch.no_grad():
        for i, row in enumerate(ids):
            found.append(read(model, row[None]))
            tell("read", i + 1, len(ids))
    return found


def distilled(
    model: Any,
    matrices: Mapping[str, QuantizedMatrix],
    ids: torch.Tensor,
    target: list[torch.Tensor],
    steps: int,
    activation_bits: int,
    seed: int,
    tell: Tell,
) -> tuple[dict[str, QuantizedMatrix], list[float]]:
    """The matrices with trained scales and zero points, and the loss of each step.

    Args:
        model: its linear layers hold the quantised weights.
        matrices: by the names of the layers.
        ids: windows `(n, length)`.
        target: of each window.
        steps: one window each.
        activation_bits: as the layers will compute.
        seed: of the order of the windows.
        tell: told of each step.
    """
    trained = {
        name: Trained(matrix, model.get_submodule(name), activation_bits) for name, matrix in matrices.items()
    }
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for name, module in trained.items():
        _stand(model, name, module)
    learnt = [parameter for module in trained.values() for parameter in (module.scale, module.zero)]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    lost = []
    try:
        with torch.enable_grad():
            for step, i in zip(range(steps), _order(len(ids), seed), strict=False):
                loss = functional.mse_loss(read(model, ids[i : i + 1]).float(), target[i].float())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                lost.append(float(loss.detach()))
                tell("distil", step + 1, steps)
    finally:
        for name, module in trained.items():
            _stand(model, name, module.stands_for[0])
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {name: module.matrix() for name, module in trained.items()}, lost


class Trained(nn.Module):
    """A layer whose scales and zero points take gradients."""

    def __init__(self, matrix: QuantizedMatrix, stands_for: nn.Module, activation_bits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(matrix.scale.float())
        self.zero = nn.Parameter(matrix.zero.float())
        self.stands_for = (stands_for,)  # in a tuple, so that it is no part of this module
        self._matrix, self._bits = matrix, activation_bits
        self._symbols = matrix.unpacked()
        self._branch = None if matrix.branch is None else matrix.branch.values(matrix.cols)

    @property
    def weight(self) -> torch.Tensor:
        matrix, dtype = self._matrix, DTYPES[self._matrix.dtype]
        found = self._levels()
        if self._branch is not None:
            found = found + self._branch
        if matrix.smoothing is not None:
            found = found / matrix.smoothing.float()
        found = found.to(dtype)
        if matrix.escaped_at is not None and matrix.escaped is not None:
            found = found.flatten().index_copy(0, matrix.escaped_at, matrix.escaped).view(matrix.rows, matrix.cols)
        return found.T if is_turned(self.stands_for[0]) else found

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self.stands_for[0]
        bias, turned = module._parameters.get("bias"), is_turned(module)
        if not self._bits:
            return functional.linear(inputs, self.weight.T if turned else self.weight, bias)
        dtype = DTYPES[self._matrix.dtype]
        even = inputs if self._matrix.smoothing is None else inputs / self._matrix.smoothing.to(dtype)
        # The gradient passes the rounding as if it were not there.
        rounded = even + (per_token(even.detach(), self._bits) - even.detach())
        out = functional.linear(rounded, self._levels().to(dtype), bias)
        return out if self._branch is None else out + functional.linear(even, self._branch.to(dtype))

    def _levels(self) -> torch.Tensor:
        """`scale * (symbols - zero)`, float32."""
        group, cols = self._matrix.group, self._matrix.cols
        if group >= cols:
            return self.scale * (self._symbols - self.zero)
        if cols % group == 0:
            split = self._symbols.view(self._matrix.rows, -1, group)
            return (self.scale[..., None] * (split - self.zero[..., None])).view(self._matrix.rows, cols)
        scale, zero = (t.repeat_interleave(group, 1)[:, :cols] for t in (self.scale, self.zero))
        return scale * (self._symbols - zero)

    def matrix(self) -> QuantizedMatrix:
        """The matrix with what was learnt, rounded as it is kept."""
        scale, zero = stored(self.scale.detach(), self.zero.detach())
        return replace(self._matrix, scale=scale, zero=zero)


def _order(n: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def _cosine(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _stand(model: Any, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, module)
