"""`SymbolIndex`: vectors as symbols under ids, searched exactly."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.codecs.semq_rules import AbstractOperator, Floats, blocks
from semq_state.errors import FormatError, UnsupportedOperationError
from semq_state.search.contents import Contents, operator_of, rule_of
from semq_state.search.ids import IdArray, Ids, refused
from semq_state.search.index_file import read_index, write_index
from semq_state.search.scan import Scanned
from semq_state.search.table import Table, encoded, units

Vectors = NDArray[np.floating[Any]] | torch.Tensor
Label = TypeVar("Label", bound=Hashable)


@final
@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found, best first, a row a query.

    Args:
        ids: `(n_queries, k)`: int64, or str as objects. `k` is less than asked where the index has fewer rows.
        scores: float32 `(n_queries, k)`, cosines.
    """

    ids: IdArray
    scores: Floats


@final
class SymbolIndex:
    """Vectors as symbols under ids, with exact search by cosine: a sidecar beside whatever holds the vectors.

    It is a scan of all rows, for up to a few million of them: queries in batches of 64 or more are read against
    each decoded row at once. For more rows, export it to a vector database (`semq_state_integrations.faiss`).
    Searches may run in several threads; while rows are added or removed nothing else may.

    Args:
        dim: coordinates of a vector, 1 to 65,536.
        bins: bins of each sign, 2 to 64: 8, the default, are 4 bits a coordinate. Sectors for `phase` (16), the
            scale for `orbit` (50).
        c: where the range of `quant` ends, in root mean square coordinates; None is the best for Gaussian
            coordinates. SEMQ's, and that of `.semq` files, is 2.0.
        operator: `quant`, `phase` or `orbit`, SEMQ's rules.

    Raises:
        UnsupportedOperationError: an argument is out of its limits.

    Example:
        ```python
        import numpy as np
        import semq_state as sq

        vectors = np.random.default_rng(0).standard_normal((1000, 384))
        index = sq.SymbolIndex(384)
        index.add(vectors)
        found = index.search(vectors[:64], k=10)
        assert (found.ids[:, 0] == np.arange(64)).all()
        ```
    """

    def __init__(
        self, dim: int, *, bins: int | None = None, c: float | None = None, operator: str = "quant"
    ) -> None:
        self._begin(operator_of(operator, dim, bins, c))

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"SymbolIndex({len(self)} rows, {rule_of(self._operator)})"

    @property
    def dim(self) -> int:
        """Coordinates of a vector."""
        return self._operator.dim

    @property
    def operator(self) -> AbstractOperator:
        """The rule from vectors to symbols."""
        return self._operator

    @property
    def n_bytes(self) -> int:
        """Bytes of a row: its symbols, and 8 for its norm and the norm of what they stand for."""
        return self._operator.n_bytes + 8

    @property
    def ids(self) -> IdArray:
        """The ids `(n,)` in the order in which they came: int64, or str as objects."""
        return self._ids.values.copy()

    @property
    def index_id(self) -> str:
        """`sha256:…` over the rule, ids, symbols and norms: the same in any order and on every machine."""
        return self.contents().index_id()

    def add(self, rows: Vectors, ids: Sequence[int] | Sequence[str] | NDArray[Any] | None = None) -> IdArray:
        """Takes vectors, all or none of them.

        Args:
            rows: `(n, dim)` floats of any norm but 0; the norms are kept as float32.
            ids: one for each: all numbers of 0 to 2^63 - 1, or all strings of 1 to 4,096 bytes. None: the numbers
                after the largest in the index, from 0.

        Returns:
            Their ids.

        Raises:
            UnsupportedOperationError: another shape or dtype, NaN, infinity or zeros in a row, ids that repeat,
                are taken, or are of another kind than those in the index.
        """
        norms, packed = encoded(self._operator, rows, "rows")
        new = self._ids.fresh(ids, len(norms))
        self._table.append(norms, packed)
        self._ids.append(new)
        return new.copy()

    def remove(self, ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> None:
        """Drops rows, all or none of them.

        Raises:
            UnsupportedOperationError: an id has no row, or stands twice.
        """
        rows = self._ids.rows(ids)
        kept = np.ones(len(self), np.bool_)
        kept[rows] = False
        if len(self) - kept.sum() != len(rows):
            raise refused("ids", "each once", "one that repeats", "leave out what is there twice")
        self._table.keep(kept)
        self._ids.keep(kept)

    def search(self, queries: Vectors, k: int = 10) -> SearchResult:
        """The k nearest rows of each query: cosines of the query, as it is, with what the symbols stand for.

        Exact, and the same for any batch and number of threads; of equal scores the smaller id comes first.

        Args:
            queries: `(n_queries, dim)` floats of any norm but 0.
            k: 1 or more.

        Raises:
            UnsupportedOperationError: `k` is below 1, or queries are as `add` would refuse them.
        """
        return self._search(units(self._operator, queries, "queries"), k)

    def search_symbols(self, queries: Vectors, k: int = 10) -> SearchResult:
        """The same with queries that become symbols first: symbols against symbols."""
        _, packed = encoded(self._operator, queries, "queries")
        decoder = self._table.decoder
        return self._search(decoder(packed) * decoder.scales(packed)[:, None], k)

    def classify(self, queries: Vectors, labels: Mapping[Any, Label], k: int = 10) -> list[Label]:
        """The label of most of the k nearest rows of each query; among equals, of the nearest.

        Args:
            queries: as for `search`.
            labels: the label of each id.

        Raises:
            UnsupportedOperationError: as `search`; the index is empty, or a row that was found has no label.
        """
        if not len(self):
            raise refused("classify", "rows in the index", "none", "add some")
        found = self.search(queries, k).ids.tolist()
        missing = next((each for row in found for each in row if each not in labels), None)
        if missing is not None:
            raise refused("labels", "one for each id", f"none for {missing!r:.80}", "add it")
        return [Counter(labels[each] for each in row).most_common(1)[0][0] for row in found]

    def rows(self, ids: Sequence[int] | Sequence[str] | NDArray[Any], *, unit: bool = False) -> Floats:
        """What rows stand for: float32 `(n, dim)`, of the norms that they came with, or of norm 1.

        Raises:
            UnsupportedOperationError: an id has no row.
        """
        at = self._ids.rows(ids)
        norms, packed, scales = self._table.stored()
        values = np.empty((len(at), self.dim), np.float32)
        for block in blocks(values):
            factors = scales[at[block]] if unit else scales[at[block]] * norms[at[block]]
            np.multiply(self._table.decoder(packed[at[block]]), factors[:, None], out=values[block])
        return values

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all; its bytes depend on `index_id` alone.

        Raises:
            StoreError: the folder is missing or read-only, or the disk is full.
        """
        write_index(path, self.contents())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SymbolIndex:
        """Reads a file of `save` and checks all of it; rows are then in the order of their ids.

        Raises:
            StoreError: the file cannot be read.
            FormatError: it is damaged, of a later version, or no index.
            IntegrityError: its digest does not hold.
        """
        contents = read_index(path)
        try:
            return cls.of(contents)
        except UnsupportedOperationError as error:
            raise FormatError(
                f"{path}: rows", expected=error.expected, found=error.found, do="use another copy of the file"
            ) from error

    @classmethod
    def of(cls, contents: Contents) -> SymbolIndex:
        """The index of contents.

        Raises:
            UnsupportedOperationError: rows are not canonical.
        """
        index = cls.__new__(cls)
        index._begin(contents.operator)
        for block in blocks(contents.packed):
            contents.operator.unpack(contents.packed[block])
        index._table.append(contents.norms, contents.packed)
        index._ids.append(contents.ids)
        return index

    def contents(self) -> Contents:
        """All of it by increasing id."""
        norms, packed, _ = self._table.stored()
        return Contents.ordered(self._operator, self._ids.values, norms, packed)

    def _begin(self, operator: AbstractOperator) -> None:
        self._operator, self._table, self._ids = operator, Table(operator), Ids(np.empty(0, np.int64))

    def _search(self, units: Floats, k: int) -> SearchResult:
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise refused("k", "1 or more", f"{k!r:.80}", "ask for at least one row")
        _, packed, scales = self._table.stored()
        ids = self._ids.values
        rows, scores = Scanned(self._table.decoder, packed, scales, ids).top(units, int(k))
        return SearchResult(ids[rows], scores)
