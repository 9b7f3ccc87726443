"""Ways to damage what a codec made: its payload, its parameters, its symbols and exact tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from semq_state.codecs import Symbolic, Symbols
from semq_state.content import Bytes

_T = TypeVar("_T")

Damaged = Iterator[tuple[str, _T]]
"""What was done, in words, and the result."""

_ANYTHING: tuple[Any, ...] = (
    None, True, -1, 0, 1, 255, 1 << 31, 1 << 40, 1 << 62, 2.5, -1e300, float("nan"), float("inf"), "", "x", [], [0],
    ["x", 1], {}, {"x": 0},
)  # fmt: skip
_NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 3e38)
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def payloads(payload: Bytes, n_flips: int = 60) -> Damaged[Bytes]:
    """Shorter and longer ones, and some with bytes flipped; they are read-only, as those of files are."""
    for n_bytes in np.unique(np.linspace(0, max(0, len(payload) - 1), 40, dtype=int)):
        yield f"payload cut to {n_bytes} bytes", _frozen(payload[:n_bytes])
    for more in (b"\x00", b"\x01", bytes(300), b"\xff" * 300):
        yield f"payload with {len(more)} more", _frozen(np.append(payload, np.frombuffer(more, np.uint8)))
    random = np.random.default_rng(0)
    for i in range(n_flips if len(payload) else 0):
        changed, at = payload.copy(), random.integers(0, len(payload), 1 + i % 3)
        changed[at] ^= random.integers(1, 256, len(at), np.uint8)
        yield f"bytes {at.tolist()} flipped", _frozen(changed)
    for value in (0, 255) if len(payload) else ():
        yield f"payload of {value}", _frozen(np.full_like(payload, value))


def params(table: Mapping[str, Any]) -> Damaged[dict[str, Any]]:
    """Each parameter missing, one too many, and each value, at any depth, replaced by others of any type."""
    yield "no params", {}
    yield from _tables(table, "params")


def symbolics(good: Symbolic) -> Damaged[Symbolic]:
    """Names that are missing, others or too many; tensors of other dtypes and shapes; numbers out of range."""
    for part in ("symbols", "exact"):
        entries: Mapping[str, Any] = getattr(good, part)
        for words, names in _names(entries):
            yield f"{part} {words}", dataclasses.replace(good, **{part: names})
    for name, symbols in good.symbols.items():
        for words, found in (*_alphabets(symbols), *_other_symbols(symbols)):
            yield f"symbols {name!r} {words}", dataclasses.replace(good, symbols={**good.symbols, name: found})
    for name, tensor in good.exact.items():
        for words, other in (*_tensors(tensor), *_numbers(tensor)):
            yield f"exact {name!r} {words}", dataclasses.replace(good, exact={**good.exact, name: other})


def _tables(table: Mapping[str, Any], where: str) -> Damaged[dict[str, Any]]:
    for words, found in _names(table):
        yield f"{where} {words}", found
    for name, value in table.items():
        for words, other in _values(value, f"{where}[{name!r}]"):
            yield words, {**table, name: other}


def _names(table: Mapping[str, _T]) -> Damaged[dict[str, _T]]:
    for name in table:
        rest = {key: value for key, value in table.items() if key != name}
        yield f"without {name!r}", rest
        yield f"{name!r} renamed", {**rest, f"{name}_": table[name]}
    yield "with one more", {**table, "one_more": next(iter(table.values()), 0)}  # type: ignore[dict-item]


def _values(value: Any, where: str) -> Damaged[Any]:
    for other in _ANYTHING:
        if type(other) is not type(value) or other != value:
            yield f"{where} = {other!r}", other
    if type(value) in (int, float):
        for number in (value + 1, value - 1, -value, value * 2):
            yield f"{where} = {number!r}", number
    elif type(value) is bool:
        yield f"{where} = {not value}", not value
    elif type(value) is list:
        yield f"{where} doubled", value + value
        yield f"{where} without its last", value[:-1]
        yield f"{where} turned", value[::-1]
        for i in sorted({0, len(value) - 1} if value else ()):
            for words, item in _values(value[i], f"{where}[{i}]"):
                yield words, [*value[:i], item, *value[i + 1 :]]
    elif type(value) is dict:
        yield from _tables(value, where)


def _alphabets(symbols: Symbols) -> Damaged[Symbols]:
    """Other alphabets; whoever calls a decoder has seen to it that all symbols lie in them."""
    values, lowest, highest = symbols.values, symbols.lowest, symbols.highest
    limits = torch.iinfo(values.dtype)
    yield "in a wider alphabet", Symbols(values, lowest - 1, highest + 1)
    yield "in the alphabet of int16", Symbols(values, -32767, 32767)
    yield "of one letter", Symbols(torch.zeros_like(values), 0, 0)
    yield "in a negated alphabet", Symbols(torch.zeros_like(values), -highest, -lowest)
    for value in sorted({lowest, highest, lowest - 1, highest + 1, limits.min, limits.max}):
        if limits.min <= value <= limits.max:
            filled = torch.full_like(values, value)
            yield f"all {value}", Symbols(filled, min(lowest, value), max(highest, value))


def _other_symbols(symbols: Symbols) -> Damaged[Symbols]:
    for words, values in _tensors(symbols.values):
        if values.dtype in (torch.int8, torch.uint8, torch.int16):
            bounds = torch.iinfo(values.dtype)
            yield words, Symbols(values, max(symbols.lowest, bounds.min), min(symbols.highest, bounds.max))


def _tensors(tensor: torch.Tensor) -> Damaged[torch.Tensor]:
    """Other dtypes and shapes."""
    for dtype in _DTYPES:
        if dtype != tensor.dtype:
            yield f"as {dtype}", torch.zeros(tensor.shape, dtype=dtype)
    yield "flat", tensor.flatten()
    yield "with another axis", tensor.unsqueeze(0)
    yield "with a last axis of 1", tensor.unsqueeze(-1)
    yield "of one number", tensor.new_zeros(())
    yield "of no number", tensor.new_zeros((0,))
    for axis, size in enumerate(tensor.shape):
        shape = list(tensor.shape)
        for other in {0, size - 1, size + 1} - {size, -1}:
            shape[axis] = other
            yield f"of shape {tuple(shape)}", tensor.new_zeros(shape)


def _numbers(tensor: torch.Tensor) -> Damaged[torch.Tensor]:
    """Numbers that no encoder writes."""
    if not tensor.numel() or tensor.dtype == torch.bool:
        return
    numbers: list[float] = list(_NUMBERS)
    if not tensor.dtype.is_floating_point:
        numbers = [torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max, 0]
    for number in numbers:
        one = tensor.double().flatten()
        one[-1] = number
        whole = torch.full(tensor.shape, number, dtype=torch.float64)
        for words, changed in (("its last", one.reshape(tensor.shape)), ("all", whole)):
            if tensor.dtype.is_floating_point or abs(number) < 1 << 31:
                yield f"with {words} {number}", changed.to(tensor.dtype)


def _frozen(data: Bytes) -> Bytes:
    return np.frombuffer(data.tobytes(), np.uint8)
