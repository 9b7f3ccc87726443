"""How far a recording is: for a callback, or as a bar for a person who watches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(frozen=True)
class RecordProgress:
    """What was done so far.

    Args:
        n_documents: documents of which every row was computed, those of an earlier run included.
        n_all: in all, where the dataset says; None where it does not.
        n_tokens: tokens that this run has read.
        n_bytes: on the disk so far, those of an earlier run included; what waits to be written is estimated.
        seconds: of this run.
    """

    n_documents: int
    n_all: int | None
    n_tokens: int
    n_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def estimated_bytes(self) -> int | None:
        """What the rows will take in the end, if documents to come are like those before; None while unknown."""
        if self.n_all is None or not self.n_documents:
            return None
        return round(self.n_bytes * self.n_all / self.n_documents)


Tell = Callable[[RecordProgress], None]


class Watch:
    """Counts, and tells."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._n_tokens = 0
        self._began = time.monotonic()

    def advance(self, n_documents: int, n_all: int | None, n_tokens: int, n_bytes: int) -> None:
        """Another piece was read: documents so far and in all, its tokens, and bytes so far."""
        self._n_tokens += n_tokens
        seconds = time.monotonic() - self._began
        self._tell(RecordProgress(n_documents, n_all, self._n_tokens, n_bytes, seconds))


@contextlib.contextmanager
def told(progress: Tell | bool | None) -> Iterator[Tell]:
    """The caller's callback; a bar where there is none and somebody watches."""
    console = Console(stderr=True)
    if callable(progress):
        yield progress
    elif progress is False or not (progress or console.is_terminal):
        yield lambda state: None
    else:
        with _bar(console) as bar:
            task = bar.add_task("recording", total=None, words="")
            yield lambda state: bar.update(
                task, completed=state.n_documents, total=state.n_all, words=_words(state)
            )


def _bar(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("documents, {task.fields[words]}"))
    return Progress(
        TextColumn("{task.description}"), *columns, TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip


def _words(state: RecordProgress) -> str:
    size = decimal(state.n_bytes)
    expected = "" if state.estimated_bytes is None else f" of about {decimal(state.estimated_bytes)}"
    return f"{state.tokens_per_second:,.0f} tokens/s, {size}{expected}"
