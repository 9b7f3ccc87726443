"""A floor as a file: strict JSON of texts and integers, with a digest over its content."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from semq_state import content
from semq_state.audit.floor import Floor, FloorCell, check_margin
from semq_state.errors import FloorError
from semq_state.stores import LocalFile, atomic_write

FORMAT = "semq_state floor"
VERSION = 1

MAX_BYTES = 16 << 20
"""Larger files are refused unread."""

_FIELDS = (
    "format",
    "version",
    "reference",
    "n_nulls",
    "bins",
    "c_thousandths",
    "margin",
    "cells",
    "varied",
    "digest",
)
_CELL_FIELDS = ("name", "changed", "total", "p99", "p99_norm", "n_units")
_MOST = 1 << 53
_LONGEST = 1024  # characters of a name
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def save_floor(floor: Floor, path: str | os.PathLike[str]) -> None:
    """Writes a floor, whole or not at all; the same floor gives the same bytes.

    Raises:
        StoreError: the folder or disk refused.
    """
    said = floor_dict(floor)
    text = json.dumps({**said, "digest": _digest(said)}, indent=1, ensure_ascii=True)
    with atomic_write(path) as file:
        file.write(text.encode("ascii") + b"\n")


def load_floor(path: str | os.PathLike[str]) -> Floor:
    """Reads a floor back, every field checked.

    Raises:
        FloorError: it is no floor, or was edited since it was saved.
        StoreError: there is no such file.
    """
    with LocalFile(path) as file:
        if file.size > MAX_BYTES:
            raise _refused(path, f"at most {MAX_BYTES} bytes", f"{file.size}")
        data = file.read(0, file.size)
    try:
        said = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_float=_no_float, parse_constant=_no_float
        )
        floor = _floor_of(said)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(path, "a floor", f"{error!s:.200}") from error
    if said["digest"] != _digest(floor_dict(floor)):
        raise _refused(path, f"the content of {said['digest']}", "another: the file was edited")
    return floor


def floor_dict(floor: Floor) -> dict[str, Any]:
    """Plain texts and integers, and nothing else: all that the digest covers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "reference": floor.reference,
        "n_nulls": floor.n_nulls,
        "bins": floor.bins,
        "c_thousandths": floor.c_thousandths,
        "margin": list(floor.margin),
        "cells": [{name: getattr(cell, name) for name in _CELL_FIELDS} for cell in floor.cells],
        "varied": list(floor.varied),
    }


def _floor_of(said: Any) -> Floor:
    """The inverse of `floor_dict`, of values that are not trusted.

    Raises:
        ValueError: that is no floor.
    """
    if type(said) is not dict or tuple(sorted(said)) != tuple(sorted(_FIELDS)):
        raise ValueError(f"the fields {', '.join(_FIELDS)} and no others")
    if (said["format"], said["version"]) != (FORMAT, VERSION) or type(said["version"]) is not int:
        raise ValueError(f"format {FORMAT!r}, version {VERSION}")
    for name in ("reference", "digest"):
        if type(said[name]) is not str or not _DIGEST.fullmatch(said[name]):
            raise ValueError(f"`{name}` a sha256 digest")
    if type(said["cells"]) is not list or type(said["varied"]) is not list:
        raise ValueError("`cells` and `varied` lists")
    cells = tuple(_cell_of(each) for each in said["cells"])
    varied = tuple(_name(each) for each in said["varied"])
    if len({cell.name for cell in cells}) != len(cells) or len(set(varied)) != len(varied):
        raise ValueError("each name once")
    check_margin(said["margin"])
    return Floor(
        reference=said["reference"],
        n_nulls=_integer("n_nulls", said["n_nulls"], 1, _MOST),
        bins=_integer("bins", said["bins"], 2, 64),
        c_thousandths=_integer("c_thousandths", said["c_thousandths"], 1, 256_000),
        cells=cells,
        varied=varied,
        margin=(said["margin"][0], said["margin"][1]),
    )


def _cell_of(said: Any) -> FloorCell:
    if type(said) is not dict or tuple(sorted(said)) != tuple(sorted(_CELL_FIELDS)):
        raise ValueError(f"of each cell the fields {', '.join(_CELL_FIELDS)} and no others")
    total = _integer("total", said["total"], 1, _MOST)
    n_units = _integer("n_units", said["n_units"], 1, _MOST)
    changed = _integer("changed", said["changed"], 0, total)
    p99, p99_norm = _integer("p99", said["p99"], 0, n_units), _integer("p99_norm", said["p99_norm"], 0, _MOST)
    return FloorCell(_name(said["name"]), changed, total, p99, p99_norm, n_units)


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"`{name}` an integer of {lowest} to {highest}, found {value!r:.40}")
    return value


def _name(value: Any) -> str:
    if type(value) is not str or not 1 <= len(value) <= _LONGEST:
        raise ValueError(f"names of 1 to {_LONGEST} characters")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("each field once")
    return found


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"integers only, found {text:.40}")


def _digest(said: dict[str, Any]) -> str:
    return content.content_digest(said, {}, {})


def _refused(path: str | os.PathLike[str], expected: str, found: str) -> FloorError:
    return FloorError(str(Path(path)), expected=expected, found=found, do="measure the floor again")
