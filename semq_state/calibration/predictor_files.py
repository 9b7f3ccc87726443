"""A predictor as a file, beside the calibrations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors import SafetensorError, safe_open

from semq_state import content
from semq_state.calibration.files import place_for, write_whole
from semq_state.calibration.predictor import Predictor
from semq_state.errors import CalibrationError

FORMAT = "semq_state predictor"
VERSION = 1

_TABLE = "predictor"
_MOST = 1 << 24  # bytes of the table
_MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RecursionError,
    msgpack.UnpackException,
)


def save_predictor(predictor: Predictor, path: str | os.PathLike[str]) -> Path:
    """Writes a predictor to one safetensors file, whole or not at all.

    Raises:
        CalibrationError: the folder or disk refused.
    """
    path = Path(path)
    tensors = {name: torch.from_numpy(array).contiguous() for name, array in predictor.arrays().items()}
    tensors[_TABLE] = torch.frombuffer(bytearray(content.pack(predictor.as_dict())), dtype=torch.uint8)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": predictor.model_name,
        "digest": predictor.digest,
    }
    return write_whole(path, tensors, metadata)


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Reads a predictor back, every part of it checked and its digest computed again.

    Raises:
        CalibrationError: there is none, or it is damaged.
    """
    where = str(path)
    try:
        with safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != FORMAT or _TABLE not in names:
                raise _unusable(where, "a predictor", f"another file, {metadata.get('format')!r:.80}")
            if metadata.get("format_version") != str(VERSION):
                raise _unusable(where, f"version {VERSION}", f"{metadata.get('format_version')!r:.80}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _unusable(where, "a predictor", f"{error!s:.200}") from error
    try:
        told = _unpacked(tensors.pop(_TABLE))
        predictor = Predictor.of(told, {name: tensor.numpy() for name, tensor in tensors.items()})
    except _MALFORMED as error:
        raise _unusable(where, "a whole predictor", f"{type(error).__name__}: {error!s:.200}") from error
    if predictor.digest != metadata.get("digest"):
        raise _unusable(where, f"the predictor {metadata.get('digest')!r:.90}", predictor.digest)
    return predictor


def predictor_place_for(weights: str) -> Path:
    """Where the predictor of the model with these weights is kept.

    Raises:
        CalibrationError: that is no digest.
    """
    path = place_for(weights)
    return path.with_name(f"{path.stem}-predictor{path.suffix}")


def predictor_for(weights: str) -> Predictor:
    """The predictor that the folder has for a model.

    Raises:
        CalibrationError: it has none, or a damaged one; the message names the place.
    """
    path = predictor_place_for(weights)
    if not path.exists():
        raise CalibrationError(
            "codec 'exact-predicted'",
            expected=f"a predictor of the model with weights {weights:.80} in {path}",
            found="none",
            do="measure one (semq_state.measuring.predictor.measure_predictor), or save as 'exact-max'",
        )
    return load_predictor(path)


def predictor_of_digest(digest: str, weights: str) -> Predictor:
    """The predictor of this digest, from the folder.

    Raises:
        CalibrationError: it is not there; the message names the digest and where it was looked for.
    """
    try:
        path = predictor_place_for(weights)
        found = load_predictor(path) if path.exists() else None
    except CalibrationError as error:
        raise _missing(digest, error.where, str(error)) from error
    if found is None or found.digest != digest:
        raise _missing(digest, str(path), found.digest if found else "none")
    return found


def _missing(digest: str, place: str, found: str) -> CalibrationError:
    return CalibrationError(
        "predictor",
        expected=f"{digest:.80} in {place}",
        found=found,
        do="copy the file that the state was saved with there, or name it (predictor=…)",
    )


def _unpacked(table: torch.Tensor) -> Any:
    if table.dtype != torch.uint8 or table.ndim != 1 or len(table) > _MOST:
        raise ValueError("no table")
    data = content.raw_bytes(table).tobytes()
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    unpacker.skip()  # a list takes memory as its length claims; skipping proves that its items are there
    return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)


def _unusable(where: str, expected: str, found: str) -> CalibrationError:
    return CalibrationError(where, expected=expected, found=found, do="measure it again, or name another file")
