"""Which codec each kind of state gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from semq_state.calibration import Calibration
from semq_state.codecs.symbolic import AbstractVectorCodec
from semq_state.codecs.transform import Transform

LOSSY_KINDS = ("keys", "values", "latent", "hidden")
"""Kinds of state, by `semq_state.layouts`, that a lossy codec takes unless it is told otherwise."""

N_SINKS = 4
"""The first tokens of a sequence draw attention whatever they are (Xiao et al. 2023, StreamingLLM): an error there
reaches every later token."""


@dataclass(frozen=True)
class Policy:
    """What is lossy in a snapshot, and how. Everything else stays exact.

    Recurrent and convolution states are exact unless named here: an error in them is carried on by every step.

    Args:
        codecs: kind of state to codec: `keys`, `values`, `latent`, `index`, `recurrent`, `convolution`, `hidden`.
        transform: the calibrated codec of keys and values; layers that its calibration does not have get
            `codecs`.
        importance: a calibration that tells codecs which weigh errors how much each head's keys and values matter.
            Files do not name it: nobody needs it to read them.
        n_sinks: first tokens of a sequence that stay exact.
        n_recent: last tokens that stay exact.

    Example:
        >>> sq.save(snapshot, "chat.safetensors", codec=Policy({"keys": Rotated(step=0.2)}))  # doctest: +SKIP
    """

    codecs: Mapping[str, AbstractVectorCodec] = field(default_factory=lambda: MappingProxyType({}))
    transform: Transform | None = None
    n_sinks: int = N_SINKS
    n_recent: int = 0
    importance: Calibration | None = None

    def __post_init__(self) -> None:
        if self.n_sinks < 0 or self.n_recent < 0:
            raise ValueError(f"`n_sinks` and `n_recent` are counts, got {self.n_sinks} and {self.n_recent}")


def everywhere(codec: AbstractVectorCodec) -> Policy:
    """One codec for every kind that may be lossy."""
    return Policy(dict.fromkeys(LOSSY_KINDS, codec))
