"""SpecQuant's branch for states: the lowest frequencies of each channel over time apart, the rest in few bits.

SpecQuant (arXiv 2511.11663, section 3) keeps the lowest frequencies of each channel of a weight in 16 bits and
quantises the rest. Of a state it is over time that channels are smooth: the mean of a key's channel is often larger
than what varies. By Parseval's theorem the energy of what is kept is known before anything is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from semq_state.codecs import grids
from semq_state.codecs.grouping import wrong
from semq_state.codecs.parts import check_names, check_vectors, exact_of
from semq_state.codecs.symbolic import AbstractWeightedCodec, Symbolic, damaged
from semq_state.quantizers import spectrum

_TELLING = 0.3  # of a channel's energy: where the lowest frequencies hold less, only its mean is kept
_LARGEST = 2.0**100  # squares of what is larger, summed, leave float32: such states have no branch


@final
@dataclass(frozen=True)
class Specquant(AbstractWeightedCodec):
    """The lowest frequencies of each channel over time in 16 bits, and the rest on NeUQI's grids.

    Args:
        bits: per value of the rest, 2 to 8.
        along: what a group of the rest is: neighbouring channels of one `token`, or successive tokens of one
            `channel`.
        group: how many values share a scale; the last group of a row may have fewer.
        share: of a channel's energy that its lowest frequencies are to hold, 0 to 1.
        budget: bits per value that they may take at most; the mean of each channel is always kept.
    """

    id: ClassVar[str] = "specquant"
    bits: int = 3
    along: str = "token"
    group: int = 64
    share: float = 0.9
    budget: float = 0.25

    def __post_init__(self) -> None:
        said = wrong(self.bits, self.along, self.group)
        if not said and not (isinstance(self.share, (int, float)) and 0 <= self.share <= 1):
            said = "`share` must be 0 to 1"
        if not said and not (isinstance(self.budget, (int, float)) and 0 <= self.budget <= 16):
            said = "`budget` must be 0 to 16"
        if said:
            raise ValueError(f"{said}, got {self!r}")

    def encode(self, values: torch.Tensor, importance: torch.Tensor | None = None) -> Symbolic:
        counts, coefficients, branch = self._branch(values)
        rest = values if branch is None else values - branch
        symbols, exact = grids.encoded(rest, self.bits, self.along, self.group, grids.best, importance)
        exact |= {"counts": counts, "coefficients": coefficients}
        return Symbolic({"values": symbols}, exact, {"bits": self.bits, "along": self.along, "group": self.group})

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        params: dict[str, Any] = dict(symbolic.params)
        if params.keys() != {"bits", "along", "group"} or wrong(**params):
            raise damaged(self.id, "its parameters: bits, along, group", params)
        exact = ["scale", "minimum", "counts", "coefficients"]
        check_names(self.id, symbolic, symbols=["values"], exact=exact, params=params.keys())
        values = grids.decoded(self.id, symbolic, shape, **params)
        *leading, seq, dim = shape
        counts = exact_of(self.id, symbolic, "counts", (*leading, dim), [torch.int16])
        most = min(seq // 2 + 1, torch.iinfo(torch.int16).max) if seq else 0
        if counts.numel() and not (int(counts.min()) >= 0 and int(counts.max()) <= most):
            raise damaged(self.id, f"0 to {most} frequencies", f"{int(counts.min())} to {int(counts.max())}")
        kept = int((2 * counts.long() - 1).clamp(min=0).sum())
        dtypes = [torch.float16, torch.float32]
        coefficients = exact_of(self.id, symbolic, "coefficients", (kept,), dtypes)
        if kept:
            values += _over_time(counts, coefficients, tuple(shape))
        limit = torch.finfo(torch.float32).max
        return values.nan_to_num_(0.0, limit, -limit)

    def _branch(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """How many frequencies each channel keeps, their coefficients, and what these make, if any."""
        *leading, seq, dim = values.shape
        if not values.numel() or float(values.abs().amax()) > _LARGEST:
            return torch.zeros(*leading, dim, dtype=torch.int16), torch.zeros(0, dtype=torch.float16), None
        rows = values.transpose(-1, -2).reshape(-1, seq)
        counts = self._counts(rows)
        made = spectrum.branch(rows, counts)
        counts = counts.view(*leading, dim)
        return counts, made.coefficients, _over_time(counts, made.coefficients, tuple(values.shape))

    def _counts(self, rows: torch.Tensor) -> torch.Tensor:
        """Of each row the fewest frequencies that hold the share, as far as the budget reaches; else the mean."""
        # In units of the largest value, so that no square vanishes.
        unit = rows.abs().amax(1, keepdim=True)
        energy = spectrum.energy(rows / torch.where(unit > 0, unit, 1)).double()
        seq = rows.shape[1]
        most = min(max(1, int((self.budget * seq / 16 + 1) / 2)), energy.shape[1], torch.iinfo(torch.int16).max)
        held = energy[:, :most].cumsum(1) / energy.sum(1, keepdim=True).clamp(min=1e-300)
        counts = ((held < self.share).sum(1) + 1).clamp(max=most)
        return torch.where(held[:, -1] < _TELLING, 1, counts).to(torch.int16)


def _over_time(counts: torch.Tensor, coefficients: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What frequencies make, float32 of `shape`, a view."""
    seq = shape[-2]
    kept = counts.flatten()
    some = kept > 0
    rows = torch.zeros(len(kept), seq)
    rows[some] = spectrum.Branch(kept[some], coefficients).values(seq)
    return rows.view(*shape[:-2], shape[-1], seq).transpose(-1, -2)
