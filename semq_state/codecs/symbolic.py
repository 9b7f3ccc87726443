"""What every symbolic codec promises: vectors of floats to integers of a declared alphabet, and back.

A symbolic codec turns values into symbols, a few exact tensors beside them (norms, means, scales) and plain
parameters. The symbols are what the identity of a compact state is computed over. How they become bytes is the
business of a byte codec (`base.py`): an entropy coder, most of the time.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from semq_state.errors import IntegrityError


@dataclass(frozen=True, eq=False)
class Symbols:
    """An integer tensor and its alphabet, `lowest` to `highest`, both included.

    Args:
        values: int8, uint8 or int16 of any shape; `(…, seq, dim)` where each value has one symbol.
        lowest: the smallest symbol that may occur.
        highest: the largest.
    """

    values: torch.Tensor
    lowest: int
    highest: int


@dataclass(frozen=True, eq=False)
class Symbolic:
    """What a codec makes of values; with the codec's id it is all that decoding needs.

    Args:
        symbols: name to symbols.
        exact: name to tensors that are kept as they are: norms, means, scales.
        params: plain scalars and lists of them.
    """

    symbols: Mapping[str, Symbols]
    exact: Mapping[str, torch.Tensor] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)


class AbstractVectorCodec(ABC):
    """Vectors to symbols and back, without a calibration.

    What is not for a symbolic codec never reaches one: attention sinks, recent windows and vectors with NaN or
    infinity are kept exactly by whoever calls it.
    """

    id: ClassVar[str]

    @abstractmethod
    def encode(self, values: torch.Tensor) -> Symbolic:
        """Codes vectors.

        Args:
            values: float32 `(…, seq, dim)`, all finite; any size may be 0. Leading axes are layers, rows, heads;
                a vector is one token of one head, or one hidden state.
        """

    @abstractmethod
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        """The vectors, float32 of `shape`.

        Everything that `symbolic` holds is untrusted: its symbols are known to lie in their alphabets, no more.

        Raises:
            IntegrityError: parameters, names, dtypes or shapes are not what `encode` makes for `shape`.
        """


class AbstractWeightedCodec(AbstractVectorCodec):
    """A codec that can be told which errors matter. Decoding needs none of it."""

    @abstractmethod
    def encode(self, values: torch.Tensor, importance: torch.Tensor | None = None) -> Symbolic:
        """Codes vectors.

        Args:
            values: as ever.
            importance: how much a squared error of each value matters, float32 of as many axes as `values`, each of
                the same length or of 1; only its ratios count. Positive numbers, and zeros. None: all alike.
        """


def damaged(codec: str, expected: str, found: object) -> IntegrityError:
    """The error of a codec that is given what it never made."""
    return IntegrityError(
        f"{codec} codec",
        expected=expected,
        found=found if isinstance(found, str) else reprlib.repr(found)[:200],
        do="the file is damaged; use another copy of it",
    )
