"""What every codec promises.

A codec turns a tensor's canonical bytes into a payload and a few parameters, and back. The parameters stand in
the manifest, never in the payload. An id is a promise: any later class under it decodes what any earlier one
encoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from semq_state.content import Bytes, TensorSpec

MAX_EXPANSION = 256
"""A payload holds at least 1/256 of the bytes that it stands for, so that a file cannot ask for memory out of
proportion to its own size. Encoders pad a payload that would be smaller."""


@dataclass(frozen=True)
class Encoded:
    """A payload in pieces, written one after the other, and the parameters that decode it."""

    pieces: tuple[bytes | Bytes, ...]
    params: Mapping[str, Any]

    @property
    def n_bytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


class AbstractCodec(ABC):
    """Tensor to payload and back."""

    id: ClassVar[str]

    @abstractmethod
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        """Codes one chunk.

        Args:
            data: canonical bytes, flat.
            spec: what they are.
        """

    @abstractmethod
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        """Fills `out` with the canonical bytes.

        Raises:
            IntegrityError: payload or parameters are damaged; `out` may hold anything then.
        """
