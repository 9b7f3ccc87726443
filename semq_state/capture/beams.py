"""What a beam search knows between two tokens, as its own methods tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from semq_state.generation import seams


class BeamWatch:
    """Replacements for the steps of a beam search; each calls the original and takes notes.

    Args:
        originals: the seams' own methods.
        tell: called at the end of each turn of the search, with the running sequences so far,
            `(batch * num_beams, seq)`.
    """

    def __init__(self, originals: dict[str, Callable[..., Any]], tell: Callable[[torch.Tensor], None]) -> None:
        self.search: dict[str, torch.Tensor] = {}
        self._originals = originals
        self._tell = tell
        self._notes: dict[str, torch.Tensor] = {}
        self._n_tokens = 0

    def replacements(self) -> dict[str, Callable[..., Any]]:
        return {
            seams.RUNNING_BEAMS: self._running,
            seams.FINISHED_BEAMS: self._finished,
            seams.BEAMS_LEFT: self._left,
        }

    def _running(self, *args: Any, **kwargs: Any) -> Any:
        result = self._originals[seams.RUNNING_BEAMS](*args, **kwargs)
        sequences, scores, indices = result
        self._notes = {"running_sequences": sequences, "running_scores": scores, "running_beam_indices": indices}
        return result

    def _finished(self, *args: Any, **kwargs: Any) -> Any:
        result = self._originals[seams.FINISHED_BEAMS](*args, **kwargs)
        names = ("sequences", "scores", "beam_indices", "finished")
        self._notes |= dict(zip(names, result, strict=True))
        self._n_tokens = int(kwargs["cur_len"]) + 1
        return result

    def _left(self, can_improve: torch.Tensor, finished: torch.Tensor, hits: torch.Tensor, early: Any) -> Any:
        left = self._originals[seams.BEAMS_LEFT](can_improve, finished, hits, early)
        self.search = {**self._notes, "can_improve": can_improve, "is_done": ~left}
        running = self._notes["running_sequences"][:, :, : self._n_tokens]
        self._tell(running.reshape(-1, self._n_tokens))
        return left
