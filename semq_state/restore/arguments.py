"""What a resumed `generate` is asked for: the recorded settings, and the caller's on top."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from semq_state.errors import UnsupportedOperationError
from semq_state.generation.companions import ROLE
from semq_state.generation.settings import rebuild_config
from semq_state.snapshot import GenerationState

_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")


def recorded_config(state: GenerationState, n_tokens: int, n_appended: int) -> GenerationConfig:
    """The settings of the recorded run, for one that starts at `n_tokens`.

    Args:
        state: of the recorded run.
        n_tokens: tokens of each row now, those appended included.
        n_appended: tokens of the next turn, which gets the recorded run's budget anew.
    """
    config = rebuild_config(state.config)
    # These were resolved to absolute lengths when the recorded run began.
    config.max_new_tokens = config.min_new_tokens = None
    # Its sequences are rows of the batch by now.
    if not state.search:
        config.num_return_sequences = None
    if n_appended:
        budget = (config.max_length or 0) - state.prompt_length
        config.max_length, config.min_length = n_tokens + budget, None
    return config


def from_here(config: GenerationConfig, n_tokens: int) -> None:
    """Makes counts of new tokens absolute lengths, counted from here."""
    if config.max_new_tokens is not None:
        config.max_length, config.max_new_tokens = n_tokens + config.max_new_tokens, None
    if config.min_new_tokens is not None:
        config.min_length, config.min_new_tokens = n_tokens + config.min_new_tokens, None


def is_assisted(given: Mapping[str, Any], config: Any) -> bool:
    """Whether `generate` will guess tokens and check them."""
    if given.get("assistant_model") is not None:
        return True
    return any(given.get(name, getattr(config, name, None)) is not None for name in _ASSISTED)


def check_arguments(state: GenerationState, given: Mapping[str, Any], config: Any, *, appends: bool) -> None:
    """Refuses what contradicts the state, and warns of an assistant that is missing.

    Raises:
        UnsupportedOperationError: another number of sequences or another search is asked for.
    """
    n_beams = int(state.config.get("num_beams") or 1)
    usual = {"num_beams": n_beams} if state.search else {"num_beams": 1, "num_return_sequences": 1}
    for name, expected in usual.items():
        value = given.get(name, getattr(config, name, None))
        if value is not None and value != expected:
            raise UnsupportedOperationError(
                f"resumed.generate({name}=…)",
                expected=repr(expected),
                found=repr(value),
                do="the state has a cache row for each of its sequences; branches come from resumed.fork",
            )
    if state.search and appends:
        raise UnsupportedOperationError(
            "resumed.generate(append=…)",
            expected="a state with one sequence for each prompt",
            found="the running beams of a search",
            do="finish the search first, and start the next turn from its result",
        )
    recorded = next((p.name for p in state.processors if p.role == ROLE), None)
    if recorded == "AssistedCandidateGenerator" and given.get("assistant_model") is None:
        warnings.warn(
            "the recorded run had an assistant_model, which was not passed again: what is sampled next will "
            "differ from it",
            stacklevel=4,
        )
