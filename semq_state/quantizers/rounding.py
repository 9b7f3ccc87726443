"""Rounding to a grid column by column, each column's error made good by the columns that follow."""

from __future__ import annotations

import torch

from semq_state.quantizers.grid import Grid

_BLOCK = 128


def compensated(
    weights: torch.Tensor,
    grid: Grid,
    factor: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols of a matrix, with error compensation (GPTQ, arXiv 2210.17323, algorithm 1).

    `q` is the nearest level of the current value `w`; `w[:, j:] -= (w_j - q) / U_jj * U[j, j:]`. With `keep` the
    marked values are not rounded, and make no error (SEPTQ, arXiv 2604.10091, step 2).

    Args:
        weights: `(rows, cols)` float32; left as they are.
        grid: fixed before, of the columns in their own order.
        factor: `hessian.factor` of the Hessian, its columns in `order`.
        keep: `(rows, cols)` bool.
        order: columns in the order in which they are rounded; from the first to the last unless given.

    Returns:
        Symbols `(rows, cols)` uint8, and the values as they were when their turn came, float32, in which those of
        `keep` stand to be kept.
    """
    rows, cols = weights.shape
    order = torch.arange(cols, device=weights.device) if order is None else order
    # Columns as rows: each step reads and writes them whole.
    turned = weights.float().T[order].contiguous()
    kept = None if keep is None else keep.T[order]
    scale, zero = (t.float().T.contiguous() for t in (grid.scale, grid.zero))
    group_of = (order // grid.group).tolist()
    made = torch.empty(cols, rows, dtype=torch.uint8, device=weights.device)
    reciprocal = factor.diagonal().reciprocal().tolist()
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        block, within = turned[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, group = block[i], group_of[start + i]
            symbols = (column / scale[group]).add_(zero[group]).round_().clamp_(0, grid.highest)
            made[start + i] = symbols
            error = torch.sub(column, symbols.sub_(zero[group]).mul_(scale[group]), out=errors[i])
            error.mul_(reciprocal[start + i])
            if kept is not None:
                error.masked_fill_(kept[start + i], 0)
            if i + 1 < stop - start:
                block[i + 1 :].addr_(within[i, i + 1 :], error, alpha=-1)
        if stop < cols:
            turned[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(cols, device=order.device)
    return made[back].T.contiguous(), turned[back].T.contiguous()
