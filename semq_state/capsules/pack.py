"""`sq.pack`: a conversation with all that goes on with it, in one file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from semq_state import content
from semq_state.calibration import Calibration, find_digest, load_calibration, save_calibration
from semq_state.capsules.belonging import check_belongs
from semq_state.capsules.info import CapsuleInfo
from semq_state.capsules.manifest import (
    CALIBRATION,
    FORMAT,
    SNAPSHOT,
    TOKENIZER,
    VERSION,
    WEIGHTS,
    CapsuleManifest,
    PartEntry,
)
from semq_state.capsules.opening import inspect_capsule, opened_capsule, wrong_parts
from semq_state.capsules.parts import Pieces, digest_of
from semq_state.capsules.tokenizers import deflated, files_of
from semq_state.container import MANIFEST, Manifest, PlainSink, SectionWriter
from semq_state.content import TensorSpec
from semq_state.errors import Difference, ModelMismatchError, UnsupportedOperationError
from semq_state.files import Progress, counter, failures_of, inspect, open_snapshot, save
from semq_state.files.forms import EMBEDDED_CALIBRATION, Codec
from semq_state.files.opening import provenance_of
from semq_state.fingerprint import tokenizer_digest, weights_digest
from semq_state.provenance import Provenance
from semq_state.snapshot import Snapshot
from semq_state.stores import LocalFile, atomic_write, check_writable
from semq_state.weights.building import WEIGHTS_FILE, build
from semq_state.weights.file import inspect_weights, load_weights, save_weights
from semq_state.weights.held import QuantizedWeights


@dataclass(frozen=True)
class _Part:
    """What becomes a part: a file, or the bytes of one, and what it is."""

    name: str
    source: Path | bytes
    coding: str
    n_bytes: int
    identity: str

    def entry(self) -> PartEntry:
        return PartEntry(self.coding, self._digest(), self.n_bytes, self.identity)

    def _digest(self) -> str:
        if isinstance(self.source, bytes):
            return content.digest(np.frombuffer(self.source, np.uint8))
        with LocalFile(self.source) as file:
            return digest_of(file)


def pack(
    snapshot: Snapshot | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    weights: QuantizedWeights | str | os.PathLike[str],
    tokenizer: Any = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    codec: Codec = "compact",
    progress: Progress | None = None,
) -> CapsuleInfo:
    """Packs a conversation, quantised weights, configuration and tokenizer into one file, a capsule.

    `open_capsule` goes on from it with nothing else at hand. The weights must be made from those that made the
    state, or be those that made it. The file appears under its name only when it is whole and was read again.

    Args:
        snapshot: the state; of one that stands in a file already, the file's bytes are taken as they are.
        path: the capsule; an existing file is replaced.
        weights: `model.semq_weights` of a model that `quantize` made, or the file or folder of such.
        tokenizer: the model's; without one whoever opens the capsule sees tokens only.
        calibration: a calibration of the original model, or its file, to code the state with and to carry along.
            One that the state's file refers to is carried along either way.
        codec: in which form the state is saved, as for `save`.
        progress: called with the bytes done and the bytes in all of each step: weights, state, the file itself.

    Returns:
        What the capsule says about itself.

    Raises:
        ModelMismatchError: weights or tokenizer are of another model than the state.
        CalibrationError: the calibration that the state's file refers to is not there.
        UnsupportedOperationError: the state's file is sealed or needs a predictor; the tokenizer has code of its
            own.
        FormatError, IntegrityError: a file that was named is damaged.
        StoreError: the folder or disk refused; nothing was changed.

    Example:
        >>> sq.pack(run.snapshot(), "chat.capsule", weights=model.semq_weights, tokenizer=tok)  # doctest: +SKIP
    """
    path = Path(path)
    check_writable(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as made:
        folder = Path(made)
        weights_part, held = _weights(weights, folder, progress)
        state_part, made_by, digest = _state(snapshot, folder, codec, calibration, progress)
        check_belongs(made_by, held, weights_part.identity, lambda mode: weights_digest(build(held), mode))
        parts = [weights_part, *_tokenizer(tokenizer, made_by), *_calibration(calibration, digest, made_by, folder)]
        _write(path, [*parts, state_part], made_by.model_name, progress)
    return inspect_capsule(path)


def _weights(
    given: QuantizedWeights | str | os.PathLike[str], folder: Path, progress: Progress | None
) -> tuple[_Part, QuantizedWeights]:
    if isinstance(given, QuantizedWeights):
        file, held = folder / WEIGHTS, given
        save_weights(held, file, progress=progress)
    else:
        file = Path(given) / WEIGHTS_FILE if Path(given).is_dir() else Path(given)
        held = load_weights(file, progress=progress)
    info = inspect_weights(file)
    return _Part(WEIGHTS, file, "raw", info.n_bytes, info.weights_id), held


def _state(
    given: Snapshot | str | os.PathLike[str],
    folder: Path,
    codec: Codec,
    calibration: Calibration | str | os.PathLike[str] | None,
    progress: Progress | None,
) -> tuple[_Part, Provenance, str]:
    """The state's part, its origin, and the digest of the calibration that it cannot be read without, if any."""
    if isinstance(given, Snapshot):
        file = folder / SNAPSHOT
        save(given, file, codec=codec, calibration=calibration, progress=progress)
    else:
        file = Path(given)
    info = inspect(file)
    if info.sealed or info.manifest.joint:
        raise UnsupportedOperationError(
            str(file),
            expected="a state that opens without a key and without a predictor",
            found="a sealed one" if info.sealed else "one coded as exact-predicted",
            do="load it and pack the snapshot",
        )
    if not isinstance(given, Snapshot):
        _check_whole(file, progress)
    needed = "" if info.coding is None or _embeds(info.manifest) else info.coding.calibration
    part = _Part(SNAPSHOT, file, "raw", info.n_bytes, info.state_id)
    return part, provenance_of(info.manifest, str(file)), needed


