"""JSON of unknown origin: one rendering only, each field with its kind proved."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from semq_state.container import shown
from semq_state.errors import FormatError

MAX_DEPTH = 64
"""How deep tables and lists may stand in each other, so that no walk through them meets Python's own limit."""

MOST_DOCUMENTS, MOST_POSITIONS = 1 << 31, 1 << 32
"""Documents and positions are smaller, so that both together are a number of int64 from 0."""

_MOST = 1 << 48
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_T = TypeVar("_T")


def render(value: Any) -> bytes:
    """The one rendering of plain values: ASCII, sorted keys, no spaces, a newline at the end.

    Raises:
        ValueError, TypeError: a value has no place in JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse(data: bytes) -> Any:
    """The inverse of `render`; another rendering of the same values is refused.

    Raises:
        ValueError: it is no JSON, or not this rendering.
    """
    try:
        value = json.loads(data)
        _check_depth(value, 0)
        canonical = render(value) == data
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not canonical:
        raise ValueError("another rendering than ours")
    return value


def is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.match(value) is not None


@dataclass(frozen=True)
class Fields:
    """Reads untrusted values; each method returns the value with its kind proved, or refuses.

    Args:
        where: the file, and the line or table in it.
    """

    where: str

    def refused(self, expected: str, found: str) -> FormatError:
        return FormatError(self.where, expected=expected, found=found, do="use another copy of the record")

    def table(self, value: Any, names: tuple[str, ...]) -> dict[str, Any]:
        """A table of exactly these fields."""
        if type(value) is not dict or value.keys() != set(names):
            found = sorted(value) if type(value) is dict else value
            raise self.refused(f"a table of {', '.join(names)}", shown(found))
        return value

    def text(self, value: Any, name: str) -> str:
        return self._kind(value, str, name, "text")

    def items(self, value: Any, name: str) -> list[Any]:
        return self._kind(value, list, name, "a list")

    def one_of(self, value: Any, name: str, known: tuple[str, ...]) -> str:
        if type(value) is not str or value not in known:
            raise self.refused(f"one of {known} as `{name}`", shown(value))
        return value

    def count(self, value: Any, name: str, least: int = 0) -> int:
        if type(value) is not int or not least <= value < _MOST:
            raise self.refused(f"a number from {least} as `{name}`", shown(value))
        return value

    def digest(self, value: Any, name: str) -> str:
        if not is_digest(value):
            raise self.refused(f"`sha256:…` as `{name}`", shown(value))
        return str(value)

    def row(self, value: Any, name: str) -> tuple[int, int]:
        """A document and a position."""
        pair = self.items(value, name)
        is_pair = len(pair) == 2 and all(type(x) is int and x >= 0 for x in pair)
        # What comes next may be one document past the last.
        if not is_pair or pair[0] > MOST_DOCUMENTS or pair[1] >= MOST_POSITIONS:
            raise self.refused(f"[document, position] as `{name}`", shown(value))
        return pair[0], pair[1]

    def _kind(self, value: Any, kind: type[_T], name: str, words: str) -> _T:
        if type(value) is not kind:
            raise self.refused(f"{words} as `{name}`", shown(value))
        return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_depth(item, depth + 1)
