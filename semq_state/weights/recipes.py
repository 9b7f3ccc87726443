"""The methods as compositions of parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

FITS = ("minmax", "shrunk", "neuqi", "norm")
"""Ways to choose a grid, by their names in `quantizers`."""


@dataclass(frozen=True)
class Recipe:
    """How a matrix is quantised.

    Args:
        method: a name for people and files.
        fit: how each group's scale and zero point are chosen, of `FITS`.
        compensated: round column by column, each error made good by the columns that follow; else to the nearest.
        ordered: compensated from the column with the largest inputs to that with the smallest.
        share: of the values that are kept exactly.
        smoothed: move outliers of the inputs into the weights, with a strength searched for each layer.
        frequencies: low frequencies of a row that are kept apart, on average.
    """

    method: str
    fit: str = "minmax"
    compensated: bool = True
    ordered: bool = False
    share: float = 0.0
    smoothed: bool = False
    frequencies: int = 0

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"`fit` must be one of {FITS}, got {self.fit!r}")
        if not 0 <= self.share < 0.5:
            raise ValueError(f"`share` must be from 0 to below 0.5, got {self.share!r}")
        if self.frequencies < 0:
            raise ValueError(f"`frequencies` is a count, got {self.frequencies!r}")

    @property
    def needs_text(self) -> bool:
        """Whether it is nothing without the inputs of the layers."""
        return self.compensated or self.smoothed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


METHODS = {
    "rtn": Recipe("rtn", compensated=False),
    "gptq": Recipe("gptq"),
    "septq": Recipe("septq", fit="shrunk", share=0.01),
    "neuqi": Recipe("neuqi", fit="neuqi", ordered=True),
    "specquant": Recipe("specquant", smoothed=True, frequencies=16),
    "semq": Recipe("semq", fit="norm"),
}
"""What `sq.quantize(method=…)` takes: round-to-nearest; GPTQ (arXiv 2210.17323); SEPTQ (2604.10091); NeUQI
(2505.17595) with compensated rounding; SpecQuant (2511.11663); SEMQ's norm grid with compensated rounding."""


def recipe_of(method: str | Recipe, *, text: bool) -> Recipe:
    """The recipe of a method; without text, what is left of one that can do without.

    Raises:
        ValueError: no such method.
    """
    if isinstance(method, Recipe):
        return method
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, or a Recipe, got {method!r:.80}")
    recipe = METHODS[method]
    # NeUQI's grid needs no data; only its rounding does.
    return replace(recipe, compensated=False) if not text and method in ("neuqi", "semq") else recipe
