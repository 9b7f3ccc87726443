"""`sq.save`: a snapshot to a file, section by section, read again before it counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from semq_state import codecs, container, content
from semq_state.codecs import AbstractCodec, Encoded
from semq_state.container import MANIFEST, Manifest, SectionEntry, SectionWriter, TensorEntry
from semq_state.content import TensorSpec
from semq_state.errors import IntegrityError
from semq_state.files.info import SnapshotInfo
from semq_state.files.opening import opened
from semq_state.files.pipeline import Job, Progress, counter, in_order
from semq_state.files.reading import bounds_of, failures_of, inspect
from semq_state.snapshot import Snapshot
from semq_state.stores import LocalFile, atomic_write


def save(
    snapshot: Snapshot,
    path: str | os.PathLike[str],
    *,
    codec: str | AbstractCodec = "exact",
    verify: bool = True,
    progress: Progress | None = None,
) -> SnapshotInfo:
    """Writes a snapshot to one safetensors file.

    The file appears under its name only when it is whole: it is written beside it, synced, read again and
    compared, then renamed. The same snapshot with the same options gives the same bytes.

    Args:
        snapshot: what to save.
        path: the file; an existing one is replaced.
        codec: `exact` (lossless), `exact-max` (lossless, smaller, slower to load), `raw` (lossless, plain
            tensors that any safetensors reader opens), or a codec value.
        verify: read the file again, decode it and compare every digest before it counts as saved.
        progress: called with the bytes done and the bytes in all.

    Returns:
        What the file says about itself.

    Raises:
        StoreError: the folder or disk refused; nothing was changed.
        UnknownCodecError: no such preset.
        IntegrityError: what was read again is not what was written.

    Example:
        >>> sq.save(run.snapshot(), "chat.safetensors")  # doctest: +SKIP
    """
    name, coder = codec if isinstance(codec, str) else codec.id, codecs.preset(codec)
    tensors = snapshot.tensors()
    specs = dict(content.specs_of(tensors))
    jobs = [
        Job(tensor_name, section, start, stop)
        for tensor_name in _in_file_order(specs, coder)
        for section, start, stop in _sections(tensor_name, specs[tensor_name], coder)
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

    def reread(hidden: Path) -> None:
        if verify:
            _compare(hidden, manifest, advance)

    with atomic_write(path, check=reread) as file:
        writer = SectionWriter(
            file,
            [*(job.section for job in jobs), MANIFEST],
            max(map(_n_dims, specs.values())),
            metadata,
        )
        coded = partial(_coded, tensors, specs, coder)
        for job, (encoded, found) in in_order(coded, jobs):
            spec = specs[job.tensor].chunk(job.start, job.stop)
            writer.write(job.section, encoded.pieces, spec if coder.id == "raw" else None)
            entries[job.tensor].append(SectionEntry(job.section, job.start, job.stop, coder.id, encoded.params))
            digests[job.tensor].extend(found)
            advance(spec.n_bytes)
        manifest = _manifest(snapshot, name, specs, digests, entries)
        writer.write(MANIFEST, [manifest.to_bytes()])
        writer.finish(metadata | {"state_id": manifest.state_id})
    return inspect(path)


def _in_file_order(specs: Mapping[str, TensorSpec], coder: AbstractCodec) -> list[str]:
    # Plain tensors stand widest dtype first, so that each begins at a multiple of its itemsize.
    return sorted(specs, key=lambda name: -specs[name].itemsize) if coder.id == "raw" else list(specs)


def _sections(name: str, spec: TensorSpec, coder: AbstractCodec) -> list[tuple[str, int, int]]:
    if coder.id == "raw" or spec.n_chunks == 1:
        return [(name, *bounds_of(spec))]
    return [(f"{name}#{i}", start, stop) for i, (start, stop) in enumerate(spec.chunks())]


def _coded(
    tensors: Mapping[str, torch.Tensor],
    specs: Mapping[str, TensorSpec],
    coder: AbstractCodec,
    job: Job,
) -> tuple[Encoded, tuple[str, ...]]:
    chunk = content.chunk_of(tensors[job.tensor], job.start, job.stop)
    data = content.raw_bytes(chunk)
    spec = specs[job.tensor].chunk(job.start, job.stop)
    return coder.encode(data, spec), content.chunk_digests(data, spec)


def _manifest(
    snapshot: Snapshot,
    codec: str,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, list[str]],
    entries: Mapping[str, list[SectionEntry]],
) -> Manifest:
    structure = snapshot.structure()
    whole = content.content_digest(structure, specs, digests)
    return Manifest(
        writer=f"semq_state {version('semq-state')}",
        codec=codec,
        structure=structure,
        tensors={
            name: TensorEntry(spec, tuple(digests[name]), tuple(entries[name])) for name, spec in specs.items()
        },
        provenance=snapshot.provenance.as_dict(),
        content_digest=whole,
        state_id=content.state_id(whole, snapshot.provenance.identity()),
    )


def _compare(path: Path, manifest: Manifest, advance: Callable[[int], None]) -> None:
    """Reads a finished file again and holds it against what should be in it."""
    with LocalFile(path) as file:
        header, found = opened(file)
        failures = failures_of(file, header, found, advance)
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
