"""Scalar quantisers as quality peers: casts, integers per token, and the layout of KIVI (arXiv 2402.02750).

Sizes are the arithmetic of packed integers with an fp16 scale and an fp16 minimum a group; no entropy coding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.quality_protocol import Pairs

_Coder = Callable[[Tensor], tuple[Tensor, float]]

SIDE_BYTES = 4
"""fp16 scale and fp16 minimum of a group."""


def bf16(cache: Pairs) -> tuple[Pairs, float]:
    """The cache as bfloat16."""
    decoded = [(keys.bfloat16().to(keys), values.bfloat16().to(values)) for keys, values in cache]
    return decoded, 2 * sum(t.numel() for pair in cache for t in pair)


def per_token(cache: Pairs, *, bits: int, group: int) -> tuple[Pairs, float]:
    """Keys and values in groups of consecutive channels of one token."""
    coder = partial(quantised, dim=-1, group=group, bits=bits)
    return _coded(cache, coder, coder)


def kivi(cache: Pairs, *, bits: int, group: int = 32, n_sinks: int = 0) -> tuple[Pairs, float]:
    """Keys in groups of consecutive tokens of one channel, values in groups of channels of one token.

    Args:
        n_sinks: first tokens that are kept as bfloat16.
    """
    if not n_sinks:
        keys_coder = partial(quantised, dim=-2, group=group, bits=bits)
        return _coded(cache, keys_coder, partial(quantised, dim=-1, group=group, bits=bits))
    sinks, sink_bytes = bf16([(keys[:, :, :n_sinks], values[:, :, :n_sinks]) for keys, values in cache])
    rest, n_bytes = kivi(
        [(keys[:, :, n_sinks:], values[:, :, n_sinks:]) for keys, values in cache], bits=bits, group=group
    )
    return joined(sinks, rest), sink_bytes + n_bytes


def joined(first: Pairs, second: Pairs) -> Pairs:
    """The tokens of `first`, then those of `second`."""
    pairs = zip(first, second, strict=True)
    return [(torch.cat([a, c], dim=-2), torch.cat([b, d], dim=-2)) for (a, b), (c, d) in pairs]


def quantised(x: Tensor, *, dim: int, group: int, bits: int) -> tuple[Tensor, float]:
    """Asymmetric min-max integers along `dim`, and their size in bytes; a short last group is filled up freely."""
    moved = x.movedim(dim, -1)
    n = moved.shape[-1]
    filling = moved[..., -1:].expand(*moved.shape[:-1], -n % group)
    grouped = torch.cat([moved, filling], dim=-1).reshape(*moved.shape[:-1], -1, group)
    decoded = min_max(grouped, bits)[0].flatten(-2)[..., :n].movedim(-1, dim)
    return decoded, x.numel() * bits / 8 + SIDE_BYTES * grouped[..., 0].numel()


def min_max(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers of `bits` bits over the last axis' range.

    Returns:
        decoded values, integers, fp16 scales and fp16 minima (these with a last axis of 1).
    """
    low = x.amin(-1, keepdim=True).half()
    scale = ((x.amax(-1, keepdim=True) - low.float()) / (2**bits - 1)).half()
    # A scale that rounds to zero leaves the minimum alone.
    step = torch.where(scale > 0, scale.float(), 1.0)
    integers = ((x - low.float()) / step).round().clamp(0, 2**bits - 1)
    return integers * scale.float() + low.float(), integers.to(torch.uint8), scale, low


def _coded(cache: Pairs, keys_coder: _Coder, values_coder: _Coder) -> tuple[Pairs, float]:
    coded = [(keys_coder(keys), values_coder(values)) for keys, values in cache]
    return [(k[0], v[0]) for k, v in coded], sum(k[1] + v[1] for k, v in coded)
