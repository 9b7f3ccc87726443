"""Header and manifest of a file, opened with every claim held against the file before memory is taken for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch

from semq_state import container, content
from semq_state.codecs import MAX_EXPANSION
from semq_state.container import EMBEDDED, MANIFEST, Manifest
from semq_state.content import TensorSpec
from semq_state.errors import DecryptionError, FormatError, IncompleteStateError, IntegrityError, SemqStateError
from semq_state.files.forms import groups_of, without_groups
from semq_state.provenance import Provenance
from semq_state.sealing import SealedFile, Unlock, is_sealed
from semq_state.snapshot import Coding, Snapshot, assemble
from semq_state.stores import LocalFile, ReadableFile, Source, opened
from semq_state.symbolic import prefix_of

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


HIDDEN_SINCE = 5
"""The first format version that has hidden states."""

MAX_CODED_EXPANSION = 1024
"""Coded tensors take at most so many times the size of their file."""


@contextlib.contextmanager
def open_snapshot(
    source: Source, unlock: Unlock | None = None
) -> Iterator[tuple[ReadableFile, container.Header, Manifest]]:
    """A snapshot file, plain or sealed, with its header and manifest; from here on both read alike.

    Args:
        source: the file, or one that is open, a part of another say; that must be plain.
        unlock: what opens it where it is sealed; not asked for where it is plain.

    Raises:
        StoreError: there is no such file.
        FormatError, IncompleteStateError: it is not a snapshot, or a damaged one.
        DecryptionError: it is sealed, and no key was given or none opens it, or it was changed.
    """
    with opened(source) as file:
        where = str(file.path)
        header = container.read_header(file.read, file.size, where)
        if is_sealed(header):
            if not isinstance(file, LocalFile):
                raise DecryptionError(
                    where, expected="a plain snapshot", found="a sealed one", do="unseal it first"
                )
            file = SealedFile(file, header, unlock)
            header = container.read_header(file.read, file.size, where)
        manifest = _manifest_of(file, header)
        if isinstance(file, SealedFile) and file.state_id != manifest.state_id:
            raise DecryptionError(
                where,
                expected=f"sections of {manifest.state_id}",
                found=f"a seal of {container.shown(file.state_id)}",
                do="no writer makes such a file; do not trust it",
            )
        yield file, header, manifest


def _manifest_of(file: ReadableFile, header: container.Header) -> Manifest:
    where = str(file.path)
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
    check_claims(header, manifest, where)
    _check_joint_claims(header, manifest, where)
    _check_tokens(manifest, where)
    # Put together from nothing first, so that a wrong structure is refused before a tensor is read.
    names = _state_names(manifest, file.size, where)
    assembled(manifest, dict.fromkeys(names, torch.empty(0)), where)
    provenance = provenance_of(manifest, where)
    found = content.state_id(manifest.content_digest, provenance.identity())
    if found != manifest.state_id:
        raise IntegrityError(
            where,
            expected=f"state_id {container.shown(manifest.state_id)}",
            found=found,
            do="the provenance was changed",
        )
    return manifest


def assembled(manifest: Manifest, tensors: dict[str, torch.Tensor], where: str) -> Snapshot:
    provenance = provenance_of(manifest, where)
    known = {name: entry.digests for name, entry in manifest.tensors.items() if not name.startswith(EMBEDDED)}
    try:
        coding = Coding.from_dict(manifest.report) if manifest.report else None
        with told_from(where):
            if not is_coded(manifest):
                snapshot = assemble(manifest.structure, tensors, provenance, known)
                return dataclasses.replace(snapshot, coding=coding)
            snapshot = assemble(without_groups(manifest.structure), tensors, provenance, {})
            return dataclasses.replace(snapshot, coding=coding, coded_id=manifest.state_id)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, SemqStateError):
            raise
        raise FormatError(
            f"{where}, structure",
            expected="cache and generation",
            found=f"{error!r:.200}",
            do="use another copy",
        ) from error


def is_coded(manifest: Manifest) -> bool:
    """Whether some of the state's tensors stand as symbols in the file."""
    return "coded" in manifest.structure


def specs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The tensors of the state itself, by name, those that stand as symbols included."""
    specs = {
        name: entry.spec for name, entry in manifest.tensors.items() if not name.startswith(("coded.", EMBEDDED))
    }
    for group in groups_of(manifest.structure):
        specs |= {name: stack.spec for stack in group.stacks for name in stack.names}
    return specs


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
    """The origin that a manifest tells of.

    Raises:
        FormatError: a field is missing, unknown or of the wrong kind.
    """
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


def check_claims(header: container.Header, manifest: Manifest, where: str) -> None:
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


def _check_joint_claims(header: container.Header, manifest: Manifest, where: str) -> None:
    specs = {name: tensor.spec for name, tensor in manifest.tensors.items()}
    for entry, told in container.all_sections(manifest.joint):
        section, claimed = header.sections[told.section], container.n_bytes_of(entry, told, specs)
        most = MAX_EXPANSION * section.n_bytes
        if claimed > most or not _is_coded(section):
            raise IntegrityError(
                section_in(where, told.section),
                expected=f"coded bytes, at most {most} from {section.n_bytes}",
                found=f"{section.spec} with a claim of {claimed}",
                do="no writer makes such a file; do not trust it",
            )


def _state_names(manifest: Manifest, n_bytes: int, where: str) -> list[str]:
    """The names of the state's tensors, once the groups are known to have all their parts, and to claim no memory
    out of proportion to the file."""
    with told_from(where):
        groups = groups_of(manifest.structure)
    wanted = {prefix_of(i) + name for i, group in enumerate(groups) for name in group.parts()}
    held = {name for name in manifest.tensors if name.startswith("coded.")}
    if wanted != held:
        raise IncompleteStateError(
            f"{where}, structure",
            expected="every part of its coded groups, and no other",
            found=f"missing or left over: {container.shown(sorted(wanted ^ held))}",
            do="the file was put together wrongly; save the state again",
        )
    plain = [name for name in manifest.tensors if not name.startswith(("coded.", EMBEDDED))]
    coded = [name for group in groups for name in group.names()]
    if len(set(coded)) != len(coded) or set(coded) & set(plain):
        raise FormatError(
            f"{where}, structure", expected="each tensor once", found="one coded twice", do="use another copy"
        )
    claimed = sum(group.n_bytes for group in groups)
    if claimed > MAX_CODED_EXPANSION * n_bytes:
        raise IntegrityError(
            f"{where}, structure",
            expected=f"at most {MAX_CODED_EXPANSION} times the size of the file",
            found=f"coded tensors of {claimed} bytes",
            do="no writer makes such a file; do not trust it",
        )
    return [*plain, *coded]


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
    hidden = manifest.structure.get("hidden", {})
    if hidden and manifest.format_version < HIDDEN_SINCE:
        raise FormatError(
            f"{where}, manifest",
            expected=f"format version {HIDDEN_SINCE} or later, for it holds hidden states",
            found=str(manifest.format_version),
            do="use another copy",
        )
    rows = {f"hidden.{stream}.rows" for stream in hidden} if type(hidden) is dict else set()
    for name in sorted(rows):
        entry = manifest.tensors.get(name)
        if entry is None or entry.spec.dtype != "I64" or len(entry.spec.shape) != 2 or entry.spec.shape[1] != 2:
            raise FormatError(
                f"{where}, manifest",
                expected=f"I64 {name:.80} (n, 2)",
                found=f"{entry.spec if entry else None}",
                do="use another copy",
            )
