"""The demo's process that reads texts, measures it, and saves the state after each. Prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import DynamicCache

import semq_state as sq
from semq_state.cli.models import load_model

N_NEXT = 8


def main(name: str, folder: str, *lengths: str) -> None:
    """Python's own documentation is the text: every machine has it."""
    model, tokenizer = load_model(name)
    ids = tokenizer("\n".join(topics[key] for key in sorted(topics)), return_tensors="pt").input_ids
    _prefill(model, ids[:, :64])
    print(json.dumps([_row(model, ids[:, : int(n)], Path(folder) / f"{n}.safetensors") for n in lengths]))


def _row(model: Any, ids: torch.Tensor, path: Path) -> dict[str, Any]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        cache, logits = _prefill(model, ids)
        times.append(time.perf_counter() - start)
    snapshot = sq.snapshot_of(model, cache, ids, logits=logits)
    info = sq.save(snapshot, path)
    out = model.generate(
        torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1),
        past_key_values=cache,
        max_new_tokens=N_NEXT - 1,
        do_sample=False,
    )
    return {
        "n_tokens": ids.shape[1],
        "cache_bytes": info.cache_bytes,
        "n_bytes": info.n_bytes,
        "prefill_s": sorted(times)[1],
        "next_tokens": out[0, ids.shape[1] :].tolist(),
    }


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits


if __name__ == "__main__":
    main(*sys.argv[1:])
