"""A tiny model's runs, each in a process of its own that may be killed at any moment."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import semq_state as sq
from conftest import tiny_model
from workers.outcome import RECORD, keep

N_TOKENS = 64
RUN = {
    "do_sample": True, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.3,
    "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": N_TOKENS, **RECORD,
}  # fmt: skip


class Counting(BaseStreamer):
    """Writes down how many tokens it was given, and leaves time to read it before the next."""

    def __init__(self, path: Path) -> None:
        self._path, self._n = path, -1

    def put(self, value: torch.Tensor) -> None:
        self._n += 1
        self._path.write_text(str(self._n))
        time.sleep(0.02)

    def end(self) -> None: ...


def prompt() -> torch.Tensor:
    return torch.randint(60, 199, (2, 12), generator=torch.Generator().manual_seed(7))


def uninterrupted(out: Path) -> None:
    model = _model()
    keep(model.generate(prompt(), **RUN), out)


def autosaving(ready: Connection, path: Path, every: int, counted: Path | None = None) -> None:
    """Generates with autosave, and says when it begins and when it is done."""
    # Tests that were started in the background would have it ignored here too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = _model()
    streamer = None if counted is None else Counting(counted)
    ready.send("begins")
    with sq.capture(model, autosave=path, every=every):
        model.generate(prompt(), **RUN, streamer=streamer)
    ready.send("done")


def going_on(ready: Connection, path: Path, every: int) -> None:
    """As `autosaving`, but from where the file is."""
    model = _model()
    run: Any = sq.restore(sq.load(path), model).generate if path.exists() else None
    ready.send("begins")
    with sq.capture(model, autosave=path, every=every):
        run() if run else model.generate(prompt(), **RUN)
    ready.send("done")


def resumed(path: Path, out: Path) -> None:
    keep(sq.restore(sq.load(path), _model()).generate(), out)


def _model() -> Any:
    torch.set_num_threads(1)
    model = tiny_model("gemma3")
    torch.manual_seed(1)
    return model
