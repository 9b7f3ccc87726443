"""NeUQI's grids: for each group the scale and the zero point, no integer, that lose least.

NeUQI (Lin et al., arXiv 2505.17595, section 4): scales are searched, first `s_0 i / 64`, i = 1 … 64, with `s_0 =
(max - min) / (2**bits - 1)`, then `s_c + s_0 j / 2048`, j = -16 … 16, about the best. The best zero point of a
scale is known (`zero_point`), but finding it for each takes a sort. So scales are judged first by the symbols that
a few zero points lead to, and only those of the best scales are found. No data is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from semq_state.quantizers import zero_point

SEARCHES = ("fast", "two-stage", "exact")

_BLOCK = 1 << 15  # values of a block: it stays in a core's cache, and torch leaves it to one thread
_DEVICE_BLOCK = 1 << 23  # elsewhere than on the CPU, where a call costs more than its arithmetic
# The fast search:
_STEPS = 6  # of the surrogate; its last digits do not matter
_PLACES = 4  # zero points of a scale that are tried, spread over a unit
_SOLVED = 1  # scales whose zero point is solved

_Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Scales `(n_groups, n_scales)` to losses and lowest levels, both of this shape."""


def fit(
    values: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    *,
    coarse: int = 64,
    fine: int = 16,
    search: str = "fast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid `scale * (q - zero)`, q = 0 … 2**bits - 1, that loses least in each group.

    Never worse than a grid from the least to the largest value; a group of equal values is met exactly.

    Args:
        values: `(n_groups, n)` float32, finite.
        bits: of a symbol, 1 to 8.
        importance: how much a squared error of each value matters, of the same shape or `(n,)`; alike unless given.
        coarse: how many scales are tried first.
        fine: how many are tried on either side of the best of them, as far as half way to the next.
        search: `fast`; `two-stage`, the paper's, with a solved zero point for every scale; `exact`, over all zero
            points.

    Returns:
        scale, above 0, and zero point, both `(n_groups,)` float32, where the values are.

    Raises:
        ValueError: `search` is none of these.
    """
    if search not in SEARCHES:
        raise ValueError(f"`search` must be one of {SEARCHES}, got {search!r}")
    n_groups, n = values.shape
    scale, zero = torch.ones(n_groups, device=values.device), torch.zeros(n_groups, device=values.device)
    if not n:
        return scale, zero

    def fit_block(start: int) -> None:
        at = slice(start, start + step)
        own = importance[at] if importance is not None and importance.ndim == 2 else importance
        scale[at], zero[at] = _fitted(values[at].float().contiguous(), bits, own, coarse, fine, search)

    on_cpu = values.device.type == "cpu"
    step = max(1, (_BLOCK if on_cpu else _DEVICE_BLOCK) // n)
    starts = range(0, n_groups, step)
    if on_cpu and len(starts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fit_block, starts))
    else:
        list(map(fit_block, starts))
    return scale, zero


def loss(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each group, weighted by importance, `(n_groups,)` float64."""
    wide, step, at = values.double(), scale.double()[:, None], zero.double()[:, None]
    off = ((wide / step + at).round_().clamp_(0, 2**bits - 1) - at) * step - wide
    return (zero_point.weights(importance, wide) * off.square_()).sum(1)


def _fitted(
    values: torch.Tensor, bits: int, importance: torch.Tensor | None, coarse: int, fine: int, search: str
) -> tuple[torch.Tensor, torch.Tensor]:
    low, top = values.amin(1).double(), values.amax(1).double()
    middle, unit = (low + top) / 2, (top - low) / (2**bits - 1)
    # Scales below float32's normal ones would round to 0, or to something else altogether.
    constant = unit < torch.finfo(torch.float32).tiny * 4 * coarse
    unit = torch.where(constant, 1.0, unit)
    # From here on a step of the widest grid is 1, and groups lie around 0.
    ordered, order = ((values.double() - middle[:, None]) / unit[:, None]).sort(1)
    h = torch.full_like(ordered, 1 / ordered.shape[1])
    if importance is not None:
        h = zero_point.weights(importance, ordered).gather(1, order)
    judge = _judged_fast(ordered, h, bits) if search == "fast" else _judged(ordered, h, bits, search)
    scales = torch.arange(1, coarse + 1, device=values.device, dtype=torch.float64) / coarse
    tried = scales.expand(len(values), -1)
    lost, level = judge(tried)
    steps = torch.arange(-fine, fine + 1, device=values.device, dtype=torch.float64) / (2 * coarse * max(1, fine))
    near = tried.gather(1, lost.argmin(1, keepdim=True)) + steps[steps != 0]
    lost_near, level_near = judge(near)
    tried, lost, level = (torch.cat(pair, 1) for pair in ((tried, near), (lost, lost_near), (level, level_near)))
    if search == "fast":
        at = lost.topk(min(_SOLVED, lost.shape[1]), 1, largest=False).indices
        tried = tried.gather(1, at)
        lost, level = _solved(ordered, h, bits, tried, level.gather(1, at))
    at = lost.argmin(1, keepdim=True)
    step, level = tried.gather(1, at)[:, 0] * unit, level.gather(1, at)[:, 0] * unit + middle
    step = step.clamp(max=torch.finfo(torch.float32).max)
    # Equal values, or as good as equal ones: the lowest level is the value.
    size = values[:, 0].abs()
    itself = torch.where(size > 0, size, 1.0).double()
    scale = torch.where(constant, itself, step).float()
    zero = torch.where(constant, -values[:, 0].sign(), -level / scale.double()).float()
    return scale, zero


def _judged_fast(ordered: torch.Tensor, h: torch.Tensor, bits: int) -> _Judge:
    """Judges a scale by the symbols that a few zero points near the surrogate's lead to.

    Symbols cut a sorted group into cells, whose sums follow from cumulative ones; so a zero point costs a binary
    search for each cell's end, and its loss, with the zero point that is best for these symbols, a few additions.
    """
    weight, moment = zero_point.tail_sums(ordered, h)
    square = (h * ordered.square()).sum(1, keepdim=True)
    cells = torch.arange(2**bits - 1, dtype=torch.float64, device=ordered.device)
    phases = torch.arange(_PLACES, dtype=torch.float64, device=ordered.device) / _PLACES - 0.5

    def judge(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = zero_point.surrogate(ordered, (weight, moment), scales, bits, _STEPS)
        shape = (*scales.shape, _PLACES)
        step = scales[..., None].expand(shape)
        ends = (start[..., None] + phases * step)[..., None] + (cells + 0.5) * step[..., None]
        place = torch.searchsorted(ordered, ends.flatten(1))
        # Of the symbols: the mean, the mean of the square, and of the product with the values.
        beyond = (weight[:, -1:] - weight.gather(1, place)).view(*shape, -1)
        symbol, symbol_square = beyond.sum(-1), beyond @ (2 * cells + 1)
        product = (moment[:, -1:] - moment.gather(1, place)).view(*shape, -1).sum(-1)
        level = moment[:, -1:, None] - step * symbol
        lost = square[..., None] - level.square() + step.square() * symbol_square - 2 * step * product
        best = lost.argmin(-1, keepdim=True)
        return lost.gather(-1, best)[..., 0], level.gather(-1, best)[..., 0]

    return judge


def _solved(
    ordered: torch.Tensor, h: torch.Tensor, bits: int, scales: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and lowest levels where the zero point is solved, within 1 of where it was."""
    losses, found = torch.empty_like(scales), torch.empty_like(scales)
    for i in range(scales.shape[1]):
        step = scales[:, i]
        zero, lost = zero_point.nearby(ordered / step[:, None], h, -levels[:, i] / step, bits)
        losses[:, i], found[:, i] = lost * step.square(), -zero * step
    return losses, found


def _judged(ordered: torch.Tensor, h: torch.Tensor, bits: int, search: str) -> _Judge:
    """Judges a scale by its best zero point."""
    solve = zero_point.exact if search == "exact" else zero_point.two_stage

    def judge(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, levels = torch.empty_like(scales), torch.empty_like(scales)
        for i in range(scales.shape[1]):
            zero, lost = solve(ordered / scales[:, i, None], bits, h)
            losses[:, i], levels[:, i] = lost * scales[:, i].square(), -zero * scales[:, i]
        return losses, levels

    return judge
