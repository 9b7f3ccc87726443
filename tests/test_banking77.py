"""The parts of benchmarks/banking77 that its numbers hang on; the model and the data are not needed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.banking77 import N_NEIGHBOURS, neighbours, overlap
from benchmarks.banking77_methods import Method, methods

METHODS = list(methods())


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(made, dim=-1)
    return unit[:64], unit[64:]


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_methods_give_rows_and_bits(method: Method, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    train, test, bits = method.code(*rows)
    assert [train.shape, test.shape] == [part.shape for part in rows]
    assert train.dtype == test.dtype == torch.float32
    assert train.isfinite().all() and test.isfinite().all()
    assert bits > 0


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("float32", 32),
        ("SEMQ's rule, quant 3 bits", 3),
        ("SEMQ's rule, phase 16", 2),
        ("SEMQ's rule, orbit 50", 8),
        ("semq, quant 3 bits, best c, norms", 3 + 16 / 384),
        ("uniform 2 bits, groups of 64", 2 + 32 / 64),
        ("int8, absmax of a row", 8 + 16 / 384),
        ("binary, signs", 1),
    ],
)
def test_everything_stored_is_counted(name: str, bits: float, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    (method,) = (each for each in METHODS if each.name == name)
    assert method.code(*rows)[2] == pytest.approx(bits)


def test_more_bits_are_nearer(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    for family in ("rotated", "components"):
        coded = [method.code(*rows) for method in METHODS if method.family == family and "step" in method.name]
        errors = [float((test - rows[1]).square().sum()) for _, test, _ in coded]
        assert errors == sorted(errors, reverse=True)
        assert [bits for *_, bits in coded] == sorted(bits for *_, bits in coded)


def test_overlap_counts_common_neighbours(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = neighbours(*rows)
    assert found.shape == (len(rows[1]), N_NEIGHBOURS)
    assert overlap(found, found) == 100
    assert overlap(found + 64, found) == 0
    assert overlap(found.flip(1), found) == 100
