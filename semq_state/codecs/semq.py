"""SEMQ's operators for vectors of any norm: the norm beside the symbols of the direction.

Each vector `v` is stored as `r = ||v - mu||` and the symbols of `(v - mu) / r`, and comes back as
`mu + r * decoded`. The rules are SEMQ's (`semq_rules.py`, which also says whose they are and are not). The range
factor `c`, the centring and the renormalising are not: with SEMQ's fixed range more than 4 bits buy almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.codecs.parts import check_vectors
from semq_state.codecs.semq_rules import (
    OPERATORS,
    TINY,
    UNIT_TOLERANCE,
    AbstractOperator,
    Quant,
    best_range,
    blocks,
)
from semq_state.codecs.symbolic import AbstractVectorCodec, Symbolic, Symbols, damaged
from semq_state.errors import UnsupportedOperationError

PARAMETERS = {"quant": 8, "phase": 16, "orbit": 50}
"""Bins, sectors or scale where none is given."""

_MAX = np.finfo(np.float32).max
_HALF = np.finfo(np.float16)
_FAR = 4.0  # times the median norm
_LEAST = 2.0**-20  # of the root mean square of all channels' sizes
_SMALLEST_SCALE = 2.0**-100  # below, what is divided by it might overflow
_ZERO = -1.0  # the norm that stands for a vector of zeros among centred ones

Floats = NDArray[np.float32]


@final
@dataclass(frozen=True)
class Semq(AbstractVectorCodec):
    """SEMQ with norms.

    Args:
        operator: `quant` (sign and magnitude bin of each coordinate); `phase` (the angle of each pair of
            neighbours: radii are lost, so the cosine with the original is only about 0.88); `orbit` (digital
            roots: at its scale of 50, vectors of fewer than some 500 coordinates alias).
        parameter: bins of each sign (8 are 4 bits a value), sectors or scale; None for 8, 16 or 50.
        c: where the range of `quant` ends, in root mean square coordinates; SEMQ's is 2, None is the best for
            Gaussian coordinates at this number of bins.
        centred: whether each channel's mean over the tokens is subtracted first, and stored: keys have strong ones.
        renormalised: whether the decoded direction is scaled to norm 1. None does so where it lowers the error:
            `quant` with at least 4 bins, and `phase`, which cannot do without.
        scaled: whether each channel's root mean square over the tokens, after centring, is divided out first, and
            stored: some channels of hidden states are a hundred times as large as others, and would be cut off.
            Tokens whose norm is more than 4 times the median do not count for means and sizes.
    """

    id: ClassVar[str] = "semq"
    operator: str = "quant"
    parameter: int | None = None
    c: float | None = None
    centred: bool = False
    renormalised: bool | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"`operator` must be one of {tuple(OPERATORS)}, got {self.operator!r}")
        if self.parameter is not None and (type(self.parameter) is not int or self.parameter < 1):
            raise ValueError(f"`parameter` must be a positive int, got {self.parameter!r}")
        if self.c is not None and (self.operator != "quant" or not 1 / 16 <= self.c <= 256):
            raise ValueError(f"`c` must be 1/16 to 256, and is for quant only, got {self.c!r} for {self.operator}")
        flags = (self.centred, self.scaled, self.renormalised or False)
        if not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"`centred`, `renormalised` and `scaled` must be booleans, got {self!r}")
        if self.renormalised is False and self.operator == "phase":
            raise ValueError("`renormalised` cannot be False for phase, which forgets the norm")
        _operator(self._params(), 4)  # refuses a `parameter` out of its limits

    def encode(self, values: torch.Tensor) -> Symbolic:
        """Codes vectors.

        Raises:
            UnsupportedOperationError: a value is NaN or infinite, or the operator does not take this dim: more than
                65,536, or for phase an odd one (one that 4 does not divide, for at most 16 sectors).
        """
        *leading, n_tokens, dim = values.shape
        params = self._params()
        operator = _operator(params, dim)
        tokens: Floats = values.detach().contiguous().numpy()
        rows, exact = tokens.reshape(math.prod(values.shape[:-1]), dim), {}
        typical = _typical(tokens) if self.scaled else None
        if self.centred:
            means = _means(tokens, typical)
            exact["means"] = torch.from_numpy(means)
            with np.errstate(all="ignore"):
                rows = np.clip(tokens - means[..., None, :], -_MAX, _MAX).reshape(rows.shape)
        if self.scaled:
            scales = _scales(rows.reshape(tokens.shape), typical)
            exact["scales"] = torch.from_numpy(scales)
            with np.errstate(over="ignore"):
                scaled = rows.reshape(tokens.shape) / scales[..., None, :]
            rows = np.clip(scaled, -_MAX, _MAX, out=scaled).reshape(rows.shape)
        norms = _norms(rows)
        symbols = np.empty((len(rows), _n_units(operator, dim)), np.uint8)
        for block in blocks(rows) if values.numel() else ():
            symbols[block] = operator.symbols(rows[block] / _divisors(norms[block]))
        if self.centred:
            norms[~tokens.reshape(rows.shape).any(axis=1)] = _ZERO
        exact["norms"] = torch.from_numpy(norms).reshape(values.shape[:-1])
        shaped = torch.from_numpy(symbols).reshape(*leading, n_tokens, symbols.shape[1])
        return Symbolic({"symbols": Symbols(shaped, 0, operator.n_symbols - 1)}, exact, params)

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        operator, params = _recorded(symbolic.params, shape)
        symbols = _checked_symbols(symbolic, operator, shape)
        norms, means, by = _checked_exact(symbolic, params, shape)
        rows = np.empty((len(norms), shape[-1]), np.float32)
        for block in blocks(rows) if rows.size else ():
            decoded = operator.decode(symbols[block])
            scales = norms[block]
            if params["renormalised"]:
                lengths = np.sqrt(np.einsum("ij,ij->i", decoded, decoded, dtype=np.float64))
                # Directions that lost everything stay zero.
                scales = np.minimum(scales / np.maximum(lengths, TINY), _MAX).astype(np.float32)
            with np.errstate(over="ignore"):
                np.multiply(decoded, scales[:, None], out=rows[block])
        if by is not None:
            with np.errstate(over="ignore"):
                rows.reshape(shape)[...] *= by[..., None, :]
        if means is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                np.clip(rows, -_MAX, _MAX, out=rows)
                rows.reshape(shape)[...] += means[..., None, :]
            rows[norms == _ZERO] = 0
        return torch.from_numpy(np.clip(rows, -_MAX, _MAX, out=rows)).reshape(shape)

    def _params(self) -> dict[str, Any]:
        """Everything that decoding depends on, with nothing left to a default."""
        parameter = PARAMETERS[self.operator] if self.parameter is None else self.parameter
        params: dict[str, Any] = {"operator": self.operator, "parameter": parameter, "rule_revision": 0}
        helps = self.operator == "phase"
        if self.operator == "quant":
            params["c"] = float(self.c or best_range(parameter))
            helps = parameter >= 4
        params["centred"] = self.centred
        params["renormalised"] = helps if self.renormalised is None else self.renormalised
        return params | ({"scaled": True} if self.scaled else {})


def _operator(params: Mapping[str, Any], dim: int) -> AbstractOperator:
    """The rule; for vectors of no values, that of four."""
    if params["operator"] == Quant.name:
        return Quant(dim or 4, params["parameter"], params["c"])
    return OPERATORS[params["operator"]](dim or 4, params["parameter"])


def _n_units(operator: AbstractOperator, dim: int) -> int:
    return operator.n_units if dim else 0


def _typical(tokens: Floats) -> Floats:
    """1 for each token that tells how large channels are, `(…, seq)`; 0 for those far longer than most.

    The state of a text's first token is, and would hide all others.
    """
    norms = np.sqrt(np.einsum("...ij,...ij->...i", tokens, tokens, dtype=np.float64))
    if not tokens.shape[-2]:
        return np.ones(tokens.shape[:-1], np.float32)
    typical: Floats = np.less_equal(norms, _FAR * np.median(norms, axis=-1, keepdims=True)).astype(np.float32)
    return typical


def _means(tokens: Floats, typical: Floats | None) -> Floats:
    """Each channel's mean over the tokens, or over typical ones; zero where there are none."""
    if not tokens.shape[-2]:
        return np.zeros((*tokens.shape[:-2], tokens.shape[-1]), np.float32)
    if typical is None:
        means: Floats = np.asarray(tokens.mean(axis=-2, dtype=np.float64)).astype(np.float32)
        return means
    sums = np.einsum("...i,...ij->...j", typical, tokens, dtype=np.float64)
    found: Floats = (sums / typical.sum(axis=-1, dtype=np.float64)[..., None]).astype(np.float32)
    return found


