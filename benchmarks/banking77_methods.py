"""What sentence embeddings are coded with: rows to decoded rows, and the bits of all that is stored for them.

Train and test are coded apart. Where a number is fitted (a range, a mean over the rows, components), the test rows
use the one of the train rows only if the method says `fitted on train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from semq_state.codecs import AbstractVectorCodec, Pco, Rotated, Semq, Symbols, Uniform
from semq_state.codecs.semq_rules import OPERATORS
from semq_state.content import TensorSpec, raw_bytes

Coded = tuple[Tensor, float]
"""Decoded rows `(n, dim)` and the bits stored."""

_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16"}
_LEVELS = 16  # of the crude 4-bit schemes


@dataclass(frozen=True)
class Method:
    """A way to store rows.

    Args:
        fit: what of the train rows the coder needs, and the coder itself.
    """

    name: str
    family: str
    fit: Callable[[Tensor], Callable[[Tensor], Coded]]

    def code(self, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, float]:
        """Both decoded, and the bits per value over both, with what was fitted counted once."""
        coder = self.fit(train)
        (first, n), (second, m) = coder(train), coder(test)
        shared = SHARED_BITS.get(self.family, 0) * train.shape[1] ** 2
        return first, second, (n + m + shared) / (train.numel() + test.numel())


SHARED_BITS = {"components": 16}
"""Of each number of a square matrix that both splits share: the components, in bfloat16."""


def methods() -> Iterator[Method]:
    """Every row of the table, float32 first."""
    yield _fixed("float32", "float32", lambda rows: (rows, 32 * rows.numel()))
    for bits in (2, 3, 4):
        yield _own(f"SEMQ's rule, quant {bits} bits", "quant", 2 ** (bits - 1))
    yield _own("SEMQ's rule, phase 16", "phase", 16)
    yield _own("SEMQ's rule, orbit 50", "orbit", 50)
    for bits in (3, 4):
        # At 2 bits nothing is scaled to norm 1, and on unit rows that is SEMQ's rule with a norm beside it.
        yield _codec(f"semq, quant {bits} bits, c = 2, norms", "semq", Semq(parameter=2 ** (bits - 1), c=2.0))
    for bits in (2, 3, 4):
        yield _codec(f"semq, quant {bits} bits, best c, norms", "semq", Semq(parameter=2 ** (bits - 1)))
    for bits in (2, 3):
        name = f"semq, quant {bits} bits, best c, norms, centred"
        yield _codec(name, "semq", Semq(parameter=2 ** (bits - 1), centred=True))
    yield _codec("semq, phase 16, norms", "semq", Semq(operator="phase"))
    for bits in (2, 3, 4):
        for group in (64, 384):
            name = f"uniform {bits} bits, groups of {group}"
            yield _codec(name, "uniform", Uniform(bits=bits, along="token", group=group))
    for bits in (2, 3, 4):
        yield _codec(f"rotated, {bits} bits levels", "rotated", Rotated(quantiser="lloyd-max", bits=bits))
    for step in (1.05, 0.55, 0.27):
        yield _codec(f"rotated, step {step:g}, entropy coded", "rotated", Rotated(step=step))
    for step in (0.065, 0.035, 0.022, 0.016):
        name = f"components, step {step:g}, entropy coded, fitted on train"
        yield Method(name, "components", lambda train, step=step: _components(train, step))  # type: ignore[misc]
    yield _fixed("int8, absmax of a row", "int8", _int8)
    yield _fixed("binary, signs", "binary", lambda rows: (_signs(rows), rows.numel()))
    yield from _crude()


def _fixed(name: str, family: str, coder: Callable[[Tensor], Coded]) -> Method:
    return Method(name, family, lambda _: coder)


def _own(name: str, operator: str, parameter: int) -> Method:
    """Symbols as a `.semq` file packs them and decoded as they are: without norms, not scaled to norm 1."""

    def code(rows: Tensor) -> Coded:
        rule = OPERATORS[operator](rows.shape[1], parameter)
        symbols = rule.encode(rows.numpy())
        return torch.from_numpy(rule.decode(symbols)), float(8 * rule.pack(symbols).size)

    return _fixed(name, "SEMQ's rule", code)


def _codec(name: str, family: str, codec: AbstractVectorCodec) -> Method:
    """A codec of ours: symbols in whole bits, or by the entropy coder if the codec needs one; all else as it is."""
    entropy_coded = isinstance(codec, Rotated) and codec.quantiser == "uniform"

    def code(rows: Tensor) -> Coded:
        made = codec.encode(rows)
        count = _coded_bits if entropy_coded else _packed_bits
        exact = sum(8 * tensor.numel() * tensor.element_size() for tensor in made.exact.values())
        return codec.decode(made, tuple(rows.shape)), exact + sum(map(count, made.symbols.values()))

    return _fixed(name, family, code)


def _packed_bits(symbols: Symbols) -> float:
    return symbols.values.numel() * math.ceil(math.log2(symbols.highest - symbols.lowest + 1))


def _coded_bits(symbols: Symbols) -> float:
    values = symbols.values.contiguous()
    spec = TensorSpec(_NAMES[values.dtype], tuple(values.shape))
    return 8 * Pco().encode(raw_bytes(values), spec).n_bytes


def _components(train: Tensor, step: float) -> Callable[[Tensor], Coded]:
    """Principal components of the train rows, one step for all, entropy coded: `transform` without its calibration.

    The mean and the components are what a decoder would hold: bfloat16.
    """
    mean = train.mean(0).bfloat16().float()
    centred = (train - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1).bfloat16().float()  # largest variance first

    def code(rows: Tensor) -> Coded:
        symbols = ((rows - mean) @ axes / step).round().clamp(-32767, 32767).to(torch.int16)
        bits = _coded_bits(Symbols(symbols.T, -32767, 32767)) + 16 * mean.numel()
        return symbols.float() * step @ axes.T + mean, bits

    return code


def _int8(rows: Tensor) -> Coded:
    scales = (rows.abs().amax(-1, keepdim=True) / 127).half().float()
    return (rows / scales).round().clamp(-127, 127) * scales, 8 * rows.numel() + 16 * len(rows)


def _signs(rows: Tensor) -> Tensor:
    return torch.where(rows >= 0, 1.0, -1.0) / math.sqrt(rows.shape[1])


def _crude() -> Iterator[Method]:
    """4 bits with one scale for the whole matrix, in the ways that a few lines of code may do it."""

    def whole(train: Tensor) -> Callable[[Tensor], Coded]:
        low, step = float(train.min()), float(train.max() - train.min()) / (_LEVELS - 1)
        return lambda rows: (
            ((rows - low) / step).round().clamp(0, _LEVELS - 1) * step + low,
            4 * rows.numel(),
        )

    yield Method("crude 4 bits: min-max of the matrix, fitted on train", "crude", whole)
    for name, coder in CRUDE.items():
        yield _fixed(f"crude 4 bits: {name}", "crude", lambda rows, coder=coder: (coder(rows), 4 * rows.numel()))  # type: ignore[misc]


CRUDE: dict[str, Callable[[Tensor], Tensor]] = {
    "round(7.5 (x + 1)) / 7.5 - 1": lambda rows: ((rows + 1) * 7.5).round() / 7.5 - 1,
    "round(7 x) / 7": lambda rows: (rows * 7).round() / 7,
    "round(8 x) / 8": lambda rows: (rows * 8).round() / 8,
    "floor(7.5 (x + 1)) / 7.5 - 1": lambda rows: ((rows + 1) * 7.5).floor() / 7.5 - 1,
    "(floor(8 x) + 0.5) / 8": lambda rows: ((rows * 8).floor() + 0.5) / 8,
    "floor(8 x) / 8": lambda rows: (rows * 8).floor() / 8,
    "trunc(7 x) / 7": lambda rows: (rows * 7).trunc() / 7,
    "trunc(7.5 x) / 7.5": lambda rows: (rows * 7.5).trunc() / 7.5,
    "trunc(8 x) / 8": lambda rows: (rows * 8).trunc() / 8,
}
"""Over [-1, 1], although no coordinate of these rows is near to either end: 4 to 6 of the 16 levels are used."""
