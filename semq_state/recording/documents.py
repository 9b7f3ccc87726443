"""What a dataset holds: texts or tokens, told apart, tokenised, and known again by a digest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch

from semq_state.errors import IncompleteStateError, UnsupportedOperationError

Tokens = torch.Tensor
"""The token ids of one document, `(n,)` int64."""

_GROUP = 64
"""Texts that are given to a tokenizer at once."""

_TEXTS, _MOST_ID = ("text", "content", "document"), 1 << 31


class Documents:
    """The documents of a dataset, in order, and a digest of those that were read.

    Args:
        dataset: texts; token ids, `(n,)` or `(batch, n)`; tables with `input_ids` and `attention_mask`, as a
            tokenizer gives them, or with a `text`.
        tokenizer: for texts.

    Attributes:
        n_read: documents read so far.
        digest: of these, in their order; empty before the first.
        begun: the digest of those that were only read for it.
    """

    def __init__(self, dataset: Iterable[Any], tokenizer: Any = None) -> None:
        if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
            raise UnsupportedOperationError(
                "record, dataset",
                expected="an iterable of texts or of token ids",
                found=type(dataset).__name__,
                do="put one text into a list",
            )
        self._dataset = dataset
        self._tokenizer = tokenizer
        self.n_read = self._n_items = self._n_listed = 0
        self.digest = self.begun = ""

    @property
    def n_all(self) -> int | None:
        """Documents in all, judged by the items so far; None where the dataset does not say how many it has."""
        if not isinstance(self._dataset, Sized) or not self._n_items:
            return None
        return round(len(self._dataset) * self._n_listed / self._n_items)

    def first(self) -> Tokens | None:
        """Tokens of the first document that has any; None where none has. A dataset that can be read only once
        still gives all of it to `read`."""
        source, taken = iter(self._dataset), list[Any]()
        found = None
        for i, item in enumerate(source):
            taken.append(item)
            of_item = self._of_item(i, item)
            tokens = self._tokenised([of_item]) if isinstance(of_item, str) else list(of_item)
            found = next((each for each in tokens if len(each)), None)
            if found is not None:
                break
        if source is self._dataset:
            self._dataset = itertools.chain(taken, source)
        return found

    def read(self, begin: int = 0) -> Iterator[tuple[int, Tokens, int, str]]:
        """Number and tokens of each document, and how many were read with it, under which digest.

        Args:
            begin: so many documents are only read for the digest.

        Raises:
            UnsupportedOperationError: there are fewer, or texts and no tokenizer.
            IncompleteStateError: an item is neither text nor token ids.
        """
        items = self._items()
        for _ in range(begin):
            try:
                self._note(next(items))
            except StopIteration:
                raise UnsupportedOperationError(
                    "record, dataset",
                    expected=f"the dataset with which the record was begun, of {begin} documents or more",
                    found=f"{self.n_read}",
                    do="give that one, or choose another folder",
                ) from None
        self.begun = self.digest
        waiting: list[Any] = []
        for item in items:
            waiting.append(item)
            if len(waiting) == _GROUP or not isinstance(item, str):
                yield from self._read(waiting)
                waiting = []
        yield from self._read(waiting)

    def _items(self) -> Iterator[Any]:
        """Texts, and rows of token ids."""
        self._n_items = self._n_listed = self.n_read = 0
        self.digest = ""
        for i, item in enumerate(self._dataset):
            self._n_items += 1
            of_item = self._of_item(i, item)
            for document in [of_item] if isinstance(of_item, str) else of_item:
                self._n_listed += 1
                yield document

    def _of_item(self, i: int, item: Any) -> str | Iterator[Tokens]:
        if isinstance(item, Mapping) and "input_ids" not in item:
            texts = [item[name] for name in _TEXTS if isinstance(item.get(name), str)]
            if not texts:
                raise _wrong(i, f"a table with input_ids or {' or '.join(_TEXTS)}", ", ".join(map(str, item)))
            return str(texts[0])
        return item if isinstance(item, str) else _rows(i, item)

    def _read(self, items: Sequence[Any]) -> Iterator[tuple[int, Tokens, int, str]]:
        texts = [item for item in items if isinstance(item, str)]
        ids = iter(self._tokenised(texts) if texts else ())
        for item in items:
            tokens = next(ids) if isinstance(item, str) else item
            self._note(item)
            yield self.n_read - 1, tokens, self.n_read, self.digest

    def _tokenised(self, texts: Sequence[str]) -> list[Tokens]:
        if self._tokenizer is None:
            raise UnsupportedOperationError(
                "record, tokenizer", expected="one, for texts", found="none", do="pass tokenizer=, or token ids"
            )
        found = self._tokenizer(list(texts), verbose=False)["input_ids"]
        return [torch.tensor(ids, dtype=torch.int64) for ids in found]

    def _note(self, item: Any) -> None:
        kind, data = (b"text", item.encode()) if isinstance(item, str) else (b"ids", _bytes(item))
        whole = hashlib.sha256(self.digest.encode() + kind + hashlib.sha256(data).digest())
        self.digest = f"sha256:{whole.hexdigest()}"
        self.n_read += 1


def _rows(i: int, item: Any) -> Iterator[Tokens]:
    """The documents of an item that is no text."""
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    ids = _integers(i, item["input_ids"] if isinstance(item, Mapping) else item)
    rows = ids if ids.ndim == 2 else ids[None]
    if mask is None:
        yield from rows
        return
    kept = _integers(i, mask)
    kept = (kept if kept.ndim == 2 else kept[None]) != 0
    if kept.shape != rows.shape:
        raise _wrong(i, f"an attention_mask of shape {tuple(rows.shape)}", str(tuple(kept.shape)))
    yield from (row[own] for row, own in zip(rows, kept, strict=True))


def _integers(i: int, value: Any) -> torch.Tensor:
    try:
        found = torch.as_tensor(np.asarray(value) if not isinstance(value, torch.Tensor) else value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(i, "a text, or token ids (n,) or (batch, n)", type(value).__name__) from None
    empty = not found.numel()
    if (found.is_floating_point() or found.is_complex()) and not empty:
        raise _wrong(i, "token ids, which are whole numbers", str(found.dtype))
    if found.ndim not in (1, 2):
        raise _wrong(i, "token ids (n,) or (batch, n)", str(tuple(found.shape)))
    found = found.to(torch.int64)
    if not empty and not 0 <= int(found.min()) <= int(found.max()) < _MOST_ID:
        raise _wrong(i, "token ids of 0 or more", f"{int(found.min())} to {int(found.max())}")
    return found


def _bytes(ids: Tokens) -> bytes:
    return ids.numpy().astype("<i8").tobytes()


def _wrong(i: int, expected: str, found: str) -> IncompleteStateError:
    return IncompleteStateError(
        f"record, dataset, item {i}", expected=expected, found=f"{found:.120}", do="leave it out or convert it"
    )
