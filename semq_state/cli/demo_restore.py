"""The demo's process that restores what another one saved, and measures it. Prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import semq_state as sq
from semq_state.cli.demo_prefill import N_NEXT
from semq_state.cli.models import load_model


def main(name: str, folder: str, *lengths: str) -> None:
    model, _ = load_model(name)
    # The weights are read and hashed once per process, at the first restore; that is not counted here.
    sq.restore(sq.load(Path(folder) / f"{lengths[0]}.safetensors"), model)
    print(json.dumps([_row(model, Path(folder) / f"{n}.safetensors") for n in lengths]))


def _row(model: Any, path: Path) -> dict[str, Any]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        resumed = sq.restore(sq.load(path), model)
        times.append(time.perf_counter() - start)
    out = resumed.generate(max_new_tokens=N_NEXT, do_sample=False)
    return {
        "restore_s": sorted(times)[1],
        "reused_tokens": resumed.reused_tokens,
        "next_tokens": out[0, resumed.snapshot.n_tokens :].tolist(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
