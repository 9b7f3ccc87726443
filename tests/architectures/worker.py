"""The two processes of test_fresh_processes.py: one interrupts a run of each family, the other goes on from files.

PYTHONPATH=tests:. python -m architectures.worker write|read FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from architectures import sweep
from architectures.cases import build
from architectures.sweep import MAPPINGS, STOP_AFTER

STATIC = {"cache_implementation": "static"}
FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dynamic": ("causal", "llama", {}),
    "sliding": ("causal", "mistral", {}),
    "indexed": ("causal", "deepseek_v32", {}),
    "static": ("causal", "llama", STATIC),
    "static-sliding": ("causal", "gemma3_text", STATIC),
    "static-indexed": ("causal", "deepseek_v32", STATIC),
    "linear": ("causal", "qwen3_next", {}),
    "mamba": ("causal", "mamba", {}),
    "linear+dynamic": ("causal", "falcon_h1", {}),
    "linear+sliding": ("causal", "zaya", {}),
    "linear+static": ("causal", "falcon_h1", STATIC),
    "linear+static-sliding": ("causal", "zaya", STATIC),
    "deepseek-v4": ("causal", "deepseek_v4", {}),
    "minimax-m3-sparse": ("causal", "minimax_m3_vl_text", {}),
    "minimax-m3-sparse-static": ("causal", "minimax_m3_vl_text", STATIC),
    "reference-sliding": ("image-text", "unlimited_ocr", {}),
    "reference-sliding-static": ("image-text", "unlimited_ocr", STATIC),
    "fp8": ("causal", "llama", FP8),
    "minimax": ("causal", "minimax", {}),
    "shared layers": ("causal", "gemma3n_text", {}),
    "encoder-decoder": ("seq2seq", "t5", {}),
    "rwkv": ("causal", "rwkv", {}),
    "xlnet": ("causal", "xlnet", {}),
    "xlstm": ("causal", "xlstm", {}),
    "reformer": ("causal", "reformer", {}),
    "modules' own": ("causal", "recurrent_gemma", {}),
    "image positions": ("image-text", "qwen2_vl", {}),
    "cross-attention to images": ("image-text", "mllama", {}),
    "a part that generates": ("image-text", "blip-2", {}),
    "voxtral-padding": ("seq2seq", "voxtral_realtime", {}),
}
"""One architecture of every family and kind."""


def _model(run: str) -> tuple[Any, Any, dict[str, Any]]:
    mapping, name, settings = RUNS[run]
    auto, cases = MAPPINGS[mapping]
    model = build(cases[name], name, auto)
    return model, cases[name].inputs(model), settings


def write(folder: Path) -> None:
    """Interrupts each run, and keeps what it would have said, which only the test reads."""
    for run in RUNS:
        model, inputs, settings = _model(run)
        whole = sweep.generated(model, inputs, **settings)
        file = folder / f"{run}.safetensors"
        snapshot = sweep.interrupted(model, inputs, settings)
        sq.save(snapshot, file)
        torch.save({"sequences": whole.sequences, "logits": whole.logits[STOP_AFTER:]}, folder / f"{run}.pt")


def read(folder: Path) -> None:
    """Goes on from each file in a process that never saw the prompt."""
    found = {}
    for run in RUNS:
        model, _, _ = _model(run)
        snapshot = sq.load(folder / f"{run}.safetensors")
        resumed = sq.restore(snapshot, model)
        out = resumed.generate(return_dict_in_generate=True)
        whole = torch.load(folder / f"{run}.pt")
        found[run] = {
            "families": sorted({layer.family for layer in snapshot.cache.all_layers()}),
            "kinds": sorted(_kinds(snapshot.cache).union(*map(_kinds, snapshot.generation.companions.values()))),
            "others": sorted({*snapshot.generation.companions, *snapshot.generation.attributes}),
            "reused": [resumed.reused_tokens, snapshot.n_tokens],
            "tokens": bool(torch.equal(out.sequences, whole["sequences"])),
            "logits": len(out.logits) == len(whole["logits"])
            and all(map(torch.equal, out.logits, whole["logits"])),
        }
    (folder / "found.json").write_text(json.dumps(found))


def _kinds(cache: Any) -> set[str]:
    return {cache.kind}.union(*(_kinds(part) for part in cache.parts.values()))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sweep.quiet()
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
