"""Hidden states of a text on disk: how fast, in how much memory, how large, and what a probe reads in them.

    python -m benchmarks.hidden --text test.txt --train valid.txt --out FOLDER

Needs `pip install 'semq-state[bench]'` and the demo model. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import semq_state as sq
from benchmarks.hidden_probe import CLASSES, N_FREQUENT, Task, classes_of, rows_of
from benchmarks.hidden_worker import BATCH, BATCH_TOKENS, LAYERS, paragraphs, ways
from benchmarks.report import Row, in_process, median, write
from semq_state.cli.models import load_model

N_TOKENS, N_REPEATS = 3_000, 2
N_TRAIN, N_TEST = 12_000, 6_000
CAPTURE = (1024, 64, 5)
LOOP = f"loop, {BATCH} texts at a time"
PAIRED = {"last layer": ", last layer", "all layers": ", all layers"}

NOTES = """\
**Capture.** `generate` under `sq.capture`, without and with hidden states of one layer in four; in turns, medians.

**Recording.** {model} in float32 on {threads} threads, the first {n_texts} paragraphs of WikiText-2 test
({n_tokens:,} tokens), layers {layers} where nothing else is said. Each way runs in a fresh process {repeats}
times, in turn with the others; medians. `x loop` is the rate over that of the batched loop with the same
layers. `peak_mib` is what the process's own memory grew by, above model and tokenizer, at its highest (mapped
files not counted). The loops are what people write: `output_hidden_states=True`, rows without padding in a
list, one `torch.save` at the end; batches are in the order of the text, padded to the longest. `sq.record`
sorts by length in blocks of {blocks} batches of {batch_tokens} tokens, runs no output embeddings and no block
behind the last that is wanted, and writes shards of 32 MiB, each synced, read again and compared.

**Size and probe.** The states of layer {site} at {n_train:,} tokens of WikiText-2 valid and {n_test:,} of test.
The probe is scikit-learn's logistic regression on standardised states and tells the class of the next token:
{classes} (the {frequent} most frequent words of the training text are a class of their own). `decoded`: trained
on decoded states and applied to decoded states; `float`: trained on float32, applied to decoded. Differences in
points of percent; the standard error of an accuracy is {error:.1f} points. `bytes_per_token`: all that the file
holds of the states, norms and steps included, ids of rows not. `relative_error`: median over the rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True, help="recorded, and what probes are tested on")
    parser.add_argument("--train", type=Path, required=True, help="what probes are trained on")
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of the recording")
    parser.add_argument("--repeats", type=int, default=N_REPEATS)
    parser.add_argument("--capture", type=int, nargs=3, default=CAPTURE, help="prompt, new tokens, repeats")
    parser.add_argument("--probe-tokens", type=int, nargs=2, default=(N_TRAIN, N_TEST))
    parser.add_argument("--layer", type=int, default=16, help="whose states are probed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32")
    n_layers = model.config.num_hidden_layers
    speed = _speed(args.model, args.text, args.tokens, args.repeats, n_layers)
    given = (args.model, str(args.text), *map(str, args.capture))
    captured = [_rounded(row) for row in in_process("benchmarks.hidden_worker", "captured", *given)]
    site = f"hidden_states.{args.layer}"
    probed = list(_told(_task(model, tokenizer, args, site)))
    tables = {
        "Capture": captured,
        "Recording": speed,
        f"Size and probe, layer {args.layer} of {n_layers}": probed,
    }
    base = probed[0]["accuracy, decoded"] / 100
    notes = NOTES.format(
        model=args.model,
        threads=torch.get_num_threads(),
        n_texts=speed[0]["texts"],
        n_tokens=speed[0]["tokens"],
        layers=", ".join(map(str, LAYERS)),
        repeats=args.repeats,
        blocks=8,
        batch_tokens=BATCH_TOKENS,
        site=args.layer,
        n_train=args.probe_tokens[0],
        n_test=args.probe_tokens[1],
        classes=", ".join(CLASSES),
        frequent=N_FREQUENT,
        error=100 * (base * (1 - base) / args.probe_tokens[1]) ** 0.5,
    )
    write("hidden", args.out, tables, model=args.model, notes=notes)
    print((args.out / "hidden.md").read_text())


def _speed(model: str, text: Path, n_tokens: int, repeats: int, n_layers: int) -> list[Row]:
    names = list(ways(n_layers))
    found: dict[str, list[Row]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                row = in_process(
                    "benchmarks.hidden_worker", "measured", model, str(text), str(n_tokens), name, folder
                )
            found[name].append(row)
            print(row, flush=True)
    rows = {name: median(each) for name, each in found.items()}
    shown = []
    for name, row in rows.items():
        other = next((end for end in PAIRED.values() if name.endswith(end)), "")
        ratio = row["tokens_per_second"] / rows[LOOP + other]["tokens_per_second"]
        spread = [each["tokens_per_second"] for each in found[name]]
        shown.append({**_rounded(row), "x loop": round(ratio, 2), "slowest run": round(min(spread), 1)})
    return shown


def _rounded(row: Row) -> Row:
    return {
        key: round(value, 1 if value > 10 else 3) if isinstance(value, float) else value
        for key, value in row.items()
    }


def _task(model: Any, tokenizer: Any, args: Any, site: str) -> Task:
    """States and classes of both texts, by `sq.record` itself."""
    parts = []
    frequent = None
    with tempfile.TemporaryDirectory() as folder:
        for name, text, n in (
            ("train", args.train, args.probe_tokens[0]),
            ("test", args.text, args.probe_tokens[1]),
        ):
            texts = paragraphs(text, n, tokenizer)
            wanted = sq.HiddenStates(layers=int(site.rpartition(".")[2]))
            record = sq.record(model, texts, Path(folder, name), hidden_states=wanted, tokenizer=tokenizer)
            at, labels, frequent = classes_of(record, tokenizer, frequent)
            parts.append((record.rows(record.ids[at]), labels))
    (train, train_labels), (test, test_labels) = parts
    return Task(train, test, train_labels, test_labels, site)


def _told(task: Task) -> Any:
    began = time.monotonic()
    for row in rows_of(task):
        print(row, f"{time.monotonic() - began:.0f} s", flush=True)
        yield row


if __name__ == "__main__":
    main()
