"""Which rotation takes keys at one position to the same keys at others; from keys alone, without a model.

The channels that change say where the rotation lies, angles that explain every pair say how pairs are laid out, and
a frequency is taken from the model's own tables where one of them explains the angles, else from the angles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from semq_state.rotary import ROTARY_LAYOUTS, Rotary

Samples = Mapping[int, torch.Tensor]
"""Position to what one and the same token (or a few of them) has as its keys there, `(vectors, head_dim)`."""

FIXED = "it does not depend on the position"
NO_ROTATION = "it changes with the position, but not by a rotation"
NO_PAIRS = "it turns with the position, but not in pairs of channels as any known layout has them"
NO_FREQUENCY = "it turns with the position, but not by an angle that is proportional to it"

_LEAST = 0.1  # relative change of a channel: a rotation turns something fast, and less could be fitted by anything
_MOST = 3.141592  # as pi rounded to float32 is more than pi


@dataclass(frozen=True)
class Found:
    """What is known of one layer: `rotary`, or the reason why it has none."""

    rotary: Rotary | None = None
    reason: str = ""


def fit(samples: Samples, tables: Sequence[torch.Tensor], tolerance: float) -> Found:
    """The rotation that explains all `samples`.

    Args:
        samples: keys at two positions at least; the smallest gaps between the first position and the others must be
            small (1, 3, 17 …), as an angle is only known up to full turns.
        tables: inverse frequencies that the model holds, `(pairs,)` each, preferred to measured ones.
        tolerance: the largest relative error of a pair of channels that rounding explains: 1e-3 in float32.
    """
    keys = {position: samples[position].to(torch.float64) for position in sorted(samples)}
    start = next(iter(keys))
    if not all(torch.isfinite(k).all() for k in keys.values()):
        return Found(reason="it is not finite")
    base = keys[start]
    moved = torch.stack([(k - base).norm(dim=0) for k in keys.values()]).amax(0)
    size = base.norm(dim=0)
    moved = moved / (size + size.mean())
    moves = moved > tolerance / 10
    if not moves.any():
        return Found(reason=FIXED)
    if moved.max() < _LEAST:
        return Found(reason=NO_ROTATION)
    lengths = base.norm(dim=1)
    if any(((k.norm(dim=1) - lengths).abs() > tolerance * lengths).any() for k in keys.values()):
        return Found(reason=NO_ROTATION)
    reason = NO_PAIRS
    measured: list[Rotary] = []
    for begin, n_dims in _slices(moves, tables):
        for layout in ROTARY_LAYOUTS:
            turned = _Turned(keys, Rotary(layout, begin, n_dims, (0.0,) * (n_dims // 2)))
            if turned.error() > tolerance:
                continue
            reason = NO_FREQUENCY
            fitting = [table for table in tables if 2 * len(table) == n_dims]
            if fitting and turned.error(table := min(fitting, key=turned.error)) <= tolerance:
                return Found(turned.rotary(table))
            frequencies = turned.frequencies()
            known = _snapped(frequencies, tables)
            measured += [turned.rotary(x) for x in (known, frequencies) if turned.error(x) <= tolerance]
    return Found(measured[0]) if measured else Found(reason=reason)


class _Turned:
    """Keys at several positions, looked at as pairs of one layout.

    Args:
        keys: as `Samples`, first position first, float64.
        shape: the layout and slice; its frequencies are not used.
    """

    def __init__(self, keys: Samples, shape: Rotary) -> None:
        self._shape = shape
        pairs = {position: torch.complex(*shape.pairs(k)) for position, k in keys.items()}
        self._start, self._base = next(iter(pairs.items()))
        self._others = {p - self._start: k for p, k in pairs.items() if p != self._start}
        # Pairs that carry next to nothing are held to an error in proportion to the whole.
        size = self._base.abs().square().sum(0).sqrt()
        self._size = size + 0.01 * size.mean()
        # A turn of each gap, `(pairs,)`: the one that explains all vectors best.
        self._turns = {gap: (k * self._base.conj()).sum(0) for gap, k in self._others.items()}

    def error(self, frequencies: torch.Tensor | None = None) -> float:
        """The largest relative error of a pair, with these frequencies or with the best angle for each gap."""
        errors = [
            (self._base * torch.exp(1j * self._angle(gap, frequencies)) - keys).abs().square().sum(0).sqrt()
            for gap, keys in self._others.items()
        ]
        return float((torch.stack(errors) / self._size).max())

    def _angle(self, gap: int, frequencies: torch.Tensor | None) -> torch.Tensor:
        if frequencies is None:
            return self._turns[gap].angle()
        rounded = frequencies.to(torch.float32)
        end, start = (rounded * float(at) for at in (self._start + gap, self._start))
        return end.to(torch.float64) - start.to(torch.float64)

    def frequencies(self) -> torch.Tensor:
        """Measured, `(pairs,)`: from a small gap, then refined with larger ones."""
        found = torch.zeros(self._base.shape[1], dtype=torch.float64)
        for gap in sorted(self._turns):
            angle = self._turns[gap].angle()
            turns = ((found * gap - angle) / (2 * math.pi)).round() if found.any() else 0
            found = (angle + 2 * math.pi * turns) / gap
        return found.clamp(-_MOST, _MOST)

    def rotary(self, frequencies: torch.Tensor) -> Rotary:
        values = frequencies.to(torch.float32).to(torch.float64).tolist()
        return Rotary(self._shape.layout, self._shape.begin, self._shape.n_dims, tuple(values))


def _slices(moves: torch.Tensor, tables: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Where the rotated channels may begin and how many they may be: as the model's tables say, then as seen."""
    head_dim = len(moves)
    seen = moves.nonzero().flatten()
    low, high = int(seen[0]), int(seen[-1]) + 1
    proposed = [(begin, 2 * len(t)) for t in tables for begin in (0, head_dim - 2 * len(t), low)]
    proposed += [(low, high - low), (0, high), (low, head_dim - low), (0, head_dim)]
    for begin, n_dims in dict.fromkeys((begin, n_dims + n_dims % 2) for begin, n_dims in proposed):
        if 0 <= begin <= low and high <= begin + n_dims <= head_dim:
            yield begin, n_dims


def _snapped(measured: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """The model's own value next to each measured one, where it holds any: some models reorder their tables."""
    if not tables:
        return measured
    own = torch.cat([table.to(torch.float64) for table in tables])
    own = torch.cat([own, -own])
    return own[(measured[:, None] - own).abs().argmin(1)]
