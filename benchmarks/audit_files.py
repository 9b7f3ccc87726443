"""What audits of files cost: diff, verify, sign and seal, beside save and load.

    python -m benchmarks.audit_files --text FILE [--model MODEL] --out FOLDER

Processor time is given beside the time that passed, since other work on the machine stretches only the latter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from benchmarks.report import Row, write
from semq_state.cli.models import load_model
from semq_state.sealing import Passphrase
from semq_state.sealing.keys import create_key_file, create_key_pair
from semq_state.snapshot import Snapshot

N_TOKENS = 4096
ROUNDS = 7

NOTES = (
    f"Two states of SmolLM2-135M-Instruct in bfloat16 over the same {N_TOKENS:,} tokens of WikiText-2 test, "
    "computed in one piece and in chunks of 512; `exact`, files in the page cache, all cores. Medians over "
    f"{ROUNDS} rounds that alternate between what is compared. `GB/s and core`: raw bytes of the state by "
    "processor time."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="bfloat16")
    text = args.text.read_text(encoding="utf-8")[3000:]
    rows = _measured(model, tokenizer, text)
    write("audit_files", args.out, {"Audits of files": rows}, model=args.model, notes=NOTES)
    print((args.out / "audit_files.md").read_text())


def _measured(model: Any, tokenizer: Any, text: str) -> list[Row]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :N_TOKENS]
    first, second = (_filled(model, ids, size) for size in (None, 512))
    raw = sum(t.nbytes for t in first.tensors().values())
    with tempfile.TemporaryDirectory(prefix="semq-state-bench-") as folder:
        plain, sealed = Path(folder, "plain.safetensors"), Path(folder, "sealed.safetensors")
        private, key = Path(folder, "me.pem"), create_key_file(Path(folder, "key"))
        create_key_pair(private, "ed25519")
        worded, words = Path(folder, "worded.safetensors"), Passphrase("a passphrase of the benchmark")
        sq.save(first, plain)
        sq.save(first, sealed, seal=key)
        sq.save(first, worded, seal=words)
        ways: dict[str, Callable[[], Any]] = {
            "save": lambda: sq.save(first, plain),
            "save, sealed with a key file": lambda: sq.save(first, sealed, seal=key),
            "load": lambda: sq.load(plain),
            "load, sealed with a key file": lambda: sq.load(sealed, unlock=key),
            "load, sealed with a passphrase": lambda: sq.load(worded, unlock=words),
            "verify": lambda: sq.verify(plain),
            "sign": lambda: sq.sign(plain, private),
            "diff, nearly every vector different": lambda: sq.diff(first, second),
            "diff, equal": lambda: sq.diff(first, first),
        }
        times = _timed(ways)
    return [
        {
            "what": name,
            "seconds": wall,
            "processor_s": cpu,
            "GB/s and core": raw / cpu / 1e9,
            "of load": wall / times["load"][0],
        }
        for name, (wall, cpu) in times.items()
    ]


@torch.no_grad()
def _filled(model: Any, ids: torch.Tensor, size: int | None) -> Snapshot:
    cache, logits = None, None
    for part in torch.split(ids, size or ids.shape[1], dim=1):
        out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits
    return sq.snapshot_of(model, cache, ids, logits=logits)


def _timed(ways: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Medians of the time that passed and of processor time."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name])) for name in ways}


if __name__ == "__main__":
    main()
