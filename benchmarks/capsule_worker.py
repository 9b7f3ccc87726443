"""Opens a capsule and goes on from it, in a process of its own; prints JSON on its last line."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch

N_MORE = 24


def main() -> None:
    warnings.simplefilter("ignore")
    row: dict[str, float] = {"open_s": 0.0, "first_token_s": 0.0, "process_s": 0.0}
    if Path(sys.argv[1]).is_file():
        import semq_state as sq

        began = time.perf_counter()
        capsule = sq.open_capsule(sys.argv[1], dequantize="call" if sys.argv[2] == "call" else "load")
        row["open_s"] = time.perf_counter() - began
        resumed = capsule.resume()
        resumed.generate(max_new_tokens=1, do_sample=False)
        row["first_token_s"] = time.perf_counter() - began - row["open_s"]
        row["process_s"] = time.time() - psutil.Process().create_time()
        model, ids = capsule.model, capsule.snapshot.generation.input_ids
    else:
        from semq_state.cli.models import load_model

        model, ids = load_model(sys.argv[1])[0], torch.arange(1000)[None]
    row["tokens_per_s"] = _speed(model, ids[:, :64])
    blocks = model.model.layers
    held = {t.data_ptr(): t.numel() * t.element_size() for t in [*blocks.parameters(), *blocks.buffers()]}
    row["weights_mib"] = sum(held.values()) / 2**20
    print(json.dumps(row))


@torch.inference_mode()
def _speed(model: Any, ids: torch.Tensor) -> float:
    model.generate(ids, max_new_tokens=2, do_sample=False)
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=1, do_sample=False)
    first = time.perf_counter()
    model.generate(ids, min_new_tokens=N_MORE, max_new_tokens=N_MORE, do_sample=False)
    return (N_MORE - 1) / (time.perf_counter() - first - (first - began))


if __name__ == "__main__":
    main()
