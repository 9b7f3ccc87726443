"""Our imitation of KVTC (arXiv 2511.01815), the transform coder to beat; its authors published no code.

All layers and heads of a token are one vector, keys (before RoPE) and values apart. A PCA of calibration tokens
rotates it; groups of 64 consecutive components get 0, 1, 2, 3, 4 or 8 bits by a Lagrangian over the distortion
measured on calibration tokens; every token and group has an fp16 scale and shift; DEFLATE packs the bytes. The
first 4 tokens are exact (bfloat16), no recent window is. The bytes are real; the shared basis is not counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality_protocol import Pairs
from benchmarks.quality_scalar import bf16, joined, min_max

GROUP = 64
OPTIONS = (0, 1, 2, 3, 4, 8)
N_SINKS = 4
_SIDE_BITS = 32
_N_MEASURED = 2048


@dataclass(frozen=True)
class Basis:
    """A PCA and what each group loses at each number of bits.

    Attributes:
        mean: (p,).
        vectors: (p, r), components by falling variance, r a multiple of 64.
        distortions: mean squared error a token of each group and option, (r / 64, 6).
    """

    mean: Tensor
    vectors: Tensor
    distortions: Tensor

    def allocation(self, bits_per_value: float) -> list[int]:
        """Bits of each group within the budget (before DEFLATE), by bisection over the Lagrange multiplier."""
        costs = torch.tensor([b * GROUP + (_SIDE_BITS if b else 0) for b in OPTIONS], dtype=torch.float64)
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            chosen = (self.distortions + 2.0**middle * costs).argmin(-1)
            low, high = (middle, high) if costs[chosen].sum() > bits_per_value * len(self.mean) else (low, middle)
        chosen = (self.distortions + 2.0**high * costs).argmin(-1)
        return [OPTIONS[int(i)] for i in chosen]


@dataclass(frozen=True)
class Kvtc:
    """Bases of one model's keys and values.

    Attributes:
        theta: of the rotary embedding (half layout, positions from 0).
    """

    keys: Basis
    values: Basis
    theta: float

    def code(self, cache: Pairs, *, bits: float) -> tuple[Pairs, float]:
        """Codes and decodes at `bits` a value before DEFLATE."""
        sinks, n_bytes = bf16([(keys[:, :, :N_SINKS], values[:, :, :N_SINKS]) for keys, values in cache])
        keys, values = _tokens(cache, self.theta)
        decoded_keys, key_bytes = _coded(keys[N_SINKS:], self.keys, bits)
        decoded_values, value_bytes = _coded(values[N_SINKS:], self.values, bits)
        shape = cache[0][0].shape
        rest = [
            (rotated(k, self.theta, first=N_SINKS), v)
            for k, v in zip(_layers(decoded_keys, shape), _layers(decoded_values, shape), strict=True)
        ]
        return joined(sinks, rest), n_bytes + key_bytes + value_bytes


def fit(caches: Sequence[Pairs], *, theta: float) -> Kvtc:
    """Calibrates on caches whose tokens start at position 0."""
    both = [_tokens(cache, theta) for cache in caches]
    keys, values = (torch.cat([pair[i][N_SINKS:] for pair in both]) for i in range(2))
    return Kvtc(_basis(keys), _basis(values), theta)


def rotated(x: Tensor, theta: float, *, first: int = 0, back: bool = False) -> Tensor:
    """Rotary embedding in the half layout of (..., seq, head_dim) at positions from `first`, or its inverse."""
    seq, head_dim = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(first, first + seq, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    if back:
        sin = -sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _tokens(cache: Pairs, theta: float) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values, each (seq, layers * kv_heads * head_dim)."""
    keys = torch.stack([rotated(keys[0], theta, back=True) for keys, _ in cache])
    values = torch.stack([values[0] for _, values in cache])
    return keys.permute(2, 0, 1, 3).flatten(1), values.permute(2, 0, 1, 3).flatten(1)


def _layers(tokens: Tensor, shape: torch.Size) -> list[Tensor]:
    """The inverse of `_tokens`, of one half: (1, kv_heads, seq, head_dim) of each layer."""
    return [layer[None] for layer in tokens.reshape(len(tokens), -1, shape[1], shape[3]).permute(1, 2, 0, 3)]


def _basis(x: Tensor) -> Basis:
    mean = x.mean(0)
    centred = x - mean
    n, p = centred.shape
    if n < p:
        # As many directions as tokens: the smaller matrix has the same spectrum.
        spectrum, left = torch.linalg.eigh(centred @ centred.T)
        vectors = centred.T @ left / spectrum.clamp(min=spectrum[-1] * 1e-9).sqrt()
    else:
        vectors = torch.linalg.eigh(centred.T @ centred)[1]
    vectors = vectors.flip(-1)[:, : min(n - 1, p) // GROUP * GROUP].contiguous()
    sample = centred[:: max(1, n // _N_MEASURED)] @ vectors
    groups = sample.reshape(len(sample), -1, GROUP)
    losses = [(groups - (min_max(groups, b)[0] if b else 0)).square().sum(-1).mean(0) for b in OPTIONS]
    return Basis(mean, vectors, torch.stack(losses, dim=-1).double())


def _coded(x: Tensor, basis: Basis, bits: float) -> tuple[Tensor, int]:
    allocation = basis.allocation(bits)
    components = (x - basis.mean) @ basis.vectors
    decoded = torch.zeros_like(components)
    payload = []
    for i, b in enumerate(allocation):
        if b:
            place = slice(i * GROUP, (i + 1) * GROUP)
            decoded[:, place], integers, scale, low = min_max(components[:, place], b)
            payload += [_packed(integers.numpy(), b), scale.numpy().tobytes(), low.numpy().tobytes()]
    return decoded @ basis.vectors.T + basis.mean, len(zlib.compress(b"".join(payload)))


def _packed(integers: np.ndarray, bits: int) -> bytes:
    """`bits` lowest bits of each integer, without gaps."""
    return np.packbits(np.unpackbits(integers[..., None], axis=-1)[..., 8 - bits :]).tobytes()
