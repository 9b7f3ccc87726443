"""The predictor of least squares, from caches that a model left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from semq_state.calibration.predictor import (
    GREATEST,
    LARGEST,
    LARGEST_SUM,
    SMALLEST,
    GuessSet,
    LayerGuess,
    Predictor,
)
from semq_state.calibration.turn import Floats, Turn
from semq_state.errors import CalibrationError
from semq_state.rotary import Rotary

_Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Held:
    """What one layer held after a text.

    Args:
        keys: bf16 `(1, heads, seq, head_dim)`.
        values: the same.
        begin: position of the first token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    begin: int = 0


Layers: TypeAlias = Mapping[int, Held]
"""What a cache held, by number of the layer."""

_GRAIN = 32  # features to a standard deviation


def fit(
    caches: Iterable[Layers],
    rotaries: Mapping[int, Rotary],
    *,
    windows: Mapping[int, int] | None = None,
    reach: int = 2,
    ridge: float = 0.003,
    weights: str = "",
    model_name: str = "",
) -> Predictor:
    """A predictor from caches of one model, some 8,000 tokens of ordinary text in all.

    Layers of one shape and one window are guessed from one another. Others are left out, as are those whose keys
    and values differ in shape.

    Args:
        caches: of one row each.
        rotaries: of the layers whose keys turn with the position.
        windows: of the layers that keep so many tokens only.
        reach: how many layers before its own a layer is guessed from.
        ridge: what is added to the diagonal of the normal equations, relative to it.
        weights: digest of the model's weights.
        model_name: a name for people.

    Raises:
        CalibrationError: there is nothing that could be guessed.
    """
    held = list(caches)
    sets = []
    for numbers in _sets(held[0], windows or {}) if held else []:
        sets.append(_fitted(held, numbers, rotaries, reach, ridge))
    if not sets:
        raise CalibrationError(
            "predictor",
            expected="bfloat16 caches, (1, heads, seq, head_dim), with keys and values of one shape",
            found=f"{len(held)} caches without",
            do="save this model's states with codec='exact-max'",
        )
    return Predictor(weights, model_name, tuple(sets))


def _sets(cache: Layers, windows: Mapping[int, int]) -> list[list[int]]:
    def kind(number: int) -> tuple[Any, ...]:
        keys = cache[number].keys
        return windows.get(number, 0), keys.shape[1], keys.shape[3]

    sound = [
        number
        for number, held in sorted(cache.items())
        if held.keys.shape == held.values.shape
        and held.keys.ndim == 4
        and held.keys.dtype == held.values.dtype == torch.bfloat16
    ]
    return [list(group) for _, group in groupby(sorted(sound, key=lambda n: (kind(n), n)), kind)]


def _fitted(
    caches: Sequence[Layers], numbers: list[int], rotaries: Mapping[int, Rotary], reach: int, ridge: float
) -> GuessSet:
    distinct = list(dict.fromkeys(rotaries[n] for n in numbers if n in rotaries))
    turns = tuple(map(Turn.of, distinct))
    shape = caches[0][numbers[0]].keys.shape
    guesses: list[LayerGuess] = []
    seen: list[Floats] = []
    for number in numbers:
        turn = distinct.index(rotaries[number]) if number in rotaries else -1
        values = np.concatenate([_unturned(cache[number], turns[turn] if turn >= 0 else None) for cache in caches])
        mean = values.mean(axis=0)
        mean[np.abs(mean) < SMALLEST] = 0
        with np.errstate(divide="ignore"):
            fineness = np.clip(_GRAIN / values.std(axis=0), SMALLEST, 1e9).astype(np.float32)
        mean = np.clip(np.nan_to_num(mean), -GREATEST, GREATEST).astype(np.float32)
        values -= mean
        own = np.clip(np.rint(values * fineness), -LARGEST, LARGEST)
        features = np.concatenate([*seen[:reach], own], axis=1)
        guesses.append(_guess(features, values, shape[3], mean, fineness, turn, ridge))
        seen = [own, *seen[: reach - 1]]
    return GuessSet(tuple(numbers), shape[1], shape[3], turns, tuple(guesses))


def _guess(
    features: Floats, values: Floats, dim: int, mean: Floats, fineness: Floats, turn: int, ridge: float
) -> LayerGuess:
    """One layer, from the features of those before, nearest first, and its own last."""
    n_before, width = features.shape[1] - values.shape[1], values.shape[1]
    gram = (features.T @ features).astype(np.float64)
    cross = (features.T @ values).astype(np.float64)
    before, within, units = [], [], []
    for at in range(0, width, dim):
        n_seen = n_before + at
        weights = _solved(gram[:n_seen, :n_seen], cross[:n_seen, at : at + dim], ridge)
        whole, unit = _whole(weights)
        before.append(whole[:n_before])
        within.append(whole[n_before:])
        units.append(unit)
    return LayerGuess(
        np.concatenate(before, axis=1), np.concatenate(within), np.concatenate(units), mean, fineness, turn
    )


def _unturned(held: Held, turn: Turn | None) -> Floats:
    """All heads' keys, turned back, then all heads' values, `(seq, width)`."""
    keys, values = ([head.float().numpy() for head in t[0].cpu()] for t in (held.keys, held.values))
    if turn is not None:
        cos, sin = turn.table(held.begin, held.begin + len(keys[0]))
        keys = [turn.turned(head, cos, -sin) for head in keys]
    return np.concatenate([*keys, *values], axis=1)


def _solved(gram: _Doubles, cross: _Doubles, ridge: float) -> _Doubles:
    if not len(gram):
        return np.zeros(cross.shape)
    diagonal = gram.diagonal()
    added = diagonal * ridge + 1e-6 * diagonal.mean() + 1e-9
    weights: _Doubles = np.linalg.solve(gram + np.diag(added), cross).astype(np.float64)
    return weights


def _whole(weights: _Doubles) -> tuple[npt.NDArray[np.int16], Floats]:
    """Integer coefficients as fine as an exact sum allows, and the unit of each column."""
    room = LARGEST_SUM // LARGEST - len(weights)  # rounding adds at most a half to each
    largest = np.maximum(np.abs(weights).sum(axis=0) / room, np.abs(weights).max(axis=0, initial=0) / 32767)
    unit = np.clip(largest, SMALLEST, GREATEST).astype(np.float32)
    return np.rint(weights / unit).astype(np.int16), unit
