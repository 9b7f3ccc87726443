"""Where a state comes from: which model made it, under which circumstances, and how two such origins differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from semq_state.errors import Difference

IDENTITY = ("weights", "config", "rope", "tokenizer", "adapters", "quantization", "dtype")
"""What must agree before a state may go on, and what `restore(allow=…)` can name."""

ADVICE = ("versions", "attention", "device", "threads")
"""What may change the last bits of a result but not its meaning."""

_SHOWN = 16  # hex digits of a digest in a message


@dataclass(frozen=True)
class Provenance:
    """The model that made a state.

    It holds no prompt text, no host, user or path: the tokens are part of the state itself.

    Args:
        weights: digest of every parameter and buffer, `sha256:…` or `sampled:…` (the cheaper mode).
        config: the model's configuration and class, without paths and library versions.
        rope: the parameters of the rotary embedding.
        tokenizer: digest of the tokenizer, or None where none was given.
        adapters: name to settings of each loaded adapter.
        quantization: how the weights are quantised; empty for plain weights.
        dtype: the model's dtype, `bfloat16` say.
        model_name: a name for people; it proves nothing.
        versions: library name to version.
        attention: the attention implementation, `sdpa` say.
        device: the kind of device, `cpu` or `cuda`.
        threads: torch's number of CPU threads.
        created: when the state was taken, ISO 8601 in UTC.
    """

    weights: str
    config: Mapping[str, Any]
    rope: Mapping[str, Any]
    tokenizer: str | None
    adapters: Mapping[str, Any]
    quantization: Mapping[str, Any]
    dtype: str
    model_name: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    attention: str = ""
    device: str = ""
    threads: int = 0
    created: str = ""

    def identity(self) -> dict[str, Any]:
        """The part that enters the `state_id`."""
        return {name: getattr(self, name) for name in IDENTITY}

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def identity_differences(expected: Provenance, found: Provenance) -> Iterator[Difference]:
    """Every reason to refuse to continue `expected`'s state under `found`'s model."""
    for name in IDENTITY:
        old, new = getattr(expected, name), getattr(found, name)
        # A side that was taken without a tokenizer makes no claim about one.
        if name == "tokenizer" and (old is None or new is None):
            continue
        yield from _differences(name, old, new)


def advice(expected: Provenance, found: Provenance) -> Iterator[Difference]:
    """Every circumstance that may change the last bits of what comes next."""
    for name in ADVICE:
        yield from _differences(name, getattr(expected, name), getattr(found, name))


def plain(value: Any) -> Any:
    """`value` as None, bool, int, float, str, list and dict with sorted string keys, for files and comparison."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, (int, str)):
        # A subclass would have no place in a file.
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    return str(value)


def _differences(name: str, old: Any, new: Any) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield Difference(name, _shown(old), _shown(new))


def _shown(value: Any) -> str:
    text = str(value)
    kind, colon, digest = text.partition(":")
    if colon and kind in ("sha256", "sampled") and len(digest) > _SHOWN:
        return f"{kind}:{digest[:_SHOWN]}…"
    return text if len(text) <= 120 else f"{text[:117]}…"
