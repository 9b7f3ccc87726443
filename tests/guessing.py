"""Caches whose layers can be guessed from one another, and the predictor that does it."""

from __future__ import annotations

import numpy as np
import torch

from semq_state.calibration import Predictor
from semq_state.measuring.predictor_fit import Held, fit
from semq_state.provenance import Provenance
from semq_state.rotary import Rotary
from semq_state.snapshot import CacheState, GenerationState, LayerState, Snapshot

HEADS, DIM, N_LAYERS = 2, 16, 4
ROTARY = Rotary("half", 0, DIM, tuple(float(100.0 ** -(i / (DIM // 2))) for i in range(DIM // 2)))
WEIGHTS = f"sha256:{'ab' * 32}"


def cache_of(
    n_tokens: int, seed: int, batch: int = 1, rotaries: dict[int, Rotary] | None = None
) -> list[torch.Tensor]:
    """Keys and values, layer by layer, of a stream that changes a little from layer to layer, as in a model."""
    weights = torch.Generator().manual_seed(7)
    noise = torch.Generator().manual_seed(seed)
    stream = torch.randn(batch, n_tokens, 24, generator=noise)
    rotaries = dict.fromkeys(range(N_LAYERS), ROTARY) if rotaries is None else rotaries
    tensors = []
    for i in range(N_LAYERS):
        stream = stream + 0.2 * torch.randn(stream.shape, generator=noise)
        both = stream @ torch.randn(24, 2 * HEADS * DIM, generator=weights)
        keys, values = both.reshape(batch, n_tokens, 2, HEADS, DIM).permute(2, 0, 3, 1, 4)
        keys = keys + 3
        if i in rotaries:
            keys = rotaries[i].redo(keys, torch.arange(n_tokens))
        tensors += [keys.bfloat16(), values.bfloat16()]
    return [tensor.contiguous() for tensor in tensors]


def held(cache: list[torch.Tensor]) -> dict[int, Held]:
    return {i: Held(*cache[2 * i : 2 * i + 2]) for i in range(len(cache) // 2)}


def predictor_of(weights: str = WEIGHTS) -> Predictor:
    caches = [held(cache_of(1500, seed)) for seed in (1, 2)]
    return fit(caches, dict.fromkeys(range(N_LAYERS), ROTARY), weights=weights, model_name="tiny")


def snapshot_of(cache: list[torch.Tensor]) -> Snapshot:
    """A state around such a cache."""
    batch, n_tokens = cache[0].shape[0], cache[0].shape[2]
    layers = tuple(
        LayerState("dynamic", {"keys": keys, "values": values}, {"filled": True})
        for keys, values in zip(cache[0::2], cache[1::2], strict=True)
    )
    generation = GenerationState(
        input_ids=torch.arange(n_tokens + 1).expand(batch, -1).contiguous(),
        prompt_length=n_tokens,
        n_cached=n_tokens,
        finished=torch.zeros(batch, dtype=torch.bool),
        logits=torch.zeros(batch, 3),
        rng={"cpu": torch.from_numpy(np.arange(9, dtype=np.uint8))},
    )
    provenance = Provenance(WEIGHTS, {"n": 1}, {}, None, {}, {}, "bfloat16", "tiny", {"torch": "2"}, "sdpa")
    return Snapshot(CacheState("dynamic", layers, {"grows": False}), generation, provenance)
