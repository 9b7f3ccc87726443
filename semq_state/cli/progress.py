"""Progress bars on stderr, so that stdout stays the command's answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def bytes_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for `sq.save`, `sq.load` and `sq.verify`: gives what they take as `progress`."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def steps_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several stages: gives what `sq.calibrate` takes as `progress`."""
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda words, done, total: bar.update(task, description=words, completed=done, total=total)


class TokensBar:
    """A bar over generated tokens, as a streamer for `generate`."""

    def __init__(self, n_tokens: int) -> None:
        self._bar = _bar(MofNCompleteColumn(), TextColumn("tokens"))
        self._task = self._bar.add_task("generating", total=n_tokens)
        self._is_prompt = True

    def __enter__(self) -> TokensBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._bar.advance(self._task)

    def end(self) -> None:
        pass


def _bar(*columns: Any) -> Progress:
    # A bar is for a person who watches; in a log it would be noise.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        console=(console := Console(stderr=True)),
        transient=True,
        disable=not console.is_terminal,
    )
