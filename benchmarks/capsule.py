"""A capsule of the demo model: how large its parts are, and how long until another process has gone on from it.

    python -m benchmarks.capsule --text test.txt --calibration valid.txt --out FOLDER [--with-calibration]

Takes ten minutes on two cores, nine of which quantise and calibrate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import semq_state as sq
from benchmarks.report import Row, in_process, median, write
from semq_state.cli.models import load_model

N_TOKENS, N_REPEATS, BITS, GROUP, EMBEDDING_BITS = 1024, 3, 3, 128, 8
_WORKER = "benchmarks.capsule_worker"

NOTES = """\
SmolLM2-135M-Instruct in bfloat16, quantised by NeUQI with compensated rounding to {bits} bits in groups of {group}
on 8 windows of 1,024 tokens of WikiText-2 valid, embeddings to {embedding} bits; a state of {tokens:,} tokens of
WikiText-2 test, saved as `compact`. Without a calibration `compact` takes the rotated codec; with one the
calibrated transform, and the calibration travels along. Times: medians of {repeats} fresh processes. `open_s`:
`sq.open_capsule`, every digest compared. `first_token_s`: `resume()` and one more token. `process_s`: the same
process from its start, imports of torch and transformers included. `tokens_per_s`: greedy, after the first one.
`weights_mib`: parameters and buffers of the blocks in memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 test")
    parser.add_argument("--calibration", type=Path, required=True, help="WikiText-2 valid")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--with-calibration", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="semq-state-capsule-") as folder:
        sizes, files = _packed(given, Path(folder))
        times: list[Row] = []
        for name, path in files.items():
            for dequantize in ("load", "call"):
                found = [in_process(_WORKER, str(path), dequantize) for _ in range(N_REPEATS)]
                times.append({"capsule": name, "dequantised": dequantize, **median(found)})
        times.append(
            {"capsule": "the model itself, in bfloat16", "dequantised": "", **in_process(_WORKER, given.model)}
        )
    notes = NOTES.format(
        bits=BITS, group=GROUP, embedding=EMBEDDING_BITS, tokens=N_TOKENS, repeats=N_REPEATS
    )  # fmt: skip
    write("capsule", given.out, {"size": sizes, "time": times}, model=given.model, notes=notes)


def _packed(given: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Path]]:
    model, tokenizer = load_model(given.model)
    ids = tokenizer(given.text.read_text(), return_tensors="pt", verbose=False)["input_ids"][:, : N_TOKENS - 1]
    with sq.capture(model, tokenizer=tokenizer) as run:
        model.generate(ids, max_new_tokens=1, do_sample=False)
    snapshot, prose = run.snapshot(), given.calibration.read_text()
    made: dict[str, sq.Calibration | None] = {"without calibration": None}
    if given.with_calibration:
        print("calibrating", file=sys.stderr)
        made["with calibration"] = sq.calibrate(model, tokenizer, text=prose, into=folder / "calibration")
    print("quantising", file=sys.stderr)
    sq.quantize(
        model, "neuqi", BITS, GROUP, prose,
        tokenizer=tokenizer, embedding_bits=EMBEDDING_BITS, n_windows=8, window=1024,
    )  # fmt: skip
    rows, files = [], {}
    for name, calibration in made.items():
        files[name] = folder / f"{name}.capsule"
        info = sq.pack(
            snapshot, files[name], weights=model.semq_weights, tokenizer=tokenizer, calibration=calibration
        )
        parts = {"weights": 0, "tokenizer": 0, "calibration": 0, "snapshot": 0}
        for part, n_bytes in info.stored.items():
            parts[part.partition("/")[0]] += n_bytes
        rows.append({"capsule": name, "MB": info.n_bytes / 1e6, **{f"{k}_MB": v / 1e6 for k, v in parts.items()}})
    return rows, files


if __name__ == "__main__":
    main()
