"""NeUQI's grids for states: in each group the scale and the zero point, no integer, that lose least.

NeUQI (Lin et al., arXiv 2505.17595, section 4) is a quantiser of weights; a group of a state is taken as one of
theirs. The zero point that is no integer suits keys, whose channels lie far from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from semq_state.codecs import grids
from semq_state.codecs.grouping import wrong
from semq_state.codecs.parts import check_names, check_vectors
from semq_state.codecs.symbolic import AbstractWeightedCodec, Symbolic, damaged


@final
@dataclass(frozen=True)
class Neuqi(AbstractWeightedCodec):
    """Uniform quantisation whose scale and zero point are searched for each group of values.

    Args:
        bits: per value, 2 to 8.
        along: what a group is: neighbouring channels of one `token`, or successive tokens of one `channel`.
        group: how many values share a scale; the last group of a row may have fewer.
    """

    id: ClassVar[str] = "neuqi"
    bits: int = 3
    along: str = "token"
    group: int = 64

    def __post_init__(self) -> None:
        if said := wrong(self.bits, self.along, self.group):
            raise ValueError(f"{said}, got {self!r}")

    def encode(self, values: torch.Tensor, importance: torch.Tensor | None = None) -> Symbolic:
        symbols, exact = grids.encoded(values, self.bits, self.along, self.group, grids.best, importance)
        return Symbolic({"values": symbols}, exact, {"bits": self.bits, "along": self.along, "group": self.group})

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        params: dict[str, Any] = dict(symbolic.params)
        if params.keys() != {"bits", "along", "group"} or wrong(**params):
            raise damaged(self.id, "its parameters: bits, along, group", params)
        check_names(self.id, symbolic, symbols=["values"], exact=["scale", "minimum"], params=params.keys())
        return grids.decoded(self.id, symbolic, shape, **params)
