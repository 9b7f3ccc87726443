"""Uniform grids: levels `scale * (q - zero)` with a zero point that need be no integer, and ways to choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Fit = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Groups `(n_groups, n)`, float32, and bits, to the scale and the zero point of each group, `(n_groups,)`."""

_CLIPS = {1: 1.0, 2: 1.990, 3: 2.345, 4: 2.680, 5: 3.010, 6: 3.330, 7: 3.640, 8: 3.940}
"""Range of the norm grid in root mean squares, where the squared error of normal values is least."""

_TRIED, _STEP, _NORM = 80, 0.01, 2.4  # ranges that `shrunk` tries, from 1 down, and the power of its error


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of every group of a matrix.

    Args:
        scale: `(rows, n_groups)`, a float dtype.
        zero: the same.
        bits: of a symbol; symbols are 0 to `2**bits - 1`.
        group: neighbouring columns that share a scale and a zero point; the last group of a row may have fewer.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group: int

    @property
    def highest(self) -> int:
        """The largest symbol."""
        return int(2**self.bits - 1)

    def symbols(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest symbols of `(rows, cols)` values, uint8."""
        scale, zero = self.per_column(values.shape[1])
        return (values / scale + zero).round_().clamp_(0, self.highest).to(torch.uint8)

    def values(self, symbols: torch.Tensor) -> torch.Tensor:
        """What symbols `(rows, cols)` stand for, float32."""
        rows, cols = symbols.shape
        whole = cols // self.group
        made = torch.empty(rows, cols, dtype=torch.float32, device=symbols.device)
        scale, zero = self.scale.float(), self.zero.float()
        for first, last, width in ((0, whole, self.group), (whole, self.scale.shape[1], cols % self.group)):
            if last > first and width:
                part = slice(first * self.group, first * self.group + (last - first) * width)
                shape = (rows, last - first, width)
                levels = symbols[:, part].reshape(shape) - zero[:, first:last, None]
                made[:, part] = levels.mul_(scale[:, first:last, None]).view(rows, -1)
        return made

    def per_column(self, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every value, float32 `(rows, cols)`."""
        scale, zero = (t.float().repeat_interleave(self.group, 1)[:, :cols] for t in (self.scale, self.zero))
        return scale, zero


def fitted(
    values: torch.Tensor, bits: int, group: int, fit: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    importance: torch.Tensor | None = None,
) -> Grid:  # fmt: skip
    """The grid of a matrix: every group of every row fitted, then rounded to the precision in which it is stored.

    Args:
        values: `(rows, cols)` float32.
        bits: of a symbol.
        group: columns that share a scale.
        fit: `minmax`, `shrunk`, `norm`, `neuqi.fit` …
        importance: of each column, `(cols,)`, for fits that weigh.
    """
    rows, cols = values.shape
    whole = cols // group
    scales, zeros = [], []
    for first, n_groups, width in ((0, whole, group), (whole * group, 1, cols % group)):
        if n_groups and width:
            part = values[:, first : first + n_groups * width].reshape(-1, width)
            if importance is None:
                scale, zero = fit(part, bits)
            else:
                weights = importance[first : first + n_groups * width].view(n_groups, width)
                scale, zero = fit(part, bits, weights.repeat(rows, 1))
            scales.append(scale.view(rows, n_groups))
            zeros.append(zero.view(rows, n_groups))
    scale, zero = stored(torch.cat(scales, 1), torch.cat(zeros, 1))
    return Grid(scale, zero, bits, group)


def stored(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point as they are kept: float16 where that costs a thousandth at most, else float32."""
    narrow, near = scale.half(), zero.half()
    bounded = bool(torch.isfinite(narrow).all()) and bool(torch.isfinite(near).all())
    if (
        bounded
        and bool(((narrow.float() - scale).abs() <= scale * 2**-10).all())
        and bool((zero.abs() <= 256).all())
    ):
        return narrow, near
    return scale.float(), zero.float()


def minmax(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the least to the largest value, 0 included, with an integer zero point: plain round-to-nearest."""
    return _between(values.amin(1).clamp(max=0), values.amax(1).clamp(min=0), bits)


def shrunk(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`minmax` with both ends drawn in by the share, of 0 to 79 %, that makes `sum |error|**2.4` least.

    The grid of GPTQ and SEPTQ as published (SEPTQ, arXiv 2604.10091, section 3; norm 2.4, 80 shares).
    """
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    best, kept = torch.full_like(low, torch.inf), list(_between(low, high, bits))
    # Blocks that stay in the processor's cache: the same values are read for every share.
    step = max(1, (1 << 18) // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        at = slice(start, start + step)
        block, least = values[at], best[at]
        for i in range(_TRIED):
            scale, zero = _between(low[at] * (1 - i * _STEP), high[at] * (1 - i * _STEP), bits)
            error = (block / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, 2**bits - 1)
            error.sub_(zero[:, None]).mul_(scale[:, None]).sub_(block).abs_().pow_(_NORM)
            lost = error.sum(1)
            better = lost < least
            least[better] = lost[better]
            kept[0][at][better], kept[1][at][better] = scale[better], zero[better]
    return kept[0], kept[1]


def norm(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SEMQ's `quant` rule: sign and magnitude bin, the range a multiple of the root mean square.

    A mid-rise grid, so a uniform one whose zero point lies between its two middle levels.
    """
    reach = _CLIPS[bits] * values.square().mean(1).sqrt()
    scale = torch.where(reach > 0, reach / 2 ** (bits - 1), 1.0)
    return scale, torch.full_like(scale, (2**bits - 1) / 2)


def _between(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round()


def bits_of_grid(grid: Grid) -> int:
    """Bits that scales and zero points take, as they are kept."""
    return math.prod(grid.scale.shape) * 8 * (grid.scale.element_size() + grid.zero.element_size())
