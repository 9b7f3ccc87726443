"""Which tensors of a state a lossy codec may take, and where in the sequence their tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from semq_state.snapshot import CacheState, LayerState, Snapshot
from semq_state.snapshot.hidden import hidden_tensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

FOLDED = ("recurrent", "convolution")
"""Kinds of state that hold no tokens; all of such a tensor is coded, where a policy names it."""

HIDDEN = "hidden"
"""Kind of the rows of `Snapshot.hidden`; each stands alone, so none is a sink for others."""

_NOWHERE = 1 << 40  # behind all sinks

_PACKED = ("fp8", "hqq", "quanto")
"""Families that are quantised already; coding them again would lose more and save little."""


@dataclass(frozen=True)
class Target:
    """A tensor of vectors, `(batch, …, seq, dim)`.

    Args:
        name: in a file.
        kind: by `semq_state.layouts`.
        layer: number of its layer in the state's own cache; -1 in any other.
        begin: position in the sequence of its first token.
        seq: how many tokens it holds.
        ends: whether its last token is the last of the sequence.
    """

    name: str
    kind: str
    layer: int
    begin: int
    seq: int
    ends: bool

    def span(self, n_sinks: int, n_recent: int) -> tuple[int, int]:
        """Its tokens that may be coded: from the first after the sinks to the last before the recent ones."""
        start = min(max(n_sinks - self.begin, 0), self.seq)
        return start, max(start, self.seq - (n_recent if self.ends else 0))

    def late_sinks(self, padding: Sequence[int], n_sinks: int, span: tuple[int, int]) -> torch.Tensor | None:
        """Which coded tokens are sinks of rows that begin with padding, `(batch, seq)`; None where none are."""
        if not any(padding) or self.begin == _NOWHERE:
            return None
        at = torch.arange(span[0], span[1]) + self.begin
        first = torch.tensor(padding)[:, None]
        return (at >= first) & (at < first + n_sinks)


def targets(snapshot: Snapshot) -> list[Target]:
    """Every tensor of the state's caches that holds floating vectors along the sequence, but for checkpoints, and
    its hidden states."""
    caches = _caches(snapshot).items()
    found = [target for prefix, cache in caches for target in _of_cache(cache, prefix, is_own=not prefix)]
    for name, tensor in _hidden(snapshot).items():
        if tensor.dtype in FLOATS and tensor.numel():
            found.append(Target(name, HIDDEN, -1, _NOWHERE, tensor.shape[0], ends=False))
    return found


def kinds_of(snapshot: Snapshot) -> dict[str, list[str]]:
    """Kind of state, by `semq_state.layouts`, to the names of its tensors in the state's caches."""
    found: dict[str, list[str]] = {}
    for prefix, cache in _caches(snapshot).items():
        for name, kind in _kinds(cache, prefix):
            found.setdefault(kind, []).append(name)
    return found | ({HIDDEN: list(_hidden(snapshot))} if snapshot.hidden else {})


def _hidden(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {name: t for name, t in hidden_tensors(snapshot.hidden).items() if ".states." in name}


def _kinds(cache: CacheState, prefix: str) -> Iterator[tuple[str, str]]:
    for i, layer in enumerate(cache.layers):
        yield from ((f"{prefix}layers.{i}.{name}", layer.layout.of(name).kind) for name in layer.tensors)
    for name, part in sorted(cache.parts.items()):
        yield from _kinds(part, f"{prefix}{name}.")


def _caches(snapshot: Snapshot) -> dict[str, CacheState]:
    companions = sorted(snapshot.generation.companions.items())
    return {"": snapshot.cache, **{f"generation.companions.{name}.": cache for name, cache in companions}}


def padding_of(snapshot: Snapshot) -> list[int]:
    """Of each row how many tokens before its first are padding."""
    mask = snapshot.generation.step_inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[0] != snapshot.batch_size or not mask.shape[1]:
        return [0] * snapshot.batch_size
    seen = mask != 0
    return torch.where(seen.any(1), seen.int().argmax(1), 0).tolist()


def _of_cache(cache: CacheState, prefix: str, is_own: bool) -> Iterator[Target]:
    for i, layer in enumerate(cache.layers):
        if layer.family not in _PACKED:
            yield from _of_layer(layer, f"{prefix}layers.{i}.", i if is_own else -1)
    for name, part in sorted(cache.parts.items()):
        yield from _of_cache(part, f"{prefix}{name}.", is_own=False)


def _of_layer(layer: LayerState, prefix: str, number: int) -> Iterator[Target]:
    for name, tensor in sorted(layer.tensors.items()):
        layout = layer.layout.of(name)
        if layout.kind in FOLDED and tensor.ndim > 2 and tensor.dtype in FLOATS and tensor.numel():
            yield Target(prefix + name, layout.kind, number, _NOWHERE, tensor.shape[-2], ends=False)
            continue
        along = layout.token_axis is not None and layout.token_axis in (-2, tensor.ndim - 2)
        if not along or tensor.ndim < 3 or tensor.dtype not in FLOATS or not tensor.numel():
            continue
        seq = tensor.shape[-2]
        seen = layer.meta.get("n_seen", seq)
        fits = name in ("keys", "values") and type(seen) is int and seen >= seq and not layer.is_fixed
        yield Target(prefix + name, layout.kind, number, seen - seq if fits else 0, seq, ends=not layer.is_fixed)
