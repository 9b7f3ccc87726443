"""Save, load and inspect: codecs, container and store, composed. Data flows section by section."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from semq_state import codecs, container, content
from semq_state.codecs import MAX_EXPANSION, AbstractCodec, Encoded
from semq_state.container import MANIFEST, Manifest, SectionEntry, SectionWriter, TensorEntry
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.errors import FormatError, IntegrityError, SemqStateError, UnknownCodecError
from semq_state.provenance import Provenance
from semq_state.snapshot import Snapshot, assemble
from semq_state.stores import LocalFile, atomic_write

Progress = Callable[[int, int], None]
"""Called with the raw bytes done so far and in all."""

PathLike = str | os.PathLike[str]

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot file says about itself, its tensors unread and so unproved.

    Args:
        path: the file.
        n_bytes: its size.
        raw_bytes: size of all its tensors before coding.
        cache_bytes: size of its cache tensors before coding.
        codec: the preset or codec that it was saved with.
        manifest: everything else.
    """

    path: str
    n_bytes: int
    raw_bytes: int
    cache_bytes: int
    codec: str
    manifest: Manifest

    @property
    def state_id(self) -> str:
        return self.manifest.state_id

    @property
    def n_tokens(self) -> int:
        return self.manifest.tensors["generation.input_ids"].spec.shape[-1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        structure, tensors = self.manifest.structure, self.manifest.tensors
        return {
            "path": self.path,
            "format_version": container.FORMAT_VERSION,
            "writer": self.manifest.writer,
            "codec": self.codec,
            "state_id": self.state_id,
            "content_digest": self.manifest.content_digest,
            "batch_size": tensors["generation.input_ids"].spec.shape[0],
            "n_tokens": self.n_tokens,
            "prompt_length": structure["generation"]["prompt_length"],
            "n_cached": structure["generation"]["n_cached"],
            "n_layers": len(structure["cache"]["layers"]),
            "cache_kind": structure["cache"]["kind"],
            "families": sorted({layer["family"] for layer in structure["cache"]["layers"]}),
            "n_bytes": self.n_bytes,
            "raw_bytes": self.raw_bytes,
            "cache_bytes": self.cache_bytes,
            "ratio": round(self.raw_bytes / self.n_bytes, 4),
            "provenance": dict(self.manifest.provenance),
            "tensors": {name: {"dtype": t.spec.dtype, "shape": list(t.spec.shape)} for name, t in tensors.items()},
        }


def save(
    snapshot: Snapshot,
    path: PathLike,
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
        _Job(tensor_name, section, start, stop)
        for tensor_name in _in_file_order(specs, coder)
        for section, start, stop in _sections(tensor_name, specs[tensor_name], coder)
    ]
    total = sum(spec.n_bytes for spec in specs.values()) * (2 if verify else 1)
    advance = _counter(progress, total)
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
        for job, (encoded, found) in _in_order(coded, jobs):
            spec = specs[job.tensor].chunk(job.start, job.stop)
            writer.write(job.section, encoded.pieces, spec if coder.id == "raw" else None)
            entries[job.tensor].append(SectionEntry(job.section, job.start, job.stop, coder.id, encoded.params))
            digests[job.tensor].extend(found)
            advance(spec.n_bytes)
        manifest = _manifest(snapshot, name, specs, digests, entries)
        writer.write(MANIFEST, [manifest.to_bytes()])
        writer.finish(metadata | {"state_id": manifest.state_id})
    return inspect(path)


def load(path: PathLike, *, progress: Progress | None = None) -> Snapshot:
    """Reads a snapshot back, every digest checked.

    Args:
        path: a file that `save` wrote.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The snapshot, its tensors on the CPU.

    Raises:
        StoreError: there is no such file, or the disk failed.
        FormatError: it is not a snapshot, or a newer one.
        IntegrityError: it was damaged or changed.
        IncompleteStateError: a tensor is missing.

    Example:
        >>> snapshot = sq.load("chat.safetensors")  # doctest: +SKIP
    """
    with LocalFile(path) as file:
        header, manifest = _opened(file)
        specs = {name: entry.spec for name, entry in manifest.tensors.items()}
        advance = _counter(progress, sum(spec.n_bytes for spec in specs.values()))
        tensors: dict[str, torch.Tensor] = {}
        read = partial(_read_section, file, header, manifest)
        # Each tensor is made when its first section arrives; that all are there was checked.
        for job, data in _in_order(read, list(_jobs(manifest))):
            spec = specs[job.tensor]
            if (job.start, job.stop) == _bounds(spec):
                tensors[job.tensor] = content.tensor_of(data, spec)
            else:
                if job.tensor not in tensors:
                    tensors[job.tensor] = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
                chunk = content.tensor_of(data, spec.chunk(job.start, job.stop))
                content.chunk_of(tensors[job.tensor], job.start, job.stop).copy_(chunk)
            advance(len(data))
    return _assembled(manifest, tensors, str(path))


def inspect(path: PathLike) -> SnapshotInfo:
    """What a file says about itself: header and manifest, no tensors. `verify` proves it.

    Raises:
        StoreError: there is no such file.
        FormatError: it is not a snapshot, or a newer one.

    Example:
        >>> sq.inspect("chat.safetensors").n_tokens  # doctest: +SKIP
    """
    with LocalFile(path) as file:
        _, manifest = _opened(file)
        sizes = {name: entry.spec.n_bytes for name, entry in manifest.tensors.items()}
        cached = sum(n for name, n in sizes.items() if name.startswith("layers."))
        return SnapshotInfo(str(path), file.size, sum(sizes.values()), cached, manifest.codec, manifest)


def check_sections(
    path: PathLike, *, progress: Progress | None = None
) -> tuple[Manifest, dict[str, SemqStateError]]:
    """Decodes every section and compares its digests, keeping none; returns what failed, by section.

    Raises:
        StoreError, FormatError, IncompleteStateError: header or manifest cannot be read at all.
    """
    with LocalFile(path) as file:
        header, manifest = _opened(file)
        advance = _counter(progress, sum(t.spec.n_bytes for t in manifest.tensors.values()))
        return manifest, _failures(file, header, manifest, advance)


@dataclass(frozen=True)
class _Job:
    """One section to write or read: tokens `start` to `stop` of `tensor`."""

    tensor: str
    section: str
    start: int
    stop: int


def _jobs(manifest: Manifest) -> Iterator[_Job]:
    for name, tensor in manifest.tensors.items():
        for entry in tensor.sections:
            yield _Job(name, entry.section, entry.start, entry.stop)


def _bounds(spec: TensorSpec) -> tuple[int, int]:
    return 0, spec.n_tokens


def _n_dims(spec: TensorSpec) -> int:
    return len(spec.shape)


def _in_file_order(specs: Mapping[str, TensorSpec], coder: AbstractCodec) -> list[str]:
    # Plain tensors stand widest dtype first, so that each begins at a multiple of its itemsize.
    return sorted(specs, key=lambda name: -specs[name].itemsize) if coder.id == "raw" else list(specs)


def _sections(name: str, spec: TensorSpec, coder: AbstractCodec) -> list[tuple[str, int, int]]:
    if coder.id == "raw" or spec.n_chunks == 1:
        return [(name, *_bounds(spec))]
    return [(f"{name}#{i}", start, stop) for i, (start, stop) in enumerate(spec.chunks())]


def _coded(
    tensors: Mapping[str, torch.Tensor],
    specs: Mapping[str, TensorSpec],
    coder: AbstractCodec,
    job: _Job,
) -> tuple[Encoded, tuple[str, ...]]:
    chunk = content.chunk_of(tensors[job.tensor], job.start, job.stop)
    data = content.raw_bytes(chunk)
    spec = specs[job.tensor].chunk(job.start, job.stop)
    return coder.encode(data, spec), _chunk_digests(data, spec)


def _chunk_digests(data: Bytes, spec: TensorSpec) -> tuple[str, ...]:
    if spec.n_chunks == 1:
        return (content.digest(data),)
    return content.tensor_digests(content.tensor_of(data, spec))


def _read_section(file: LocalFile, header: container.Header, manifest: Manifest, job: _Job) -> Bytes:
    """The canonical bytes of one section, decoded, with their digests compared."""
    tensor = manifest.tensors[job.tensor]
    entry = next(s for s in tensor.sections if s.section == job.section)
    spec, section = tensor.spec.chunk(job.start, job.stop), header.sections[job.section]
    where = _section_in(str(file.path), job.section)
    payload = np.frombuffer(file.read(header.data_start + section.begin, section.n_bytes), np.uint8)
    out = np.empty(spec.n_bytes, np.uint8)
    with _told_from(where):
        codecs.decoder(entry.codec).decode(payload, entry.params, spec, out)
    chunks = tensor.spec.chunks()
    at = [i for i, (start, stop) in enumerate(chunks) if job.start <= start and stop <= job.stop]
    expected = tuple(tensor.digests[i] for i in at)
    wrong = [pair for pair in zip(expected, _chunk_digests(out, spec), strict=True) if pair[0] != pair[1]]
    if wrong:
        raise IntegrityError(
            where,
            expected=wrong[0][0],
            found=wrong[0][1],
            do="the tensor was changed or damaged",
        )
    return out


def _opened(file: LocalFile) -> tuple[container.Header, Manifest]:
    where = str(file.path)
    header = container.read_header(file.read, file.size, where)
    section = header.sections.get(MANIFEST)
    if header.metadata.get("format") != "semq_state" or section is None or not _is_coded(section):
        raise FormatError(
            where,
            expected="a semq_state snapshot",
            found=f"another safetensors file, of format {container.shown(header.metadata.get('format'))}",
            do="name a file that semq_state saved",
        )
    data = file.read(header.data_start + section.begin, section.n_bytes)
    manifest = container.read_manifest(data, header, where)
    _check_claims(header, manifest, where)
    _check_tokens(manifest, where)
    # Put together from nothing first, so that a wrong structure is refused before a tensor is read.
    _assembled(manifest, dict.fromkeys(manifest.tensors, torch.empty(0)), where)
    provenance = _provenance(manifest, where)
    found = content.state_id(manifest.content_digest, provenance.identity())
    if found != manifest.state_id:
        raise IntegrityError(
            where,
            expected=f"state_id {container.shown(manifest.state_id)}",
            found=found,
            do="the provenance was changed",
        )
    return header, manifest


def _is_coded(section: container.Section) -> bool:
    return (section.spec.dtype, len(section.spec.shape)) == ("U8", 1)


def _check_claims(header: container.Header, manifest: Manifest, where: str) -> None:
    """Holds what each section stands for against what is stored, before any memory is taken for it."""
    for tensor in manifest.tensors.values():
        for entry in tensor.sections:
            spec, section = tensor.spec.chunk(entry.start, entry.stop), header.sections[entry.section]
            most = MAX_EXPANSION * section.n_bytes
            if spec.n_bytes > most:
                raise IntegrityError(
                    _section_in(where, entry.section),
                    expected=f"at most {most} bytes from {section.n_bytes}",
                    found=f"a claim of {spec.n_bytes}",
                    do="no writer makes such a file; do not trust it",
                )
            if not (section.spec == spec if entry.codec == "raw" else _is_coded(section)):
                raise IntegrityError(
                    _section_in(where, entry.section),
                    expected="a plain tensor under `raw`, coded bytes under any other codec",
                    found=f"{section.spec} under {container.shown(entry.codec)}",
                    do="no writer makes such a file; do not trust it",
                )


def _check_tokens(manifest: Manifest, where: str) -> None:
    """Proves that the tokens, which every reader shows, have the axes that they are shown by."""
    found = [manifest.tensors.get(f"generation.{name}") for name in ("input_ids", "finished")]
    ids, finished = (entry.spec if entry else None for entry in found)
    if not (ids and (ids.dtype, len(ids.shape)) == ("I64", 2) and finished == TensorSpec("BOOL", ids.shape[:1])):
        raise FormatError(
            f"{where}, manifest",
            expected="I64 generation.input_ids (batch, seq) and BOOL generation.finished (batch,)",
            found=f"{ids}, {finished}",
            do="use another copy",
        )


_PROVENANCE: Mapping[str, tuple[type, ...]] = {
    "weights": (str,),
    "config": (dict,),
    "rope": (dict,),
    "tokenizer": (str, type(None)),
    "adapters": (dict,),
    "quantization": (dict,),
    "dtype": (str,),
    "model_name": (str,),
    "versions": (dict,),
    "attention": (str,),
    "device": (str,),
    "threads": (int,),
    "created": (str,),
}


def _provenance(manifest: Manifest, where: str) -> Provenance:
    told = manifest.provenance
    wrong = [name for name, kinds in _PROVENANCE.items() if name not in told or type(told[name]) not in kinds]
    if wrong or told.keys() != _PROVENANCE.keys():
        raise FormatError(
            f"{where}, provenance",
            expected=f"the fields {', '.join(_PROVENANCE)}, each of its own kind",
            found=f"wrong {container.shown(wrong or sorted(told.keys() - _PROVENANCE.keys()))}",
            do="use another copy",
        )
    return Provenance(**told)


def _assembled(manifest: Manifest, tensors: dict[str, torch.Tensor], where: str) -> Snapshot:
    known = {name: entry.digests for name, entry in manifest.tensors.items()}
    provenance = _provenance(manifest, where)
    try:
        with _told_from(where):
            return assemble(manifest.structure, tensors, provenance, known)
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{where}, structure",
            expected="cache and generation",
            found=f"{error!r:.200}",
            do="use another copy",
        ) from error


