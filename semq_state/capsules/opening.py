"""`sq.open_capsule`: a conversation with the model that goes on with it, from one file and nothing else."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from semq_state import content
from semq_state.calibration import Calibration
from semq_state.calibration import files as calibration_files
from semq_state.capsules.belonging import check_belongs, named
from semq_state.capsules.info import CapsuleInfo
from semq_state.capsules.manifest import (
    CALIBRATION,
    SNAPSHOT,
    TOKENIZER,
    WEIGHTS,
    CapsuleManifest,
    read_capsule_header,
)
from semq_state.capsules.parts import Part, digest_of
from semq_state.capsules.tokenizers import inflated, tokenizer_of
from semq_state.container import read_header
from semq_state.errors import (
    CalibrationError,
    DecryptionError,
    Difference,
    FormatError,
    IncompleteStateError,
    IntegrityError,
    SemqStateError,
)
from semq_state.files import Progress, counter, inspect, load, open_snapshot
from semq_state.files.pipeline import in_order
from semq_state.fingerprint import weights_digest
from semq_state.provenance import Provenance
from semq_state.restore import Resumed, restore
from semq_state.snapshot import Snapshot
from semq_state.stores import Source, opened, size_of
from semq_state.weights.building import build
from semq_state.weights.file import inspect_weights, load_weights, open_weights_file
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.installing import Dequantize

_MOST_CALIBRATION = 1 << 30


class QuantizedWeightsWarning(UserWarning):
    """A state goes on under quantised weights that were made from those that made it."""


@dataclass(frozen=True, eq=False)
class Capsule:
    """A conversation, the model that goes on with it, and where both come from.

    Args:
        capsule_id: the identity of all parts together.
        snapshot: the state.
        model: the model with the capsule's weights, ready to generate.
        tokenizer: the model's; None where none was packed.
        calibration: of the original model, for compact states; None where none was packed.
        weights: the quantised weights.
        weights_id: their identity.
        accepted: the difference of the weights, where other ones than these made the state.
    """

    capsule_id: str
    snapshot: Snapshot
    model: Any
    tokenizer: Any
    calibration: Calibration | None
    weights: QuantizedWeights
    weights_id: str
    accepted: tuple[Difference, ...] = field(default=())

    @property
    def made_by(self) -> Provenance:
        """The model that made the state."""
        return self.snapshot.provenance

    @property
    def continued_by(self) -> dict[str, Any]:
        """The weights that go on with it: how they were quantised, from which, and their identity."""
        return {
            "recipe": dict(self.weights.recipe),
            "original": self.weights.origin.weights,
            "weights_id": self.weights_id,
        }

    def resume(self) -> Resumed:
        """Makes the model ready to go on.

        Warns with `QuantizedWeightsWarning` where other weights made the state: what follows is then not what they
        would have said. `Resumed.accepted` names the differences.

        Raises:
            ModelMismatchError: the state is of another model in more than its weights.
            IncompleteStateError, UnsupportedModelError: as `restore`.
        """
        if self.accepted:
            warnings.warn(
                f"{self.made_by.model_name or 'a model'} with weights {self.made_by.weights} made this state; "
                f"{named(self.weights)}, {self.weights_id}, made from these weights, goes on with it",
                QuantizedWeightsWarning,
                stacklevel=2,
            )
        allow = ("weights", "quantization") if self.accepted else ()
        resumed = restore(self.snapshot, self.model, tokenizer=self.tokenizer, allow=allow)
        resumed.accepted = (*self.accepted, *resumed.accepted)
        return resumed


def open_capsule(
    path: str | os.PathLike[str], *, dequantize: Dequantize = "load", progress: Progress | None = None
) -> Capsule:
    """Opens a capsule: builds its model, loads its state. It needs no network and no other file.

    Each part is proved to be the one that was packed, and the weights to be those that made the state, or made from
    them.

    Args:
        path: a file that `pack` wrote.
        dequantize: weights are dequantised once (`load`), or at each call of their layer (`call`): slower, and in
            less memory.
        progress: called with the bytes checked and the bytes in all.

    Returns:
        The capsule, its model and tensors on the CPU.

    Raises:
        StoreError: there is no such file, or the disk failed.
        FormatError: it is no capsule, or a newer one.
        IntegrityError: a part was damaged, changed or exchanged; the message names it.
        ModelMismatchError: its weights have nothing to do with its state.
        CalibrationError, IncompleteStateError: as `load`, of its state.

    Example:
        >>> capsule = sq.open_capsule("chat.capsule")  # doctest: +SKIP
        >>> tokens = capsule.resume().generate(max_new_tokens=100)  # doctest: +SKIP
    """
    with opened_capsule(path) as (parts, manifest, claimed):
        for error in wrong_parts(parts, manifest, claimed, progress).values():
            raise error
        held = load_weights(parts[WEIGHTS])
        calibration = calibration_of(parts[CALIBRATION]) if CALIBRATION in parts else None
        snapshot = load(parts[SNAPSHOT], calibration=calibration)
        tokenizer = tokenizer_of(texts_of(parts, manifest), f"{path}, tokenizer") if _files(manifest) else None
        weights_id = manifest.parts[WEIGHTS].identity
        where = str(parts[WEIGHTS].path)
    model = build(held, dequantize=dequantize, where=where)
    accepted = check_belongs(snapshot.provenance, held, weights_id, lambda mode: weights_digest(model, mode))
    return Capsule(claimed, snapshot, model, tokenizer, calibration, held, weights_id, accepted)


def inspect_capsule(path: str | os.PathLike[str]) -> CapsuleInfo:
    """What a capsule says of itself and of its parts, nothing of which is proved but that they are named together.

    Raises:
        StoreError: there is no such file, or the disk failed.
        FormatError, IntegrityError, IncompleteStateError: it is no capsule, or a damaged one.
    """
    with opened_capsule(path) as (parts, manifest, claimed):
        if manifest.capsule_id != claimed:
            raise _exchanged(str(path), claimed, manifest)
        return CapsuleInfo(
            path=str(path),
            n_bytes=size_of(path),
            manifest=manifest,
            stored={name: part.size for name, part in parts.items()},
            weights=inspect_weights(parts[WEIGHTS]),
            snapshot=inspect(parts[SNAPSHOT]),
        )


def verify_capsule(path: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, str]:
    """What does not hold in a capsule, by part; `file` where it cannot be opened at all, `capsule` where its parts
    hold but do not belong together.

    Raises:
        StoreError: there is no such file, or the disk failed.
    """
    try:
        with opened_capsule(path) as (parts, manifest, claimed):
            found = {name: str(e) for name, e in wrong_parts(parts, manifest, claimed, progress).items()}
            if not found:
                found = _damage(parts, manifest)
    except (FormatError, IncompleteStateError) as error:
        return {"file": str(error)}
    return found


@contextlib.contextmanager
def opened_capsule(source: Source) -> Iterator[tuple[dict[str, Part], CapsuleManifest, str]]:
    """The parts of a capsule by name, its manifest, and the identity that it claims; sizes are held against the
    file, digests are not.

    Raises:
        StoreError: there is no such file.
        FormatError, IntegrityError: it is no capsule, or header and manifest disagree.
    """
    with opened(source) as file:
        header, manifest, claimed = read_capsule_header(file)
        sections = {name: header.sections[name] for name in manifest.parts}
        parts = {
            name: Part(file, name.replace("/", " "), header.data_start + each.begin, each.n_bytes)
            for name, each in sections.items()
        }
        yield parts, manifest, claimed


def wrong_parts(
    parts: dict[str, Part], manifest: CapsuleManifest, claimed: str, progress: Progress | None = None
) -> dict[str, SemqStateError]:
    """Parts whose bytes or identities are not those that were packed; `capsule` where all are, but not together."""
    advance = counter(progress, sum(part.size for part in parts.values()))

    def tried(name: str) -> SemqStateError | None:
        where, entry = str(parts[name].path), manifest.parts[name]
        for expected, compute in ((entry.digest, _digest_of), (entry.identity, _identity_of)):
            try:
                if (found := compute(name, parts[name], manifest)) != expected:
                    return IntegrityError(
                        where,
                        expected=expected,
                        found=found,
                        do="this part was damaged, changed or exchanged; use another copy",
                    )
            except (FormatError, IncompleteStateError, CalibrationError, DecryptionError) as error:
                return error
        return None

    wrong: dict[str, SemqStateError] = {}
    for name, error in in_order(tried, manifest.parts):
        advance(parts[name].size)
        if error is not None:
            wrong[name] = error
    if not wrong and manifest.capsule_id != claimed:
        wrong["capsule"] = _exchanged(str(parts[WEIGHTS].path).removesuffix(f", part {WEIGHTS}"), claimed, manifest)
    return wrong


def calibration_of(part: Part) -> Calibration:
    """A calibration from its file.

    Raises:
        FormatError: that is no safetensors file, or too large.
        CalibrationError: it is no calibration.
    """
    where = str(part.path)
    header = read_header(part.read, part.size, where)
    if part.size > _MOST_CALIBRATION or header.metadata.get("format") != calibration_files.FORMAT:
        raise CalibrationError(
            where, expected="a calibration", found=f"{header.metadata.get('format')!r:.80}", do="use another copy"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, section in header.sections.items():
        data = np.empty(section.n_bytes, np.uint8)
        part.read_into(header.data_start + section.begin, data.data)
        tensors[name] = content.tensor_of(data, section.spec)
    table = tensors.pop("calibration", torch.empty(0))
    return calibration_files.of_parts(table, tensors, where)


def texts_of(parts: dict[str, Part], manifest: CapsuleManifest) -> dict[str, bytes]:
    """The tokenizer's files, unpacked, by name."""
    return {name[len(TOKENIZER) :]: _text(name, parts[name], manifest) for name in _files(manifest)}


