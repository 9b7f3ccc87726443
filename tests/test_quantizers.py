"""The parts of quantisers, each held against what its formula says, computed another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from semq_state.codecs import Semq
from semq_state.errors import QuantizationError
from semq_state.quantizers import escapes, grid, hessian, rounding, smoothing, spectrum
from semq_state.quantizers.activations import per_token
from semq_state.weights.packing import n_packed, packed, unpacked

FITS = (grid.minmax, grid.shrunk, grid.norm)
NAMES = ("minmax", "shrunk", "norm")


def numbers(*shape: int, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values / torch.rand(*shape, generator=generator).sqrt() if heavy else values


def inputs_of(n: int, dim: int, seed: int = 1) -> torch.Tensor:
    """Inputs whose channels go together, as those of a model do."""
    return numbers(n, dim, seed=seed) @ numbers(dim, dim, seed=seed + 1) / dim**0.5


class TestGrid:
    @pytest.mark.parametrize("fit", FITS, ids=NAMES)
    @pytest.mark.parametrize(("cols", "group"), [(32, 32), (32, 8), (30, 8), (5, 8), (1, 1)])
    def test_symbols_are_the_nearest_levels(self, fit: object, cols: int, group: int) -> None:
        values = numbers(6, cols)
        made = grid.fitted(values, 3, min(group, cols), fit)  # type: ignore[arg-type]
        scale, zero = made.per_column(cols)
        levels = scale[..., None] * (torch.arange(8.0) - zero[..., None])
        nearest = (levels - values[..., None]).abs().amin(-1)
        symbols = made.symbols(values)
        assert torch.allclose((made.values(symbols) - values).abs(), nearest, atol=1e-6)
        assert torch.equal(made.values(symbols), levels.gather(-1, symbols[..., None].long())[..., 0])

    def test_the_last_group_may_have_fewer(self) -> None:
        values = numbers(3, 30)
        values[:, 24:] *= 100
        made = grid.fitted(values, 4, 8, grid.minmax)
        assert made.scale.shape == (3, 4)
        assert (made.scale[:, 3] > 10 * made.scale[:, 2]).all()
        assert (made.values(made.symbols(values)) - values)[:, :24].abs().max() < 1

    def test_minmax_reaches_both_ends_and_keeps_zero(self) -> None:
        values = torch.tensor([[-1.0, 0.0, 0.3, 2.0], [1.0, 2.0, 3.0, 4.0]])
        made = grid.fitted(values, 4, 4, grid.minmax)
        restored = made.values(made.symbols(values))
        assert restored[0, 1] == 0
        # 0 is a level even where all values are above it.
        assert torch.equal(made.zero, made.zero.round())
        assert made.zero[1, 0] == 0
        assert (restored - values).abs().max() <= made.scale.max() / 2 + 1e-3

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_shrunk_loses_less_where_values_are_far_out(self, bits: int) -> None:
        values = numbers(64, 128, heavy=True)

        def lost(fit: object) -> torch.Tensor:
            made = grid.fitted(values, bits, 128, fit)  # type: ignore[arg-type]
            return (made.values(made.symbols(values)) - values).abs().pow(2.4).sum(1)

        assert (lost(grid.shrunk) <= lost(grid.minmax) * 1.02).all()
        assert (lost(grid.shrunk) / lost(grid.minmax)).mean() < 0.95

    @pytest.mark.parametrize("fit", FITS, ids=NAMES)
    def test_zeros_stay_zeros_or_next_to_it(self, fit: object) -> None:
        made = grid.fitted(torch.zeros(2, 8), 3, 8, fit)  # type: ignore[arg-type]
        assert (made.values(made.symbols(torch.zeros(2, 8))).abs() <= 0.5).all()

    def test_norm_is_semq_s_rule(self) -> None:
        rows = functional.normalize(numbers(5, 64), dim=1)
        codec = Semq(operator="quant", parameter=4, c=2.345)
        coded = codec.encode(rows[None])
        made = grid.fitted(rows, 3, 64, grid.norm)
        restored, theirs = made.values(made.symbols(rows)), codec.decode(coded, (1, 5, 64))[0]
        # The codec gives a decoded vector its own length back.
        restored, theirs = functional.normalize(restored, dim=1), functional.normalize(theirs, dim=1)
        assert torch.allclose(restored, theirs, atol=1e-3)

    def test_scales_beyond_float16_stay_float32(self) -> None:
        for factor in (1e-9, 1e9):
            made = grid.fitted(numbers(4, 16) * factor, 4, 16, grid.minmax)
            assert made.scale.dtype == torch.float32
        assert grid.fitted(numbers(4, 16), 4, 16, grid.minmax).scale.dtype == torch.float16


class TestHessian:
    def test_is_the_mean_product_of_inputs(self) -> None:
        inputs = inputs_of(20_000, 6)
        expected = 2 * inputs.double().T @ inputs.double() / len(inputs)
        assert torch.allclose(hessian.hessian(inputs.bfloat16().float()).double(), expected, rtol=0.02, atol=0.02)
        assert torch.allclose(hessian.hessian(inputs).double(), expected, rtol=1e-4, atol=1e-5)

    def test_the_factor_squares_to_the_damped_inverse(self) -> None:
        found = hessian.hessian(inputs_of(500, 24))
        factor = hessian.factor(found, "layer").double()
        damped = found.double() + 0.01 * found.diagonal().mean() * torch.eye(24)
        assert torch.allclose(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), atol=1e-3)
        assert torch.equal(factor, factor.triu())

    def test_fewer_inputs_than_channels_still_have_one(self) -> None:
        found = hessian.hessian(inputs_of(3, 24))
        assert torch.isfinite(hessian.factor(found, "layer")).all()

    def test_dead_columns_stand_alone(self) -> None:
        inputs = inputs_of(100, 8)
        inputs[:, 3] = 0
        found = hessian.hessian(inputs)
        assert hessian.dead(found).nonzero().tolist() == [[3]]
        factor = hessian.factor(found, "layer")
        assert (factor[3, 4:] == 0).all()
        assert (factor[:3, 3] == 0).all()

    def test_a_layer_that_only_saw_zeros_has_a_factor(self) -> None:
        assert torch.isfinite(hessian.factor(torch.zeros(4, 4), "layer")).all()

    def test_a_singular_one_is_refused_by_the_layer_s_name(self) -> None:
        with pytest.raises(QuantizationError, match=r"model\.layers\.7"):
            hessian.factor(torch.diag(torch.tensor([1.0, -1.0, 1.0])), "model.layers.7")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_inputs_that_are_no_numbers_are_refused(self, value: float) -> None:
        inputs = inputs_of(10, 4)
        inputs[3, 2] = value
        with pytest.raises(QuantizationError, match=r"some\.layer: expected finite"):
            hessian.check(hessian.hessian(inputs), "some.layer")


def by_the_book(
    weights: torch.Tensor, made: grid.Grid, found: torch.Tensor, keep: torch.Tensor, order: list[int]
) -> torch.Tensor:
    """Compensated rounding from the inverse of what is left of the Hessian at each step, no factor, no blocks."""
    left, rest = weights.double().clone(), list(order)
    damped = found.double() + 0.01 * found.diagonal().mean() * torch.eye(len(found))
    scale, zero = (t.double() for t in made.per_column(weights.shape[1]))
    symbols = torch.zeros_like(weights, dtype=torch.uint8)
    while rest:
        column = rest[0]
        inverse = damped[rest][:, rest].inverse()
        s, z = scale[:, column], zero[:, column]
        symbol = (left[:, column] / s + z).round().clamp(0, made.highest)
        symbols[:, column] = symbol.to(torch.uint8)
        error = (left[:, column] - s * (symbol - z)) / inverse[0, 0]
        error[keep[:, column]] = 0
        left[:, rest] -= torch.outer(error, inverse[0])
        rest = rest[1:]
    return symbols


class TestCompensated:
    @pytest.mark.parametrize("kept", [0.0, 0.1])
    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize(("cols", "group"), [(20, 20), (150, 16)])
    def test_is_what_the_book_says(self, kept: float, ordered: bool, cols: int, group: int) -> None:
        weights, found = numbers(7, cols), hessian.hessian(inputs_of(300, cols))
        made = grid.fitted(weights, 3, group, grid.minmax)
        keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < kept
        order = found.diagonal().argsort(descending=True) if ordered else torch.arange(cols)
        factor = hessian.factor(found[order][:, order], "layer")
        symbols, _ = rounding.compensated(
            weights, made, factor, keep=keep if kept else None, order=order if ordered else None
        )
        expected = by_the_book(weights, made, found, keep, order.tolist())
        # A value half way between two levels may fall to either side.
        assert (symbols != expected).float().mean() < 0.01

    def test_loses_less_than_the_nearest(self) -> None:
        weights, inputs = numbers(16, 64), inputs_of(400, 64)
        made = grid.fitted(weights, 3, 64, grid.minmax)
        symbols, _ = rounding.compensated(weights, made, hessian.factor(hessian.hessian(inputs), "layer"))

        def lost(symbols: torch.Tensor) -> float:
            return float(((made.values(symbols) - weights) @ inputs.T).square().mean())

        assert lost(symbols) < 0.7 * lost(made.symbols(weights))

    def test_kept_values_make_good_for_what_came_before_and_lose_nothing(self) -> None:
        weights, inputs = numbers(8, 32), inputs_of(400, 32)
        made = grid.fitted(weights, 2, 32, grid.minmax)
        keep = torch.zeros(weights.shape, dtype=torch.bool)
        keep[:, 16:] = True
        factor = hessian.factor(hessian.hessian(inputs), "layer")
        symbols, moved = rounding.compensated(weights, made, factor, keep=keep)
        whole = torch.where(keep, moved, made.values(symbols))
        assert not torch.allclose(moved[:, 16:], weights[:, 16:], atol=1e-3)
        alone = torch.where(keep, weights, made.values(symbols))
        assert ((whole - weights) @ inputs.T).norm() < ((alone - weights) @ inputs.T).norm()

    def test_leaves_the_weights_as_they_are(self) -> None:
        weights = numbers(4, 16)
        before = weights.clone()
        factor = hessian.factor(hessian.hessian(inputs_of(99, 16)), "layer")
        rounding.compensated(weights, grid.fitted(weights, 2, 16, grid.minmax), factor)
        assert torch.equal(weights, before)


class TestEscapes:
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
    def test_are_the_costliest(self, share: float) -> None:
        values, rounded = numbers(10, 30), numbers(10, 30).round()
        cost = torch.rand(30, generator=torch.Generator().manual_seed(1)) + 0.1
        chosen = escapes.mask(values, rounded, cost, share)
        score = (values - rounded).square() * cost
        assert int(chosen.sum()) == int(share * 300)
        if chosen.any():
            assert score[chosen].min() >= score[~chosen].max()

    def test_without_a_hessian_are_the_largest_errors(self) -> None:
        values = torch.tensor([[0.1, 0.4, 0.0, -0.45]])
        assert escapes.mask(values, values.round(), None, 0.25).tolist() == [[False, False, False, True]]


class TestSpectrum:
    @pytest.mark.parametrize("cols", [1, 2, 9, 32])
    def test_all_frequencies_are_the_row(self, cols: int) -> None:
        rows = numbers(5, cols)
        counts = torch.full((5,), cols // 2 + 1)
        if cols % 2 == 0:
            # The last frequency of an even row is real, and no imaginary part stands beside it in the row.
            assert spectrum.branch(rows, counts).values(cols).shape == rows.shape
        assert torch.allclose(spectrum.branch(rows, counts).values(cols), rows, atol=4e-3)

    def test_one_is_the_mean(self) -> None:
        rows = numbers(3, 50) + 7
        found = spectrum.branch(rows, torch.ones(3, dtype=torch.int64)).values(50)
        assert torch.allclose(found, rows.mean(1, keepdim=True).expand(3, 50), rtol=1e-3)

    def test_rows_keep_as_many_as_they_are_told(self) -> None:
        rows, counts = numbers(3, 40), torch.tensor([1, 5, 12])
        found = spectrum.branch(rows, counts)
        assert len(found.coefficients) == 1 + 9 + 23
        left = torch.fft.rfft(found.values(40), norm="ortho").abs() > 1e-3
        assert left.sum(1).tolist() == [1, 5, 12]

    @pytest.mark.parametrize("cols", [1, 8, 9])
    def test_energy_is_that_of_the_squares(self, cols: int) -> None:
        rows = numbers(4, cols)
        assert torch.allclose(spectrum.energy(rows).sum(1), rows.square().sum(1), rtol=1e-4)

    def test_what_is_left_has_the_rest_of_the_energy(self) -> None:
        rows = numbers(4, 64)
        rest = rows - spectrum.branch(rows, torch.full((4,), 10)).values(64)
        expected = spectrum.energy(rows)[:, 10:].sum(1)
        assert torch.allclose(rest.square().sum(1), expected, rtol=1e-2)

    def test_the_budget_is_spent_where_scores_are_high(self) -> None:
        scores = torch.linspace(-1, 1, 100)
        counts = spectrum.budget(scores, 16, 576)
        assert abs(float(counts.float().mean()) - 16) < 0.5
        assert (counts.diff() >= 0).all()
        assert counts[-1] > 3 * counts[0]
        assert spectrum.budget(torch.tensor([50.0, 0.0]), 16, 20).tolist() == [11, 1]


class TestSmoothing:
    def test_moves_outliers_and_changes_no_product(self) -> None:
        inputs, weights = numbers(50, 8), numbers(6, 8)
        inputs[:, 2] *= 100
        factors = smoothing.factors(inputs.abs().amax(0), weights.abs().amax(0), 0.5).float()
        assert torch.allclose((inputs / factors) @ (weights * factors).T, inputs @ weights.T, atol=1e-2)
        even = (inputs / factors).abs().amax(0)
        assert even.max() / even.median() < 0.2 * inputs.abs().amax(0).max() / inputs.abs().amax(0).median()
        assert abs(float(factors.log().mean())) < 0.01

    def test_is_the_formula(self) -> None:
        most, largest = torch.tensor([1.0, 16.0]), torch.tensor([4.0, 1.0])
        found = smoothing.factors(most, largest, 0.25)
        assert float(found[1] / found[0]) == pytest.approx((16**0.25) / (1 / 4**0.75), rel=1e-2)

    def test_none_is_taken_where_none_is_better(self) -> None:
        inputs, weights = numbers(20, 4), numbers(3, 4)
        assert smoothing.searched(inputs, weights, lambda factors: 1.0) == (None, 0.0)
        best = smoothing.factors(inputs.abs().amax(0), weights.abs().amax(0), 0.3)
        found, strength = smoothing.searched(
            inputs, weights, lambda factors: float((factors.float() - best.float()).abs().sum())
        )
        assert strength == 0.3
        assert found is not None
        assert torch.equal(found, best)


class TestPerToken:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounds_each_vector_to_its_own_grid(self, bits: int) -> None:
        values = numbers(3, 5, 64)
        values[1] *= 1000
        found = per_token(values, bits)
        step = (values.amax(-1) - values.amin(-1)) / (2**bits - 1)
        assert ((found - values).abs().amax(-1) <= step * 0.51).all()
        assert all(len(row.unique()) <= 2**bits for row in found.view(-1, 64))
        assert found.dtype == values.dtype

    def test_keeps_zeros(self) -> None:
        assert torch.equal(per_token(torch.zeros(2, 4), 4), torch.zeros(2, 4))
        assert per_token(torch.tensor([[0.0, 3.0, 7.0]]), 4)[0, 0] == 0
        # 0 is a level of the grid even where all values are above it.
        levels = per_token(torch.tensor([[5.0, 6.1, 7.5]]), 4) / (7.5 / 15)
        assert torch.allclose(levels, levels.round(), atol=1e-4)


class TestPacking:
    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 33)])
    def test_there_and_back(self, bits: int, shape: tuple[int, int]) -> None:
        symbols = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        data = packed(symbols, bits)
        assert torch.equal(unpacked(data, bits, shape), symbols)
        assert len(data) == n_packed(bits, symbols.numel())
        assert len(data) <= math.ceil(symbols.numel() / 8) * bits + 8
