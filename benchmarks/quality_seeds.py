"""Compact snapshots by published quantisers, side by side: KIVI, rotation, SEMQ, NeUQI, SEPTQ, SpecQuant.

    python -m benchmarks.quality_seeds --text FILE [--calibration-text FILE] [--model MODEL] --out FOLDER

The protocol is that of `benchmarks.quality`, so rows of both can be compared. With `--calibration-text` SEPTQ is
measured twice: alone, and told by a calibration how much each head matters (`calibrated`); to the others, whose
groups lie within a head, that makes no difference.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from benchmarks.quality_ours import Files, Ours
from benchmarks.quality_protocol import N_SEGMENTS, Protocol, python_source
from benchmarks.report import Row, in_process, write
from semq_state.calibration import Calibration, load_calibration
from semq_state.cli.models import load_model
from semq_state.codecs import AbstractVectorCodec, Neuqi, Rotated, Semq, Septq, Specquant, Uniform

BITS = (4, 3, 2)
_STEPS = {4: 0.3, 3: 0.6, 2: 1.2}  # of the rotated codec: about as many bits

NOTES = (
    "Model: SmolLM2-135M-Instruct (dequantised from a 4-bit GGUF), computed in float32, states in bfloat16. "
    "Per method {n} segments of WikiText-2 test and {n} of Python source: 1,024 tokens prefilled, the cache coded "
    "through a real file and decoded, 256 tokens teacher-forced (`wikitext`, `python`) and a repetition of 128 "
    "earlier ones (`copy`). `kl` is the mean KL(exact, decoded) in nats, `top1` the agreement of the most likely "
    "token in percent, `ratio` 16 bits over `bits_per_value`, from the whole file: scales, escapes, exact tokens "
    "included. Keys in groups of 64 tokens of a channel, values in groups of 64 channels of a token, unless a "
    "method has vectors of its own. `seconds`: coding and decoding one segment."
)


def seeds(calibration: Calibration | None) -> Iterator[Ours]:
    """Every method at each of `BITS`."""
    for bits in BITS:
        yield Ours(f"uniform {bits} bits (KIVI)", "uniform", _by_axis(Uniform, bits))
        yield Ours(f"rotated, step {_STEPS[bits]:g}", "rotated", Rotated(step=_STEPS[bits]))
        yield Ours(f"semq {bits} bits", "semq", Semq(parameter=2 ** (bits - 1), centred=True))
        for codec in (Neuqi, Septq, Specquant):
            yield Ours(f"{codec.id} {bits} bits", codec.id, _by_axis(codec, bits))
        if calibration is not None:
            yield Ours(f"septq {bits} bits, calibrated", "septq, calibrated", _by_axis(Septq, bits, calibration))


def _by_axis(codec: Any, bits: int, calibration: Calibration | None = None) -> sq.Policy:
    """Keys along channels, values along tokens."""
    codecs: dict[str, AbstractVectorCodec] = {
        "keys": codec(bits=bits, along="channel", group=64),
        "values": codec(bits=bits, along="token", group=64),
    }
    return sq.Policy(codecs, importance=calibration)


@torch.no_grad()
def measured(protocol: Protocol, files: Files, calibration: Calibration | None, only: str = "") -> Iterator[Row]:
    """A row for each method whose name contains `only`."""
    for each in seeds(calibration):
        if only in each.method:
            row = protocol.evaluate(files.code(each.codec), method=each.method, family=each.family)
            print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            yield {name: value for name, value in row.items() if name not in ("bits_wikitext", "bits_python")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--n-segments", type=int, default=N_SEGMENTS)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    made, calibration = [], None
    if args.calibration_text:
        with tempfile.TemporaryDirectory(prefix="semq-state-seeds-") as folder:
            told = str(args.calibration_text.resolve())
            made = [in_process("benchmarks.quality_worker", "calibrate", args.model, told, folder)]
            calibration = load_calibration(Path(folder) / "calibration.safetensors")
    model, tokenizer = load_model(args.model, dtype="float32")
    texts = {"wikitext": args.text.read_text(encoding="utf-8"), "python": python_source()}
    protocol = Protocol(model, tokenizer, texts, n_segments=args.n_segments)
    rows = list(measured(protocol, Files(model, calibration), calibration, args.only))
    tables = {**({"Calibration": made} if made else {}), "Size and quality": rows}
    write("quality_seeds", args.out, tables, model=args.model, notes=NOTES.format(n=args.n_segments))
    print((args.out / "quality_seeds.md").read_text())


if __name__ == "__main__":
    main()
