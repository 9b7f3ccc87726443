"""Values on grids fitted group by group: what the codecs `neuqi`, `septq` and `specquant` share.

A group has a scale and a minimum, the value of symbol 0. Both are rounded to the precision in which they are kept
before any symbol is found, so that symbols are the nearest ones for whoever decodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from semq_state.codecs.grouping import axis_of, part, per_group, pieces, split, wide
from semq_state.codecs.parts import exact_of, symbols_of
from semq_state.codecs.symbolic import Symbolic, Symbols, damaged
from semq_state.quantizers import grid as grids
from semq_state.quantizers import neuqi

Fit = Callable[[torch.Tensor, int, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""Groups `(n_groups, n)`, bits and importances of the same shape to scale and zero point, `(n_groups,)` each."""

_MOST = torch.finfo(torch.float32).max
_WIDER = 1 / 64  # float16 is taken where it adds at most this part to the mean squared error
_COARSE, _FINE = 32, 8  # scales that are tried: half of the published numbers, for a thousandth more error


def best(values: torch.Tensor, bits: int, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """NeUQI's grid."""
    return neuqi.fit(values, bits, importance, coarse=_COARSE, fine=_FINE)


def shrunk(values: torch.Tensor, bits: int, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """From the least to the largest value, drawn in as SEPTQ does; about the middle of a group, not about 0."""
    unit = values.abs().amax(1)
    # Powers of errors neither vanish nor overflow in units of the largest value.
    unit = torch.where(unit > 0, unit, 1)
    values = values / unit[:, None]
    middle = (values.amin(1) + values.amax(1)) / 2
    scale, zero = grids.shrunk(values - middle[:, None], bits)
    return scale * unit, zero - middle / scale


def encoded(
    values: torch.Tensor, bits: int, along: str, group: int, fit: Fit, importance: torch.Tensor | None = None
) -> tuple[Symbols, dict[str, torch.Tensor]]:
    """The symbols of values, and `scale` and `minimum` of their groups.

    Args:
        values: float32 `(…, seq, dim)`, finite.
        bits: of a symbol.
        along: what a group runs along.
        group: values of a group.
        fit: finds the grid.
        importance: how much a squared error of each value matters, of a shape that expands to that of `values`.
    """
    axis = axis_of(along)
    shape = per_group(tuple(values.shape), axis, group)
    scale, minimum = values.new_zeros(shape), values.new_zeros(shape)
    # What is the same for a whole group does not change its grid.
    weighs = importance is not None and importance.shape[axis] > 1
    for piece, groups in pieces(values.shape[axis], group):
        rows = split(values, axis, piece, groups).movedim(axis, -1)
        if not rows.numel():
            continue
        flat, weights = rows.reshape(-1, rows.shape[-1]).contiguous(), None
        if weighs:
            assert importance is not None
            own = split(importance.expand(values.shape), axis, piece, groups).movedim(axis, -1)
            weights = own.reshape(flat.shape)
        step, zero = fit(flat, bits, weights)
        low = flat.amin(1)
        constant = flat.amax(1) == low
        step, low = torch.where(constant, 0, step), torch.where(constant, low, -(step.double() * zero).float())
        for whole, found in ((scale, step), (minimum, low)):
            part(whole, axis, groups).copy_(found.view(rows.shape[:-1]))
    exact = _stored(scale, minimum)
    steps, lows = wide(exact["scale"]), wide(exact["minimum"])
    steps = steps.masked_fill(steps == 0, 1)
    made = torch.empty(values.shape, dtype=torch.uint8)
    for piece, groups in pieces(values.shape[axis], group):
        moved = split(values, axis, piece, groups) - part(lows, axis, groups).unsqueeze(axis)
        moved = (moved / part(steps, axis, groups).unsqueeze(axis)).round_().clamp_(0, 2**bits - 1)
        split(made, axis, piece, groups).copy_(moved)
    return Symbols(made, 0, 2**bits - 1), exact


def decoded(
    codec: str, symbolic: Symbolic, shape: tuple[int, ...], bits: int, along: str, group: int
) -> torch.Tensor:
    """The inverse: symbols `values` and exact `scale` and `minimum` to values, float32 of `shape`.

    Raises:
        IntegrityError: they are not what `encoded` makes.
    """
    axis = axis_of(along)
    symbols = symbols_of(codec, symbolic, "values", shape, [torch.uint8])
    if (symbols.lowest, symbols.highest) != (0, 2**bits - 1):
        raise damaged(codec, f"symbols 0 to {2**bits - 1}", f"{symbols.lowest, symbols.highest}")
    counted, dtypes = per_group(tuple(shape), axis, group), [torch.float16, torch.float32]
    scale, minimum = (wide(exact_of(codec, symbolic, name, counted, dtypes)) for name in ("scale", "minimum"))
    if bool((scale < 0).any()):
        raise damaged(codec, "steps of 0 or more", "a negative one")
    return levels(symbols.values, scale, minimum, axis, group)


def levels(
    symbols: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, axis: int, group: int
) -> torch.Tensor:
    """What symbols stand for, float32."""
    values = torch.empty(symbols.shape, dtype=torch.float32)
    for piece, groups in pieces(symbols.shape[axis], group):
        restored = split(symbols, axis, piece, groups) * part(scale, axis, groups).unsqueeze(axis)
        restored += part(minimum, axis, groups).unsqueeze(axis)
        split(values, axis, piece, groups).copy_(restored.clamp_(-_MOST, _MOST))
    return values


def restored_of(symbols: Symbols, exact: dict[str, torch.Tensor], along: str, group: int) -> torch.Tensor:
    """What `encoded` made, as it will be decoded."""
    return levels(symbols.values, wide(exact["scale"]), wide(exact["minimum"]), axis_of(along), group)


def _stored(scale: torch.Tensor, minimum: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales and minima of all groups, both float16 where that is as good, else both float32."""
    narrow = scale.half()
    groups = scale > 0
    low = minimum.half()
    off = torch.where(groups, (low.double() - minimum.double()) / scale.double(), 0).square()
    wider = float(off.sum()) * 12 / max(1, int(groups.sum()))
    held = (narrow.double() - scale).abs() <= scale.double() * 2.0**-10
    constant = (low.double() - minimum).abs() <= minimum.double().abs() * 2.0**-11
    good = bool((held & (groups | constant)).all()) and bool(torch.isfinite(low).all())
    if good and wider <= _WIDER:
        return {"scale": narrow, "minimum": low}
    return {"scale": scale, "minimum": minimum}
