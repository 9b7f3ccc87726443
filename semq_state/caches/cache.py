"""A whole cache: marked at a step, dumped as that step left it, checked, and rebuilt on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from semq_state.caches.base import Mark, path_of
from semq_state.caches.kinds import KINDS, kind, kind_of
from semq_state.caches.kinds.base import DeviceOf
from semq_state.snapshot import CacheState

NO_CACHE = "none"


@dataclass(frozen=True)
class CacheMark:
    """Where a cache stood at one moment.

    Args:
        cache: the live cache.
        kind: id of its kind.
        mark: what its kind remembers.
    """

    cache: Any
    kind: str = NO_CACHE
    mark: Mark = None


def is_cache(value: Any) -> bool:
    """Whether `value` is a cache, by its class; a plain list is none."""
    return isinstance(value, Cache) or any(k.path and k.path == path_of(type(value)) for k in KINDS.values())


def mark_cache(cache: Any, model_type: str = "") -> CacheMark:
    """Remembers where `cache` stands; cheap enough for every generated token.

    Args:
        cache: the live cache, or None.
        model_type: the architecture, which tells what a plain list of tensors is.

    Raises:
        UnsupportedModelError: nothing here knows the cache or one of its layers.
    """
    if cache is None:
        return CacheMark(None)
    found = kind_of(cache, model_type)
    return CacheMark(cache, found.id, found.mark(cache))


def dump_cache(mark: CacheMark) -> CacheState:
    """The state of the cache when `mark` was made; the inverse of `rebuild_cache`. Shares memory.

    Raises:
        IncompleteStateError: the cache was cut since, so that the state is gone.
    """
    if mark.kind == NO_CACHE:
        return CacheState(NO_CACHE)
    return kind(mark.kind).dump(mark.cache, mark.mark)


def rebuild_cache(state: CacheState, device_of: DeviceOf) -> Any:
    """A new cache in this state.

    Args:
        state: what `dump_cache` gave.
        device_of: layer number to the device on which the layer computes.
    """
    return None if state.kind == NO_CACHE else kind(state.kind).rebuild(state, device_of)


def n_cached(state: CacheState) -> int | None:
    """How many tokens of each row the cache has seen; None where nothing in it counts them."""
    return 0 if state.kind == NO_CACHE else kind(state.kind).n_cached(state)


def check_cache(state: CacheState, batch_size: int, n_cached: int, where: str = "cache") -> None:
    """Refuses a state that `rebuild_cache` could not make a working cache from.

    Raises:
        UnsupportedModelError: an unknown kind of cache or family.
        IncompleteStateError: a layer lacks a tensor, or layers contradict each other.
    """
    if state.kind != NO_CACHE:
        kind(state.kind).check(state, batch_size, n_cached, where)


def can_step_back(state: CacheState, n_cached: int) -> bool:
    """Whether every layer can give back its last token, to have it computed again."""
    layers = [layer for layer in state.all_layers() if not layer.is_fixed]
    return state.kind != NO_CACHE and all(layer.can_crop(n_cached - 1) for layer in layers)
