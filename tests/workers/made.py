"""States and calibrations made by hand, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from semq_state.calibration import Calibration, LayerSet, Measured
from semq_state.provenance import Provenance
from semq_state.rotary import Rotary
from semq_state.snapshot import CacheState, GenerationState, LayerState, Snapshot

WEIGHTS = f"sha256:{'ab' * 32}"
N_VOCAB = 50
CURVE = (Measured(0.01, 8.0, 1e-4), Measured(0.03, 4.0, 6e-4), Measured(0.1, 2.0, 3e-3), Measured(0.3, 0.5, 3e-2))


ROTARY = Rotary("half", 0, 8, (1.0, 0.3, 0.1, 0.01))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def provenance(weights: str = WEIGHTS) -> Provenance:
    return Provenance(weights, {"n": 1}, {}, None, {}, {}, "float32", "tiny", {"torch": "2"}, "sdpa")


def dynamic(
    batch: int = 1,
    seq: int = 40,
    *,
    heads: int = 2,
    dims: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    family: str = "dynamic",
    meta: Mapping[str, Any] | None = None,
) -> LayerState:
    """A layer of random keys and values."""
    keys, values = (random(batch, heads, seq, dim, seed=2 * seed + i) for i, dim in enumerate(dims))
    return LayerState(
        family, {"keys": keys.to(dtype), "values": (values + 1).to(dtype)}, {"filled": True, **(meta or {})}
    )


def state(
    *layers: LayerState,
    n_cached: int = 40,
    n_tokens: int | None = None,
    batch: int = 1,
    padding: Sequence[int] = (),
    parts: Mapping[str, CacheState] | None = None,
    weights: str = WEIGHTS,
    **more: Any,
) -> Snapshot:
    """A whole state; two layers of random keys and values where none are given."""
    if not layers and not parts:
        layers = tuple(dynamic(batch, n_cached, seed=i) for i in range(2))
    n_tokens = n_cached + 1 if n_tokens is None else n_tokens
    inputs = {}
    if padding:
        mask = torch.arange(n_tokens)[None] >= torch.tensor(padding)[:, None]
        inputs["attention_mask"] = mask.long()
    generation = GenerationState(
        input_ids=torch.randint(0, N_VOCAB, (batch, n_tokens), generator=torch.Generator().manual_seed(1)),
        prompt_length=1,
        n_cached=n_cached,
        finished=torch.zeros(batch, dtype=torch.bool),
        step_inputs=inputs,
        **{"logits": random(batch, 3), **more},
    )
    return Snapshot(CacheState("dynamic", layers, {"grows": False}, parts or {}), generation, provenance(weights))


def permuted(n: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix that float16 and int8 hold exactly: a permutation with signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    return torch.eye(n)[torch.randperm(n, generator=generator)] * signs


def layer_set(
    layers: Sequence[int] = (0, 1),
    *,
    n_heads: int = 2,
    dims: tuple[int, int] = (8, 8),
    rotary: Rotary | None = ROTARY,
    n_features: int = 5,
    seed: int = 0,
) -> LayerSet:
    """A random transform whose bases are orthogonal to the last bit, of two blocks with heads and tails."""
    n_dims = len(layers) * n_heads * sum(dims)
    sizes = [n_dims // 2, n_dims - n_dims // 2]
    strong = [max(1, size * 2 // 3) for size in sizes]
    bases = [permuted(size, seed + i) for i, size in enumerate(sizes)]
    n_mixed = sum(strong)
    generator = torch.Generator().manual_seed(seed)
    return LayerSet(
        layers=tuple(layers),
        n_heads=n_heads,
        key_dim=dims[0],
        value_dim=dims[1],
        rotaries=((rotary, None),) * len(layers),
        scale=random(n_dims, seed=seed + 3).mul(0.3).exp(),
        mean=random(n_dims, seed=seed + 4),
        tells=torch.randint(-9, 9, (n_features, n_dims), generator=generator, dtype=torch.int8),
        tells_scale=torch.full((n_features,), 0.002),
        heads=tuple(b[:, :n].half() for b, n in zip(bases, strong, strict=True)),
        tails=tuple(b[:, n:].to(torch.int8) for b, n in zip(bases, strong, strict=True)),
        tails_scale=tuple(torch.ones(size - n) for size, n in zip(sizes, strong, strict=True)),
        mix=permuted(n_mixed, seed + 9).half(),
        bands=torch.randint(-6, 4, (n_dims,), generator=generator, dtype=torch.int16),
        matters=random(5 + min(300, n_mixed) + n_features + 1, seed=seed + 5) * 0.05,
    )


def calibration(*sets: LayerSet, weights: str = WEIGHTS, n_now: int = 3, n_before: int = 2) -> Calibration:
    """A calibration of `state()`s, in whose file nothing is wrong."""
    generator = torch.Generator().manual_seed(7)
    now, before = (
        torch.randint(-90, 90, (N_VOCAB, n), generator=generator, dtype=torch.int8) for n in (n_now, n_before)
    )
    made = Calibration(weights, "tiny", sets or (layer_set(n_features=n_now + n_before),), now, before, CURVE, {})
    for each in made.sets:
        each.check(n_now + n_before)
    return made
