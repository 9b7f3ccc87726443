"""The trace of tokens that are known already, computed in a few forward passes instead of one a token."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from semq_state.audit.rerun import Told, require_known_inputs
from semq_state.capture.tracing import TOP_K, tracers
from semq_state.errors import UnsupportedOperationError
from semq_state.generation.seams import base_model
from semq_state.sketch import sketch_rule, sketched
from semq_state.snapshot import Snapshot, Trace

_PIECE = 256  # tokens whose logits are in memory at a time


@torch.no_grad()
def traced_at_once(snapshot: Snapshot, model: Any, *, told: Told | None = None) -> Trace:
    """What `capture(trace=True)` would have noted of a state's tokens, were they run under this model.

    All tokens before a piece are in the cache by then, so this costs a prefill, not a generation. Its numbers are
    those of longer forward passes and differ in the last bits from those of single steps.

    Args:
        snapshot: with the tokens, and with a trace that says which of them.
        model: the model.
        told: called after each piece with the tokens of a row that are done.

    Raises:
        UnsupportedOperationError: the snapshot has no trace, or does not hold all that went in, or the model takes
            its tokens otherwise than a plain decoder.
    """
    if snapshot.trace is None:
        raise UnsupportedOperationError(
            "trace", expected="a snapshot with a trace", found="none", do="capture with trace=True"
        )
    inner = base_model(model)
    require_known_inputs(snapshot, inner)
    taken = inspect.signature(inner.forward).parameters
    if inner.config.is_encoder_decoder or "past_key_values" not in taken:
        raise UnsupportedOperationError(
            "trace", expected="a plain decoder", found=type(inner).__name__, do="replay the trace in steps"
        )
    tracer = tracers({"": inner})[""]
    begin, end = snapshot.trace.begin, snapshot.trace.begin + snapshot.trace.n_tokens
    ids = snapshot.generation.input_ids.to(inner.device)
    mask = snapshot.generation.step_inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(inner.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = None, []
    bounds = [0, *range(begin - 1, end - 1, _PIECE), end - 1]
    for at, to in itertools.pairwise(bounds):
        if at == to:
            continue
        inputs = {
            "input_ids": ids[:, at:to],
            "attention_mask": mask[:, :to],
            "position_ids": positions[:, at:to],
            "past_key_values": cache,
            "logits_to_keep": 1 if to < begin else to - at,
        }
        with tracer.listening(whole=True):
            outputs = inner(**{n: v for n, v in inputs.items() if n in taken}, use_cache=True, return_dict=True)
        cache = outputs.past_key_values
        if to >= begin:
            hidden = tracer.heard()
            n = min(to - at, hidden.shape[1])
            parts.append(
                (outputs.logits[:, -n:].float().topk(min(TOP_K, outputs.logits.shape[-1])), hidden[:, -n:])
            )
        if told:
            told(to)
    return _trace(snapshot, parts, ids[:, begin:end].cpu())


def _trace(snapshot: Snapshot, parts: list[tuple[Any, torch.Tensor]], tokens: torch.Tensor) -> Trace:
    assert snapshot.trace is not None
    hidden = torch.cat([part for _, part in parts], dim=1)
    norms, prints = sketched(hidden.flatten(0, 1))
    n_rows, n = tokens.shape
    return Trace(
        snapshot.trace.begin,
        tokens,
        torch.cat([top.indices for top, _ in parts], dim=1).to("cpu", torch.int32),
        torch.cat([top.values for top, _ in parts], dim=1).cpu(),
        norms.reshape(n_rows, n),
        prints.reshape(n_rows, n, -1),
        sketch_rule(int(hidden.shape[-1])),
        snapshot.trace.rng,
    )
