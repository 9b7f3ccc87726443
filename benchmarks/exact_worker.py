"""The processes of `benchmarks.exact`: each measures one thing and prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file

import semq_state as sq
from benchmarks.exact import LENGTHS
from benchmarks.report import Row
from semq_state import content

_T = TypeVar("_T")


def fill(model_name: str, text: str, folder: str) -> Any:
    """Prefills every length and saves the state in every form."""
    from semq_state.cli.models import load_model

    model, tokenizer = load_model(model_name)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[:80_000], return_tensors="pt").input_ids
    for n in LENGTHS:
        cache, logits = _prefill(model, ids[:, :n])
        snapshot = sq.snapshot_of(model, cache, ids[:, :n], logits=logits)
        sq.save(snapshot, Path(folder) / f"{n}.exact")
    return True


def sizes(model_name: str, text: str, folder: str) -> list[Row]:
    """Size of the same state under several codings, and their speed with one call per tensor."""
    rows = []
    for n in LENGTHS:
        snapshot = sq.load(Path(folder) / f"{n}.exact")
        n_values = snapshot.cache.n_bytes // 2
        for method in ("zstd-3", "planes + zstd-3", "exact", "exact-max", "raw"):
            if method in ("exact", "exact-max", "raw"):
                n_bytes = sq.save(snapshot, Path(folder) / f"{n}.{method}", codec=method).n_bytes
            else:
                n_bytes = sum(_stock_size(t, planes="planes" in method) for t in snapshot.tensors().values())
            rows.append(
                {
                    "method": method,
                    "n_tokens": n,
                    "n_bytes": n_bytes,
                    "bits_per_value": 8 * n_bytes / n_values,
                    "ratio": snapshot.cache.n_bytes / n_bytes,
                }
            )
    return rows


def restores(model_name: str, text: str, folder: str) -> list[Row]:
    """Prefill, load and restore in turn; the weights digest apart, as it is computed once per process."""
    from semq_state.cli.models import load_model

    model, tokenizer = load_model(model_name)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[:80_000], return_tensors="pt").input_ids
    _prefill(model, ids[:, :64])
    first = sq.load(Path(folder) / f"{LENGTHS[0]}.exact")
    with_digest, _ = _timed(lambda: sq.restore(first, model))
    known, _ = _timed(lambda: sq.restore(first, model))
    rows = []
    for n in LENGTHS:
        prefill_s, _ = _timed(partial(_prefill, model, ids[:, :n]))
        restore_s, resumed = _timed(partial(_restored, Path(folder) / f"{n}.exact", model))
        _, logits = _prefill(model, ids[:, :n])
        after = resumed.generate(max_new_tokens=1, do_sample=False)[0, -1]
        assert after == logits[0, -1].argmax()
        rows.append(
            {
                "n_tokens": n,
                "prefill_s": prefill_s,
                "restore_s": restore_s,
                "weights_digest_s": with_digest - known,
            }
        )
    return rows


def saves(model_name: str, text: str, folder: str, name: str) -> Row:
    """Saves the same tensors in one form."""
    snapshot = sq.load(Path(folder) / "4096.exact")
    tensors = {key: t.contiguous() for key, t in snapshot.tensors().items()}
    path = Path(folder) / f"format.{name}"
    savers: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.save(tensors, path),
        "safetensors": lambda: save_file(tensors, path),
    }
    save_s, _ = _timed(savers.get(name, lambda: sq.save(snapshot, path, codec=name)))
    unverified_s, _ = _timed(savers.get(name, lambda: sq.save(snapshot, path, codec=name, verify=False)))
    return {
        "method": name,
        "n_bytes": path.stat().st_size,
        "save_s": save_s,
        "save_s unverified": unverified_s,
    }


def loads(model_name: str, text: str, folder: str, name: str) -> Row:
    """Loads what `saves` wrote, as the first thing that the process does."""
    path = Path(folder) / f"format.{name}"
    loaders: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.load(path),
        "safetensors": lambda: {key: t.clone() for key, t in load_file(path).items()},
    }
    load_s, loaded = _timed(loaders.get(name, lambda: sq.load(path)))
    again_s, _ = _timed(loaders.get(name, lambda: sq.load(path)))
    found = loaded.tensors() if isinstance(loaded, sq.Snapshot) else loaded
    for key, tensor in sq.load(Path(folder) / "4096.exact").tensors().items():
        assert content.raw_bytes(found[key]).tobytes() == content.raw_bytes(tensor).tobytes()
    return {"load_s": load_s, "load_s again": again_s}


def captures(model_name: str, text: str, folder: str) -> Row:
    """The same generation with and without capture, in turn."""
    from semq_state.cli.models import load_model

    model, tokenizer = load_model(model_name)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[:4000], return_tensors="pt").input_ids[:, :128]
    n_tokens, n_pairs = 32, 16
    options = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": True}

    def plain() -> Any:
        return model.generate(ids, **options)

    def captured() -> Any:
        with sq.capture(model):
            return model.generate(ids, **options)

    plain(), captured()
    times: dict[str, list[float]] = {"plain": [], "captured": []}
    for i in range(n_pairs):
        pair = [("plain", plain), ("captured", captured)]
        for name, run in pair if i % 2 else reversed(pair):
            times[name].append(_timed(run)[0])
    best = {name: float(np.median(values)) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["captured"], times["plain"], strict=True)]
    return {
        "tokens_per_s": n_tokens / best["plain"],
        "tokens_per_s captured": n_tokens / best["captured"],
        "cost_percent": 100 * (float(np.median(ratios)) - 1),
    }


def memory(model_name: str, text: str, folder: str, name: str) -> Row:
    """How far the process's peak memory rises above what it held before the save."""
    snapshot = sq.load(Path(folder) / "4096.exact")
    sq.save(sq.load(Path(folder) / "256.exact"), Path(folder) / "warm", codec=name)
    # Writing 5 here sets the peak back to the present.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    sq.save(snapshot, Path(folder) / "memory", codec=name)
    extra = _status("VmHWM") - before
    return {
        "method": name,
        "state_bytes": snapshot.cache.n_bytes,
        "extra_bytes": extra,
        "of the state": extra / snapshot.cache.n_bytes,
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def _stock_size(tensor: torch.Tensor, *, planes: bool) -> int:
    """Size under zstandard's stock level 3, of the bytes as they are or of each byte plane."""
    data, coder = content.raw_bytes(tensor), zstandard.ZstdCompressor(level=3)
    split = [np.ascontiguousarray(data[i :: tensor.element_size()]) for i in range(tensor.element_size())]
    return sum(min(len(coder.compress(p.data)), len(p)) for p in (split if planes else [data]))


def _restored(path: Path, model: Any) -> sq.Resumed:
    return sq.restore(sq.load(path), model)


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits


def _timed(work: Callable[[], _T]) -> tuple[float, _T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    tasks = {f.__name__: f for f in (fill, sizes, restores, saves, loads, captures, memory)}
    print(json.dumps(tasks[task](*arguments)))
