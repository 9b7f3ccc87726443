"""Rows of a batch that have ended: followed while `generate` runs, and told to a `generate` that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


class FollowedCriteria(StoppingCriteriaList):  # type: ignore[misc]
    """A run's own stopping criteria, asked as ever; each answer is one finished token.

    Args:
        criteria: the run's criteria; those of a capture around this one go on telling theirs.
        tell: called with the tokens so far and the rows that have ended for good. A row whose text came to its
            end is one, and so is any row that was stopped while others went on. Rows that were stopped together
            by a length, a time or a rule of the caller's own can go on later.
    """

    def __init__(self, criteria: Any, tell: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        list.__init__(self, criteria)
        self._tells = (*getattr(criteria, "_tells", ()), tell)
        self._stopped: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ended = done if self._stopped is None else self._stopped
        for criterion in self:
            answer = criterion(input_ids, scores, **kwargs)
            done = done | answer
            if isinstance(criterion, (EosTokenCriteria, StopStringCriteria, AlreadyEnded)):
                ended = ended | answer
        self._stopped = done if self._stopped is None else self._stopped | done
        ended = torch.where(self._stopped.all(), ended, self._stopped)
        for tell in self._tells:
            tell(input_ids, ended)
        return done


class AlreadyEnded(StoppingCriteria):  # type: ignore[misc]
    """Keeps the rows ended that had ended before an interruption."""

    def __init__(self, ended: torch.Tensor) -> None:
        self.ended = ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.ended


class EndedRowsPadding(LogitsProcessor):  # type: ignore[misc]
    """Gives ended rows their padding in the first step, in which `generate` does not know yet that they ended.

    The draw for these rows takes place all the same, so the random stream of the others is as it was.
    """

    def __init__(self, ended: torch.Tensor, config: Any) -> None:
        self._ended = ended
        self._pad: Any = getattr(config, "_pad_token_tensor", None)
        # Without an end token rows end by other criteria, and `generate` does not pad them.
        self._pads = self._pad is not None and getattr(config, "_eos_token_tensor", None) is not None
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._is_first or not self._pads:
            return scores
        self._is_first = False
        padded = scores.clone()
        padded[self._ended] = float("-inf")
        padded[self._ended, self._pad.item()] = 0.0
        return padded
