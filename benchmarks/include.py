"""Copies the tables of `benchmarks/results` into the documents that quote them.

    python -m benchmarks.include

A document marks the place with `<!-- begin FILE -->` and `<!-- end FILE -->`; a test holds the two together.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/CODECS.md", "docs/AUDIT.md", "docs/SYMBOLS.md", "docs/HIDDEN.md", "docs/WEIGHTS.md")
_PLACE = re.compile(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def included(text: str) -> str:
    """`text` with every marked place filled from its file."""
    return _PLACE.sub(_filled, text)


def _filled(place: re.Match[str]) -> str:
    name = place.group(1)
    return f"<!-- begin {name} -->\n{(ROOT / name).read_text()}<!-- end {name} -->"


if __name__ == "__main__":
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(included(path.read_text()))
