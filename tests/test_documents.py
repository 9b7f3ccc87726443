"""What the documents quote is what the benchmarks wrote, and what they name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.include import DOCUMENTS, included

ROOT = Path(__file__).parent.parent


def test_quoted_tables_are_the_benchmarks_own() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        assert "<!-- begin benchmarks/results/" in text
        assert included(text) == text, f"run python -m benchmarks.include for {document}"


def test_every_table_has_its_rows_in_json() -> None:
    for table in (ROOT / "benchmarks" / "results").glob("*.md"):
        said = json.loads(table.with_suffix(".json").read_text())
        assert said["rows"]
        assert {"machine", "versions", "model"} <= said.keys()


def test_links_in_documents_lead_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


def test_every_room_is_in_the_architecture() -> None:
    rooms = {p.stem for p in (ROOT / "semq_state").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for room in rooms - {"__init__", "__main__"}:
        assert f"`{room}.py`" in text or f"`{room}/`" in text, room


def test_every_family_and_kind_is_in_the_format() -> None:
    from semq_state.caches import FAMILIES, KINDS
    from semq_state.layouts import LAYOUTS

    text = (
        (ROOT / "FORMAT.md")
        .read_text()
        .replace("`…-static`", "`minimax-m3-sparse-static` `reference-sliding-static`")
    )
    for name in {*FAMILIES, *KINDS, *LAYOUTS}:
        assert f"`{name}`" in text, name
    assert set(FAMILIES) <= set(LAYOUTS)


def test_the_architectures_in_the_readme_are_those_of_the_sweep() -> None:
    page, text = (ROOT / "docs" / "SUPPORT.md").read_text(), (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| [A-Z][a-z ]+ \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert len(rows) == 3
    for entries, exact in rows:
        assert f"{exact} of {entries}" in " ".join(text.split())


def test_every_field_of_a_report_and_a_floor_is_in_the_document() -> None:
    from semq_state.audit.floor_files import _CELL_FIELDS
    from semq_state.audit.report import CellDiff, Diff

    text = (ROOT / "docs" / "AUDIT.md").read_text()
    for name in {*CellDiff.__dataclass_fields__, *Diff.__dataclass_fields__, *_CELL_FIELDS}:
        assert f"`{name}`" in text, name
