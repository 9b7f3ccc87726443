"""SEPTQ's mask: the few values whose rounding would cost most, chosen once over the whole matrix."""

from __future__ import annotations

import torch


def mask(values: torch.Tensor, rounded: torch.Tensor, cost: torch.Tensor | None, share: float) -> torch.Tensor:
    """The values to keep (SEPTQ, arXiv 2604.10091, step 1): the largest `(w - q)**2 / U_jj**2`.

    Args:
        values: `(rows, cols)`, before any of them is compensated.
        rounded: what rounding to the nearest level makes of them.
        cost: `(cols,)`, by which the squared error of each column counts: `1 / U_jj**2`; alike unless given.
        share: of the values, 0 to 1.

    Returns:
        `(rows, cols)` bool, `floor(share * numel)` of them set.
    """
    score = (values - rounded).square_()
    if cost is not None:
        score *= cost
    n = int(share * score.numel())
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=values.device)
    if n:
        chosen[score.flatten().topk(n, sorted=False).indices] = True
    return chosen.view_as(values)
