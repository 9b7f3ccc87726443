"""Quantised weights as a safetensors file: one matrix after the other, every digest checked, claims held first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from semq_state import container, content
from semq_state.codecs import AbstractCodec, Encoded, Pco, Planes
from semq_state.container import (
    MANIFEST,
    SIGNATURE,
    Header,
    Manifest,
    PlainSink,
    SectionEntry,
    SectionWriter,
    TensorEntry,
    read_manifest,
)
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.errors import FormatError, IntegrityError
from semq_state.files.opening import check_claims
from semq_state.files.pipeline import Job, Progress, counter, in_order
from semq_state.files.reading import bounds_of, failures_of, read_section
from semq_state.provenance import Provenance
from semq_state.stores import ReadableFile, Source, atomic_write, opened, size_of
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.info import WeightsInfo
from semq_state.weights.matrix import QuantizedMatrix
from semq_state.weights.table import FORMAT, VERSION, Told, structure_of, told_by

_CODED_AS_SYMBOLS = ("symbols", "escapes")


def save_weights(
    held: QuantizedWeights, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> WeightsInfo:
    """Writes quantised weights to one file, whole or not at all; it is read again before it counts.

    Matrices are unpacked one at a time and coded on all cores. The same weights are the same bytes.

    Args:
        held: what `sq.quantize` left in `model.semq_weights`.
        path: the file; an existing one is replaced.
        progress: called with the bytes done and the bytes in all.

    Returns:
        What the file says about itself.

    Raises:
        StoreError: the folder or disk refused; nothing was changed.
        IntegrityError: what was read again is not what was written.
    """
    specs = _specs(held)
    names = [section for name, spec in specs.items() for section, _, _ in _sections(name, spec)]
    advance = counter(progress, 2 * sum(spec.n_bytes for spec in specs.values()))
    metadata = _metadata(held.origin, f"sha256:{'0' * 64}")
    entries: dict[str, list[SectionEntry]] = {name: [] for name in specs}
    digests: dict[str, list[str]] = {name: [] for name in specs}

    def reread(hidden: Path) -> None:
        _compare(hidden, manifest, advance)

    with atomic_write(path, check=reread) as file:
        writer = SectionWriter(PlainSink(file), [*names, MANIFEST], 1, metadata)
        for (job, _), (encoded, found) in in_order(_coded, _pieces(held, specs)):
            writer.write(job.section, encoded.pieces)
            codec = _codec_of(job.tensor).id
            entries[job.tensor].append(SectionEntry(job.section, job.start, job.stop, codec, encoded.params))
            digests[job.tensor].extend(found)
            advance(specs[job.tensor].chunk(job.start, job.stop).n_bytes)
        manifest = _manifest(held, specs, digests, entries)
        writer.write(MANIFEST, [manifest.to_bytes()])
        writer.finish(_metadata(held.origin, manifest.state_id))
    return inspect_weights(path)


def load_weights(source: Source, *, progress: Progress | None = None) -> QuantizedWeights:
    """Reads quantised weights back, every digest checked.

    Args:
        source: a file that `save_weights` wrote, or one that is open for reading.
        progress: called with the bytes done and the bytes in all.

    Raises:
        StoreError: there is no such file, or the disk failed.
        FormatError: it is no weights file, or a newer one.
        IntegrityError: it was damaged or changed.
    """
    with open_weights_file(source) as (file, header, manifest, told):
        where = str(file.path)
        advance = counter(progress, sum(entry.spec.n_bytes for entry in manifest.tensors.values()))
        plain: dict[str, torch.Tensor] = {}
        matrices: dict[str, QuantizedMatrix] = {}
        parts: dict[str, torch.Tensor] = {}
        for matrix, name, tensor in _tensors(file, header, manifest, told, advance):
            if not matrix:
                plain[name] = tensor
                continue
            parts[name] = tensor
            if len(parts) == len(told.parts[matrix]):
                described = told.structure["matrices"][matrix]
                matrices[matrix] = QuantizedMatrix.of(described, parts, f"{where}, matrix {matrix:.120}")
                parts = {}
        if missing := sorted(told.parts.keys() - matrices.keys()):
            raise FormatError(
                f"{where}, structure",
                expected="tensors of every matrix",
                found=f"none of {container.shown(missing)}",
                do="use another copy of the file",
            )
    said = told.structure
    return QuantizedWeights(
        recipe=said["recipe"],
        origin=told.origin,
        config=said["config"],
        generation_config=said["generation_config"],
        matrices=matrices,
        plain=plain,
        tied=said["tied"],
        activation_bits=said["activation_bits"],
    )


def inspect_weights(source: Source) -> WeightsInfo:
    """What a weights file says about itself: header and manifest, no tensors.

    Raises:
        StoreError, FormatError, IntegrityError: as `load_weights`.
    """
    with open_weights_file(source) as (file, header, manifest, told):
        stored: dict[int, tuple[int, int]] = {}
        n_quantized = 0
        for matrix, parts in told.parts.items():
            names = [f"matrix.{matrix}.{part}" for part in parts]
            n = _n_symbols(manifest, matrix)
            n_bytes = sum(header.sections[s.section].n_bytes for t in names for s in manifest.tensors[t].sections)
            bits = told.structure["matrices"][matrix].get("bits")
            bits = bits if type(bits) is int else 0
            before = stored.get(bits, (0, 0))
            stored[bits] = (before[0] + n, before[1] + n_bytes)
            n_quantized += n
        n_plain = sum(_n_values(manifest.tensors[f"plain.{name}"].spec) for name in told.plain)
        return WeightsInfo(
            path=str(file.path),
            n_bytes=size_of(source),
            weights_id=manifest.state_id,
            origin=told.origin,
            recipe=told.structure["recipe"],
            n_parameters=n_plain + n_quantized,
            n_quantized=n_quantized,
            stored=stored,
        )


def is_weights_file(source: Source) -> bool:
    """Whether a file calls itself one of quantised weights.

    Raises:
        StoreError, FormatError: there is no such file, or it is no safetensors file.
    """
    with opened(source) as file:
        header = container.read_header(file.read, file.size, str(file.path))
        return header.metadata.get("format") == FORMAT


@contextlib.contextmanager
def open_weights_file(source: Source) -> Iterator[tuple[ReadableFile, Header, Manifest, Told]]:
    """A weights file with its header and what its manifest tells, every claim held against the file.

    Raises:
        StoreError: there is no such file.
        FormatError: it is no weights file, or a newer one.
        IntegrityError: it was damaged or changed.
    """
    with opened(source) as file:
        where = str(file.path)
        header = container.read_header(file.read, file.size, where)
        section = header.sections.get(MANIFEST)
        if header.metadata.get("format") != FORMAT or section is None or section.spec.dtype != "U8":
            raise FormatError(
                where,
                expected="a file of quantised weights",
                found=f"another safetensors file, of format {container.shown(header.metadata.get('format'))}",
                do="name one that `semq-state quantize` wrote",
            )
        if SIGNATURE in header.sections:
            raise FormatError(where, expected="no signature", found="one", do="use another copy of the file")
        manifest = read_manifest(file.read(header.data_start + section.begin, section.n_bytes), header, where)
        check_claims(header, manifest, where)
        told = told_by(manifest, where)
        if header.metadata != (said := _metadata(told.origin, manifest.state_id)):
            raise FormatError(
                f"{where}, metadata",
                expected=container.shown(said),
                found=container.shown(dict(header.metadata)),
                do="use another copy of the file",
            )
        found = content.state_id(manifest.content_digest, told.origin.identity())
        if found != manifest.state_id:
            raise IntegrityError(
                where,
                expected=f"the weights {container.shown(manifest.state_id)}",
                found=found,
                do="the origin was changed; use another copy of the file",
            )
        yield file, header, manifest, told


def damage(source: Source, progress: Progress | None = None) -> dict[str, str]:
    """What does not hold in a weights file, by section; `file` where it cannot be opened at all.

    Raises:
        StoreError: there is no such file, or the disk failed.
    """
    try:
        with open_weights_file(source) as (file, header, manifest, _):
            advance = counter(progress, sum(t.spec.n_bytes for t in manifest.tensors.values()))
            found = {k: str(e) for k, e in failures_of(file, header, manifest, None, advance).items()}
        if not found:
            load_weights(source)
    except FormatError as error:
        return {"file": str(error)}
    return found


def _metadata(origin: Provenance, weights_id: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": origin.model_name,
        "state_id": weights_id,
    }


# Writing


def _specs(held: QuantizedWeights) -> dict[str, TensorSpec]:
    """The spec of every tensor, in the order in which they are written, without unpacking one."""
    specs = dict(content.specs_of(_plain(held)))
    for name, matrix in sorted(held.matrices.items()):
        dense = TensorSpec("U8", (matrix.rows, matrix.cols))
        kept = {"scale": matrix.scale, "zero": matrix.zero}
        if matrix.smoothing is not None:
            kept["smoothing"] = matrix.smoothing
        if matrix.branch is not None:
            kept |= {"counts": matrix.branch.counts, "coefficients": matrix.branch.coefficients}
        specs[f"matrix.{name}.symbols"] = dense
        if matrix.escaped_at is not None and matrix.escaped is not None:
            specs[f"matrix.{name}.escapes"] = dense
            kept["escaped"] = matrix.escaped
        specs |= dict(content.specs_of({f"matrix.{name}.{part}": tensor for part, tensor in kept.items()}))
    return specs


def _pieces(held: QuantizedWeights, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[Job, torch.Tensor]]:
    """Every section to write with its values; a matrix is unpacked when it is its turn."""
    yield from _cut(_plain(held), specs)
    for name, matrix in sorted(held.matrices.items()):
        yield from _cut({f"matrix.{name}.{part}": t for part, t in matrix.tensors().items()}, specs)


def _plain(held: QuantizedWeights) -> dict[str, torch.Tensor]:
    return {f"plain.{name}": tensor for name, tensor in sorted(held.plain.items())}


def _cut(
    tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[Job, torch.Tensor]]:
    for name, tensor in tensors.items():
        for section, start, stop in _sections(name, specs[name]):
            yield Job(name, section, start, stop), content.chunk_of(tensor, start, stop)


def _sections(name: str, spec: TensorSpec) -> list[tuple[str, int, int]]:
    if spec.n_chunks == 1:
        return [(name, *bounds_of(spec))]
    return [(f"{name}#{i}", start, stop) for i, (start, stop) in enumerate(spec.chunks())]


def _codec_of(name: str) -> AbstractCodec:
    return (
        Pco()
        if name.startswith("matrix.") and name.endswith(tuple(f".{p}" for p in _CODED_AS_SYMBOLS))
        else Planes()
    )


def _coded(piece: tuple[Job, torch.Tensor]) -> tuple[Encoded, tuple[str, ...]]:
    job, values = piece
    spec, data = content.spec_of(values, job.tensor), content.raw_bytes(values)
    return _codec_of(job.tensor).encode(data, spec), content.chunk_digests(data, spec)


def _manifest(
    held: QuantizedWeights,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, list[str]],
    entries: Mapping[str, list[SectionEntry]],
) -> Manifest:
    structure = structure_of(held)
    whole = content.content_digest(structure, specs, digests)
    return Manifest(
        writer=f"semq_state {version('semq-state')}",
        codec="weights",
        structure=structure,
        tensors={
            name: TensorEntry(spec, tuple(digests[name]), tuple(entries[name])) for name, spec in specs.items()
        },
        provenance=held.origin.as_dict(),
        content_digest=whole,
        state_id=content.state_id(whole, held.origin.identity()),
    )


def _compare(path: Path, manifest: Manifest, advance: Callable[[int], None]) -> None:
    with open_weights_file(path) as (file, header, found, _):
        for failure in failures_of(file, header, found, None, advance).values():
            raise failure
    if found.to_bytes() != manifest.to_bytes():
        raise IntegrityError(
            str(path), expected="the manifest just written", found="another one", do="check the disk"
        )


# Reading


def _tensors(
    file: ReadableFile, header: Header, manifest: Manifest, told: Told, advance: Callable[[int], None]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Matrix (empty for plain tensors), part or name, and tensor; matrix by matrix."""
    owners = {tensor: (matrix, name) for matrix, name, tensor in told.sections()}
    jobs = (
        Job(tensor, entry.section, entry.start, entry.stop)
        for tensor in owners
        for entry in manifest.tensors[tensor].sections
    )
    whole: torch.Tensor | None = None
    for job, data in in_order(partial(read_section, file, header, manifest), jobs):
        spec = manifest.tensors[job.tensor].spec
        if (job.start, job.stop) == bounds_of(spec):
            whole = content.tensor_of(data, spec)
        else:
            if whole is None:
                whole = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
            content.chunk_of(whole, job.start, job.stop).copy_(_part(data, spec, job))
        advance(len(data))
        if job.stop == spec.n_tokens:
            yield (*owners[job.tensor], whole)
            whole = None


def _part(data: Bytes, spec: TensorSpec, job: Job) -> torch.Tensor:
    return content.tensor_of(data, spec.chunk(job.start, job.stop))


def _n_symbols(manifest: Manifest, matrix: str) -> int:
    entry = manifest.tensors.get(f"matrix.{matrix}.symbols")
    return _n_values(entry.spec) if entry else 0


def _n_values(spec: TensorSpec) -> int:
    return spec.n_bytes // spec.itemsize
