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
from semq_state.snapshot import CacheState

NO_CACHE = "none"
DYNAMIC_CACHE = "dynamic"


@dataclass(frozen=True)
class CacheMark:
    """Where every layer of a cache stood at one moment."""

    cache: Any
    marks: tuple[tuple[Any, Mark], ...]


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
    )


def dump_cache(mark: CacheMark) -> CacheState:
    """The state of the cache when `mark` was made; the inverse of `rebuild_cache`. Shares memory."""
    if mark.cache is None:
        return CacheState(NO_CACHE, ())
    layers = tuple(family_of(layer, f"layer {i}").dump(layer, at) for i, (layer, at) in enumerate(mark.marks))
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
    for i, layer in enumerate(state.layers):
        kind = family(layer.family, f"layer {i}")
        kind.check(layer, batch_size, f"layer {i}")
        found = kind.n_cached(layer)
        if found is not None and found != n_cached:
            raise IncompleteStateError(
                f"layer {i}",
                expected=f"{n_cached} cached tokens",
                found=str(found),
                do="the layers do not belong to one step; take the snapshot again",
            )


def _offloads(cache: Any) -> bool:
    return bool(getattr(cache, "offloading", False))
