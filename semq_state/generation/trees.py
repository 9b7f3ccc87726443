"""What a forward pass takes, as tensors by name and plain values, and back: encoder outputs, nested tuples …

A value without tensors stays as it is. Any other is described by a map that says what it was: a `tensor` by its
name (with the `order` of its axes in memory where that is not their own), a `list` or `tuple` of values, a `dict`
or one of transformers' `output`s as pairs in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import KVSharingDict
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from semq_state.errors import IncompleteStateError
from semq_state.provenance import plain

_PLAIN = (type(None), bool, int, float, str)


def take_apart(inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a step's inputs by name, and its plain values with the description of what nests.

    Raises:
        IncompleteStateError: an input is neither.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and not _order(value):
            tensors[name] = value
        else:
            values[name] = _described(value, name, tensors)
    return tensors, values


def put_together(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `take_apart`.

    Raises:
        IncompleteStateError: a description is malformed, or names a tensor that is not there.
    """
    used: set[str] = set()
    whole = {name: _built(value, name, tensors, used) for name, value in values.items()}
    alone = {name: t for name, t in tensors.items() if name not in used}
    for name in sorted(alone.keys() & whole.keys()):
        raise _malformed(whole[name], name)
    return {**alone, **whole}


def _described(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name, "order": order} if (order := _order(value)) else {"tensor": name}
    if isinstance(value, (ModelOutput, Mapping, KVSharingDict)):
        pairs = _pairs(value)
        if not all(isinstance(key, str) for key, _ in pairs):
            raise _unknown(value, name)
        word = "output" if isinstance(value, ModelOutput) else "dict" if isinstance(value, dict) else "sharing"
        return {word: [[key, _described(item, f"{name}.{key}", tensors)] for key, item in pairs]}
    if isinstance(value, (list, tuple)):
        items = [_described(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        if all(_is_plain(item) for item in items):
            return plain(items)
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise _unknown(value, name)


def _built(value: Any, name: str, tensors: Mapping[str, torch.Tensor], used: set[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"tensor", "order"}:
        return _ordered(_built({"tensor": value["tensor"]}, name, tensors, used), value["order"], name)
    if len(value) != 1:
        raise _malformed(value, name)
    ((word, content),) = value.items()
    if word == "tensor":
        if not isinstance(content, str) or content not in tensors:
            raise _malformed(value, name)
        used.add(content)
        return tensors[content]
    if not isinstance(content, list):
        raise _malformed(value, name)
    if word in ("list", "tuple"):
        items = [_built(item, name, tensors, used) for item in content]
        return tuple(items) if word == "tuple" else items
    if word not in ("dict", "output", "sharing") or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[0].isidentifier()
        for pair in content
    ):
        raise _malformed(value, name)
    fields = {key: _built(item, f"{name}.{key}", tensors, used) for key, item in content}
    if word == "dict":
        return fields
    if word == "sharing":
        return KVSharingDict(fields)
    output = BaseModelOutput()
    known = {field.name for field in dataclasses.fields(BaseModelOutput)}
    if any(key.startswith("_") or (hasattr(BaseModelOutput, key) and key not in known) for key in fields):
        # A field must not stand in for a method.
        raise _malformed(value, name)
    for key, item in fields.items():
        if item is None:
            setattr(output, key, None)
        else:
            output[key] = item
    return output


def _order(tensor: torch.Tensor) -> list[int]:
    """The axes from the widest stride to the narrowest, where that is not their own order.

    Values do not depend on it, but matrix products of a transposed tensor round otherwise.
    """
    if tensor.ndim < 2 or 0 in tensor.stride() or 0 in tensor.shape:
        return []
    order = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
    return [] if order == list(range(tensor.ndim)) else order


def _ordered(tensor: torch.Tensor, order: Any, name: str) -> torch.Tensor:
    """The inverse of `_order`: the same values, laid out so."""
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(tensor.ndim))):
        raise _malformed(order, name)
    inverse = [order.index(axis) for axis in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(inverse)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, ModelOutput) and dataclasses.is_dataclass(value):
        # Fields that are None are attributes all the same, and models read them.
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return list(value.items())


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list) and all(map(_is_plain, value)))


def _unknown(value: Any, name: str) -> IncompleteStateError:
    return IncompleteStateError(
        f"input {name!r} of the model",
        expected="tensors, plain values, or lists and maps of them",
        found=type(value).__name__,
        do="this input cannot be kept; generate without it",
    )


def _malformed(value: Any, name: str) -> IncompleteStateError:
    return IncompleteStateError(
        f"input {name!r} of the model",
        expected="a description of how tensors nest in it",
        found=f"{value!r:.80}",
        do="the file was put together wrongly; take the snapshot again",
    )
