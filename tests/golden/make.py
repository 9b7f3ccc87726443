"""Writes the golden files of the present format version. Run once per version, never again.

python tests/golden/make.py VERSION
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import semq_state as sq
from semq_state.snapshot import CacheState, GenerationState, LayerState, ProcessorState


def snapshot() -> sq.Snapshot:
    """A small state with every family and dtype of note, from arithmetic alone."""
    ramp = torch.arange(2 * 2 * 6 * 8, dtype=torch.float32).reshape(2, 2, 6, 8)
    keys = (torch.sin(ramp) * 3).to(torch.bfloat16)
    values = torch.cos(ramp)
    values[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    cache = CacheState(
        "dynamic",
        (
            LayerState("dynamic", {"keys": keys, "values": values}, {"filled": True}),
            LayerState(
                "sliding",
                {"keys": keys[:, :, -3:].half(), "values": keys[:, :, -3:].to(torch.float8_e4m3fn)},
                {"window": 4, "n_seen": 6, "filled": True},
            ),
            LayerState("dummy", {}),
        ),
        {"grows": False},
    )
    ids = torch.arange(14).reshape(2, 7)
    generation = GenerationState(
        input_ids=ids,
        prompt_length=4,
        n_cached=6,
        finished=torch.tensor([False, True]),
        logits=torch.linspace(-1, 1, 38).reshape(2, 19),
        step_inputs={"attention_mask": torch.ones(2, 7, dtype=torch.int64), "position_ids": ids},
        step_values={"use_cache": True, "logits_to_keep": 1},
        rng={"cpu": torch.arange(200, dtype=torch.uint8)},
        config={"do_sample": True, "temperature": 0.7, "max_length": 20, "eos_token_id": [2, 3]},
        processors=(ProcessorState("logits", "Counting", {"seen": torch.ones(3)}, {"n": 3}),),
    )
    provenance = sq.Provenance(
        weights=f"sha256:{'ab' * 32}",
        config={"model_type": "llama", "num_hidden_layers": 3},
        rope={"rope_type": "default", "rope_theta": 10000.0},
        tokenizer=None,
        adapters={},
        quantization={},
        dtype="bfloat16",
        model_name="golden",
        versions={"torch": "2.13.0"},
        attention="sdpa",
        device="cpu",
        threads=2,
        created="2026-11-22T00:00:00+00:00",
    )
    return sq.Snapshot(cache, generation, provenance)


if __name__ == "__main__":
    for codec in ("exact", "exact-max", "raw"):
        info = sq.save(snapshot(), Path(__file__).parent / f"v{sys.argv[1]}-{codec}.safetensors", codec=codec)
        print(info.path, info.state_id)
