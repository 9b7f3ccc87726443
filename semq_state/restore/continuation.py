"""One call of `generate` that starts in the middle: the exact next step instead of a prefill.

`generate` prepares a prompt, makes a cache, computes the prompt, and only then loops. Everything before the loop is
answered from the snapshot: the inputs are those of the loop's next step, the prefill is that step, processors count
from the recorded prompt, and rows that had ended stay ended.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.utils import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from semq_state.generation import seams
from semq_state.generation.attributes import attributes_set
from semq_state.generation.companions import (
    ASSISTANT,
    GUIDANCE,
    ROLE,
    guidance_of,
    restore_candidates,
)
from semq_state.generation.processors import restore_processors
from semq_state.generation.rows import AlreadyEnded, EndedRowsPadding
from semq_state.generation.trees import put_together
from semq_state.restore.arguments import check_arguments, from_here, is_assisted, recorded_config
from semq_state.restore.beams import BeamWalk
from semq_state.restore.next_step import NextStep, n_tokens, tokens_fed
from semq_state.snapshot import Snapshot

_POSITIONS = "_prepare_position_ids_for_generation"
_FORWARD = "forward"
_PREPARATION = (
    seams.MODEL_INPUTS, seams.ENCODER, seams.DECODER_INPUTS, seams.EXPAND, seams.PREPARE_CACHE, seams.VALIDATE,
    _POSITIONS,
)  # fmt: skip

_CALLED = (
    seams.NEXT_INPUTS, seams.STEP_TAKEN, seams.TOP_CONTINUATIONS, seams.RUNNING_BEAMS, seams.FINISHED_BEAMS,
    seams.EARLY_STOP, seams.BEAMS_LEFT, _FORWARD,
)  # fmt: skip


class Continuation:
    """The replacements for `generate`'s seams that continue a snapshot.

    Args:
        snapshot: where to start.
        model: the module that generates.
        cache: its cache, rebuilt.
        companions: the caches of guidance and assistant, rebuilt.
        append: tokens of the next turn, `(batch, n)`, or None to go on with the recorded generation.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        model: Any,
        cache: Any,
        companions: Mapping[str, Any],
        append: torch.Tensor | None,
    ) -> None:
        self.reused_tokens = 0
        self._is_recorded = False
        self._state = snapshot.generation
        self._model = model
        self._cache = cache
        self._companions = companions
        self._append = append
        self._device = model.device
        self._ids = self._state.input_ids.to(self._device)
        self._finished = self._state.finished.to(self._device)
        tensors = {name: t.to(self._device) for name, t in self._state.step_inputs.items()}
        self._inputs = put_together(tensors, self._state.step_values)
        self._encoder_tokens = self._inputs.pop("encoder_input_ids", None)
        self._given: dict[str, Any] = {}
        self._walk: BeamWalk | None = None
        self._is_first_guess = True
        self._is_assisted = False
        self._is_prepared = False
        n_appended = 0 if append is None else int(append.shape[1])
        self._n_tokens = n_tokens(snapshot) + n_appended
        if append is not None:
            self._ids = torch.cat([self._ids, append], dim=-1)
        self._originals = {name: getattr(model, name) for name in (*self._seams(), *_CALLED)}
        if hasattr(model, seams.REORDER):
            self._originals[seams.REORDER] = getattr(model, seams.REORDER)
        self._step = NextStep(snapshot, model, cache, self._originals, n_appended)

    def arguments(self, kwargs: Mapping[str, Any], tokenizer: Any) -> dict[str, Any] | None:
        """The arguments for `model.generate`; None where the recorded generation had come to its end.

        Raises:
            UnsupportedOperationError: they ask for another number of sequences or another search.
        """
        given = dict(kwargs)
        config = copy.deepcopy(given.pop("generation_config", None))
        self._is_recorded = config is None and bool(self._state.config)
        length, n_appended = self._ids.shape[1], 0 if self._append is None else self._append.shape[1]
        if self._is_recorded:
            config = recorded_config(self._state, length, n_appended)
        check_arguments(self._state, given, config, appends=self._append is not None)
        self._is_assisted = is_assisted(given, config)
        if config is None:
            self._given = given
            return {**given, **self._tensors()}
        # A cache is passed in; naming a kind of cache as well would be refused.
        config.cache_implementation = None
        given = self._given = config.update(**given)
        from_here(config, length)
        if config.stop_strings is not None and tokenizer is not None:
            given.setdefault("tokenizer", tokenizer)
        if self._state.search:
            recorded_length = int(self._state.search["sequences"].shape[2])
            self._walk = BeamWalk(self._state, self._model, self._originals, config.max_length or recorded_length)
        elif self._is_at_end(config, length):
            return None
        return {**given, "generation_config": config, **self._tensors()}

    def _is_at_end(self, config: Any, length: int) -> bool:
        at_end = bool(self._finished.all()) or (config.max_length or 0) <= length
        return self._is_recorded and self._append is None and at_end

    def nothing_left(self, kwargs: Mapping[str, Any]) -> Any:
        """What the uninterrupted run returned: it had ended here."""
        warnings.warn(
            "the recorded generation had come to its end, nothing was generated: pass max_new_tokens= to go "
            "beyond its length, or append= for the next turn",
            stacklevel=3,
        )
        if kwargs.get("return_dict_in_generate", self._state.config.get("return_dict_in_generate")):
            is_pair = self._model.config.is_encoder_decoder
            kind = GenerateEncoderDecoderOutput if is_pair else GenerateDecoderOnlyOutput
            return kind(sequences=self._ids, past_key_values=self._cache)
        return self._ids

    def result(self, given: Any) -> Any:
        """What `generate` gave, without what only led to where the snapshot was taken."""
        if self._walk is None:
            return given
        self.reused_tokens = self._n_tokens - (1 if self._walk.n_fed is None else self._walk.n_fed)
        return self._walk.stripped(given)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the replacements in front of the model's own methods, and takes them away again."""
        with (
            attributes_set(self._model, self._state.attributes),
            seams.replaced(self._model, self._replacements()),
        ):
            yield

    def _seams(self) -> dict[str, Any]:
        return {
            seams.LOGITS_PROCESSORS: self._logits_processors,
            seams.STOPPING_CRITERIA: self._stopping_criteria,
            seams.CANDIDATES: self._candidates,
            seams.PREFILL: self._prefill,
            seams.MODEL_INPUTS: self._model_inputs,
            seams.ENCODER: lambda inputs, model_kwargs, *args: model_kwargs,
            seams.DECODER_INPUTS: self._decoder_inputs,
            seams.EXPAND: lambda input_ids, expand_size=1, is_encoder_decoder=False, **kwargs: (input_ids, kwargs),
            seams.PREPARE_CACHE: self._prepare_cache,
            seams.VALIDATE: lambda model_kwargs: None,
            _POSITIONS: lambda inputs, model_kwargs: inputs,
        }

    def _replacements(self) -> dict[str, Any]:
        """What to put in front of the model's own methods."""
        found = self._seams()
        found |= {name: self._once(name, found[name]) for name in _PREPARATION}
        if self._is_assisted:
            del found[seams.PREFILL]
        if self._append is not None:
            for name in (seams.LOGITS_PROCESSORS, seams.STOPPING_CRITERIA, seams.CANDIDATES):
                del found[name]
        else:
            if not self._state.config:
                del found[_POSITIONS]
            found[seams.NEXT_INPUTS] = self._next_inputs
        if self._walk is not None:
            found |= self._walk.replacements()
        if self._is_recorded:
            # The recorded settings are resolved; the model's defaults of today must not fill their gaps.
            found["generation_config"] = GenerationConfig()
        if type(self._model).generate is not GenerationMixin.generate:
            # A class's own `generate` prepares a prompt for this one; here there is no prompt.
            found["generate"] = types.MethodType(GenerationMixin.generate, self._model)
        return found

    def _once(self, name: str, replacement: Any) -> Any:
        """`replacement` for this call's own preparation; an assistant that is the same model prepares as ever."""

        def either(*args: Any, **kwargs: Any) -> Any:
            return (self._originals[name] if self._is_prepared else replacement)(*args, **kwargs)

        return either

    def _tensors(self) -> dict[str, Any]:
        ids = self._ids[:, : self._state.prompt_length] if self._walk is not None else self._ids
        if self._model.config.is_encoder_decoder:
            return {"decoder_input_ids": ids}
        mask = self._inputs.get("attention_mask")
        if mask is None:
            mask = ids.new_ones((ids.shape[0], self._n_tokens))
        elif self._append is not None:
            mask = torch.cat([mask, mask.new_ones(self._append.shape)], dim=-1)
        return {"input_ids": ids, "attention_mask": mask}

    def _model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        ids = model_kwargs.pop("decoder_input_ids", None)
        ids = model_kwargs.pop("input_ids", inputs) if ids is None else ids
        return ids, "input_ids", model_kwargs

    def _decoder_inputs(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return self._ids[:, : self._state.prompt_length] if self._walk is not None else self._ids, model_kwargs

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The arguments of the loop's next step, instead of those of a prompt."""
        if self._state.config:
            given = {name: value for name, value in model_kwargs.items() if name in self._given}
            model_kwargs.clear()
            model_kwargs.update({**self._inputs, **given})
        else:
            if not self._model.config.is_encoder_decoder:
                model_kwargs["attention_mask"] = self._ids.new_ones((self._ids.shape[0], self._n_tokens))
            model_kwargs.update(self._inputs)
        for name, cache in self._companions.items():
            if name not in (GUIDANCE, ASSISTANT):
                model_kwargs[name] = cache
        if isinstance(self._cache, Cache):
            model_kwargs[self._state.cache_argument] = self._cache

    def _logits_processors(self, **kwargs: Any) -> Any:
        if kwargs["generation_config"].is_assistant:
            return self._originals[seams.LOGITS_PROCESSORS](**kwargs)
        # Processors count from the prompt, and must go on doing so.
        n_prompt = self._state.prompt_length
        kwargs["input_ids_seq_length"] = n_prompt
        kwargs["encoder_input_ids"] = (
            self._ids[:, :n_prompt] if self._encoder_tokens is None else self._encoder_tokens
        )
        processors = self._originals[seams.LOGITS_PROCESSORS](**kwargs)
        restore_processors(self._state.processors, "logits", processors, self._ids.shape[0])
        guidance = guidance_of(processors)
        if guidance is not None:
            guidance.unconditional_context["past_key_values"] = self._companions.get(GUIDANCE)
        if self._walk is not None:
            return self._walk.processors(processors)
        if bool(self._finished.any()):
            processors.append(EndedRowsPadding(self._finished, kwargs["generation_config"]))
        return processors

    def _stopping_criteria(self, **kwargs: Any) -> Any:
        criteria = self._originals[seams.STOPPING_CRITERIA](**kwargs)
        if kwargs["generation_config"].is_assistant:
            return criteria
        self._is_prepared = True
        restore_processors(self._state.processors, "stopping", criteria, self._ids.shape[0])
        if self._walk is not None:
            return self._walk.criteria(criteria)
        criteria.append(AlreadyEnded(self._finished))
        return criteria

    def _candidates(self, *args: Any, **kwargs: Any) -> Any:
        generator = self._originals[seams.CANDIDATES](*args, **kwargs)
        recorded = next((p for p in self._state.processors if p.role == ROLE), None)
        if recorded is not None and recorded.name == type(generator).__name__:
            cache = self._companions.get(ASSISTANT)
            if cache is not None:
                cache.activate_past_recording()
            restore_candidates(recorded, generator, cache)
        return generator

    def _next_inputs(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """An assisted loop's first turn is told from the others by itself; here none is the first."""
        if self._is_assisted and kwargs.get("is_first_iteration") and self._is_first_guess:
            self._is_first_guess = False
            kwargs["is_first_iteration"] = False
            kwargs["next_sequence_length"] = input_ids.shape[1] - (self._ids.shape[1] - 1)
            self.reused_tokens = self._n_tokens - 1
        return self._originals[seams.NEXT_INPUTS](input_ids, *args, **kwargs)

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        with tokens_fed(self._model) as fed:
            outputs = self._step.taken(input_ids, generation_config, model_kwargs)
        self.reused_tokens = self._n_tokens - sum(fed)
        return outputs
