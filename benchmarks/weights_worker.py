"""One model quantised in one way, in a process of its own: its perplexity, size, time and memory as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import DynamicCache

from semq_state.cli.models import DEMO_MODEL, demo_model_folder, load_model
from semq_state.quantizers.activations import per_token
from semq_state.weights import calibrating, distill
from semq_state.weights.file import inspect_weights, save_weights
from semq_state.weights.installing import put, put_matrix
from semq_state.weights.quantize import quantize
from semq_state.weights.recipes import METHODS, Recipe

WINDOW = 2048
VARIANTS = {
    **METHODS,
    "gptq, shrunk grid": Recipe("gptq", fit="shrunk"),
    "neuqi, to the nearest": Recipe("neuqi", fit="neuqi", compensated=False),
    "specquant, smoothing alone": Recipe("specquant", smoothed=True),
    "specquant, branch alone": Recipe("specquant", frequencies=16),
}
"""Methods, and some with a part exchanged or left out."""


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A cache whose keys and values are rounded, each token of each head by itself."""

    bits = 4

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes rounded states in place of these."""
        return super().update(per_token(key_states, self.bits), per_token(value_states, self.bits), *args, **kwargs)


def windows(tokenizer: Any, text: str, n: int) -> torch.Tensor:
    """`n` of the text's consecutive windows `(n, WINDOW)`, evenly spread; all of them for 0."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    whole = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return whole if not n else whole[torch.linspace(0, len(whole) - 1, n).long()]


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor, kv_bits: int = 0) -> float:
    """`exp` of the mean negative log-likelihood of each window's tokens but the first."""
    total = 0.0
    for row in ids:
        options = {"use_cache": True, "past_key_values": RoundedCache()} if kv_bits else {"use_cache": False}
        hidden = model.model(row[None], **options).last_hidden_state[0]
        logits = model.lm_head(hidden[:-1]).float()
        total += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(total / (ids.numel() - len(ids)), dtype=torch.float64).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--method", default="", help="one of VARIANTS, `llmcompressor`, or none for the model as it is"
    )
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--activation", type=int, default=0)
    parser.add_argument("--embeddings", type=int, default=0)
    parser.add_argument("--distill", type=int, default=0, help="steps; a second row tells what they do")
    parser.add_argument("--peer", default="", help="a Python that has llmcompressor")
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 1024), help="how many, of how many tokens")
    parser.add_argument("--evaluated", type=int, default=8, help="windows of the text; 0 for all")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)
    ids = windows(tokenizer, given.text.read_text(), given.evaluated)
    if not given.method:
        rows = [{"bits_per_weight": 16.0, "cpu_seconds": 0.0, "peak_bytes": 0}]
        rows[0]["perplexity"] = perplexity(model, ids)
    elif given.method == "llmcompressor":
        rows = [_peer(model, tokenizer, given, ids)]
    else:
        rows = list(_ours(model, tokenizer, given, ids))
    print(json.dumps(rows))


def _ours(model: Any, tokenizer: Any, given: argparse.Namespace, ids: torch.Tensor) -> Iterator[dict[str, Any]]:
    recipe = VARIANTS[given.method]
    text = given.calibration.read_text()
    needs = recipe.needs_text or recipe.fit == "neuqi" or given.activation
    n, length = given.windows
    calibrated = calibrating.windows(tokenizer, text, n, length)
    target = distill.targets(model, calibrated, _quiet) if given.distill else []
    with Measured() as cost:
        quantize(
            model,
            recipe,
            given.bits,
            given.group,
            text if needs else None,
            tokenizer=tokenizer,
            embedding_bits=given.embeddings,
            activation_bits=given.activation,
            n_windows=n,
            window=length,
        )
    row = {**_size(model.semq_weights), **cost.row(), "perplexity": perplexity(model, ids)}
    if given.activation:
        row["perplexity_kv4"] = perplexity(model, ids, 4)
    yield row
    if given.distill:
        held = model.semq_weights
        with Measured() as cost:
            made, lost = distill.distilled(
                model, held.matrices, calibrated, target, given.distill, given.activation, 0, _quiet
            )
        for name, matrix in made.items():
            put_matrix(model, name, matrix)
        size = _size(dataclasses.replace(held, matrices=made))
        loss = {"loss_before": lost[0], "loss_after": lost[-1]}
        yield {**size, **cost.row(), "perplexity": perplexity(model, ids), "distill": given.distill, **loss}


def _peer(model: Any, tokenizer: Any, given: argparse.Namespace, ids: torch.Tensor) -> dict[str, Any]:
    """llmcompressor's GPTQ on the same windows, in its own Python; time and memory of that whole process."""
    script = Path(__file__).with_name("weights_peers.py")
    with tempfile.TemporaryDirectory() as folder:
        windows_file, made = Path(folder) / "windows.safetensors", Path(folder) / "made.safetensors"
        calibrated = calibrating.windows(tokenizer, given.calibration.read_text(), *given.windows)
        save_file({"ids": calibrated}, windows_file)
        place = demo_model_folder() if given.model == DEMO_MODEL else given.model
        command = [given.peer, script, place, windows_file, made, given.bits, given.group]
        began = time.perf_counter()
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=alone)
        took, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        for name, weight in load_file(made).items():
            put(model, f"{name}.weight", weight)
    cols = model.config.hidden_size if not given.group else given.group
    return {
        "bits_per_weight": given.bits + (16 + given.bits) / cols,
        "seconds": took,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "perplexity": perplexity(model, ids),
    }


def _size(held: Any) -> dict[str, float]:
    """Bits of the quantised matrices with everything that restores them, from a real file of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_weights(held, path)
        info = inspect_weights(path)
    return {"bits_per_weight": info.bits_per_quantized_weight}


class Measured:
    """Processor time, and the most memory of this process above what it had."""

    def __enter__(self) -> Measured:
        self._held = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self._spent, self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._worked, self._took = time.process_time() - self._spent, time.perf_counter() - self._began
        told = Path("/proc/self/status").read_text()
        self._peak = 1024 * int(next(line for line in told.splitlines() if line.startswith("VmHWM")).split()[1])

    def row(self) -> dict[str, Any]:
        return {"seconds": self._took, "cpu_seconds": self._worked, "peak_bytes": self._peak - self._held}


def _quiet(words: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
