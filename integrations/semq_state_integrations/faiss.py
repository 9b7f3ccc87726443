"""FAISS: the rows of a `SymbolIndex` in one of its indexes, for more rows than a scan is for."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from semq_state import SymbolIndex, UnsupportedOperationError

_BATCH = 65_536  # rows decoded at a time
_TRAINING = 262_144  # rows to train with, spread evenly over all


def to_faiss(index: SymbolIndex, *, factory: str = "Flat") -> Any:
    """A FAISS index by inner product over what the rows stand for, at norm 1: scores are cosines.

    Args:
        index: rows under numbers.
        factory: which index, as `faiss.index_factory` takes it: `Flat` is exact, `HNSW32` a graph, `IVF1024,PQ48`
            lists of product codes. What has to be trained is trained with these rows.

    Returns:
        A `faiss.IndexIDMap2` under the ids of `index`; queries must have norm 1 for its scores to be cosines.

    Raises:
        UnsupportedOperationError: faiss is missing, the ids are strings, or faiss takes not this factory or so few
            rows.

    Example:
        ```python
        import faiss
        import numpy as np
        import semq_state as sq
        from semq_state_integrations.faiss import to_faiss

        vectors = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
        index = sq.SymbolIndex(64)
        index.add(vectors)
        faiss.normalize_L2(vectors)
        scores, ids = to_faiss(index).search(vectors[:5], 10)
        ```
    """
    faiss = _faiss()
    ids = index.ids
    if ids.dtype == object:
        raise UnsupportedOperationError(
            "ids", expected="numbers", found="strings", do="faiss takes numbers only: add the rows under numbers"
        )
    try:
        built = faiss.index_factory(index.dim, f"IDMap2,{factory}", faiss.METRIC_INNER_PRODUCT)
        if not built.is_trained:
            built.train(index.rows(ids[:: -(-len(ids) // _TRAINING) or 1], unit=True))
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            built.add_with_ids(index.rows(batch, unit=True), np.ascontiguousarray(batch))
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise UnsupportedOperationError(
            f"faiss index {factory!r:.80}",
            expected=f"a factory for {len(ids)} rows of {index.dim} coordinates",
            found=f"{reason:.200}",
            do="choose another factory",
        ) from error
    return built


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UnsupportedOperationError(
            "faiss", expected="the package faiss-cpu", found=str(error), do="pip install 'semq-state[faiss]'"
        ) from error
