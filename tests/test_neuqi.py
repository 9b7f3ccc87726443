"""NeUQI: the best zero point at a scale, and the best scale."""

from __future__ import annotations

import pytest
import torch

from semq_state.quantizers import neuqi, zero_point


def drawn(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Groups of values: `normal`, `heavy` tails (Student's t of 3 degrees), `far` from 0, `tiny`."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=rng)
    if kind == "heavy":
        return normal / (torch.randn(*shape, 3, generator=rng).square().mean(-1)).sqrt()
    return {"normal": normal, "far": 3 * normal + 5000, "tiny": normal * 1e-30}[kind]


def importances(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) ** 4


def loss_at(x: torch.Tensor, z: torch.Tensor, bits: int, h: torch.Tensor | None) -> torch.Tensor:
    """L of every zero point of `(n_groups, n_points)`, as it is written."""
    moved = x.double()[:, None, :] + z.double()[..., None]
    weights = torch.ones_like(x, dtype=torch.float64) if h is None else h.double().expand(x.shape)
    weights = weights / weights.sum(1, keepdim=True)
    return (weights[:, None] * (moved - moved.round().clamp(0, 2**bits - 1)).square()).sum(-1)


def minmax_loss(values: torch.Tensor, bits: int) -> torch.Tensor:
    low, top = values.amin(1), values.amax(1)
    scale = (top - low) / (2**bits - 1)
    return neuqi.loss(values, scale, -low / scale, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "far"])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_least_of_a_dense_grid(kind: str, bits: int, weighted: bool) -> None:
    values = drawn(kind, 5, 33)
    x = values / (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) * (1.4 * 2**bits)
    h = importances(5, 33) if weighted else None
    zero, lost = zero_point.exact(x, bits, h)
    low, top = -x.amax(1, keepdim=True).double() - 1, 2**bits - x.amin(1, keepdim=True).double()
    grid = low + (top - low) * torch.linspace(0, 1, 8001, dtype=torch.float64)
    dense = loss_at(x, grid, bits, h).amin(1)
    assert torch.allclose(loss_at(x, zero[:, None], bits, h)[:, 0], lost, rtol=1e-9)
    assert bool((lost <= dense * (1 + 1e-12)).all())
    # Between the grid's points L rises by no more than the square of half their distance.
    assert bool((dense - lost <= (0.5 * (grid[:, 1:] - grid[:, :-1]).amax(1)) ** 2 + 1e-12).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "far", "tiny"])
@pytest.mark.parametrize("weighted", ["no", "each", "shared", "zeros"])
@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
def test_two_stages_find_what_the_exact_search_finds(kind: str, bits: int, weighted: str, width: float) -> None:
    values = drawn(kind, 40, 48, seed=3)
    x = values.double() / values.double().std(1, keepdim=True) * (width * 2**bits / 4)
    h = {"no": None, "each": importances(40, 48), "shared": importances(48), "zeros": torch.zeros(48)}[weighted]
    zero, lost = zero_point.two_stage(x, bits, h)
    least = zero_point.exact(x, bits, h)[1]
    uniform = None if weighted == "zeros" else h
    assert torch.allclose(loss_at(x, zero[:, None], bits, uniform)[:, 0], lost, rtol=1e-6)
    assert bool((lost >= least * (1 - 1e-9)).all())
    assert bool((lost <= least * (1 + 1e-6)).all())


def test_importance_is_a_ratio() -> None:
    x, h = drawn("heavy", 6, 40) * 2, importances(6, 40)
    for solve in (zero_point.exact, zero_point.two_stage):
        expected, lost = solve(x, 3, h)
        for factor in (1e-35, 7.0, 1e30):
            zero, again = solve(x, 3, h * factor)
            assert torch.allclose(zero, expected, atol=1e-4) and torch.allclose(again, lost, rtol=1e-5)


def test_a_value_of_no_importance_is_none() -> None:
    values = drawn("normal", 4, 32)
    h = torch.ones(32)
    h[5], spoiled = 0, values.clone()
    spoiled[:, 5] = 3.0
    expected = zero_point.exact(torch.cat([values[:, :5], values[:, 6:]], 1) * 2, 2)
    for solve in (zero_point.exact, zero_point.two_stage):
        assert torch.allclose(solve(spoiled * 2, 2, h)[1], expected[1], rtol=1e-6)


