"""Quantised weights: perplexity, real size, time and memory of every method, side by side with a public package.

    python -m benchmarks.weights --text test.txt --calibration valid.txt --out FOLDER [--minutes N]

Each row is a process of its own. The tables are written after every row; with `--minutes` none is begun after that
time, and the notes name what was left out, with which `--resume` goes on. Takes about two hours on two cores. Needs
the demo model and `pip install 'semq-state[bench]'`; with `--peer PYTHON`, a Python that has llmcompressor, its own
GPTQ is measured too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Row, in_process, write

_WORKER, _PREMISE = "benchmarks.weights_worker", "benchmarks.weights_premise"
N_WINDOWS, WINDOW, N_EVALUATED, N_DISTILLED = 8, 1024, 6, 16

PAPERS: dict[tuple[str, int], str] = {
    ("gptq", 2): "4761", ("gptq", 3): "52.94", ("gptq", 4): "31.31",
    ("septq", 2): "68.62", ("septq", 3): "33.77", ("septq", 4): "29.00", ("", 16): "27.65",
}  # fmt: skip
"""WikiText-2 perplexity of OPT-125M per channel in SEPTQ's paper, the published model nearest in size."""

NOTES = """\
SmolLM2-135M-Instruct, which came from a 4-bit GGUF: its weights lie near 4-bit grids already, so here a model is
rounded twice. Perplexity: {evaluated} of the 2,048-token windows of WikiText-2 test, evenly spread, in bfloat16.
Calibration: {windows} windows of {window} tokens of WikiText-2 valid (the papers: 128 of 2,048 of C4). Embeddings
and output layer stay as they are, as in the papers. `group` 0 is one scale for a row. `bits_per_weight`: what a
real file of the quantised matrices holds, symbols entropy coded, scales, zero points, kept values and branches
included, over their number; of llmcompressor arithmetic. `cpu_seconds`: processor time of quantising; other work
ran beside it. `peak_mib`: most memory above what the process held when the model was loaded; the model's own 257
MiB are among it, since they are mapped and read only then; of llmcompressor the whole process. `distillation`:
{distilled} steps of one window each, on top of the row above; time and memory of these alone. `paper`: OPT-125M in
SEPTQ's paper, per channel. In the second table the inputs of the layers are rounded to 4 bits too, token by token;
in `perplexity_kv4` keys and values as well.{resumed}{left}"""


@dataclass(frozen=True)
class Run:
    """One process of the worker."""

    table: str
    method: str
    bits: int
    group: int = 0
    activation: int = 0
    distill: int = 0

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits} bits, {'group ' + str(self.group) if self.group else 'per channel'}"

    def arguments(self) -> list[str]:
        told = {"bits": self.bits, "group": self.group, "activation": self.activation, "distill": self.distill}
        return ["--method", self.method, *(part for k, v in told.items() for part in (f"--{k}", str(v)))]


_PREMISE_TITLE = "energy of the lowest frequencies, in percent"
WEIGHTS, ROUNDED, PARTS = "weights only", "weights and inputs, 4 bits", "parts, 2 bits"


