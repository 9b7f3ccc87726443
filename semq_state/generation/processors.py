"""The state of logits processors and stopping criteria, taken and put back.

An object that remembers something from step to step says so with two methods, as a torch module does:
`state_dict()`, whose values are tensors and plain values, and `load_state_dict(state)`. Those of transformers'
own that remember something are listed here. Any other object is watched: if its attributes change while it
runs and it has no `state_dict`, a snapshot would be incomplete and is refused.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers.generation import stopping_criteria as stopping
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    SynthIDTextWatermarkState,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from semq_state.errors import IncompleteStateError
from semq_state.generation.companions import dump_guidance, restore_guidance
from semq_state.provenance import plain
from semq_state.snapshot import ProcessorState

_PLAIN = (type(None), bool, int, float, str)


def dump_processors(role: str, processors: Iterable[Any], given: Collection[Any]) -> Iterator[ProcessorState]:
    """What each of `processors` remembers. Of those that the caller passed at least the name is kept: settings
    cannot bring them back, and a run without them would go another way.

    Args:
        role: `logits` or `stopping`.
        processors: all that the run uses.
        given: those of them that the caller passed.

    """
    for processor in processors:
        state = dump_processor(role, processor)
        passed = any(processor is one for one in given)
        if state is None and (passed or isinstance(processor, PrefixConstrainedLogitsProcessor)):
            state = ProcessorState(role, type(processor).__name__)
        if state is not None:
            yield state


def dump_processor(role: str, processor: Any) -> ProcessorState | None:
    """What `processor` remembers; None where it remembers nothing.

    Args:
        role: `logits` or `stopping`.
    """
    name = type(processor).__name__
    if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
        return dump_guidance(processor)
    if isinstance(processor, stopping.MaxTimeCriteria):
        return ProcessorState(role, name, {}, {"elapsed": time.time() - processor.initial_timestamp})
    if isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
        state = processor.state
        if state is None:
            return None
        tensors = {
            "context": state.context.clone(),
            "context_history": state.context_history.clone(),
        }
        return ProcessorState(role, name, tensors, {"num_calls": state.num_calls})
    if not _has_protocol(processor):
        return None
    tensors, meta = {}, {}
    for key, value in processor.state_dict().items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().clone()
        else:
            meta[key] = plain(value)
    return ProcessorState(role, name, tensors, meta)


def restore_processor(state: ProcessorState, processor: Any, batch_size: int) -> None:
    """The inverse of `dump_processor`, on a fresh processor of the same class.

    Raises:
        IncompleteStateError: the state does not fit it.
    """
    try:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            restore_guidance(state, processor)
        elif isinstance(processor, stopping.MaxTimeCriteria):
            processor.initial_timestamp = time.time() - float(state.meta["elapsed"])
        elif isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
            history = state.tensors["context_history"]
            device = processor.device
            processor.state = SynthIDTextWatermarkState(
                batch_size, state.tensors["context"].shape[1], history.shape[1], device
            )
            processor.state.context = state.tensors["context"].to(device)
            processor.state.context_history = history.to(device)
            processor.state.num_calls = state.meta["num_calls"]
        else:
            processor.load_state_dict({**state.tensors, **state.meta})
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise IncompleteStateError(
            f"state of {state.name}",
            expected="what this processor can load",
            found=f"{type(error).__name__}: {error}",
            do="pass the same processor as in the recorded run",
        ) from error


def restore_processors(
    states: Sequence[ProcessorState], role: str, processors: Iterable[Any], batch_size: int
) -> None:
    """Gives each recorded state of `role` to the processor of the same class, in order; tells what is left over."""
    free = list(processors)
    for state in states:
        if state.role != role:
            continue
        match = next((p for p in free if type(p).__name__ == state.name), None)
        if match is None:
            warnings.warn(
                f"the recorded run used {state.name}, which was not passed again: what comes next will differ",
                stacklevel=4,
            )
            continue
        free.remove(match)
        if state.tensors or state.meta:
            restore_processor(state, match, batch_size)


class Watch:
    """Tells which objects changed their attributes since the watch began, as far as plain values show."""

    def __init__(self, processors: Iterable[Any]) -> None:
        own = "transformers."
        self._watched = [
            (p, _attributes(p))
            for p in processors
            if not _has_protocol(p) and not type(p).__module__.startswith((own, "semq_state."))
        ]

    def check(self) -> None:
        """Refuses if a watched object changed.

        Raises:
            IncompleteStateError: it did, and cannot say how to save that.
        """
        for processor, before in self._watched:
            after = _attributes(processor)
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            if changed:
                raise IncompleteStateError(
                    type(processor).__name__,
                    expected="a processor without memory, or one with state_dict() and load_state_dict()",
                    found=f"changes in {', '.join(changed)} while it ran",
                    do="give it the two methods, so that its state can be kept",
                )


def _has_protocol(processor: Any) -> bool:
    return callable(getattr(processor, "state_dict", None)) and callable(
        getattr(processor, "load_state_dict", None)
    )


def _attributes(processor: Any) -> dict[str, Any]:
    return {name: _shown(value) for name, value in getattr(processor, "__dict__", {}).items()}


def _shown(value: Any) -> Any:
    """A value to compare: by content where that is cheap, else by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        version = None if value.is_inference() else value._version
        return id(value), version, tuple(value.shape)
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 1 << 16:
        return type(value).__name__, [_shown(item) for item in value]
    if isinstance(value, dict) and len(value) <= 1 << 16:
        return [(_shown(key), _shown(item)) for key, item in value.items()]
    return id(value)
