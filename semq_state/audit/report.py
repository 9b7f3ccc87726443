"""What `diff` found, as a value: where tokens part, and of each layer and kind of state by how much it differs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semq_state.audit.verdict import Verdict
from semq_state.errors import Difference
from semq_state.snapshot import ENCODER

if TYPE_CHECKING:
    from semq_state.audit.floor import Floor

SCHEMA = 1
"""Version of `Diff.as_dict`; it grows when a field changes its meaning or goes."""

HIDDEN = "hidden"
"""The kind of a cell of hidden states, whose vectors are rows (document, position)."""


@dataclass(frozen=True)
class TokenDiff:
    """Where the tokens of two states, or of two records, part.

    Args:
        n_a: tokens of each row of the first; of a record how many rows it has.
        n_b: and of the second.
        first: of each row, the first position at which they differ; None where one is a prefix of the other. Of
            records, which may have any number of documents, the earliest position alone.
        values: the two tokens at the earliest of these positions.
        document: of records, the document that has it; None where tokens do not part.
        of_records: whether these are two records, whose rows are no batch.
    """

    n_a: int
    n_b: int
    first: tuple[int | None, ...]
    values: tuple[int, int] | None = None
    document: int | None = None
    of_records: bool = False

    @property
    def earliest(self) -> int | None:
        return min((at for at in self.first if at is not None), default=None)

    @property
    def row(self) -> int | None:
        """The row, or the record's document, that parts first."""
        if self.earliest is None or self.of_records:
            return self.document
        return self.first.index(self.earliest)

    def as_dict(self) -> dict[str, Any]:
        said = {
            "n_a": self.n_a,
            "n_b": self.n_b,
            "first": list(self.first),
            "values": list(self.values) if self.values else None,
        }
        return {**said, "document": self.document} if self.of_records else said


@dataclass(frozen=True, eq=False)
class PerToken:
    """Numbers of each compared position.

    Args:
        start: absolute position of the first.
        hamming: sum of the Hamming distances of its vectors.
        relative: norm of the difference by the norm of the first side's; infinite for NaN and infinity.
        max_abs: largest absolute difference.
        n_vectors: vectors compared at each position, where they are not as many at all; where there are none, the
            other numbers are NaN, and `hamming` is 0.
    """

    start: int
    hamming: NDArray[np.int64]
    relative: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    n_vectors: NDArray[np.int64] | None = None

    def as_dict(self) -> dict[str, Any]:
        said = {
            "start": self.start,
            "hamming": self.hamming.tolist(),
            "relative": [_number(x) for x in self.relative.tolist()],
            "max_abs": [_number(x) for x in self.max_abs.tolist()],
        }
        return said if self.n_vectors is None else {**said, "n_vectors": self.n_vectors.tolist()}


