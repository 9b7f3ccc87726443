"""One architecture of every family, interrupted in one process and resumed in another that never saw the prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from architectures.worker import RUNS
from semq_state.caches import FAMILIES, KINDS

ELSEWHERE = {"hqq", "quanto", "mtp", "dflash", "quantized"}
"""Families and kinds that need a library of their own or an assistant: tests/test_ways.py has them."""

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    for what in ("write", "read"):
        command = [sys.executable, "-m", "architectures.worker", what, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


@pytest.mark.xdist_group("fresh processes")
@pytest.mark.parametrize("run", RUNS)
def test_resumed_in_a_fresh_process(found: dict[str, Any], run: str) -> None:
    assert found[run]["logits"] and found[run]["tokens"]
    reused, n_tokens = found[run]["reused"]
    # XLNet feeds the last two tokens of its memory again at every step.
    assert reused >= n_tokens - (3 if run == "xlnet" else 1)


@pytest.mark.xdist_group("fresh processes")
def test_every_family_and_kind_was_resumed(found: dict[str, Any]) -> None:
    families = {family for one in found.values() for family in one["families"]}
    kinds = {kind for one in found.values() for kind in one["kinds"]}
    assert set(FAMILIES) - ELSEWHERE <= families
    assert set(KINDS) - ELSEWHERE <= kinds
    assert found["image positions"]["others"] == ["model.rope_deltas"]
