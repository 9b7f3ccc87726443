"""Our codecs as the quality benchmark sees them: every one of them through a real file."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import semq_state as sq
from benchmarks.quality_protocol import Code, Pairs, Segment
from semq_state.codecs import Neuqi, Rotated, Semq, Septq, Specquant, Uniform
from semq_state.files.forms import Codec


@dataclass(frozen=True)
class Ours:
    """A codec of ours at one rate; the fields are those of a peer."""

    method: str
    family: str
    codec: Codec
    counted: str = "real"


def ours() -> Iterator[Ours]:
    """Presets, targets and every codec of the family at several rates."""
    for preset in ("exact", "exact-max", "near", "compact", "tiny"):
        yield Ours(preset, "exact" if "exact" in preset else "transform", preset)
    for kl in ("5e-3",):
        yield Ours(f"kl={kl}", "transform", f"kl={kl}")
    yield Ours("ratio=20", "transform", "ratio=20")
    for step in (0.1, 0.4, 0.8):
        yield Ours(f"rotated, step {step:g}", "rotated", Rotated(step=step))
    for bits in (3, 4):
        yield Ours(f"semq quant, {bits} bits", "semq quant", Semq(parameter=2 ** (bits - 1), centred=True))
    yield Ours("semq quant, 4 bits, c = 2", "semq quant, c = 2", Semq(parameter=8, c=2.0, centred=True))
    yield Ours("semq phase 256", "semq phase", Semq(operator="phase", parameter=256, centred=True))
    for bits in (4, 3, 2):
        keys, values = Uniform(bits=bits, along="channel", group=64), Uniform(bits=bits, along="token", group=64)
        yield Ours(f"uniform {bits} bits (KIVI)", "uniform", sq.Policy({"keys": keys, "values": values}))
    for codec in (Neuqi, Septq, Specquant):
        for bits in (4, 3, 2):
            channel, token = codec(bits=bits, along="channel"), codec(bits=bits, along="token")
            yield Ours(f"{codec.id} {bits} bits", codec.id, sq.Policy({"keys": channel, "values": token}))


class Files:
    """Snapshots of segments, saved and loaded.

    Args:
        model: in float32; the states are kept in bfloat16, as they would be.
        calibration: of the same weights; None where no codec needs one.
    """

    def __init__(self, model: Any, calibration: sq.Calibration | None) -> None:
        self._model, self._calibration = model, calibration
        self._folder = tempfile.TemporaryDirectory(prefix="semq-state-quality-")

    def code(self, codec: Codec) -> Code:
        """A codec as the protocol wants it: the file's own size is what is counted."""

        def through_a_file(segment: Segment) -> tuple[Pairs, float]:
            path = Path(self._folder.name) / "snapshot.safetensors"
            needs = self._calibration if isinstance(codec, str) and not codec.startswith("exact") else None
            sq.save(self.snapshot(segment), path, codec=codec, calibration=needs)
            loaded = sq.load(path, calibration=needs)
            layers = [layer.tensors for layer in loaded.cache.layers]
            return [(layer["keys"].float(), layer["values"].float()) for layer in layers], path.stat().st_size

        return through_a_file

    def snapshot(self, segment: Segment) -> sq.Snapshot:
        """The state after a segment, in bfloat16, with the provenance of the model that was calibrated."""
        cache = DynamicCache(config=self._model.config)
        for i, (keys, values) in enumerate(segment.cache):
            cache.update(keys, values, i)
        # One token more: chosen, and not yet fed.
        ids = torch.cat([segment.tokens, segment.tokens[:, -1:]], dim=1)
        snapshot = sq.snapshot_of(self._model, cache, ids).to(dtype=torch.bfloat16)
        if self._calibration is None:
            return snapshot
        provenance = dataclasses.replace(snapshot.provenance, weights=self._calibration.weights)
        return dataclasses.replace(snapshot, provenance=provenance)
