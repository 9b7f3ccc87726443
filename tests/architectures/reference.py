"""transformers' own continuation in memory: what decides what is possible."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES

SETTINGS = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
N_NEW, STOP_AFTER = 12, 5


def uninterrupted(model: Any, inputs: Mapping[str, Any]) -> Any:
    """All `N_NEW` tokens in one piece, with the raw logits of each."""
    torch.manual_seed(1)
    return model.generate(**copy.deepcopy(dict(inputs)), **SETTINGS, max_new_tokens=N_NEW)


def continued_in_memory(model: Any, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The logits after the first `STOP_AFTER` tokens, from a deep copy of the loop's state at that moment."""
    taken: list[Any] = []
    original = model._update_model_kwargs_for_generation

    def take(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        updated = original(outputs, model_kwargs, *args, **kwargs)
        taken.append(copy.deepcopy(dict(updated)) if len(taken) == STOP_AFTER - 1 else None)
        return updated

    model._update_model_kwargs_for_generation = take
    try:
        torch.manual_seed(1)
        out = model.generate(**copy.deepcopy(dict(inputs)), **SETTINGS, max_new_tokens=STOP_AFTER)
    finally:
        del model._update_model_kwargs_for_generation
    ids, model_kwargs = out.sequences, taken[-1]
    logits = []
    with torch.no_grad():
        while len(logits) < N_NEW - STOP_AFTER:
            with_cache = model_kwargs.get("use_cache") and any(
                model_kwargs.get(n) is not None for n in ALL_CACHE_NAMES
            )
            step = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if with_cache else None, **model_kwargs
            )
            outputs = model(**step, return_dict=True)
            model_kwargs = original(outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder)
            logits.append(outputs.logits[:, -1].float())
            ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], dim=-1)
    return logits
