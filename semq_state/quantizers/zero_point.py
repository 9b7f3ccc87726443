"""The best zero point of a uniform grid at a given scale, where it need be no integer.

NeUQI (Lin et al., arXiv 2505.17595, section 4): for values `x`, divided by the scale, and weights `h` of sum 1

    L(z) = sum_i h_i (x_i + z - clip(round(x_i + z), 0, K))**2,     K = 2**bits - 1

is quadratic between the places `z = j + 1/2 - x_i`, j = 0 … K - 1, where a symbol goes from j to j + 1. With
`a_i = x_i - symbol` it is `z**2 + 2 B z + C`, `B = sum h a`, `C = sum h a**2`. Just before its place `z_b` a value
has `a = 1/2 - z_b`, so crossing takes `h` from B and adds `2 h z_b` to C: all pieces follow from cumulative sums.

Groups are `(n_groups, n)`; whatever comes in is computed with in float64, and comes back as it.
"""

from __future__ import annotations

import torch

_AT_ONCE = 1 << 22  # places in memory at a time
_STEPS = 44  # of which every other one halves an interval: to a hundred-thousandth of its length and less


def exact(x: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimiser of L over all n·K places, by sorting them.

    Args:
        x: `(n_groups, n)`, divided by the scale.
        bits: of a symbol.
        importance: how much an error of each value matters, of the same shape or `(n,)`; alike unless given.

    Returns:
        zero points and losses, both `(n_groups,)` float64; losses are means, weighted by importance.
    """
    high, (n_groups, n) = 2**bits - 1, x.shape
    zeros, losses = x.new_empty(n_groups, dtype=torch.float64), x.new_empty(n_groups, dtype=torch.float64)
    step = max(1, _AT_ONCE // max(1, n * high))
    for start in range(0, n_groups, step):
        at = slice(start, start + step)
        moved, middle = _about_zero(x[at])
        h = weights(importance if importance is None or importance.ndim == 1 else importance[at], moved)
        places = (torch.arange(high, device=x.device, dtype=torch.float64) + 0.5 - moved[..., None]).flatten(1)
        places, order = places.sort(1)
        passed = h.repeat_interleave(high, 1).gather(1, order)
        first, last = places[:, :1] - 1e300, places[:, -1:] + 1e300
        zero, losses[at] = _swept(places, passed, moved, h, first, last)
        zeros[at] = zero - middle
    return zeros, losses


def two_stage(
    x: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through a convex surrogate: its minimiser, then L exactly within 1 of it (NeUQI, section 4.2).

    The surrogate counts `h/4` for a value that a level is near, and its squared distance beyond either end.
    Arguments and results are those of `exact`. What it finds is at times a little worse (0.2 % in the paper).
    """
    moved, middle = _about_zero(x)
    h = weights(importance, moved)
    ordered, order = moved.sort(1)
    h = h.gather(1, order)
    sums = tail_sums(ordered, h)
    one = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    start = surrogate(ordered, sums, one, bits, _STEPS)[:, 0].neg()
    zero, lost = nearby(ordered, h, start, bits)
    return zero - middle, lost


def weights(importance: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Importances as weights of sum 1 in each group, float64 of the shape of `like`; alike where all are 0."""
    if importance is None:
        return torch.full_like(like, 1 / max(1, like.shape[1]), dtype=torch.float64)
    h = importance.double().expand(like.shape)
    # The largest one first, so that no sum overflows or vanishes.
    most = h.amax(1, keepdim=True)
    h = torch.where(most > 0, h / most, 1.0)
    return h / h.sum(1, keepdim=True)


def tail_sums(ordered: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of `h` and of `h * value` over the first 0 … n values of sorted groups, `(n_groups, n + 1)` each."""
    none = ordered.new_zeros(len(ordered), 1)
    return torch.cat([none, h.cumsum(1)], 1), torch.cat([none, (h * ordered).cumsum(1)], 1)


def surrogate(
    ordered: torch.Tensor, sums: tuple[torch.Tensor, torch.Tensor], scale: torch.Tensor, bits: int, n_steps: int
) -> torch.Tensor:
    """Where the surrogate puts the lowest level, for any number of scales of each group.

    Its derivative by that level t is monotone: `sum h (t - v)` over values below `t - scale/2` and
    `sum h (t + K scale - v)` over values above `t + (K + 1/2) scale`. Its root is found by Newton's steps, every
    other one halving the interval instead.

    Args:
        ordered: `(n_groups, n)`, sorted values, not divided by a scale.
        sums: `tail_sums` of them.
        scale: `(n_groups, n_scales)`.
        bits: of a symbol.
        n_steps: how many are made.

    Returns:
        `(n_groups, n_scales)`; the zero point is `-t / scale`.
    """
    high, (weight, moment) = 2**bits - 1, sums
    reach = high * scale
    left, right = ordered[:, :1].expand_as(scale), ordered[:, -1:] - reach
    left, right = torch.minimum(left, right), torch.maximum(left, right)
    at = (left + right) / 2
    for i in range(n_steps):
        below = torch.searchsorted(ordered, at - scale / 2)
        above = torch.searchsorted(ordered, at + reach + scale / 2, right=True)
        low, top = weight.gather(1, below), weight[:, -1:] - weight.gather(1, above)
        slope = low + top
        pulled = moment.gather(1, below) + moment[:, -1:] - moment.gather(1, above) - top * reach
        gradient = slope * at - pulled
        left, right = torch.where(gradient <= 0, at, left), torch.where(gradient >= 0, at, right)
        newton = (pulled / slope.clamp(min=1e-30)).clamp(left, right)
        # No value is beyond the ends: any place will do, and this is one.
        at = torch.where(slope <= 0, at, (left + right) / 2 if i % 2 else newton)
    return at


def nearby(
    values: torch.Tensor, h: torch.Tensor, start: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimiser of L within 1 of `start`, `(n_groups,)`, and L there.

    Args:
        values: `(n_groups, n)`, divided by the scale.
        h: their weights, of sum 1 in each group, of the same shape.
        start: zero points.
        bits: of a symbol.
    """
    high = 2**bits - 1
    begin = start[:, None] - 1
    nearest = (values + begin).round()
    # Every value is passed once in each unit, at the same place of it: half the places need sorting only.
    place, order = (nearest + 0.5 - values - begin).clamp_(0, 1).sort(1)
    nearest, passed = nearest.gather(1, order), h.gather(1, order)
    first = passed.where((nearest >= 0) & (nearest < high), 0)
    second = passed.where((nearest >= -1) & (nearest < high - 1), 0)
    places = begin + torch.cat([place, place + 1], 1)
    return _swept(places, torch.cat([first, second], 1), values, h, begin, begin + 2, high)


def _about_zero(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups moved to lie around 0, so that sums of squares lose nothing; and by how much, `(n_groups,)`."""
    wide = x.double().contiguous()
    middle = (wide.amin(1) + wide.amax(1)) / 2 if x.shape[1] else wide.new_zeros(len(x))
    return wide - middle[:, None], middle


def _swept(
    places: torch.Tensor, passed: torch.Tensor, values: torch.Tensor, h: torch.Tensor, begin: torch.Tensor,
    end: torch.Tensor, high: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The least L between `begin` and `end`, `(n_groups, 1)`.

    Args:
        places: sorted places, `(n_groups, n_places)`.
        passed: weight of the value whose symbol rises there; 0 where none does.
        values: `(n_groups, n)`.
        h: their weights.
        begin: before the first place.
        end: behind the last.
        high: the highest symbol; None where all symbols are 0 at `begin`.
    """
    off = values if high is None else values - (values + begin).round().clamp_(0, high)
    weighted = h * off
    slope = torch.cat([weighted.sum(1, keepdim=True), -passed], 1).cumsum_(1)
    rest = torch.cat([(weighted * off).sum(1, keepdim=True), 2 * passed * places], 1).cumsum_(1)
    bounds = torch.cat([begin, places, end], 1)
    best = (-slope).clamp(bounds[:, :-1], bounds[:, 1:])
    lost = (best + 2 * slope).mul_(best).add_(rest)
    least, at = lost.min(1)
    return best.gather(1, at[:, None])[:, 0], least.clamp_(min=0)
