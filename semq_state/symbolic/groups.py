"""A group: tensors that are coded together, what a file says about them, and the names of their parts."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from semq_state.content import TensorSpec
from semq_state.errors import FormatError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of what can be coded."""

_MOST = 1 << 48


@dataclass(frozen=True)
class Stack:
    """Tensors of one dtype and shape, coded as one tensor with a leading axis.

    Args:
        kind: what they are, by `semq_state.layouts`: `keys`, `values` …
        names: the tensors.
        spec: dtype and shape of each, `(…, seq, dim)`.
    """

    kind: str
    names: tuple[str, ...]
    spec: TensorSpec


@dataclass(frozen=True)
class Group:
    """Stacks that one codec codes together, their tokens `start` to `stop`; the others are kept exactly.

    Args:
        codec: id of the symbolic codec.
        stacks: what is coded; more than one only where a codec looks at keys and values at once.
        start: the first coded token; those before it are kept exactly (attention sinks).
        stop: the token after the last coded one; those from it on are kept exactly (a recent window).
        params: the codec's parameters.
        alphabets: name of each symbol tensor to its lowest and highest symbol.
        exact: names of the codec's exact tensors.
        escaped: the stacks that have vectors which no codec takes (NaN, infinity), kept exactly.
    """

    codec: str
    stacks: tuple[Stack, ...]
    start: int
    stop: int
    params: Mapping[str, Any] = field(default_factory=dict)
    alphabets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    escaped: tuple[int, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Raw size of what it stands for."""
        return sum(len(stack.names) * stack.spec.n_bytes for stack in self.stacks)

    def names(self) -> list[str]:
        """The tensors that it stands for."""
        return [name for stack in self.stacks for name in stack.names]

    def body(self, stack: Stack) -> tuple[int, ...]:
        """Shape of the coded part of a stack: `(n_tensors, …, seq, dim)`."""
        *leading, _, dim = stack.spec.shape
        return (len(stack.names), *leading, self.stop - self.start, dim)

    def kept(self) -> dict[str, tuple[int, int, int]]:
        """Name of each tensor of exact tokens to its stack and its bounds."""
        bounds = {}
        for i, stack in enumerate(self.stacks):
            if self.start:
                bounds[f"first.{i}"] = (i, 0, self.start)
            if self.stop < stack.spec.n_tokens:
                bounds[f"last.{i}"] = (i, self.stop, stack.spec.n_tokens)
        return bounds

    def parts(self) -> list[str]:
        """The names of everything that a file holds of it, without the group's prefix."""
        names = [f"symbols.{name}" for name in self.alphabets]
        names += [f"exact.{name}" for name in self.exact]
        names += list(self.kept())
        for i in self.escaped:
            names += [f"escaped.{i}", f"escaped_at.{i}"]
        return names

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "codec": self.codec,
            "stacks": [
                {"kind": s.kind, "names": list(s.names), "dtype": s.spec.dtype, "shape": list(s.spec.shape)}
                for s in self.stacks
            ],
            "tokens": [self.start, self.stop],
            "params": dict(self.params),
            "alphabets": {name: list(bounds) for name, bounds in self.alphabets.items()},
            "exact": sorted(self.exact),
            "escaped": list(self.escaped),
        }

    @classmethod
    def from_dict(cls, told: Any) -> Group:
        """The inverse of `as_dict`, of a table that is not trusted.

        Raises:
            FormatError: it is no such table.
        """
        try:
            tokens, alphabets = told["tokens"], told["alphabets"]
            group = cls(
                codec=told["codec"],
                stacks=tuple(map(_stack, told["stacks"])),
                start=tokens[0],
                stop=tokens[1],
                params=told["params"],
                alphabets={name: (bounds[0], bounds[1]) for name, bounds in alphabets.items()},
                exact=tuple(told["exact"]),
                escaped=tuple(told["escaped"]),
            )
            _check(group)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _refused(told) from error
        if group.as_dict() != told:
            raise _refused(told)
        return group


def prefix_of(i: int) -> str:
    """Under which the parts of group `i` stand in a file."""
    return f"coded.{i}."


def _stack(told: Any) -> Stack:
    shape = tuple(told["shape"])
    if told["dtype"] not in FLOATS or not 2 <= len(shape) <= 16 or not all(map(_is_count, shape)):
        raise ValueError("no dtype and shape of vectors")
    size = 1
    for n in shape:
        size *= max(n, 1)
    names = tuple(told["names"])
    if size >= _MOST or not names or not all(type(name) is str for name in names) or type(told["kind"]) is not str:
        raise ValueError("too large, or without names")
    return Stack(told["kind"], names, TensorSpec(told["dtype"], shape))


def _check(group: Group) -> None:
    seqs = {stack.spec.n_tokens for stack in group.stacks}
    names = group.names()
    sound = (
        type(group.codec) is str
        and type(group.params) is dict
        and len(seqs) == 1
        and _is_count(group.start)
        and _is_count(group.stop)
        and group.start <= group.stop <= min(seqs)
        and len(set(names)) == len(names)
        and all(type(name) is str for name in (*group.alphabets, *group.exact))
        and all(type(n) is int and abs(n) < 1 << 15 for bounds in group.alphabets.values() for n in bounds)
        and all(type(i) is int and 0 <= i < len(group.stacks) for i in group.escaped)
        and len(set(group.escaped)) == len(group.escaped)
    )
    if not sound:
        raise ValueError("fields that do not fit each other")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _refused(told: Any) -> FormatError:
    return FormatError(
        "structure, coded",
        expected="a group of coded tensors",
        found=f"{reprlib.repr(told):.300}",
        do="use another copy of the file",
    )
