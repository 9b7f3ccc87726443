"""SEPTQ's escapes for states: a plain grid, and the few values that it would hurt most kept exactly.

SEPTQ (arXiv 2604.10091, section 3) keeps the share p of a matrix with the largest `(w - q)**2 / U_jj**2`, chosen
once for all of it, and rounds the rest on a grid fitted to all of it. Its U comes from the inputs of a layer;
states have none, so nothing is compensated, and an importance takes the place of `1 / U_jj**2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from semq_state.codecs import grids
from semq_state.codecs.grouping import wrong
from semq_state.codecs.parts import check_names, check_vectors, exact_of, symbols_of
from semq_state.codecs.symbolic import AbstractWeightedCodec, Symbolic, Symbols, damaged
from semq_state.quantizers import escapes

_KEPT = (torch.bfloat16, torch.float16, torch.float32)


@final
@dataclass(frozen=True)
class Septq(AbstractWeightedCodec):
    """Uniform quantisation with the share of values exact whose rounding would cost most.

    Args:
        bits: per value, 2 to 8.
        along: what a group is: neighbouring channels of one `token`, or successive tokens of one `channel`.
        group: how many values share a scale; the last group of a row may have fewer.
        share: of the values that are kept exactly, 0 to 1/2; 0.01 costs a quarter of a bit.
    """

    id: ClassVar[str] = "septq"
    bits: int = 3
    along: str = "token"
    group: int = 64
    share: float = 0.01

    def __post_init__(self) -> None:
        said = wrong(self.bits, self.along, self.group)
        if not said and not (isinstance(self.share, (int, float)) and 0 <= self.share <= 0.5):
            said = "`share` must be 0 to 1/2"
        if said:
            raise ValueError(f"{said}, got {self!r}")

    def encode(self, values: torch.Tensor, importance: torch.Tensor | None = None) -> Symbolic:
        symbols, exact = grids.encoded(values, self.bits, self.along, self.group, grids.shrunk)
        if importance is None:
            # Heads and layers differ in size: without a word on what matters, relative errors count.
            energy = values.double().square().mean((-2, -1), keepdim=True)
            importance = torch.where(energy > 0, 1 / energy.clamp(min=1e-76), 0)
        restored = grids.restored_of(symbols, exact, self.along, self.group)
        dim = max(1, values.shape[-1])
        cost = importance.double().expand(values.shape).reshape(-1, dim)
        chosen = escapes.mask(values.double().reshape(-1, dim), restored.reshape(-1, dim), cost, self.share)
        chosen = chosen.view(values.shape)
        params = {"bits": self.bits, "along": self.along, "group": self.group}
        made = {"values": symbols, "mask": Symbols(chosen.to(torch.uint8), 0, 1)}
        return Symbolic(made, {**exact, "kept": _narrowest(values[chosen])}, params)

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        params: dict[str, Any] = dict(symbolic.params)
        if params.keys() != {"bits", "along", "group"} or wrong(**params):
            raise damaged(self.id, "its parameters: bits, along, group", params)
        exact = ["scale", "minimum", "kept"]
        check_names(self.id, symbolic, symbols=["values", "mask"], exact=exact, params=params.keys())
        values = grids.decoded(self.id, symbolic, shape, **params)
        mask = symbols_of(self.id, symbolic, "mask", shape, [torch.uint8])
        if (mask.lowest, mask.highest) != (0, 1):
            raise damaged(self.id, "a mask of 0 and 1", f"{mask.lowest, mask.highest}")
        chosen = mask.values != 0
        kept = exact_of(self.id, symbolic, "kept", (int(chosen.sum()),), _KEPT)
        values[chosen] = kept.float()
        return values


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    """The values in the first dtype that holds all of them exactly."""
    return next(narrow for dtype in _KEPT if torch.equal((narrow := values.to(dtype)).float(), values))
