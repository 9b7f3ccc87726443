"""The demo model's runs: `python -m workers.smollm2 (reference | capture | resume) FOLDER THREADS`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from semq_state.cli.models import load_model
from workers.outcome import RECORD, StopAfter, keep

N_BEFORE, N_AFTER = 12, 64
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "greedy": (["The history of the sea begins"], {"do_sample": False}),
    "sampled": (["The history of the sea begins"], SAMPLED),
    "padded": (["Once upon a time there was a fox who", "Water", "To bake bread, first"], SAMPLED),
}


def main(what: str, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    model, tokenizer = load_model("smollm2")
    tokenizer.padding_side = "left"
    for name, (texts, settings) in CASES.items():
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        # Its own end token would make the runs of different length.
        settings = {**settings, **RECORD, "eos_token_id": None, "max_new_tokens": N_BEFORE + N_AFTER}
        path = folder / f"{name}.state.safetensors"
        torch.manual_seed(3)
        if what == "reference":
            keep(model.generate(**inputs, **settings), folder / f"{name}.reference.safetensors")
        elif what == "capture":
            with contextlib.suppress(KeyboardInterrupt), sq.capture(model, tokenizer=tokenizer, autosave=path):
                model.generate(**inputs, **settings, streamer=StopAfter(N_BEFORE))
        else:
            found = sq.restore(sq.load(path), model, tokenizer=tokenizer).generate()
            keep(found, folder / f"{name}.resumed.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
