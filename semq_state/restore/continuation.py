"""One call of `generate` that starts in the middle: the exact next step instead of a prefill.

Three things in `generate` look back at where a generation began, and would take the resume for a new prompt:
processors that count from the prompt, the flags of rows that have ended, and the prefill. Each is answered from
the snapshot instead.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from semq_state.caches import NO_CACHE
from semq_state.errors import UnsupportedOperationError
from semq_state.generation import seams
from semq_state.generation.processors import restore_processors
from semq_state.generation.rows import AlreadyEnded, EndedRowsPadding
from semq_state.generation.settings import rebuild_config
from semq_state.snapshot import Snapshot

_ONE_SEQUENCE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
}
"""What may not differ from these: the state has one cache row and one step for each of its sequences."""


def n_tokens(snapshot: Snapshot) -> int:
    """How many tokens each row has, also where `input_ids` does not show all that are in the cache.

    With a cache or embeddings that came from elsewhere `generate` never saw the tokens before its input; but
    exactly one is always not in the cache yet. A loop of one's own tells all of its tokens.
    """
    state = snapshot.generation
    with_cache = bool(state.config) and snapshot.cache.kind != NO_CACHE
    return state.n_cached + 1 if with_cache else snapshot.n_tokens


class Continuation:
    """The replacements for `generate`'s seams that continue a snapshot.

    Args:
        snapshot: where to start.
        model: the `PreTrainedModel`.
        cache: its cache, rebuilt.
        append: tokens of the next turn, `(batch, n)`, or None to go on with the recorded generation.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        model: Any,
        cache: Any,
        append: torch.Tensor | None,
    ) -> None:
        self.reused_tokens = 0
        self._is_recorded = False
        self._state = snapshot.generation
        self._model = model
        self._cache = cache
        self._append = append
        self._device = model.device
        self._ids = self._state.input_ids.to(self._device)
        self._finished = self._state.finished.to(self._device)
        self._inputs = {name: t.to(self._device) for name, t in self._state.step_inputs.items()}
        self._n_tokens = n_tokens(snapshot)
        if append is not None:
            self._ids = torch.cat([self._ids, append], dim=-1)
            self._n_tokens += append.shape[1]
        self._originals = {
            name: getattr(model, name) for name in (seams.LOGITS_PROCESSORS, seams.STOPPING_CRITERIA, seams.PREFILL)
        }

    def arguments(self, kwargs: Mapping[str, Any], tokenizer: Any) -> dict[str, Any] | None:
        """The arguments for `model.generate`; None where the recorded generation had come to its end.

        Raises:
            UnsupportedOperationError: they ask for another number of sequences or of tokens a step.
        """
        given = dict(kwargs)
        config = copy.deepcopy(given.pop("generation_config", None))
        self._is_recorded = config is None and bool(self._state.config)
        if self._is_recorded:
            config = self._recorded_config()
        _refuse_others(given, config)
        if config is None:
            return {**given, **self._tensors()}
        # A cache is passed in; naming a kind of cache as well would be refused.
        config.cache_implementation = None
        given = config.update(**given)
        length = self._ids.shape[1]
        if config.max_new_tokens is not None:
            config.max_length, config.max_new_tokens = length + config.max_new_tokens, None
        if config.min_new_tokens is not None:
            config.min_length, config.min_new_tokens = length + config.min_new_tokens, None
        at_end = bool(self._finished.all()) or (config.max_length or 0) <= length
        if self._is_recorded and self._append is None and at_end:
            return None
        if config.stop_strings is not None and tokenizer is not None:
            given.setdefault("tokenizer", tokenizer)
        return {**given, "generation_config": config, **self._tensors()}

    def _recorded_config(self) -> GenerationConfig:
        config = rebuild_config(self._state.config)
        # These were resolved to absolute lengths when the recorded run began.
        config.max_new_tokens = config.min_new_tokens = None
        # Its sequences are rows of the batch by now.
        config.num_return_sequences = None
        if self._append is not None:
            budget = (config.max_length or 0) - self._state.prompt_length
            config.max_length, config.min_length = self._ids.shape[1] + budget, None
        return config

    def nothing_left(self, kwargs: Mapping[str, Any]) -> Any:
        """What the uninterrupted run returned: it had ended here."""
        warnings.warn(
            "the recorded generation had come to its end, nothing was generated: pass max_new_tokens= to go "
            "beyond its length, or append= for the next turn",
            stacklevel=3,
        )
        if kwargs.get("return_dict_in_generate", self._state.config.get("return_dict_in_generate")):
            return GenerateDecoderOnlyOutput(sequences=self._ids, past_key_values=self._cache)
        return self._ids

    def replacements(self) -> dict[str, Any]:
        """What to put in front of the model's own methods."""
        new_turn = self._append is not None
        found: dict[str, Any] = {seams.PREFILL: self._prefill}
        if self._is_recorded:
            # The recorded settings are resolved; the model's defaults of today must not fill their gaps.
            found["generation_config"] = GenerationConfig()
        if not new_turn:
            found[seams.LOGITS_PROCESSORS] = self._logits_processors
            found[seams.STOPPING_CRITERIA] = self._stopping_criteria
        return found

    def _tensors(self) -> dict[str, Any]:
        mask = self._inputs.get("attention_mask")
        if mask is None:
            mask = self._ids.new_ones((self._ids.shape[0], self._n_tokens))
        elif self._append is not None:
            mask = torch.cat([mask, mask.new_ones(self._append.shape)], dim=-1)
        tensors = {"input_ids": self._ids, "attention_mask": mask}
        return tensors if self._cache is None else {**tensors, "past_key_values": self._cache}

    def _logits_processors(self, **kwargs: Any) -> Any:
        # Processors count from the prompt, and must go on doing so.
        n_prompt = self._state.prompt_length
        kwargs["input_ids_seq_length"] = n_prompt
        kwargs["encoder_input_ids"] = self._ids[:, :n_prompt]
        processors = self._originals[seams.LOGITS_PROCESSORS](**kwargs)
        restore_processors(self._state.processors, "logits", processors, self._ids.shape[0])
        if bool(self._finished.any()):
            processors.append(EndedRowsPadding(self._finished, kwargs["generation_config"]))
        return processors

    def _stopping_criteria(self, **kwargs: Any) -> Any:
        criteria = self._originals[seams.STOPPING_CRITERIA](**kwargs)
        restore_processors(self._state.processors, "stopping", criteria, self._ids.shape[0])
        criteria.append(AlreadyEnded(self._finished))
        return criteria

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        with _tokens_fed(self._model) as fed:
            outputs = self._next_step(input_ids, generation_config, model_kwargs, is_first_iteration)
        self.reused_tokens = self._n_tokens - sum(fed)
        return outputs

    def _next_step(
        self,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool,
    ) -> Any:
        """The next step of the interrupted loop, called exactly as that loop would have called it."""
        n_cached = self._state.n_cached if self._cache is not None else 0
        n_fed = self._n_tokens - n_cached
        new_turn = self._append is not None
        if not new_turn:
            model_kwargs.update(self._inputs)
            model_kwargs.update({k: v for k, v in self._state.step_values.items() if k not in model_kwargs})
            if self._state.config and "attention_mask" not in self._inputs:
                model_kwargs["attention_mask"] = None
        if n_fed == 0 and self._state.logits is not None:
            logits = self._state.logits.to(self._device)[:, None]
            return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)
        if n_fed == 0:
            self._cache.crop(-1)
            n_fed = 1
        if new_turn and self._ids.shape[1] == self._n_tokens:
            return self._originals[seams.PREFILL](
                input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration
            )
        with self._model._optimize_model_for_decode():
            inputs = self._model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=n_fed, is_first_iteration=new_turn, **model_kwargs
            )
            return self._model(**inputs, return_dict=True)


@contextlib.contextmanager
def _tokens_fed(model: Any) -> Iterator[list[int]]:
    """How many tokens a row each forward pass is given: what a resume really costs, not what it promised."""
    fed: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is not None:
            fed.append(int(given.shape[1]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


def _refuse_others(given: Mapping[str, Any], config: Any) -> None:
    for name, usual in _ONE_SEQUENCE.items():
        value = given.get(name, getattr(config, name, None))
        if value is not None and value != usual:
            raise UnsupportedOperationError(
                f"resumed.generate({name}=…)",
                expected=repr(usual),
                found=repr(value) if isinstance(value, int) else type(value).__name__,
                do="sample or decode greedily; several branches come from resumed.fork",
            )
