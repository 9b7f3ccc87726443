"""Documents cut into what a model can read at once, and put into batches with little padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from semq_state.recording.documents import Tokens


@dataclass(frozen=True, eq=False)
class Window:
    """A run of a document's tokens that is read at once, from a fresh start.

    Args:
        document: its number.
        begin: position in it of the first token.
        tokens: `(n,)` int64, at least one.
        ends: whether it is the document's last.
        n_read: documents read so far, this one included.
        dataset: the digest of these.
    """

    document: int
    begin: int
    tokens: Tokens
    ends: bool
    n_read: int
    dataset: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def next(self) -> tuple[int, int]:
        """Document and position that follow it."""
        return (self.document + 1, 0) if self.ends else (self.document, self.begin + len(self))


def windows(
    documents: Iterable[tuple[int, Tokens, int, str]], max_tokens: int, begin: tuple[int, int]
) -> Iterator[Window]:
    """Windows of `max_tokens` tokens at most, from a document and position on. Empty documents have none."""
    for number, tokens, n_read, dataset in documents:
        first = begin[1] if number == begin[0] else 0
        for start in range(first, len(tokens), max_tokens):
            part = tokens[start : start + max_tokens]
            yield Window(number, start, part, start + len(part) == len(tokens), n_read, dataset)


def blocks(stream: Iterable[Window], n_tokens: int, *, whole: bool) -> Iterator[list[Window]]:
    """Consecutive windows of about `n_tokens` tokens together; with `whole` never a part of a document."""
    held: list[Window] = []
    n = 0
    for window in stream:
        held.append(window)
        n += len(window)
        if n >= n_tokens and (window.ends or not whole):
            yield held
            held, n = [], 0
    if held:
        yield held


def batches(block: Sequence[Window], batch_tokens: int, *, padded: bool = True) -> Iterator[list[Window]]:
    """The windows of a block, longest first, as many at once as fit into `batch_tokens` with their padding.

    Args:
        block: the windows.
        batch_tokens: tokens of a batch, padding included; a longer window is alone.
        padded: whether windows of different lengths may be together.
    """
    held: list[Window] = []
    for window in sorted(block, key=lambda each: -len(each)):
        fits = not held or (
            len(held[0]) * (len(held) + 1) <= batch_tokens and (padded or len(held[0]) == len(window))
        )
        if not fits:
            yield held
            held = []
        held.append(window)
    if held:
        yield held


def joined(batch: Sequence[Window], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and positions `(batch, seq)`, padded at the end, and documents `(batch,)`; positions of padding
    are -1."""
    seq = max(map(len, batch))
    ids = torch.full((len(batch), seq), pad, dtype=torch.int64)
    positions = torch.full((len(batch), seq), -1, dtype=torch.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window)] = window.tokens
        positions[row, : len(window)] = torch.arange(len(window)) + window.begin
    return ids, positions, torch.tensor([window.document for window in batch])
