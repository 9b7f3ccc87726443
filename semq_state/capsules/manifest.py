"""What a capsule says of its parts: rendered, and read back with every field proved."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from semq_state import content
from semq_state.codecs import MAX_EXPANSION
from semq_state.container import MANIFEST, Header, read_header, shown, unpacked
from semq_state.errors import FormatError, IntegrityError
from semq_state.stores import ReadableFile

FORMAT = "semq_state capsule"
VERSION = 1

WEIGHTS, SNAPSHOT, CALIBRATION, TOKENIZER = "weights", "snapshot", "calibration", "tokenizer/"

MAX_TEXT_BYTES = 256 << 20
"""The most that one of a tokenizer's files may hold."""

CODINGS = ("raw", "zstd")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9_-]{1,32}){0,2}\.(json|txt|jinja|model)\Z")
_MOST_FILES = 64


@dataclass(frozen=True)
class PartEntry:
    """One part.

    Args:
        coding: `raw`, or `zstd` for a tokenizer's files.
        digest: of the bytes as they are stored.
        n_bytes: its size, unpacked.
        identity: of what it holds: `weights_id`, `state_id`, the calibration's digest, or that of the file's bytes.
    """

    coding: str
    digest: str
    n_bytes: int
    identity: str

    def as_list(self) -> list[Any]:
        return [self.coding, self.digest, self.n_bytes, self.identity]


@dataclass(frozen=True)
class CapsuleManifest:
    """What a capsule says besides its parts.

    Args:
        writer: the library and its version.
        parts: by name: `weights`, `snapshot`, `calibration`, and `tokenizer/FILE` for each file.
    """

    writer: str
    parts: Mapping[str, PartEntry]

    @property
    def capsule_id(self) -> str:
        """The identity of all parts together, by their names, bytes and identities."""
        parts = {name: entry.as_list() for name, entry in self.parts.items()}
        return f"sha256:{hashlib.sha256(content.pack({'format': FORMAT, 'parts': parts})).hexdigest()}"

    def to_bytes(self) -> bytes:
        return content.pack(
            {
                "format": FORMAT,
                "version": VERSION,
                "writer": self.writer,
                "parts": {name: entry.as_list() for name, entry in self.parts.items()},
                "capsule_id": self.capsule_id,
            }
        )


def is_capsule(file: ReadableFile) -> bool:
    """Whether a file calls itself a capsule.

    Raises:
        StoreError, FormatError: it cannot be read, or is no safetensors file.
    """
    return read_header(file.read, file.size, str(file.path)).metadata.get("format") == FORMAT


def read_capsule_header(file: ReadableFile) -> tuple[Header, CapsuleManifest, str]:
    """Header, manifest, and the identity that the capsule claims, every size held against the file.

    The identity is compared by `opening.check_parts`, after the parts, so that a message can name the one that is
    wrong.

    Raises:
        StoreError: the file cannot be read.
        FormatError: it is no capsule, or a newer one.
        IntegrityError: header and manifest disagree.
    """
    where = str(file.path)
    header = read_header(file.read, file.size, where)
    section = header.sections.get(MANIFEST)
    if header.metadata.get("format") != FORMAT or section is None:
        raise FormatError(
            where,
            expected="a capsule",
            found=f"another safetensors file, of format {shown(header.metadata.get('format'))}",
            do="name a file that `semq-state pack` wrote",
        )
    manifest, claimed = _manifest(file.read(header.data_start + section.begin, section.n_bytes), where)
    if {*manifest.parts, MANIFEST} != set(header.sections):
        found = shown(sorted({*manifest.parts, MANIFEST} ^ set(header.sections)))
        raise _broken(where, "every section named by the manifest", found)
    for name, entry in manifest.parts.items():
        each = header.sections[name]
        if each.spec.dtype != "U8" or len(each.spec.shape) != 1:
            raise _broken(f"{where}, part {name}", "bytes", str(each.spec))
        most = each.n_bytes if entry.coding == "raw" else min(MAX_TEXT_BYTES, MAX_EXPANSION * each.n_bytes)
        if entry.n_bytes > most or (entry.coding == "raw" and entry.n_bytes != most):
            raise _broken(f"{where}, part {name}", f"at most {most} bytes from {each.n_bytes}", str(entry.n_bytes))
    if header.metadata.get("capsule_id") != claimed:
        raise _broken(where, f"capsule_id {claimed} in the header", shown(header.metadata.get("capsule_id")))
    return header, manifest, claimed


