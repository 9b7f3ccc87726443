"""Is this the model that the snapshot came from, and is the snapshot whole? Asked before anything is built."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch

from semq_state.caches import can_step_back, check_cache
from semq_state.errors import Difference, IncompleteStateError, ModelMismatchError
from semq_state.fingerprint import fingerprint
from semq_state.provenance import IDENTITY, advice, identity_differences
from semq_state.restore.continuation import n_tokens
from semq_state.snapshot import Snapshot


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


def check_state(snapshot: Snapshot, model: Any) -> None:
    """Refuses a snapshot whose parts contradict each other or this model's shape.

    Raises:
        IncompleteStateError: they do.
        UnsupportedModelError: a part is of an unknown kind.
    """
    state = snapshot.generation
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

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
        low >= 0 and high < vocabulary,
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
        head = model.get_output_embeddings()
        shape = (batch, getattr(head, "out_features", vocabulary))
        require(tuple(state.logits.shape) == shape, "logits", f"{shape}", tuple(state.logits.shape))
    for name, tensor in state.step_inputs.items():
        require(
            tensor.ndim > 0 and tensor.shape[-1] >= 1,
            f"input {name!r}",
            "a token axis",
            tensor.shape,
        )
    mask, n_all = state.step_inputs.get("attention_mask"), n_tokens(snapshot)
    require(mask is None or tuple(mask.shape) == (batch, n_all), "attention_mask", f"{(batch, n_all)}",
            None if mask is None else tuple(mask.shape))  # fmt: skip
    check_cache(snapshot.cache, batch, state.n_cached)
    require(state.n_cached <= n_all, "n_cached", f"at most {n_all} tokens", state.n_cached)
    require("cpu" in state.rng, "random state", "that of the CPU", ", ".join(state.rng) or None)
    require(state.n_cached < n_all or state.logits is not None or can_step_back(snapshot.cache), "logits",
            "those of the last token, which the cache cannot give back", None)  # fmt: skip
    _check_heads(snapshot, model, require)


def _check_heads(snapshot: Snapshot, model: Any, require: Any) -> None:
    """Holds heads and widths against the configuration where it states them plainly."""
    config = model.config.get_text_config(decoder=True)
    layers = snapshot.cache.layers
    if layers and not snapshot.cache.meta.get("grows"):
        require(len(layers) == config.num_hidden_layers, "cache", f"{config.num_hidden_layers} layers",
                len(layers))  # fmt: skip
    heads, width = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(width, int) or hasattr(config, "kv_lora_rank"):
        return
    per_layer = getattr(config, "per_layer_config", None) or [config] * len(layers)
    for i, (layer, own) in enumerate(zip(layers, per_layer, strict=False)):
        expected = (getattr(own, "num_key_value_heads", heads), getattr(own, "head_dim", width))
        for name, tensor in layer.tensors.items():
            found = (tensor.shape[1], tensor.shape[-1])
            require(found == expected, f"layer {i}, {name}", f"{expected} heads and head_dim", found)
