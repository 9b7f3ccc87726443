"""DeepSeek-V4's layers: a sliding window, and compressed entries of all that lies before it.

`DeepseekV4HCACache` (heavily compressed attention) and `DeepseekV4CSACache` (compressed sparse attention, with an
indexer and an overlap between windows). The model replaces their tensors and never writes into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, final

import torch

from semq_state.caches.base import AGAIN, AbstractFamily, Mark, require_length
from semq_state.errors import IncompleteStateError
from semq_state.snapshot import LayerState

_MODULE = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_TABLES = ("buffer_kv", "buffer_gate", "compressed_kv", "overlap_kv", "overlap_gate")


class Compressed(AbstractFamily):
    """`keys` of the window, which are the values too, `(batch, 1, seq, head_dim)`, and by entry name (`compressor`,
    `indexer`) the tokens that wait for compression (`buffer_kv.*`, `buffer_gate.*`), the entries so far
    (`compressed_kv.*`) and the half window that the next one needs (`overlap_kv.*`, `overlap_gate.*`)."""

    names: ClassVar[tuple[str, ...]] = ("keys",)
    optional: ClassVar[tuple[str, ...]] = tuple(f"{table}.*" for table in _TABLES)
    counts: ClassVar[dict[str, int]] = {"window": 2, "n_seen": 0, "compress_rate": 1}
    layer_class: ClassVar[str]

    def mark(self, layer: Any) -> Mark:
        return layer.keys, dict(_entries(layer)), dict(layer.entry_count), layer.cumulative_length

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        keys, entries, counts, n_seen = mark
        meta = {
            "window": layer.sliding_window,
            "n_seen": n_seen,
            "compress_rate": layer.compress_rate,
            "entry_count": counts,
            "filled": bool(n_seen),
        }
        return LayerState(self.id, {"keys": keys, **entries} if n_seen else {}, meta)

    def empty(self, state: LayerState) -> Any:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4

        rates = dict.fromkeys(
            ("heavily_compressed_attention", "compressed_sparse_attention"), state.meta["compress_rate"]
        )
        config = SimpleNamespace(sliding_window=state.meta["window"], compress_rates=rates)
        return getattr(modeling_deepseek_v4, self.layer_class)(config)

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        if not state.tensors:
            return
        keys = state.tensors["keys"].to(device)
        layer.lazy_initialization(keys, keys)
        layer.keys = layer.values = keys
        for name, tensor in state.tensors.items():
            table, _, entry = name.partition(".")
            if table in _TABLES:
                getattr(layer, table)[entry] = tensor.to(device)
        layer.entry_count = dict(state.meta["entry_count"])
        layer.cumulative_length = state.meta["n_seen"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        counts = state.meta.get("entry_count")
        if type(counts) is not dict or not all(type(n) is int and n >= 0 for n in counts.values()):
            raise IncompleteStateError(where, expected="entry_count by name", found=repr(counts), do=AGAIN)
        if not state.tensors:
            return
        require_length(
            state.tensors["keys"], -2, min(state.meta["n_seen"], state.meta["window"] - 1), f"{where}, keys"
        )
        for name, n_entries in counts.items():
            # Every token is either in an entry or waits in the buffer.
            waiting = state.tensors.get(f"buffer_kv.{name}")
            n_waiting = -1 if waiting is None else waiting.shape[1]
            if n_entries * state.meta["compress_rate"] + n_waiting != state.meta["n_seen"]:
                raise IncompleteStateError(
                    f"{where}, buffer_kv.{name}",
                    expected=f"the tokens after {n_entries} entries of {state.meta['compress_rate']}",
                    found="none" if waiting is None else str(n_waiting),
                    do=AGAIN,
                )
            if n_entries:
                compressed = state.tensors.get(f"compressed_kv.{name}")
                if compressed is None or compressed.shape[1] != n_entries:
                    raise IncompleteStateError(
                        f"{where}, compressed_kv.{name}", expected=f"{n_entries} entries", found="others", do=AGAIN
                    )


@final
class HeavilyCompressed(Compressed):
    """Windows that do not overlap, without an indexer."""

    id: ClassVar[str] = "deepseek-v4-hca"
    layer_class: ClassVar[str] = "DeepseekV4HCACache"
    layer_type: ClassVar[type | str] = f"{_MODULE}.{layer_class}"


@final
class CompressedSparse(Compressed):
    """Overlapping windows, and an indexer that chooses among the entries."""

    id: ClassVar[str] = "deepseek-v4-csa"
    layer_class: ClassVar[str] = "DeepseekV4CSACache"
    layer_type: ClassVar[type | str] = f"{_MODULE}.{layer_class}"


def _entries(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for table in _TABLES:
        for entry, tensor in getattr(layer, table, {}).items():
            if tensor is not None:
                yield f"{table}.{entry}", tensor