def runs(with_peer: bool) -> Iterator[Run]:
    """In the order in which they are worth their time."""
    for group in (0, 128):
        for method in ("rtn", "gptq", "septq", "neuqi"):
            yield Run(WEIGHTS, method, 2, group, distill=N_DISTILLED if method == "neuqi" else 0)
    for method in ("specquant", "gptq", "rtn"):
        yield Run(ROUNDED, method, 4, activation=4)
    for method in ("septq", "gptq", "neuqi", "rtn"):
        yield Run(WEIGHTS, method, 3, distill=N_DISTILLED if method == "neuqi" else 0)
    for method in ("neuqi", "gptq", "septq", "rtn"):
        yield Run(WEIGHTS, method, 3, 128)
    for group in (0, 128):
        for method in ("specquant", "gptq", "neuqi", "rtn", "septq"):
            yield Run(WEIGHTS, method, 4, group)
    if with_peer:
        yield Run(WEIGHTS, "llmcompressor", 3)
    yield Run(ROUNDED, "specquant, smoothing alone", 4, activation=4)
    yield Run(PARTS, "gptq, shrunk grid", 2, 128)
    yield Run(WEIGHTS, "specquant", 3)
    yield Run(PARTS, "neuqi, to the nearest", 2, 128)
    yield Run(ROUNDED, "specquant, branch alone", 4, activation=4)
    yield Run(PARTS, "semq", 2, 128)
    for bits, group in ((3, 128), (2, 0), (2, 128)):
        yield Run(WEIGHTS, "specquant", bits, group)
    yield Run(ROUNDED, "specquant", 4, 128, activation=4)
    if with_peer:
        for bits in (4, 2):
            yield Run(WEIGHTS, "llmcompressor", bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 test")
    parser.add_argument("--calibration", type=Path, required=True, help="WikiText-2 valid")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--windows", type=int, nargs=2, default=(N_WINDOWS, WINDOW))
    parser.add_argument("--evaluated", type=int, default=N_EVALUATED, help="windows of the text, 0 for all")
    parser.add_argument("--peer", default="", help="a Python that has llmcompressor")
    parser.add_argument("--resume", action="store_true", help="keep the rows that stand in FOLDER")
    parser.add_argument("--only", default="", help="methods to run, with commas between")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    common = ["--text", str(given.text), "--calibration", str(given.calibration), "--model", given.model]
    common += ["--windows", *map(str, given.windows), "--evaluated", str(given.evaluated)]
    common += ["--peer", given.peer]
    began, left = time.monotonic(), []
    rows, premise = _before(given.out) if given.resume else ([], [])
    if not rows:
        premise = in_process(_PREMISE, "--text", str(given.text), "--model", given.model)
        rows = [_row(Run(WEIGHTS, "", 16), in_process(_WORKER, *common)[0])]
    done = {(row["of"], row["method"], row["bits"], row["group"]) for row in rows}
    chosen = [run for run in runs(bool(given.peer))
              if not given.only or run.method in given.only.split(",")]  # fmt: skip
    for i, run in enumerate(chosen):
        if (run.table, _label(run), run.bits, run.group) in done:
            continue
        if time.monotonic() - began > 60 * given.minutes:
            left.append(run.name)
            continue
        try:
            found = in_process(_WORKER, *common, *run.arguments())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            left.append(f"{run.name} (failed)")
            continue
        rows += [_row(run, each) for each in found]
        last = rows[-1]
        told = f"{run.name}: {last['perplexity']:.4g}, {last['cpu_seconds']:.0f} s"
        print(f"{i + 1}/{len(chosen)} {told}", file=sys.stderr)
        _written(rows, premise, left, given)
    _written(rows, premise, left, given)


def _written(rows: list[Row], premise: list[Row], left: list[str], given: argparse.Namespace) -> None:
    notes = NOTES.format(
        evaluated=given.evaluated or "all",
        windows=given.windows[0],
        window=given.windows[1],
        distilled=N_DISTILLED,
        resumed=" The rows were measured in several sittings, one or two at a time." if given.resume else "",
        left=f"\nNot run for lack of time, or failed: {'; '.join(left)}." if left else "",
    )
    tables: dict[str, list[Row]] = {_PREMISE_TITLE: premise}
    for name in (WEIGHTS, ROUNDED, PARTS):
        found = [{k: v for k, v in row.items() if k != "of"} for row in rows if row["of"] == name]
        found.sort(key=lambda row: (-row["bits"], row["group"]))
        tables |= {name: found} if found else {}
    write("weights", given.out, tables, model=given.model, notes=notes)


def _before(out: Path) -> tuple[list[Row], list[Row]]:
    """The rows of an earlier run, and those of the premise."""
    told = json.loads((out / "weights.json").read_text())["rows"]
    rows = [{"of": row.pop("table"), **row} for row in told]
    ours = [row for row in rows if row["of"] in (WEIGHTS, ROUNDED, PARTS)]
    return ours, [{k: v for k, v in row.items() if k != "of"} for row in rows if row["of"] == _PREMISE_TITLE]


def _label(run: Run) -> str:
    return {"": "bfloat16", "llmcompressor": "gptq of llmcompressor"}.get(run.method, run.method)


def _row(run: Run, found: dict[str, Any]) -> Row:
    method = _label(run)
    row: Row = {
        "of": run.table,
        "method": f"{method} + distillation" if found.get("distill") else method,
        "bits": run.bits,
        "group": run.group,
        "bits_per_weight": found["bits_per_weight"],
        "perplexity": found["perplexity"],
    }
    if run.table == ROUNDED:
        row["perplexity_kv4"] = found.get("perplexity_kv4")
    row |= {"cpu_seconds": found["cpu_seconds"], "peak_mib": found["peak_bytes"] / 2**20}
    if run.table == WEIGHTS:
        published = PAPERS.get((run.method, run.bits)) if not run.group and not found.get("distill") else None
        row["paper"] = published or ""
    return row


if __name__ == "__main__":
    main()
