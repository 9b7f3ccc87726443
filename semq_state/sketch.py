"""A vector as a few symbols, by which another vector can be told from it: SEMQ's `quant` of a signed folding.

Vectors wider than `N_UNITS` are folded first: coordinate i, under a sign of its own, is added to unit i modulo
`N_UNITS`. That is a count sketch (Charikar, Chen and Farach-Colton, 2002): it keeps inner products on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.codecs.hadamard import signs
from semq_state.codecs.semq_rules import Quant, best_range
from semq_state.errors import FormatError

N_UNITS = 384
BINS = 8  # of each sign: 4 bits a unit
_SEED = 0x5E3D


def sketch_rule(dim: int) -> dict[str, Any]:
    """Everything that symbols of vectors of `dim` coordinates depend on, for a file."""
    return {"name": "folded-quant", "dim": dim, "n_units": min(dim, N_UNITS), "bins": BINS, "seed": _SEED}


def sketched(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms and packed symbols of vectors.

    Args:
        vectors: `(n, dim)` floats.

    Returns:
        `(n,)` float32, and `(n, n_bytes)` uint8: at most 192 bytes a vector. A vector with NaN or infinity has
        such a norm and symbols of 0.
    """
    values: NDArray[np.float64] = vectors.detach().cpu().double().numpy()
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    safe = np.where(np.isfinite(norms)[:, None], values, 0.0)
    rule = _quant(sketch_rule(values.shape[1]))
    folded = _folded(safe, rule.dim)
    lengths = np.sqrt(np.einsum("ij,ij->i", folded, folded))
    units = (folded / np.where(lengths > 0, lengths, 1.0)[:, None]).astype(np.float32)
    return torch.from_numpy(norms.astype(np.float32)), torch.from_numpy(rule.pack(rule.symbols(units)))


def symbols_of(prints: torch.Tensor, rule: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The symbols `(n, n_units)` of packed ones `(n, n_bytes)`.

    Raises:
        FormatError: the rule is not one of ours, or the bytes are not its.
    """
    dim = rule.get("dim")
    if type(dim) is not int or dim < 1 or dict(rule) != sketch_rule(dim):
        raise FormatError("trace", expected="a rule that this version knows", found=f"{dict(rule)!r:.120}")
    quant = _quant(rule)
    if prints.dtype != torch.uint8 or prints.ndim != 2 or prints.shape[1] != quant.n_bytes:
        raise FormatError("trace", expected=f"prints of {quant.n_bytes} bytes", found=str(tuple(prints.shape)))
    return quant.unpack(prints.contiguous().numpy())


def _quant(rule: Mapping[str, Any]) -> Quant:
    return Quant(rule["n_units"], rule["bins"], best_range(rule["bins"]))


def _folded(values: NDArray[np.float64], n_units: int) -> NDArray[np.float64]:
    dim = values.shape[1]
    if dim <= n_units:
        return values
    signed = values * signs(dim, _SEED).double().numpy()
    padded = np.zeros((len(values), -(-dim // n_units) * n_units))
    padded[:, :dim] = signed
    folded: NDArray[np.float64] = padded.reshape(len(values), -1, n_units).sum(axis=1)
    return folded
