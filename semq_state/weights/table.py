"""What a weights file says besides its tensors: rendered into its manifest, and read back with every field proved.

The manifest is that of a snapshot file: the same reader holds it against the header, the same codecs code its
sections. What differs is the structure, whose fields these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from semq_state.container import Manifest, shown
from semq_state.errors import FormatError
from semq_state.files.opening import provenance_of
from semq_state.provenance import Provenance
from semq_state.weights.held import QuantizedWeights

FORMAT = "semq_state weights"
VERSION = 1

PARTS = ("symbols", "scale", "zero", "smoothing", "counts", "coefficients", "escapes", "escaped")
"""The tensors that a matrix may have."""

_FIELDS: Mapping[str, type] = {
    "format": str,
    "version": int,
    "recipe": dict,
    "config": dict,
    "generation_config": dict,
    "matrices": dict,
    "tied": dict,
    "activation_bits": int,
}


@dataclass(frozen=True)
class Told:
    """The fields of `QuantizedWeights` that are not tensors, and which tensors belong to which of its parts.

    Args:
        origin: the model that they were made from.
        structure: the other fields.
        plain: names of plain tensors.
        parts: of each matrix the names of its tensors.
    """

    origin: Provenance
    structure: Mapping[str, Any]
    plain: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]

    def sections(self) -> Iterator[tuple[str, str, str]]:
        """Matrix (empty for plain tensors), part or name, and the tensor's name in the file, matrix by matrix."""
        for name in self.plain:
            yield "", name, f"plain.{name}"
        for matrix, parts in self.parts.items():
            for part in parts:
                yield matrix, part, f"matrix.{matrix}.{part}"


def structure_of(held: QuantizedWeights) -> dict[str, Any]:
    """Everything of quantised weights that is neither a tensor nor their origin; plain values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "recipe": dict(held.recipe),
        "config": dict(held.config),
        "generation_config": dict(held.generation_config),
        "matrices": {name: matrix.as_dict() for name, matrix in held.matrices.items()},
        "tied": dict(held.tied),
        "activation_bits": held.activation_bits,
    }


def told_by(manifest: Manifest, where: str) -> Told:
    """The inverse of `structure_of`, held against the tensors that are there.

    Raises:
        FormatError: a field is missing, unknown or of the wrong kind, the format is newer, or a tensor belongs to
            nothing.
    """

    def require(holds: bool, expected: str, found: Any, do: str = "use another copy of the file") -> None:
        if not holds:
            raise FormatError(f"{where}, structure", expected=expected, found=shown(found), do=do)

    told = manifest.structure
    require(told.get("format") == FORMAT, f"the format {FORMAT!r}", told.get("format"))
    require(type(told.get("version")) is int, "a version", told.get("version"))
    require(told["version"] == VERSION, f"version {VERSION}", told["version"], "read it with a later semq_state")
    require(told.keys() == _FIELDS.keys(), f"the fields {sorted(_FIELDS)}", sorted(told))
    for name, kind in _FIELDS.items():
        require(type(told[name]) is kind, f"{kind.__name__} for {name}", told[name])
    require(
        told["activation_bits"] in (0, *range(2, 9)), "0, or 2 to 8 bits of activations", told["activation_bits"]
    )
    require(not manifest.joint and not manifest.report, "no joint sections and no report", "some")
    matrices, tied = told["matrices"], told["tied"]
    for name, matrix in matrices.items():
        require(type(matrix) is dict, f"a table for {shown(name)}", matrix)
    plain: list[str] = []
    parts: dict[str, list[str]] = {name: [] for name in matrices}
    for name, tensor in manifest.tensors.items():
        require(bool(tensor.sections), f"sections for {shown(name)}", "none")
        room, _, rest = name.partition(".")
        matrix, _, part = rest.rpartition(".")
        if room == "plain" and rest:
            plain.append(rest)
            continue
        require(
            room == "matrix" and matrix in parts and part in PARTS,
            "tensors `plain.NAME` and `matrix.NAME.PART` of the matrices in the structure",
            name,
        )
        parts[matrix].append(part)
    given = [*plain, *(f"{name}.weight" for name in matrices)]
    require(len({*given, *tied}) == len(given) + len(tied), "each tensor of the model once", "one given twice")
    require(
        all(type(of) is str and of in given for of in tied.values()),
        "tied tensors that share one which is there",
        tied,
    )
    return Told(provenance_of(manifest, where), told, tuple(plain), {k: tuple(v) for k, v in parts.items()})
