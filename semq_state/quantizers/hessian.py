"""The Hessian of a layer's squared error, `X'X` over its inputs, and the factor that compensation needs."""

from __future__ import annotations

import torch

from semq_state.errors import QuantizationError

DAMPING = 0.01
"""Added to the diagonal, in parts of its mean."""

_STRONGER = (1.0, 10.0, 100.0)  # times `DAMPING`, tried in turn
_AT_ONCE = 1 << 13


def hessian(inputs: torch.Tensor) -> torch.Tensor:
    """`2/n X'X` of inputs `(n, dim)`, float32 `(dim, dim)`."""
    n, dim = inputs.shape
    total = torch.zeros(dim, dim, dtype=torch.float32, device=inputs.device)
    for start in range(0, n, _AT_ONCE):
        wide = inputs[start : start + _AT_ONCE].float()
        total.addmm_(wide.T, wide)
    return total.mul_(2 / max(n, 1))


def check(found: torch.Tensor, where: str) -> None:
    """Refuses a Hessian that no factor can be made of.

    Raises:
        QuantizationError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(found).all()):
        raise QuantizationError(
            where,
            expected="finite inputs while the calibration text is read",
            found="NaN or infinity",
            do="load the model in bfloat16 or float32, or give another text",
        )


def dead(found: torch.Tensor) -> torch.Tensor:
    """Columns that no input ever reached, `(dim,)` bool."""
    return found.diagonal() == 0


def factor(found: torch.Tensor, where: str) -> torch.Tensor:
    """Upper triangular `U` with `U'U` the inverse of the damped Hessian (GPTQ, arXiv 2210.17323, section 3.3).

    With `H = R R'`, `R` upper triangular, `U` is the inverse of `R`: one factorisation, and no inverse of `H`.

    Args:
        found: `(dim, dim)`; dead columns get 1 on the diagonal.
        where: the layer, for messages.

    Returns:
        float32 `(dim, dim)`.

    Raises:
        QuantizationError: it is singular even when damped a hundred times as much as usual.
    """
    wide = found.double()
    diagonal = wide.diagonal()
    diagonal[dead(found)] = 1
    mean = float(diagonal.mean())
    eye = torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    for stronger in _STRONGER:
        damped = wide + eye * (DAMPING * stronger * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            made: torch.Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
            return made.float()
    raise QuantizationError(
        where,
        expected="a Hessian that can be inverted once damped",
        found="a singular one",
        do="calibrate on more text",
    )
