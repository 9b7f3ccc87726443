"""One weight matrix quantised as a recipe says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from semq_state.quantizers import escapes, hessian, neuqi, rounding, smoothing, spectrum
from semq_state.quantizers import grid as grids
from semq_state.quantizers.activations import per_token
from semq_state.quantizers.grid import Grid
from semq_state.weights.matrix import QuantizedMatrix
from semq_state.weights.recipes import Recipe

_SAMPLE = 256  # inputs on which the strength of smoothing is searched
_FITS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "minmax": grids.minmax,
    "shrunk": grids.shrunk,
    "norm": grids.norm,
    "neuqi": neuqi.fit,
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer was given while the calibration text was read.

    Args:
        values: `(n, in_features)`.
        where: the layer, for messages.
    """

    values: torch.Tensor
    where: str

    @cached_property
    def hessian(self) -> torch.Tensor:
        """`2/n X'X`, float32.

        Raises:
            QuantizationError: an input is NaN or infinite.
        """
        found = hessian.hessian(self.values)
        hessian.check(found, self.where)
        return found

    @cached_property
    def sample(self) -> torch.Tensor:
        """Some of them, evenly spread, float32."""
        at = torch.linspace(0, len(self.values) - 1, min(_SAMPLE, len(self.values))).long()
        return self.values[at.to(self.values.device)].float()

    @cached_property
    def mean(self) -> torch.Tensor:
        """Of each channel, `(in_features,)` float32."""
        return self.values.mean(0, dtype=torch.float32)

    @cached_property
    def factor(self) -> torch.Tensor:
        """`hessian.factor` of the columns in their own order: alike for all layers that share these inputs."""
        return hessian.factor(self.hessian, self.where)

    @cached_property
    def order(self) -> torch.Tensor:
        """Columns from the largest inputs to the smallest."""
        return self.hessian.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def ordered_factor(self) -> torch.Tensor:
        """The factor of the columns in `order`."""
        return hessian.factor(self.hessian[self.order][:, self.order], self.where)


def quantized(
    weight: torch.Tensor, recipe: Recipe, bits: int, group: int, inputs: Inputs | None, activation_bits: int = 0
) -> QuantizedMatrix:
    """A matrix as symbols.

    Columns whose input was always 0 become 0, as in GPTQ and SEPTQ.

    Args:
        weight: `(out_features, in_features)`.
        recipe: how.
        bits: of a symbol.
        group: columns that share a scale; more than there are means all.
        inputs: of its layer; None where it never had any: it is then rounded to the nearest, alone.
        activation_bits: to which inputs will be rounded, which the search for a smoothing strength counts in.

    Raises:
        QuantizationError: weights or inputs are NaN or infinite, or no factor can be made of them.
    """
    where = inputs.where if inputs is not None else "weight"
    hessian.check(weight, where)
    wide, group = weight.detach().float(), min(group, weight.shape[1])
    if inputs is None:
        return _without_inputs(wide, recipe, bits, group, weight.dtype)
    if recipe.needs_text or recipe.fit == "neuqi":
        wide = wide.masked_fill(hessian.dead(inputs.hessian), 0)
    factors = _smoothing(wide, recipe, bits, group, inputs, activation_bits) if recipe.smoothed else None
    scaled = wide if factors is None else wide * factors.float()
    branch = _branch(scaled, recipe, inputs.mean if factors is None else inputs.mean / factors.float())
    rest = scaled if branch is None else scaled - branch.values(scaled.shape[1])
    curvature = inputs.hessian if recipe.needs_text or recipe.fit == "neuqi" else None
    if factors is not None and curvature is not None:
        curvature = curvature / torch.outer(factors.float(), factors.float())
    grid = _grid(rest, recipe, bits, group, curvature)
    more: dict[str, torch.Tensor | spectrum.Branch | None] = {"smoothing": factors, "branch": branch}
    if not recipe.compensated or curvature is None:
        return QuantizedMatrix.made(grid.symbols(rest), grid, weight.dtype, **more)
    order = inputs.order if recipe.ordered and factors is None else None
    if factors is None:
        factor = inputs.ordered_factor if recipe.ordered else inputs.factor
    else:
        factor = hessian.factor(curvature, where)
    keep = None
    if recipe.share:
        cost = inputs.factor.diagonal().square().reciprocal() if factors is None else factor.diagonal() ** -2
        keep = escapes.mask(rest, grid.values(grid.symbols(rest)), cost, recipe.share)
    symbols, moved = rounding.compensated(rest, grid, factor, keep=keep, order=order)
    if keep is not None:
        at = keep.flatten().nonzero().flatten()
        more |= {"escaped_at": at, "escaped": moved.flatten()[at].to(weight.dtype)}
        # What stands under an escape is never read; one symbol for all costs least.
        symbols[keep] = 2 ** (bits - 1)
    return QuantizedMatrix.made(symbols, grid, weight.dtype, **more)


def _without_inputs(
    wide: torch.Tensor, recipe: Recipe, bits: int, group: int, dtype: torch.dtype
) -> QuantizedMatrix:
    grid = grids.fitted(wide, bits, group, _FITS[recipe.fit])
    symbols = grid.symbols(wide)
    if not recipe.share:
        return QuantizedMatrix.made(symbols, grid, dtype)
    at = escapes.mask(wide, grid.values(symbols), None, recipe.share).flatten().nonzero().flatten()
    symbols.view(-1)[at] = 2 ** (bits - 1)
    return QuantizedMatrix.made(symbols, grid, dtype, escaped_at=at, escaped=wide.flatten()[at].to(dtype))


def _grid(rest: torch.Tensor, recipe: Recipe, bits: int, group: int, curvature: torch.Tensor | None) -> Grid:
    importance = None
    if recipe.fit == "neuqi" and curvature is not None:
        diagonal = curvature.diagonal()
        importance = diagonal + hessian.DAMPING * diagonal.mean()
    return grids.fitted(rest, bits, group, _FITS[recipe.fit], importance)


def _branch(scaled: torch.Tensor, recipe: Recipe, mean: torch.Tensor) -> spectrum.Branch | None:
    if not recipe.frequencies:
        return None
    scores = (mean.mean() * scaled.mean(1)).abs()
    spread = float(scores.std(correction=0))
    scores = (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
    return spectrum.branch(scaled, spectrum.budget(scores, recipe.frequencies, scaled.shape[1]))


def _smoothing(
    wide: torch.Tensor, recipe: Recipe, bits: int, group: int, inputs: Inputs, activation_bits: int
) -> torch.Tensor | None:
    """The factors with which the layer, rounded to the nearest, errs least on a sample of its inputs."""
    wanted = inputs.sample @ wide.T

    def error(factors: torch.Tensor) -> float:
        scaled, even = wide * factors.float(), inputs.sample / factors.float()
        branch = _branch(scaled, recipe, inputs.mean / factors.float())
        low = None if branch is None else branch.values(scaled.shape[1])
        rest = scaled if low is None else scaled - low
        grid = _grid(rest, Recipe("search", fit="minmax"), bits, group, None)
        rounded = grid.values(grid.symbols(rest))
        if not activation_bits:
            return float((even @ (rounded if low is None else rounded + low).T - wanted).square().sum())
        out = per_token(even, activation_bits) @ rounded.T
        out = out if low is None else out + even @ low.T
        return float((out - wanted).square().sum())

    return smoothing.searched(inputs.sample, wide, error)[0]
