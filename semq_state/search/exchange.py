"""An index to SEMQ's `.semq` file and back: ids and symbols, without norms, which that file has no place for."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from semq_state.interchange import SemqFile, read_semq, write_semq
from semq_state.search.contents import Contents
from semq_state.search.ids import check_ids
from semq_state.search.index import SymbolIndex


def write_semq_index(
    index: SymbolIndex, path: str | os.PathLike[str], *, manifest: Mapping[str, str] | None = None
) -> SemqFile:
    """Writes the rows of an index to a `.semq` file; the norms are left out.

    Raises:
        UnsupportedOperationError: the range of `quant` is not SEMQ's own (`SymbolIndex(dim, c=2.0)`), or the
            manifest passes a limit.
        StoreError: the folder is missing or read-only, or the disk is full.
    """
    contents = index.contents()
    ids = contents.ids
    file = SemqFile(
        contents.operator,
        tuple(ids.tolist()) if ids.dtype == object else ids.astype(np.uint64),
        contents.packed,
        manifest or {},
    )
    write_semq(path, file)
    return file


def read_semq_index(path: str | os.PathLike[str]) -> SymbolIndex:
    """The index of a `.semq` file; all norms are 1.

    Raises:
        StoreError, FormatError, IntegrityError: as `read_semq`.
        UnsupportedOperationError: a number among the ids is above 2^63 - 1.
    """
    file = read_semq(path)
    ids = check_ids(file.ids)
    return SymbolIndex.of(Contents.ordered(file.operator, ids, np.ones(len(ids), np.float32), file.rows))
