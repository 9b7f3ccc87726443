"""The k best rows of every query, exactly, by one pass over all rows.

A pass decodes rows into a block that stays in the cache and multiplies it with all queries in float32. That product
is off by rounding, differently for other blocks, threads and machines; so it only chooses: every pair that may be
among the k best within the bound of that rounding stays, and these few are measured again in float64, in one order
of additions. Scores and their order are therefore the same whatever the batch and the number of threads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import Floats
from semq_state.content import n_workers
from semq_state.search.decoding import Bytes, Decoder
from semq_state.search.ids import IdArray
from semq_state.search.vectors import sums

_BLOCK_VALUES = 1 << 18  # float32 of a decoded block, 1 MiB: half of a second-level cache
_BLOCK_ROWS = 2048
_QUERIES = 512  # in one pass
_GROUP = 64  # queries multiplied at once
_MATRIX, _VECTOR = 1 << 18, 9216
"""The most multiplications, of two matrices and of a matrix with a vector, that OpenBLAS does in our own thread.
Larger ones wait for threads of its own: 100 times as long where others have the cores."""

_THREAD_ROWS = 16_384  # a thread is worth starting for
_CROWD = 1 << 16  # pairs that may pile up by being alike, before they are told apart

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Scanned:
    """The rows that are scanned: packed `(n, n_bytes)`, with the scales of `Decoder.scales` and ids `(n,)`."""

    decoder: Decoder
    packed: Bytes
    scales: Floats
    ids: IdArray

    def top(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """Rows and cosines `(n_queries, min(k, n))`, best first; of equal cosines the smaller id first.

        Args:
            queries: float32 `(n_queries, dim)`, of norm 1.
            k: at least 1.
        """
        k = min(k, len(self.packed))
        rows, scores = np.empty((len(queries), k), np.intp), np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries) if k else 0, _QUERIES):
            batch = slice(start, start + _QUERIES)
            found = self._candidates(queries[batch], k)
            pairs, exact = self.best(queries[batch], found, k)
            rows[batch], scores[batch] = pairs[1].reshape(-1, k), exact.reshape(-1, k)
        return rows, scores

    def best(self, queries: Floats, pairs: Rows, k: int) -> tuple[Rows, Floats]:
        """The k best of each query among pairs `(2, n)` of query and row, and their cosines; in order."""
        scores = self._exact(queries, pairs)
        names = np.unique(self.ids[pairs[1]], return_inverse=True)[1]
        order = np.lexsort((names, -scores, pairs[0]))
        kept = order[_places(pairs[0, order], len(queries)) < k]
        return pairs[:, kept], scores[kept]

    def _candidates(self, queries: Floats, k: int) -> Rows:
        """Pairs `(2, n)` of query and row, among them the k best of each query."""
        n = len(self.packed)
        n_threads = max(1, min(n_workers(), n // _THREAD_ROWS))
        bounds = [n * i // n_threads for i in range(n_threads + 1)]
        if n_threads == 1:
            return self._scan(queries, k, 0, n)
        with ThreadPoolExecutor(n_threads) as pool:
            parts = pool.map(lambda i: self._scan(queries, k, bounds[i], bounds[i + 1]), range(n_threads))
            return np.concatenate(list(parts), axis=1)

    def _scan(self, queries: Floats, k: int, start: int, stop: int) -> Rows:
        dim = queries.shape[1]
        step = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // dim))
        width = min(_GROUP, max(8, _MATRIX // (8 * dim)))
        groups = [_Leading(self, queries[at : at + width], k) for at in range(0, len(queries), width)]
        for first in range(start, stop, step):
            block = slice(first, min(first + step, stop))
            decoded, scales = self.decoder(self.packed[block]), self.scales[block, None]
            for group in groups:
                group.offer(decoded, scales, first)
        for group in groups:
            group.prune()
        return np.concatenate([np.add(group.pairs, [[i * width], [0]]) for i, group in enumerate(groups)], axis=1)

    def _exact(self, queries: Floats, pairs: Rows) -> Floats:
        """The cosine of each pair, rounded once."""
        scores = np.zeros(pairs.shape[1], np.float32)
        step = max(1, _BLOCK_VALUES // queries.shape[1])
        for start in range(0, len(scores), step):
            query, row = pairs[:, start : start + step]
            decoded = self.decoder(self.packed[row]).astype(np.float64)
            lengths = np.sqrt(sums(decoded * decoded))
            products = sums(decoded * queries[query])
            scores[start : start + step] = np.divide(products, lengths, out=products, where=lengths > 0)
        return scores


class _Leading:
    """The pairs that may still be among the k best of their query, by scores that are a little off."""

    def __init__(self, scanned: Scanned, queries: Floats, k: int) -> None:
        self._scanned, self._queries, self._k = scanned, queries, k
        # Twice what a float32 product of two unit vectors is off by in any order of additions (Higham 2002, 3.1),
        # with what scaling and rounding add.
        self._slack = np.float32((1.01 * queries.shape[1] + 8) * 2.0**-23)
        self._floors = np.full(len(queries), -np.inf, np.float32)
        self._columns = np.ascontiguousarray(queries.T)
        self.pairs: Rows = np.empty((2, 0), np.intp)
        self._scores = np.empty(0, np.float32)
        self._new: list[tuple[Rows, Floats]] = []
        self._n_new = 0

    def offer(self, decoded: Floats, scales: Floats, first: int) -> None:
        """Takes what may be among the best of a block, decoded `(m, dim)`, scales `(m, 1)`, from row `first`."""
        scores = _product(decoded, self._columns)
        scores *= scales
        found = np.flatnonzero(scores >= self._floors)
        if not len(found):
            return
        row, query = np.divmod(found, len(self._queries))
        self._new.append((np.stack([query, row + first]), scores.reshape(-1)[found]))
        self._n_new += len(found)
        if 2 * self._n_new > len(self._queries) * self._k:
            self.prune()

    def prune(self) -> None:
        """Drops pairs that are no longer among the best."""
        pairs = np.concatenate([self.pairs, *(new for new, _ in self._new)], axis=1)
        scores = np.concatenate([self._scores, *(new for _, new in self._new)])
        self._new, self._n_new = [], 0
        order = np.argsort(-scores)
        order = order[np.argsort(pairs[0, order].astype(np.uint16), kind="stable")]
        pairs, scores = pairs[:, order], scores[order]
        last = _places(pairs[0], len(self._queries)) == self._k - 1
        query = pairs[0, last]
        self._floors[query] = np.maximum(self._floors[query], scores[last] - self._slack)
        kept = scores >= self._floors[pairs[0]]
        self.pairs, self._scores = pairs[:, kept], scores[kept]
        if len(self._scores) > _CROWD + 2 * len(self._queries) * self._k:
            # The floors hold for these as well: they were exceeded by k rows.
            self.pairs, self._scores = self._scanned.best(self._queries, self.pairs, self._k)


def _product(rows: Floats, columns: Floats) -> Floats:
    """`rows @ columns` as a stack of products, each small enough to stay in this thread."""
    (n, dim), n_columns = rows.shape, columns.shape[1]
    each = max(1, (_MATRIX if n_columns > 1 else _VECTOR) // columns.size)
    product = np.empty((n, n_columns), np.float32)
    whole = n // each * each
    np.matmul(rows[:whole].reshape(-1, each, dim), columns, out=product[:whole].reshape(-1, each, n_columns))
    np.matmul(rows[whole:], columns, out=product[whole:])
    return product


def _places(queries: Rows, n_queries: int) -> Rows:
    """The place of each pair among those of its query, from 0; pairs in the order of their queries."""
    counts = np.bincount(queries, minlength=n_queries)
    return np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
