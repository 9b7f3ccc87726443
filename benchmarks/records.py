"""What is done with a record of hidden states: read, shuffled, verified, compared.

    python -m benchmarks.records --text test.txt --out FOLDER

Needs `pip install 'semq-state[bench]'` and the demo model. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.report import in_process, write

N_TOKENS = 1_500

NOTES = """\
Records of all {sites} states of {model} at {rows:,} tokens of WikiText-2 test, raw float32, in the page cache; best
of three. A vector is a row of one site. Sums of the values are taken while they are read. `other batches`: the same
text in batches of at most 256 tokens; {differ:.0f} % of the vectors then differ, in their last bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (args.model, str(args.text), str(args.tokens), folder)
        about, rows = in_process("benchmarks.hidden_worker", "handled", *given)
    shown = [{**row, "seconds": round(row["seconds"], 4), "vectors_per_second": round(row["vectors_per_second"])}
             for row in rows]  # fmt: skip
    write("records", args.out, {"Records": shown}, model=args.model, notes=NOTES.format(model=args.model, **about))
    print((args.out / "records.md").read_text())


if __name__ == "__main__":
    main()
