"""The one forward pass with which a resume goes on: the interrupted loop's next step, or the next turn's tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from semq_state.caches import NO_CACHE, n_cached
from semq_state.generation import seams
from semq_state.snapshot import Snapshot

_TAKES_SEVERAL = (NO_CACHE, "dynamic", "static", "quantized", "encoder-decoder", "minimax")
_ONE_BY_ONE = ("blt", "idefics", "moshi", "prophetnet")
"""Architectures whose steps of several tokens after a cache transformers refuses, or computes otherwise."""


def n_tokens(snapshot: Snapshot) -> int:
    """How many tokens each row has, also where `input_ids` does not show all that are in the cache.

    With a cache or embeddings that came from elsewhere `generate` never saw the tokens before its input; but
    exactly one is always not in the cache yet. A loop of one's own tells all of its tokens.
    """
    state = snapshot.generation
    with_cache = bool(state.config) and state.n_cached > 0
    return state.n_cached + 1 if with_cache else snapshot.n_tokens


class NextStep:
    """Goes on from a snapshot by one forward pass, or by as many as the model needs for the next turn.

    Args:
        snapshot: where to start.
        model: the module that generates.
        cache: its cache, rebuilt.
        originals: the seams' own methods.
        n_appended: tokens of the next turn.
    """

    def __init__(
        self, snapshot: Snapshot, model: Any, cache: Any, originals: Mapping[str, Any], n_appended: int
    ) -> None:
        self._state = snapshot.generation
        self._model = model
        self._cache = cache
        self._originals = originals
        self._n_appended = n_appended
        self._n_tokens = n_tokens(snapshot) + n_appended
        # Recurrent states and odd caches go on rightly from steps of one token only.
        self._one_by_one = (
            n_cached(snapshot.cache) is None
            or snapshot.cache.kind not in _TAKES_SEVERAL
            or any(not path.endswith("rope_deltas") for path in self._state.attributes)
            or model.config.model_type in _ONE_BY_ONE
        )

    def taken(
        self,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """The next step of the interrupted loop, called exactly as that loop would have called it."""
        if self._cache is not None:
            # Where it is none of transformers' own kind, what `generate` does before would ask it too much.
            model_kwargs[self._state.cache_argument] = self._cache
        n_fed = self._n_tokens - (self._state.n_cached if self._cache is not None else 0)
        if self._n_appended:
            return self._next_turn(input_ids, model_kwargs, n_fed)
        if n_fed == 0 and self._state.logits is not None:
            logits = self._state.logits.to(self._model.device)[:, None]
            return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)
        if n_fed == 0:
            self._cache.crop(-1)
            n_fed = 1
        next_length: int | None = n_fed
        if self._state.config:
            next_length = 1 if model_kwargs["use_cache"] else None
        with self._model._optimize_model_for_decode():
            inputs = self._originals[seams.NEXT_INPUTS](
                input_ids,
                next_sequence_length=next_length,
                **model_kwargs,
            )
            return self._forward(model_kwargs, generation_config)(**inputs, return_dict=True)

    def _next_turn(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any], n_fed: int) -> Any:
        """Feeds the next turn's tokens as if the loop itself had chosen them, all at once where the model can."""
        n_all = input_ids.shape[1]
        length = n_all - self._n_appended
        outputs: Any = ModelOutput()
        # The class's own: a capture around this one must not take these steps for finished tokens.
        step_taken = getattr(type(self._model), seams.STEP_TAKEN)
        size = 1 if self._one_by_one else n_fed
        for n in range(n_all - n_fed + size, n_all + 1, size):
            while length < n:
                is_pair = self._model.config.is_encoder_decoder
                model_kwargs.update(step_taken(self._model, outputs, model_kwargs, is_encoder_decoder=is_pair))
                length += 1
            inputs = self._originals[seams.NEXT_INPUTS](input_ids[:, :n], next_sequence_length=size, **model_kwargs)
            outputs = self._model(**inputs, return_dict=True)
        return outputs

    def _forward(self, model_kwargs: dict[str, Any], generation_config: Any) -> Any:
        """The forward pass as the interrupted loop called it: compiled where `generate` compiles its steps."""
        is_step = bool(self._state.config) and not self._state.search
        # Of caches that are not transformers' own kind it asks too much.
        is_step = is_step and isinstance(self._cache, (Cache, type(None)))
        if is_step and self._model._valid_auto_compile_criteria(model_kwargs, generation_config):
            return self._model.get_compiled_call(generation_config.compile_config)
        return self._model


@contextlib.contextmanager
def tokens_fed(model: Any) -> Iterator[list[int]]:
    """How many tokens a row each forward pass is given: what a resume really costs, not what it promised."""
    fed: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("decoder_input_ids", "input_ids", "inputs_embeds")
        given = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
        if given is not None:
            fed.append(int(given.shape[1]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()
