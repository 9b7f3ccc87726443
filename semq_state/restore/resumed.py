"""`sq.restore` and what it gives: a state that `generate` goes on from, as often as you like."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from semq_state.errors import Difference, UnsupportedOperationError
from semq_state.generation.random import restore_rng, seed_rng
from semq_state.generation.seams import base_model
from semq_state.restore.devices import device_of
from semq_state.snapshot import Snapshot

_OURS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",
    "inputs_embeds",
    "decoder_input_ids",
    "encoder_outputs",
)


class Resumed:
    """A snapshot and the model that goes on with it.

    Each `generate` starts from the snapshot, so several are branches of it. To go on from where one ended, take
    a snapshot of it: `with sq.capture(model) as run: resumed.generate()`.

    Attributes:
        snapshot: where every branch starts.
        accepted: the differences from the recorded model that `allow` accepted.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        model: Any,
        *,
        tokenizer: Any = None,
        accepted: tuple[Difference, ...] = (),
        seed: int | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.accepted = accepted
        self._model = model
        self._inner = base_model(model)
        path = snapshot.generation.generator
        self._generator = self._inner.get_submodule(path) if path else self._inner
        self._tokenizer = tokenizer
        self._seed = seed
        self._reused: int | None = None

    @property
    def reused_tokens(self) -> int:
        """Tokens of each row that are not computed again: as measured in the last `generate`, before the first
        one as the snapshot promises."""
        return self.snapshot.generation.n_cached if self._reused is None else self._reused

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments for a `model.generate` by hand: `input_ids`, `attention_mask`, `past_key_values`.

        Each access builds a new cache that shares the snapshot's memory. The random state is not part of it.
        `input_ids` are all tokens, or only the last where the recorded run was not given all of them either.

        Raises:
            UnsupportedOperationError: every token is in the cache already and the last cannot be taken out, or the
                state is of a beam search, of guidance or of an assistant.
        """
        from semq_state.caches import can_step_back, n_cached
        from semq_state.generation.trees import put_together
        from semq_state.restore.next_step import n_tokens

        state, n_all = self.snapshot.generation, n_tokens(self.snapshot)
        found = "a beam search" if state.search else ", ".join([*sorted(state.companions), *state.attributes])
        if not found and n_cached(self.snapshot.cache) is None:
            found = f"{state.cache_argument}, by whose length `generate` cannot tell where to go on"
        if found:
            raise UnsupportedOperationError(
                "resumed.inputs",
                expected="a state that tokens and a cache with a length make up",
                found=found,
                do="use resumed.generate, which brings all of it back",
            )
        ids, cache = state.input_ids.to(self._inner.device), self._cache()
        if state.n_cached == n_all:
            if not can_step_back(self.snapshot.cache, state.n_cached):
                raise UnsupportedOperationError(
                    "resumed.inputs",
                    expected="a token that is not in the cache yet",
                    found="all of them in it, and layers that have folded or dropped what came before",
                    do="use resumed.generate, which starts from the kept logits",
                )
            cache.crop(-1)
        mask = state.step_inputs.get("attention_mask")
        if self._generator.config.is_encoder_decoder:
            tensors = {name: t.to(ids.device) for name, t in state.step_inputs.items()}
            inputs = put_together(tensors, state.step_values)
            names: tuple[str, ...] = ("encoder_outputs", "attention_mask")
            given = {name: inputs[name] for name in names if name in inputs}
            # The mask's length tells `generate` that all tokens are given, not only new ones.
            own = inputs.get("decoder_attention_mask")
            own = ids.new_ones((ids.shape[0], n_all)) if own is None else own
            return {**given, "decoder_input_ids": ids, "decoder_attention_mask": own, state.cache_argument: cache}
        mask = ids.new_ones((ids.shape[0], n_all)) if mask is None else mask.to(ids.device)
        return {
            "input_ids": ids if ids.shape[1] == n_all else ids[:, -1:],
            "attention_mask": mask,
            state.cache_argument: cache,
        }

    def generate(
        self,
        *,
        append: torch.Tensor | Sequence[int] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Goes on generating, as if never interrupted.

        Args:
            append: the next turn's tokens, `(batch, n)` or for one row a list; a new generation follows them.
            seed: starts a new random stream: a branch. Without it the recorded stream goes on.
            **kwargs: `model.generate`'s own arguments, on top of the recorded ones. `max_new_tokens` counts
                from here; without it and `max_length` the recorded run's end stays where it was.

        Returns:
            What `model.generate` returns: whole sequences, prompt included.

        Raises:
            UnsupportedOperationError: the arguments contradict a resume.

        Example:
            >>> tokens = resumed.generate(max_new_tokens=100)  # doctest: +SKIP
        """
        ours = sorted(set(kwargs) & set(_OURS))
        if ours:
            raise UnsupportedOperationError(
                f"resumed.generate({', '.join(ours)})",
                expected="no inputs, they come from the snapshot",
                do="pass append= for more tokens, or call model.generate(**resumed.inputs) by hand",
            )
        from semq_state.restore.continuation import Continuation

        continuation = Continuation(
            self.snapshot, self._generator, self._cache(), self._companions(kwargs), self._appended(append)
        )
        call = continuation.arguments(kwargs, self._tokenizer)
        if call is None:
            return continuation.nothing_left(kwargs)
        seed = self._seed if seed is None else seed
        if seed is None:
            restore_rng(self.snapshot.generation.rng)
        else:
            seed_rng(seed)
        # A wrapper's `generate` may do more than the model's own; a part of a model has no wrapper.
        generate = self._model.generate if self._generator is self._inner else None
        with continuation.in_place():
            result = continuation.result((generate or self._generator.generate)(**call))
        self._reused = continuation.reused_tokens
        self._warn_if_recomputed()
        return result

    def fork(self, n: int, *, seeds: Sequence[int] | None = None) -> tuple[Resumed, ...]:
        """`n` branches of this state. They share its memory; each takes its own as it goes on.

        Args:
            n: how many.
            seeds: a random stream for each; without them all continue the recorded one until `generate(seed=…)`.

        Example:
            >>> left, right = resumed.fork(2, seeds=(1, 2))  # doctest: +SKIP
        """
        if n < 1 or (seeds is not None and len(seeds) != n):
            raise ValueError(f"need n >= 1 and as many seeds as branches, got n={n}, seeds={seeds!r}")
        return tuple(
            Resumed(
                self.snapshot,
                self._model,
                tokenizer=self._tokenizer,
                accepted=self.accepted,
                seed=self._seed if seeds is None else seeds[i],
            )
            for i in range(n)
        )

    def _cache(self) -> Any:
        from semq_state.caches import rebuild_cache

        return rebuild_cache(self.snapshot.cache, partial(device_of, self._generator))

    def _companions(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        from semq_state.caches import rebuild_cache
        from semq_state.generation.companions import ASSISTANT

        models = {ASSISTANT: kwargs.get("assistant_model")}
        return {
            name: rebuild_cache(cache, partial(device_of, models.get(name) or self._generator))
            for name, cache in self.snapshot.generation.companions.items()
        }

    def _appended(self, append: torch.Tensor | Sequence[int] | None) -> torch.Tensor | None:
        if append is None:
            return None
        ids = torch.as_tensor(append, dtype=torch.int64)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != self.snapshot.batch_size or not ids.numel():
            raise UnsupportedOperationError(
                "append",
                expected=f"tokens of shape ({self.snapshot.batch_size}, n)",
                found=str(tuple(ids.shape)),
                do="give every row the same number of tokens",
            )
        return ids.to(self._inner.device)

    def _warn_if_recomputed(self) -> None:
        from semq_state.caches import n_cached

        # The last token may never have been computed; in a loop of one's own, more of them.
        state = self.snapshot.generation
        promised = self.snapshot.n_tokens - 1 if state.config else min(state.n_cached, self.snapshot.n_tokens - 1)
        if n_cached(self.snapshot.cache) is None:
            # Where no layer counts, a step may take more tokens than the last by design (XLNet's does).
            promised = min(promised, 1)
        if self.reused_tokens < promised:
            warnings.warn(
                f"{self.snapshot.n_tokens - self.reused_tokens} of the snapshot's {self.snapshot.n_tokens} tokens "
                "were computed again: it holds no cache for them",
                stacklevel=3,
            )


def restore(snapshot: Snapshot, model: Any, *, tokenizer: Any = None, allow: Collection[str] = ()) -> Resumed:
    """Makes a model ready to go on from a snapshot. The model itself is not touched.

    Args:
        snapshot: from `load`, or straight from a capture.
        model: the model that made it, in this process.
        tokenizer: compared with the recorded one; also used for `stop_strings`.
        allow: differences to accept by name, of `weights`, `config`, `rope`, `tokenizer`, `adapters`,
            `quantization`, `dtype`. What follows is then not what the recorded model would have said.

    Returns:
        The resumed state.

    Raises:
        ModelMismatchError: it is another model; every difference is listed.
        IncompleteStateError: the snapshot lacks something, or contradicts itself.
        UnsupportedModelError: a layer is of an unknown kind.

    Example:
        >>> resumed = sq.restore(sq.load("chat.safetensors"), model)  # doctest: +SKIP
        >>> tokens = resumed.generate(max_new_tokens=100)  # doctest: +SKIP
    """
    from semq_state.restore.checks import check_goes_on, check_model, check_state

    check_goes_on(snapshot)
    inner = base_model(model)
    accepted = check_model(snapshot, inner, tokenizer=tokenizer, allow=allow, wrapper=model)
    check_state(snapshot, inner)
    return Resumed(snapshot, model, tokenizer=tokenizer, accepted=accepted)
