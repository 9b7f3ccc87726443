"""Which family takes which layer, and which id in a file means which family."""

from __future__ import annotations

from typing import Any

from semq_state.caches.base import AbstractFamily
from semq_state.caches.dummy import Dummy
from semq_state.caches.dynamic import Dynamic
from semq_state.caches.sliding import Sliding
from semq_state.errors import UnsupportedModelError

FAMILIES: dict[str, AbstractFamily] = {
    Dynamic.id: Dynamic(),
    Sliding.id: Sliding(),
    Dummy.id: Dummy(),
}
"""What a file's family id means."""


def register(family: AbstractFamily) -> None:
    """Makes a new kind of layer known. A taken id is refused.

    Raises:
        ValueError: the id is taken.
    """
    if family.id in FAMILIES:
        raise ValueError(f"cache family {family.id!r} is taken by {FAMILIES[family.id]!r}")
    FAMILIES[family.id] = family


def family_of(layer: Any, where: str) -> AbstractFamily:
    """The family of a live layer, by its exact class: a subclass may keep more than we would save.

    Raises:
        UnsupportedModelError: none knows it.
    """
    for family in FAMILIES.values():
        if type(layer) is family.layer_type:
            return family
    raise UnsupportedModelError(
        where,
        expected=f"a layer of {', '.join(f.layer_type.__name__ for f in FAMILIES.values())}",
        found=type(layer).__name__,
        do="register a cache family for it with semq_state.caches.register",
    )


def family(family_id: str, where: str) -> AbstractFamily:
    """The family that a file names.

    Raises:
        UnsupportedModelError: no such id is registered.
    """
    if family_id not in FAMILIES:
        raise UnsupportedModelError(
            where,
            expected=f"a cache family of {', '.join(sorted(FAMILIES))}",
            found=repr(family_id),
            do="update semq_state, or register the family with semq_state.caches.register",
        )
    return FAMILIES[family_id]
