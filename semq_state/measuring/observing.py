"""What a model's cache holds after a text, and how much its next words depend on each number of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from semq_state.caches.cache import dump_cache, mark_cache, rebuild_cache
from semq_state.errors import CalibrationError
from semq_state.restore.devices import device_of
from semq_state.snapshot import CacheState, LayerState

_FED_AT_ONCE = 2048


@dataclass(frozen=True)
class Kept:
    """Layers whose keys and values can be coded together.

    Args:
        layers: their numbers.
        n_heads: KV heads.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        seq: tokens that they held, fewer than the text where a window dropped some.
    """

    layers: tuple[int, ...]
    n_heads: int
    key_dim: int
    value_dim: int
    seq: int


def prefilled(model: Any, ids: torch.Tensor) -> CacheState:
    """The cache after some tokens, `(1, n)`."""
    with torch.no_grad():
        cache = None
        for piece in ids.to(model.device).tensor_split(-(-ids.shape[1] // _FED_AT_ONCE), dim=1):
            cache = cache_of(model(piece, past_key_values=cache, use_cache=True, **_last_logits(model)), model)
    return dump_cache(mark_cache(cache, model.config.model_type))


def cache_of(output: Any, model: Any) -> Any:
    """The cache in a model's output.

    Raises:
        CalibrationError: there is none of keys and values.
    """
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise CalibrationError(
            f"{model.config.model_type} model",
            expected="layers with keys and values along the sequence",
            found="no cache of such",
            do="its states are saved exactly, or by codecs without a calibration",
        )
    return cache


def kept(state: CacheState) -> list[Kept]:
    """The sets of layers that have keys and values along the sequence, of one shape each."""
    sets: dict[tuple[int, ...], list[int]] = {}
    for i, layer in enumerate(state.layers):
        keys, values = layer.tensors.get("keys"), layer.tensors.get("values")
        layout = layer.layout
        if keys is None or values is None or not keys.is_floating_point() or keys.ndim != 4 or layer.is_fixed:
            continue
        along = layout.of("keys").token_axis == layout.of("values").token_axis == -2
        if along and keys.shape[:3] == values.shape[:3] and keys.shape[-1] + values.shape[-1] > 0:
            sets.setdefault((keys.shape[1], keys.shape[3], values.shape[3], keys.shape[2]), []).append(i)
    return [Kept(tuple(numbers), *shape) for shape, numbers in sets.items()]


def stacked(state: CacheState, of: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a set, float32 `(n_layers, 1, kv_heads, seq, dim)`."""
    layers = [state.layers[i].tensors for i in of.layers]
    keys, values = (torch.stack([layer[name].float().cpu() for layer in layers]) for name in ("keys", "values"))
    return keys, values


def gradients(
    model: Any, state: CacheState, continuation: torch.Tensor, *, skip: int, draws: int, seed: int
) -> list[CacheState]:
    """Draws of the gradient of what the model goes on with, by each number of its cache.

    The mean of its square is the diagonal of the Fisher information of the model's own next words, taken over the
    continuation: labels are drawn from the model itself, their log-likelihoods added with random signs, which
    keeps the products of different positions from adding up (Hutchinson's estimator).

    Args:
        model: whose weights need no gradient.
        state: of a cache, as `prefilled` gives it.
        continuation: the tokens that follow, `(1, n)`.
        skip: how many of them are fed but not looked at.
        draws: how many times labels are drawn.
        seed: of the labels and signs.

    Returns:
        Of each draw a cache with gradients in place of keys and values, divided so that their squares are means per
        position.
    """
    leaves = state.map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    tensors = [t for t in leaves.tensors().values() if t.requires_grad]
    drawn = []
    with torch.enable_grad():
        cache = rebuild_cache(leaves, partial(device_of, model))
        logits = model(continuation.to(model.device), past_key_values=cache, use_cache=True).logits[0, skip:]
        log_chances = logits.float().log_softmax(-1)
        for draw in range(draws):
            generator = torch.Generator(logits.device).manual_seed(seed * draws + draw)
            labels = torch.multinomial(log_chances.detach().exp(), 1, generator=generator)
            signs = torch.randint(0, 2, (len(labels), 1), generator=generator, device=logits.device) * 2 - 1
            total = (log_chances.gather(1, labels) * signs).sum() / len(labels) ** 0.5
            found = torch.autograd.grad(total, tensors, retain_graph=draw < draws - 1, allow_unused=True)
            drawn.append(
                {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)}
            )
    return [leaves.map(lambda t, by_leaf=by_leaf: by_leaf.get(id(t), t)) for by_leaf in drawn]  # type: ignore[misc]


def with_bodies(state: CacheState, of: Kept, keys: torch.Tensor, values: torch.Tensor) -> CacheState:
    """The cache with other keys and values in the layers of a set."""
    layers = list(state.layers)
    for at, i in enumerate(of.layers):
        old = layers[i].tensors
        new = {name: t[at].to(old[name]) for name, t in (("keys", keys), ("values", values))}
        layers[i] = LayerState(layers[i].family, {**old, **new}, layers[i].meta)
    return CacheState(state.kind, tuple(layers), state.meta, state.parts)


def next_words(model: Any, state: CacheState, continuation: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the words after each token of a continuation, float32 `(n, vocab)`."""
    with torch.no_grad():
        cache = rebuild_cache(state, partial(device_of, model))
        logits = model(continuation.to(model.device), past_key_values=cache, use_cache=True).logits[0]
    chances: torch.Tensor = logits.float().log_softmax(-1)
    return chances


def _last_logits(model: Any) -> dict[str, int]:
    """The argument that keeps a prefill from making the logits of every token, where the model takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
