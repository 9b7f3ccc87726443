"""The processes of `benchmarks.hidden`: each writes hidden states of a text in one way, and prints JSON."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import semq_state as sq
from benchmarks.report import Row
from semq_state.cli.models import load_model

LAYERS = (8, 16, 24)
BATCH, BATCH_TOKENS = 8, 4096
_EVERY = 0.02  # seconds between two looks at the memory


def paragraphs(text: Path, n_tokens: int, tokenizer: Any) -> list[str]:
    """The first paragraphs of a text, headings left out, of about so many tokens together."""
    found, n = [], 0
    for line in text.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if line and not line.startswith("="):
            found.append(line)
            n += len(tokenizer(line)["input_ids"])
            if n >= n_tokens:
                break
    return found


def loop(model: Any, tokenizer: Any, texts: list[str], out: Path, *, batch: int, layers: tuple[int, ...]) -> int:
    """What people write: `output_hidden_states=True`, everything in a list, `torch.save` at the end."""
    kept, n = [], 0
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for row, mask in enumerate(inputs["attention_mask"]):
            length = int(mask.sum())
            kept.append({layer: states[layer][row, :length].clone() for layer in layers})
            n += length
    torch.save(kept, out / "states.pt")
    return n


def recorded(model: Any, tokenizer: Any, texts: list[str], out: Path, *, layers: Any, codec: Any = "raw") -> int:
    """The same with `sq.record`."""
    record = sq.record(
        model, texts, out / "record", tokenizer=tokenizer, hidden_states=sq.HiddenStates(layers=layers),
        batch_tokens=BATCH_TOKENS, shard_bytes=32 << 20, codec=codec, progress=False,
    )  # fmt: skip
    return len(record)


def ways(n_layers: int) -> dict[str, Callable[..., int]]:
    """Every way, by the name that the table gives it."""
    every = tuple(range(n_layers + 1))
    return {
        "loop, one text at a time": lambda *a: loop(*a, batch=1, layers=LAYERS),
        f"loop, {BATCH} texts at a time": lambda *a: loop(*a, batch=BATCH, layers=LAYERS),
        "sq.record": lambda *a: recorded(*a, layers=LAYERS),
        "sq.record, exact": lambda *a: recorded(*a, layers=LAYERS, codec="exact"),
        "sq.record, semq": lambda *a: recorded(*a, layers=LAYERS, codec="semq"),
        f"loop, {BATCH} texts at a time, last layer": lambda *a: loop(*a, batch=BATCH, layers=(n_layers,)),
        "sq.record, last layer": lambda *a: recorded(*a, layers=(-1,)),
        f"loop, {BATCH} texts at a time, all layers": lambda *a: loop(*a, batch=BATCH, layers=every),
        "sq.record, all layers": lambda *a: recorded(*a, layers="all"),
    }


def measured(model_name: str, text: str, n_tokens: str, way: str, folder: str) -> Row:
    """One way, from a loaded model to files on the disk."""
    torch.set_num_threads(2)
    model, tokenizer = load_model(model_name, dtype="float32")
    texts = paragraphs(Path(text), int(n_tokens), tokenizer)
    model(torch.ones(1, 16, dtype=torch.int64))  # what is made at the first pass is no part of a way
    out = Path(folder)
    call = ways(model.config.num_hidden_layers)[way]
    with _Peak() as peak:
        before, cpu = time.perf_counter(), time.process_time()
        n = call(model, tokenizer, texts, out)
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "method": way,
        "texts": len(texts),
        "tokens": n,
        "tokens_per_second": n / seconds,
        "cpu_seconds": cpu,
        "peak_mib": peak.above / 2**20,
        "bytes_per_token": n_bytes / n,
    }


def handled(model_name: str, text: str, n_tokens: str, folder: str) -> tuple[Row, list[Row]]:
    """What is done with records of all layers: read, compared, verified; vectors a second."""
    model, tokenizer = load_model(model_name, dtype="float32")
    texts = paragraphs(Path(text), int(n_tokens), tokenizer)
    out, options = Path(folder), {"tokenizer": tokenizer, "hidden_states": sq.HiddenStates(layers="all")}
    options |= {"shard_bytes": 32 << 20, "progress": False}
    a, b = (sq.record(model, texts, out / name, batch_tokens=BATCH_TOKENS, **options) for name in "ab")
    c = sq.record(model, texts, out / "c", batch_tokens=256, **options)
    n = len(a) * len(a.sites)
    calls: dict[str, Callable[[], Any]] = {
        "blocks of 1,024 rows, in order": lambda: _walked(a, None),
        "blocks of 1,024 rows, shuffled": lambda: _walked(a, 0),
        "one site, shuffled": lambda: _walked(a, 0, a.sites[:1]),
        "verify": a.verify,
        "diff, all vectors equal": lambda: sq.diff(a, b),
        "diff, other batches": lambda: sq.diff(a, c),
    }
    rows = []
    for name, call in calls.items():
        call()
        seconds = min(_timed(call) for _ in range(3))
        n_vectors = len(a) if name.startswith("one site") else n
        rows.append(
            {"what": name, "vectors": n_vectors, "seconds": seconds, "vectors_per_second": n_vectors / seconds}
        )
    differ = sum(cell.n_bits_changed for cell in sq.diff(a, c).cells)
    return {"sites": len(a.sites), "rows": len(a), "differ": 100 * differ / n}, rows


def captured(model_name: str, text: str, n_tokens: str, n_new: str, repeats: str) -> list[Row]:
    """`generate` under a capture, without and with hidden states of one layer in four; in turns, medians."""
    model, tokenizer = load_model(model_name, dtype="float32")
    words_of_it = Path(text).read_text(encoding="utf-8")[:60_000]
    ids = tokenizer(words_of_it, return_tensors="pt")["input_ids"][:, : int(n_tokens)]
    layers = tuple(range(0, model.config.num_hidden_layers, 4))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run(n: int, wanted: sq.HiddenStates | None) -> tuple[float, float]:
        with sq.capture(model, weights="sampled", hidden_states=wanted):
            before, cpu = time.perf_counter(), time.process_time()
            model.generate(ids, max_new_tokens=n, **options)
            return time.perf_counter() - before, time.process_time() - cpu

    rows = []
    for words, n in ((f"prefill of {n_tokens} tokens", 1), (f"the same and {n_new} new tokens", int(n_new))):
        found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
        for i in range(int(repeats) + 1):
            for name, wanted in (("without", None), ("with", sq.HiddenStates(layers=layers))):
                times = run(n, wanted)
                if i:  # the first is for warming up
                    found[name].append(times)
        wall, cpu = (
            {name: statistics.median(times[k] for times in each) for name, each in found.items()} for k in (0, 1)
        )
        rows.append({
            "what": words, "layers": len(layers),
            "seconds": wall["without"], "seconds, hidden states": wall["with"],
            "x": wall["with"] / wall["without"], "x, processor time": cpu["with"] / cpu["without"],
        })  # fmt: skip
    return rows


def _walked(record: Any, seed: int | None, sites: Any = None) -> None:
    for block in record.blocks(1024, seed=seed, sites=sites):
        for states in block.states.values():
            states.sum()


def _timed(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


class _Peak:
    """The most memory above what was held when it began, in bytes. Pages of mapped files do not count."""

    above = 0

    def __enter__(self) -> _Peak:
        self._process = psutil.Process()
        self._base, self._ends = self._held(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _held(self) -> int:
        info = self._process.memory_info()
        return int(info.rss - info.shared)

    def _watch(self) -> None:
        while not self._ends.wait(_EVERY):
            self.above = max(self.above, self._held() - self._base)


if __name__ == "__main__":
    ways_in: dict[str, Callable[..., Any]] = {"measured": measured, "handled": handled, "captured": captured}
    print(json.dumps(ways_in[sys.argv[1]](*sys.argv[2:])))