def _section_in(where: str, section: str) -> str:
    return f"{where}, section {section!r:.200}"


@contextlib.contextmanager
def _told_from(where: str) -> Iterator[None]:
    """Puts the place in the file before what a codec or the snapshot, which know no files, say of themselves."""
    try:
        yield
    except SemqStateError as error:
        raise type(error)(
            f"{where}, {error.where}", expected=error.expected, found=error.found, do=error.do
        ) from error


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
        header, found = _opened(file)
        failures = _failures(file, header, found, advance)
    for failure in failures.values():
        raise failure
    if found.to_bytes() != manifest.to_bytes():
        raise IntegrityError(
            str(path),
            expected="the manifest just written",
            found="another one",
            do="check the disk",
        )


def _failures(
    file: LocalFile, header: container.Header, manifest: Manifest, advance: Callable[[int], None]
) -> dict[str, SemqStateError]:
    def tried(job: _Job) -> int | SemqStateError:
        try:
            return len(_read_section(file, header, manifest, job))
        except (FormatError, UnknownCodecError) as error:
            return error

    failures: dict[str, SemqStateError] = {}
    for job, result in _in_order(tried, list(_jobs(manifest))):
        if isinstance(result, SemqStateError):
            failures[job.section] = result
        else:
            advance(result)
    return failures


def _in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[tuple[_T, _R]]:
    """`work` on every item on all cores, results in order, only a few at a time in memory."""
    n_workers = content.n_workers()
    pending: deque[tuple[_T, Future[_R]]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > n_workers + 1:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, total)

    return advance