def _files(manifest: CapsuleManifest) -> list[str]:
    return [name for name in manifest.parts if name.startswith(TOKENIZER)]


def _text(name: str, part: Part, manifest: CapsuleManifest) -> bytes:
    entry = manifest.parts[name]
    return inflated(entry.coding, part.read(0, part.size), entry.n_bytes, str(part.path))


def _digest_of(name: str, part: Part, manifest: CapsuleManifest) -> str:
    return digest_of(part)


def _identity_of(name: str, part: Part, manifest: CapsuleManifest) -> str:
    if name == WEIGHTS:
        with open_weights_file(part) as (_, _, inner, _):
            return inner.state_id
    if name == SNAPSHOT:
        with open_snapshot(part) as (_, _, inner):
            return inner.state_id
    if name == CALIBRATION:
        return calibration_of(part).digest
    return content.digest(np.frombuffer(_text(name, part, manifest), np.uint8))


def _damage(parts: dict[str, Part], manifest: CapsuleManifest) -> dict[str, str]:
    """What does not hold inside of parts whose bytes do, or between them."""
    at = WEIGHTS
    try:
        held = load_weights(parts[WEIGHTS])
        at = SNAPSHOT
        calibration = calibration_of(parts[CALIBRATION]) if CALIBRATION in parts else None
        made_by = load(parts[SNAPSHOT], calibration=calibration).provenance
        at = "tokenizer"
        if _files(manifest):
            tokenizer_of(texts_of(parts, manifest), "tokenizer")
        at = "capsule"
        weights_id = manifest.parts[WEIGHTS].identity
        check_belongs(made_by, held, weights_id, lambda mode: weights_digest(build(held), mode))
    except SemqStateError as error:
        return {at: str(error)}
    return {}


def _exchanged(where: str, claimed: str, manifest: CapsuleManifest) -> IntegrityError:
    return IntegrityError(
        where,
        expected=f"the parts of {claimed}",
        found=f"{', '.join(sorted(manifest.parts))} of {manifest.capsule_id}, each whole",
        do="one of these parts was exchanged for that of another capsule; use another copy",
    )
