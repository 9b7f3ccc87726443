"""What a kind of cache promises: the object that a model is handed, taken apart into layers and put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from semq_state.caches.base import Mark
from semq_state.snapshot import CacheState

DeviceOf = Callable[[int], torch.device]
"""Layer number to the device on which the layer computes."""


class AbstractKind(ABC):
    """One class of caches.

    Attributes:
        id: the kind's name in files, a promise that later versions rebuild it.
        path: the exact `module.Class` of the live cache; empty where it is a plain list of tensors.
        model_type: the architecture whose plain lists these are.
    """

    id: ClassVar[str]
    path: ClassVar[str] = ""
    model_type: ClassVar[str] = ""

    @abstractmethod
    def mark(self, cache: Any) -> Mark:
        """Remembers where `cache` stands now."""

    @abstractmethod
    def dump(self, cache: Any, mark: Mark) -> CacheState:
        """The state of `cache` when `mark` was made. Shares memory.

        Raises:
            IncompleteStateError: the cache has lost that state since.
        """

    @abstractmethod
    def rebuild(self, state: CacheState, device_of: DeviceOf) -> Any:
        """The inverse of `dump`: a new cache."""

    @abstractmethod
    def check(self, state: CacheState, batch_size: int, n_cached: int, where: str) -> None:
        """Refuses a state that `rebuild` could not make a working cache from.

        Raises:
            IncompleteStateError: something is missing, or parts contradict each other.
        """

    def n_cached(self, state: CacheState) -> int | None:
        """How many tokens of each row the cache has seen; None where nothing in it counts them."""
        return None
