"""A Transformer's state between two tokens, as frozen values that know neither models nor files."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from semq_state import content
from semq_state.errors import IncompleteStateError
from semq_state.provenance import Provenance

Tensors = Mapping[str, torch.Tensor]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one cache layer holds.

    Args:
        family: id of the cache family that can rebuild it, `dynamic` say.
        tensors: name to tensor; keys and values are `(batch, kv_heads, seq, head_dim)`.
        meta: the scalars beside them (window, counters).
    """

    family: str
    tensors: Tensors
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CacheState:
    """A whole cache: its kind, scalars and layers, first layer first."""

    kind: str
    layers: tuple[LayerState, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Raw size of all cache tensors, the figure that file sizes are compared with."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors.values())


@dataclass(frozen=True, eq=False)
class ProcessorState:
    """What a stateful logits processor or stopping criterion remembers.

    Args:
        role: `logits` or `stopping`.
        name: class name, compared on restore and never used to look anything up.
        tensors: the tensors of its `state_dict()`.
        meta: the other values of its `state_dict()`.
    """

    role: str
    name: str
    tensors: Tensors = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GenerationState:
    """Everything but the cache that the next step of a generation needs.

    Args:
        input_ids: tokens so far, prompt included, `(batch, seq)`.
        prompt_length: how many of them were the prompt; processors count from there.
        n_cached: how many tokens of each row the cache holds.
        finished: rows that have ended, `(batch,)` bool.
        logits: raw logits of the last step, `(batch, vocab)`, or None.
        step_inputs: the other tensors that the forward pass takes (attention mask, positions …).
        step_values: its other arguments (`use_cache` …).
        rng: device name to torch's random state, `cpu` and `cuda:0` say.
        config: the resolved generation configuration; empty for a hand-written loop.
        processors: state of stateful logits processors and stopping criteria.
    """

    input_ids: torch.Tensor
    prompt_length: int
    n_cached: int
    finished: torch.Tensor
    logits: torch.Tensor | None = None
    step_inputs: Tensors = field(default_factory=dict)
    step_values: Mapping[str, Any] = field(default_factory=dict)
    rng: Tensors = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    processors: tuple[ProcessorState, ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a model after its last finished token, with its origin.

    Args:
        cache: the cache's tensors and scalars.
        generation: tokens, masks, random state and settings.
        provenance: the model that made it.
        known_digests: tensor name to the digests of its chunks, where a file has told and proved them.
    """

    cache: CacheState
    generation: GenerationState
    provenance: Provenance
    known_digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def state_id(self) -> str:
        """`sha256:…` of everything that this state is; the same wherever and however it is saved."""
        tensors = self.tensors()
        digests = self.known_digests or content.all_digests(tensors)
        whole = content.content_digest(self.structure(), dict(content.specs_of(tensors)), digests)
        return content.state_id(whole, self.provenance.identity())

    @property
    def n_tokens(self) -> int:
        """Tokens so far in each row, prompt included."""
        return int(self.generation.input_ids.shape[-1])

    @property
    def n_new_tokens(self) -> int:
        """Tokens generated since the prompt, in each row."""
        return self.n_tokens - self.generation.prompt_length

    @property
    def batch_size(self) -> int:
        return int(self.generation.input_ids.shape[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state under its name in a file: layer by layer, the names of each in order."""
        state = self.generation
        named: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(self.cache.layers):
            named |= {f"layers.{i}.{name}": t for name, t in sorted(layer.tensors.items())}
        named["generation.input_ids"] = state.input_ids
        named["generation.finished"] = state.finished
        if state.logits is not None:
            named["generation.logits"] = state.logits
        named |= {f"generation.inputs.{name}": t for name, t in sorted(state.step_inputs.items())}
        named |= {f"generation.rng.{name}": t for name, t in sorted(state.rng.items())}
        for i, processor in enumerate(state.processors):
            named |= {f"generation.processors.{i}.{k}": t for k, t in sorted(processor.tensors.items())}
        return named

    def structure(self) -> dict[str, Any]:
        """Everything of the state that is not a tensor; with `tensors()` it is the whole state."""
        state = self.generation
        return {
            "cache": {
                "kind": self.cache.kind,
                "meta": dict(self.cache.meta),
                "layers": [
                    {"family": x.family, "meta": dict(x.meta), "tensors": sorted(x.tensors)}
                    for x in self.cache.layers
                ],
            },
            "generation": {
                "prompt_length": state.prompt_length,
                "n_cached": state.n_cached,
                "has_logits": state.logits is not None,
                "inputs": sorted(state.step_inputs),
                "values": dict(state.step_values),
                "rng": sorted(state.rng),
                "config": dict(state.config),
                "processors": [
                    {
                        "role": p.role,
                        "name": p.name,
                        "meta": dict(p.meta),
                        "tensors": sorted(p.tensors),
                    }
                    for p in state.processors
                ],
            },
        }


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
    left = dict(tensors)
    one, many = partial(_take, left), partial(_take_all, left)
    cache, state = _field(structure, "cache", dict), _field(structure, "generation", dict)
    layers = tuple(
        LayerState(_field(x, "family", str), many(f"layers.{i}", x, "tensors"), _field(x, "meta", dict))
        for i, x in enumerate(_field(cache, "layers", list))
    )
    generation = GenerationState(
        input_ids=one("generation.input_ids"),
        prompt_length=_count(state, "prompt_length"),
        n_cached=_count(state, "n_cached"),
        finished=one("generation.finished"),
        logits=one("generation.logits") if _field(state, "has_logits", bool) else None,
        step_inputs=many("generation.inputs", state, "inputs"),
        step_values=_field(state, "values", dict),
        rng=many("generation.rng", state, "rng"),
        config=_field(state, "config", dict),
        processors=tuple(
            ProcessorState(
                _field(p, "role", str),
                _field(p, "name", str),
                many(f"generation.processors.{i}", p, "tensors"),
                _field(p, "meta", dict),
            )
            for i, p in enumerate(_field(state, "processors", list))
        ),
    )
    if left:
        raise IncompleteStateError(
            f"{', '.join(sorted(left)):.200}",
            expected="only tensors that the structure names",
            found="these besides",
            do="the file was put together wrongly; take the snapshot again",
        )
    whole = CacheState(_field(cache, "kind", str), layers, _field(cache, "meta", dict))
    snapshot = Snapshot(whole, generation, provenance, digests)
    if snapshot.structure() != structure:
        raise TypeError("fields besides, or names out of order")
    return snapshot


def _take(left: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in left:
        raise IncompleteStateError(
            f"{name:.80}",
            expected="a tensor of this name",
            found="none",
            do="the state cannot go on without it; take the snapshot again",
        )
    return left.pop(name)


def _take_all(
    left: dict[str, torch.Tensor], prefix: str, table: Mapping[str, Any], name: str
) -> dict[str, torch.Tensor]:
    names = _field(table, name, list)
    if not all(type(each) is str for each in names):
        raise TypeError(f"`{name}` is {reprlib.repr(names)}, not a list of names")
    return {each: _take(left, f"{prefix}.{each}") for each in names}


def _count(table: Mapping[str, Any], name: str) -> int:
    if (value := _field(table, name, int)) < 0:
        raise TypeError(f"`{name}` is {value}, not a count")
    return value


def _field(table: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A field of a structure that a file told, with its type proved."""
    value = table[name]
    if type(value) is not kind:
        raise TypeError(f"`{name}` is {reprlib.repr(value)}, not {kind.__name__}")
    return value
