"""Records of made-up rows, written by processes that may be killed at any moment."""

from __future__ import annotations

import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from semq_state.errors import StoreError
from semq_state.provenance import Provenance
from semq_state.records import Plan, RecordWriter
from semq_state.snapshot import HiddenRows

N_SHARDS = 12
DIGEST = f"sha256:{'1' * 64}"
ORIGIN = Provenance(f"sha256:{'0' * 64}", {"n": [1, 2.5, None]}, {}, None, {}, {}, "float32")


def plan(codec: str = "raw", **changed: object) -> Plan:
    told = {"states": ["a", "b.c"], "stream": "sequence", "tokens": "all", "pool": "", "dtype": "", "codec": codec}
    sizes = {"max_tokens": 512, "batch_tokens": 1024, "shard_bytes": 1 << 20}
    return Plan.from_dict({**told, **sizes, **changed})


def shard(number: int, n: int = 37, length: int = 5) -> HiddenRows:
    """Documents from 100 times `number`, every second one, of `length` tokens at positions 2, 4, 6 …"""
    chance = torch.Generator().manual_seed(number)
    at = torch.arange(n)
    rows = torch.stack([100 * number + 2 * (at // length), 2 + 2 * (at % length)], 1)
    states = {
        "a": torch.randn(n, 24, generator=chance),
        "b.c": torch.randn(n, 16, generator=chance).bfloat16(),
    }
    return HiddenRows(rows, torch.randint(0, 999, (n,), generator=chance), states)


def add(writer: RecordWriter, number: int, rows: HiddenRows | None = None) -> None:
    writer.append(rows or shard(number), next=(100 * number + 100, 0), n_read=number + 1, dataset=DIGEST)


def write(folder: Path, codec: str = "raw", n_shards: int = N_SHARDS) -> None:
    """The whole record, or what is left to write of it."""
    with RecordWriter.open(folder, plan(codec), ORIGIN, codec=codec) as writer:
        for number in range(writer.n_read, n_shards):
            add(writer, number)
        if not writer.complete:
            writer.finish(100 * n_shards)


def writing(ready: Connection, folder: Path) -> None:
    ready.send("begins")
    write(folder)
    ready.send("done")


def held(ready: Connection, folder: Path) -> None:
    """A writer that waits."""
    with RecordWriter.open(folder, plan(), ORIGIN) as writer:
        add(writer, 0)
        ready.send("begins")
        ready.recv()


def on_a_full_disk(ready: Connection, folder: Path, room: int) -> None:
    """Adds shards until a file may not grow; then, with room again, one more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with RecordWriter.open(folder, plan(), ORIGIN) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            for number in range(100):
                add(writer, number)
        except StoreError as error:
            ready.send((number, str(error)))
        ready.send(writer.n_rows)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        add(writer, writer.n_read)
