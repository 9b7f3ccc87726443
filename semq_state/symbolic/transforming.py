"""The transform codec on a state: which layers it takes, and what it is told of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from semq_state.calibration import Calibration, LayerSet
from semq_state.codecs import transform
from semq_state.codecs.symbolic import Symbolic, damaged
from semq_state.codecs.transform import Tokens, Transform
from semq_state.content import DTYPES, spec_of
from semq_state.errors import CalibrationError
from semq_state.symbolic.encoding import Decode, Encode
from semq_state.symbolic.groups import Group, Stack
from semq_state.symbolic.targets import Target

Tensors = Mapping[str, torch.Tensor]

_OWN = ("calibration", "set", "begin", "padding")  # parameters that stand beside the codec's
_IDS = "generation.input_ids"
_FURTHEST = 1 << 40


def stacks_of(layers: LayerSet, targets: Mapping[str, Target], tensors: Tensors) -> tuple[Stack, ...]:
    """Keys and values of a layer set as two stacks; none where the state has not all of them, alike."""
    by_kind = []
    for kind, dim in (("keys", layers.key_dim), ("values", layers.value_dim)):
        names = tuple(f"layers.{i}.{kind}" for i in layers.layers)
        if not all(name in targets for name in names):
            return ()
        specs = {spec_of(tensors[name]) for name in names}
        places = {(targets[name].begin, targets[name].ends) for name in names}
        shape = tensors[names[0]].shape
        if len(specs) != 1 or len(places) != 1 or len(shape) != 4 or (shape[1], shape[3]) != (layers.n_heads, dim):
            return ()
        by_kind.append(Stack(kind, names, specs.pop()))
    keys, values = by_kind
    return (keys, values) if keys.spec.shape[:3] == values.spec.shape[:3] else ()


def coder(
    codec: Transform, i: int, stacks: Sequence[Stack], tokens: Tokens, begin: int, padding: Sequence[int]
) -> tuple[Encode, Decode]:
    """`encode` and `decode` of layer set `i`."""
    layers = codec.calibration.sets[i]
    own = {"calibration": codec.calibration.digest, "set": i, "begin": begin, "padding": list(padding)}

    def encode(bodies: list[torch.Tensor]) -> tuple[Symbolic, torch.Tensor | None]:
        made = codec.encode(layers, bodies[0], bodies[1], tokens)
        beyond = transform.clipped(layers, made, tokens)
        return Symbolic(made.symbols, made.exact, {**made.params, **own}), beyond

    return encode, partial(_decode, layers, tokens, DTYPES[stacks[0].spec.dtype])


def decoder(group: Group, calibration: Calibration, exact: Tensors, n_cached: int) -> Decode:
    """`decode` of a group that a file told.

    Raises:
        IntegrityError: its parameters are not what `coder` makes.
        CalibrationError: the calibration has no such layers.
    """
    told, begin, padding = (group.params.get(name) for name in _OWN[1:])
    if type(told) is not int or not 0 <= told < len(calibration.sets) or len(group.stacks) != 2:
        raise CalibrationError(
            "transform codec",
            expected=f"one of the {len(calibration.sets)} layer sets of {calibration.digest:.24}…",
            found=repr(told)[:80],
            do="use the calibration that the file names",
        )
    layers, (keys, values) = calibration.sets[told], group.stacks
    batch = keys.spec.shape[0]
    shapes = [(batch, layers.n_heads, keys.spec.n_tokens, dim) for dim in (layers.key_dim, layers.value_dim)]
    found = [stack.spec.shape for stack in group.stacks]
    n_layers = {len(stack.names) for stack in group.stacks}
    if found != shapes or n_layers != {len(layers.layers)} or keys.spec.dtype != values.spec.dtype:
        raise damaged(Transform.id, f"keys and values of {len(layers.layers)} layers, {shapes}", f"{found}")
    if (
        type(begin) is not int
        or type(padding) is not list
        or len(padding) != batch
        or not _are_places(begin, *padding)
    ):
        raise damaged(Transform.id, f"a place and the padding of {batch} rows", [begin, padding])
    tokens = tokens_of(calibration, exact.get(_IDS), n_cached, begin, padding, (group.start, group.stop))
    return partial(_decode, layers, tokens, DTYPES[keys.spec.dtype])


def tokens_of(
    calibration: Calibration,
    ids: torch.Tensor | None,
    n_cached: int,
    begin: int,
    padding: Sequence[int],
    span: tuple[int, int],
    n_after: int = 0,
) -> Tokens:
    """What the transform is told of the tokens of a span.

    Args:
        calibration: for the features of the ids.
        ids: `(batch, seq)`, the tokens of the sequence from its first; their features are zeros where the cache
            holds other tokens too, or more.
        n_cached: tokens of the sequence that the cache holds.
        begin: of the first token of the tensors, its place in the sequence.
        padding: of each row how many tokens of the sequence, at its begin, are padding.
        span: the coded tokens, counted from the first of the tensors.
        n_after: how many follow the last of them.
    """
    start, stop = span
    at = begin + torch.arange(start, stop)
    positions = at - torch.tensor(padding, dtype=torch.int64)[:, None]
    n_now, n_before = calibration.now.shape[1], calibration.before.shape[1]
    features = torch.zeros(len(padding), stop - start, n_now + n_before)
    known = ids is not None and ids.dtype == torch.int64 and ids.ndim == 2 and len(ids) == len(padding)
    if ids is not None and known and n_cached <= ids.shape[1] and begin + stop <= ids.shape[1]:
        ids = ids.cpu()
        features[..., :n_now] = _looked_up(calibration.now, ids[:, at])
        features[..., n_now:] = _looked_up(calibration.before, ids[:, (at - 1).clamp_min(0)])
        features[:, at == 0, n_now:] = 0.0
    return Tokens(features, positions, n_after)


def _looked_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table; zeros for ids that it does not have."""
    known = (ids >= 0) & (ids < len(table))
    return table[ids.where(known, 0)].float() * known[..., None]


def params_of_codec(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are the codec's own."""
    return {name: value for name, value in params.items() if name not in _OWN}


def _decode(
    layers: LayerSet,
    tokens: Tokens,
    dtype: torch.dtype,
    symbolic: Symbolic,
    shapes: Sequence[tuple[int, ...]],
) -> list[torch.Tensor]:
    own = Symbolic(symbolic.symbols, symbolic.exact, params_of_codec(symbolic.params))
    return list(transform.decode(layers, own, tokens, dtype))


def _are_places(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < _FURTHEST for value in values)
