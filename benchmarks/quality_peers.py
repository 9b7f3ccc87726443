"""Other people's lossy KV-cache codecs under one protocol: size, KL, top-1 and perplexity.

    python -m benchmarks.quality_peers --text FILE [--calibration FILE] [--n-segments 4] --out FOLDER

`--calibration` is prose for the imitation of KVTC (WikiText-2 valid); the same amount of Python source is added.
Peers that are not installed are skipped and named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality_kvtc, quality_packages, quality_scalar
from benchmarks.quality_protocol import (
    N_PREFIX,
    N_SEGMENTS,
    Pairs,
    Protocol,
    prefill,
    python_source,
    spread,
    token_ids,
)
from benchmarks.report import Row, write

NOTES = (
    "Model: SmolLM2-135M-Instruct (dequantised from a 4-bit GGUF) in float32. `counted`: how the bytes were found, "
    "`real` (bytes that were made), `arithmetic` (packed integers and scales) or `stated` (the package's own "
    "account; it makes no bytes). Shared calibration is not counted. `ratio` is 16 bits over bits_per_value."
)


@dataclass(frozen=True)
class Peer:
    """A method at one rate.

    Attributes:
        method: its name in the table.
        family: the curve that it belongs to.
        code: a cache to its decoded form and the stored bytes, everything but shared calibration counted.
        counted: how the bytes were found: `real`, `arithmetic` or `stated`.
    """

    method: str
    family: str
    code: Callable[[Pairs], tuple[Pairs, float]]
    counted: str = "arithmetic"


def scalar_peers() -> Iterator[Peer]:
    """Casts and integers; always there."""
    yield Peer("bf16", "bf16", quality_scalar.bf16)
    for bits in (8, 4):
        code = partial(quality_scalar.per_token, bits=bits, group=64)
        yield Peer(f"int{bits} per token, group 64", "int per token", code)
    for bits in (4, 3, 2):
        yield Peer(f"KIVI-style int{bits}", "KIVI-style", partial(quality_scalar.kivi, bits=bits))
    for bits in (4, 2):
        code = partial(quality_scalar.kivi, bits=bits, n_sinks=4)
        yield Peer(f"KIVI-style int{bits}, 4 sinks exact", "KIVI-style, sinks", code)


def package_peers(config: Any) -> Iterator[Peer]:
    """Those of `quality_packages` that are installed; of transformers' two backends the first that is."""
    theta = config.rope_parameters["rope_theta"]
    backend = next(filter(quality_packages.is_installed, ("quanto", "hqq")), None)
    if backend:
        for bits in (4, 2):
            code = partial(quality_packages.transformers_cache, backend=backend, bits=bits, config=config)
            yield Peer(f"transformers, {backend} int{bits}", backend, code)
    if quality_packages.is_installed("kakeyalattice"):
        for q_range in (38, 10, 4):
            code = partial(quality_packages.kakeyalattice, q_range=q_range)
            yield Peer(f"kakeyalattice E8, Q={q_range}", "kakeyalattice", code, "stated")
    if quality_packages.is_installed("nexusquant"):
        for key_bits, value_bits in ((4, 4), (3, 2)):
            code = partial(quality_packages.nexusquant, key_bits=key_bits, value_bits=value_bits, theta=theta)
            yield Peer(f"nexusquant-kv K{key_bits}V{value_bits}", "nexusquant-kv", code, "stated")


def kvtc_peers(kvtc: quality_kvtc.Kvtc) -> Iterator[Peer]:
    """The imitation at about 8, 17 and 35 times."""
    for bits in (1.95, 0.94, 0.42):
        yield Peer(f"KVTC imitation, {bits:g} bits", "KVTC imitation", partial(kvtc.code, bits=bits), "real")


def calibration_caches(model: Any, tokenizer: Any, prose: str, *, n: int) -> list[Pairs]:
    """Caches of `n` prefixes of prose and `n` of Python source that no test segment comes from."""
    texts = (prose, python_source("calibration"))
    pieces = [ids for text in texts for ids in spread(token_ids(tokenizer, text), n, N_PREFIX)]
    return [prefill(model, ids[None]) for ids in pieces]


def main() -> None:
    from semq_state.cli.models import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--n-calibration", type=int, default=14)
    parser.add_argument("--n-segments", type=int, default=N_SEGMENTS)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32")
    peers = [*scalar_peers(), *package_peers(model.config)]
    if args.calibration is None:
        print("skipped: KVTC imitation; --calibration FILE")
    elif args.only in "KVTC imitation":
        prose = args.calibration.read_text(encoding="utf-8")
        caches = calibration_caches(model, tokenizer, prose, n=args.n_calibration)
        peers += kvtc_peers(quality_kvtc.fit(caches, theta=model.config.rope_parameters["rope_theta"]))
        del caches
    texts = {"wikitext": args.text.read_text(encoding="utf-8"), "python": python_source()}
    protocol = Protocol(model, tokenizer, texts, n_segments=args.n_segments)
    rows = [_measured(protocol, peer) for peer in peers if args.only in peer.method]
    write("quality_peers", args.out, {"Lossy codecs": rows}, model=args.model, notes=NOTES)
    print((args.out / "quality_peers.md").read_text())


@torch.no_grad()
def _measured(protocol: Protocol, peer: Peer) -> Row:
    labels = {"method": peer.method, "family": peer.family, "counted": peer.counted}
    row = protocol.evaluate(lambda segment: peer.code(segment.cache), **labels)
    print({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


if __name__ == "__main__":
    main()