def _scales(tokens: Floats, typical: Floats | None) -> Floats:
    """Each channel's root mean square over typical tokens, but not below a small part of the others'."""
    if not tokens.size or typical is None:
        return np.ones((*tokens.shape[:-2], tokens.shape[-1]), np.float32)
    squares = np.einsum("...i,...ij,...ij->...j", typical, tokens, tokens, dtype=np.float64)
    scales = np.sqrt(squares / typical.sum(axis=-1, dtype=np.float64)[..., None])
    # A channel that is nearly always the same must not blow up where it is not.
    floor = np.maximum(_SMALLEST_SCALE, _LEAST * np.sqrt(np.mean(scales**2, axis=-1, keepdims=True)))
    found: Floats = np.clip(scales, floor, _MAX).astype(np.float32)
    return found


def _norms(rows: Floats) -> NDArray[Any]:
    """Norms as they are stored: float16, whose half unit of 2^-11 is far below the error of the symbols, or float32
    where one of them is out of float16's normal range.

    The symbols are taken relative to the stored norm. A vector that SEMQ would accept as a unit row has the norm 1,
    and with that SEMQ's own symbols. Norms below float32's normal range are 0.

    Raises:
        UnsupportedOperationError: NaN or infinity.
    """
    squares = np.zeros(len(rows), np.float64)
    for block in blocks(rows):
        values = rows[block].astype(np.float64)
        squares[block] = np.einsum("ij,ij->i", values, values)
    if not np.isfinite(squares).all():
        raise UnsupportedOperationError(
            f"{Semq.id} codec, vector {int(np.argmin(np.isfinite(squares)))}",
            expected="finite values",
            found="NaN or infinity",
            do="keep this vector exactly",
        )
    norms = np.minimum(np.sqrt(squares), _MAX)
    norms[norms < TINY] = 0
    norms[np.abs(squares - 1) <= UNIT_TOLERANCE] = 1
    in_range = (norms == 0) | ((norms >= _HALF.tiny) & (norms <= _HALF.max))
    return norms.astype(np.float16 if in_range.all() else np.float32)


