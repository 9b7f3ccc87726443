"""Caches that are a list of layers: dynamic, static, quantised, and those of multi-token prediction."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import (
    Cache,
    DFlashCache,
    DynamicCache,
    DynamicLayer,
    MtpCache,
    QuantizedCache,
    StaticCache,
)

from semq_state.caches.base import AGAIN, Mark, path_of
from semq_state.caches.kinds.base import AbstractKind, DeviceOf
from semq_state.caches.registry import family, family_of
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import CacheState, LayerState


class Layered(AbstractKind):
    """A cache that is its layers, and perhaps adds some as the model asks for them (`grows`)."""

    cache_type: ClassVar[Any]

    def mark(self, cache: Any) -> Mark:
        marks = tuple((layer, family_of(layer, f"layer {i}").mark(layer)) for i, layer in enumerate(cache.layers))
        return marks, _newest(cache.layers), self.settings(cache)

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        marks, newest, settings = mark
        if settings.get("offloading") and torch.cuda.is_available():
            # Its copies to the CPU do not wait for each other.
            torch.cuda.synchronize()
        layers = [family_of(layer, f"layer {i}").dump(layer, at) for i, (layer, at) in enumerate(marks)]
        _require_unchanged(layers, newest)
        return CacheState(self.id, _with_fixed(layers), settings)

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        cache = self.cache_type.__new__(self.cache_type)
        layers = [family(x.family, f"layer {i}").rebuild(x, device_of(i)) for i, x in enumerate(state.layers)]
        # Offloading needs a CUDA device; on any other the layers simply stay where they are.
        offloads = bool(state.meta.get("offloading")) and torch.cuda.is_available()
        if state.meta.get("grows"):
            Cache.__init__(cache, layer_class_to_replicate=DynamicLayer, offloading=offloads)
            cache.layers = layers
        else:
            only = bool(state.meta.get("only_non_sliding", True))
            Cache.__init__(cache, layers=layers, offloading=offloads, offload_only_non_sliding=only)
        self.restore_settings(cache, state)
        return cache

    def settings(self, cache: Any) -> dict[str, Any]:
        """The scalars of the cache itself."""
        if cache.offloading:
            only = bool(getattr(cache, "only_non_sliding", True))
            return {"grows": _grows(cache), "offloading": True, "only_non_sliding": only}
        return {"grows": _grows(cache)}

    def restore_settings(self, cache: Any, state: CacheState) -> None:
        """The inverse of `settings`, for what the constructor does not take."""

    def n_cached(self, state: CacheState) -> int | None:
        return _count(state.layers) if any(layer.tensors for layer in state.layers) else 0

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        if n_cached and not any(layer.tensors for layer in state.layers):
            raise IncompleteStateError(where, expected=f"{n_cached} cached tokens", found="none", do=AGAIN)
        for i, layer in enumerate(state.layers):
            of_layer = family(layer.family, f"{where}, layer {i}")
            of_layer.check(layer, batch_size, f"{where}, layer {i}")
            found = None if layer.is_fixed else of_layer.n_cached(layer)
            if found is not None and found != n_cached:
                raise IncompleteStateError(
                    f"{where}, layer {i}",
                    expected=f"{n_cached} cached tokens",
                    found=str(found),
                    do=f"the layers do not belong to one step; {AGAIN}",
                )


@final
class Dynamic(Layered):
    """`DynamicCache`, the default."""

    id: ClassVar[str] = "dynamic"
    cache_type: ClassVar[Any] = DynamicCache
    path: ClassVar[str] = path_of(DynamicCache)


@final
class Static(Layered):
    """`StaticCache`: all memory taken beforehand."""

    id: ClassVar[str] = "static"
    cache_type: ClassVar[Any] = StaticCache
    path: ClassVar[str] = path_of(StaticCache)


@final
class Quantized(Layered):
    """`QuantizedCache`, in its packed form."""

    id: ClassVar[str] = "quantized"
    cache_type: ClassVar[Any] = QuantizedCache
    path: ClassVar[str] = path_of(QuantizedCache)


@final
class Mtp(Layered):
    """`MtpCache`, of the layers that predict several tokens ahead."""

    id: ClassVar[str] = "mtp"
    cache_type: ClassVar[Any] = MtpCache
    path: ClassVar[str] = path_of(MtpCache)


@final
class DFlash(Layered):
    """`DFlashCache`, of a block-diffusion draft model."""

    id: ClassVar[str] = "dflash"
    cache_type: ClassVar[Any] = DFlashCache
    path: ClassVar[str] = path_of(DFlashCache)

    def settings(self, cache: Any) -> dict[str, Any]:
        return {**super().settings(cache), "n_accepted": int(cache._previous_number_of_accepted_tokens)}

    def restore_settings(self, cache: Any, state: CacheState) -> None:
        cache.set_previous_accepted_tokens(state.meta["n_accepted"])


def _grows(cache: Any) -> bool:
    return cache.layer_class_to_replicate is not None


def _count(layers: Any) -> int | None:
    """The tokens that the first layer that counts has seen, which is how transformers counts them as well."""
    counts = (family(x.family, f"layer {i}").n_cached(x) for i, x in enumerate(layers) if not x.is_fixed)
    return next((count for count in counts if count is not None), None)


def _with_fixed(layers: list[LayerState]) -> tuple[LayerState, ...]:
    """Marks the layers whose tokens are not the sequence's: cross-attention to an image keeps its own length."""
    n_tokens = _count(layers)
    counts = [family(x.family, f"layer {i}").n_cached(x) for i, x in enumerate(layers)]
    return tuple(
        x if count in (None, n_tokens) else LayerState(x.family, x.tensors, {**x.meta, "fixed": True})
        for x, count in zip(layers, counts, strict=True)
    )


def _newest(layers: list[Any]) -> tuple[int, torch.Tensor] | None:
    """The newest key of the deepest layer that has one, for there it depends on every token before it."""
    for i in reversed(range(len(layers))):
        key = family_of(layers[i], f"layer {i}").newest(layers[i])
        if key is not None:
            return i, key
    return None


def _require_unchanged(layers: list[LayerState], newest: tuple[int, torch.Tensor] | None) -> None:
    if newest is None:
        return
    i, expected = newest
    keys = layers[i].tensors.get("keys")
    if keys is not None and not torch.equal(_bits(keys[:, :, -1]), _bits(expected)):
        raise IncompleteStateError(
            f"cache, layer {i}",
            expected="the tokens that it held after the last finished one",
            found="others: it was cut or changed since",
            do="take the snapshot before the cache is used for something else",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
