"""How a state that was read from a compact file had been coded, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SectionError:
    """What coding did to one tensor, over its coded tokens.

    Args:
        relative: norm of the error over the norm of the values.
        cosine: between the values and what is decoded, each taken as one vector.
    """

    relative: float
    cosine: float


@dataclass(frozen=True)
class Coding:
    """What a compact file says of itself; measured on this very state when it was saved.

    Args:
        codec: the preset or codec that was asked for.
        picked: kind of state to what was picked for it, in words.
        bits_per_value: of all coded tensors, exact tokens, norms and tables included.
        ratio: raw bytes of all tensors over the size of the file.
        errors: tensor to its error.
        source: `state_id` of the state that was coded.
        kl: expected KL divergence of the next token in nats, by the calibration's curve; None without one.
        calibration: its digest; empty without one.
        left_out: what the file does not hold though the state did, with the reason.
        n_exact_vectors: vectors that no codec takes (NaN, infinity, sinks after padding), kept exactly.
    """

    codec: str
    picked: Mapping[str, str]
    bits_per_value: float
    ratio: float
    errors: Mapping[str, SectionError]
    source: str
    kl: float | None = None
    calibration: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    n_exact_vectors: int = 0

    @property
    def worst(self) -> str:
        """The tensor with the largest relative error; empty where nothing was coded."""
        return max(self.errors, key=lambda name: self.errors[name].relative, default="")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file or for JSON."""
        return {
            "codec": self.codec,
            "picked": dict(self.picked),
            "bits_per_value": self.bits_per_value,
            "ratio": self.ratio,
            "errors": {name: [error.relative, error.cosine] for name, error in self.errors.items()},
            "source": self.source,
            "kl": self.kl,
            "calibration": self.calibration,
            "left_out": dict(self.left_out),
            "n_exact_vectors": self.n_exact_vectors,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Coding:
        """The inverse of `as_dict`, of a table that is not trusted.

        Raises:
            KeyError, TypeError, ValueError: it is no such table.
        """
        numbers = [told["bits_per_value"], told["ratio"], *(n for pair in told["errors"].values() for n in pair)]
        numbers += [told["kl"]] if told["kl"] is not None else []
        if not all(type(number) is float and not math.isnan(number) for number in numbers):
            raise TypeError("errors that are no numbers")
        texts = [told["codec"], told["source"], told["calibration"], *told["picked"].values()]
        if not all(type(text) is str for text in (*texts, *told["left_out"].values())):
            raise TypeError("names that are no text")
        coding = cls(
            told["codec"],
            told["picked"],
            told["bits_per_value"],
            told["ratio"],
            {name: SectionError(relative, cosine) for name, (relative, cosine) in told["errors"].items()},
            told["source"],
            told["kl"],
            told["calibration"],
            told["left_out"],
            told["n_exact_vectors"],
        )
        if coding.as_dict() != told or type(coding.n_exact_vectors) is not int:
            raise ValueError("fields besides")
        return coding
