"""`open_record`: hidden states on disk, read without the model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state.errors import IntegrityError, SemqStateError, UnsupportedOperationError
from semq_state.files import Progress
from semq_state.provenance import Provenance
from semq_state.records import checking, exports, shuffling
from semq_state.records.column import Column
from semq_state.records.description import Description, read_description
from semq_state.records.gathering import Block, Gathered, dtypes_of, rows_at
from semq_state.records.journal import Entries, key, read_journal
from semq_state.records.layout import Ints
from semq_state.records.plan import Plan
from semq_state.records.shards import Shards, floats_of
from semq_state.search import SymbolIndex
from semq_state.snapshot import HiddenRows

if TYPE_CHECKING:
    import datasets


def open_record(folder: str | os.PathLike[str]) -> Record:
    """Opens a record; also one that is being written or whose writer was ended: its whole shards are there.

    Reads two small files and no shard.

    Args:
        folder: what `record` wrote.

    Raises:
        StoreError: there is no record.
        FormatError, IntegrityError: it is damaged, or a newer one.

    Example:
        >>> record = sq.open_record("states")  # doctest: +SKIP
        >>> record["hidden_states.12"][:10]
    """
    path = Path(folder)
    description = read_description(path)
    return Record(path, description, read_journal(path, description))


@final
class Record:
    """Hidden states on disk: rows, each with an id, (document, position), in increasing order, and states of sites.

    Nothing is read until it is asked for. Plain shards (`raw`) are read in place, without comparing their digests:
    `verify` does that. Coded shards are decoded and checked whole, and the last two are kept. Row ids are always
    checked. What is asked for is held in memory, so walk over large records with `blocks`.

    Args:
        folder: the record.
        description: what it is of.
        entries: what its journal holds.
    """

    def __init__(self, folder: Path, description: Description, entries: Entries) -> None:
        self.folder = folder
        self.plan: Plan = description.plan
        self.provenance: Provenance = description.provenance
        self._description, self._entries = description, entries
        self._shards = Shards(folder, description.plan, entries.shards)

    def __len__(self) -> int:
        return self._shards.n_rows

    def __repr__(self) -> str:
        sites = self.sites if len(self.sites) < 4 else (*self.sites[:3], "…")
        size = f"{len(self)} rows of {self.n_documents} documents, {len(self._shards)} shards, {self.n_bytes} bytes"
        ended = "complete" if self.complete else "not complete"
        return f"Record({str(self.folder)!r}, {size}, {', '.join(sites)}, {ended})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped files have no place in what is sent to another process.
        return Record, (self.folder, self._description, self._entries)

    @property
    def complete(self) -> bool:
        """Whether its writer said that nothing more will come."""
        return self._entries.complete is not None

    @cached_property
    def record_id(self) -> str:
        """`sha256:…` over plan, model and the states of all shards so far; however often it was interrupted."""
        return self._description.record_id([shard.state_id for shard in self._entries.shards])

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return self.plan.states

    @property
    def n_documents(self) -> int:
        """How many documents were read; while it is not complete, up to the last that has a row."""
        if self._entries.complete:
            return self._entries.complete.n_documents
        return self._entries.shards[-1].last[0] + 1 if self._entries.shards else 0

    @property
    def n_bytes(self) -> int:
        """Size of all shards' files, as they were written."""
        return sum(shard.n_bytes for shard in self._entries.shards)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files of its shards, each a snapshot that `load`, `verify` and `inspect` take."""
        return tuple(self.folder / shard.name for shard in self._entries.shards)

    @property
    def ids(self) -> Ints:
        """Document and position of each row, `(n, 2)`; read once."""
        return self._ids[0]

    @property
    def token_ids(self) -> Ints:
        """The token at which each row stands, `(n,)`; -1 where it is pooled or has no id; read once."""
        return self._ids[1]

    def dim(self, site: str) -> int:
        """Coordinates of a state of a site.

        Raises:
            UnsupportedOperationError: there is no such site, or no row yet.
        """
        return self[site].shape[1]

    def dtype(self, site: str) -> torch.dtype:
        """Dtype of the states of a site; errors as for `dim`."""
        return self[site].dtype

    def __getitem__(self, site: str) -> Column:
        """The states of a site as a matrix that is read where it is asked.

        Raises:
            UnsupportedOperationError: there is no such site; the message names those that are like it.
        """
        return Column(self._shards, self._sites((site,))[0])

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        """Names of the sites."""
        return iter(self.sites)

    def of(self, document: int) -> HiddenRows:
        """The rows of one document, in order.

        Raises:
            UnsupportedOperationError: it has none; the message says which have.
        """
        numbers = self._numbers_of(document)
        if not len(numbers):
            raise UnsupportedOperationError(
                f"document {document!r:.80}",
                expected=self._documents(),
                found="no rows",
                do="name one that has some",
            )
        return self._hidden(rows_at(self._shards, self.sites, numbers))

    def at(self, document: int, position: int) -> HiddenRows:
        """The row of one token.

        Raises:
            UnsupportedOperationError: there is none; the message says which positions the document has.
        """
        found = self.of(document)
        at = (found.rows[:, 1] == position).nonzero().flatten()
        if not len(at) or isinstance(position, bool):
            first, last = found.rows[[0, -1], 1].tolist()
            raise UnsupportedOperationError(
                f"document {document}, position {position!r:.80}",
                expected=f"one of its {len(found)} rows, at positions {first} to {last}",
                found="none there",
                do="name one that is there: record.of(document).rows lists them",
            )
        i = int(at[0])
        return HiddenRows(
            found.rows[i : i + 1],
            found.token_ids[i : i + 1],
            {name: t[i : i + 1].clone() for name, t in found.states.items()},
            found.tokens,
            found.pool,
        )

    def rows(self, ids: Sequence[Sequence[int]] | NDArray[Any] | torch.Tensor) -> HiddenRows:
        """Rows by document and position, in the order asked.

        Args:
            ids: `(m, 2)`; one may be named more than once.

        Raises:
            UnsupportedOperationError: one of them is not there; the message names the first.
        """
        wanted = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if wanted.size == 0:
            wanted = np.empty((0, 2), np.int64)
        if wanted.ndim != 2 or wanted.shape[1] != 2 or wanted.dtype.kind not in "iu":
            raise UnsupportedOperationError(
                "rows", expected="(document, position) pairs, (m, 2)", found=f"{ids!r:.80}", do="give whole numbers"
            )
        return self._hidden(rows_at(self._shards, self.sites, self._numbers(wanted.astype(np.int64))))

    def blocks(
        self, size: int = 8192, *, sites: Sequence[str] | None = None, seed: int | None = None
    ) -> Iterator[Block]:
        """All rows, `size` at a time, the last block shorter; never more than a few blocks or shards in memory.

        With a seed each row comes once, in an order that depends on the rows of each shard, `size` and the seed
        (and, should numpy change its generator, on its version). Plain shards: runs of up to 256 neighbouring rows
        are drawn from everywhere; as many as make four blocks are pooled, and blocks are drawn from the pool.
        Coded shards: four whole shards, drawn from all, make a pool, so each is decoded once.

        Args:
            size: rows of a block.
            sites: which sites; all by default.
            seed: draws the order; None keeps the rows in order.

        Raises:
            UnsupportedOperationError: no such site, or another argument is out of its limits.
            StoreError, FormatError, IntegrityError: when it comes to a shard that is missing, damaged or replaced.

        Example:
            >>> for block in record.blocks(4096, seed=0):  # doctest: +SKIP
            ...     train(block.states["hidden_states.12"])
        """
        if type(size) is not int or size < 1:
            raise UnsupportedOperationError(
                "size", expected="1 or more", found=f"{size!r:.80}", do="choose another"
            )
        chosen = self._sites(self.sites if sites is None else tuple(sites))
        if seed is None:
            return shuffling.ordered(self._shards, size, chosen)
        if type(seed) is not int or seed < 0:
            raise UnsupportedOperationError(
                "seed", expected="0 or more", found=f"{seed!r:.80}", do="choose another"
            )
        return shuffling.shuffled(self._shards, size, chosen, seed)

    def numpy(self, site: str) -> NDArray[Any]:
        """All states of a site, `(n, dim)`: without a copy and read-only where there is one plain shard.

        bfloat16 and the float8 dtypes, which numpy does not have, become float32.

        Raises:
            UnsupportedOperationError: there is no such site, or no row yet.
        """
        column = self[site]
        spec = self._shards.spec(site)
        kinds = {"F16": "f2", "F32": "f4", "F64": "f8"}
        if spec.dtype in kinds and len(self._shards) == 1 and self._shards.is_mapped(0):
            found: NDArray[Any] = self._shards.opened(0).states[site].view(f"<{kinds[spec.dtype]}")
            return found
        whole = (
            column[:] if spec.dtype in kinds else torch.cat([column[i : i + 65_536].float() for i in self._steps()])
        )
        return whole.numpy()

    def dataset(self, sites: Sequence[str] | None = None) -> datasets.Dataset:
        """The record as a `datasets` table: `document`, `position`, `token_id`, a list of float32 for each site.

        It is written to the cache folder of `datasets`, a block in memory at a time.

        Raises:
            UnsupportedOperationError: no such site; or it needs `pip install 'semq-state[datasets]'`.
        """
        return exports.dataset_of(self, self._sites(self.sites if sites is None else tuple(sites)))

    def index(
        self, site: str, *, operator: str = "quant", parameter: int | None = None, c: float | None = None
    ) -> SymbolIndex:
        """The states of a site as symbols, to search in; the id of a row is document * 2^32 + position.

        Args:
            site: the site.
            operator: `quant`, `phase` or `orbit`.
            parameter: its bins, sectors or scale.
            c: where the range of `quant` ends; see `SymbolIndex`.

        Raises:
            UnsupportedOperationError: no such site, or a row has NaN, infinity or only zeros.
        """
        return exports.index_of(self, self._sites((site,))[0], operator, parameter, c)

    def semq(
        self,
        path: str | os.PathLike[str],
        site: str,
        *,
        operator: str = "quant",
        parameter: int | None = None,
        c: float | None = None,
    ) -> None:
        """Writes the same as a `.semq` file, for which the range of `quant` is 2.0, SEMQ's own; norms are left out.

        Raises:
            UnsupportedOperationError: as `index`; or another range.
            StoreError: the folder or disk refused.
        """
        exports.write_semq_of(self, path, self._sites((site,))[0], operator, parameter, c)

    def verify(self, progress: Progress | None = None) -> dict[str, SemqStateError]:
        """Reads every shard and compares all digests, its identity with the journal's, and its rows.

        Args:
            progress: called with the bytes of files done and in all.

        Returns:
            File name to what is wrong with it, in the order of the journal; empty when all is whole.
        """
        return checking.failures_of(self.folder, self.plan, self._entries.shards, progress)

    def require(self, record_id: str) -> None:
        """Refuses to be another record.

        Raises:
            IntegrityError: its identity is not this one.
        """
        if self.record_id != record_id:
            raise IntegrityError(
                str(self.folder), expected=f"record {record_id:.80}", found=self.record_id, do="open it again"
            )

    @cached_property
    def _ids(self) -> tuple[Ints, Ints]:
        parts = [self._shards.ids(number) for number in range(len(self._shards))]
        if not parts:
            return np.empty((0, 2), np.int64), np.empty(0, np.int64)
        rows, token_ids = zip(*parts, strict=True)
        found = np.concatenate(rows).astype(np.int64), np.concatenate(token_ids).astype(np.int64)
        for each in found:
            each.flags.writeable = False
        return found

    @cached_property
    def _ends(self) -> tuple[Ints, Ints]:
        """Keys of the first and last row of each shard."""
        told = self._entries.shards
        return np.array([key(s.first) for s in told], np.int64), np.array([key(s.last) for s in told], np.int64)

    def _numbers_of(self, document: int) -> Ints:
        """Numbers of the rows of a document."""
        if type(document) is not int or not 0 <= document < 1 << 31:
            return np.empty(0, np.int64)
        low, high = key((document, 0)), key((document + 1, 0))
        firsts, lasts = self._ends
        held = range(int(np.searchsorted(lasts, low)), int(np.searchsorted(firsts, high)))
        parts = [np.empty(0, np.int64)]
        for number in held:
            start, stop = np.searchsorted(self._shards.keys(number), [low, high])
            parts.append(np.arange(start, stop, dtype=np.int64) + self._shards.starts[number])
        return np.concatenate(parts)

    def _numbers(self, ids: NDArray[np.int64]) -> Ints:
        """The number of each row."""
        inside = (ids >= 0).all(1) & (ids[:, 0] < 1 << 31) & (ids[:, 1] < 1 << 32)
        wanted = np.where(inside, (ids[:, 0] << 32) + ids[:, 1], -1)
        firsts, lasts = self._ends
        held = np.searchsorted(lasts, wanted)
        numbers = np.full(len(ids), -1, np.int64)
        for number in np.unique(held[held < len(self._shards)]):
            at = np.flatnonzero((held == number) & (wanted >= firsts[number]))
            if not len(at):
                continue
            keys = self._shards.keys(int(number))
            local = np.searchsorted(keys, wanted[at])
            is_there = keys[local] == wanted[at]
            numbers[at[is_there]] = local[is_there] + self._shards.starts[number]
        if (numbers < 0).any():
            document, position = ids[int(np.argmin(numbers))].tolist()
            raise UnsupportedOperationError(
                f"document {document}, position {position}",
                expected=self._documents(),
                found="no such row",
                do="name rows that are there: record.ids lists them",
            )
        return numbers

    def _documents(self) -> str:
        told = self._entries.shards
        if not told:
            return "rows, of which there are none yet"
        return f"a row of documents {told[0].first[0]} to {told[-1].last[0]}, as far as these have some"

    def _hidden(self, gathered: Gathered) -> HiddenRows:
        specs = dtypes_of(self._shards, self.sites) if len(self._shards) else {}
        states = {name: floats_of(bits, specs[name]) for name, bits in gathered.states.items()}
        return HiddenRows(
            torch.from_numpy(gathered.rows),
            torch.from_numpy(gathered.token_ids),
            states,
            self.plan.tokens,
            self.plan.pool,
        )

    def _sites(self, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in self.sites:
                near = difflib.get_close_matches(str(name), self.sites, 3, 0.4) or self.sites[:3]
                raise UnsupportedOperationError(
                    f"site {name!r:.80}",
                    expected=f"one of {len(self.sites)}",
                    found="none of this name",
                    do=f"did you mean {', '.join(near)}?",
                )
        return names

    def _steps(self) -> range:
        return range(0, len(self), 65_536)