def is_file_name(name: str) -> bool:
    """Whether a tokenizer's file may have that name: a plain one, of text or of a vocabulary."""
    return bool(_FILE.match(name))


def _manifest(data: bytes, where: str) -> tuple[CapsuleManifest, str]:
    try:
        told = unpacked(data)
        canonical = content.pack(told) == data
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _wrong(where, "a manifest in msgpack", f"{type(error).__name__}: {error!s:.200}") from error
    if type(told) is not dict or told.get("format") != FORMAT:
        raise _wrong(where, f"the format {FORMAT!r}", shown(told))
    if type(told.get("version")) is not int or told["version"] != VERSION:
        raise FormatError(
            f"{where}, manifest",
            expected=f"version {VERSION}",
            found=shown(told.get("version")),
            do="read it with a later semq_state",
        )
    if told.keys() != {"format", "version", "writer", "parts", "capsule_id"} or not canonical:
        raise _wrong(
            where, "format, version, writer, parts and capsule_id, in canonical msgpack", shown(sorted(told))
        )
    if type(told["writer"]) is not str or type(told["parts"]) is not dict or not _is_digest(told["capsule_id"]):
        raise _wrong(where, "a writer, a table of parts and a digest", shown(told))
    parts = {name: _part(name, entry, where) for name, entry in told["parts"].items()}
    files = [name for name in parts if name.startswith(TOKENIZER)]
    if not {WEIGHTS, SNAPSHOT} <= parts.keys() or len(files) > _MOST_FILES:
        raise _wrong(where, f"weights, a snapshot and at most {_MOST_FILES} files", shown(sorted(parts)))
    # On some disks these would be one file.
    if len({name.lower() for name in files}) != len(files):
        raise _wrong(where, "files of different names", shown(files))
    return CapsuleManifest(told["writer"], parts), told["capsule_id"]


def _part(name: str, entry: Any, where: str) -> PartEntry:
    is_file = name.startswith(TOKENIZER) and is_file_name(name[len(TOKENIZER) :])
    if not is_file and name not in (WEIGHTS, SNAPSHOT, CALIBRATION):
        raise _wrong(where, "weights, snapshot, calibration and tokenizer/FILE with plain names", shown(name))
    if type(entry) is not list or len(entry) != 4:
        raise _wrong(where, f"four fields for part {name}", shown(entry))
    coding, digest, n_bytes, identity = entry
    codings = CODINGS if is_file else CODINGS[:1]
    if type(coding) is not str or coding not in codings:
        raise _wrong(where, f"part {name} as {' or '.join(codings)}", shown(coding))
    if type(n_bytes) is not int or not 0 <= n_bytes < 1 << 62:
        raise _wrong(where, f"a size of part {name}", shown(n_bytes))
    if not _is_digest(digest) or not _is_digest(identity):
        raise _wrong(where, f"two digests for part {name}", shown(entry))
    return PartEntry(coding, digest, n_bytes, identity)


def _is_digest(value: Any) -> bool:
    return type(value) is str and bool(_DIGEST.match(value))


def _wrong(where: str, expected: str, found: str) -> FormatError:
    return FormatError(f"{where}, manifest", expected=expected, found=found, do="use another copy of the file")


def _broken(where: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        where, expected=expected, found=found, do="the file was changed or damaged; use another copy"
    )
