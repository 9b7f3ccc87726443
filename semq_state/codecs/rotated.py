"""Vectors rotated at random, so that one scalar quantiser suits every number of them.

After the rotation the numbers of a vector look Gaussian, whatever they were before: the idea of TurboQuant (Zandieh
et al., arXiv 2504.19874, section 3.1) and QuaRot (Ashkboos et al., arXiv 2404.00456). What is ours was chosen by
measuring mean squared error against the entropy of all that is stored, on keys (after RoPE) and values of SmolLM2:

* The mean over the tokens is removed from each channel first: 60 % of the energy of the keys, 15 % of the values'.
* A vector's scale is a symbol on a grid of 4 steps an octave: 0.04 bits a value in vectors of 64, where float16
  costs 0.25. The vector is quantised against the scale as stored: little is left to correct. A float16 scale with
  the right projection has an error 3 % smaller, worth 0.03 bits; correcting on the grid makes the error larger.
* A uniform step with entropy coding is 0.1 bits smaller than Lloyd-Max levels of the same error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard, final

import torch

from semq_state.codecs import lloyd_max
from semq_state.codecs.hadamard import rotate, rotate_back
from semq_state.codecs.parts import check_names, check_vectors, exact_of, symbols_of
from semq_state.codecs.symbolic import AbstractVectorCodec, Symbolic, Symbols, damaged

QUANTISERS = ("uniform", "lloyd-max")

_OCTAVE = 4  # scales in a factor of 2
_TOP = 128 * _OCTAVE - 1  # the largest scale that float32 holds, in steps of the grid
_BOTTOM = -149 * _OCTAVE
_STEPS = (2.0**-8, 16.0)
_BLOCK = 1 << 17  # values that are coded at a time, so that they stay in the cache
_MOST = torch.finfo(torch.float32).max
_MOST_MEAN = torch.finfo(torch.bfloat16).max


@final
@dataclass(frozen=True)
class Rotated(AbstractVectorCodec):
    """A randomised Hadamard rotation and one scalar quantiser for all numbers.

    Args:
        quantiser: `uniform`, for which an entropy coder must follow; or `lloyd-max`, 2**bits levels.
        step: of the uniform quantiser, in units of a vector's root mean square, 1/256 to 16. The relative squared
            error is step² / 12 as long as that is small.
        bits: of the Lloyd-Max quantiser, 1 to 8.
        centred: the mean over the tokens is taken out of each channel, and kept at 16 / n_tokens bits a value.
        seed: of the rotation's signs, 0 to 2**64 - 1.
    """

    id: ClassVar[str] = "rotated"
    quantiser: str = "uniform"
    step: float = 0.35
    bits: int = 4
    centred: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.quantiser not in QUANTISERS:
            raise ValueError(f"`quantiser` must be one of {QUANTISERS}, got {self.quantiser!r}")
        if not _is_step(float(self.step)):
            raise ValueError(f"`step` must be in {_STEPS[0]}..{_STEPS[1]}, got {self.step}")
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` must be in 1..8, got {self.bits}")
        if not _is_seed(self.seed):
            raise ValueError(f"`seed` must be in 0..2**64 - 1, got {self.seed}")

    def encode(self, values: torch.Tensor) -> Symbolic:
        shape = tuple(values.shape)
        n_heads, n_tokens, dim = math.prod(shape[:-2]), *shape[-2:]
        heads = values.reshape(n_heads, n_tokens, dim)
        made = torch.empty(heads.shape, dtype=torch.uint8 if self.quantiser == "lloyd-max" else torch.int16)
        norms = torch.empty(heads.shape[:-1], dtype=torch.uint8)
        tops = torch.empty(heads.shape[:1], dtype=torch.int16)
        means = torch.zeros(n_heads, dim, dtype=torch.bfloat16)
        for some in _blocks((n_heads, n_tokens, dim)):
            block = heads[some]
            if self.centred and n_tokens:
                means[some] = block.mean(-2, dtype=torch.float64).clamp_(-_MOST_MEAN, _MOST_MEAN).bfloat16()
                block = (block - means[some].float().unsqueeze(-2)).clamp_(-_MOST, _MOST)
            norms[some], tops[some] = _norms(block)
            scales = _scales(norms[some], tops[some])
            block = block / scales.masked_fill(scales == 0, _MOST).unsqueeze(-1)
            made[some] = self._quantised(rotate(block, self.seed))
        exact = {"top": tops.reshape(shape[:-2])}
        if self.centred:
            exact["mean"] = means.reshape(*shape[:-2], dim)
        symbols = {"values": self._symbols(made.reshape(shape)), "norm": Symbols(norms.reshape(shape[:-1]), 0, 255)}
        return Symbolic(symbols, exact, {"seed": self.seed, **self._quantiser()})

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        check_vectors(self.id, shape)
        seed, step, levels = _params(symbolic)
        centred = "mean" in symbolic.exact
        exact = ["top", "mean"] if centred else ["top"]
        check_names(self.id, symbolic, symbols=["values", "norm"], exact=exact, params=symbolic.params.keys())
        made = _made(symbolic, shape, levels)
        norms = symbols_of(self.id, symbolic, "norm", shape[:-1], [torch.uint8]).values
        tops = exact_of(self.id, symbolic, "top", shape[:-2], [torch.int16])
        if bool(((tops < _BOTTOM) | (tops > _TOP)).any()):
            raise damaged(self.id, f"`top` in {_BOTTOM}..{_TOP}", "a number outside")
        n_heads, n_tokens, dim = math.prod(shape[:-2]), *shape[-2:]
        made, norms, tops = made.reshape(n_heads, n_tokens, dim), norms.reshape(n_heads, n_tokens), tops.reshape(-1)
        if centred:
            means = exact_of(self.id, symbolic, "mean", (*shape[:-2], dim), [torch.bfloat16]).reshape(n_heads, dim)
        values = torch.empty(n_heads, n_tokens, dim)
        for some in _blocks((n_heads, n_tokens, dim)):
            block = made[some].float().mul_(step) if levels is None else levels[made[some].int()]
            block = rotate_back(block, seed).mul_(_scales(norms[some], tops[some]).unsqueeze(-1))
            if centred:
                block += means[some].float().unsqueeze(-2)
            torch.clamp(block, -_MOST, _MOST, out=values[some])
        return values.reshape(shape)

    def _quantised(self, rotated: torch.Tensor) -> torch.Tensor:
        if self.quantiser == "uniform":
            return rotated.div_(self.step).round_().clamp_(-32767, 32767)
        return lloyd_max.nearest(rotated, self.bits)

    def _symbols(self, made: torch.Tensor) -> Symbols:
        if self.quantiser == "lloyd-max":
            return Symbols(made, 0, 2**self.bits - 1)
        largest = max(1, int(made.amax()), -int(made.amin())) if made.numel() else 1
        return Symbols(made.to(torch.int8) if largest <= 127 else made, -largest, largest)

    def _quantiser(self) -> dict[str, Any]:
        if self.quantiser == "uniform":
            return {"step": float(self.step)}
        return {"levels": list(lloyd_max.levels(self.bits))}


def _params(symbolic: Symbolic) -> tuple[int, float, torch.Tensor | None]:
    """A file's seed, step and levels.

    Raises:
        IntegrityError: they are not those of this codec.
    """
    params = symbolic.params
    seed, step, levels = params.get("seed"), params.get("step"), params.get("levels")
    if _is_seed(seed):
        if params.keys() == {"seed", "step"} and type(step) is float and _is_step(step):
            return seed, step, None
        if params.keys() == {"seed", "levels"} and _are_levels(levels):
            return seed, 1.0, torch.tensor(levels, dtype=torch.float32)
    raise damaged(Rotated.id, "its parameters: a seed, and a step or levels", dict(params))


def _is_seed(seed: object) -> TypeGuard[int]:
    return type(seed) is int and 0 <= seed < 1 << 64


def _is_step(step: float) -> bool:
    return _STEPS[0] <= step <= _STEPS[1]


def _are_levels(levels: object) -> bool:
    """Whether these are 2, 4, 8 … or 256 rising numbers of the size of Gaussian ones."""
    return (
        isinstance(levels, list)
        and len(levels) in [2**bits for bits in range(1, 9)]
        and all(type(level) is float and -64 <= level <= 64 for level in levels)
        and all(a < b for a, b in itertools.pairwise(levels))
    )


def _made(symbolic: Symbolic, shape: tuple[int, ...], levels: torch.Tensor | None) -> torch.Tensor:
    """The quantised numbers.

    Raises:
        IntegrityError: another shape, dtype or alphabet than this quantiser's.
    """
    dtypes = [torch.int8, torch.int16] if levels is None else [torch.uint8]
    symbols = symbols_of(Rotated.id, symbolic, "values", shape, dtypes)
    alphabet = symbols.lowest, symbols.highest
    if levels is None:
        held = 0 < symbols.highest <= torch.iinfo(symbols.values.dtype).max and alphabet[0] == -alphabet[1]
    else:
        held = alphabet == (0, len(levels) - 1)
    if not held:
        raise damaged(Rotated.id, "the alphabet of its quantiser", f"symbols {alphabet}")
    return symbols.values


def _norms(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symbols of the root mean squares, `(n, seq)`, and the place on the grid of the largest, `(n,)`.

    Symbol 255 is the place of the largest, 254 the one below; 0 stands for a vector of zeros, and for one that is
    2**63 times smaller than the largest.
    """
    if not vectors.numel():
        return vectors.new_zeros(vectors.shape[:-1]), vectors.new_zeros(vectors.shape[:1])
    # The squares of numbers like 1e-30 are nothing in float32.
    rms = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64) / math.sqrt(vectors.shape[-1])
    places = torch.log2(rms).mul_(_OCTAVE).round_()
    tops = places.amax(-1).clamp(_BOTTOM, _TOP)
    symbols = (255 + places - tops.unsqueeze(-1)).clamp(0, 255)
    return symbols, tops


def _scales(norms: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    """The inverse of `_norms`: float32 `(n, seq)`, 0 where the symbol is 0."""
    places = tops.double().unsqueeze(-1) + norms.double() - 255
    return torch.exp2(places / _OCTAVE).masked_fill(norms == 0, 0).float()


def _blocks(shape: tuple[int, int, int]) -> Iterator[slice]:
    """Heads that are coded together."""
    each = max(1, _BLOCK // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], each):
        yield slice(start, start + each)
