"""Which family takes which layer, and which id in a file means which family."""

from __future__ import annotations

from typing import Any

from semq_state.caches.base import AbstractFamily, path_of
from semq_state.caches.deepseek_v4 import CompressedSparse, HeavilyCompressed
from semq_state.caches.dummy import Dummy
from semq_state.caches.dynamic import Dynamic
from semq_state.caches.indexed import Indexed
from semq_state.caches.linear import COMBINED, Linear
from semq_state.caches.minimax_m3 import MiniMaxSparse, MiniMaxSparseStatic
from semq_state.caches.quantized import Fp8, Hqq, Quanto
from semq_state.caches.sliding import Sliding
from semq_state.caches.static import Static, StaticIndexed, StaticSliding
from semq_state.caches.unlimited_ocr import ReferenceSliding, ReferenceSlidingStatic
from semq_state.errors import UnsupportedModelError
from semq_state.layouts import LAYOUTS, FamilyLayout

FAMILIES: dict[str, AbstractFamily] = {
    family.id: family
    for family in (
        Dynamic(),
        Sliding(),
        Indexed(),
        Static(),
        StaticSliding(),
        StaticIndexed(),
        Linear(),
        *COMBINED,
        Fp8(),
        Hqq(),
        Quanto(),
        HeavilyCompressed(),
        CompressedSparse(),
        MiniMaxSparse(),
        MiniMaxSparseStatic(),
        ReferenceSliding(),
        ReferenceSlidingStatic(),
        Dummy(),
    )
}
"""What a file's family id means."""

_OF_TYPE: dict[type, AbstractFamily | None] = {}


def register(family: AbstractFamily, layout: FamilyLayout | None = None) -> None:
    """Makes a new kind of layer known. A taken id is refused.

    Args:
        family: takes the layer apart and puts it together.
        layout: the kinds and axes of its tensors; without one a state can be kept but not cropped.

    Raises:
        ValueError: the id is taken.
    """
    if family.id in FAMILIES:
        raise ValueError(f"cache family {family.id!r} is taken by {FAMILIES[family.id]!r}")
    FAMILIES[family.id] = family
    _OF_TYPE.clear()
    if layout is not None:
        LAYOUTS[family.id] = layout


def family_of(layer: Any, where: str) -> AbstractFamily:
    """The family of a live layer, by its exact class: a subclass may keep more than we would save.

    Raises:
        UnsupportedModelError: none knows it.
    """
    found = family_of_type(type(layer))
    if found is None:
        raise UnsupportedModelError(
            where,
            expected="a layer of a known family",
            found=path_of(type(layer)),
            do="register a cache family for it with semq_state.caches.register",
        )
    return found


def family_of_type(kind: type) -> AbstractFamily | None:
    """The family of a layer's class, or None."""
    if kind not in _OF_TYPE:
        path = path_of(kind)
        _OF_TYPE[kind] = next((family for family in FAMILIES.values() if family.layer_path == path), None)
    return _OF_TYPE[kind]


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
