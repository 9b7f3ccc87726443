"""Hidden states by row, wherever they are kept, and which rows of two of them belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from semq_state.audit.vectors import Integers
from semq_state.errors import Difference
from semq_state.records import Record
from semq_state.snapshot import SEQUENCE, Snapshot
from semq_state.snapshot.hidden import MAX_POSITION

At = slice | Integers
"""Numbers of rows: a run of them, or each one."""

PAIRS = 1 << 16
"""Row ids looked at at a time where only ids and tokens are compared."""


class Column(Protocol):
    """States of one site, `(n, dim)`, read when asked for: a tensor is one, and so is a record's column."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, at: At, /) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Hidden states of one stream of tokens.

    Args:
        ids: of each row, (document, position), `(n, 2)` int64, increasing.
        token_ids: the token at which it stands, `(n,)` int64.
        sites: name of each site to its states.
        stream: which tokens these are, `sequence` say.
        pool: how rows were pooled over a document; empty where each token has its own.
        padding: `(batch, seq)`, where documents are rows of a padded batch.
    """

    ids: Integers
    token_ids: Integers
    sites: Mapping[str, Column]
    stream: str
    pool: str = ""
    padding: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def of_sequence(self) -> bool:
        """Whether a row's place is one in the sequence."""
        return self.stream == SEQUENCE and not self.pool

    def places(self, at: At) -> Integers:
        """Absolute positions of these rows in their sequences, with padding: where a cache has the same token."""
        ids = self.ids[at]
        if self.padding is None or not self.of_sequence:
            return ids[:, 1]
        found = ids[:, 1].copy()
        for document in np.unique(ids[:, 0]):
            if document >= self.padding.shape[0]:
                continue
            kept: Integers = (~self.padding[int(document)]).nonzero().flatten().numpy()
            own = ids[:, 0] == document
            # What came after the mask was chosen, and is no padding.
            within = np.minimum(found[own], len(kept) - 1)
            later = self.padding.shape[1] + found[own] - len(kept)
            found[own] = np.where(found[own] < len(kept), kept[within], later) if len(kept) else later
        return found


def rows_of_hidden(snapshot: Snapshot, stream: str) -> Rows:
    """One stream of what a snapshot keeps. Shares memory."""
    own = snapshot.hidden[stream]
    ids, tokens = own.rows.cpu().numpy(), own.token_ids.cpu().numpy()
    return Rows(ids, tokens, own.states, stream, own.pool, snapshot.padding())


def rows_of_record(record: Record) -> Rows:
    """A whole record; states are read as they are asked for."""
    # While it has no row, dims and dtypes are not known.
    sites: dict[str, Column] = {name: record[name] if len(record) else torch.empty(0, 0) for name in record.sites}
    return Rows(record.ids, record.token_ids, sites, record.plan.stream, record.plan.pool)


def paired(a: Rows, b: Rows, step: int) -> Iterator[tuple[At, At]]:
    """Rows that both have, at most `step` at a time, in order: their numbers in each. Empty runs are left out."""
    i = j = 0
    while i < len(a) and j < len(b):
        ours, theirs = _keys(a.ids[i : i + step]), _keys(b.ids[j : j + step])
        last = min(ours[-1], theirs[-1])
        n, m = (int(np.searchsorted(keys, last, "right")) for keys in (ours, theirs))
        if n == m and np.array_equal(ours[:n], theirs[:m]):
            yield slice(i, i + n), slice(j, j + m)
        else:
            _, x, y = np.intersect1d(ours[:n], theirs[:m], assume_unique=True, return_indices=True)
            if len(x):
                yield _run(i + x), _run(j + y)
        i, j = i + n, j + m


def dim_differences(where: str, a: Mapping[str, Column], b: Mapping[str, Column]) -> Iterator[Difference]:
    """Sites of both that have rows, and vectors of other lengths."""
    for name, own in a.items():
        other = b.get(name)
        if other is not None and own.shape[0] and other.shape[0] and own.shape[-1] != other.shape[-1]:
            yield Difference(f"{where}.{name}, dim", str(own.shape[-1]), str(other.shape[-1]))


@dataclass(frozen=True)
class TokensFound:
    """How the tokens differ at which paired rows stand.

    Args:
        n_rows: rows that both have.
        n_parted: how many of them stand at another token.
        first: the first of these, (document, position).
        earliest: the one at the lowest position, and of several the first.
        values: the two tokens there.
    """

    n_rows: int
    n_parted: int = 0
    first: tuple[int, int] | None = None
    earliest: tuple[int, int] | None = None
    values: tuple[int, int] | None = None


def tokens_of(a: Rows, b: Rows) -> TokensFound:
    """Compares the tokens of all rows that both have."""
    n_rows = n_parted = 0
    first = earliest = values = None
    for x, y in paired(a, b, PAIRS):
        ours, theirs, ids = a.token_ids[x], b.token_ids[y], a.ids[x]
        n_rows += len(ids)
        at = np.flatnonzero(ours != theirs)
        n_parted += len(at)
        if not len(at):
            continue
        lowest = at[ids[at, 1].argmin()]
        if first is None:
            first = row_id(ids[at[0]])
        if earliest is None or ids[lowest, 1] < earliest[1]:
            earliest, values = row_id(ids[lowest]), (int(ours[lowest]), int(theirs[lowest]))
    return TokensFound(n_rows, n_parted, first, earliest, values)


def row_id(pair: Integers) -> tuple[int, int]:
    """(document, position) as plain numbers."""
    return int(pair[0]), int(pair[1])


def _keys(ids: Integers) -> Integers:
    found: Integers = ids[:, 0] * MAX_POSITION + ids[:, 1]
    return found


def _run(at: Integers) -> At:
    first, last = int(at[0]), int(at[-1])
    return slice(first, last + 1) if last - first + 1 == len(at) else at
