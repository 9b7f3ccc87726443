"""A snapshot from what a file tells: the inverse of `Snapshot.structure` and `Snapshot.tensors`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from semq_state.errors import IncompleteStateError
from semq_state.provenance import Provenance
from semq_state.snapshot.cache import CacheState, LayerState, Tensors
from semq_state.snapshot.generation import CACHE_ARGUMENT, GenerationState, ProcessorState
from semq_state.snapshot.hidden import ENCODER, MAX_DOCUMENT, SEQUENCE, HiddenRows
from semq_state.snapshot.trace import NAMES as TRACED
from semq_state.snapshot.trace import Trace
from semq_state.snapshot.whole import Checkpoint, Snapshot

MAX_PARTS = 4
"""How deep caches may be made of caches."""

_T = TypeVar("_T")


def assemble(
    structure: Mapping[str, Any],
    tensors: Tensors,
    provenance: Provenance,
    digests: Mapping[str, tuple[str, ...]],
) -> Snapshot:
    """The inverse of `Snapshot.structure` and `Snapshot.tensors`.

    Raises:
        IncompleteStateError: a tensor that the structure names is missing, or one too many is there.
        KeyError, TypeError: the structure itself is malformed.
    """
    left = _Left(dict(tensors))
    cache = left.cache("", _field(structure, "cache", dict))
    generation = _generation(left, _field(structure, "generation", dict))
    checkpoints = tuple(
        Checkpoint(
            _count(table, "n_tokens"),
            left.cache(f"checkpoints.{i}.", _field(table, "cache", dict)),
            left.all(f"checkpoints.{i}.rng", table, "rng"),
            left.all(f"checkpoints.{i}.attributes", table, "attributes"),
        )
        for i, table in enumerate(_optional(structure, "checkpoints", list))
    )
    n_rows = int(generation.input_ids.shape[0])
    trace = _trace(left, _field(structure, "trace", dict), n_rows) if "trace" in structure else None
    streams = _optional(structure, "hidden", dict).items()
    # Without tokens there is no batch whose rows documents could be; a shard of a record is so.
    n_documents = n_rows if generation.input_ids.numel() else MAX_DOCUMENT
    hidden = {name: _hidden(left, name, table, n_documents) for name, table in streams}
    if left.tensors:
        raise IncompleteStateError(
            f"{', '.join(sorted(left.tensors)):.200}",
            expected="only tensors that the structure names",
            found="these besides",
            do="the file was put together wrongly; take the snapshot again",
        )
    snapshot = Snapshot(cache, generation, provenance, digests, checkpoints, trace=trace, hidden=hidden)
    if snapshot.structure() != structure:
        raise TypeError("fields besides, or names out of order")
    return snapshot


def _generation(left: _Left, state: Mapping[str, Any]) -> GenerationState:
    return GenerationState(
        input_ids=left.one("generation.input_ids"),
        prompt_length=_count(state, "prompt_length"),
        n_cached=_count(state, "n_cached"),
        finished=left.one("generation.finished"),
        logits=left.one("generation.logits") if _field(state, "has_logits", bool) else None,
        step_inputs=left.all("generation.inputs", state, "inputs"),
        step_values=_field(state, "values", dict),
        rng=left.all("generation.rng", state, "rng"),
        config=_field(state, "config", dict),
        processors=tuple(
            ProcessorState(
                _field(p, "role", str),
                _field(p, "name", str),
                left.all(f"generation.processors.{i}", p, "tensors"),
                _field(p, "meta", dict),
            )
            for i, p in enumerate(_field(state, "processors", list))
        ),
        search=left.all("generation.search", state, "search") if "search" in state else {},
        companions={
            name: left.cache(f"generation.companions.{name}.", table)
            for name, table in _optional(state, "companions", dict).items()
        },
        attributes=left.all("generation.attributes", state, "attributes") if "attributes" in state else {},
        cache_argument=_optional(state, "cache_argument", str) or CACHE_ARGUMENT,
        generator=_optional(state, "generator", str),
    )


def _trace(left: _Left, table: Mapping[str, Any], n_rows: int) -> Trace:
    found = {name: left.one(f"trace.{name}") for name in TRACED}
    rng = left.all("trace.rng", table, "rng")
    trace = Trace(begin=_count(table, "begin"), rule=_field(table, "rule", dict), rng=rng, **found)
    # Structures are put together from nothing first.
    if any(tensor.numel() for tensor in found.values()):
        trace.check(n_rows)
    return trace


def _hidden(left: _Left, name: str, table: Any, n_documents: int) -> HiddenRows:
    if name not in (SEQUENCE, ENCODER) or type(table) is not dict:
        raise TypeError(f"a stream of hidden states is {name!r:.80}, {reprlib.repr(table)}")
    prefix = f"hidden.{name}"
    found = HiddenRows(
        rows=left.one(f"{prefix}.rows"),
        token_ids=left.one(f"{prefix}.token_ids"),
        states=left.all(f"{prefix}.states", table, "states"),
        tokens=_field(table, "tokens", str),
        pool=_field(table, "pool", str),
    )
    # Structures are put together from nothing first.
    if any(tensor.numel() for tensor in (found.rows, found.token_ids, *found.states.values())):
        found.check(prefix, n_documents)
    return found


@dataclass
class _Left:
    """The tensors that nothing has claimed yet."""

    tensors: dict[str, torch.Tensor]

    def one(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise IncompleteStateError(
                f"{name:.80}",
                expected="a tensor of this name",
                found="none",
                do="the state cannot go on without it; take the snapshot again",
            )
        return self.tensors.pop(name)

    def all(self, prefix: str, table: Mapping[str, Any], field: str) -> dict[str, torch.Tensor]:
        names = _field(table, field, list)
        if not all(type(each) is str for each in names):
            raise TypeError(f"`{field}` is {reprlib.repr(names)}, not a list of names")
        return {each: self.one(f"{prefix}.{each}") for each in names}

    def cache(self, prefix: str, table: Any, depth: int = 0) -> CacheState:
        if type(table) is not dict or depth > MAX_PARTS:
            raise TypeError(f"a cache is {reprlib.repr(table)}")
        layers = tuple(
            LayerState(
                _field(x, "family", str), self.all(f"{prefix}layers.{i}", x, "tensors"), _field(x, "meta", dict)
            )
            for i, x in enumerate(_field(table, "layers", list))
        )
        parts = {
            name: self.cache(f"{prefix}{name}.", part, depth + 1)
            for name, part in _optional(table, "parts", dict).items()
        }
        return CacheState(_field(table, "kind", str), layers, _field(table, "meta", dict), parts)


def _count(table: Mapping[str, Any], name: str) -> int:
    if (value := _field(table, name, int)) < 0:
        raise TypeError(f"`{name}` is {value}, not a count")
    return value


def _optional(table: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    return _field(table, name, kind) if name in table else kind()


def _field(table: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A field of a structure that a file told, with its type proved."""
    value = table[name]
    if type(value) is not kind:
        raise TypeError(f"`{name}` is {reprlib.repr(value)}, not {kind.__name__}")
    return value
