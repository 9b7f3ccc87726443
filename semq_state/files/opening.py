"""Header and manifest of a file, opened with every claim held against the file before memory is taken for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from semq_state import container, content
from semq_state.codecs import MAX_EXPANSION
from semq_state.container import MANIFEST, Manifest
from semq_state.content import TensorSpec
from semq_state.errors import FormatError, IntegrityError, SemqStateError
from semq_state.provenance import Provenance
from semq_state.snapshot import Snapshot, assemble
from semq_state.stores import LocalFile

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


def opened(file: LocalFile) -> tuple[container.Header, Manifest]:
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
    assembled(manifest, dict.fromkeys(manifest.tensors, torch.empty(0)), where)
    provenance = provenance_of(manifest, where)
    found = content.state_id(manifest.content_digest, provenance.identity())
    if found != manifest.state_id:
        raise IntegrityError(
            where,
            expected=f"state_id {container.shown(manifest.state_id)}",
            found=found,
            do="the provenance was changed",
        )
    return header, manifest


def assembled(manifest: Manifest, tensors: dict[str, torch.Tensor], where: str) -> Snapshot:
    known = {name: entry.digests for name, entry in manifest.tensors.items()}
    provenance = provenance_of(manifest, where)
    try:
        with told_from(where):
            return assemble(manifest.structure, tensors, provenance, known)
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{where}, structure",
            expected="cache and generation",
            found=f"{error!r:.200}",
            do="use another copy",
        ) from error


def section_in(where: str, section: str) -> str:
    return f"{where}, section {section!r:.200}"


@contextlib.contextmanager
def told_from(where: str) -> Iterator[None]:
    """Puts the place in the file before what a codec or the snapshot, which know no files, say of themselves."""
    try:
        yield
    except SemqStateError as error:
        raise type(error)(
            f"{where}, {error.where}", expected=error.expected, found=error.found, do=error.do
        ) from error


def provenance_of(manifest: Manifest, where: str) -> Provenance:
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
                    section_in(where, entry.section),
                    expected=f"at most {most} bytes from {section.n_bytes}",
                    found=f"a claim of {spec.n_bytes}",
                    do="no writer makes such a file; do not trust it",
                )
            if not (section.spec == spec if entry.codec == "raw" else _is_coded(section)):
                raise IntegrityError(
                    section_in(where, entry.section),
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
