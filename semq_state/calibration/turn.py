"""How keys turn with the position, in integers: the same cosines and sines on every machine.

`semq_state.rotary` computes them in floats, whose last bits no two mathematics libraries agree on. That is good
enough for lossy codecs; what a lossless one guesses from must be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import numpy.typing as npt

from semq_state.rotary import MAX_DIMS, ROTARY_LAYOUTS, Rotary

Floats: TypeAlias = npt.NDArray[np.float32]
_Powers: TypeAlias = npt.NDArray[np.int64]

FURTHEST: Final = 1 << 24
"""No token stands at or after this position: rounding would have added up."""

_BITS = 30
_ONE = 1 << _BITS


@final
@dataclass(frozen=True, eq=False)
class Turn:
    """A rotary embedding, as `semq_state.rotary.Rotary`, in fixed point.

    Args:
        layout: `half` or `interleaved`.
        begin: the first channel that turns.
        base: int32 `(pairs, 2)`: cosine and sine of each pair's angle from one position to the next, in 2^-30.
    """

    layout: str
    begin: int
    base: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rotary: Rotary) -> Turn:
        """The turn of a rotary embedding, rounded once and for all."""
        angles = np.array(rotary.inv_freq, np.float64)
        base = np.rint(np.stack([np.cos(angles), np.sin(angles)], axis=1) * _ONE).astype(np.int32)
        return cls(rotary.layout, rotary.begin, base)

    def table(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Cosines and sines of the positions from `start` to `stop`, `(stop - start, pairs)` each."""
        step = self.base.astype(np.int64).T
        powers = _power(step, start)[None]
        while len(powers) < stop - start:
            powers = np.concatenate([powers, _times(powers, step)])
            step = _times(step, step)
        cut = (powers[: stop - start] / np.float64(_ONE)).astype(np.float32)
        return cut[:, 0], cut[:, 1]

    def turned(self, values: Floats, cos: Floats, sin: Floats) -> Floats:
        """Vectors `(rows, head_dim)`, each turned by its angles; with `-sin`, back."""
        out = values.copy()
        (first, second), (first_out, second_out) = self._pairs(values), self._pairs(out)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(first, cos, out=first_out)
            first_out -= second * sin
            np.multiply(second, cos, out=second_out)
            second_out += first * sin
        return out

    def check(self, head_dim: int) -> None:
        """Refuses what is no rotation of vectors of `head_dim` numbers.

        Raises:
            ValueError: it is not.
        """
        if self.layout not in ROTARY_LAYOUTS or type(self.begin) is not int or not 0 <= self.begin <= MAX_DIMS:
            raise ValueError("the layout and place of a rotary embedding")
        if self.base.dtype != np.int32 or self.base.ndim != 2 or self.base.shape[1] != 2 or not len(self.base):
            raise ValueError("a table of int32 cosines and sines")
        if self.begin + 2 * len(self.base) > head_dim:
            raise ValueError("a rotary embedding within the head")
        wide = self.base.astype(np.float64)
        if not (np.abs((wide * wide).sum(axis=1) - float(1 << 60)) < float(1 << 33)).all():
            raise ValueError("cosines and sines of angles")

    def as_dict(self) -> dict[str, Any]:
        """Everything but `base`."""
        return {"layout": self.layout, "begin": self.begin}

    def _pairs(self, values: Floats) -> tuple[Floats, Floats]:
        n_pairs = len(self.base)
        turning = values[:, self.begin : self.begin + 2 * n_pairs]
        if self.layout == "interleaved":
            return turning[:, 0::2], turning[:, 1::2]
        return turning[:, :n_pairs], turning[:, n_pairs:]


def _power(step: _Powers, exponent: int) -> _Powers:
    """Unit complex numbers `(2, pairs)` to a power, by its bits, lowest first."""
    found = np.zeros_like(step)
    found[0] = _ONE
    while exponent:
        if exponent & 1:
            found = _times(found, step)
        step = _times(step, step)
        exponent >>= 1
    return found


def _times(a: _Powers, b: _Powers) -> _Powers:
    """Products of unit complex numbers `(…, 2, pairs)` in 2^-30, rounded to nearest."""
    (p, q), (r, s) = np.moveaxis(a, -2, 0), np.moveaxis(b, -2, 0)
    half = _ONE >> 1
    return np.stack([(p * r - q * s + half) >> _BITS, (p * s + q * r + half) >> _BITS], axis=-2)
