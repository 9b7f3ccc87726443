"""The manifest: what each section is, in canonical msgpack, written and read with every field checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack

from semq_state import content
from semq_state.container.header import MANIFEST, MAX_SIGNATURE_BYTES, SIGNATURE, SIGNED_SINCE, Header, shown
from semq_state.container.joint import JointEntry, all_sections, joint_of
from semq_state.content import DTYPES, TensorSpec
from semq_state.errors import FormatError, IntegrityError

FORMAT_VERSION = 5
"""What this version writes."""

EMBEDDED = "embedded."
"""Tensors whose names begin so are carried along and are no part of the state."""

READABLE_VERSIONS = (1, 2, 3, 4, 5)

MAX_DEPTH = 64
"""How deep tables and lists may stand in each other, so that no walk through them meets Python's own limit."""

_T = TypeVar("_T")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class SectionEntry:
    """One section: tokens `start` to `stop` of a tensor, under a codec."""

    section: str
    start: int
    stop: int
    codec: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its spec, the digest of each chunk, and the sections that hold it alone, if any."""

    spec: TensorSpec
    digests: tuple[str, ...]
    sections: tuple[SectionEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that a file says besides the tensors themselves."""

    writer: str
    codec: str
    structure: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    provenance: Mapping[str, Any]
    content_digest: str
    state_id: str
    report: Mapping[str, Any] = field(default_factory=dict)
    joint: tuple[JointEntry, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        new = {"report": self.report, "joint": [entry.as_list() for entry in self.joint]}
        return content.pack(
            (new if self.format_version > 2 else {})
            | {
                "format_version": self.format_version,
                "writer": self.writer,
                "codec": self.codec,
                "structure": self.structure,
                "tensors": {
                    name: {
                        "dtype": t.spec.dtype,
                        "shape": t.spec.shape,
                        "digests": t.digests,
                        "sections": [[s.section, s.start, s.stop, s.codec, s.params] for s in t.sections],
                    }
                    for name, t in self.tensors.items()
                },
                "provenance": self.provenance,
                "content_digest": self.content_digest,
                "state_id": self.state_id,
            }
        )


def read_manifest(data: bytes, header: Header, where: str) -> Manifest:
    """The inverse of `Manifest.to_bytes`, held against the header and against its own digests.

    Raises:
        FormatError: a field is missing, unknown or of the wrong kind, or the format is newer.
        IntegrityError: header and manifest disagree, or a digest does not follow from the rest.
    """
    check = Check(where)
    try:
        raw = unpacked(data)
        canonical = content.pack(raw) == data
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise check.refused("a manifest in msgpack", f"{type(error).__name__}: {error}") from error
    fields = check.table(raw, "manifest")
    version = fields.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise check.refused(
            f"format version {' or '.join(map(str, READABLE_VERSIONS))}",
            shown(version),
            do="update semq_state to read this file",
        )
    expected = set(Manifest.__dataclass_fields__) - ({"report", "joint"} if version < 3 else set())
    if fields.keys() != expected:
        raise check.refused(f"the fields {sorted(expected)}", shown(sorted(fields)))
    if not canonical:
        raise check.refused("canonical msgpack", "another encoding of the same values")

    tensors = {
        name: _tensor(name, check.table(entry, name), check)
        for name, entry in check.table(fields["tensors"], "tensors").items()
    }
    manifest = Manifest(
        writer=check.text(fields["writer"], "writer"),
        codec=check.text(fields["codec"], "codec"),
        structure=check.table(fields["structure"], "structure"),
        tensors=tensors,
        provenance=check.table(fields["provenance"], "provenance"),
        content_digest=check.text(fields["content_digest"], "content_digest"),
        state_id=check.text(fields["state_id"], "state_id"),
        report=check.table(fields.get("report", {}), "report"),
        joint=joint_of(
            fields.get("joint", []),
            {name: None if t.sections else t.spec for name, t in tensors.items()},
            check,
        ),
        format_version=version,
    )
    _hold_against_header(manifest, header, check)
    found = content.content_digest(
        manifest.structure,
        {name: t.spec for name, t in tensors.items() if not name.startswith(EMBEDDED)},
        {name: t.digests for name, t in tensors.items()},
    )
    if found != manifest.content_digest:
        raise check.broken(f"content digest {shown(manifest.content_digest)}", found)
    return manifest


def unpacked(data: bytes) -> Any:
    """Plain values from untrusted msgpack, in memory that its length bounds.

    Raises:
        ValueError, TypeError, RecursionError, msgpack.UnpackException: it is none, or holds other values.
    """
    # A list takes memory as its length claims, before its items are read; skipping proves that they are there.
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    unpacker.skip()
    value = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    _check_plain(value, 0)
    return value


def _check_plain(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise ValueError("a key that is no text")
        for item in value.values():
            _check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"a value of type {type(value).__name__}")


def _tensor(name: str, entry: Mapping[str, Any], check: Check) -> TensorEntry:
    if entry.keys() != {"dtype", "shape", "digests", "sections"}:
        raise check.refused(f"dtype, shape, digests and sections for {shown(name)}", shown(sorted(entry)))
    shape = check.items(entry["shape"], name)
    if check.text(entry["dtype"], name) not in DTYPES or len(shape) > 16:
        raise check.refused(f"a dtype and a shape for {shown(name)}", f"{shown(entry['dtype'])}, {shown(shape)}")
    spec = TensorSpec(entry["dtype"], tuple(check.count(size, name) for size in shape))
    # Strides are products of all sizes but the zeros, whose overflow torch refuses in its own words.
    if math.prod(max(size, 1) for size in shape) >= 1 << 48:
        raise check.refused(f"a shape for {shown(name)}", shown(shape))
    sections = []
    for item in check.items(entry["sections"], name):
        if not isinstance(item, list) or len(item) != 5:
            raise check.refused(f"five fields for a section of {shown(name)}", shown(item))
        sections.append(
            SectionEntry(
                check.text(item[0], name),
                check.count(item[1], name),
                check.count(item[2], name),
                check.text(item[3], name),
                check.table(item[4], name),
            )
        )
    digests = tuple(check.text(digest, name) for digest in check.items(entry["digests"], name))
    # The count is compared first: it is arithmetic, whereas a list of chunks takes memory as the shape claims.
    if len(digests) != spec.n_chunks or not all(_DIGEST.match(d) for d in digests):
        raise check.refused(f"{spec.n_chunks} digests for {shown(name)}", f"{len(digests)}")
    bounds = [(s.start, s.stop) for s in sections]
    if bounds and bounds not in (spec.chunks(), [(0, spec.n_tokens)]):
        raise check.refused(f"sections that cover {shown(name)} of shape {spec.shape}", shown(bounds))
    return TensorEntry(spec, digests, tuple(sections))


def _hold_against_header(manifest: Manifest, header: Header, check: Check) -> None:
    used = [MANIFEST]
    for name, tensor in manifest.tensors.items():
        for entry in tensor.sections:
            used.append(entry.section)
            if entry.section not in header.sections:
                raise check.broken(f"section {shown(entry.section)} for {shown(name)}", "none")
    for joint, section in all_sections(manifest.joint):
        used.append(section.section)
        if section.section not in header.sections:
            raise check.broken(f"section {shown(section.section)} for {shown(joint.names)}", "none")
    if manifest.format_version >= SIGNED_SINCE and SIGNATURE in header.sections:
        _check_signature(header, check)
        used.append(SIGNATURE)
    if sorted(used) != sorted(header.sections):
        raise check.broken(
            "every section named once by the manifest",
            shown(sorted(set(header.sections) ^ set(used)) or "one named twice"),
        )
    said = header.metadata.get("state_id")
    if said != manifest.state_id:
        raise check.broken(f"state_id {shown(manifest.state_id)} in the header", shown(said))


def _check_signature(header: Header, check: Check) -> None:
    """Holds the rules of the one section that the manifest does not name; what is in it, `audit` knows."""
    section = header.sections[SIGNATURE]
    last = list(header.sections)[-1]
    if section.spec.dtype != "U8" or len(section.spec.shape) != 1 or not 0 < section.n_bytes <= MAX_SIGNATURE_BYTES:
        raise check.refused(f"a signature of at most {MAX_SIGNATURE_BYTES} bytes, U8", str(section.spec))
    if last != SIGNATURE:
        raise check.refused("the signature as the last section", shown(last))


@dataclass(frozen=True)
class Check:
    """Reads untrusted values; each method returns the value with its type proved, or refuses."""

    where: str

    def refused(self, expected: str, found: str, do: str = "") -> FormatError:
        return FormatError(
            f"{self.where}, manifest",
            expected=expected,
            found=found,
            do=do or "use another copy of the file",
        )

    def broken(self, expected: str, found: str) -> IntegrityError:
        return IntegrityError(
            f"{self.where}, manifest",
            expected=expected,
            found=found,
            do="the file was changed or damaged; use another copy",
        )

    def table(self, value: Any, name: str) -> dict[str, Any]:
        return self._kind(value, dict, name, "a table")

    def items(self, value: Any, name: str) -> list[Any]:
        return self._kind(value, list, name, "a list")

    def text(self, value: Any, name: str) -> str:
        return self._kind(value, str, name, "text")

    def count(self, value: Any, name: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise self.refused(f"a size for {shown(name)}", shown(value))
        return value

    def digest(self, value: Any, name: str) -> str:
        if not _DIGEST.match(self.text(value, name)):
            raise self.refused(f"a digest for {shown(name)}", shown(value))
        return str(value)

    def _kind(self, value: Any, kind: type[_T], name: str, words: str) -> _T:
        if type(value) is not kind:
            raise self.refused(f"{words} for {shown(name)}", shown(value))
        return value
