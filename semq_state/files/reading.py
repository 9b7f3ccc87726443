"""`sq.load` and `sq.inspect`: a file to a snapshot, section by section, every digest compared."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from semq_state import calibration as calibrations
from semq_state import codecs, container, content
from semq_state.calibration import Calibration, Predictor
from semq_state.container import Manifest
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.errors import (
    CalibrationError,
    DecryptionError,
    FormatError,
    IntegrityError,
    SemqStateError,
    UnknownCodecError,
)
from semq_state.files import joint_reading
from semq_state.files.forms import decoded, embedded_calibration
from semq_state.files.info import SnapshotInfo
from semq_state.files.opening import assembled, is_coded, open_snapshot, section_in, specs_of, told_from
from semq_state.files.pipeline import Job, Progress, Scratch, counter, in_order
from semq_state.sealing import SealedFile, Unlock
from semq_state.snapshot import Snapshot
from semq_state.stores import ReadableFile, Source, size_of


def load(
    path: Source,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    predictor: Predictor | str | os.PathLike[str] | None = None,
    unlock: Unlock | None = None,
    progress: Progress | None = None,
) -> Snapshot:
    """Reads a snapshot back, every digest checked.

    A compact one is decoded; `Snapshot.coding` says what coding had done to it. Its decoded numbers may differ in
    the last bits from machine to machine; its identity, computed over its symbols, does not.

    Args:
        path: a file that `save` wrote, or one that is open for reading.
        calibration: the calibration that a compact file refers to, or its file; by default the one that the file
            carries along, or that the cache folder has.
        predictor: the predictor that an `exact-predicted` file refers to, or its file; by default the one that the
            cache folder has.
        unlock: what opens a sealed file: a `Passphrase`, `KeyFile` or `PrivateKey` of `semq_state.sealing`, or
            several to try. Plain files need none.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The snapshot, its tensors on the CPU.

    Raises:
        StoreError: there is no such file, or the disk failed.
        FormatError: it is not a snapshot, or a newer one.
        IntegrityError: it was damaged or changed.
        IncompleteStateError: a tensor is missing.
        CalibrationError: the calibration or predictor that the file refers to is not there; the message names it.
        DecryptionError: it is sealed, and no key was given or none opens it, or a section was changed.

    Example:
        >>> snapshot = sq.load("chat.safetensors")  # doctest: +SKIP
    """
    with open_snapshot(path, unlock) as (file, header, manifest):
        specs = {name: entry.spec for name, entry in manifest.tensors.items()}
        advance = counter(progress, sum(spec.n_bytes for spec in specs.values()))
        tensors: dict[str, torch.Tensor] = {}
        read = partial(read_section, file, header, manifest)
        # Each tensor is made when its first section arrives; that all are there was checked.
        for job, data in in_order(read, list(jobs(manifest))):
            spec = specs[job.tensor]
            if (job.start, job.stop) == bounds_of(spec):
                tensors[job.tensor] = content.tensor_of(data, spec)
            else:
                if job.tensor not in tensors:
                    tensors[job.tensor] = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
                part = content.tensor_of(data, spec.chunk(job.start, job.stop))
                content.chunk_of(tensors[job.tensor], job.start, job.stop).copy_(part)
            advance(len(data))
        for chunk in joint_reading.chunks(file, header, manifest, joint_reading.finder(predictor, manifest)):
            for failure in chunk.failures.values():
                raise failure
            for name, part in chunk.tensors.items():
                if (chunk.start, chunk.stop) == bounds_of(specs[name]):
                    tensors[name] = part
                    continue
                if name not in tensors:
                    tensors[name] = torch.empty(specs[name].shape, dtype=part.dtype)
                content.chunk_of(tensors[name], chunk.start, chunk.stop).copy_(part)
            advance(sum(part.nbytes for part in chunk.tensors.values()))
    if is_coded(manifest):
        tensors = _decoded(manifest, tensors, calibration, str(file.path))
    return assembled(manifest, tensors, str(file.path))


def _decoded(
    manifest: Manifest,
    tensors: dict[str, torch.Tensor],
    given: Calibration | str | os.PathLike[str] | None,
    where: str,
) -> dict[str, torch.Tensor]:
    """The state's tensors from a compact file's."""

    @functools.cache
    def calibration(digest: str) -> Calibration:
        if isinstance(given, Calibration):
            found: Calibration | None = given
        else:
            found = calibrations.load_calibration(given) if given else embedded_calibration(tensors)
        if found is None:
            return calibrations.find_digest(digest, manifest.provenance["weights"])
        if found.digest != digest:
            raise CalibrationError(
                "calibration", expected=f"{digest:.80}", found=found.digest, do="name the file of that one"
            )
        return found

    with told_from(where):
        return decoded(manifest.structure, tensors, calibration)


def inspect(path: Source, *, unlock: Unlock | None = None) -> SnapshotInfo:
    """What a file says about itself: header and manifest, no tensors. `verify` proves it.

    Args:
        path: the file.
        unlock: what opens it where it is sealed; see `load`.

    Raises:
        StoreError: there is no such file.
        FormatError: it is not a snapshot, or a newer one.
        DecryptionError: it is sealed, and no key was given or none opens it, or it was changed.

    Example:
        >>> sq.inspect("chat.safetensors").n_tokens  # doctest: +SKIP
    """
    with open_snapshot(path, unlock) as (file, _, manifest):
        sizes = {name: spec.n_bytes for name, spec in specs_of(manifest).items()}
        cached = sum(n for name, n in sizes.items() if not name.startswith(("generation.", "checkpoints.")))
        n_bytes, raw, sealed = size_of(path), sum(sizes.values()), isinstance(file, SealedFile)
        return SnapshotInfo(str(file.path), n_bytes, raw, cached, manifest.codec, manifest, sealed)


def failures_of(
    file: ReadableFile,
    header: container.Header,
    manifest: Manifest,
    predictor: Predictor | str | os.PathLike[str] | None,
    advance: Callable[[int], None],
) -> dict[str, SemqStateError]:
    """Decodes every section and compares its digests, keeping none; what failed, by section.

    Args:
        file: the file.
        header: its header.
        manifest: its manifest.
        predictor: as for `load`.
        advance: called with the bytes of each section that is done.
    """
    scratch = Scratch()

    def tried(job: Job) -> int | SemqStateError:
        try:
            return len(read_section(file, header, manifest, job, scratch))
        except (FormatError, UnknownCodecError, DecryptionError) as error:
            return error

    failures: dict[str, SemqStateError] = {}
    for job, result in in_order(tried, list(jobs(manifest))):
        if isinstance(result, SemqStateError):
            failures[job.section] = result
        else:
            advance(result)
    for chunk in joint_reading.chunks(file, header, manifest, joint_reading.finder(predictor, manifest)):
        failures |= chunk.failures
        advance(sum(part.nbytes for part in chunk.tensors.values()))
    return failures


def bounds_of(spec: TensorSpec) -> tuple[int, int]:
    return 0, spec.n_tokens


def jobs(manifest: Manifest) -> Iterator[Job]:
    for name, tensor in manifest.tensors.items():
        for entry in tensor.sections:
            yield Job(name, entry.section, entry.start, entry.stop)


def read_section(
    file: ReadableFile, header: container.Header, manifest: Manifest, job: Job, scratch: Scratch | None = None
) -> Bytes:
    """The canonical bytes of one section, decoded, with their digests compared.

    Args:
        file: the file.
        header: its header.
        manifest: its manifest.
        job: the section.
        scratch: where the bytes may stand until the next call, for callers that keep none of them.
    """
    tensor = manifest.tensors[job.tensor]
    entry = next(s for s in tensor.sections if s.section == job.section)
    spec, section = tensor.spec.chunk(job.start, job.stop), header.sections[job.section]
    where = section_in(str(file.path), job.section)
    payload = scratch.take("payload", section.n_bytes) if scratch else np.empty(section.n_bytes, np.uint8)
    file.read_into(header.data_start + section.begin, payload.data)
    if section.spec == spec and entry.codec == "raw":
        out = payload  # plain bytes are decoded where they stand
    else:
        out = scratch.take("out", spec.n_bytes) if scratch else np.empty(spec.n_bytes, np.uint8)
    with told_from(where):
        codecs.decoder(entry.codec).decode(payload, entry.params, spec, out)
    chunks = tensor.spec.chunks()
    at = [i for i, (start, stop) in enumerate(chunks) if job.start <= start and stop <= job.stop]
    expected = tuple(tensor.digests[i] for i in at)
    wrong = [pair for pair in zip(expected, content.chunk_digests(out, spec), strict=True) if pair[0] != pair[1]]
    if wrong:
        raise IntegrityError(
            where,
            expected=wrong[0][0],
            found=wrong[0][1],
            do="the tensor was changed or damaged",
        )
    return out
