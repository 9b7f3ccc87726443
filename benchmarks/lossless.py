"""Lossless codecs: how much smaller, and how fast on one core.

    python -m benchmarks.lossless --text FILE --calibration-text FILE [--model MODEL] --out FOLDER

The predictor of `exact-predicted` is fitted on `--calibration-text` and Python source; measured is `--text`
(WikiText-2 test) and other Python source. Whole files; everything runs on one thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

import semq_state as sq
from benchmarks.quality_protocol import python_source, spread, token_ids
from benchmarks.report import Row, write
from semq_state.cli.models import load_model
from semq_state.measuring.contexts import pieces
from semq_state.measuring.predictor import measure_predictor

CODECS = ("exact", "exact-max", "exact-predicted")
LENGTHS = (1024, 4096)
N_CONTEXTS = 8

NOTES = (
    "Model: SmolLM2-135M-Instruct in bfloat16 (dequantised from a 4-bit GGUF). `ratio`: raw cache over the whole "
    "file. `MB/s`: raw state over the time of a save (verified, so decoded once) and of a load, with digests, on "
    "one core. The predictor is shared by all files of a model and is not counted."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, dtype="bfloat16")
    prose = args.calibration_text.read_text(encoding="utf-8")
    contexts = pieces(tokenizer, [prose, python_source("calibration")], N_CONTEXTS, 1024)
    with tempfile.TemporaryDirectory(prefix="semq-state-lossless-") as folder:
        place = Path(folder) / "predictor.safetensors"
        start = time.perf_counter()
        measure_predictor(model, contexts, into=place)
        made = {"seconds": time.perf_counter() - start, "n_bytes": place.stat().st_size}
        texts = {"wikitext": args.text.read_text(encoding="utf-8"), "python": python_source()}
        rows = []
        for domain, text in texts.items():
            for length in LENGTHS if domain == "wikitext" else LENGTHS[:1]:
                ids = spread(token_ids(tokenizer, text), 2, length + 1)[1][None]
                with torch.no_grad():
                    cache = model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values
                snapshot = sq.snapshot_of(model, cache, ids)
                rows += [_measured(snapshot, domain, codec, Path(folder), place) for codec in CODECS]
    write("lossless", args.out, {"Lossless": rows, "Predictor": [made]}, model=args.model, notes=NOTES)
    print((args.out / "lossless.md").read_text())


def _measured(snapshot: sq.Snapshot, domain: str, codec: str, folder: Path, predictor: Path) -> Row:
    path, raw = folder / "snapshot.safetensors", snapshot.cache.n_bytes
    start = time.perf_counter()
    info = sq.save(snapshot, path, codec=codec, predictor=predictor)
    saved = time.perf_counter()
    loaded = sq.load(path, predictor=predictor)
    done = time.perf_counter()
    if loaded.state_id != snapshot.state_id:
        raise RuntimeError(f"{codec} changed the state")
    row = {
        "text": domain,
        "n_tokens": snapshot.n_tokens - 1,
        "method": codec,
        "bits_per_value": 16 * info.n_bytes / raw,
        "ratio": raw / info.n_bytes,
        "save MB/s": raw / 1e6 / (saved - start),
        "load MB/s": raw / 1e6 / (done - saved),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
