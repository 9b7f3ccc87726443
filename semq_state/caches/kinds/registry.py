"""Which kind takes which cache, and which id in a file means which kind."""

from __future__ import annotations

from typing import Any

from semq_state.caches.base import path_of
from semq_state.caches.kinds.base import AbstractKind
from semq_state.errors import UnsupportedModelError

KINDS: dict[str, AbstractKind] = {}
"""What a file's kind id means; filled by the package."""


def register_kind(kind: AbstractKind) -> None:
    """Makes a new kind of cache known. A taken id is refused.

    Raises:
        ValueError: the id is taken.
    """
    if kind.id in KINDS:
        raise ValueError(f"cache kind {kind.id!r} is taken by {KINDS[kind.id]!r}")
    KINDS[kind.id] = kind


def kind_of(cache: Any, model_type: str = "") -> AbstractKind:
    """The kind of a live cache, by its exact class, or by the architecture where it is a plain list.

    Raises:
        UnsupportedModelError: none knows it.
    """
    is_plain = isinstance(cache, (list, tuple))
    path = path_of(type(cache))
    for kind in KINDS.values():
        if (kind.model_type and kind.model_type == model_type) if is_plain else kind.path == path:
            return kind
    raise UnsupportedModelError(
        "past_key_values",
        expected="a cache of a known kind",
        found=f"a plain {type(cache).__name__} of {model_type or 'an unknown model'}" if is_plain else path,
        do="register its kind with semq_state.caches.register_kind",
    )


def kind(kind_id: str) -> AbstractKind:
    """The kind that a file names.

    Raises:
        UnsupportedModelError: no such id is registered.
    """
    if kind_id not in KINDS:
        raise UnsupportedModelError(
            "cache", expected=f"a kind of {', '.join(sorted(KINDS))}", found=repr(kind_id), do="update semq_state"
        )
    return KINDS[kind_id]
