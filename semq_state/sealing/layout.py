"""The outside of a sealed file: a safetensors header that says nothing but that the file is sealed."""

from __future__ import annotations

from collections.abc import Mapping

from semq_state.container import Header, Section
from semq_state.container.header import render_header, reserved_bytes
from semq_state.content import TensorSpec
from semq_state.errors import DecryptionError
from semq_state.sealing.segments import MAX_INDEX_BYTES, TAG_BYTES
from semq_state.sealing.table import MAX_TABLE_BYTES
from semq_state.stores import LocalFile

METADATA: Mapping[str, str] = {"format": "semq_state sealed", "format_version": "1"}

SECTIONS = ("seal", "sealed.data", "sealed.index")
"""The public table, the ciphertexts of all segments without gaps, and that of the index."""

HEADER_BYTES = reserved_bytes(SECTIONS, 1, METADATA)

_MOST_INDEX = 8 + 2 * MAX_INDEX_BYTES + TAG_BYTES


def is_sealed(header: Header) -> bool:
    """Whether a file's header is that of a sealed file, of whatever version."""
    return header.metadata.get("format") == METADATA["format"]


def outer_header(sizes: tuple[int, int, int]) -> bytes:
    """The header of a sealed file whose three sections have these sizes."""
    sections, at = [], 0
    for name, n_bytes in zip(SECTIONS, sizes, strict=True):
        sections.append(Section(name, TensorSpec("U8", (n_bytes,)), at, at + n_bytes))
        at += n_bytes
    return render_header(sections, METADATA, HEADER_BYTES)


def read_outer(file: LocalFile, header: Header) -> tuple[bytes, bytes, tuple[Section, Section]]:
    """The inverse of `outer_header`: its own bytes, the table, and where data and index are.

    Raises:
        DecryptionError: anything in the header differs from what a writer puts there.
    """
    where = str(file.path)
    if header.metadata != METADATA:
        raise DecryptionError(
            where, expected=f"metadata {dict(METADATA)}", found="other metadata", do="update semq_state to read it"
        )
    sizes = tuple(header.sections[name].n_bytes if name in header.sections else -1 for name in SECTIONS)
    n_table, n_data, n_index = sizes
    if len(header.sections) != 3 or not (
        0 < n_table <= MAX_TABLE_BYTES and n_data >= 0 and 8 + TAG_BYTES <= n_index <= _MOST_INDEX
    ):
        raise _refused(where, f"the sections {', '.join(SECTIONS)}, each of a possible size", f"sizes {sizes}")
    found = file.read(0, header.data_start)
    if found != outer_header((n_table, n_data, n_index)):
        raise _refused(where, "a sealed file's header", "another one with the same sections")
    table, data, index = (header.sections[name] for name in SECTIONS)
    return found, file.read(header.data_start + table.begin, n_table), (data, index)


def _refused(where: str, expected: str, found: str) -> DecryptionError:
    return DecryptionError(
        f"{where}, header", expected=expected, found=found, do="the file was changed or damaged; use another copy"
    )
