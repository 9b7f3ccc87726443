"""`sq.snapshot_of`: the state of a hand-written loop of forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from semq_state.errors import IncompleteStateError
from semq_state.fingerprint import fingerprint
from semq_state.generation.random import dump_rng
from semq_state.generation.seams import base_model
from semq_state.snapshot import GenerationState, Snapshot


def snapshot_of(
    model: Any,
    past_key_values: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    prompt_length: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    weights: str = "full",
) -> Snapshot:
    """The state of your own generation loop, between two forward passes.

    Args:
        model: the model that filled the cache.
        past_key_values: its cache.
        input_ids: every token so far, `(batch, seq)`: those in the cache and those chosen but not yet fed.
        attention_mask: `(batch, seq)`, needed where rows are padded.
        position_ids: `(batch, seq)`, where they are not simply counted from the mask.
        logits: of the last forward pass, `(batch, vocab)` or `(batch, seq, vocab)`. Give them where every token
            of `input_ids` is in the cache already, so that the next one is chosen from them; without them the
            last token is computed again.
        prompt_length: how many tokens were the prompt; all of them by default.
        inputs: other arguments of the forward pass that later steps take: `encoder_outputs` and the encoder's
            `attention_mask`, say, where `input_ids` are the decoder's.
        tokenizer: as in `capture`.
        weights: as in `capture`.

    Returns:
        The snapshot. It shares memory with the cache.

    Raises:
        UnsupportedModelError: the cache cannot be kept.
        IncompleteStateError: cache and tokens do not belong together.

    Example:
        >>> out = model(input_ids, past_key_values=cache)  # doctest: +SKIP
        >>> input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=-1)  # doctest: +SKIP
        >>> snapshot = sq.snapshot_of(model, cache, input_ids)  # doctest: +SKIP
    """
    from semq_state.caches import can_step_back, check_cache, dump_cache, mark_cache, n_cached
    from semq_state.generation.trees import take_apart

    inner = base_model(model)
    if input_ids.ndim != 2:
        raise IncompleteStateError("input_ids", expected="(batch, seq)", found=str(tuple(input_ids.shape)))
    cache = dump_cache(mark_cache(past_key_values, inner.config.model_type))
    counted, n_tokens = n_cached(cache), int(input_ids.shape[1])
    # Recurrent states do not count; without logits the last token is one that they have not seen.
    cached = n_tokens - (logits is None) if counted is None else counted
    check_cache(cache, int(input_ids.shape[0]), cached)
    if cached > n_tokens:
        raise IncompleteStateError(
            "input_ids",
            expected=f"all {cached} tokens that the cache holds, and those chosen since",
            found=f"{n_tokens}",
            do="pass the whole sequence, prompt included",
        )
    if cached == n_tokens and logits is None and not can_step_back(cache, cached):
        raise IncompleteStateError(
            "logits",
            expected="those of the last token, which a full sliding window cannot give back",
            found="none",
            do="pass logits=, or take the snapshot when the next token is chosen",
        )
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    own = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in own.items():
        if tensor.shape[-1] != n_tokens:
            raise IncompleteStateError(
                name,
                expected=f"(batch, {n_tokens})",
                found=str(tuple(tensor.shape)),
                do="cover every token",
            )
    others, values = take_apart(inputs or {})
    if inner.config.is_encoder_decoder and "encoder_outputs" not in values:
        raise IncompleteStateError(
            "inputs",
            expected="encoder_outputs, to which the decoder attends",
            found=", ".join(inputs or ()) or "none",
            do="pass inputs={'encoder_outputs': …}",
        )
    return Snapshot(
        cache=cache,
        generation=GenerationState(
            input_ids=input_ids,
            prompt_length=n_tokens if prompt_length is None else prompt_length,
            n_cached=cached,
            finished=torch.zeros(input_ids.shape[0], dtype=torch.bool),
            logits=logits[:, -1] if logits is not None and logits.ndim == 3 else logits,
            step_inputs={**own, **others},
            step_values=values,
            rng=dump_rng(inner),
        ),
        provenance=fingerprint(inner, tokenizer, weights=weights, adapters_of=model),
    )
