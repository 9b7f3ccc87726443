"""What a calibration holds: how a model's keys and values vary, which of it matters, and which tokens matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from semq_state import content
from semq_state.rotary import Rotary

Tensors = Mapping[str, torch.Tensor]

N_PLACES = 5
"""Numbers of a token's place in the text from which its importance is predicted."""

TELLING = 300
"""Components from which it is predicted, at most."""


@dataclass(frozen=True, eq=False)
class LayerSet:
    """The transform of layers whose keys and values are coded together.

    The keys (before rotary embedding) and values of a token are one vector of `n_dims` numbers, ordered by layer,
    head, keys before values. It is multiplied by `scale`, so that an error of one means the same everywhere; what
    the token's own id and the one before it tell is subtracted, and the rest is turned into its principal
    components, first within blocks of consecutive dimensions, then the strongest of all blocks together.

    Args:
        layers: numbers of the cache layers.
        n_heads: KV heads of each.
        key_dim: numbers of a key of one head.
        value_dim: numbers of a value of one head.
        rotaries: how keys and values of each layer turn with the position; None where they do not. (Latent
            attention keeps what it rotates as values.)
        scale: `(n_dims,)` float32, square roots of the importance.
        mean: `(n_dims,)` float32, of the scaled vectors.
        tells: `(n_now + n_before, n_dims)` int8, what the features of the tokens tell of the scaled vector.
        tells_scale: `(n_now + n_before,)` float32, of its rows.
        heads: of each block `(n_block, n_head)` float16: its strongest components.
        tails: of each block `(n_block, n_tail)` int8: the others.
        tails_scale: of each block `(n_tail,)` float32.
        mix: `(n_heads, n_mixed)` float16: the strongest components of all blocks, turned into those of the whole.
        bands: `(n_mixed + n_tails,)` int16: standard deviation of each component, in thirds of an octave (log2).
        matters: `(N_PLACES + min(TELLING, n_mixed) + n_features + 1,)` float32: how much a token matters (log2),
            from its place, its components and its features.
    """

    layers: tuple[int, ...]
    n_heads: int
    key_dim: int
    value_dim: int
    rotaries: tuple[tuple[Rotary | None, Rotary | None], ...]
    scale: torch.Tensor
    mean: torch.Tensor
    tells: torch.Tensor
    tells_scale: torch.Tensor
    heads: tuple[torch.Tensor, ...]
    tails: tuple[torch.Tensor, ...]
    tails_scale: tuple[torch.Tensor, ...]
    mix: torch.Tensor
    bands: torch.Tensor
    matters: torch.Tensor

    @property
    def n_dims(self) -> int:
        """Numbers of a token in all its layers."""
        return len(self.layers) * self.n_heads * (self.key_dim + self.value_dim)

    @property
    def n_components(self) -> int:
        """How many components a token has."""
        return len(self.bands)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        named = {name: getattr(self, name) for name in _PLAIN}
        for i, (head, tail, scale) in enumerate(zip(self.heads, self.tails, self.tails_scale, strict=True)):
            named |= {f"heads.{i}": head, f"tails.{i}": tail, f"tails_scale.{i}": scale}
        return named

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        known = list(dict.fromkeys(r for pair in self.rotaries for r in pair if r is not None))
        return {
            "layers": list(self.layers),
            "n_heads": self.n_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "n_blocks": len(self.heads),
            "rotaries": [rotary.as_dict() for rotary in known],
            "rotary_of": [[-1 if r is None else known.index(r) for r in pair] for pair in self.rotaries],
        }

    @classmethod
    def of(cls, told: Mapping[str, Any], tensors: Tensors) -> LayerSet:
        """The inverse of `as_dict` and `tensors`.

        Raises:
            KeyError, TypeError, ValueError, IndexError, FormatError: that is no layer set.
        """
        known = [Rotary.from_dict(each) for each in told["rotaries"]]
        blocks = range(told["n_blocks"])
        return cls(
            layers=tuple(told["layers"]),
            n_heads=told["n_heads"],
            key_dim=told["key_dim"],
            value_dim=told["value_dim"],
            rotaries=tuple(
                (None if i == -1 else known[i], None if j == -1 else known[j]) for i, j in told["rotary_of"]
            ),
            heads=tuple(tensors[f"heads.{i}"] for i in blocks),
            tails=tuple(tensors[f"tails.{i}"] for i in blocks),
            tails_scale=tuple(tensors[f"tails_scale.{i}"] for i in blocks),
            **{name: tensors[name] for name in _PLAIN},
        )

    def check(self, n_features: int) -> None:
        """Holds the tensors against each other, so that no product of them can fail.

        Raises:
            ValueError: they do not fit.
        """
        sizes = (self.n_heads, self.key_dim, self.value_dim, *self.layers)
        if not all(type(n) is int and 0 <= n < 1 << 24 for n in sizes) or not self.layers or self.n_dims < 1:
            raise ValueError("layers, heads and dimensions that are no counts")
        if len(self.rotaries) != len(self.layers):
            raise ValueError("as many rotary embeddings as layers")
        for pair in self.rotaries:
            for rotary, dim in zip(pair, (self.key_dim, self.value_dim), strict=True):
                if rotary is not None and rotary.begin + rotary.n_dims > dim:
                    raise ValueError("rotary embeddings within keys and values")
        n_mixed = self.mix.shape[-1]
        wanted = {
            "scale": (torch.float32, (self.n_dims,)),
            "mean": (torch.float32, (self.n_dims,)),
            "tells": (torch.int8, (n_features, self.n_dims)),
            "tells_scale": (torch.float32, (n_features,)),
            "mix": (torch.float16, (sum(h.shape[-1] for h in self.heads), n_mixed)),
            "bands": (torch.int16, (n_mixed + sum(t.shape[-1] for t in self.tails),)),
            "matters": (torch.float32, (N_PLACES + min(TELLING, n_mixed) + n_features + 1,)),
        }
        for i, (head, tail) in enumerate(zip(self.heads, self.tails, strict=True)):
            wanted[f"heads.{i}"] = (torch.float16, (len(head), head.shape[-1]))
            wanted[f"tails.{i}"] = (torch.int8, (len(head), tail.shape[-1]))
            wanted[f"tails_scale.{i}"] = (torch.float32, (tail.shape[-1],))
        found = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors().items()}
        if found != wanted or sum(len(head) for head in self.heads) != self.n_dims:
            raise ValueError("tensors that fit each other")
        if not all(torch.isfinite(t).all() for t in self.tensors().values() if t.is_floating_point()):
            raise ValueError("finite numbers")
        if not (self.scale > 0).all():
            raise ValueError("positive scales")


