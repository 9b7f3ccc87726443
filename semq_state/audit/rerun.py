"""What a snapshot says happened, run again: from its recorded start, or from nothing but its tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from transformers.utils import logging

from semq_state.capture.recorder import Recorder
from semq_state.capture.tracing import tracers
from semq_state.errors import UnsupportedOperationError
from semq_state.generation.seams import base_model, replaced
from semq_state.generation.settings import rebuild_config
from semq_state.generation.trees import put_together
from semq_state.restore import restore
from semq_state.restore.next_step import n_tokens as n_known
from semq_state.snapshot import Snapshot

Told = Callable[[int], None]
"""Called with the tokens of a row that are done."""

_GIVEN_AGAIN = ("attention_mask", "position_ids", "token_type_ids", "encoder_outputs")
_FOLLOWS = ("position_ids", "cache_position")
"""What `generate` makes by itself from the mask."""


class _Enough(Exception):  # noqa: N818
    """Ends a run at the moment that the snapshot shows."""


def continued(
    start: Snapshot,
    model: Any,
    n_tokens: int,
    *,
    allow: Collection[str] = (),
    given: Mapping[str, Any] | None = None,
    told: Told | None = None,
) -> Snapshot:
    """The state after `n_tokens` tokens of the run that went on from `start`, its random stream included.

    Args:
        start: an earlier state of the run.
        model: the model.
        n_tokens: of each row, those of `start` included.
        allow: as in `restore`.
        given: what settings cannot bring back: processors, an assistant model.
        told: called after each token.

    Raises:
        ModelMismatchError, UnsupportedOperationError, IncompleteStateError: as `restore`.
    """
    with warnings.catch_warnings():
        # Circumstances are the caller's to tell.
        warnings.simplefilter("ignore")
        resumed = restore(start, model, allow=allow)
    traces = start.trace is not None
    return _followed(model, start, n_tokens, lambda: resumed.generate(**(given or {})), told, traces=traces)


def recomputed(
    snapshot: Snapshot,
    model: Any,
    *,
    in_steps: bool = True,
    chunk: int | None = None,
    neighbours: torch.Tensor | None = None,
    told: Told | None = None,
) -> Snapshot:
    """The same tokens run from nothing: only what the model computes of them is new.

    Args:
        snapshot: whose tokens.
        model: the model.
        in_steps: the prompt at once and then token by token, as `generate` does; else all tokens at once.
        chunk: tokens at a time where they are computed at once.
        neighbours: rows of tokens `(n, seq)` that are computed along in the same batch.
        told: called after each token.

    Raises:
        UnsupportedOperationError: the snapshot does not hold all that went in (an image, tokens before a cache that
            was given, a beam search's turns).
    """
    state = snapshot.generation
    require_known_inputs(snapshot, model)
    generator = _generator(model, state.generator)
    # Without a cache every step reads all tokens again.
    n_fed = max(1, state.n_cached if snapshot.cache.all_layers() else snapshot.n_tokens - 1)
    # One more token is chosen than is in the cache, as in every loop; where the last is in, it is any.
    n_end = n_fed + 1
    n_first = min(state.prompt_length, n_fed) if in_steps else n_fed
    ids = state.input_ids.to(generator.device)
    config = rebuild_config(state.config)
    config.update(
        do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=None, min_new_tokens=None,
        min_length=None, max_length=n_end + 1, max_time=None, stop_strings=None, eos_token_id=None,
        prompt_lookup_num_tokens=None, return_dict_in_generate=False, guidance_scale=None,
        prefill_chunk_size=config.prefill_chunk_size if in_steps else chunk,
        use_cache=True if not state.config else state.config.get("use_cache"),
    )  # fmt: skip
    inputs = _inputs(snapshot, generator, n_first)
    if neighbours is not None:
        inputs, ids = _beside(inputs, ids, neighbours.to(ids.device))
    forced = _Forced(ids)
    call = {**inputs, "generation_config": config, "logits_processor": [forced]}
    # The settings are resolved; the model's defaults of today must not fill their gaps.
    with replaced(generator, {"generation_config": type(config)()}):
        made = _followed(model, snapshot, n_end, lambda: generator.generate(**call), told, traces=True)
    return _like(made, snapshot)


def _followed(
    model: Any, snapshot: Snapshot, n_tokens: int, run: Callable[[], Any], told: Told | None, *, traces: bool
) -> Snapshot:
    """The state of a run at the moment at which it has `n_tokens` tokens, or where it ended before."""
    path = snapshot.generation.generator
    generator = _generator(model, path)

    def on_step() -> None:
        n_done = int(recorder.last.input_ids.shape[1]) if recorder.last else 0
        if told:
            told(n_done)
        if n_done >= n_tokens or recorder.refused:
            raise _Enough

    tracer = tracers({"": generator})[""] if traces and snapshot.trace is not None else None
    recorder = Recorder(generator, on_step, tells=False, tracer=tracer)
    with _quiet(), replaced(generator, recorder.replacements()), torch.no_grad():
        try:
            if tracer:
                with tracer.listening():
                    run()
            else:
                run()
        except _Enough:
            pass
    return recorder.snapshot(snapshot.provenance, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Remarks on how tokens are given and settings set are about the recorded run, not about this one."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


class _Forced:
    """A logits processor that leaves nothing but the recorded token."""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self._ids = input_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        n = input_ids.shape[1]
        forced = torch.full_like(scores, float("-inf"))
        chosen = self._ids[:, n : n + 1] if n < self._ids.shape[1] else torch.zeros_like(self._ids[:, :1])
        return forced.scatter(1, chosen, 0.0)


def _like(made: Snapshot, recorded: Snapshot) -> Snapshot:
    """What was computed again, in the form of what was recorded."""
    old, new = recorded.generation, made.generation
    n = recorded.batch_size
    if made.batch_size > n:
        made = dataclasses.replace(made, generation=dataclasses.replace(new, processors=()))
        made = made.select(range(n))
        new = made.generation
    return dataclasses.replace(
        made,
        generation=dataclasses.replace(
            old, input_ids=new.input_ids[:, : old.input_ids.shape[1]], n_cached=new.n_cached, logits=new.logits
        ),
        checkpoints=(),
    )


def _inputs(snapshot: Snapshot, model: Any, n_tokens: int) -> dict[str, Any]:
    """What `generate` is given for the first `n_tokens` tokens."""
    state = snapshot.generation
    tensors = {name: t.to(model.device) for name, t in state.step_inputs.items()}
    inputs = put_together(tensors, state.step_values)
    ids = state.input_ids[:, :n_tokens].to(model.device)
    if model.config.is_encoder_decoder:
        names: tuple[str, ...] = ("encoder_outputs", "attention_mask")
        given = {name: inputs[name] for name in names if name in inputs}
        return {**given, "decoder_input_ids": ids}
    mask = inputs.get("attention_mask")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask[:, :n_tokens]}


def _beside(
    inputs: dict[str, Any], ids: torch.Tensor, neighbours: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """The same with more rows in the batch."""
    if "input_ids" not in inputs:
        raise UnsupportedOperationError(
            "neighbours", expected="a decoder alone", found="an encoder's outputs", do="vary something else"
        )
    n = inputs["input_ids"].shape[1]
    all_ids = torch.cat([ids, neighbours[:, : ids.shape[1]]])
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(neighbours), n)])
    return {"input_ids": all_ids[:, :n], "attention_mask": mask}, all_ids


def require_known_inputs(snapshot: Snapshot, model: Any) -> None:
    """Refuses a state that does not follow from the tokens that it names.

    Raises:
        UnsupportedOperationError: it does not.
    """
    state = snapshot.generation
    inputs = {name.partition(".")[0] for name in state.step_inputs}
    is_pair = _generator(model, state.generator).config.is_encoder_decoder
    expected = {*_GIVEN_AGAIN, *_FOLLOWS, *(("decoder_attention_mask",) if is_pair else ())}
    found = ""
    if state.search:
        found = "the beams of a search, whose turns are not recorded"
    elif state.companions:
        found = f"caches that decode along ({', '.join(sorted(state.companions))})"
    elif n_known(snapshot) != snapshot.n_tokens and state.n_cached != snapshot.n_tokens:
        found = "tokens in the cache that it does not name"
    elif state.attributes or inputs - expected:
        names = ", ".join(sorted({*state.attributes, *inputs} - expected))
        found = f"inputs that were used up or are not text ({names})"
    elif state.generator:
        found = "a part of a model, whose inputs the whole had made"
    if found:
        raise UnsupportedOperationError(
            "replay from the tokens",
            expected="a state that follows from its tokens",
            found=found,
            do="replay from a recorded start instead",
        )


def _generator(model: Any, path: str) -> Any:
    inner = base_model(model)
    return inner.get_submodule(path) if path else inner
