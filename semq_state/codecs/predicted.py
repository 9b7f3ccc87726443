"""Lossless bf16 keys and values of many layers at once: each head coded against a guess from what came before it.

The byte codecs see one tensor at a time; most of what can be saved is shared between layers, heads, keys and
values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, final

import numpy as np

from semq_state.calibration.predictor import GuessSet, LayerGuess, Predictor
from semq_state.calibration.turn import FURTHEST
from semq_state.codecs.base import MAX_EXPANSION
from semq_state.codecs.residual import Floats, Residuals, Words, floats, least_bytes
from semq_state.codecs.symbolic import damaged
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import CalibrationError

ID = "predicted"
PRESET = "exact-predicted"

_ROWS = 1024  # coded at a time, so that what is at work stays in the processor's cache

Turned: TypeAlias = Callable[[Floats], Floats]


def takes(guesses: GuessSet, specs: Sequence[TensorSpec], begins: Sequence[int]) -> bool:
    """Whether the tensors that a set names can be coded by it.

    Args:
        guesses: the set.
        specs: of its tensors, in its order.
        begins: of each the position of its first token.
    """
    spec = specs[0]
    return (
        all(other == spec for other in specs)
        and len(set(begins)) == 1
        and (spec.dtype, len(spec.shape)) == ("BF16", 4)
        and (spec.shape[1], spec.shape[3]) == (guesses.n_heads, guesses.head_dim)
        and spec.n_bytes > 0
        and begins[0] + spec.n_tokens <= FURTHEST
    )


def runs(spec: TensorSpec) -> list[tuple[int, int]]:
    """The runs of tokens that are coded together: within chunks, some 1,024 vectors a head."""
    step = max(1, _ROWS // spec.shape[0])
    return [(at, min(at + step, stop)) for start, stop in spec.chunks() for at in range(start, stop, step)]


def encode(guesses: GuessSet, begin: int, tensors: Sequence[Words]) -> bytes:
    """Codes a run of tokens, block after block, followed by zeros where that would be too small.

    Args:
        guesses: what guesses them.
        begin: position of the first token.
        tensors: of each layer in turn keys and values, `(batch, heads, tokens, head_dim)`.
    """
    coder, parts = Residuals(), []
    run = _Run(guesses, begin, tensors[0].shape)
    for keys, values in zip(tensors[0::2], tensors[1::2], strict=True):
        for i, guess, add in run.blocks():
            block = (values if i >= guesses.n_heads else keys)[:, i % guesses.n_heads]
            words = np.ascontiguousarray(block).reshape(guess.shape)
            exact = floats(words)
            parts.append(coder.encode(words, exact, guess))
            add(exact)
    n_bytes = 2 * sum(tensor.size for tensor in tensors)
    parts.append(bytes(max(0, -(-n_bytes // MAX_EXPANSION) - sum(map(len, parts)))))
    return b"".join(parts)


def decode(guesses: GuessSet, begin: int, payload: Bytes, spec: TensorSpec) -> list[Words]:
    """The inverse of `encode`.

    Args:
        guesses: as the encoder's.
        begin: as the encoder's.
        payload: what `encode` made.
        spec: of each tensor's run.

    Raises:
        IntegrityError: the payload is damaged.
    """
    heads, dim = guesses.n_heads, guesses.head_dim
    n_blocks = 2 * heads * len(guesses.layers)
    if len(payload) < n_blocks * least_bytes(dim):
        raise damaged(ID, f"{n_blocks} blocks", f"{len(payload)} bytes")
    coder = Residuals()
    tensors = [np.empty(spec.shape, np.uint16) for _ in range(2 * len(guesses.layers))]
    run = _Run(guesses, begin, spec.shape)
    for keys, values in zip(tensors[0::2], tensors[1::2], strict=True):
        for i, guess, add in run.blocks():
            words, n_bytes = coder.decode(payload, guess)
            payload = payload[n_bytes:]
            block = (values if i >= heads else keys)[:, i % heads]
            block[:] = words.reshape(block.shape)
            add(floats(words))
    if payload.any():
        raise damaged(ID, "nothing but zeros after the last block", f"{len(payload)} bytes")
    return tensors


def params_of(predictor: Predictor, i: int, begin: int) -> dict[str, Any]:
    """What a file says beside the payloads: the predictor, which of its sets, and where the first token stands."""
    return {"predictor": predictor.digest, "set": i, "begin": begin}


def told_of(
    params: Mapping[str, Any], names: Sequence[str], spec: TensorSpec, predictor: Callable[[str], Predictor]
) -> tuple[GuessSet, int]:
    """The inverse of `params_of`, of values that are not trusted.

    Args:
        params: what the file says.
        names: the tensors that it says it of.
        spec: of each of them.
        predictor: from a digest to the predictor.

    Raises:
        CalibrationError: the predictor is not there, or has no such set.
        IntegrityError: they are not what `params_of` makes.
    """
    if params.keys() != {"predictor", "set", "begin"} or not all(
        type(params[name]) is kind for name, kind in (("predictor", str), ("set", int), ("begin", int))
    ):
        raise damaged(ID, "a predictor, one of its sets and a place", dict(params))
    sets, i, begin = predictor(params["predictor"]).sets, params["set"], params["begin"]
    if not 0 <= i < len(sets) or sets[i].names() != tuple(names):
        raise CalibrationError(
            f"{ID} codec",
            expected=f"a set of {len(names)} tensors in predictor {params['predictor']:.24}…",
            found=f"set {i} of {len(sets)}, of other tensors",
            do="use the predictor that the file names",
        )
    if begin < 0 or not takes(sets[i], [spec], [begin]):
        raise damaged(ID, f"bf16 tensors of {sets[i].n_heads} heads of {sets[i].head_dim}", f"{spec} at {begin}")
    return sets[i], begin


@final
class _Run:
    """A run of tokens, guessed layer after layer: what has been seen of it so far."""

    def __init__(self, guesses: GuessSet, begin: int, shape: tuple[int, ...]) -> None:
        self._set, self._rows = guesses, shape[0] * shape[2]
        self._turns: list[tuple[Turned, Turned]] = []
        for turn in guesses.turns:
            cos, sin = (np.tile(table, (shape[0], 1)) for table in turn.table(begin, begin + shape[2]))
            self._turns.append((partial(turn.turned, cos=cos, sin=sin), partial(turn.turned, cos=cos, sin=-sin)))
        self._layers = iter(guesses.guesses)
        # Large arrays are made once: the system takes its time to hand out fresh memory.
        first, second = (np.empty((self._rows, guesses.width), np.float32) for _ in range(2))
        self._totals = first, second
        reach = max(len(guess.of_before) for guess in guesses.guesses)
        self._seen: deque[Floats] = deque(maxlen=max(1, reach))

    def blocks(self) -> Iterator[tuple[int, Floats, Callable[[Floats], None]]]:
        """Of each block of the next layer its number, the guess, and what to call with its values."""
        layer, dim = next(self._layers), self._set.head_dim
        total = self._told_by_layers_before(layer)
        own = self._own()
        there, back = self._turns[layer.turn] if layer.turn >= 0 else (_as_it_is, _as_it_is)
        for i, within in enumerate(layer.of_within):
            part = slice(i * dim, (i + 1) * dim)
            is_key = i < self._set.n_heads
            guess = layer.guess(total[:, part] + own[:, : i * dim] @ within, part)
            # `add` turns values back before they tell of others, as guesses are of keys turned back.
            add = partial(_add, layer, part, own, back if is_key else _as_it_is)
            yield i, there(guess) if is_key else guess, add
        self._seen.appendleft(own)

    def _own(self) -> Floats:
        """An array for the features of the next layer: that of the one that is too far back now."""
        if len(self._seen) == self._seen.maxlen:
            return self._seen.pop()
        return np.empty((self._rows, self._set.width), np.float32)

    def _told_by_layers_before(self, layer: LayerGuess) -> Floats:
        total, more = self._totals
        total.fill(0)
        for i, (features, coefficients) in enumerate(zip(self._seen, layer.of_before, strict=False)):
            np.matmul(features, coefficients, out=more if i else total)
            if i:
                total += more
        return total


def _add(layer: LayerGuess, part: slice, own: Floats, back: Turned, exact: Floats) -> None:
    layer.features(back(exact), part, own[:, part])


def _as_it_is(values: Floats) -> Floats:
    return values
