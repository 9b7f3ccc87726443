"""Every entry of transformers' mappings, and that docs/SUPPORT.md says what the sweep finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from architectures import support, sweep
from architectures.sweep import MAPPINGS, Row

PAGE = support.PATH.read_text(encoding="utf-8")
ROWS = support.read(PAGE)
OF_THIS_VERSION = f"With transformers {transformers.__version__}." in PAGE
WANTED = {"causal": 175, "seq2seq": 33, "image-text": 85}
CASES = [(mapping, name) for mapping, (_, known) in MAPPINGS.items() for name in known]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mapping", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_architecture(mapping: str, name: str, tmp_path: Path) -> None:
    sweep.quiet()
    found = sweep.tried(mapping, name, tmp_path)
    if not OF_THIS_VERSION and name not in ROWS[mapping]:
        pytest.skip("newer than docs/SUPPORT.md")
    row = Row(found.families or "-", found.exact, found.crop, found.batch)
    assert row == ROWS[mapping][name], "docs/SUPPORT.md is stale: make support"


def test_the_page_has_every_architecture_and_enough_of_them() -> None:
    assert not OF_THIS_VERSION or {m: list(rows) for m, rows in ROWS.items()} == {
        mapping: list(known) for mapping, (_, known) in MAPPINGS.items()
    }
    for mapping, wanted in WANTED.items():
        assert sum(row.exact == "yes" for row in ROWS[mapping].values()) >= wanted
    assert support.written(ROWS, transformers.__version__) == PAGE or not OF_THIS_VERSION
