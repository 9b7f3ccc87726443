"""An index as a safetensors file: read strictly, sizes held against the file before memory is taken."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import TINY, AbstractOperator
from semq_state.container import Header, PlainSink, SectionWriter, read_header, shown
from semq_state.content import TensorSpec
from semq_state.errors import FormatError, IntegrityError, UnsupportedOperationError
from semq_state.search.contents import Contents, operator_of, rule_of
from semq_state.search.ids import IdArray, check_ids
from semq_state.stores import LocalFile, atomic_write

FORMAT = "semq_state symbols"
VERSION = 1


def write_index(path: str | os.PathLike[str], contents: Contents) -> None:
    """Writes an index, whole or not at all; the same contents are the same bytes.

    Raises:
        StoreError: the folder is missing or read-only, or the disk is full.
    """
    sections = contents.sections()
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "rule": _rendered(rule_of(contents.operator)),
        "digest": contents.index_id(),
    }
    with atomic_write(path) as file:
        writer = SectionWriter(PlainSink(file), list(sections), 2, metadata)
        for name in ("ids", "id_ends", "norms", "rows", "id_text"):
            if name in sections:
                data, spec = sections[name]
                writer.write(name, [data], spec)
        writer.finish(metadata)


def read_index(path: str | os.PathLike[str]) -> Contents:
    """Reads an index and checks all of it.

    Raises:
        StoreError: the file cannot be read.
        FormatError: it is no index, one of a later version, or a section is not what the format says.
        IntegrityError: the digest does not hold.
    """
    where = str(path)
    with LocalFile(path) as file:
        header = read_header(file.read, file.size, where)
        operator = _operator(header.metadata, where)
        n = _n_rows(header, operator, where)
        data = {
            name: np.frombuffer(file.read(header.data_start + each.begin, each.n_bytes), np.uint8)
            for name, each in header.sections.items()
        }
    norms = data["norms"].view("<f4").astype(np.float32)
    contents = Contents(operator, _ids(data, n, where), norms, data["rows"].reshape(n, operator.n_bytes))
    if contents.index_id() != header.metadata["digest"]:
        raise IntegrityError(
            where,
            expected=f"the contents {shown(header.metadata['digest'])}",
            found=contents.index_id(),
            do="the file is damaged; use another copy of it",
        )
    if not (np.isfinite(norms) & (norms >= TINY)).all():
        raise _wrong(f"{where}: norms", "finite ones above 0", "others")
    return contents


def _operator(metadata: Mapping[str, str], where: str) -> AbstractOperator:
    if metadata.get("format") != FORMAT:
        raise _wrong(where, f"an index of symbols ({FORMAT!r})", shown(metadata.get("format")))
    if metadata.get("format_version") != str(VERSION):
        raise FormatError(
            where,
            expected=f"format version {VERSION}",
            found=shown(metadata.get("format_version")),
            do="read it with a later semq_state",
        )
    if metadata.keys() != {"format", "format_version", "rule", "digest"}:
        raise _wrong(f"{where}: metadata", "format, format_version, rule and digest", shown(sorted(metadata)))
    text = metadata["rule"]
    try:
        rule = json.loads(text)
        operator = operator_of(rule["operator"], rule["dim"], rule["parameter"], rule.get("c"))
        if _rendered(rule_of(operator)) == text:
            return operator
    except (ValueError, TypeError, LookupError, RecursionError) as error:  # ours are ValueErrors
        raise _wrong(f"{where}: rule", "one that this version writes", f"{error!s:.200}") from error
    raise _wrong(f"{where}: rule", _rendered(rule_of(operator)), shown(text))


def _n_rows(header: Header, operator: AbstractOperator, where: str) -> int:
    """How many rows there are, if all sections agree; the header was held against the file's size."""
    specs = {name: each.spec for name, each in header.sections.items()}
    norms = specs.get("norms", TensorSpec("F32", ()))
    n = norms.shape[0] if len(norms.shape) == 1 else -1
    expected = {"norms": TensorSpec("F32", (n,)), "rows": TensorSpec("U8", (n, operator.n_bytes))}
    if "ids" in specs:
        expected["ids"] = TensorSpec("I64", (n,))
    else:
        text = specs.get("id_text", TensorSpec("U8", ()))
        expected["id_ends"] = TensorSpec("I64", (n,))
        expected["id_text"] = TensorSpec("U8", text.shape[:1] or (-1,))
    if n < 0 or specs != expected:
        raise _wrong(f"{where}: sections", shown(expected), shown(specs))
    return n


def _ids(data: Mapping[str, NDArray[np.uint8]], n: int, where: str) -> IdArray:
    where = f"{where}: ids"
    if "ids" in data:
        ids: IdArray = data["ids"].view("<i8").astype(np.int64)
        if n and (ids[0] < 0 or not (ids[1:] > ids[:-1]).all()):
            raise _wrong(where, "increasing numbers from 0", "one that does not increase")
        return ids
    ends, text = data["id_ends"].view("<i8").astype(np.int64), data["id_text"].tobytes()
    if not n or ends[0] < 1 or ends[-1] != len(text) or not (ends[1:] > ends[:-1]).all():
        raise _wrong(where, f"increasing ends up to {len(text)}", "others")
    try:
        ids = check_ids([text[start:stop].decode() for start, stop in itertools.pairwise([0, *ends.tolist()])])
    except (UnicodeDecodeError, UnsupportedOperationError) as error:
        raise _wrong(where, "strings of 1 to 4,096 bytes of UTF-8 without NUL", f"{error!s:.200}") from error
    if not all(before < after for before, after in itertools.pairwise(ids.tolist())):
        raise _wrong(where, "increasing strings", "one that does not increase")
    return ids


def _rendered(rule: Mapping[str, Any]) -> str:
    return json.dumps(rule, sort_keys=True, separators=(",", ":"))


def _wrong(where: str, expected: str, found: str) -> FormatError:
    return FormatError(where, expected=expected, found=found, do="use another copy of the file")
