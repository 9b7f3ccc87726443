"""Is this the model that the snapshot came from, and is the snapshot whole? Asked before anything is built."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Collection
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES

from semq_state.caches import can_step_back, check_cache, expected_layers, n_cached
from semq_state.errors import Difference, IncompleteStateError, ModelMismatchError
from semq_state.fingerprint import fingerprint
from semq_state.generation.companions import ASSISTANT, GUIDANCE
from semq_state.generation.seams import generators
from semq_state.generation.trees import put_together
from semq_state.provenance import IDENTITY, advice, identity_differences
from semq_state.restore.beams import check_search
from semq_state.restore.next_step import n_tokens
from semq_state.snapshot import ABSENT, CacheState, GenerationState, Snapshot

_HEADS = ("num_key_value_heads", "head_dim")


def check_model(
    snapshot: Snapshot,
    model: Any,
    *,
    tokenizer: Any = None,
    allow: Collection[str] = (),
    wrapper: Any = None,
) -> tuple[Difference, ...]:
    """Compares a live model with the one in the provenance.

    Args:
        snapshot: the state to go on with.
        model: the `PreTrainedModel` that shall go on.
        tokenizer: compared where both sides have one.
        allow: names of `IDENTITY` whose differences are accepted; `weights` here also spares reading them.
        wrapper: the wrapper that holds `model`'s adapters, if any.

    Returns:
        The accepted differences.

    Raises:
        ModelMismatchError: something differs that was not allowed; it lists all of it.
        ValueError: `allow` has an unknown name.
    """
    if isinstance(allow, str) or set(allow) - set(IDENTITY):
        raise ValueError(f"`allow` takes names of {IDENTITY} in a tuple, got {allow!r}")
    expected = snapshot.provenance
    mode = {"sha256": "full", "sampled": "sampled"}.get(expected.weights.partition(":")[0], "")
    if not mode and "weights" not in allow:
        raise IncompleteStateError(
            "provenance",
            expected="a digest of the weights",
            found=repr(expected.weights[:40]),
            do="pass allow=('weights',) to continue without knowing that this model made the state",
        )
    found = fingerprint(model, tokenizer, weights="" if "weights" in allow else mode, adapters_of=wrapper)
    differences = tuple(identity_differences(expected, found))
    refused = [d for d in differences if d.name.partition(".")[0] not in allow]
    if refused:
        names = sorted({d.name.partition(".")[0] for d in refused})
        raise ModelMismatchError(
            refused,
            do=f"use the model that made it, or accept by name: restore(..., allow={tuple(names)!r})",
        )
    advised = list(advice(expected, found))
    if advised:
        warnings.warn(
            "the state was taken under other circumstances, the last bits of what comes next may differ: "
            + "; ".join(map(str, advised)),
            stacklevel=3,
        )
    return tuple(d for d in differences if d.name != "weights" or "weights" not in allow)


def check_goes_on(snapshot: Snapshot) -> None:
    """Refuses what was never meant to go on.

    Raises:
        IncompleteStateError: it holds hidden states alone.
    """
    if snapshot.cache.kind == ABSENT:
        raise IncompleteStateError(
            "cache",
            expected="a state of a generation",
            found="hidden states alone",
            do="read them from snapshot.hidden; to go on, capture model.generate and keep its cache",
        )


def check_state(snapshot: Snapshot, model: Any) -> None:
    """Refuses a snapshot whose parts contradict each other or this model's shape.

    Args:
        snapshot: the state to go on with.
        model: the `PreTrainedModel`.

    Raises:
        IncompleteStateError: they do.
        UnsupportedModelError: a part is of an unknown kind.
    """
    state = snapshot.generation
    model = _generator(model, state.generator)
    decoder = model.config.get_text_config(decoder=True)
    vocabulary = _vocabulary(model, decoder)

    def require(holds: bool, where: str, expected: str, found: Any) -> None:
        if not holds:
            raise IncompleteStateError(
                where,
                expected=expected,
                found=str(found),
                do="take the snapshot again, or use another copy",
            )

    ids = state.input_ids
    require(ids.ndim == 2 and ids.dtype == torch.int64 and ids.numel() > 0, "input_ids", "(batch, seq) int64",
            (tuple(ids.shape), ids.dtype))  # fmt: skip
    batch = snapshot.batch_size
    low, high = int(ids.min()), int(ids.max())
    require(
        low >= 0 and (vocabulary is None or high < vocabulary),
        "input_ids",
        f"tokens below {vocabulary}",
        f"{low} to {high}",
    )
    require(
        type(state.prompt_length) is int and 0 <= state.prompt_length <= ids.shape[1],
        "prompt_length", f"0 to {ids.shape[1]}", state.prompt_length,
    )  # fmt: skip
    require(type(state.n_cached) is int and state.n_cached >= 0, "n_cached", "a count", state.n_cached)
    require(state.finished.shape == (batch,) and state.finished.dtype == torch.bool, "finished",
            f"({batch},) bool", (tuple(state.finished.shape), state.finished.dtype))  # fmt: skip
    if state.logits is not None:
        width = getattr(_output_embeddings(model), "out_features", None)
        shape = tuple(state.logits.shape)
        require(len(shape) >= 2 and shape[0] == batch and width in (None, shape[-1]), "logits",
                f"{(batch, width or 'vocab')}", shape)  # fmt: skip
    for name, tensor in state.step_inputs.items():
        require(tensor.ndim > 0 or not name.endswith(("_ids", "_mask")), f"input {name!r}", "a token axis",
                tuple(tensor.shape))  # fmt: skip
    n_all = n_tokens(snapshot)
    inputs = _inputs(state)
    name = "attention_mask"
    if model.config.is_encoder_decoder:
        name = "decoder_attention_mask"
        outputs = inputs.get("encoder_outputs")
        hidden = outputs[0] if outputs else None
        require(isinstance(hidden, torch.Tensor) and hidden.shape[0] == batch, "encoder_outputs",
                f"the encoder's outputs for {batch} rows",
                None if not isinstance(hidden, torch.Tensor) else tuple(hidden.shape))  # fmt: skip
    mask = inputs.get(name)
    require(mask is None or (isinstance(mask, torch.Tensor) and tuple(mask.shape) == (batch, n_all)), name,
            f"{(batch, n_all)}", None if mask is None else getattr(mask, "shape", mask))  # fmt: skip
    _check_lengths(snapshot.cache, decoder, n_all)
    check_cache(snapshot.cache, batch, state.n_cached)
    require(state.n_cached <= n_all, "n_cached", f"at most {n_all} tokens", state.n_cached)
    require(state.cache_argument in ALL_CACHE_NAMES, "cache_argument", f"one of {', '.join(ALL_CACHE_NAMES)}",
            repr(state.cache_argument))  # fmt: skip
    _check_companions(state, model, require)
    if state.search:
        check_search(state)
    require("cpu" in state.rng, "random state", "that of the CPU", ", ".join(state.rng) or None)
    require(state.n_cached < n_all or state.logits is not None or can_step_back(snapshot.cache, state.n_cached),
            "logits", "those of the last token, which the cache cannot give back", None)  # fmt: skip
    _check_layout(snapshot, model, decoder, require)


def _check_companions(state: GenerationState, model: Any, require: Any) -> None:
    taken = inspect.signature(model.forward).parameters
    others = sorted(set(state.companions) - {GUIDANCE, ASSISTANT} - set(taken))
    require(not others, "companions", "those that the model takes", ", ".join(others))
    for companion in state.companions.values():
        counted = n_cached(companion)
        check_cache(companion, _rows_of(companion), counted or 0, "companion")


def _generator(model: Any, path: str) -> Any:
    if not path:
        return model
    found = generators(model).get(path)
    if found is None:
        raise IncompleteStateError(
            "generator", expected="a part of the model that generates", found=f"{path!r:.80}", do="use another copy"
        )
    return found


def _inputs(state: GenerationState) -> dict[str, Any]:
    return put_together(state.step_inputs, state.step_values)


def _output_embeddings(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _vocabulary(model: Any, decoder: Any) -> int | None:
    found = getattr(decoder, "vocab_size", None)
    if found is None:
        with contextlib.suppress(NotImplementedError):
            found = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return found if isinstance(found, int) else None


def _rows_of(cache: CacheState) -> int:
    for layer in cache.all_layers():
        for name, tensor in layer.tensors.items():
            axis = layer.layout.of(name).batch_axis
            if axis is not None and tensor.ndim > axis:
                return int(tensor.shape[axis])
    return 0


def _check_lengths(cache: CacheState, decoder: Any, n_all: int) -> None:
    """Buffers are made as long as the file says: no longer than a model of this size has use for."""
    positions = getattr(decoder, "max_position_embeddings", None)
    most = max(positions if isinstance(positions, int) else 0, 4 * n_all, 1 << 15)
    for i, layer in enumerate(cache.all_layers()):
        total = sum(int(layer.meta.get(name, 0)) for name in ("max_length", "max_prefill"))
        if total > most:
            raise IncompleteStateError(
                f"layer {i}",
                expected=f"a buffer of at most {most} tokens",
                found=str(total),
                do="no run of this model makes such a state; do not trust the file",
            )


def _check_layout(snapshot: Snapshot, model: Any, decoder: Any, require: Any) -> None:
    """Holds layers, heads, widths and windows against the cache that the model would make itself."""
    cache = snapshot.cache.parts.get("self", snapshot.cache)
    if cache.kind not in ("dynamic", "static") or cache.meta.get("grows"):
        return
    fresh = expected_layers(model, cache.kind)
    if fresh is None:
        return
    require(len(cache.layers) == len(fresh), "cache", f"{len(fresh)} layers", len(cache.layers))
    for i, (layer, expected) in enumerate(zip(cache.layers, fresh, strict=True)):
        name, window = expected
        require(layer.family == name, f"layer {i}", f"a {name!r} layer", repr(layer.family))
        if window is not None and "window" in layer.meta:
            require(layer.meta["window"] == window, f"layer {i}", f"a window of {window}", layer.meta["window"])
    # Where a configuration has several counts of heads, only the model knows which layer has which.
    names = decoder.to_dict()
    several = [n for n in names if n.endswith(("num_key_value_heads", "head_dim")) and n not in _HEADS]
    if several or "kv_lora_rank" in names:
        return
    for i, (layer, own) in enumerate(zip(cache.layers, decoder.per_layer_config, strict=False)):
        shape = tuple(getattr(own, name, None) for name in _HEADS)
        if layer.is_fixed or "keys" not in layer.tensors or not all(isinstance(n, int) for n in shape):
            continue
        if layer.family in ("dynamic", "sliding", "static", "static-sliding"):
            keys = layer.tensors["keys"]
            require((keys.shape[1], keys.shape[-1]) == shape, f"layer {i}, keys", f"{shape} heads and head_dim",
                    (keys.shape[1], keys.shape[-1]))  # fmt: skip
