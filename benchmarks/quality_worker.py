"""One measurement of `benchmarks.quality` in a process of its own; prints JSON on its last line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from benchmarks.quality_protocol import python_source
from benchmarks.report import Row
from semq_state.calibration import load_calibration
from semq_state.cli.models import load_model

N_TOKENS = 4096


def calibrate(name: str, text: str, folder: str) -> Row:
    """Makes the calibration that everything else uses."""
    model, tokenizer = load_model(name, dtype="bfloat16")
    texts = [Path(text).read_text(encoding="utf-8"), python_source("calibration")]
    start = time.perf_counter()
    made = sq.calibrate(model, tokenizer, text=texts, into=Path(folder) / "calibration.safetensors")
    return {
        "seconds": time.perf_counter() - start,
        "n_tokens": made.about["n_tokens"],
        "n_bytes": made.n_bytes,
        "share of the model": made.n_bytes / (2 * model.num_parameters()),
    }


def times(name: str, text: str, folder: str, codec: str) -> Row:
    """Prefilling a context in bfloat16, saving its state, and restoring it from the file."""
    model, tokenizer = load_model(name, dtype="bfloat16")
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    ids, path = ids[:, : N_TOKENS + 1], Path(folder) / f"{codec}.safetensors"
    calibration = load_calibration(Path(folder) / "calibration.safetensors")
    needs: dict[str, Any] = {} if codec in ("exact", "rotated") else {"calibration": calibration}
    with torch.no_grad():
        model(ids[:, :64], use_cache=True)  # the first pass also sets the kernels up
        prefill_s, out = _timed(lambda: model(ids[:, :N_TOKENS], use_cache=True, logits_to_keep=1))
    snapshot = sq.snapshot_of(model, out.past_key_values, ids)
    save_s, info = _timed(lambda: sq.save(snapshot, path, codec=codec, **needs))
    restore_s, _ = _timed(lambda: sq.restore(sq.load(path, **needs), model).inputs)
    path.unlink()
    return {
        "method": codec,
        "n_tokens": N_TOKENS,
        "n_bytes": info.n_bytes,
        "ratio": snapshot.cache.n_bytes / info.n_bytes,
        "prefill_s": prefill_s,
        "restore_s": restore_s,
        "save_s": save_s,
    }


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work: dict[str, Callable[..., Row]] = {"calibrate": calibrate, "times": times}
    print(json.dumps(work[sys.argv[1]](*sys.argv[2:])))
