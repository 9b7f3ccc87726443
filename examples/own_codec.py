"""A codec of one's own: tried against the published suite, registered, and used to save a state.

python examples/own_codec.py [MODEL] [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import semq_state as sq
from semq_state import codecs
from semq_state.cli.models import load_model
from semq_state.codecs import AbstractVectorCodec, Symbolic, Symbols
from semq_state.testing import VectorCodecTests, broken_promises


@dataclass(frozen=True)
class Tenths(AbstractVectorCodec):
    """Each number as a whole number of `step` root mean squares of its vector."""

    id: ClassVar[str] = "example.tenths"
    step: float = 0.1

    def encode(self, values: torch.Tensor) -> Symbolic:
        n_values = max(1, values.shape[-1])
        rms = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float64) / n_values**0.5
        made = (values / rms.masked_fill(rms == 0, 1) / self.step).round().clamp(-999, 999).to(torch.int16)
        return Symbolic({"made": Symbols(made, -999, 999)}, {"rms": rms.float()}, {"step": self.step})

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        made, rms, step = symbolic.symbols.get("made"), symbolic.exact.get("rms"), symbolic.params.get("step")
        if made is None or made.values.shape != shape or type(step) is not float or not 0 < step <= 1:
            raise sq.IntegrityError(
                "tenths codec", expected=f"symbols of {shape} and a step", found=f"{step!r:.80}"
            )
        if rms is None or rms.dtype != torch.float32 or rms.shape != (*shape[:-1], 1):
            raise sq.IntegrityError("tenths codec", expected="a float32 for each vector", found="others")
        return made.values * (rms * step)


class TestTenths(VectorCodecTests):
    """In a test file, this class is all that pytest needs."""

    codec, other, tolerance = Tenths(), Tenths(step=0.5), 0.03


def main(name: str = "smollm2", folder: str | None = None) -> None:
    for promise, error in broken_promises(TestTenths).items():
        raise SystemExit(f"{promise}: {error}")
    codecs.register(Tenths())

    model, tokenizer = load_model(name)
    file = Path(folder or tempfile.mkdtemp()) / "tenths.safetensors"
    inputs = tokenizer("The tide came in, and the lighthouse keeper", return_tensors="pt")
    with sq.capture(model) as run:
        model.generate(**inputs, max_new_tokens=20, do_sample=False)
    info = sq.save(run.snapshot(), file, codec=Tenths())
    assert info.coding is not None
    worst = info.coding.errors[info.coding.worst]
    print(f"{info.coding.bits_per_value:.1f} bits a value, relative error at most {worst.relative:.3f}")

    resumed = sq.restore(sq.load(file), model)
    print(tokenizer.decode(resumed.generate(max_new_tokens=20)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
