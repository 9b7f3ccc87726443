"""State that is no list of layers: RWKV's and XLNet's plain lists, xLSTM's and Reformer's own caches …"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from semq_state.caches.base import AGAIN, Mark
from semq_state.caches.kinds.base import AbstractKind, DeviceOf
from semq_state.caches.kinds.minimax import check_rows
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import CacheState, LayerState


@final
class Rwkv(AbstractKind):
    """Five tensors for all layers together, `(batch, hidden, n_layers)`, which the model writes into."""

    id: ClassVar[str] = "rwkv"
    model_type: ClassVar[str] = "rwkv"

    def mark(self, cache: Any) -> Mark:
        return tuple(t.clone() for t in cache)

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        return CacheState(self.id, tuple(LayerState(self.id, {"state": t}) for t in mark))

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        return [layer.tensors["state"].to(device_of(0), copy=True) for layer in state.layers]

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        if len(state.layers) != 5:
            raise IncompleteStateError(where, expected="five states", found=str(len(state.layers)), do=AGAIN)
        for i, layer in enumerate(state.layers):
            check_rows(layer, ("state",), batch_size, f"{where}, state {i}")


@final
class XlNet(AbstractKind):
    """XLNet's memories: the hidden states of each layer, `(seq, batch, hidden)`, replaced at each step."""

    id: ClassVar[str] = "xlnet"
    model_type: ClassVar[str] = "xlnet"

    def mark(self, cache: Any) -> Mark:
        return tuple(cache)

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        return CacheState(self.id, tuple(LayerState(self.id, {"memory": t}) for t in mark))

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        return tuple(layer.tensors["memory"].to(device_of(i)) for i, layer in enumerate(state.layers))

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        for i, layer in enumerate(state.layers):
            check_rows(layer, ("memory",), batch_size, f"{where}, layer {i}")


@final
class XLstm(AbstractKind):
    """The memory, normaliser and scale of each layer (`state.0` to `state.2`), and the position."""

    id: ClassVar[str] = "xlstm"
    path: ClassVar[str] = "transformers.models.xlstm.modeling_xlstm.xLSTMCache"

    def mark(self, cache: Any) -> Mark:
        states = [tuple(t.clone() for t in cache.rnn_state[layer]) for layer in sorted(cache.rnn_state)]
        return states, cache.seqlen_offset.clone()

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        states, offset = mark
        layers = tuple(LayerState(self.id, {f"state.{i}": t for i, t in enumerate(layer)}) for layer in states)
        dtype = str(cache.dtype).removeprefix("torch.")
        return CacheState(self.id, layers, {"offset": [int(n) for n in offset.reshape(-1)], "dtype": dtype})

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        from transformers.models.xlstm.modeling_xlstm import xLSTMCache

        cache = xLSTMCache.__new__(xLSTMCache)
        cache.seqlen_offset = torch.tensor(state.meta["offset"], device=device_of(0))
        cache.dtype = _DTYPES[state.meta["dtype"]]
        cache.rnn_state = {
            i: tuple(layer.tensors[f"state.{j}"].to(device_of(i), copy=True) for j in range(3))
            for i, layer in enumerate(state.layers)
        }
        return cache

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        offset, dtype = state.meta.get("offset"), state.meta.get("dtype")
        if not (isinstance(offset, list) and all(type(n) is int for n in offset)) or dtype not in _DTYPES:
            raise IncompleteStateError(
                where, expected="an offset and a dtype", found=f"{offset!r}, {dtype!r}", do=AGAIN
            )
        for i, layer in enumerate(state.layers):
            check_rows(layer, ("state.0", "state.1", "state.2"), batch_size, f"{where}, layer {i}")


@final
class Reformer(AbstractKind):
    """The hidden states of each layer, `(batch, seq, hidden)`, and the buckets that they were hashed to."""

    id: ClassVar[str] = "reformer"
    path: ClassVar[str] = "transformers.models.reformer.modeling_reformer.ReformerDynamicCache"

    def mark(self, cache: Any) -> Mark:
        return tuple(cache.states_cache), tuple(cache.buckets_cache), cache._seen_tokens

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        states, buckets, n_seen = mark
        # Local attention appends an empty tensor at each call; only those of the layers themselves are read.
        layers = tuple(LayerState(self.id, {"states": s, "buckets": buckets[i]}) for i, s in enumerate(states))
        return CacheState(self.id, layers, {"n_seen": int(n_seen)})

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        from transformers.models.reformer.modeling_reformer import ReformerDynamicCache

        cache = ReformerDynamicCache()
        for i, layer in enumerate(state.layers):
            cache.states_cache.append(layer.tensors["states"].to(device_of(i)))
            cache.buckets_cache.append(layer.tensors["buckets"].to(device_of(i)))
        cache._seen_tokens = state.meta["n_seen"]
        return cache

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        if type(state.meta.get("n_seen")) is not int:
            raise IncompleteStateError(where, expected="n_seen", found=repr(state.meta), do=AGAIN)
        for i, layer in enumerate(state.layers):
            check_rows(layer, ("states", "buckets"), batch_size, f"{where}, layer {i}")


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@final
class VoxtralPadding(AbstractKind):
    """The last frames of each convolution of Voxtral's streaming audio encoder, written in place."""

    id: ClassVar[str] = "voxtral-padding"
    path: ClassVar[str] = (
        "transformers.models.voxtral_realtime.modeling_voxtral_realtime.VoxtralRealtimeConv1dPaddingCache"
    )

    def mark(self, cache: Any) -> Mark:
        return {key: (layer.cache.clone(), layer.left_pad) for key, layer in cache.layers.items()}

    def dump(self, cache: Any, mark: Mark) -> CacheState:
        layers = tuple(
            LayerState(self.id, {"frames": frames}, {"key": key, "left_pad": left_pad})
            for key, (frames, left_pad) in mark.items()
        )
        return CacheState(self.id, layers)

    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        from transformers.models.voxtral_realtime import modeling_voxtral_realtime as voxtral

        cache = voxtral.VoxtralRealtimeConv1dPaddingCache()
        for layer in state.layers:
            live = cache.layers[layer.meta["key"]] = voxtral.VoxtralRealtimeConv1dCacheLayer()
            live.cache = layer.tensors["frames"].to(device_of(0), copy=True)
            live.left_pad, live.in_channels = layer.meta["left_pad"], live.cache.shape[1]
            live.is_initialized = True
        return cache

    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        for i, layer in enumerate(state.layers):
            check_rows(layer, ("frames",), batch_size, f"{where}, layer {i}")
            if type(layer.meta.get("key")) is not str or type(layer.meta.get("left_pad")) is not int:
                raise IncompleteStateError(
                    f"{where}, layer {i}", expected="its key and padding", found=repr(layer.meta)
                )
