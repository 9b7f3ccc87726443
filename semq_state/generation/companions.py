"""Those that decode along with a model and have caches of their own: guidance's second prompt, an assistant.

`transformers` makes each anew at every call of `generate`; what they remember is taken from the live object and put
into the fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from semq_state.errors import IncompleteStateError, UnsupportedOperationError
from semq_state.generation.trees import put_together, take_apart
from semq_state.snapshot import ProcessorState

GUIDANCE = "guidance"
ASSISTANT = "assistant"
ROLE = "candidates"


def guidance_of(processors: Iterable[Any]) -> Any:
    """The guidance among a run's processors, or None."""
    kind = UnbatchedClassifierFreeGuidanceLogitsProcessor
    return next((p for p in processors if isinstance(p, kind)), None)


def dump_guidance(guidance: Any) -> ProcessorState:
    """What guidance remembers besides its cache."""
    context = guidance.unconditional_context
    names = ("input_ids", "attention_mask")
    tensors = {name: context[name] for name in names if context[name] is not None}
    return ProcessorState("logits", type(guidance).__name__, tensors, {"first_pass": context["first_pass"]})


def restore_guidance(state: ProcessorState, guidance: Any) -> None:
    """The inverse of `dump_guidance`. The cache has to be given to it besides."""
    device = guidance.model.device
    guidance.unconditional_context |= {name: t.to(device) for name, t in state.tensors.items()}
    guidance.unconditional_context["first_pass"] = bool(state.meta["first_pass"])


def check_candidates(generator: CandidateGenerator) -> None:
    """Refuses a way of guessing tokens whose state cannot be kept.

    Raises:
        UnsupportedOperationError: neither prompt look-up nor an assistant with the same tokens.
    """
    if type(generator) not in (PromptLookupCandidateGenerator, AssistedCandidateGenerator):
        raise UnsupportedOperationError(
            "assisted generation",
            expected="prompt look-up, or an assistant model with the same tokenizer",
            found=type(generator).__name__,
            do="generate without it; its candidates cannot be kept",
        )


def settle_assistant(generator: Any, input_ids: torch.Tensor) -> None:
    """Has an assistant drop its refused candidates now instead of before its next ones: it comes to the same, and
    its windows are then as small as they can be."""
    if type(generator) is AssistedCandidateGenerator:
        generator._update_past_and_masks(input_ids.to(generator.assistant_model.device))


def assistant_cache(generator: Any) -> Any:
    """The assistant's own cache, or None."""
    if type(generator) is not AssistedCandidateGenerator:
        return None
    return generator.assistant_kwargs.get("past_key_values")


def dump_candidates(generator: CandidateGenerator) -> ProcessorState:
    """What a candidate generator remembers besides its cache.

    Raises:
        IncompleteStateError: the assistant was given something that cannot be kept.
    """
    name = type(generator).__name__
    if type(generator) is not AssistedCandidateGenerator:
        return ProcessorState(ROLE, name)
    inputs = {k: v for k, v in generator.assistant_kwargs.items() if k != "past_key_values"}
    tensors, values = take_apart(inputs)
    threshold = generator.assistant_generation_config.assistant_confidence_threshold
    meta = {
        "values": values,
        "n_candidates": float(generator.num_assistant_tokens),
        "threshold": None if threshold is None else float(threshold),
        "probs": [float(p) for p in getattr(generator, "probs", ())],
        "matches": [int(m) for m in getattr(generator, "matches", ())],
    }
    return ProcessorState(ROLE, name, tensors, meta)


def restore_candidates(state: ProcessorState, generator: CandidateGenerator, cache: Any) -> None:
    """The inverse of `dump_candidates`, on the generator that this call has made.

    Raises:
        IncompleteStateError: the state does not fit it.
    """
    if type(generator) is not AssistedCandidateGenerator:
        return
    device = generator.assistant_model.device
    try:
        tensors = {name: t.to(device) for name, t in state.tensors.items()}
        generator.assistant_kwargs = {**put_together(tensors, state.meta["values"]), "past_key_values": cache}
        generator.num_assistant_tokens = state.meta["n_candidates"]
        if float(generator.num_assistant_tokens).is_integer():
            generator.num_assistant_tokens = int(generator.num_assistant_tokens)
        generator.assistant_generation_config.assistant_confidence_threshold = state.meta["threshold"]
        generator.generation_config.assistant_confidence_threshold = state.meta["threshold"]
        if hasattr(generator, "probs"):
            generator.probs, generator.matches = list(state.meta["probs"]), list(state.meta["matches"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IncompleteStateError(
            "state of the assistant",
            expected="what this assistant can take",
            found=f"{type(error).__name__}: {error}",
            do="pass the same assistant_model as in the recorded run",
        ) from error
