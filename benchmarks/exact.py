"""Exact snapshots: size, restore against prefill, save and load against others, cost of capture, memory of a save.

    python -m benchmarks.exact --text FILE [--model MODEL] --out FOLDER

Every time is taken in a fresh process with the files in the page cache, alternating between what is compared;
medians are reported. Absolute times depend on the machine and its neighbours: look at the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.report import Row, in_process, median, write

LENGTHS = (256, 1024, 4096)
FORMATS = ("torch", "safetensors", "raw", "exact", "exact-max")
ROUNDS = 5
_WORKER = "benchmarks.exact_worker"

NOTES = (
    "Model: SmolLM2-135M-Instruct in bfloat16 (dequantised from a 4-bit GGUF), WikiText-2 test text. "
    f"Times are medians over {ROUNDS} fresh processes that alternate between what is compared. "
    "`ratio` of sizes: raw cache over the whole file, tokens, logits and manifest included; `x` columns are ratios "
    "of times."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="semq-state-bench-") as folder:
        common = (args.model, str(args.text.resolve()), folder)
        print("filling caches")
        in_process(_WORKER, "fill", *common)
        tables = {
            "Size": in_process(_WORKER, "sizes", *common),
            "Restore against prefill": _restores(common),
            "Save and load, 4,096 tokens": _formats(common),
            "Cost of capture": _captures(common),
            "Peak extra memory of a save, 4,096 tokens": [
                in_process(_WORKER, "memory", *common, name) for name in ("exact", "exact-max", "raw")
            ],
        }
    write("exact", args.out, tables, model=args.model, notes=NOTES)
    print((args.out / "exact.md").read_text())


def _restores(common: tuple[str, ...]) -> list[Row]:
    print("restore against prefill")
    rounds = [in_process(_WORKER, "restores", *common) for _ in range(ROUNDS)]
    rows = []
    for i in range(len(LENGTHS)):
        row = median([r[i] for r in rounds])
        row["x known digest"] = row["prefill_s"] / row["restore_s"]
        row["x digest computed"] = row["prefill_s"] / (row["restore_s"] + row["weights_digest_s"])
        rows.append(row)
    return rows


def _formats(common: tuple[str, ...]) -> list[Row]:
    print("save and load")
    rounds = [
        [{**in_process(_WORKER, "saves", *common, f), **in_process(_WORKER, "loads", *common, f)} for f in FORMATS]
        for _ in range(ROUNDS)
    ]
    rows = [median([r[i] for r in rounds]) for i in range(len(FORMATS))]
    plain = rows[FORMATS.index("safetensors")]
    for row in rows:
        for name, column in (("size", "n_bytes"), ("save", "save_s"), ("load", "load_s")):
            row[f"{name} / safetensors"] = row[column] / plain[column]
    return rows


def _captures(common: tuple[str, ...]) -> list[Row]:
    print("cost of capture")
    return [in_process(_WORKER, "captures", *common)]


if __name__ == "__main__":
    main()
