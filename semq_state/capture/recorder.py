"""Follows one model through its `generate` calls and remembers the last finished token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES, MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from semq_state.caches import CacheMark, dump_cache, mark_cache, n_cached
from semq_state.errors import IncompleteStateError, SemqStateError, UnsupportedOperationError
from semq_state.generation import seams
from semq_state.generation.processors import Watch, dump_processors
from semq_state.generation.random import dump_rng
from semq_state.generation.rows import FollowedCriteria
from semq_state.generation.settings import check_config, dump_config
from semq_state.provenance import Provenance, plain
from semq_state.snapshot import GenerationState, ProcessorState, Snapshot

# The prompt's own inputs, which the first forward pass has used up, and what `stop_strings` reads.
_NOT_KEPT = {"inputs_embeds", *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "tokenizer"}


@dataclass(frozen=True)
class Step:
    """One finished token: references and marks only, nothing is copied while the model runs."""

    call: _Call
    input_ids: torch.Tensor
    finished: torch.Tensor
    logits: torch.Tensor
    inputs: Mapping[str, Any]
    cache: CacheMark
    rng: Mapping[str, torch.Tensor]
    processors: tuple[ProcessorState, ...]


class _Call:
    """What stays the same during one call of `generate`."""

    def __init__(self) -> None:
        self.prompt_length = 0
        self.config: Any = None
        self.refused: SemqStateError | None = None
        self.logits_processors: list[Any] = []
        self.stopping_criteria: list[Any] = []
        self.given: list[Any] = []
        self.watch = Watch(())
        self.pending: tuple[torch.Tensor, Mapping[str, Any]] | None = None

    def begin(self) -> None:
        self.watch = Watch([*self.logits_processors, *self.stopping_criteria])

    def processor_states(self) -> tuple[ProcessorState, ...]:
        return (
            *dump_processors("logits", self.logits_processors, self.given),
            *dump_processors("stopping", self.stopping_criteria, self.given),
        )


class Recorder:
    """The replacements for `generate`'s seams, and the last step that they saw.

    Args:
        model: the `PreTrainedModel` to follow.
        on_step: called after each finished token.
        tells: warn when a run cannot be kept; not where `on_step` finds that out itself.
    """

    def __init__(self, model: Any, on_step: Callable[[], None], *, tells: bool = True) -> None:
        self.last: Step | None = None
        self._model = model
        self._on_step = on_step
        self._tells = tells
        self._call = _Call()
        self._originals = {name: getattr(model, name) for name in self._names()}

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """What to put in front of the model's own methods."""
        return self._names()

    def _names(self) -> dict[str, Callable[..., Any]]:
        return {
            seams.LOGITS_PROCESSORS: self._logits_processors,
            seams.STOPPING_CRITERIA: self._stopping_criteria,
            seams.STEP_TAKEN: self._step_taken,
            seams.CANDIDATES: self._candidates,
        }

    def _logits_processors(self, **kwargs: Any) -> Any:
        processors = self._originals[seams.LOGITS_PROCESSORS](**kwargs)
        if kwargs["generation_config"].is_assistant:
            return processors
        self._call = _Call()
        self._call.prompt_length = int(kwargs["input_ids_seq_length"])
        self._call.config = kwargs["generation_config"]
        self._call.logits_processors = list(processors)
        self._call.given = list(kwargs.get("logits_processor") or ())
        return processors

    def _stopping_criteria(self, **kwargs: Any) -> Any:
        criteria = self._originals[seams.STOPPING_CRITERIA](**kwargs)
        if kwargs["generation_config"].is_assistant:
            return criteria
        self._call.stopping_criteria = list(criteria)
        self._call.given += kwargs.get("stopping_criteria") or ()
        self._call.begin()
        return FollowedCriteria(criteria, self._finished_token)

    def _step_taken(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        updated = self._originals[seams.STEP_TAKEN](outputs, model_kwargs, *args, **kwargs)
        logits = outputs.logits
        # A prefill may give the logits of every token; a view of the last would keep them all alive.
        last = logits[:, -1] if logits.shape[1] == 1 else logits[:, -1].clone()
        self._call.pending = last, dict(updated)
        return updated

    def _candidates(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse(
            UnsupportedOperationError(
                "assisted generation",
                expected="one token a step",
                found="an assistant or prompt look-up",
                do="generate without it; its candidates cannot be kept yet",
            )
        )
        return self._originals[seams.CANDIDATES](*args, **kwargs)

    def _refuse(self, error: SemqStateError) -> None:
        # The caller's generation goes on; it is told now, while that still helps, and `snapshot` refuses.
        self._call.refused = error
        if self._tells:
            warnings.warn(f"this run cannot be kept, it goes on all the same: {error}", stacklevel=2)

    def _finished_token(self, input_ids: torch.Tensor, ended: torch.Tensor) -> None:
        if not self._call.refused:
            try:
                self.last = self._step(self._call, input_ids, ended)
            except SemqStateError as error:
                self._refuse(error)
        self._on_step()

    def _step(self, call: _Call, input_ids: torch.Tensor, ended: torch.Tensor) -> Step:
        check_config(call.config)
        if call.pending is None:
            raise UnsupportedOperationError(
                "custom_generate",
                expected="a loop that prepares each step as transformers' own does",
                found="another",
                do="use sq.snapshot_of in a loop of your own",
            )
        logits, inputs = call.pending
        cache = next((inputs[name] for name in ALL_CACHE_NAMES if inputs.get(name) is not None), None)
        return Step(
            call, input_ids, ended, logits, inputs, mark_cache(cache), dump_rng(self._model),
            call.processor_states(),
        )  # fmt: skip

    def snapshot(self, provenance: Provenance) -> Snapshot:
        """The state after the last finished token.

        Raises:
            IncompleteStateError: no token was finished, or something in the state cannot be kept.
            UnsupportedModelError: no cache family knows the cache.
            UnsupportedOperationError: this way of generating cannot be kept.
        """
        if self._call.refused:
            raise self._call.refused
        step = self.last
        if step is None:
            raise IncompleteStateError(
                "capture",
                expected="at least one generated token",
                found="none",
                do="call model.generate inside the `with`, on the model that is captured",
            )
        step.call.watch.check()
        tensors, values = _sorted_out(step.inputs)
        cache = dump_cache(step.cache)
        return Snapshot(
            cache=cache,
            generation=GenerationState(
                input_ids=step.input_ids,
                prompt_length=step.call.prompt_length,
                n_cached=n_cached(cache),
                finished=step.finished,
                logits=step.logits,
                step_inputs=tensors,
                step_values=values,
                rng=step.rng,
                config=dump_config(step.call.config),
                processors=step.processors,
            ),
            provenance=provenance,
        )


def _sorted_out(inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the plain values among a step's inputs."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in ALL_CACHE_NAMES or name in _NOT_KEPT:
            continue
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif _is_plain(value):
            values[name] = plain(value)
        else:
            raise IncompleteStateError(
                f"input {name!r} of the model",
                expected="a tensor or a plain value",
                found=type(value).__name__,
                do="this input cannot be kept; generate without it",
            )
    return tensors, values


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
