"""A rotary position embedding as a plain value: undone on cached keys, and redone.

Keys lie in a cache as the model's attention reads them, each pair of channels turned by an angle that grows with
the token's position (Su et al. 2021, RoFormer, eq. 34). Turned back, a channel means the same at every token, which
is what a quantiser of keys wants to see. A rotation is inverted by its own parameters, whatever they are: wrong
ones cost compression, never correctness.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from semq_state.errors import FormatError, IntegrityError

ROTARY_LAYOUTS = ("half", "interleaved")
MAX_DIMS = 1 << 16


@final
@dataclass(frozen=True)
class Rotary:
    """How the keys of one layer turn with the position.

    Channels `begin` to `begin + n_dims` turn in pairs, `first` and `second`, by the angle `position * inv_freq`:
    `(first cos - second sin, second cos + first sin)`. The others stay as they are.

    Args:
        layout: `half`: channel `j` of the slice and channel `j + n_dims / 2`; `interleaved`: `2 j` and `2 j + 1`.
        begin: the first channel that turns.
        n_dims: how many turn, an even number.
        inv_freq: of each pair, radians from one position to the next, at most pi either way: positions are whole
            numbers, so there is no other angle. Negative where a model turns the other way round.
    """

    layout: str
    begin: int
    n_dims: int
    inv_freq: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.layout not in ROTARY_LAYOUTS:
            raise ValueError(f"`layout` must be one of {ROTARY_LAYOUTS}, got {self.layout!r}")
        if type(self.begin) is not int or not 0 <= self.begin <= MAX_DIMS:
            raise ValueError(f"`begin` must be an integer of 0 to {MAX_DIMS}, got {self.begin!r}")
        if type(self.n_dims) is not int or not 0 < self.n_dims <= MAX_DIMS or self.n_dims % 2:
            raise ValueError(f"`n_dims` must be an even integer of 2 to {MAX_DIMS}, got {self.n_dims!r}")
        if type(self.inv_freq) is not tuple or len(self.inv_freq) != self.n_dims // 2:
            raise ValueError(f"`inv_freq` must be a tuple of {self.n_dims // 2}, got {reprlib.repr(self.inv_freq)}")
        for angle in self.inv_freq:
            if type(angle) is not float or not abs(angle) <= math.pi:
                raise ValueError(f"`inv_freq` must hold floats of at most pi, got {reprlib.repr(angle)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_dict`."""
        return {
            "layout": self.layout,
            "begin": self.begin,
            "n_dims": self.n_dims,
            "inv_freq": list(self.inv_freq),
        }

    @classmethod
    def from_dict(cls, plain: object) -> Rotary:
        """The value that `as_dict` wrote.

        Raises:
            FormatError: anything else.
        """
        names = {"layout", "begin", "n_dims", "inv_freq"}
        if not isinstance(plain, Mapping) or plain.keys() != names or type(plain["inv_freq"]) is not list:
            raise _damaged(f"a mapping of {', '.join(sorted(names))}", reprlib.repr(plain))
        try:
            return cls(plain["layout"], plain["begin"], plain["n_dims"], tuple(plain["inv_freq"]))
        except ValueError as error:
            raise _damaged("a rotary embedding", str(error)) from error

    def redo(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turns keys to their positions; the inverse of `undo`.

        Args:
            keys: float32 `(…, seq, head_dim)`.
            positions: int64 `(…, seq)`; its leading axes broadcast against those of `keys`.

        Returns:
            A new tensor like `keys`.

        Raises:
            IntegrityError: the slice does not lie within `head_dim`.
        """
        return self._turned(keys, positions, 1.0)

    def undo(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turns keys back to position 0; arguments as in `redo`."""
        return self._turned(keys, positions, -1.0)

    def _turned(self, keys: torch.Tensor, positions: torch.Tensor, sign: float) -> torch.Tensor:
        begin, end = self.begin, self.begin + self.n_dims
        if keys.shape[-1] < end:
            raise IntegrityError(
                "rotary embedding",
                expected=f"keys of at least {end} channels",
                found=str(keys.shape[-1]),
                do="the file is damaged; use another copy of it",
            )
        # As in the models: the angle is rounded to float32, which at position 10000 already shows in the keys.
        frequencies = torch.tensor(self.inv_freq, dtype=torch.float32)
        angles = (positions.cpu().to(torch.float32)[..., None] * frequencies).to(torch.float64)
        cos = angles.cos().to(keys.device, torch.float32)
        sin = (angles.sin() * sign).to(keys.device, torch.float32)
        out = torch.empty_like(keys, memory_format=torch.contiguous_format)
        out[..., :begin], out[..., end:] = keys[..., :begin], keys[..., end:]
        (first, second), (first_out, second_out) = self.pairs(keys), self.pairs(out)
        torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1.0)
        torch.mul(second, cos, out=second_out).addcmul_(first, sin)
        return out

    def pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and the second channels of all pairs, `(…, n_dims / 2)` each."""
        turning = keys[..., self.begin : self.begin + self.n_dims]
        if self.layout == "interleaved":
            return turning[..., 0::2], turning[..., 1::2]
        half = self.n_dims // 2
        return turning[..., :half], turning[..., half:]


def _damaged(expected: str, found: str) -> FormatError:
    return FormatError(
        "rotary embedding",
        expected=expected,
        found=f"{found:.200}",
        do="the file is damaged; use another copy of it",
    )
