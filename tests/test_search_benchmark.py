"""`python -m benchmarks.search`, small: it runs to its end, and its check of exactness holds and can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

ROOT = Path(__file__).parent.parent
N = 2000
METHODS = (
    "symbols",
    "symbols to symbols",
    "numpy float32",
    "faiss FlatIP",
    "faiss FlatIP, BLAS",
    "faiss SQ4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search")
    command = [sys.executable, "-m", "benchmarks.search", "--rows", str(N), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    said = json.loads((folder / "search.json").read_text())
    assert {"machine", "versions", "model", "rows"} == said.keys()
    return list(said["rows"])


def of(rows: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["table"].startswith(title)]


@pytest.mark.parametrize("title", ["Rates, medians", "Rates, best"])
def test_every_method_has_a_rate_in_every_batch(rows: list[dict[str, Any]], title: str) -> None:
    table = of(rows, title)
    assert {row["queries"] for row in table if row["cores"] == 1} == {1, 8, 64, 256}
    for row in table:
        assert row["rows"] == N
        assert all(row[name] > 0 for name in METHODS)
        for name in set(METHODS) - {"numpy float32"}:
            assert row[f"x, {name}"] == pytest.approx(row[name] / row["numpy float32"], rel=0.02)


def test_the_best_is_no_slower_than_the_median(rows: list[dict[str, Any]]) -> None:
    for median, best in zip(of(rows, "Rates, medians"), of(rows, "Rates, best"), strict=True):
        assert all(median[name] <= best[name] for name in METHODS)
    for row in of(rows, "Rules") + of(rows, "Data"):
        assert 0 < row["rate, median"] <= row["rate, best"]


def test_what_is_found_is_exact(rows: list[dict[str, Any]]) -> None:
    table = of(rows, "What is found")
    checked = [row for row in table if row["exact"] is not None]
    assert len(checked) == 11
    assert all(row["exact"] is True for row in checked)
    recalls = {(row["data"], row["method"]): row["recall@10"] for row in table}
    for data in ("random", "clusters"):
        assert recalls[data, "faiss FlatIP"] > 99
        bits = [recalls[data, f"quant {bins}, {b} bits"] for bins, b in ((2, 2), (4, 3), (8, 4))]
        assert 30 < bits[0] < bits[1] < bits[2] < 100


def test_what_rows_take(rows: list[dict[str, Any]]) -> None:
    ours, scalar, _ = of(rows, f"What {N:,} rows take")
    assert 192 + 16 <= ours["bytes in memory"] < 220
    assert 192 + 12 <= ours["bytes in the file"] < 210
    for row in (ours, scalar):
        assert all(
            0 < row[f"{what} a million, best s"] <= row[f"{what} a million, median s"]
            for what in ("add", "save", "load")
        )


def test_the_notes_are_computed(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = " ".join((folder / "search.md").read_text().split())
    asked = [row for row in of(rows, "Rates, medians") if row["queries"] >= 64]
    reached = sum(row["symbols"] >= 20 for row in asked)
    assert f"in {reached} of {len(asked)} lines" in text
    assert f"the least is {min(row['symbols'] for row in asked):g} " in text
    assert "it holds in 11 of 11 lines" in text
    assert "{" not in text


def test_the_target_is_judged_by_its_rows() -> None:
    from benchmarks.search import _target

    row = {"rows": 1000, "cores": 1}
    table = [row | {"queries": 1, "symbols": 1.0}, row | {"queries": 64, "symbols": 20.0}]
    assert ": reached, in 1 of 1 lines; the least is 20 " in _target(table, "medians")
    table.append(row | {"queries": 256, "symbols": 19.9})
    assert ": reached in part, in 1 of 2 lines; the least is 19.9 " in _target(table, "medians")
    assert ": NOT reached, in 0 of 1 lines" in _target(table[2:], "medians")


def test_the_check_of_exactness_can_fail() -> None:
    from benchmarks.search import _index, _is_exact, gaussian

    index, queries = _index(gaussian(1000, 0)), gaussian(8, 1)
    assert _is_exact(index, queries)
    found = index.search(queries).ids
    other = _index(gaussian(1000, 0))
    other.search = lambda queries, k: type("", (), {"ids": np.roll(found, 1, axis=1)})
    assert not _is_exact(other, queries)
