"""docs/SUPPORT.md: written from the sweep's rows, and read again to tell whether it is still true.

PYTHONPATH=tests:. python -m architectures.support
"""

from __future__ import annotations

import concurrent.futures
import tempfile
from collections.abc import Mapping
from pathlib import Path

import transformers

from architectures import sweep
from architectures.sweep import MAPPINGS, Row

PATH = Path(__file__).parents[2] / "docs" / "SUPPORT.md"
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "image-text": "Image and text to text",
}
_HEAD = "| architecture | what is kept | exact resume | crop | batch |"

Rows = Mapping[str, Mapping[str, Row]]


def written(rows: Rows, version: str) -> str:
    """The page."""
    lines = [
        "# What is supported",
        "",
        "Written by `make support`, checked by `make test`: do not edit. Every entry of transformers' mappings is",
        "built small with random weights, generates, is interrupted in the middle, saved, loaded, resumed: **raw",
        "logits and tokens of what follows equal those of the uninterrupted run bit for bit**, at lengths that",
        f"cross sliding windows and chunks. With transformers {version}.",
        "",
        "| mapping | entries | exact resume | crop to any count | crop at checkpoints | batch |",
        "|---|---|---|---|---|---|",
    ]
    for mapping, found in rows.items():
        count = [
            sum(row.exact == "yes" for row in found.values()),
            sum(row.crop == "yes" for row in found.values()),
            sum(row.crop == "at checkpoints" for row in found.values()),
            sum(row.batch == "yes" for row in found.values()),
        ]
        lines.append(f"| {TITLES[mapping]} | {len(found)} | {' | '.join(map(str, count))} |")
    lines += [
        "",
        "**What is kept**: the kind of cache where it is not the default one, the families of its layers",
        "(`FORMAT.md` says what they hold), and what the model keeps elsewhere (`rope_deltas`, states in modules,",
        "further caches). **Crop**: `yes` where `Snapshot.crop` gives the state after any earlier token, `at",
        "checkpoints` where layers forget and `capture(checkpoints=…)` has to keep what they hold; both are tested",
        "with the logits that follow.",
        "**Batch**: the same with two rows. A no says why.",
    ]
    for mapping, found in rows.items():
        lines += ["", f"## {TITLES[mapping]}", "", _HEAD, "|---|---|---|---|---|"]
        lines += [_line(name, row) for name, row in found.items()]
    return "\n".join(lines) + "\n"


def read(page: str) -> dict[str, dict[str, Row]]:
    """The inverse of `written`."""
    rows: dict[str, dict[str, Row]] = {}
    mapping = ""
    titles = {title: name for name, title in TITLES.items()}
    for line in page.splitlines():
        if line.startswith("## "):
            mapping = titles[line[3:]]
            rows[mapping] = {}
        elif mapping and line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[mapping][name.strip("`| ")] = Row(*cells)
    return rows


def _line(name: str, row: Row) -> str:
    return f"| `{name}` | {row.families or '-'} | {row.exact} | {row.crop} | {row.batch} |"


def _try(case: tuple[str, str]) -> tuple[tuple[str, str], Row]:
    sweep.quiet()
    with tempfile.TemporaryDirectory() as folder:
        return case, sweep.tried(*case, Path(folder))


def main() -> None:
    cases = [(mapping, name) for mapping, (_, known) in MAPPINGS.items() for name in known]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        found = dict(pool.map(_try, cases, chunksize=4))
    rows = {mapping: {n: found[mapping, n] for n in known} for mapping, (_, known) in MAPPINGS.items()}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(written(rows, transformers.__version__))
    print(PATH)


if __name__ == "__main__":
    main()
