"""`EncoderDecoderCache`: a decoder's own cache, and that of its attention to the encoder's outputs."""

from __future__ import annotations

from typing import Any, ClassVar, final

from transformers.cache_utils import EncoderDecoderCache

from semq_state.caches.base import AGAIN, Mark, path_of
from semq_state.caches.kinds.base import AbstractKind, DeviceOf
from semq_state.caches.kinds.registry import kind, kind_of
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import CacheState


@final
class EncoderDecoder(AbstractKind):
    """The parts `self` and `cross`, and which layers have seen the encoder (`is_updated`)."""

    id: ClassVar[str] = "encoder-decoder"
    path: ClassVar[str] = path_of(EncoderDecoderCache)

    def mark(self, cache: Any) -> Mark:
        parts = cache.self_attention_cache, cache.cross_attention_cache
        return tuple((part, kind_of(part).mark(part)) for part in parts), dict(cache.is_updated)

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        parts, is_updated = mark
        own, cross = (kind_of(part).dump(part, at) for part, at in parts)
        meta = {"is_updated": [[layer, bool(seen)] for layer, seen in sorted(is_updated.items())]}
        return CacheState(self.id, (), meta, {"self": own, "cross": cross})

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        own, cross = (
            kind(state.parts[name].kind).rebuild(state.parts[name], device_of) for name in ("self", "cross")
        )
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict(state.meta["is_updated"])
        return cache

    def n_cached(self, state: CacheState) -> int | None:
        return kind(state.parts["self"].kind).n_cached(state.parts["self"])

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        updated = state.meta.get("is_updated")
        if state.parts.keys() != {"self", "cross"} or not _is_table(updated):
            raise IncompleteStateError(
                where,
                expected="the parts self and cross, and which layers have seen the encoder",
                found=f"{', '.join(state.parts) or 'no parts'}, {updated!r:.80}",
                do=AGAIN,
            )
        own, cross = state.parts["self"], state.parts["cross"]
        kind(own.kind).check(own, batch_size, n_cached, f"{where}, self")
        length = kind(cross.kind).n_cached(cross) or 0
        kind(cross.kind).check(cross, batch_size, length, f"{where}, cross")
        for layer, seen in updated or ():
            if seen and not (layer < len(cross.layers) and cross.layers[layer].tensors):
                raise IncompleteStateError(
                    f"{where}, cross, layer {layer}",
                    expected="keys and values of the encoder's outputs",
                    found="none",
                    do="the decoder cannot go on without them; take the snapshot again",
                )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, (list, tuple)) and [type(x) for x in row] == [int, bool] and row[0] >= 0 for row in value
    )
