"""An answer of an audit, with its named reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["equal", "within", "different", "not evaluated"]


@dataclass(frozen=True)
class Verdict:
    """An answer.

    Args:
        outcome: `equal` (bit for bit), `within` (a floor's noise), `different`, or `not evaluated`.
        reasons: what speaks against a better outcome, each a name and its numbers, the first difference first;
            empty for `equal`.
    """

    outcome: Outcome
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it holds. What was not evaluated does not."""
        return self.outcome in ("equal", "within")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed, "outcome": self.outcome, "reasons": list(self.reasons)}
