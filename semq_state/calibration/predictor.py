"""What calibration knows of how a model's keys and values follow from one another.

With its keys turned back, a head is nearly a linear function of the layers before it, of the heads before it, and
(for values) of the keys of its own layer: the error is about a quarter of its own spread.

The guess is part of a lossless format: it must be the same number on every machine, whatever the order in which
its matrix product is summed. Features are integers of at most 255, coefficients are integers, and no column's can
add up to 2^24, which float32 holds exactly in any order. Everything else is single IEEE operations on arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch

from semq_state import content
from semq_state.calibration.turn import Floats, Turn

Array: TypeAlias = npt.NDArray[Any]
Coefficients: TypeAlias = npt.NDArray[np.int16]

LARGEST: Final = 255  # of a feature
LARGEST_SUM: Final = (1 << 24) - 1
SMALLEST, GREATEST = 1e-30, 1e30  # scales lie between these, so that no product of them overflows

_MOST_REACH = 8
_FLOATS = ("unit", "mean", "fineness")


@final
@dataclass(frozen=True, eq=False)
class LayerGuess:
    """How one layer is guessed: blocks of `head_dim` numbers, its heads' keys first and then its heads' values.

    Args:
        before: int16 `(reach · width, width)`: what the features of the layers before, nearest first, tell of it.
        within: int16 `(blocks · (blocks - 1) / 2 · head_dim, head_dim)`: what those of the blocks before tell of
            each block, of which the first has none.
        unit: float32 `(width,)`: what one of a column's sum is worth.
        mean: float32 `(width,)`: the guess where all features are 0.
        fineness: float32 `(width,)`: its own features, for later guesses, are this many times the distance to the
            mean.
        turn: which of the set's turns its keys have; -1 for none.
    """

    before: Coefficients
    within: Coefficients
    unit: Floats
    mean: Floats
    fineness: Floats
    turn: int

    @cached_property
    def of_before(self) -> tuple[Floats, ...]:
        """`before` layer by layer, as factors of an exact matrix product."""
        width = self.before.shape[1]
        whole = self.before.astype(np.float32)
        return tuple(whole[at : at + width] for at in range(0, len(whole), width))

    @cached_property
    def of_within(self) -> tuple[Floats, ...]:
        """`within` block by block."""
        dim, whole = self.within.shape[1], self.within.astype(np.float32)
        ends = [i * (i + 1) // 2 * dim for i in range(len(self.unit) // dim)]
        return tuple(whole[end - i * dim : end] for i, end in enumerate(ends))

    def guess(self, total: Floats, part: slice) -> Floats:
        """`(rows, head_dim)` of a block from the sum of coefficients times features."""
        guess: Floats = total * self.unit[part]
        guess += self.mean[part]
        return guess

    def features(self, values: Floats, part: slice, out: Floats) -> None:
        """Integers within ±255 that stand for the values of a block in the guesses of others."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = values - self.mean[part]
            scaled *= self.fineness[part]
            np.fmin(scaled, np.float32(LARGEST), out=scaled)  # which makes 255 of NaN
            np.fmax(scaled, np.float32(-LARGEST), out=scaled)
        np.rint(scaled, out=out)

    def check(self, i: int, dim: int, width: int, n_turns: int) -> None:
        """Holds the parts of the layer at place `i` of its set against each other.

        Raises:
            ValueError: they do not fit.
        """
        reach, n_blocks = len(self.before) // width, width // dim
        wanted = {
            "before": (np.dtype(np.int16), (reach * width, width)),
            "within": (np.dtype(np.int16), (n_blocks * (n_blocks - 1) // 2 * dim, dim)),
            **{name: (np.dtype(np.float32), (width,)) for name in _FLOATS},
        }
        if {name: (a.dtype, a.shape) for name, a in self.arrays().items()} != wanted or reach > min(i, _MOST_REACH):
            raise ValueError("arrays that fit each other")
        if type(self.turn) is not int or not -1 <= self.turn < n_turns:
            raise ValueError("a known turn")
        for scale in (self.unit, self.fineness):
            if not ((scale >= np.float32(SMALLEST)) & (scale <= np.float32(GREATEST))).all():
                raise ValueError("scales within bounds")
        if not (np.abs(self.mean) <= np.float32(GREATEST)).all():
            raise ValueError("means within bounds")
        sums = np.abs(self.before.astype(np.int64)).sum(axis=0)
        for j, block in enumerate(self.of_within):
            sums[j * dim : (j + 1) * dim] += np.abs(block.astype(np.int64)).sum(axis=0)
        if (LARGEST * sums > LARGEST_SUM).any():
            raise ValueError("coefficients whose sums are exact")

    def arrays(self) -> dict[str, Array]:
        """Every array by name."""
        return {name: getattr(self, name) for name in ("before", "within", *_FLOATS)}


@final
@dataclass(frozen=True, eq=False)
class GuessSet:
    """Layers of one shape that are guessed from one another.

    Args:
        layers: numbers of the cache layers, ascending.
        n_heads: KV heads of each.
        head_dim: numbers of a key, and of a value, of one head.
        turns: how keys turn.
        guesses: one a layer.
    """

    layers: tuple[int, ...]
    n_heads: int
    head_dim: int
    turns: tuple[Turn, ...]
    guesses: tuple[LayerGuess, ...]

    @property
    def width(self) -> int:
        """Numbers of a token in one layer."""
        return 2 * self.n_heads * self.head_dim

    def names(self) -> tuple[str, ...]:
        """The tensors that it guesses, in the order in which it does, by their names in a file."""
        return tuple(f"layers.{i}.{kind}" for i in self.layers for kind in ("keys", "values"))

    def check(self) -> None:
        """Holds all parts against each other, so that no guess can fail.

        Raises:
            ValueError: they do not fit.
        """
        counts = (self.n_heads, self.head_dim, *self.layers)
        if not self.layers or not all(type(n) is int and 0 <= n < 1 << 16 for n in counts):
            raise ValueError("layers, heads and dimensions that are counts")
        if not self.width or list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers in ascending order, with heads")
        for turn in self.turns:
            turn.check(self.head_dim)
        for i, guess in enumerate(self.guesses):
            guess.check(i, self.head_dim, self.width, len(self.turns))

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not an array."""
        return {
            "layers": list(self.layers),
            "n_heads": self.n_heads,
            "head_dim": self.head_dim,
            "turns": [turn.as_dict() for turn in self.turns],
            "turn_of": [guess.turn for guess in self.guesses],
        }

    def arrays(self) -> dict[str, Array]:
        """Every array by name."""
        named: dict[str, Array] = {f"turns.{i}": turn.base for i, turn in enumerate(self.turns)}
        for i, guess in enumerate(self.guesses):
            named |= {f"guesses.{i}.{name}": array for name, array in guess.arrays().items()}
        return named

    @classmethod
    def of(cls, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> GuessSet:
        """The inverse of `as_dict` and `arrays`.

        Raises:
            KeyError, TypeError, ValueError: that is no set.
        """
        found = cls(
            tuple(told["layers"]),
            told["n_heads"],
            told["head_dim"],
            tuple(Turn(t["layout"], t["begin"], arrays[f"turns.{i}"]) for i, t in enumerate(told["turns"])),
            tuple(
                LayerGuess(**{n: arrays[f"guesses.{i}.{n}"] for n in ("before", "within", *_FLOATS)}, turn=turn)
                for i, (_, turn) in enumerate(zip(told["layers"], told["turn_of"], strict=True))
            ),
        )
        if found.as_dict() != told or found.arrays().keys() != arrays.keys():
            raise ValueError("no fields or arrays besides")
        found.check()
        return found


@final
@dataclass(frozen=True, eq=False)
class Predictor:
    """How the keys and values of one model are guessed.

    Args:
        weights: digest of the weights of the model that it was made from.
        model_name: a name for people; it proves nothing.
        sets: layers that are guessed from one another.
    """

    weights: str
    model_name: str
    sets: tuple[GuessSet, ...]

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of everything that a guess depends on."""
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays().items()}
        return content.content_digest(
            {"sets": [each.as_dict() for each in self.sets]},
            dict(content.specs_of(tensors)),
            content.all_digests(tensors),
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not an array."""
        sets = [each.as_dict() for each in self.sets]
        return {"weights": self.weights, "model_name": self.model_name, "sets": sets}

    def arrays(self) -> dict[str, Array]:
        """Every array by name."""
        return {f"{i}.{name}": a for i, each in enumerate(self.sets) for name, a in each.arrays().items()}

    @classmethod
    def of(cls, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> Predictor:
        """The inverse of `as_dict` and `arrays`, of values that are not trusted.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: that is no predictor.
        """
        if told.keys() != {"weights", "model_name", "sets"} or type(told["sets"]) is not list:
            raise ValueError("a model and sets of layers")
        if not (type(told["weights"]) is type(told["model_name"]) is str):
            raise ValueError("digest and name")
        split: list[dict[str, Array]] = [{} for _ in told["sets"]]
        for name, array in arrays.items():
            number, _, own = name.partition(".")
            split[int(number)][own] = array
        sets = tuple(GuessSet.of(each, own) for each, own in zip(told["sets"], split, strict=True))
        if len({layer for each in sets for layer in each.layers}) != sum(len(each.layers) for each in sets):
            raise ValueError("each layer in one set")
        found = cls(told["weights"], told["model_name"], sets)
        if found.arrays().keys() != arrays.keys():
            raise ValueError("no arrays besides")
        return found
