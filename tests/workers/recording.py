"""A recording of a tiny model, in a process that may be killed at any moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from conftest import tiny_model

WANTED = sq.HiddenStates(layers=(0, 1, -1), modules="model.layers.*.mlp")
OPTIONS: dict[str, Any] = {"hidden_states": WANTED, "max_tokens": 16, "batch_tokens": 48, "shard_bytes": 40_000}


def documents(n: int = 60) -> list[torch.Tensor]:
    """Documents of 0 to 44 tokens."""
    random = torch.Generator().manual_seed(11)
    lengths = torch.randint(0, 45, (n,), generator=random).tolist()
    return [torch.randint(3, 199, (length,), generator=random) for length in lengths]


class Slow(list[torch.Tensor]):
    """Leaves time to be killed in."""

    def __iter__(self) -> Any:
        for each in super().__iter__():
            time.sleep(0.01)
            yield each


def main(folder: str) -> None:
    torch.set_num_threads(1)
    sq.record(tiny_model(), Slow(documents()), Path(folder), progress=False, **OPTIONS)


if __name__ == "__main__":
    main(*sys.argv[1:])