_PLAIN = ("scale", "mean", "tells", "tells_scale", "mix", "bands", "matters")


@dataclass(frozen=True)
class Measured:
    """One point of the curve that a calibration measured on text that it was not made from.

    Args:
        step: of the quantiser.
        bits_per_value: what the coded tokens took.
        kl: mean KL(exact, decoded) of the next token, in nats.
    """

    step: float
    bits_per_value: float
    kl: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a model's states are like, measured once.

    Args:
        weights: digest of the weights of the model that it was made from.
        model_name: a name for people; it proves nothing.
        sets: the layers that are coded together.
        now: `(n_vocab, n_now)` int8: features of a token, from its id.
        before: `(n_vocab, n_before)` int8: features of the token before it.
        curve: steps with the bits and the KL that they led to, finest first.
        about: how it was made: tokens, texts, versions, seconds.
    """

    weights: str
    model_name: str
    sets: tuple[LayerSet, ...]
    now: torch.Tensor
    before: torch.Tensor
    curve: tuple[Measured, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of everything in it but `about` and the name."""
        tensors = self.tensors()
        told = {name: value for name, value in self.as_dict().items() if name not in ("about", "model_name")}
        return content.content_digest(told, dict(content.specs_of(tensors)), content.all_digests(tensors))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        named = {"now": self.now, "before": self.before}
        for i, each in enumerate(self.sets):
            named |= {f"sets.{i}.{name}": tensor for name, tensor in each.tensors().items()}
        return named

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        return {
            "weights": self.weights,
            "model_name": self.model_name,
            "sets": [each.as_dict() for each in self.sets],
            "curve": [[p.step, p.bits_per_value, p.kl] for p in self.curve],
            "about": dict(self.about),
        }

    @classmethod
    def of(cls, told: Mapping[str, Any], tensors: Tensors) -> Calibration:
        """The inverse of `as_dict` and `tensors`.

        Raises:
            KeyError, TypeError, ValueError, IndexError, FormatError: that is no calibration.
        """
        sets = []
        for i, each in enumerate(told["sets"]):
            prefix = f"sets.{i}."
            own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            sets.append(LayerSet.of(each, own))
        curve = tuple(Measured(*map(float, point)) for point in told["curve"])
        now, before = tensors["now"], tensors["before"]
        self = cls(told["weights"], told["model_name"], tuple(sets), now, before, curve, told["about"])
        sound = (
            now.dtype == before.dtype == torch.int8
            and now.ndim == before.ndim == 2
            and len(now) == len(before) > 0
            and type(self.weights) is type(self.model_name) is str
            and type(self.about) is dict
            and all(math.isfinite(x) and x > 0 for p in curve for x in (p.step, p.bits_per_value))
            and all(math.isfinite(p.kl) for p in curve)
            and self.tensors().keys() == tensors.keys()
        )
        if not sound:
            raise ValueError("features of tokens, digest and name")
        for each in self.sets:
            each.check(now.shape[1] + before.shape[1])
        return self
