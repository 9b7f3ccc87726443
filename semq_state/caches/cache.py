"""A whole cache: marked at a step, dumped as that step left it, checked, and rebuilt on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from semq_state.caches.base import Mark
from semq_state.caches.registry import family, family_of
from semq_state.errors import IncompleteStateError, UnsupportedModelError
from semq_state.snapshot import CacheState, LayerState

NO_CACHE = "none"
DYNAMIC_CACHE = "dynamic"
_AGAIN = "take the snapshot again"


@dataclass(frozen=True)
class CacheMark:
    """Where every layer of a cache stood at one moment.

    Args:
        cache: the live cache.
        marks: each layer with its family's mark.
        last_key: a layer's number and a copy of its newest key, `(batch, kv_heads, head_dim)`. Of the deepest
            layer, for there it depends on every token before it.
    """

    cache: Any
    marks: tuple[tuple[Any, Mark], ...]
    last_key: tuple[int, torch.Tensor] | None = None


def mark_cache(cache: Any) -> CacheMark:
    """Remembers where `cache` stands; cheap enough for every generated token.

    Raises:
        UnsupportedModelError: no family knows the cache or one of its layers.
    """
    if cache is None:
        return CacheMark(None, ())
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedModelError(
            "past_key_values",
            expected="a DynamicCache on the model's device",
            found=f"an offloading {type(cache).__name__}" if _offloads(cache) else type(cache).__name__,
            do="generate with the default cache implementation",
        )
    return CacheMark(
        cache,
        tuple((layer, family_of(layer, f"layer {i}").mark(layer)) for i, layer in enumerate(cache.layers)),
        _last_key(cache),
    )


def dump_cache(mark: CacheMark) -> CacheState:
    """The state of the cache when `mark` was made; the inverse of `rebuild_cache`. Shares memory.

    Raises:
        IncompleteStateError: the cache was cut since, so that the state is gone.
    """
    if mark.cache is None:
        return CacheState(NO_CACHE, ())
    layers = tuple(family_of(layer, f"layer {i}").dump(layer, at) for i, (layer, at) in enumerate(mark.marks))
    _require_unchanged(layers, mark.last_key)
    grows = mark.cache.layer_class_to_replicate is not None
    return CacheState(DYNAMIC_CACHE, layers, {"grows": grows})


def rebuild_cache(state: CacheState, device_of: Callable[[int], torch.device]) -> Any:
    """A new cache in this state.

    Args:
        state: what `dump_cache` gave.
        device_of: layer number to the device on which the layer computes.
    """
    if state.kind == NO_CACHE:
        return None
    cache = DynamicCache()
    cache.layers = [
        family(layer.family, f"layer {i}").rebuild(layer, device_of(i)) for i, layer in enumerate(state.layers)
    ]
    if not state.meta.get("grows"):
        cache.layer_class_to_replicate = None
    return cache


def n_cached(state: CacheState) -> int:
    """How many tokens of each row the cache has seen."""
    counts = (family(x.family, f"layer {i}").n_cached(x) for i, x in enumerate(state.layers))
    return max((count for count in counts if count is not None), default=0)


def check_cache(state: CacheState, batch_size: int, n_cached: int) -> None:
    """Refuses a state that `rebuild_cache` could not make a working cache from.

    Raises:
        UnsupportedModelError: an unknown kind of cache or family.
        IncompleteStateError: a layer lacks a tensor, or layers contradict each other.
    """
    if state.kind not in (NO_CACHE, DYNAMIC_CACHE):
        raise UnsupportedModelError(
            "cache",
            expected=f"{DYNAMIC_CACHE} or {NO_CACHE}",
            found=repr(state.kind),
            do="update semq_state",
        )
    if n_cached and not any(layer.tensors for layer in state.layers):
        raise IncompleteStateError("cache", expected=f"{n_cached} cached tokens", found="none", do=_AGAIN)
    for i, layer in enumerate(state.layers):
        kind = family(layer.family, f"layer {i}")
        kind.check(layer, batch_size, f"layer {i}")
        found = kind.n_cached(layer)
        if found is not None and found != n_cached:
            raise IncompleteStateError(
                f"layer {i}",
                expected=f"{n_cached} cached tokens",
                found=str(found),
                do=f"the layers do not belong to one step; {_AGAIN}",
            )


def can_step_back(state: CacheState) -> bool:
    """Whether every layer can give back its last token, to have it computed again."""
    return all(family(x.family, f"layer {i}").can_step_back(x) for i, x in enumerate(state.layers))


def _last_key(cache: Any) -> tuple[int, torch.Tensor] | None:
    for i in reversed(range(len(cache.layers))):
        keys = getattr(cache.layers[i], "keys", None)
        if keys is not None and keys.numel():
            return i, keys[:, :, -1].clone()
    return None


def _require_unchanged(layers: tuple[LayerState, ...], last_key: tuple[int, torch.Tensor] | None) -> None:
    if last_key is None:
        return
    i, expected = last_key
    keys = layers[i].tensors.get("keys")
    if keys is not None and not torch.equal(_bits(keys[:, :, -1]), _bits(expected)):
        raise IncompleteStateError(
            f"cache, layer {i}",
            expected="the tokens that it held after the last finished one",
            found="others: it was cut or changed since",
            do="take the snapshot before the cache is used for something else",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _offloads(cache: Any) -> bool:
    return bool(getattr(cache, "offloading", False))
