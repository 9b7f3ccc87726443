"""What caches hold: layers, and caches made of caches. Each can be cut to fewer tokens and to other rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.errors import UnsupportedOperationError
from semq_state.layouts import FamilyLayout, layout_of

Tensors = Mapping[str, torch.Tensor]

ABSENT = "absent"
"""Kind of a cache that was never there, or was left out: hidden states alone."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one cache layer holds.

    Args:
        family: id of the cache family that can rebuild it, `dynamic` say.
        tensors: name to tensor; keys and values are `(batch, kv_heads, seq, head_dim)`.
        meta: the scalars beside them (window, counters).
    """

    family: str
    tensors: Tensors
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> FamilyLayout:
        return layout_of(self.family)

    @property
    def is_fixed(self) -> bool:
        """Whether its tokens are not those of the sequence (cross-attention to an image, say)."""
        return bool(self.meta.get("fixed"))

    def can_crop(self, n_tokens: int) -> bool:
        """Whether the state after `n_tokens` cached tokens can still be told from this one."""
        if self.layout.cropping == "window" and self.tensors:
            # A full window has dropped the tokens before it.
            n_seen, keys = self.meta.get("n_seen"), self.tensors.get("keys")
            return n_tokens == n_seen or (keys is not None and keys.shape[-2] == n_seen)
        return self.layout.cropping != "never" or not self.tensors

    def crop(self, n_tokens: int) -> LayerState:
        """The layer after its first `n_tokens` tokens. Shares memory.

        Raises:
            UnsupportedOperationError: it has not kept what that needs.
        """
        if self.is_fixed or self.layout.cropping == "whole" or not self.tensors:
            return self
        axes = {name: self.layout.of(name).token_axis for name in self.tensors}
        if any(a is not None and n_tokens > self.tensors[n].shape[a] for n, a in axes.items()):
            raise UnsupportedOperationError(
                f"a {self.family!r} layer", expected=f"at least {n_tokens} tokens", found="fewer"
            )
        if not self.can_crop(n_tokens):
            raise UnsupportedOperationError(
                f"a {self.family!r} layer",
                expected="a state that still holds its past",
                found="a full window" if self.layout.cropping == "window" else "one into which the past is folded",
            )
        tensors = {
            name: tensor if (axis := axes[name]) is None else tensor.narrow(axis, 0, n_tokens)
            for name, tensor in self.tensors.items()
        }
        meta = {**self.meta, "n_seen": n_tokens} if "n_seen" in self.meta else self.meta
        if not n_tokens:
            return LayerState(
                self.family, {}, {**meta, "filled": False, **({"holds": []} if "holds" in meta else {})}
            )
        return LayerState(self.family, tensors, meta)

    def select(self, rows: torch.Tensor) -> LayerState:
        """The layer with these rows of the batch.

        Raises:
            UnsupportedOperationError: its rows are packed together.
        """
        if self.tensors and not self.layout.selects:
            raise UnsupportedOperationError(
                "select",
                expected="a layer whose rows lie apart",
                found=f"a {self.family!r} layer",
                do="keep all rows",
            )
        return self._mapped(lambda name, t: take_rows(t, rows, self.layout.of(name).batch_axis))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerState:
        """The layer with `function` applied to each tensor."""
        return self._mapped(lambda _, t: function(t))

    def _mapped(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> LayerState:
        return LayerState(self.family, {n: function(n, t) for n, t in self.tensors.items()}, self.meta)


@dataclass(frozen=True, eq=False)
class CacheState:
    """A whole cache: its kind, scalars and layers, first layer first, or the caches that it is made of.

    Args:
        kind: id of the kind of cache, `dynamic` say.
        layers: first layer first.
        meta: scalars of the cache itself.
        parts: name to cache, `self` and `cross` of an encoder-decoder's.
    """

    kind: str
    layers: tuple[LayerState, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, CacheState] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Raw size of all cache tensors, the figure that file sizes are compared with."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def all_layers(self) -> tuple[LayerState, ...]:
        """Its layers and those of its parts."""
        return (*self.layers, *(layer for _, part in sorted(self.parts.items()) for layer in part.all_layers()))

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Every tensor under its name in a file: layer by layer, the names of each in order, then the parts."""
        named: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(self.layers):
            named |= {f"{prefix}layers.{i}.{name}": t for name, t in sorted(layer.tensors.items())}
        for name, part in sorted(self.parts.items()):
            named |= part.tensors(f"{prefix}{name}.")
        return named

    def structure(self) -> dict[str, Any]:
        """Everything of the cache that is not a tensor."""
        whole: dict[str, Any] = {
            "kind": self.kind,
            "meta": dict(self.meta),
            "layers": [
                {"family": x.family, "meta": dict(x.meta), "tensors": sorted(x.tensors)} for x in self.layers
            ],
        }
        if self.parts:
            whole["parts"] = {name: part.structure() for name, part in sorted(self.parts.items())}
        return whole

    def crop(self, n_tokens: int, kept: CacheState | None = None) -> CacheState:
        """The cache after its first `n_tokens` tokens.

        Args:
            n_tokens: cached tokens of each row.
            kept: the layers that could not be cropped, as they were at that moment.

        Raises:
            UnsupportedOperationError: a layer has not kept what that needs.
        """
        layers = []
        for i, layer in enumerate(self.layers):
            if kept is not None and kept.layers[i].family != "dummy":
                layers.append(kept.layers[i])
                continue
            try:
                layers.append(layer.crop(n_tokens))
            except UnsupportedOperationError as error:
                raise UnsupportedOperationError(
                    f"layer {i}, {error.where}", expected=error.expected, found=error.found
                ) from error
        parts = {
            name: part.crop(n_tokens, kept.parts[name] if kept else None) if self.grows(name) else part
            for name, part in self.parts.items()
        }
        return CacheState(self.kind, tuple(layers), self.meta, parts)

    def uncroppable(self) -> CacheState:
        """The layers that later cannot be cropped to this moment; dummies in place of the others."""
        layers = tuple(
            x if x.layout.cropping in ("window", "never") and x.tensors else LayerState("dummy", {})
            for x in self.layers
        )
        growing = {name: part.uncroppable() for name, part in self.parts.items() if self.grows(name)}
        return CacheState(self.kind, layers, {}, growing)

    def grows(self, part: str) -> bool:
        """Whether a part holds the sequence itself. A cross-attention that saw an encoder does not."""
        return part != "cross" or not any(seen for _, seen in self.meta.get("is_updated", ()))

    def select(self, rows: torch.Tensor) -> CacheState:
        """The cache with these rows of the batch."""
        return self._mapped(lambda layer: layer.select(rows), lambda part: part.select(rows))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> CacheState:
        """The cache with `function` applied to each tensor."""
        return self._mapped(lambda layer: layer.map(function), lambda part: part.map(function))

    def _mapped(
        self, of_layer: Callable[[LayerState], LayerState], of_part: Callable[[CacheState], CacheState]
    ) -> CacheState:
        return dataclasses.replace(
            self,
            layers=tuple(map(of_layer, self.layers)),
            parts={name: of_part(part) for name, part in self.parts.items()},
        )


def take_rows(tensor: torch.Tensor, rows: torch.Tensor, axis: int | None = 0) -> torch.Tensor:
    """`tensor` with these rows on its batch axis; itself where all rows share it."""
    if axis is None or tensor.ndim <= axis or (tensor.shape[axis] == 1 and int(rows.max()) > 0):
        return tensor
    return tensor.index_select(axis, rows.to(tensor.device))
