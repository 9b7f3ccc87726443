"""Follows one model through its `generate` calls and remembers the last finished token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES, MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from semq_state.caches import CacheMark, dump_cache, is_cache, mark_cache, n_cached
from semq_state.capture.beams import BeamWatch
from semq_state.capture.hearing import Hearing, refused_beams
from semq_state.capture.tracing import Tracer
from semq_state.errors import IncompleteStateError, SemqStateError, UnsupportedOperationError
from semq_state.generation import seams
from semq_state.generation.attributes import AttributeWatch
from semq_state.generation.companions import (
    ASSISTANT,
    GUIDANCE,
    assistant_cache,
    check_candidates,
    dump_candidates,
    guidance_of,
    settle_assistant,
)
from semq_state.generation.processors import Watch, dump_processors
from semq_state.generation.random import dump_rng
from semq_state.generation.rows import FollowedCriteria
from semq_state.generation.settings import dump_config, encoder_tokens_matter
from semq_state.generation.trees import take_apart
from semq_state.provenance import Provenance
from semq_state.snapshot import Checkpoint, GenerationState, ProcessorState, Snapshot
from semq_state.snapshot.generation import CACHE_ARGUMENT

# What the first forward pass has used up, and what `stop_strings` reads.
_USED_UP = {"inputs_embeds", *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL}
_NEVER_KEPT = {"tokenizer", "assistant_tokenizer"}


@dataclass(frozen=True)
class Step:
    """One finished token: references and marks only, nothing is copied while the model runs."""

    call: _Call
    input_ids: torch.Tensor
    finished: torch.Tensor
    logits: torch.Tensor | None
    inputs: Mapping[str, Any]
    cache_argument: str
    cache: CacheMark
    rng: Mapping[str, torch.Tensor]
    processors: tuple[ProcessorState, ...]
    search: Mapping[str, torch.Tensor] = field(default_factory=dict)
    companions: Mapping[str, CacheMark] = field(default_factory=dict)
    attributes: Mapping[str, torch.Tensor] = field(default_factory=dict)


class _Call:
    """What stays the same during one call of `generate`."""

    def __init__(self) -> None:
        self.prompt_length = 0
        self.config: Any = None
        self.refused: SemqStateError | None = None
        self.logits_processors: list[Any] = []
        self.stopping_criteria: list[Any] = []
        self.given: list[Any] = []
        self.encoder_tokens: torch.Tensor | None = None
        self.candidates: Any = None
        self.watch = Watch(())
        self.pending: tuple[torch.Tensor | None, dict[str, Any]] | None = None
        self.checkpoints: list[Checkpoint] = []

    def begin(self) -> None:
        self.watch = Watch([*self.logits_processors, *self.stopping_criteria])

    def processor_states(self) -> tuple[ProcessorState, ...]:
        states = [
            *dump_processors("logits", self.logits_processors, self.given),
            *dump_processors("stopping", self.stopping_criteria, self.given),
        ]
        if self.candidates is not None:
            states.append(dump_candidates(self.candidates))
        return tuple(states)

    def companions(self, input_ids: torch.Tensor) -> dict[str, CacheMark]:
        settle_assistant(self.candidates, input_ids)
        guidance = guidance_of(self.logits_processors)
        caches = {
            GUIDANCE: guidance.unconditional_context["past_key_values"] if guidance is not None else None,
            ASSISTANT: assistant_cache(self.candidates),
        }
        return {name: mark_cache(cache) for name, cache in caches.items() if cache is not None}


class Recorder:
    """The replacements for `generate`'s seams, and the last step that they saw.

    Args:
        model: the `PreTrainedModel` to follow.
        on_step: called after each finished token.
        tells: warn when a run cannot be kept; not where `on_step` finds that out itself.
        wants_checkpoint: whether to keep what a later `crop` to this many tokens will need.
        tracer: takes notes of each token, and with it the run's first token is a checkpoint.
        hearing: hears the hidden states of this model's loop.
    """

    def __init__(
        self,
        model: Any,
        on_step: Callable[[], None],
        *,
        tells: bool = True,
        wants_checkpoint: Callable[[int], bool] = lambda n_tokens: False,
        tracer: Tracer | None = None,
        hearing: Hearing | None = None,
    ) -> None:
        self._tracer = tracer
        self._hearing = hearing
        self.last: Step | None = None
        self._model = model
        self._on_step = on_step
        self._tells = tells
        self._wants_checkpoint = wants_checkpoint
        self._call = _Call()
        self._attributes = AttributeWatch(model)
        self._beams = BeamWatch({}, self._finished_beams)
        self._originals = {name: getattr(model, name) for name in self.replacements()}
        self._beams = BeamWatch(self._originals, self._finished_beams)

    @property
    def refused(self) -> SemqStateError | None:
        """Why the run cannot be kept, if so."""
        return self._call.refused

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """What to put in front of the model's own methods."""
        return {
            seams.LOGITS_PROCESSORS: self._logits_processors,
            seams.STOPPING_CRITERIA: self._stopping_criteria,
            seams.STEP_TAKEN: self._step_taken,
            seams.CANDIDATES: self._candidates,
            **self._beams.replacements(),
        }

    def _logits_processors(self, **kwargs: Any) -> Any:
        processors = self._originals[seams.LOGITS_PROCESSORS](**kwargs)
        config = kwargs["generation_config"]
        if config.is_assistant:
            return processors
        self._call = _Call()
        self._attributes.begin()
        if self._tracer:
            self._tracer.begin()
        self._call.prompt_length = int(kwargs["input_ids_seq_length"])
        self._call.config = config
        self._call.logits_processors = list(processors)
        self._call.given = list(kwargs.get("logits_processor") or ())
        if self._model.config.is_encoder_decoder and encoder_tokens_matter(config):
            self._call.encoder_tokens = kwargs["encoder_input_ids"]
        return processors

    def _stopping_criteria(self, **kwargs: Any) -> Any:
        criteria = self._originals[seams.STOPPING_CRITERIA](**kwargs)
        if kwargs["generation_config"].is_assistant:
            return criteria
        self._call.stopping_criteria = list(criteria)
        self._call.given += kwargs.get("stopping_criteria") or ()
        self._call.begin()
        followed = FollowedCriteria(criteria, self._finished_token)
        if self._hearing:
            self._hearing.begin(self._call.prompt_length, followed)
        return followed

    def _step_taken(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        updated = self._originals[seams.STEP_TAKEN](outputs, model_kwargs, *args, **kwargs)
        last = None
        if self._call.candidates is None:
            logits = outputs.logits
            # A prefill may give the logits of every token; a view of the last would keep them all alive.
            last = logits[:, -1] if logits.shape[1] == 1 else logits[:, -1].clone()
        self._call.pending = last, updated
        return updated

    def _candidates(self, *args: Any, **kwargs: Any) -> Any:
        generator = self._originals[seams.CANDIDATES](*args, **kwargs)
        try:
            check_candidates(generator)
        except SemqStateError as error:
            self._refuse(error)
        self._call.candidates = generator
        return generator

    def _refuse(self, error: SemqStateError) -> None:
        # The caller's generation goes on; it is told now, while that still helps, and `snapshot` refuses.
        self._call.refused = error
        if self._hearing:
            self._hearing.give_up(error)
        if self._tells:
            warnings.warn(f"this run cannot be kept, it goes on all the same: {error}", stacklevel=2)

    def _finished_token(self, input_ids: torch.Tensor, ended: torch.Tensor) -> None:
        # A beam search asks its criteria about candidates; its turns end elsewhere.
        if (self._call.config.num_beams or 1) == 1:
            self._finish(input_ids, ended)

    def _finished_beams(self, input_ids: torch.Tensor) -> None:
        self._finish(input_ids, torch.zeros(input_ids.shape[0], dtype=torch.bool), self._beams.search)

    def _finish(
        self, input_ids: torch.Tensor, ended: torch.Tensor, search: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        if not self._call.refused:
            try:
                step = self._step(self._call, input_ids, ended, search or {})
                if self._tracer:
                    self._tracer.finish(input_ids, None if search else step.logits)
                if self._hearing:
                    if search:
                        raise refused_beams()
                    drafts = self._call.candidates is not None
                    self._hearing.finish(input_ids, ended, step.inputs, drafts=drafts)
                is_first = self.last is None or self.last.call is not self._call
                self.last = step
                if self._wants_checkpoint(int(input_ids.shape[1])) or (self._tracer and is_first):
                    cache = dump_cache(self.last.cache).uncroppable()
                    self._call.checkpoints.append(
                        Checkpoint(int(input_ids.shape[1]), cache, self.last.rng, self.last.attributes)
                    )
            except SemqStateError as error:
                self._refuse(error)
        self._on_step()

    def _step(
        self, call: _Call, input_ids: torch.Tensor, ended: torch.Tensor, search: Mapping[str, torch.Tensor]
    ) -> Step:
        if call.pending is None:
            raise UnsupportedOperationError(
                "custom_generate",
                expected="a loop that prepares each step as transformers' own does",
                found="another",
                do="use sq.snapshot_of in a loop of your own",
            )
        logits, inputs = call.pending
        argument = next((name for name in ALL_CACHE_NAMES if inputs.get(name) is not None), CACHE_ARGUMENT)
        cache = mark_cache(inputs.get(argument), self._model.config.model_type)
        companions = call.companions(input_ids)
        companions |= {
            name: mark_cache(value)
            for name, value in inputs.items()
            if name not in ALL_CACHE_NAMES and is_cache(value)
        }
        return Step(
            call, input_ids, ended, logits, dict(inputs), argument, cache, dump_rng(self._model),
            call.processor_states(), search, companions, self._attributes.values(),
        )  # fmt: skip

    def snapshot(self, provenance: Provenance, generator: str = "") -> Snapshot:
        """The state after the last finished token.

        Args:
            provenance: of the whole model.
            generator: the path of the module that generates, within it.

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
        cache = dump_cache(step.cache)
        inputs = _kept(step, with_cache=bool(cache.all_layers()))
        if step.call.encoder_tokens is not None:
            inputs["encoder_input_ids"] = step.call.encoder_tokens
        tensors, values = take_apart(inputs)
        seen = n_cached(cache)
        return Snapshot(
            cache=cache,
            generation=GenerationState(
                input_ids=step.input_ids,
                prompt_length=step.call.prompt_length,
                # Where no layer counts, the loop's own rule holds: all but the token that it chose last.
                n_cached=int(step.input_ids.shape[1]) - 1 if seen is None else seen,
                finished=step.finished,
                logits=step.logits,
                step_inputs=tensors,
                step_values=values,
                rng=step.rng,
                config=dump_config(step.call.config),
                processors=step.processors,
                search=step.search,
                companions={name: dump_cache(mark) for name, mark in step.companions.items()},
                attributes=step.attributes,
                cache_argument=step.cache_argument,
                generator=generator,
            ),
            provenance=provenance,
            checkpoints=tuple(c for c in step.call.checkpoints if c.n_tokens < int(step.input_ids.shape[1])),
            trace=self._tracer.trace() if self._tracer else None,
            hidden=self._hearing.rows() if self._hearing else {},
        )


def _kept(step: Step, *, with_cache: bool) -> dict[str, Any]:
    """The inputs that later steps read: without a cache every step reads the prompt's own again."""
    dropped = {*ALL_CACHE_NAMES, *_NEVER_KEPT, *step.companions, *(_USED_UP if with_cache else ())}
    return {name: value for name, value in step.inputs.items() if name not in dropped}
