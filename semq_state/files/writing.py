"""`sq.save`: a snapshot to a file, section by section, read again before it counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from semq_state import calibration as calibrations
from semq_state import container, content
from semq_state.calibration import Calibration, Predictor
from semq_state.codecs import AbstractCodec, Encoded, predicted
from semq_state.container import MANIFEST, JointEntry, Manifest, PlainSink, SectionEntry, SectionWriter, TensorEntry
from semq_state.content import TensorSpec
from semq_state.errors import CalibrationError, IntegrityError
from semq_state.files import joint
from semq_state.files.forms import Codec, Form, form_of, measured
from semq_state.files.info import SnapshotInfo
from semq_state.files.opening import open_snapshot
from semq_state.files.pipeline import Job, Progress, counter, in_order
from semq_state.files.reading import bounds_of, failures_of, inspect
from semq_state.sealing import Seal, SealedSink, SealTo, new_seal
from semq_state.snapshot import Snapshot
from semq_state.stores import atomic_write
from semq_state.symbolic import is_lossy


def save(
    snapshot: Snapshot,
    path: str | os.PathLike[str],
    *,
    codec: Codec = "exact",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    embed_calibration: bool = False,
    predictor: Predictor | str | os.PathLike[str] | None = None,
    seal: SealTo | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> SnapshotInfo:
    """Writes a snapshot to one safetensors file.

    The file appears under its name only when it is whole: it is written beside it, synced, read again and
    compared, then renamed. The same snapshot with the same options gives the same bytes.

    Lossless codecs are `exact`, `exact-max` (smaller, slower to load), `raw` (plain tensors that any safetensors
    reader opens) and `exact-predicted` (the smallest, for bfloat16 states; it needs a predictor of the model to
    save and to load). Compact ones are chosen by quality: `near`, `compact`, `tiny`, or a target, `kl=0.002` (mean
    KL divergence of the next token) or `ratio=20`. They need a calibration of the model (`sq.calibrate`), which
    is found by the digest of its weights; without one the presets fall back to a codec that needs none, and say
    so. The first 4 tokens and everything that is not keys and values stay exact. The file records what was picked
    and what it cost this very state: see `Snapshot.coding`.

    Args:
        snapshot: what to save.
        path: the file; an existing one is replaced.
        codec: one of these words, the id of a codec (`rotated`, `uniform`, `semq`), or a codec or policy value.
        calibration: a calibration or its file, instead of the one that the cache folder has for these weights.
        embed_calibration: carry the calibration along, so that the file can be read without any other.
        predictor: for `exact-predicted`, a predictor or its file, instead of the one that the cache folder has.
        seal: encrypt the file to a `Passphrase`, `KeyFile` or `Recipient` of `semq_state.sealing`, or to several,
            each of which opens it alone. No plain byte reaches the disk. Sealed files of one snapshot differ.
        verify: read the file again, decode it and compare every digest before it counts as saved.
        progress: called with the bytes done and the bytes in all.

    Returns:
        What the file says about itself.

    Raises:
        StoreError: the folder or disk refused; nothing was changed.
        UnknownCodecError: no such preset.
        CalibrationError: a calibration or predictor is missing, damaged or of another model.
        IntegrityError: what was read again is not what was written.
        DecryptionError: a key file or public key to seal to is none.
        UnsupportedOperationError: `seal` needs `pip install 'semq-state[seal]'`.

    Example:
        >>> sq.save(run.snapshot(), "chat.safetensors")  # doctest: +SKIP
        >>> sq.save(run.snapshot(), "chat.safetensors", codec="compact")  # doctest: +SKIP
    """
    sealed = None if seal is None else new_seal(seal)
    calibrated = _calibration_for(snapshot, codec, calibration)
    guessing = _predictor_for(snapshot, predictor) if codec == predicted.PRESET else None
    form = form_of(snapshot, codec, calibrated, embed=embed_calibration, predictor=guessing)
    tensors = form.tensors
    specs = dict(content.specs_of(tensors))
    joint_jobs = joint.jobs_of(form.joints)
    together = {name for each in form.joints for name in each.names}
    jobs = [
        Job(tensor_name, section, start, stop)
        for tensor_name in _in_file_order(specs, form)
        if tensor_name not in together
        for section, start, stop in _sections(tensor_name, specs[tensor_name], form.coder_of(tensor_name))
    ]
    total = sum(spec.n_bytes for spec in specs.values()) * (2 if verify else 1)
    advance = counter(progress, total)
    metadata = {
        "format": "semq_state",
        "format_version": str(container.FORMAT_VERSION),
        "model": snapshot.provenance.model_name,
        "state_id": f"sha256:{'0' * 64}",
    }
    entries: dict[str, list[SectionEntry]] = {tensor_name: [] for tensor_name in specs}
    digests: dict[str, list[str]] = {tensor_name: [] for tensor_name in specs}
    written: dict[str, int] = dict.fromkeys(specs, 0)

    def reread(hidden: Path) -> None:
        if verify:
            _compare(hidden, manifest, guessing, sealed, advance)

    promised = None if sealed is None else _state_id(snapshot, form)
    with atomic_write(path, check=reread) as file:
        writer = SectionWriter(
            PlainSink(file) if sealed is None or promised is None else SealedSink(file, sealed, promised),
            [*(job.section for job in jobs), *(part.section for part in joint_jobs), MANIFEST],
            max(map(_n_dims, specs.values())),
            metadata,
        )
        coded = partial(_coded, form, specs)
        for job, (encoded, found) in in_order(coded, jobs):
            spec, coder = specs[job.tensor].chunk(job.start, job.stop), form.coder_of(job.tensor)
            writer.write(job.section, encoded.pieces, spec if coder.id == "raw" else None)
            entries[job.tensor].append(SectionEntry(job.section, job.start, job.stop, coder.id, encoded.params))
            digests[job.tensor].extend(found)
            written[job.tensor] += encoded.n_bytes
            advance(spec.n_bytes)
        digests |= {name: list(d) for name, d in content.all_digests({n: tensors[n] for n in together}).items()}
        payloads = []
        for part, payload in in_order(partial(joint.coded, form.joints, tensors), joint_jobs):
            writer.write(part.section, [payload])
            payloads.append((part, content.digest(np.frombuffer(payload, np.uint8))))
            of = form.joints[part.number]
            advance(len(of.names) * of.spec.chunk(part.start, part.stop).n_bytes)
        joints = joint.entries_of(form.joints, payloads)
        manifest = _manifest(snapshot, form, specs, digests, entries, written, joints)
        if promised not in (None, manifest.state_id):
            raise IntegrityError(
                str(path),
                expected=f"the state {promised}",
                found=f"{manifest.state_id}, for it was changed while it was saved",
                do="save a state that nothing writes to",
            )
        writer.write(MANIFEST, [manifest.to_bytes()])
        writer.finish(metadata | {"state_id": manifest.state_id})
    return inspect(path, unlock=sealed)


def _calibration_for(
    snapshot: Snapshot, codec: Codec, given: Calibration | str | os.PathLike[str] | None
) -> Calibration | None:
    """The calibration for a save: the one that was given, or the one that the folder has."""
    if given is None:
        return (
            calibrations.find(snapshot.provenance.weights) if isinstance(codec, str) and is_lossy(codec) else None
        )
    return given if isinstance(given, Calibration) else calibrations.load_calibration(given)


def _predictor_for(snapshot: Snapshot, given: Predictor | str | os.PathLike[str] | None) -> Predictor | None:
    """The predictor for a save; None where there is nothing that one could take."""
    weights = snapshot.provenance.weights
    if given is None:
        return calibrations.predictor_for(weights) if joint.is_predictable(snapshot) else None
    found = given if isinstance(given, Predictor) else calibrations.load_predictor(given)
    if found.weights != weights:
        raise CalibrationError(
            f"predictor {found.digest:.24}…",
            expected=f"one of the model that made this state, weights {weights:.24}…",
            found=f"one of {found.model_name or 'another model'}, weights {found.weights:.24}…",
            do="measure the state's own model",
        )
    return found


def _in_file_order(specs: Mapping[str, TensorSpec], form: Form) -> list[str]:
    # Plain tensors stand widest dtype first, so that each begins at a multiple of its itemsize.
    return sorted(specs, key=lambda name: -specs[name].itemsize) if form.coder.id == "raw" else list(specs)


def _sections(name: str, spec: TensorSpec, coder: AbstractCodec) -> list[tuple[str, int, int]]:
    if coder.id == "raw" or spec.n_chunks == 1:
        return [(name, *bounds_of(spec))]
    return [(f"{name}#{i}", start, stop) for i, (start, stop) in enumerate(spec.chunks())]


def _coded(form: Form, specs: Mapping[str, TensorSpec], job: Job) -> tuple[Encoded, tuple[str, ...]]:
    chunk = content.chunk_of(form.tensors[job.tensor], job.start, job.stop)
    data = content.raw_bytes(chunk)
    spec = specs[job.tensor].chunk(job.start, job.stop)
    return form.coder_of(job.tensor).encode(data, spec), content.chunk_digests(data, spec)


def _manifest(
    snapshot: Snapshot,
    form: Form,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, list[str]],
    entries: Mapping[str, list[SectionEntry]],
    written: Mapping[str, int],
    joints: tuple[JointEntry, ...],
) -> Manifest:
    whole = content.content_digest(form.structure, form.own_specs, digests)
    return Manifest(
        writer=f"semq_state {version('semq-state')}",
        codec=form.codec,
        structure=form.structure,
        tensors={
            name: TensorEntry(spec, tuple(digests[name]), tuple(entries[name])) for name, spec in specs.items()
        },
        provenance=snapshot.provenance.as_dict(),
        content_digest=whole,
        state_id=content.state_id(whole, snapshot.provenance.identity()),
        report={} if form.coding is None else measured(form, snapshot, written).as_dict(),
        joint=joints,
    )


def _state_id(snapshot: Snapshot, form: Form) -> str:
    """What the manifest will say: every sealed section is bound to it, and the first is written before the last
    is hashed."""
    own = form.own_specs
    digests = content.all_digests({name: form.tensors[name] for name in own})
    return content.state_id(content.content_digest(form.structure, own, digests), snapshot.provenance.identity())


def _compare(
    path: Path,
    manifest: Manifest,
    predictor: Predictor | None,
    sealed: Seal | None,
    advance: Callable[[int], None],
) -> None:
    """Reads a finished file again and holds it against what should be in it."""
    with open_snapshot(path, sealed) as (file, header, found):
        failures = failures_of(file, header, found, predictor, advance)
    for failure in failures.values():
        raise failure
    if found.to_bytes() != manifest.to_bytes():
        raise IntegrityError(
            str(path),
            expected="the manifest just written",
            found="another one",
            do="check the disk",
        )


def _n_dims(spec: TensorSpec) -> int:
    return len(spec.shape)
