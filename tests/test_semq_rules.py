"""SEMQ's rules: symbols to the bit, packing, rows that are refused; and the codec of states that uses them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state.codecs import semq_rules
from semq_state.codecs.semq import Semq
from semq_state.codecs.semq_rules import BEST_RANGE, AbstractOperator, Orbit, Phase, Quant, arc, best_range
from semq_state.codecs.symbolic import Symbolic, Symbols
from semq_state.errors import IntegrityError, UnsupportedOperationError

OPERATORS: dict[str, AbstractOperator] = {
    "quant-2": Quant(60, 2),
    "quant-3": Quant(61, 3),
    "quant-4": Quant(60, 4),
    "quant-7": Quant(63, 7),
    "quant-8": Quant(61, 8),
    "quant-16": Quant(61, 16),
    "quant-33": Quant(59, 33),
    "quant-64": Quant(60, 64),
    "phase-2": Phase(60, 2),
    "phase-16": Phase(60, 16),
    "phase-17": Phase(62, 17),
    "phase-256": Phase(62, 256),
    "orbit": Orbit(60),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def unit_rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32)


def edges(dim: int) -> np.ndarray:
    """Rows on borders: axes, equal coordinates, zeros of both signs and subnormals."""
    rows = unit_rows(80, dim)
    rows[:20], rows[20:40] = np.eye(dim, dtype=np.float32)[:20], -np.eye(dim, dtype=np.float32)[-20:]
    rows[40:60] = np.float32(1 / math.sqrt(dim))
    rows[50:60, ::2] *= -1
    rows[60:70, 1::2] = np.float32(-1e-40)
    rows[70:, ::3] = np.float32(-0.0)
    return rows


def slow_quant(operator: Quant, x: np.float32) -> int:
    f = np.float32
    if abs(x) < 2.0**-126:
        x = f(0)
    top = f(operator.c / math.sqrt(operator.dim))
    m, bins = abs(x), operator.bins
    bin_ = bins - 1 if m >= top else min(math.floor(f(f(m * f(bins)) / top)), bins - 1)
    return (bins if x >= 0 else 0) + bin_


def slow_phase(operator: Phase, x: float, y: float) -> int:
    """The rule with fractions for the fused steps."""
    x, y = (0.0 if abs(v) < 2.0**-126 else float(v) for v in (x, y))
    ax, ay = abs(x), abs(y)
    t = min(ax, ay) / max(ax, ay) if ax or ay else 0.0
    c1, c3, c5 = 0.9947660466480732, -0.28543420102605926, 0.07606631777543432
    square = t * t
    inner = float(Fraction(c5) * Fraction(square) + Fraction(c3))
    angle = float(Fraction(inner) * Fraction(square) + Fraction(c1)) * t
    angle = math.pi / 2 - angle if ay > ax else angle
    angle = math.pi - angle if x < 0 else angle
    angle = -angle if y < 0 else angle
    raw = (angle + math.pi) * (operator.sectors / (2 * math.pi))
    return min(int(max(raw, 0.0)), operator.sectors - 1)


def slow_orbit(operator: Orbit, x: np.float32) -> int:
    m = round(Fraction(0 if abs(x) < 2.0**-126 else float(x) * operator.scale))
    root = 1 + (abs(m) - 1) % 9
    return 0 if m == 0 else root if m > 0 else 9 + root


@each_operator
@pytest.mark.parametrize("rows_of", [edges, lambda dim: unit_rows(20, dim)], ids=["edges", "random"])
def test_symbols_are_those_of_the_rule(operator: AbstractOperator, rows_of: Any) -> None:
    rows = rows_of(operator.dim)
    if isinstance(operator, Quant):
        expected = [[slow_quant(operator, x) for x in row] for row in rows]
    elif isinstance(operator, Phase):
        expected = [[slow_phase(operator, *pair) for pair in row.reshape(-1, 2)] for row in rows]
    else:
        expected = [[slow_orbit(operator, x) for x in row] for row in rows]
    assert operator.symbols(rows).tolist() == expected


@pytest.mark.parametrize("sectors", [2, 3, 16, 100, 255, 256])
def test_quick_angles_never_decide_near_a_border(sectors: int) -> None:
    rng = np.random.default_rng(1)
    angles = rng.integers(0, sectors, 60_000) * (2 * math.pi / sectors) + rng.normal(0, 1e-6, 60_000)
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    exact = np.clip(np.trunc(semq_rules._turns(pairs, sectors)), 0, sectors - 1)
    assert (Phase(4, sectors).symbols(pairs.reshape(-1, 4)).reshape(-1) == exact).all()
    gap = np.abs(semq_rules._quick_turns(pairs, sectors) - semq_rules._turns(pairs, sectors))
    assert gap[gap < sectors / 2].max() < semq_rules._NEAR / 10


def test_quant_takes_values_one_step_from_a_border() -> None:
    for operator in (Quant(60, 3), Quant(60, 7), Quant(60, 64, 3.64)):
        borders = np.arange(operator.bins + 1) * float(operator.max_magnitude) / operator.bins
        row = np.resize(borders.astype(np.float32), 60)
        for x in (row, np.nextafter(row, np.float32(9)), -np.nextafter(row, np.float32(0))):
            assert operator.symbols(x[None])[0].tolist() == [slow_quant(operator, v) for v in x]


def test_readme_example() -> None:
    quant = Quant(4, 4)
    before, after = np.array([[0, 0, 0.6, 0.8]], np.float32), np.array([[0.8, 0, 0, 0.6]], np.float32)
    assert quant.encode(before).tolist() == [[4, 4, 6, 7]]
    assert quant.encode(after).tolist() == [[7, 4, 4, 6]]
    assert quant.pack(np.array([[7, 0, 4, 3]], np.uint8)).tobytes() == b"\x07\x07"


def test_polynomial() -> None:
    t = np.linspace(0, 1, 100_001)
    assert arc(np.ones(1))[0] == math.pi / 4
    assert 7.03e-4 < np.abs(arc(t) - np.arctan(t)).max() < 7.04e-4


def test_fused_steps_round_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(4000), rng.random(4000)
    c = -a * b * (1 + rng.integers(-4, 5, 4000) * 2.0**-53)
    c[2000:] = rng.standard_normal(2000) * 2.0 ** rng.integers(-60, 3, 2000)
    # Next to a tie, on the side that rounding twice takes for the tie itself.
    a[:4], b[:4], c[:4] = 2.0**-53 * (1 + 2.0**-30), 1 - 2.0**-30, [1, 1 + 2.0**-52, -1, -1 - 2.0**-52]
    b[2:4] *= -1
    expected = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert semq_rules._fused(a, b, c).tolist() == expected


@each_operator
def test_packing_comes_back_and_is_the_documented_bit_stream(operator: AbstractOperator) -> None:
    symbols = np.random.default_rng(0).integers(0, operator.n_symbols, (90, operator.n_units)).astype(np.uint8)
    packed = operator.pack(symbols)
    assert packed.shape == (90, operator.n_bytes)
    stream = (symbols[:, :, None] >> np.arange(operator.n_bits)) & 1
    bits = np.pad(stream.reshape(90, -1), ((0, 0), (0, -operator.n_units * operator.n_bits % 8)))
    assert packed.tobytes() == np.packbits(bits.astype(np.uint8), axis=1, bitorder="little").tobytes()
    assert (operator.unpack(packed) == symbols).all()


@each_operator
def test_decoded_rows_have_the_same_symbols(operator: AbstractOperator) -> None:
    symbols = operator.symbols(unit_rows(50, operator.dim))
    decoded = operator.decode(symbols)
    assert decoded.shape == (50, operator.dim)
    assert decoded.dtype == np.float32
    assert (operator.symbols(decoded) == symbols).all()


def test_representatives() -> None:
    assert Quant(4, 4).representatives()[:, 0].tolist() == [
        -0.125,
        -0.375,
        -0.625,
        -0.875,
        0.125,
        0.375,
        0.625,
        0.875,
    ]
    assert Orbit(4).representatives()[[0, 1, 9, 10, 18], 0] == pytest.approx([0, 0.02, 0.18, -0.02, -0.18])
    for sectors in (2, 16, 17, 256):
        assert np.linalg.norm(Phase(4, sectors).representatives(), axis=1) == pytest.approx(1, abs=1e-6)


ROWS = {
    "nan": (np.nan, "finite"),
    "infinity": (np.inf, "finite"),
    "long": (1.0006, "norm of 1"),
    "short": (0.9994, "norm of 1"),
    "zero": (0.0, "norm of 1"),
    "large": (3e38, "norm of 1"),
}


@pytest.mark.parametrize(("value", "message"), ROWS.values(), ids=ROWS)
def test_rows_that_are_no_unit_rows_are_refused(value: float, message: str) -> None:
    rows = np.tile(np.array([[1, 0, 0, 0]], np.float32), (20_000, 1))
    rows[17_001, 0] = value
    with pytest.raises(UnsupportedOperationError, match=f"^row 17001.*{message}"):
        Quant(4).encode(rows)


def test_the_norm_is_held_to_its_tolerance_exactly() -> None:
    within, beyond = np.float32(math.sqrt(1 + 2**-10)), np.float32(math.sqrt(1 - 2**-10))
    for x in (within, beyond, np.nextafter(within, np.float32(2)), np.nextafter(beyond, np.float32(0))):
        row = np.array([[x, 0]], np.float32)
        if abs(float(x) ** 2 - 1) <= 2**-10:
            Quant(2).encode(row)
        else:
            with pytest.raises(UnsupportedOperationError, match="norm of 1"):
                Quant(2).encode(row)
    Quant(65_536).encode(np.full((2, 65_536), 1 / 256, np.float32))
    for row in unit_rows(200, 768) * np.float32(math.sqrt(1 + 2**-10)):
        total = 0.0
        for x in row.tolist():
            total += x * x
        if abs(total - 1) <= 2**-10:
            Quant(768).encode(row[None])
        else:
            with pytest.raises(UnsupportedOperationError, match="norm of 1"):
                Quant(768).encode(row[None])


WRONG: dict[str, Any] = {
    "dim 0": lambda: Quant(0),
    "dim 65537": lambda: Orbit(65_537),
    "dim True": lambda: Quant(True),
    "bins 1": lambda: Quant(4, 1),
    "bins 65": lambda: Quant(4, 65),
    "bins 2.0": lambda: Quant(4, 2.0),  # type: ignore[arg-type]
    "c 0": lambda: Quant(4, 4, 0.0),
    "c nan": lambda: Quant(4, 4, math.nan),
    "sectors 257": lambda: Phase(4, 257),
    "odd dim": lambda: Phase(7, 256),
    "dim 6 in nibbles": lambda: Phase(6, 16),
    "scale 0": lambda: Orbit(4, 0),
    "scale 2^30 + 1": lambda: Orbit(4, (1 << 30) + 1),
    "float64 rows": lambda: Quant(4).encode(np.eye(4)),  # type: ignore[arg-type]
    "rows of another dim": lambda: Quant(4).encode(np.eye(5, dtype=np.float32)),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_limits(make: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="expected"):
        make()


def test_rows_that_are_not_canonical_are_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="padding"):
        Quant(3, 2).unpack(np.array([[0b1100_0000]], np.uint8))
    with pytest.raises(UnsupportedOperationError, match="symbols below 6"):
        Quant(8, 3).unpack(np.array([[6, 0, 0]], np.uint8))
    with pytest.raises(UnsupportedOperationError, match="symbols below 19"):
        Orbit(2).unpack(np.array([[0, 19]], np.uint8))


# The codec.

HALF, SINGLE = torch.float16, torch.float32

TABLE = {2: (0.1189, 0.1188), 3: (0.0427, 0.0374), 4: (0.0215, 0.0115), 5: (0.0151, 0.0035)}
TABLE |= {6: (0.0130, 0.00104), 7: (0.0122, 0.00030)}

CODECS: dict[str, Semq] = {
    "default": Semq(),
    "quant-2": Semq(parameter=2),
    "quant-3": Semq(parameter=3, c=2.0, renormalised=True),
    "quant-64-centred": Semq(parameter=64, centred=True),
    "quant-8-scaled": Semq(scaled=True),
    "quant-8-centred-scaled": Semq(centred=True, scaled=True),
    "phase": Semq("phase"),
    "phase-256-centred": Semq("phase", 256, centred=True),
    "orbit": Semq("orbit"),
    "orbit-renormalised": Semq("orbit", 7, renormalised=True),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def error(codec: Semq, values: torch.Tensor) -> float:
    restored = codec.decode(codec.encode(values), tuple(values.shape))
    return float((values - restored).square().sum() / values.square().sum())


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", TABLE)
def test_errors_on_gaussian_vectors(bits: int) -> None:
    values, bins = 7 * gaussian(600, 768), 1 << (bits - 1)
    with_2, with_best = TABLE[bits]
    assert error(Semq(parameter=bins, c=2.0, renormalised=False), values) == pytest.approx(with_2, rel=0.03)
    assert error(Semq(parameter=bins, renormalised=False), values) == pytest.approx(with_best, rel=0.04)
    renormalised = error(Semq(parameter=bins, renormalised=True), values[:, :64])
    plain = error(Semq(parameter=bins, renormalised=False), values[:, :64])
    assert (renormalised < plain) == (bits > 2)
    assert error(Semq(parameter=bins), values[:, :64]) == min(renormalised, plain)


def test_scaling_keeps_small_channels_beside_large_ones() -> None:
    values = gaussian(400, 128)
    values[:, 3] = values[:, 3] * 500 + 2000
    values[:, 70] *= 80
    small = [i for i in range(128) if i not in (3, 70)]

    def lost(codec: Semq) -> float:
        restored = codec.decode(codec.encode(values), tuple(values.shape))
        return float((values - restored)[:, small].square().mean() / values[:, small].square().mean())

    assert lost(Semq(centred=True)) > 0.9
    assert lost(Semq(centred=True, scaled=True)) < 0.02
    scales = Semq(centred=True, scaled=True).encode(values).exact["scales"]
    assert torch.allclose(scales, values.std(0, correction=0), rtol=1e-4)


def test_tokens_far_longer_than_most_do_not_set_the_scales() -> None:
    values = gaussian(400, 64)
    sink = torch.zeros(64)
    sink[5] = 3000.0
    values[::50] += sink
    codec = Semq(centred=True, scaled=True)
    restored = codec.decode(codec.encode(values), (400, 64))
    cosine = torch.nn.functional.cosine_similarity(values, restored)
    others = [i for i in range(400) if i % 50]
    assert cosine[others].min() > 0.98 and cosine[::50].min() > 0.85
    assert codec.encode(values).exact["scales"].max() < 2
    quiet = gaussian(400, 64)
    quiet[:, 9] = 0
    quiet[7, 9] = 1.0
    restored = codec.decode(codec.encode(quiet), (400, 64))
    assert torch.nn.functional.cosine_similarity(quiet, restored)[8:].min() > 0.98


def test_scales_out_of_their_limits_are_refused() -> None:
    codec, values = Semq(scaled=True), gaussian(5, 8)
    symbolic = codec.encode(values)
    assert codec.encode(values * 0).exact["scales"].tolist() == [2.0**-100] * 8
    for bad in (0.0, -1.0, 1e-31, float("nan"), float("inf")):
        exact = {**symbolic.exact, "scales": torch.full((8,), bad)}
        with pytest.raises(IntegrityError, match="scales"):
            codec.decode(dataclasses.replace(symbolic, exact=exact), (5, 8))
    for exact in ({"norms": symbolic.exact["norms"]}, {**symbolic.exact, "scales": torch.ones(7)}):
        with pytest.raises(IntegrityError):
            codec.decode(dataclasses.replace(symbolic, exact=exact), (5, 8))
    with pytest.raises(IntegrityError):
        codec.decode(dataclasses.replace(symbolic, params={**symbolic.params, "scaled": False}), (5, 8))


def test_best_range() -> None:
    assert [best_range(1 << (bits - 1)) for bits in BEST_RANGE] == list(BEST_RANGE.values())
    assert best_range(2) < best_range(3) < best_range(4)


def test_phase_and_orbit_errors() -> None:
    values = gaussian(300, 768)
    assert error(Semq("phase"), values) == pytest.approx(0.235, abs=0.01)
    assert error(Semq("orbit"), values) == pytest.approx(0.026, abs=0.003)
    assert error(Semq("orbit"), values[:, :64]) == pytest.approx(0.28, abs=0.05)


@pytest.mark.parametrize("operator", [Quant(61, 4), Phase(64, 16), Orbit(50)], ids=["quant", "phase", "orbit"])
def test_unit_vectors_get_semqs_own_bytes(operator: AbstractOperator) -> None:
    rows = unit_rows(3000, operator.dim) * np.linspace(0.9996, 1.0004, 3000, dtype=np.float32)[:, None]
    codec = Semq(operator.name, operator.parameter, c=2.0 if operator.name == "quant" else None)
    for values in (rows, np.concatenate([rows, rows * np.float32(1e9)])):
        symbolic = codec.encode(torch.from_numpy(values))
        packed = operator.pack(symbolic.symbols["symbols"].values.numpy()[:3000])
        assert packed.tobytes() == operator.pack(operator.encode(rows)).tobytes()
        assert symbolic.exact["norms"].unique().tolist()[0] == 1


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(list(CODECS)),
    shape=st.tuples(*[st.integers(0, 3)] * 2, st.integers(0, 9), st.sampled_from([0, 4, 12, 64])),
    size=st.sampled_from([1e-45, 1e-30, 1e-6, 1.0, 1e6, 3e38]),
    seed=st.integers(0, 9),
)
def test_every_shape_and_size_comes_back(name: str, shape: tuple[int, ...], size: float, seed: int) -> None:
    codec = CODECS[name]
    values = (gaussian(*shape, seed=seed) * size).clamp(-3e38, 3e38)
    symbolic = codec.encode(values)
    restored = codec.decode(symbolic, shape)
    assert restored.shape == shape
    assert restored.dtype == torch.float32
    assert restored.isfinite().all()
    symbols = symbolic.symbols["symbols"]
    assert symbols.values.dtype == torch.uint8
    assert not (symbols.values > symbols.highest).any()
    if values.numel() and 1e-45 < size < 1e38 and codec.operator == "quant":
        assert (values.double() - restored).square().sum() < 0.3 * values.double().square().sum()
    again = codec.encode(values.clone())
    assert again.symbols["symbols"].values.equal(symbols.values)
    assert again.params == symbolic.params


@each_codec
def test_zero_vectors_and_single_tokens(codec: Semq) -> None:
    values = gaussian(2, 5, 64)
    values[:, 3] = 0
    assert not codec.decode(codec.encode(values), (2, 5, 64))[:, 3].any()
    if codec.centred:
        assert codec.decode(codec.encode(values[:, :1]), (2, 1, 64)).equal(values[:, :1])


def test_centring_takes_offsets_out() -> None:
    offsets = 30 * gaussian(2, 1, 64, seed=1)
    values = gaussian(2, 200, 64) + offsets
    centred = Semq(centred=True)
    residual = values - values.mean(dim=1, keepdim=True)
    restored = centred.decode(centred.encode(values), (2, 200, 64))
    assert (values - restored).square().sum() / residual.square().sum() < 0.013
    assert (values - restored).square().sum() * 100 < error(Semq(), values) * values.square().sum()


def test_norms_are_float16_where_they_fit() -> None:
    values = gaussian(4, 64)
    assert Semq().encode(values).exact["norms"].dtype == torch.float16
    for scale in (1e5, 1e-6):
        values[2] *= scale
        assert Semq().encode(values).exact["norms"].dtype == torch.float32
        assert error(Semq(), values) < 0.03
        values[2] /= scale


def test_norms_at_the_ends_of_float32() -> None:
    top = torch.finfo(SINGLE).max
    for dim in (1, 64):
        for codec in (Semq(), Semq(c=3.64, renormalised=False), Semq(centred=True)):
            values = torch.full((2, dim), top)
            values[1] *= -1
            symbolic = codec.encode(values)
            assert symbolic.exact["norms"].isfinite().all()
            assert codec.decode(symbolic, (2, dim)).isfinite().all()
    assert not Semq().encode(torch.full((2, 64), 1e-41)).exact["norms"].any()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "infinity"])
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "plain"])
def test_values_without_a_direction_are_refused(value: float, centred: bool) -> None:
    values = gaussian(4, 64)
    values[2, 1] = value
    with pytest.raises(UnsupportedOperationError, match="finite"):
        Semq(centred=centred).encode(values)


def test_phase_refuses_odd_dims() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"even `dim`.*7.*append zeros"):
        Semq("phase", 32).encode(torch.zeros(3, 7))


def test_unusable_arguments() -> None:
    for make in (
        lambda: Semq("cubic"),
        lambda: Semq(parameter=65),
        lambda: Semq(parameter=0),
        lambda: Semq(c=1e9),
        lambda: Semq("orbit", c=2.0),
        lambda: Semq("phase", renormalised=False),
        lambda: Semq(centred=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"must be|cannot be|expected"):
            make()


def changed(symbolic: Symbolic, part: str, entries: Mapping[Any, Any]) -> Symbolic:
    mapping: Mapping[str, Any] = getattr(symbolic, part)
    merged = {name: value for name, value in {**mapping, **entries}.items() if value is not ...}
    return dataclasses.replace(symbolic, **{part: merged})


DAMAGE: dict[str, tuple[str, dict[Any, Any]]] = {
    "no operator": ("params", {"operator": ...}),
    "a list": ("params", {"operator": []}),
    "another operator": ("params", {"operator": "phase"}),
    "bins 65": ("params", {"parameter": 65}),
    "bins text": ("params", {"parameter": "8"}),
    "bins none": ("params", {"parameter": None}),
    "c nan": ("params", {"c": math.nan}),
    "c none": ("params", {"c": None}),
    "c huge": ("params", {"c": 10**400}),
    "c text": ("params", {"c": "2"}),
    "a future rule": ("params", {"rule_revision": 1}),
    "a rule of false": ("params", {"rule_revision": False}),
    "renormalised none": ("params", {"renormalised": None}),
    "one more": ("params", {"more": 1}),
    "a number as a name": ("params", {1: 1}),
    "no symbols": ("symbols", {"symbols": ...}),
    "more symbols": ("symbols", {"more": Symbols(torch.zeros(1, dtype=torch.uint8), 0, 1)}),
    "another alphabet": ("symbols", {"symbols": Symbols(torch.zeros(2, 3, 64, dtype=torch.uint8), 0, 255)}),
    "fewer symbols": ("symbols", {"symbols": Symbols(torch.zeros(2, 3, 63, dtype=torch.uint8), 0, 15)}),
    "int16 symbols": ("symbols", {"symbols": Symbols(torch.zeros(2, 3, 64, dtype=torch.int16), 0, 15)}),
    "no norms": ("exact", {"norms": ...}),
    "no means": ("exact", {"means": ...}),
    "more tensors": ("exact", {"more": torch.zeros(1)}),
    "norms of another shape": ("exact", {"norms": torch.ones(2, 4, dtype=HALF)}),
    "norms of another dtype": ("exact", {"norms": torch.ones(2, 3, dtype=torch.int64)}),
    "norms of nan": ("exact", {"norms": torch.full((2, 3), math.nan)}),
    "norms of infinity": ("exact", {"norms": torch.full((2, 3), math.inf)}),
    "negative norms": ("exact", {"norms": torch.full((2, 3), -2.0)}),
    "means of another shape": ("exact", {"means": torch.ones(64)}),
    "means of another dtype": ("exact", {"means": torch.ones(2, 64, dtype=HALF)}),
    "means of nan": ("exact", {"means": torch.full((2, 64), math.nan)}),
}


@pytest.mark.parametrize(("part", "entries"), DAMAGE.values(), ids=DAMAGE)
def test_what_encode_never_makes_is_refused(part: str, entries: dict[Any, Any]) -> None:
    symbolic = Semq(centred=True).encode(gaussian(2, 3, 64))
    Semq().decode(symbolic, (2, 3, 64))
    with pytest.raises(IntegrityError, match=r"^semq codec: expected"):
        Semq().decode(changed(symbolic, part, entries), (2, 3, 64))


def test_a_mark_for_zeros_is_only_for_centred_vectors() -> None:
    symbolic = Semq().encode(gaussian(2, 3, 64))
    with pytest.raises(IntegrityError, match="norms"):
        Semq().decode(changed(symbolic, "exact", {"norms": torch.full((2, 3), -1.0)}), (2, 3, 64))


@each_codec
def test_hostile_values_stay_finite(codec: Semq) -> None:
    symbolic = codec.encode(gaussian(2, 3, 64))
    top = torch.full((2, 3), torch.finfo(SINGLE).max)
    symbols = symbolic.symbols["symbols"]
    for value in (0, symbols.highest):
        every = dataclasses.replace(symbols, values=torch.full_like(symbols.values, value))
        hostile = dataclasses.replace(changed(symbolic, "exact", {"norms": top}), symbols={"symbols": every})
        assert codec.decode(hostile, (2, 3, 64)).isfinite().all()
