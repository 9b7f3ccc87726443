"""What an index holds, in one order, and its identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import OPERATORS, AbstractOperator, Floats, Quant, best_range
from semq_state.content import Bytes, TensorSpec, content_digest, digest
from semq_state.errors import UnsupportedOperationError
from semq_state.search.ids import IdArray, canonical_order

PARAMETERS = {"quant": 8, "phase": 16, "orbit": 50}
"""Bins, sectors or scale where none is given."""

Section = tuple[Bytes, TensorSpec]


def operator_of(name: str, dim: int, parameter: int | None, c: float | None) -> AbstractOperator:
    """The rule.

    Raises:
        UnsupportedOperationError: there is none of this name or with these values.
    """
    if name not in PARAMETERS:
        raise UnsupportedOperationError(
            "operator", expected=f"one of {tuple(PARAMETERS)}", found=f"{name!r:.80}", do="choose one of these"
        )
    parameter = PARAMETERS[name] if parameter is None else parameter
    if name != Quant.name:
        if c is not None:
            raise UnsupportedOperationError(
                "`c`", expected=f"None for {name}", found=f"{c!r:.80}", do="leave it out: it is for quant"
            )
        return OPERATORS[name](dim, parameter)
    if c is None:
        return Quant(dim, parameter, best_range(Quant(dim, parameter).bins))
    return Quant(dim, parameter, float(c) if type(c) is int else c)


def rule_of(operator: AbstractOperator) -> dict[str, Any]:
    """Everything that the symbols depend on, for a file."""
    rule: dict[str, Any] = {
        "operator": operator.name,
        "dim": operator.dim,
        "parameter": operator.parameter,
        "rule_revision": 0,
    }
    return rule | ({"c": operator.c} if isinstance(operator, Quant) else {})


@dataclass(frozen=True)
class Contents:
    """Rows by increasing id.

    Args:
        operator: the rule.
        ids: `(n,)`, increasing.
        norms: float32 `(n,)`.
        packed: uint8 `(n, n_bytes)`.
    """

    operator: AbstractOperator
    ids: IdArray
    norms: Floats
    packed: NDArray[np.uint8]

    @classmethod
    def ordered(
        cls, operator: AbstractOperator, ids: IdArray, norms: Floats, packed: NDArray[np.uint8]
    ) -> Contents:
        """Of rows in any order; no copy where they are in the right one."""
        order = canonical_order(ids)
        if (order[1:] > order[:-1]).all():
            return cls(operator, ids, norms, packed)
        return cls(operator, ids[order], norms[order], packed[order])

    def sections(self) -> dict[str, Section]:
        """Canonical bytes and specs, by the names that they have in a file."""
        n = len(self.norms)
        sections: dict[str, Section] = {}
        if self.ids.dtype == object and n:
            texts = [text.encode() for text in self.ids]
            sections["id_ends"] = _section(np.cumsum([len(text) for text in texts]), "<i8", "I64")
            sections["id_text"] = _section(np.frombuffer(b"".join(texts), np.uint8), "u1", "U8")
        else:
            sections["ids"] = _section(self.ids.astype(np.int64), "<i8", "I64")
        sections["norms"] = _section(self.norms, "<f4", "F32")
        return sections | {"rows": _section(self.packed, "u1", "U8")}

    def index_id(self) -> str:
        """`sha256:…` over the rule, the ids, the norms and the rows."""
        sections = self.sections()
        return content_digest(
            rule_of(self.operator),
            {name: spec for name, (_, spec) in sections.items()},
            {name: (digest(data),) for name, (data, _) in sections.items()},
        )


def _section(array: NDArray[Any], stored: str, name: str) -> Section:
    data = np.ascontiguousarray(array.astype(stored, copy=False))
    flat = data.reshape(-1).view(np.uint8) if data.size else np.empty(0, np.uint8)
    return flat, TensorSpec(name, tuple(array.shape))
