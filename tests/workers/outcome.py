"""What a run leaves behind for another process: its tokens and logits in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.generation.streamers import BaseStreamer

RECORD = {"return_dict_in_generate": True, "output_logits": True}


class StopAfter(BaseStreamer):
    """Interrupts a run, as Ctrl-C would, when its token number `n` arrives."""

    def __init__(self, n: int) -> None:
        self._left = n

    def put(self, value: torch.Tensor) -> None:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1

    def end(self) -> None: ...


def keep(result: Any, path: Path) -> None:
    """Writes the tokens, `(batch, seq)`, and the logits of each step, `(steps, batch, vocab)`."""
    save_file({"sequences": result.sequences, "logits": torch.stack(result.logits)}, path)


def assert_same(found: Path, expected: Path) -> None:
    """Both files end alike: the same tokens, and the same logits for as many steps as `found` has."""
    ours, theirs = load_file(found), load_file(expected)
    assert torch.equal(ours["sequences"], theirs["sequences"])
    assert torch.equal(ours["logits"], theirs["logits"][-len(ours["logits"]) :])
