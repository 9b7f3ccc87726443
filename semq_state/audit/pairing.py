"""Which tensors of two states belong together, and at which tokens they overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.audit.rows import dim_differences
from semq_state.errors import Difference, ModelMismatchError
from semq_state.snapshot import CacheState, LayerState, Snapshot

VECTOR_KINDS = ("keys", "values", "index", "latent", "convolution", "recurrent")
"""Kinds of state that are vectors along the last axis. What else a layer holds is compared for equality."""

ENCODER = "encoder_outputs"


@dataclass(frozen=True, eq=False)
class Located:
    """A tensor of vectors, and where it stands.

    Args:
        where: the layer, `layers.3` or `self.layers.3`, or `generation`.
        name: its name there.
        kind: as `semq_state.layouts` says, or `logits` or `encoder`.
        layer: the number of its layer within its cache; None outside of a cache.
        tensor: its vectors along the last axis.
        token_axis: the axis of its tokens, not negative; None where it has none.
        offset: absolute position of its first token.
        of_sequence: whether its tokens are the sequence's.
        batch_axis: the axis of rows; None where all share it.
    """

    where: str
    name: str
    kind: str
    layer: int | None
    tensor: torch.Tensor
    token_axis: int | None = None
    offset: int = 0
    of_sequence: bool = False
    batch_axis: int | None = None

    @property
    def key(self) -> str:
        return f"{self.where}.{self.name}"

    @property
    def shape_apart_from_tokens(self) -> list[int]:
        return [n for axis, n in enumerate(self.tensor.shape) if axis != self.token_axis]

    @property
    def positions(self) -> range:
        """Absolute positions of its tokens; one, 0, where it has no token axis."""
        n_tokens = 1 if self.token_axis is None else self.tensor.shape[self.token_axis]
        return range(self.offset, self.offset + n_tokens)


def vectors_of(snapshot: Snapshot) -> dict[str, Located]:
    """Every tensor of vectors by the name that a report gives it, in the order of the file."""
    state = snapshot.generation
    found = list(_of_cache(snapshot.cache, "", False))
    for name, companion in sorted(state.companions.items()):
        found += _of_cache(companion, f"generation.companions.{name}.", False)
    for name, tensor in sorted(state.step_inputs.items()):
        if name.startswith(ENCODER) and tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1]:
            axis = tensor.ndim - 2 if tensor.ndim > 2 else None
            found.append(Located("generation", f"inputs.{name}", "encoder", None, tensor, axis))
    if state.logits is not None and state.logits.ndim > 1:
        found.append(Located("generation", "logits", "logits", None, state.logits))
    return {each.key: each for each in found}


def _of_cache(cache: CacheState, prefix: str, is_fixed: bool) -> Iterator[Located]:
    for i, layer in enumerate(cache.layers):
        yield from _of_layer(layer, f"{prefix}layers.{i}", i, is_fixed or layer.is_fixed)
    for name, part in sorted(cache.parts.items()):
        yield from _of_cache(part, f"{prefix}{name}.", is_fixed or not cache.grows(name))


def _of_layer(layer: LayerState, where: str, number: int, is_fixed: bool) -> Iterator[Located]:
    for name, tensor in sorted(layer.tensors.items()):
        layout = layer.layout.of(name)
        is_vectors = layout.kind in VECTOR_KINDS and tensor.is_floating_point() and tensor.ndim > 1
        if not is_vectors or not tensor.shape[-1]:
            continue
        axis = layout.token_axis
        if axis is None or axis % tensor.ndim == tensor.ndim - 1:
            yield Located(where, name, layout.kind, number, tensor)
            continue
        axis %= tensor.ndim
        n_tokens, seen = tensor.shape[axis], layer.meta.get("n_seen")
        # A window holds the last tokens, and how many went before.
        ends = name in ("keys", "values") and type(seen) is int and seen >= n_tokens and not is_fixed
        offset = seen - n_tokens if ends and isinstance(seen, int) else 0
        yield Located(where, name, layout.kind, number, tensor, axis, offset, not is_fixed, layout.batch_axis)


def without_padding(
    located: Located, part: torch.Tensor, padding: torch.Tensor, start: int
) -> tuple[torch.Tensor, int]:
    """A part of a tensor with zeros where there is padding, whose states may be anything.

    Args:
        located: where the tensor stands.
        part: its tokens from position `start` on.
        padding: `(batch, seq)`.
        start: absolute position.

    Returns:
        The part, and how many of its vectors are padding.
    """
    if not located.of_sequence or located.token_axis is None or located.batch_axis is None:
        return part, 0
    n_tokens = part.shape[located.token_axis]
    rows = padding[:, start : start + n_tokens]
    if not rows.any():
        return part, 0
    shape = [1] * part.ndim
    shape[located.batch_axis], shape[located.token_axis] = rows.shape[0], n_tokens
    if rows.shape[1] < n_tokens:
        # What came after the mask was chosen, and is none.
        rows = torch.nn.functional.pad(rows, (0, n_tokens - rows.shape[1]))
    if located.batch_axis > located.token_axis:
        rows = rows.T
    n_each = part[..., 0].numel() // (shape[located.batch_axis] * n_tokens)
    return part.masked_fill(rows.reshape(shape).to(part.device), 0), int(rows.sum()) * n_each


def check_same_shape(a: Snapshot, b: Snapshot) -> None:
    """Refuses states that have no layer, head or row in common by which to compare them.

    Raises:
        ModelMismatchError: with every such difference.
    """
    found = list(_shape_differences(a, b))
    if found:
        raise ModelMismatchError(found, do="only states of one shape, whatever their lengths, can be compared")


def _shape_differences(a: Snapshot, b: Snapshot) -> Iterator[Difference]:
    yield from _unequal("batch", a.batch_size, b.batch_size)
    yield from _cache_differences(a.cache, b.cache, "cache")
    ours, theirs = a.generation.companions, b.generation.companions
    for name in sorted({*ours} & {*theirs}):
        yield from _cache_differences(ours[name], theirs[name], f"companions.{name}")
    left, right = vectors_of(a), vectors_of(b)
    for key in left:
        if key in right:
            yield from _unequal(
                f"{key}, shape apart from tokens",
                left[key].shape_apart_from_tokens,
                right[key].shape_apart_from_tokens,
            )
    for stream in sorted({*a.hidden} & {*b.hidden}):
        yield from dim_differences(f"hidden.{stream}", a.hidden[stream].states, b.hidden[stream].states)


def _cache_differences(a: CacheState, b: CacheState, where: str) -> Iterator[Difference]:
    yield from _unequal(f"{where}, kind", a.kind, b.kind)
    yield from _unequal(f"{where}, layers", len(a.layers), len(b.layers))
    yield from _unequal(f"{where}, parts", sorted(a.parts), sorted(b.parts))
    for i, (ours, theirs) in enumerate(zip(a.layers, b.layers, strict=False)):
        yield from _unequal(f"{where}, layer {i}, family", ours.family, theirs.family)
        # A layer in which no token is yet has no tensors.
        if ours.tensors and theirs.tensors:
            yield from _unequal(f"{where}, layer {i}, tensors", sorted(ours.tensors), sorted(theirs.tensors))
    for name in sorted({*a.parts} & {*b.parts}):
        yield from _cache_differences(a.parts[name], b.parts[name], f"{where}.{name}")


def _unequal(name: str, a: Any, b: Any) -> Iterator[Difference]:
    if a != b:
        yield Difference(name, str(a), str(b))


def structure_differences(a: Snapshot, b: Snapshot) -> tuple[Difference, ...]:
    """Everything in which two states differ that is not a tensor; of long values only their places. Which sites
    have hidden states is left out: each is compared, or missing."""
    ours, theirs = ({name: value for name, value in each.structure().items() if name != "trace"} for each in (a, b))
    for said in (ours, theirs):
        streams = said.get("hidden", {}).items()
        said["hidden"] = {s: {n: x for n, x in each.items() if n != "states"} for s, each in streams}
    return tuple(value_differences("", ours, theirs))


def value_differences(name: str, a: Any, b: Any) -> Iterator[Difference]:
    """In what two plain values differ, each place by its path below `name`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}, key=str):
            path = f"{name}.{key}" if name else str(key)
            yield from value_differences(path, a.get(key, _NOTHING), b.get(key, _NOTHING))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            yield from value_differences(f"{name}.{i}", ours, theirs)
    elif a != b or type(a) is not type(b):
        yield Difference(name, _short(a), _short(b))


class _Nothing:
    def __str__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
