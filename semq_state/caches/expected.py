"""The cache that a model would make for itself: what a snapshot is held against, and what `supports` tells."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from semq_state.caches.base import path_of
from semq_state.caches.registry import family_of_type


def expected_layers(model: Any) -> list[tuple[str, int | None]] | None:
    """Family id (or the class path of an unknown one) and window of each layer of a fresh default cache.

    None where the model does not take such a cache, or leaves its layers open until they are used.
    """
    if not model._supports_default_dynamic_cache():
        return None
    try:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    except (AttributeError, KeyError, TypeError, ValueError):
        # Some classes make their own in the first forward pass, since their configuration does not describe it.
        return None
    if cache.layer_class_to_replicate is not None:
        return None
    return [(_name(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]


def _name(layer: Any) -> str:
    family = family_of_type(type(layer))
    return path_of(type(layer)) if family is None else family.id
