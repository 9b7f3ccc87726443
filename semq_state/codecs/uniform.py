"""Uniform quantisation in groups: the honest baseline, as in KIVI and in transformers' quantised caches.

Each group of values has a step, and unless it is symmetric about 0 a minimum (Liu et al., "KIVI", arXiv 2402.02750,
section 3.1: `q = round((x - minimum) / step)`). KIVI groups keys along a channel and values along a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from semq_state.codecs import grouping
from semq_state.codecs.grouping import axis_of, part, per_group, pieces, split, wide
from semq_state.codecs.parts import check_names, check_vectors, exact_of, symbols_of
from semq_state.codecs.symbolic import AbstractVectorCodec, Symbolic, Symbols, damaged

_MOST = torch.finfo(torch.float32).max
_WIDER = 1 / 64  # float16 is taken where it adds at most this part to the mean squared error


@final
@dataclass(frozen=True)
class Uniform(AbstractVectorCodec):
    """Uniform quantisation with a step for each group of values.

    Args:
        bits: per value, 2 to 8.
        along: what a group is: neighbouring channels of one `token`, or successive tokens of one `channel`.
        group: how many values share a step; the last group of a row may have fewer.
        symmetric: no minimum is kept, and 0 stays 0; one level is given up.
    """

    id: ClassVar[str] = "uniform"
    bits: int = 4
    along: str = "token"
    group: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        wrong = _wrong(self.bits, self.along, self.group, self.symmetric)
        if wrong:
            raise ValueError(f"{wrong}, got {self!r}")

    def encode(self, values: torch.Tensor) -> Symbolic:
        axis, lowest, highest = axis_of(self.along), *_alphabet(self.bits, self.symmetric)
        shape = per_group(tuple(values.shape), axis, self.group)
        below, above = values.new_empty(shape), values.new_empty(shape)
        for piece, groups in pieces(values.shape[axis], self.group):
            found = split(values, axis, piece, groups)
            torch.amin(found, axis, out=part(below, axis, groups))
            torch.amax(found, axis, out=part(above, axis, groups))
        if self.symmetric:
            exact = {"scale": _scales(torch.maximum(above, -below) / highest)}
        else:
            exact = _scales_and_minima(below, above, highest)
        made = torch.empty(values.shape, dtype=torch.int8 if self.symmetric else torch.uint8)
        scale, minimum = (wide(exact[name]) if name in exact else None for name in ("scale", "minimum"))
        assert scale is not None
        steps = scale.masked_fill(scale == 0, 1)
        for piece, groups in pieces(values.shape[axis], self.group):
            found = split(values, axis, piece, groups)
            if minimum is not None:
                found = found - part(minimum, axis, groups).unsqueeze(axis)
            scaled = (found / part(steps, axis, groups).unsqueeze(axis)).round_().clamp_(lowest, highest)
            split(made, axis, piece, groups).copy_(scaled)
        params = {"bits": self.bits, "along": self.along, "group": self.group, "symmetric": self.symmetric}
        return Symbolic({"values": Symbols(made, lowest, highest)}, exact, params)

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        bits, along, group, symmetric = _params(symbolic)
        names = ["scale"] if symmetric else ["scale", "minimum"]
        check_names(self.id, symbolic, symbols=["values"], exact=names, params=symbolic.params.keys())
        axis, alphabet = axis_of(along), _alphabet(bits, symmetric)
        symbols = symbols_of(self.id, symbolic, "values", shape, [torch.int8 if symmetric else torch.uint8])
        if (symbols.lowest, symbols.highest) != alphabet:
            raise damaged(self.id, f"symbols {alphabet}", f"{symbols.lowest, symbols.highest}")
        counted, dtypes = per_group(tuple(shape), axis, group), [torch.float16, torch.float32]
        exact = {name: wide(exact_of(self.id, symbolic, name, counted, dtypes)) for name in names}
        if bool((exact["scale"] < 0).any()):
            raise damaged(self.id, "steps of 0 or more", "a negative one")
        values = torch.empty(shape, dtype=torch.float32)
        for piece, groups in pieces(shape[axis], group):
            restored = split(symbols.values, axis, piece, groups) * part(exact["scale"], axis, groups).unsqueeze(
                axis
            )
            if not symmetric:
                restored += part(exact["minimum"], axis, groups).unsqueeze(axis)
            split(values, axis, piece, groups).copy_(restored.clamp_(-_MOST, _MOST))
        return values


def _wrong(bits: object, along: object, group: object, symmetric: object) -> str:
    """What is wrong with the parameters; empty if nothing is."""
    if type(symmetric) is not bool:
        return grouping.wrong(bits, along, group) or "`symmetric` must be true or false"
    return grouping.wrong(bits, along, group)


def _params(symbolic: Symbolic) -> tuple[int, str, int, bool]:
    """The parameters of a file.

    Raises:
        IntegrityError: they are not those of this codec.
    """
    params: dict[str, Any] = dict(symbolic.params)
    if params.keys() != {"bits", "along", "group", "symmetric"} or _wrong(**params):
        raise damaged(Uniform.id, "its parameters: bits, along, group, symmetric", params)
    return params["bits"], params["along"], params["group"], params["symmetric"]


def _alphabet(bits: int, symmetric: bool) -> tuple[int, int]:
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _scales(scale: torch.Tensor) -> torch.Tensor:
    """The steps as float16 where that is as good, else as they are."""
    narrow = _raised(scale)
    return narrow if _as_good(narrow, scale) else scale


def _scales_and_minima(below: torch.Tensor, above: torch.Tensor, highest: int) -> dict[str, torch.Tensor]:
    """The steps and minima of all groups, both float16 where that is as good, else both float32."""
    scale = above / highest - below / highest
    constant = above == below
    # A minimum is rounded down and the step made to reach from there, so nothing is cut off at either end.
    minimum = torch.where(constant, below.half(), -_raised(-below))
    reach = torch.where(constant, 0, above / highest - minimum.float() / highest)
    narrow = _raised(reach)
    off = (minimum.float() - below).abs()
    held = bool((torch.where(constant, off, 0) <= below.abs() * 2.0**-11).all())
    if held and bool(torch.isfinite(minimum).all()) and _as_good(narrow, scale):
        return {"scale": narrow, "minimum": minimum}
    return {"scale": scale, "minimum": below}


def _as_good(narrow: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the squared error, which grows as a step's square, stays within `_WIDER` on average."""
    groups = scale > 0
    wider = (narrow[groups].double() / scale[groups].double()).square()
    lost = bool(torch.isinf(narrow).any()) or bool((narrow[~groups] > 0).any())
    return not lost and (not wider.numel() or float(wider.mean()) <= 1 + _WIDER)


def _raised(values: torch.Tensor) -> torch.Tensor:
    """float16, rounded up."""
    near = values.half()
    return torch.where(near.float() < values, torch.nextafter(near, near.new_tensor(torch.inf)), near)
