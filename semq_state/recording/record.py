"""`sq.record`: the hidden states of a dataset, streamed to disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from semq_state.errors import IncompleteStateError, UnsupportedOperationError
from semq_state.files.forms import Codec, check_codec
from semq_state.fingerprint import fingerprint
from semq_state.generation.seams import base_model
from semq_state.hidden import Collector, HiddenStates
from semq_state.recording.documents import Documents
from semq_state.recording.progress import Tell, Watch, told
from semq_state.recording.reader import Reader
from semq_state.recording.windows import Window, batches, blocks, joined, windows
from semq_state.records import Plan, Record, RecordWriter, open_record
from semq_state.snapshot import HiddenRows

_BLOCK_BATCHES = 8
"""Windows of about so many batches are sorted by length together."""

MAX_TOKENS = 1024
"""Read at once where the model has positions without end."""

_NAN = ("refuse", "keep")


def record(
    model: Any,
    dataset: Iterable[Any],
    into: str | os.PathLike[str],
    *,
    hidden_states: HiddenStates | None = None,
    tokenizer: Any = None,
    codec: Codec = "raw",
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    shard_bytes: int = 128 << 20,
    weights: str = "full",
    nan: str = "refuse",
    progress: Tell | bool | None = None,
) -> Record:
    """Runs a model over a dataset and writes hidden states to a folder, shard by shard, in bounded memory.

    Each row is known by (document, position): the document's number in the dataset, and the token's place in it.
    After a kill the same call goes on behind the last whole shard; no row is lost or doubled, and what comes out is
    what an undisturbed run would have given. Batches follow from the dataset and the arguments alone.

    Only the part of the model that the rows need is run: of a decoder no block behind the last one that is wanted,
    and no output embeddings; of an encoder-decoder the encoder.

    Args:
        model: any transformers model, in evaluation mode.
        dataset: texts; token ids, `(n,)` or `(batch, n)`; tables with `input_ids` and `attention_mask`, as a
            tokenizer gives them, or with a `text`, as a `datasets.Dataset` has them.
        into: the folder; made if it is not there.
        hidden_states: what to keep; the last hidden state of each token by default.
        tokenizer: for texts; its digest joins the provenance.
        codec: `raw` rows are memory-mapped when they are read; others (`exact`, `semq`, `rotated` …, see `save`)
            are smaller, and decoded shard by shard.
        max_tokens: tokens of a document that are read at once; longer documents are read in windows of so many,
            each from a fresh start. By default as many as the model has positions for, 1,024 where it does not say.
        batch_tokens: tokens of a batch, padding included.
        shard_bytes: size of the rows of a shard before coding; also what is held in memory.
        weights: as in `capture`.
        nan: `refuse` stops at a row with NaN or infinity, `keep` keeps it.
        progress: called with a `RecordProgress`; by default a bar with the rate and an estimate of the final size,
            where stderr is a terminal. False for none.

    Returns:
        The record, open for reading.

    Raises:
        UnsupportedOperationError: the folder holds another record, the dataset is another one than that with which
            it was begun, or an argument cannot be.
        IncompleteStateError: a module is not called once in each pass or gives no states, an item is neither text
            nor tokens, or a row has NaN.
        StoreError: the disk is full, or another process records into the folder.

        In every case the folder stays a record up to its last whole shard.

    Example:
        >>> rows = sq.record(model, texts, "states", hidden_states=sq.HiddenStates(layers=(0, 12, -1)),
        ...                  tokenizer=tokenizer)  # doctest: +SKIP
        >>> rows["hidden_states.12"][:1000].shape  # doctest: +SKIP
        torch.Size([1000, 576])
    """
    spec = HiddenStates() if hidden_states is None else hidden_states
    if nan not in _NAN:
        raise UnsupportedOperationError("record, nan", expected=f"one of {_NAN}", found=repr(nan), do="choose one")
    check_codec(codec)
    inner = base_model(model, generates=False)
    reader = Reader(inner, spec)
    longest = _positive("max_tokens", (reader.max_tokens or MAX_TOKENS) if max_tokens is None else max_tokens)
    plan = Plan(
        states=tuple(sorted(site.name for site in reader.sites)),
        stream=reader.stream,
        tokens=spec.word,
        pool=spec.pool or "",
        dtype="" if spec.dtype is None else str(spec.dtype).removeprefix("torch."),
        codec=codec if isinstance(codec, str) else f"{codec!r:.200}",
        max_tokens=longest,
        batch_tokens=_positive("batch_tokens", batch_tokens),
        shard_bytes=_positive("shard_bytes", shard_bytes),
    )
    documents = Documents(dataset, tokenizer)
    with reader.reading():
        bytes_per_token = _probed(reader, spec, documents, longest)
        origin = fingerprint(inner, tokenizer, weights=weights, adapters_of=model)
        with RecordWriter.open(into, plan, origin, codec=codec) as writer, told(progress) as tell:
            _record(reader, spec, documents, writer, plan, bytes_per_token, nan, tell)
    return open_record(into)


def _record(
    reader: Reader,
    spec: HiddenStates,
    documents: Documents,
    writer: RecordWriter,
    plan: Plan,
    bytes_per_token: int,
    nan: str,
    tell: Tell,
) -> None:
    begin, is_whole = writer.next, bool(spec.pool) or spec.needs_end
    n_block = _BLOCK_BATCHES * plan.batch_tokens
    if not is_whole:
        n_block = max(plan.batch_tokens, min(n_block, plan.shard_bytes // max(1, bytes_per_token)))
    watch, n_before, n_raw = Watch(tell), writer.n_bytes, 0
    held: list[HiddenRows] = []
    n_held = 0
    last: Window | None = None
    known = _known(documents, writer)
    for block in blocks(windows(known, plan.max_tokens, begin), n_block, whole=is_whole):
        rows = _read(reader, spec, block, plan.batch_tokens, nan)
        last = block[-1]
        held.append(rows)
        n_held += rows.n_bytes
        # What waits will be as small as what was written.
        shrinks = (writer.n_bytes - n_before) / n_raw if n_raw else 1.0
        n_bytes = writer.n_bytes + round(n_held * shrinks)
        watch.advance(last.next[0], documents.n_all, sum(map(len, block)), n_bytes)
        # Shards end where another piece of this size would be too much.
        if n_held + rows.n_bytes > plan.shard_bytes:
            writer.append(_joined(held), next=last.next, n_read=last.n_read, dataset=last.dataset)
            n_raw += n_held
            held, n_held = [], 0
    if held and last is not None:
        writer.append(_joined(held), next=last.next, n_read=last.n_read, dataset=last.dataset)
    if not writer.complete:
        writer.finish(documents.n_read)


def _known(documents: Documents, writer: RecordWriter) -> Iterator[tuple[int, torch.Tensor, int, str]]:
    """The documents behind those that the record has, which must be those with which it was begun.

    Raises:
        UnsupportedOperationError: they are not, or the record is complete and there are more.
    """
    begin = writer.next[0]
    is_checked = False
    for item in documents.read(begin):
        n_read, digest = item[2:]
        if not is_checked:
            _require_same(documents.begun if writer.n_read == begin else digest, writer)
            is_checked = True
        if writer.complete and n_read > (writer.n_documents or 0):
            raise UnsupportedOperationError(
                "record, dataset",
                expected=f"the {writer.n_documents} documents of the record, which is complete",
                found="more",
                do="record the others into another folder",
            )
        yield item
    if not is_checked:
        _require_same(documents.begun, writer)


def _require_same(digest: str, writer: RecordWriter) -> None:
    if writer.n_read and digest != writer.dataset:
        raise UnsupportedOperationError(
            "record, dataset",
            expected=f"the dataset with which it was begun, {writer.dataset:.24}… at {writer.n_read} documents",
            found=f"{digest:.24}…",
            do="give that one, in the same order, or choose another folder",
        )


def _read(reader: Reader, spec: HiddenStates, block: list[Window], batch_tokens: int, nan: str) -> HiddenRows:
    """The rows of a block of windows, on the CPU."""
    collector = Collector(spec, [site.name for site in reader.sites], device="cpu")
    for batch in batches(block, batch_tokens, padded=reader.pads):
        ids, positions, of = joined(batch, reader.pad)
        own = positions >= 0
        states = reader.states(ids, None if own.all() else own.to(torch.int64))
        collector.add(states, of, positions, ids)
    rows = collector.rows()
    if nan == "refuse":
        _check_finite(rows)
    return rows


def _probed(reader: Reader, spec: HiddenStates, documents: Documents, longest: int) -> int:
    """Bytes of a token's rows, by a pass over the first tokens of the dataset; 0 where it has none."""
    tokens = documents.first()
    if tokens is None:
        return 0
    states = reader.probe(tokens[:longest])
    return sum(t.shape[-1] * (spec.dtype or t.dtype).itemsize for t in states.values())


def _joined(held: list[HiddenRows]) -> HiddenRows:
    if len(held) == 1:
        return held[0]
    return dataclasses.replace(
        held[0],
        rows=torch.cat([each.rows for each in held]),
        token_ids=torch.cat([each.token_ids for each in held]),
        states={name: torch.cat([each.states[name] for each in held]) for name in held[0].states},
    )


def _check_finite(rows: HiddenRows) -> None:
    for name, tensor in rows.states.items():
        # A sum is finite only where all its terms are, and is much cheaper than a look at each.
        if torch.isfinite(tensor.sum(dtype=torch.float64)):
            continue
        odd = ~torch.isfinite(tensor).all(-1)
        if odd.any():
            document, position = rows.rows[int(odd.int().argmax())].tolist()
            raise IncompleteStateError(
                f"record, {name}, document {document}, position {position}",
                expected="finite states",
                found=f"NaN or infinity, in {int(odd.sum())} rows of this piece",
                do="leave the document out, or keep such rows with nan='keep'",
            )


def _positive(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise UnsupportedOperationError(
            f"record, {name}",
            expected="a whole number of 1 or more",
            found=repr(value),
            do=f"pass {name}=",
        )
    return value