# Relative squared errors, min-max beside NeUQI, that another implementation found on a single draw each.
@pytest.mark.parametrize(
    ("n", "bits", "widest", "best"),
    [
        (128, 2, 0.273, 0.110), (128, 3, 0.0443, 0.0313), (128, 4, 0.0092, 0.0072),
        (1024, 2, 0.404, 0.122), (1024, 3, 0.0774, 0.0382), (1024, 4, 0.0163, 0.0112),
    ],
)  # fmt: skip
def test_errors_of_normal_values(n: int, bits: int, widest: float, best: float) -> None:
    values = drawn("normal", 40, n)
    energy = values.double().square().mean(1)
    found = (neuqi.loss(values, *neuqi.fit(values, bits), bits) / energy).mean()
    assert float((minmax_loss(values, bits) / energy).mean()) == pytest.approx(widest, rel=0.25)
    assert float(found) == pytest.approx(best, rel=0.25)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "far"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fast_search_is_as_good(kind: str, bits: int, weighted: bool) -> None:
    values = drawn(kind, 24, 64, seed=5)
    h = importances(64) if weighted else None
    fast, two_stage, exact = (
        neuqi.loss(values, *neuqi.fit(values, bits, h, search=search), bits, h)
        for search in ("fast", "two-stage", "exact")
    )
    assert float((fast / exact).mean()) <= 1.01
    assert float((two_stage / exact).mean()) <= 1.001


@pytest.mark.parametrize("kind", ["normal", "heavy", "far", "tiny"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_never_worse_than_the_widest_grid(kind: str, bits: int) -> None:
    values = drawn(kind, 50, 20)
    found = neuqi.loss(values, *neuqi.fit(values, bits), bits)
    assert bool((found <= minmax_loss(values, bits) * (1 + 1e-4)).all())
    assert float(found.mean()) < float(minmax_loss(values, bits).mean())


def test_importance_lowers_the_error_that_counts() -> None:
    values, h = drawn("heavy", 30, 64), importances(30, 64)
    plain = neuqi.loss(values, *neuqi.fit(values, 2), 2, h)
    weighted = neuqi.loss(values, *neuqi.fit(values, 2, h), 2, h)
    assert bool((weighted <= plain * 1.005).all()) and float(weighted.mean()) < 0.8 * float(plain.mean())


def test_equal_values_are_met_exactly() -> None:
    values = torch.tensor([0.0, 1.7, -3e30, 2e-38, 1e-45, -65504.0])[:, None].repeat(1, 9)
    scale, zero = neuqi.fit(values, 3)
    symbols = (values / scale[:, None] + zero[:, None]).round().clamp(0, 7)
    assert torch.equal((symbols - zero[:, None]) * scale[:, None], values)
    assert bool((scale > 0).all())


@pytest.mark.parametrize("search", ["fast", "two-stage", "exact"])
def test_odd_groups_are_taken(search: str) -> None:
    for shape in ((0, 8), (3, 0), (3, 1), (1, 2)):
        scale, zero = neuqi.fit(drawn("normal", *shape), 2, search=search)
        assert scale.shape == zero.shape == shape[:1] and bool((scale > 0).all())
    extreme = torch.tensor([[-3.4e38, 3.4e38, 0.0], [1e-44, 0.0, 3e-45], [1e30, 1.0, -1e30], [1.0, 1.0000001, 1.0]])
    for part in neuqi.fit(extreme, 2, search=search):
        assert bool(torch.isfinite(part).all())


def test_blocks_do_not_show() -> None:
    values, h = drawn("heavy", 655, 100), importances(655, 100)
    scale, zero = neuqi.fit(values, 3, h)
    for i in (0, 326, 327, 654):  # blocks are of 327, the last of 1
        one = slice(i, i + 1)
        again = neuqi.fit(values[one], 3, h[one])
        assert torch.allclose(again[0], scale[one]) and torch.allclose(again[1], zero[one])


def test_searches_are_named() -> None:
    with pytest.raises(ValueError, match="search"):
        neuqi.fit(drawn("normal", 2, 8), 2, search="slow")
