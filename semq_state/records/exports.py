"""A record as other things: a `datasets` table, an index, a `.semq` file; block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semq_state.codecs.semq_rules import SEMQ_RANGE, Quant
from semq_state.errors import SemqStateError, UnsupportedOperationError
from semq_state.search import SymbolIndex, write_semq_index
from semq_state.snapshot.hidden import keys

if TYPE_CHECKING:
    import datasets

    from semq_state.records.record import Record

COLUMNS = ("document", "position", "token_id")

_BLOCK_ROWS = 8192
_EXAMPLES = 1024


def dataset_of(record: Record, sites: Sequence[str]) -> datasets.Dataset:
    """See `Record.dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedOperationError(
            "dataset",
            expected="the `datasets` library",
            found="none",
            do="pip install 'semq-state[datasets]'",
        ) from error
    if taken := sorted(set(sites) & set(COLUMNS)):
        raise UnsupportedOperationError(
            "dataset", expected="sites with names of their own", found=", ".join(taken), do="leave them out"
        )
    features = {name: datasets.Value("int64") for name in COLUMNS}
    features |= {name: datasets.Sequence(datasets.Value("float32"), length=record.dim(name)) for name in sites}
    made: datasets.Dataset = datasets.Dataset.from_generator(
        _examples,
        features=datasets.Features(features),
        gen_kwargs={
            "folder": str(record.folder.resolve()),
            "record_id": record.record_id,
            "sites": tuple(sites),
        },
    )
    return made


def _examples(folder: str, record_id: str, sites: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Row by row; what it is called with decides which earlier result `datasets` takes from its cache."""
    from semq_state.records.record import open_record

    record = open_record(Path(folder))
    record.require(record_id)
    for block in record.blocks(_EXAMPLES, sites=sites):
        rows, token_ids = block.rows.tolist(), block.token_ids.tolist()
        states = {name: t.float().numpy() for name, t in block.states.items()}
        for i, (document, position) in enumerate(rows):
            yield {
                "document": document,
                "position": position,
                "token_id": token_ids[i],
                **{name: values[i] for name, values in states.items()},
            }


def index_of(record: Record, site: str, operator: str, parameter: int | None, c: float | None) -> SymbolIndex:
    """See `Record.index`."""
    index = SymbolIndex(record.dim(site), bins=parameter, c=c, operator=operator)
    for block in record.blocks(_BLOCK_ROWS, sites=(site,)):
        try:
            index.add(block.states[site], keys(block.rows).numpy())
        except SemqStateError as error:
            first, last = ((*row,) for row in block.rows[[0, -1]].tolist())
            raise UnsupportedOperationError(
                f"{site}, of (document, position) {first} to {last}: {error.where}",
                expected=error.expected,
                found=error.found,
                do=error.do,
            ) from error
    return index


def write_semq_of(
    record: Record,
    path: str | os.PathLike[str],
    site: str,
    operator: str,
    parameter: int | None,
    c: float | None,
) -> None:
    """See `Record.semq`."""
    # That file has no place for another range.
    own = SEMQ_RANGE if operator == Quant.name and c is None else c
    write_semq_index(index_of(record, site, operator, parameter, own), path)
