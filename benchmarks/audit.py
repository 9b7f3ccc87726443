"""Audit: what a floor, a hash, `allclose` and TOPLOC say of null runs and of changed ones; what a replay costs.

    python -m benchmarks.audit --text FILE [--model MODEL] --out FOLDER

TOPLOC is the published package (`pip install toploc`; where its wheel does not fit the installed torch, add
`--no-binary toploc --no-build-isolation`). Each method sees the same runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from benchmarks.audit_runs import N_FLOOR, N_HELD_OUT, N_NEW, N_PROMPT, Run, changed, nulls, reference
from benchmarks.report import Row, write
from semq_state import content
from semq_state.audit.floor import Floor
from semq_state.audit.traces import compare_traces
from semq_state.audit.tracing_once import traced_at_once
from semq_state.cli.models import load_model
from semq_state.snapshot import Snapshot

ROUNDS = 3
TOPLOC = {"exp_mismatches": 38, "mant_err_mean": 10.0, "mant_err_median": 8.0}
"""The thresholds of its paper (Ong and others, 2025), for proofs of 128 values and 32 tokens."""

NOTES = (
    f"Reference: SmolLM2-135M-Instruct (dequantised from a 4-bit GGUF) answers a chat of {N_PROMPT} tokens, text "
    f"from WikiText-2 test, with {N_NEW} sampled tokens. The floor is measured on {N_FLOOR} null runs (1 or 2 "
    "threads, prompt in one piece or in chunks of any size, 0 to 3 other rows in the batch), then judges "
    f"{N_HELD_OUT} more and the changed ones, all of which tell the reference's tokens and origin. `sha256`: of "
    "all keys and values. `allclose`: torch's, with its default tolerances, on all of them. `toploc`: proofs of "
    "the last hidden states, 258 bytes per 32 tokens, with the thresholds of its paper (38 exponents, mean 10, "
    "median 8). `trace`: of 385 symbols, the most that differ in a token's trace. yes: refused. In bfloat16 a "
    "factor below 1.004 leaves every weight as it was. Times are medians, in one process; look at the ratios."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[3000:]
    models = {name: load_model(args.model, dtype=name) for name in ("float32", "bfloat16")}
    tables: dict[str, list[Row]] = {"False alarms": []}
    for name, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        print(f"reference in {name}")
        alarms, found = _judged(*models[name], models[other][0], text)
        tables["False alarms"] += alarms
        tables[f"Changes caught, reference in {name}"] = found
    tables["Replay, prompt of 512 and 128 new tokens, bfloat16"] = _replays(*models["bfloat16"], text)
    write("audit", args.out, tables, model=args.model, notes=NOTES)
    print((args.out / "audit.md").read_text())


def _judged(model: Any, tokenizer: Any, other: Any, text: str) -> tuple[list[Row], list[Row]]:
    dtype = str(model.dtype)[6:]
    snapshot, without = reference(model, tokenizer, text)
    own = next(changed(model, other, snapshot, without))
    assert own.snapshot.trace is not None
    floor = sq.measure_floor(snapshot, (run.snapshot for run in nulls(model, snapshot, N_FLOOR, seed=1)))
    judge = _Judge(snapshot, own.hidden, floor)
    held_out = [judge.row(run) for run in nulls(model, snapshot, N_HELD_OUT, seed=2)]
    columns = ("floor", "floor (SEMQ's strict rule)", "sha256", "allclose", "toploc")
    alarms: Row = {"reference": dtype, "null runs": len(held_out)}
    alarms |= {name: sum(row[name] == "yes" for row in held_out) for name in columns}
    alarms["worst share changed"] = max(row["share changed"] for row in held_out)
    alarms["trace at once"] = int(compare_traces(snapshot.trace, traced_at_once(snapshot, model)).hamming.max())  # type: ignore[arg-type]
    rows = [judge.row(run) for run in changed(model, other, snapshot, without)]
    return [alarms], [*rows, _told_temperature(model, snapshot)]


class _Judge:
    """What each method says of a run, against one reference."""

    def __init__(self, snapshot: Snapshot, hidden: torch.Tensor, floor: Floor) -> None:
        self._snapshot, self._floor = snapshot, floor
        self._strict = dataclasses.replace(floor, margin=(1, 0))
        self._hash = _hash(snapshot)
        self._proofs = _proofs(hidden, snapshot.generation.prompt_length)

    def row(self, run: Run) -> Row:
        report = sq.diff(self._snapshot, run.snapshot, bins=self._floor.bins)
        verdict = report.within(self._floor)
        found = _mismatches(run.hidden, self._snapshot.generation.prompt_length, self._proofs)
        row: Row = {
            "run": run.name,
            "floor": _said(not verdict.passed),
            "first layer": _layer(verdict.reasons),
            "right layer": ""
            if run.layer is None or verdict.passed
            else _said(_layer(verdict.reasons) == run.layer),
            "floor (SEMQ's strict rule)": _said(not report.within(self._strict).passed),
            "sha256": _said(_hash(run.snapshot) != self._hash),
            "allclose": _said(not _close(self._snapshot, run.snapshot)),
            "toploc": _said(any(found[name] > most for name, most in TOPLOC.items())),
            "toploc found": " / ".join(f"{value:.3g}" for value in found.values()),
            "share changed": max(c.n_changed / c.n_vectors for c in report.cells if c.n_vectors),
            "relative error": max(c.relative for c in report.cells),
        }
        if run.snapshot.trace is not None and run.snapshot.trace.n_tokens == self._snapshot.trace.n_tokens:  # type: ignore[union-attr]
            row["trace"] = int(compare_traces(self._snapshot.trace, run.snapshot.trace).hamming.max())  # type: ignore[arg-type]
        return row


def _said(refused: bool) -> str:
    return "yes" if refused else "no"


def _layer(reasons: tuple[str, ...]) -> int | str:
    """The lowest layer that the verdict names."""
    names = [reason.partition(":")[0] for reason in reasons if reason.startswith("layers.")]
    return int(names[0].split(".")[1]) if names else ""


def _hash(snapshot: Snapshot) -> str:
    found = hashlib.sha256()
    for tensor in snapshot.cache.tensors().values():
        found.update(content.raw_bytes(tensor).data)
    return found.hexdigest()


def _close(a: Snapshot, b: Snapshot) -> bool:
    theirs = b.cache.tensors()
    return all(torch.allclose(t.float(), theirs[name].float()) for name, t in a.cache.tensors().items())


def _activations(hidden: torch.Tensor, n_prompt: int) -> list[torch.Tensor]:
    states = hidden.bfloat16().contiguous()
    return [states[:n_prompt], *states[n_prompt:, None]]


def _proofs(hidden: torch.Tensor, n_prompt: int) -> list[bytes]:
    from toploc import build_proofs_bytes

    proofs: list[bytes] = build_proofs_bytes(_activations(hidden, n_prompt), decode_batching_size=32, topk=128)
    return proofs


def _mismatches(hidden: torch.Tensor, n_prompt: int, proofs: list[bytes]) -> dict[str, float]:
    """The worst of each number that TOPLOC judges by, over the prompt's proof and the answer's."""
    from toploc import verify_proofs_bytes

    results = verify_proofs_bytes(_activations(hidden, n_prompt), proofs, decode_batching_size=32, topk=128)
    return {name: max(getattr(result, name) for result in results) for name in TOPLOC}


def _told_temperature(model: Any, snapshot: Snapshot) -> Row:
    """The recorded run, told to have been sampled at another temperature: only a replay can see that."""
    config = {**snapshot.generation.config, "temperature": 1.0}
    told = dataclasses.replace(snapshot, generation=dataclasses.replace(snapshot.generation, config=config))
    verdict = sq.replay(told, model, parts=("determinism",)).determinism
    honest = sq.replay(snapshot, model, parts=("determinism",)).determinism
    return {
        "run": "temperature 0.7 told as 1.0",
        **dict.fromkeys(("floor", "floor (SEMQ's strict rule)", "sha256", "allclose", "toploc"), "no"),
        "share changed": 0.0,
        "relative error": 0.0,
        "replay": f"{_said(not verdict.passed)} (told rightly: {_said(not honest.passed)})",
    }


def _replays(model: Any, tokenizer: Any, text: str) -> list[Row]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :N_PROMPT]
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": True}
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    with sq.capture(model, trace=True) as run:
        model.generate(**call)
    snapshot = run.snapshot()

    def traced() -> None:
        with sq.capture(model, trace=True):
            model.generate(**call)

    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(**call),
        "generate in capture(trace=True)": traced,
        "replay determinism": lambda: sq.replay(snapshot, model, parts=("determinism",)),
        "replay cold, in steps": lambda: sq.replay(snapshot, model, parts=("cold",)),
        "replay cold, at once": lambda: sq.replay(snapshot, model, parts=("cold",), how="once"),
        "replay trace, at once": lambda: sq.replay(snapshot, model, parts=("trace",), how="once"),
    }
    seconds = _timed(ways)
    return [
        {"what": name, "seconds": seconds[name], "of generating": seconds[name] / seconds["generate"]}
        for name in ways
    ]


def _timed(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians over rounds that alternate between what is compared."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


if __name__ == "__main__":
    main()
