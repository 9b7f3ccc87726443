"""The cache that a model would make for itself: what a snapshot is held against, and what `supports` tells."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, StaticCache

from semq_state.caches.base import path_of
from semq_state.caches.registry import family_of_type


def expected_layers(model: Any, kind: str = "dynamic") -> list[tuple[str, int | None]] | None:
    """Family id (or the class path of an unknown one) and window of each layer of a fresh cache.

    Args:
        model: the `PreTrainedModel`.
        kind: `dynamic` or `static`.

    Returns:
        One pair for each layer. None where the model does not take such a cache, or leaves its layers open until
        they are used.
    """
    if not model._supports_default_dynamic_cache():
        return None
    try:
        config = model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=8)
    except (AttributeError, KeyError, TypeError, ValueError):
        # Some classes make their own in the first forward pass, since their configuration does not describe it.
        return None
    if cache.layer_class_to_replicate is not None:
        return None
    return [(_name(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]


def _name(layer: Any) -> str:
    family = family_of_type(type(layer))
    return path_of(type(layer)) if family is None else family.id