def _divisors(norms: NDArray[Any]) -> Floats:
    return np.where(norms > 0, norms, 1).astype(np.float32)[:, None]


def _recorded(params: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[AbstractOperator, Mapping[str, Any]]:
    """The rule that the parameters name, and the parameters."""
    arguments = {name: value for name, value in params.items() if name != "rule_revision"}
    try:
        expected = Semq(**arguments)._params()
        operator = _operator(expected, shape[-1])
    except (TypeError, ValueError) as error:
        raise damaged(Semq.id, f"parameters that it writes, for a dim of {shape[-1]}", str(error)[:200]) from error
    if expected != dict(params) or type(params["rule_revision"]) is not int:
        raise damaged(Semq.id, f"the parameters {expected}", dict(params))
    return operator, expected


def _checked_symbols(symbolic: Symbolic, operator: AbstractOperator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The symbols as `(vectors, units)`."""
    if symbolic.symbols.keys() != {"symbols"}:
        raise damaged(Semq.id, "one tensor of symbols", sorted(map(str, symbolic.symbols)))
    symbols = symbolic.symbols["symbols"]
    values, n_units = symbols.values, _n_units(operator, shape[-1])
    alphabet = (0, operator.n_symbols - 1)
    if (
        (symbols.lowest, symbols.highest) != alphabet
        or values.dtype != torch.uint8
        or values.shape != (*shape[:-1], n_units)
    ):
        raise damaged(
            Semq.id,
            f"symbols {alphabet} in uint8 {(*shape[:-1], n_units)}",
            f"({symbols.lowest}, {symbols.highest}) in {values.dtype} {tuple(values.shape)}",
        )
    return values.contiguous().numpy().reshape(math.prod(shape[:-1]), n_units)


def _checked_exact(
    symbolic: Symbolic, params: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[Floats, Floats | None, Floats | None]:
    """The norms as float32 `(vectors,)`, and the means and scales where there are any."""
    exact, centred = symbolic.exact, params["centred"]
    names = {"norms", *(["means"] if centred else []), *(["scales"] if "scaled" in params else [])}
    if exact.keys() != names:
        raise damaged(Semq.id, f"{', '.join(sorted(names))}", sorted(map(str, exact)))
    norms = exact["norms"]
    if norms.dtype not in (torch.float16, torch.float32) or norms.shape != shape[:-1]:
        raise damaged(Semq.id, f"norms of {shape[:-1]}", f"{norms.dtype} {tuple(norms.shape)}")
    flat: Floats = norms.float().contiguous().numpy().reshape(math.prod(shape[:-1]))
    if not (np.isfinite(flat) & ((flat >= 0) | (centred & (flat == _ZERO)))).all():
        raise damaged(Semq.id, "finite norms of at least 0", "others")
    means, scales = (_checked_channels(exact, name, shape) for name in ("means", "scales"))
    if scales is not None and not (scales >= _SMALLEST_SCALE).all():
        raise damaged(Semq.id, f"scales of at least {_SMALLEST_SCALE:.3g}", "others")
    return flat, means, scales


def _checked_channels(exact: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> Floats | None:
    """A number for each channel of each tensor; None where there are none."""
    if name not in exact:
        return None
    found = exact[name]
    if found.dtype != torch.float32 or found.shape != (*shape[:-2], shape[-1]) or not found.isfinite().all():
        raise damaged(
            Semq.id,
            f"finite float32 {name} of {(*shape[:-2], shape[-1])}",
            f"{found.dtype} {tuple(found.shape)}",
        )
    channels: Floats = found.contiguous().numpy()
    return channels
