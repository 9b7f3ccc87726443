"""A tokenizer as a few plain files, and back: names and settings are checked before a file is made of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from semq_state.capsules.manifest import MAX_TEXT_BYTES, is_file_name
from semq_state.codecs import MAX_EXPANSION
from semq_state.container import shown
from semq_state.errors import FormatError, IntegrityError, UnsupportedOperationError
from semq_state.fingerprint import tokenizer_digest

_SETTINGS = "tokenizer_config.json"
_LEVEL = 12


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer writes of itself, by name.

    Raises:
        UnsupportedOperationError: they do not make the same tokenizer again, for it has code of its own, say.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    kept = {name: data for name, data in found.items() if is_file_name(name)}
    try:
        same = tokenizer_digest(tokenizer_of(kept, "tokenizer")) == tokenizer_digest(tokenizer)
        reason = "another tokenizer"
    except FormatError as error:
        same, reason = False, str(error)
    if not same:
        raise UnsupportedOperationError(
            "tokenizer",
            expected="one that its own files make again",
            found=f"{reason}, from {shown(sorted(found))}",
            do="pack without it: tokenizer=None, --no-tokenizer",
        )
    return kept


def tokenizer_of(files: Mapping[str, bytes], where: str) -> Any:
    """The inverse of `files_of`.

    Raises:
        FormatError: they are not a tokenizer of transformers' own.
    """
    from transformers import AutoTokenizer

    _check_settings(files.get(_SETTINGS), where)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            if not is_file_name(name):
                raise _wrong(where, "plain names of files", shown(name))
            (Path(folder) / name).write_bytes(data)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # what a class of transformers makes of any files at all
            raise _wrong(where, "a tokenizer", f"{type(error).__name__}: {error!s:.200}".split("\n")[0]) from error
    tokenizer.name_or_path = ""
    return tokenizer


def deflated(data: bytes) -> tuple[str, bytes]:
    """A file's coding and its bytes under it."""
    coded = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    fits = len(data) // MAX_EXPANSION < len(coded) < len(data) <= MAX_TEXT_BYTES
    return ("zstd", coded) if fits else ("raw", data)


def inflated(coding: str, data: bytes, n_bytes: int, where: str) -> bytes:
    """The inverse of `deflated`, in the memory that was announced.

    Raises:
        IntegrityError: the bytes are damaged.
    """
    if coding == "raw":
        return data
    try:
        # zstandard trusts the frame's own size over the caller's limit, so it is compared first.
        declared = zstandard.frame_content_size(data)
        if declared != n_bytes:
            raise _damaged(where, f"a zstd frame of {n_bytes} bytes", str(declared))
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(where, "a whole zstd frame", str(error)) from error


def _check_settings(data: bytes | None, where: str) -> None:
    """Refuses settings that name code, or files elsewhere."""
    try:
        told = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{where}, {_SETTINGS}", "JSON", f"{error!s:.200}") from error
    if type(told) is not dict:
        raise _wrong(f"{where}, {_SETTINGS}", "a table", type(told).__name__)
    for name, value in told.items():
        if value and (name == "auto_map" or (name.endswith("_file") and isinstance(value, str))):
            raise _wrong(f"{where}, {_SETTINGS}", "settings without code and paths", shown({name: value}))


def _wrong(where: str, expected: str, found: str) -> FormatError:
    return FormatError(where, expected=expected, found=found, do="use another copy of the file")


def _damaged(where: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(where, expected=expected, found=found, do="the file is damaged; use another copy of it")