@dataclass(frozen=True, eq=False)
class CellDiff:
    """How one tensor differs: a layer's keys, say. A vector is one run along its last axis.

    Args:
        where: the layer, `layers.3` or `self.layers.3`, or `generation`, or the stream, `hidden.sequence`.
        name: the tensor, `keys`; of hidden states the site, `hidden_states.3` or the path of a module.
        kind: `keys`, `values`, `index`, `latent`, `convolution`, `recurrent`, `logits`, `encoder` or `hidden`.
        layer: number of the layer in its cache; of `hidden_states.N`, which layer N reads, N; None elsewhere.
        of_sequence: whether its tokens are those of the sequence.
        n_units: symbols of a vector, that of its norm among them.
        n_vectors: vectors at positions that both have.
        n_only_a: vectors at positions that only the first has.
        n_only_b: and only the second.
        n_bits_changed: vectors that differ in any bit.
        n_changed: vectors that differ in any symbol.
        n_not_finite: changed vectors with NaN or infinity: all their symbols count as changed, their cosine as 0.
        hamming: symbols that differ, in all vectors.
        p99: the 99th percentile of the Hamming distances of the vectors with any.
        p99_norm: the same percentile of the change of these vectors' norms, in steps of 2^-11.
        min_cosine: the smallest cosine of a vector with its counterpart.
        mean_cosine: their mean.
        relative: norm of the whole difference by the norm of the whole first side.
        max_abs: largest absolute difference.
        beyond: whether it differs by more than the threshold anywhere.
        first_token: the first position that does; None for none, and for tensors without tokens.
        per_token: numbers of each position; None for tensors without tokens.
        first_row: of hidden states, the first row that differs by more than the threshold, (document, position);
            positions count the document's own tokens, without padding. None for none.
    """

    where: str
    name: str
    kind: str
    layer: int | None
    of_sequence: bool
    n_units: int
    n_vectors: int
    n_only_a: int
    n_only_b: int
    n_bits_changed: int
    n_changed: int
    n_not_finite: int
    hamming: int
    p99: int
    p99_norm: int
    min_cosine: float
    mean_cosine: float
    relative: float
    max_abs: float
    beyond: bool
    first_token: int | None
    per_token: PerToken | None = None
    first_row: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        return f"{self.where}.{self.name}"

    @property
    def equal(self) -> bool:
        """Bit for bit, and at the same positions."""
        return not (self.n_bits_changed or self.n_only_a or self.n_only_b)

    def as_dict(self, *, per_token: bool = False) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is None. Only hidden states have a `first_row`."""
        said: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)[:-2]}
        said = {name: _number(x) if isinstance(x, float) else x for name, x in said.items()}
        if self.kind == HIDDEN:
            said["first_row"] = list(self.first_row) if self.first_row else None
        if per_token:
            said["per_token"] = self.per_token.as_dict() if self.per_token else None
        return said


@dataclass(frozen=True, eq=False)
class Diff:
    """How two states, or two records of hidden states, differ.

    Args:
        a: identity of the first.
        b: identity of the second.
        bins: of SEMQ's `quant`, with which symbols were made.
        c: its range factor.
        threshold: relative error of a token's vectors beyond which it counts as parted; at 0 any bit does.
        tokens: where the tokens part.
        cells: tensors of vectors, layer by layer.
        others: name of each other tensor that differs, to how: the random state, masks …
        structure: what differs that is no tensor: counts, settings, dtypes …
        missing: tensors that only one of the states has, and tensors without a position in common, to why.
        provenance: in what the origins differ; of these only identity matters for `across_models`.
    """

    a: str
    b: str
    bins: int
    c: float
    threshold: float
    tokens: TokenDiff
    cells: tuple[CellDiff, ...]
    others: Mapping[str, str] = field(default_factory=dict)
    structure: tuple[Difference, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    provenance: tuple[Difference, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether both hold the same, bit for bit: every tensor and everything beside. Origins do not count."""
        if self.tokens.earliest is not None or self.tokens.n_a != self.tokens.n_b:
            return False
        return not (self.others or self.structure or self.missing) and all(cell.equal for cell in self.cells)

    @property
    def first_token(self) -> int | None:
        """The earliest position at which tokens part or any layer differs beyond the threshold; None for none."""
        found = [cell.first_token for cell in self.cells if cell.of_sequence]
        return min((at for at in (*found, self.tokens.earliest) if at is not None), default=None)

    @property
    def first_layer(self) -> int | None:
        """Number of the lowest layer that differs beyond the threshold; None for none. `first_cell` names it."""
        return self.first_cell.layer if self.first_cell else None

    @cached_property
    def first_cell(self) -> CellDiff | None:
        """The lowest layer's tensor that differs beyond the threshold; of several the one that does so first."""
        found = [cell for cell in self.cells if cell.beyond and cell.layer is not None]
        return min(found, key=_order, default=None)

    @cached_property
    def first_row(self) -> tuple[int, int] | None:
        """The first row of hidden states, (document, position), that differs beyond the threshold in any site; None
        for none."""
        return min((cell.first_row for cell in self.cells if cell.first_row), default=None)

    def cell(self, key: str) -> CellDiff:
        """The cell of that name, `layers.3.keys`.

        Raises:
            KeyError: there is none.
        """
        found = next((cell for cell in self.cells if cell.key == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def within(self, floor: Floor) -> Verdict:
        """Noise or change? By the rule of `floor`, in integers.

        Raises:
            FloorError: the floor is of another reference than `a`, or was measured with other symbols.

        Example:
            >>> sq.diff(reference, candidate).within(floor).passed  # doctest: +SKIP
        """
        return floor.judge(self)

    def as_dict(self, *, per_token: bool = False) -> dict[str, Any]:
        """Plain values for JSON, as `docs/AUDIT.md` says; with `per_token` the numbers of each position as well."""
        first, has_rows = self.first_cell, any(cell.kind == HIDDEN for cell in self.cells)
        return {
            "schema": SCHEMA,
            "equal": self.equal,
            "first_token": self.first_token,
            "first_layer": self.first_layer,
            "first_cell": first.key if first else None,
            **({"first_row": list(self.first_row) if self.first_row else None} if has_rows else {}),
            "a": self.a,
            "b": self.b,
            "bins": self.bins,
            "c": self.c,
            "threshold": self.threshold,
            "tokens": self.tokens.as_dict(),
            "cells": [cell.as_dict(per_token=per_token) for cell in self.cells],
            "others": dict(self.others),
            "missing": dict(self.missing),
            "structure": [_difference(each) for each in self.structure],
            "provenance": [_difference(each) for each in self.provenance],
        }

    def save_png(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Draws layer by token as a PNG.

        Raises:
            UnsupportedOperationError: matplotlib is not installed, or no tensor has tokens.
            StoreError: the folder or disk refused.
        """
        from semq_state.audit.heatmap_png import save_png

        save_png(self, path, title=title)

    def save_html(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Draws layer by token as one HTML file that needs nothing else, neither network nor library.

        Raises:
            UnsupportedOperationError: no tensor has tokens.
            StoreError: the folder or disk refused.
        """
        from semq_state.audit.heatmap_html import save_html

        save_html(self, path, title=title)


def _order(cell: CellDiff) -> tuple[Any, ...]:
    """By which the first cell is found. An encoder runs first; companions are models of their own, and come last.
    Of one layer its input comes before its keys."""
    return (
        not cell.where.startswith(f"{HIDDEN}.{ENCODER}"),
        cell.where.startswith("generation."),
        cell.layer,
        math.inf if cell.first_token is None else cell.first_token,
        cell.kind != HIDDEN,
    )


def _difference(each: Difference) -> dict[str, str]:
    return {"name": each.name, "a": each.expected, "b": each.found}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