def _check_whole(file: Path, progress: Progress | None) -> None:
    with open_snapshot(file) as (source, header, manifest):
        advance = counter(progress, sum(t.spec.n_bytes for t in manifest.tensors.values()))
        for failure in failures_of(source, header, manifest, None, advance).values():
            raise failure


def _embeds(manifest: Manifest) -> bool:
    return any(name.startswith(EMBEDDED_CALIBRATION) for name in manifest.tensors)


def _tokenizer(tokenizer: Any, made_by: Provenance) -> list[_Part]:
    if tokenizer is None:
        return []
    found = tokenizer_digest(tokenizer)
    if made_by.tokenizer not in (None, found):
        raise ModelMismatchError(
            [Difference("tokenizer", str(made_by.tokenizer), found)], do="pack the tokenizer of the state's model"
        )
    parts = []
    for name, data in files_of(tokenizer).items():
        coding, coded = deflated(data)
        identity = content.digest(np.frombuffer(data, np.uint8))
        parts.append(_Part(f"{TOKENIZER}{name}", coded, coding, len(data), identity))
    return parts


def _calibration(
    given: Calibration | str | os.PathLike[str] | None, digest: str, made_by: Provenance, folder: Path
) -> list[_Part]:
    """The calibration that was given, or that the state's file refers to."""
    if given is None and not digest:
        return []
    if given is None:
        found = find_digest(digest, made_by.weights)
    else:
        found = given if isinstance(given, Calibration) else load_calibration(given, digest=digest or None)
    if (digest and found.digest != digest) or found.weights != made_by.weights:
        raise ModelMismatchError(
            [
                Difference(
                    "calibration", digest or f"one of {made_by.weights}", f"{found.digest} of {found.weights}"
                )
            ],
            do="name the calibration that the state was saved with",
        )
    file = save_calibration(found, folder / CALIBRATION)
    return [_Part(CALIBRATION, file, "raw", file.stat().st_size, found.digest)]


def _write(path: Path, parts: list[_Part], model: str, progress: Progress | None) -> None:
    entries = {part.name: part.entry() for part in parts}
    manifest = CapsuleManifest(f"semq_state {version('semq-state')}", entries)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": model,
        "capsule_id": manifest.capsule_id,
    }
    advance = counter(progress, sum(part.n_bytes for part in parts))

    def reread(hidden: Path) -> None:
        with opened_capsule(hidden) as (found, told, claimed):
            for error in wrong_parts(found, told, claimed).values():
                raise error

    with atomic_write(path, check=reread) as file:
        writer = SectionWriter(PlainSink(file), [*entries, MANIFEST], 1, metadata)
        for part in parts:
            _copy(writer, part)
            advance(part.n_bytes)
        writer.write(MANIFEST, [manifest.to_bytes()])
        writer.finish(metadata)


def _copy(writer: SectionWriter, part: _Part) -> None:
    """Appends a part, a few MiB at a time."""
    if isinstance(part.source, bytes):
        writer.write(part.name, [part.source])
        return
    with LocalFile(part.source) as file:
        writer.write(part.name, Pieces(file), TensorSpec("U8", (file.size,)))
