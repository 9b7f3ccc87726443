"""A calibration as a file, and the folder in which calibrations are found again."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semq_state import content
from semq_state.calibration.artifact import Calibration
from semq_state.errors import CalibrationError, FormatError, SemqStateError

FORMAT = "semq_state calibration"
VERSION = 1

_TABLE = "calibration"
_MOST = 1 << 26  # bytes of the table
_DIGEST = re.compile(r"(?:sha256|sampled):([0-9a-f]{64})")


def save_calibration(calibration: Calibration, path: str | os.PathLike[str]) -> Path:
    """Writes a calibration to one safetensors file, whole or not at all.

    Raises:
        CalibrationError: the folder or disk refused.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in calibration.tensors().items()}
    tensors[_TABLE] = table_of(calibration)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": calibration.model_name,
        "digest": calibration.digest,
    }
    return write_whole(path, tensors, metadata)


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes an artifact to one safetensors file, whole or not at all.

    Raises:
        CalibrationError: the folder or disk refused.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), hidden, dict(metadata))
        hidden.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise CalibrationError(
            str(path), expected="a folder to write to", found=str(error), do="choose another place"
        ) from error
    return path


def load_calibration(path: str | os.PathLike[str], *, digest: str | None = None) -> Calibration:
    """Reads a calibration back, its digest computed again.

    Args:
        path: a file that `save_calibration` wrote.
        digest: which calibration it must be.

    Raises:
        CalibrationError: there is none, it is damaged, or it is another one.
    """
    where = str(path)
    try:
        with safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != FORMAT or _TABLE not in names:
                raise _unusable(where, "a calibration", f"another file, {metadata.get('format')!r:.80}")
            if metadata.get("format_version") != str(VERSION):
                raise _unusable(where, f"version {VERSION}", f"{metadata.get('format_version')!r:.80}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _unusable(where, "a calibration", f"{error!s:.200}") from error
    calibration = of_parts(tensors.pop(_TABLE), tensors, where)
    if calibration.digest != (digest or metadata.get("digest")):
        raise _unusable(where, f"the calibration {digest or metadata.get('digest')!r:.90}", calibration.digest)
    return calibration


def table_of(calibration: Calibration) -> torch.Tensor:
    """Everything of a calibration that is not a tensor, as one: uint8, canonical msgpack."""
    return torch.frombuffer(bytearray(content.pack(calibration.as_dict())), dtype=torch.uint8)


def of_parts(table: torch.Tensor, tensors: Mapping[str, torch.Tensor], where: str) -> Calibration:
    """The inverse of `table_of` and `Calibration.tensors`.

    Raises:
        CalibrationError: they are not a calibration.
    """
    try:
        if table.dtype != torch.uint8 or table.ndim != 1 or len(table) > _MOST:
            raise ValueError("no table")
        told = _unpacked(content.raw_bytes(table).tobytes())
        return Calibration.of(told, dict(tensors))
    except (
        ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError,
        FormatError, RecursionError, msgpack.UnpackException,
    ) as error:  # fmt: skip
        raise _unusable(where, "a whole calibration", f"{type(error).__name__}: {error!s:.200}") from error


def folder() -> Path:
    """Where calibrations are kept: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "semq_state" / "calibrations"


def place_for(weights: str) -> Path:
    """Where the calibration of the model with these weights is kept.

    Raises:
        CalibrationError: that is no digest.
    """
    match = _DIGEST.fullmatch(weights)
    if not match:
        raise _unusable("calibration", "a digest of weights", f"{weights!r:.90}")
    return folder() / f"{weights.partition(':')[0]}-{match[1]}.safetensors"


def find(weights: str) -> Calibration | None:
    """The calibration that the folder has for a model; None where it has none.

    Raises:
        CalibrationError: it has one that is damaged or of another model.
    """
    path = place_for(weights)
    if not path.exists():
        return None
    return load_calibration(path)


def find_digest(digest: str, weights: str) -> Calibration:
    """The calibration of this digest, from the folder.

    Raises:
        CalibrationError: it is not there; the message names the digest and where it was looked for.
    """
    path = place_for(weights)
    try:
        found = find(weights)
    except SemqStateError as error:
        raise _missing(digest, path, str(error)) from error
    if found is None or found.digest != digest:
        raise _missing(digest, path, f"calibration {found.digest}" if found else "none")
    return found


def _missing(digest: str, path: Path, found: str) -> CalibrationError:
    return CalibrationError(
        "calibration",
        expected=f"{digest:.80} in {path}",
        found=found,
        do="copy it there, name its file (calibration=…, --calibration FILE), or save with embed_calibration=True",
    )


def _unpacked(data: bytes) -> Any:
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    unpacker.skip()  # a list takes memory as its length claims; skipping proves that its items are there
    return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)


def _unusable(where: str, expected: str, found: str) -> CalibrationError:
    return CalibrationError(where, expected=expected, found=found, do="calibrate again, or name another file")
