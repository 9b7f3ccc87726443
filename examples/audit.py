"""A run as evidence: kept with a trace, replayed, compared with a run that was not what it is said to be.

python examples/audit.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

import semq_state as sq
from semq_state.audit.nulls import null_runs
from semq_state.audit.rerun import recomputed
from semq_state.cli.models import load_model


def main() -> None:
    model, tokenizer = load_model("smollm2", dtype="float32")
    inputs = tokenizer("The keeper of the lighthouse wrote in his book:", return_tensors="pt")

    torch.manual_seed(0)
    with sq.capture(model, tokenizer=tokenizer, trace=True) as run:
        model.generate(**inputs, max_new_tokens=24, do_sample=True, temperature=0.7)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "evidence.safetensors")
        sq.save(run.snapshot(), path)

        # Somebody else, later: are the bytes whole, and does running it again give the same?
        print("whole:", sq.verify(path).whole)
        snapshot = sq.load(path)
        for name, verdict in sq.replay(snapshot, model, tokenizer=tokenizer).verdicts.items():
            print(f"{name}: {verdict.outcome}")

        # A state that was made by a model with slightly other weights, and is said to be of this one.
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[20].mlp.down_proj.weight.mul_(1.01)
        candidate = recomputed(snapshot, other)

        floor = sq.measure_floor(snapshot, null_runs(snapshot, model, 3))
        report = sq.diff(snapshot, candidate)
        verdict = report.within(floor)
        print(f"the candidate is {verdict.outcome}: {verdict.reasons[0]}")


if __name__ == "__main__":
    main()
