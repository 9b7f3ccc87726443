"""Work on all cores, in order, a few pieces at a time in memory; and its progress."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from semq_state import content
from semq_state.content import Bytes

Progress = Callable[[int, int], None]
"""Called with the raw bytes done so far and in all."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Job:
    """One section to write or read: tokens `start` to `stop` of `tensor`."""

    tensor: str
    section: str
    start: int
    stop: int


class Scratch:
    """Memory that each thread uses for one piece after the other, where nothing of a piece is kept.

    Fresh memory is handed out by the system page by page, which takes nearly as long as hashing what is in it.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def take(self, name: str, n_bytes: int) -> Bytes:
        """`n_bytes`, holding anything; the next call with that name from this thread gives them away again."""
        held: Bytes | None = getattr(self._own, name, None)
        if held is None or len(held) < n_bytes:
            held = np.empty(n_bytes, np.uint8)
            setattr(self._own, name, held)
        return held[:n_bytes]


def in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[tuple[_T, _R]]:
    """`work` on every item on all cores, results in order, only a few at a time in memory."""
    n_workers = content.n_workers()
    pending: deque[tuple[_T, Future[_R]]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > n_workers + 1:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, total)

    return advance
