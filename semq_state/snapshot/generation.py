"""Everything but the cache that the next step of a generation needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.snapshot.cache import CacheState, Tensors

CACHE_ARGUMENT = "past_key_values"


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
        input_ids: tokens so far, prompt included, `(batch, seq)`; a decoder's own where there is an encoder, and
            the running beams, `(batch * num_beams, seq)`, of a beam search.
        prompt_length: how many of them were the prompt; processors count from there.
        n_cached: how many tokens of each row the cache holds.
        finished: rows that have ended, `(batch,)` bool.
        logits: raw logits of the last step, `(batch, vocab)`, or None.
        step_inputs: the other tensors that the forward pass takes (attention mask, positions, encoder outputs …).
        step_values: its other arguments (`use_cache` …), and how tensors nest in them.
        rng: device name to torch's random state, `cpu` and `cuda:0` say.
        config: the resolved generation configuration; empty for a hand-written loop.
        processors: state of stateful logits processors and stopping criteria.
        search: a beam search's scores and hypotheses; empty for any other way of generating.
        companions: the caches of those that decode along: `guidance`, `assistant`.
        attributes: tensors that the model's modules keep of this run, by path (`model.rope_deltas`).
        cache_argument: the name under which the model takes its cache.
        generator: path of the part of the model that generates, where it is not the whole (`language_model`).
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
    search: Tensors = field(default_factory=dict)
    companions: Mapping[str, CacheState] = field(default_factory=dict)
    attributes: Tensors = field(default_factory=dict)
    cache_argument: str = CACHE_ARGUMENT
    generator: str = ""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its name in a file."""
        named = {"generation.input_ids": self.input_ids, "generation.finished": self.finished}
        if self.logits is not None:
            named["generation.logits"] = self.logits
        named |= {f"generation.inputs.{name}": t for name, t in sorted(self.step_inputs.items())}
        named |= {f"generation.rng.{name}": t for name, t in sorted(self.rng.items())}
        for i, processor in enumerate(self.processors):
            named |= {f"generation.processors.{i}.{k}": t for k, t in sorted(processor.tensors.items())}
        named |= {f"generation.search.{name}": t for name, t in sorted(self.search.items())}
        for name, companion in sorted(self.companions.items()):
            named |= companion.tensors(f"generation.companions.{name}.")
        named |= {f"generation.attributes.{name}": t for name, t in sorted(self.attributes.items())}
        return named

    def structure(self) -> dict[str, Any]:
        """Everything that is not a tensor. What only some generations have is there only for them."""
        whole: dict[str, Any] = {
            "prompt_length": self.prompt_length,
            "n_cached": self.n_cached,
            "has_logits": self.logits is not None,
            "inputs": sorted(self.step_inputs),
            "values": dict(self.step_values),
            "rng": sorted(self.rng),
            "config": dict(self.config),
            "processors": [
                {"role": p.role, "name": p.name, "meta": dict(p.meta), "tensors": sorted(p.tensors)}
                for p in self.processors
            ],
        }
        if self.search:
            whole["search"] = sorted(self.search)
        if self.companions:
            whole["companions"] = {name: c.structure() for name, c in sorted(self.companions.items())}
        if self.attributes:
            whole["attributes"] = sorted(self.attributes)
        if self.cache_argument != CACHE_ARGUMENT:
            whole["cache_argument"] = self.cache_argument
        if self.generator:
            whole["generator"] = self.generator
        return whole
