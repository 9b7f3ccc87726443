"""Compact snapshots: size and quality of every codec of ours and of others, side by side; time against prefill.

    python -m benchmarks.quality --text FILE --calibration-text FILE [--model MODEL] --out FOLDER

`--text` is what is measured on (WikiText-2 test for the numbers in the documents), `--calibration-text` what the
model is calibrated on, together with Python source (WikiText-2 valid). Both calibrations, ours and that of the
imitated KVTC, see the same kinds of text; no measured segment is among them. Takes about half an hour on two cores.
The plot needs matplotlib, `pip install 'semq-state[bench]'`; packages of others that are not installed are skipped
and named.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import quality_kvtc, quality_peers
from benchmarks.quality_ours import Files, ours
from benchmarks.quality_protocol import N_SEGMENTS, Pairs, Protocol, Segment, python_source
from benchmarks.report import Row, in_process, median, write
from semq_state.calibration import load_calibration
from semq_state.cli.models import load_model

BARS = {"near": (6.0, 0.0005, 99.5), "compact": (13.0, 0.005, 98.0), "tiny": (34.0, 0.025, 95.0)}
"""Of each preset the ratio that is wanted at least, the KL at most, and the top-1 agreement when copying."""

TIMED = ("exact", "compact", "tiny")
ROUNDS = 2
_WORKER = "benchmarks.quality_worker"

NOTES = (
    "Model: SmolLM2-135M-Instruct (dequantised from a 4-bit GGUF), computed in float32, states in bfloat16. "
    "Per method {n} segments of WikiText-2 test and {n} of Python source: 1,024 tokens prefilled, the cache coded "
    "and decoded, 256 tokens teacher-forced (`wikitext`, `python`) and a repetition of 128 earlier ones "
    "(`copy`). `kl` is the mean KL(exact, decoded) in nats, `top1` the agreement of the most likely token in "
    "percent. `ratio` is 16 bits over `bits_per_value`, from the whole file, exact tokens included "
    "(`counted`: `real`; of others, from their own bytes), from `arithmetic` on packed integers and scales, or "
    "as the package `stated`; shared calibrations are not counted. `seconds`: coding and decoding one segment."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--n-segments", type=int, default=N_SEGMENTS)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prose = args.calibration_text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="semq-state-quality-") as folder:
        print("calibrating")
        made = in_process(_WORKER, "calibrate", args.model, str(args.calibration_text.resolve()), folder)
        print("restore against prefill")
        rounds = [
            [in_process(_WORKER, "times", args.model, str(args.text.resolve()), folder, codec) for codec in TIMED]
            for _ in range(ROUNDS)
        ]
        times = [_compared(median([r[i] for r in rounds])) for i in range(len(TIMED))]
        calibration = load_calibration(Path(folder) / "calibration.safetensors")
    model, tokenizer = load_model(args.model, dtype="float32")
    peers = [*quality_peers.scalar_peers(), *quality_peers.package_peers(model.config)]
    caches = quality_peers.calibration_caches(model, tokenizer, prose, n=14)
    peers += quality_peers.kvtc_peers(quality_kvtc.fit(caches, theta=model.config.rope_parameters["rope_theta"]))
    del caches
    gc.collect()
    texts = {"wikitext": args.text.read_text(encoding="utf-8"), "python": python_source()}
    protocol = Protocol(model, tokenizer, texts, n_segments=args.n_segments)
    rows = list(_rows(protocol, Files(model, calibration), peers, args.only))
    tables = {
        "Presets against what is wanted of them": list(_bars(rows)),
        "Restore and save against prefill, 4,096 tokens": times,
        "Calibration": [made],
        "Size and quality": rows,
    }
    write("quality", args.out, tables, model=args.model, notes=NOTES.format(n=args.n_segments))
    plot(rows, args.out / "quality.png")
    print((args.out / "quality.md").read_text())


@torch.no_grad()
def _rows(protocol: Protocol, files: Files, peers: Sequence[quality_peers.Peer], only: str) -> Iterator[Row]:
    for each in ours():
        if only in each.method:
            labels = {"method": each.method, "family": each.family, "counted": each.counted}
            yield _shown(protocol.evaluate(files.code(each.codec), **labels))
    for peer in peers:
        if only in peer.method:
            labels = {"method": peer.method, "family": peer.family, "counted": peer.counted}
            yield _shown(protocol.evaluate(partial(_of_cache, peer.code), **labels))


def _of_cache(code: Callable[[Pairs], tuple[Pairs, float]], segment: Segment) -> tuple[Pairs, float]:
    return code(segment.cache)


def _shown(row: Row) -> Row:
    kept = ("bits_wikitext", "bits_python")
    row = {name: value for name, value in row.items() if name not in kept}
    print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def _bars(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        if row["method"] in BARS:
            ratio, kl, copying = BARS[row["method"]]
            holds = row["ratio"] >= ratio and max(row["kl_wikitext"], row["kl_python"]) <= kl
            yield {
                "method": row["method"],
                "ratio": row["ratio"],
                "ratio wanted": ratio,
                "kl_wikitext": row["kl_wikitext"],
                "kl_python": row["kl_python"],
                "kl wanted": kl,
                "top1_copy": row["top1_copy"],
                "top1_copy wanted": copying,
                "holds": holds and row["top1_copy"] >= copying,
            }


def _compared(row: Row) -> Row:
    return {
        **row,
        "x restore": row["prefill_s"] / row["restore_s"],
        "save / prefill": row["save_s"] / row["prefill_s"],
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """KL over bits per value, a curve a family, on both texts."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("skipped: the plot; pip install 'semq-state[bench]'")
        return
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row["kl_wikitext"] > 0:
            families.setdefault(row["family"], []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
    for axis, domain in zip(axes, ("wikitext", "python"), strict=True):
        for i, (family, points) in enumerate(families.items()):
            points = sorted(points, key=lambda row: row["bits_per_value"])
            is_ours = all(point["counted"] == "real" for point in points) and "KVTC" not in family
            axis.plot(
                [point["bits_per_value"] for point in points],
                [point[f"kl_{domain}"] for point in points],
                marker="o" if is_ours else "x",
                linestyle="-" if is_ours else "--",
                linewidth=3 if family == "transform" else 1.2,
                color=f"C{i % 10}",
                label=family,
            )
        axis.set(xscale="log", yscale="log", xlabel="bits per value (whole file)", title=domain)
        axis.set_xticks([0.3, 0.5, 1, 2, 4, 8, 16], labels=["0.3", "0.5", "1", "2", "4", "8", "16"])
        axis.grid(visible=True, which="both", alpha=0.25)
    axes[0].set_ylabel("KL(exact, decoded) of the next token, nats")
    axes[1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
