"""Hidden states in volume: what was written is there whatever ends the writer, and is read as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_processes import FORKS, is_done, start
from workers import recording_rows as made
from workers.recording_rows import DIGEST, N_SHARDS, ORIGIN, add, plan, shard

import semq_state as sq
from semq_state.errors import (
    FormatError,
    IncompleteStateError,
    IntegrityError,
    SemqStateError,
    StoreError,
    UnsupportedOperationError,
)
from semq_state.records import Plan, Record, RecordWriter, open_record
from semq_state.records.checks import render
from semq_state.records.shuffling import POOL_BLOCKS, RUN_ROWS
from semq_state.search import read_semq_index
from semq_state.snapshot import HiddenRows

CODECS = ["raw", "exact", "semq"]
SITES = ("a", "b.c")


def joined(numbers: range = range(N_SHARDS)) -> HiddenRows:
    """All rows of `made.write`."""
    all_rows = [shard(number) for number in numbers]
    return HiddenRows(
        torch.cat([r.rows for r in all_rows]),
        torch.cat([r.token_ids for r in all_rows]),
        {site: torch.cat([r.states[site] for r in all_rows]) for site in SITES},
    )


WHOLE = joined()
IDS = WHOLE.rows.numpy()
N = len(WHOLE)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bits, so that NaN is itself."""
    kind = torch.int16 if wanted.element_size() == 2 else torch.int32
    return found.dtype == wanted.dtype and torch.equal(found.view(kind), wanted.view(kind))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Complete records, one a codec; nobody may change them."""
    folders = {codec: tmp_path_factory.mktemp("records") / codec for codec in CODECS}
    for codec, folder in folders.items():
        made.write(folder, codec)
    return folders


@pytest.fixture
def folder(written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the raw one, to be damaged."""
    shutil.copytree(written["raw"], tmp_path / "record")
    return tmp_path / "record"


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "shards.jsonl").read_bytes().splitlines()]


def rewrite(folder: Path, lines: list[Any]) -> None:
    (folder / "shards.jsonl").write_bytes(b"".join(render(line) for line in lines))


def touch_all(record: Record) -> None:
    for _ in record.blocks():
        pass


# What was written is there.


@pytest.mark.parametrize("codec", CODECS)
def test_a_record_is_read_as_it_was_written(codec: str, written: dict[str, Path]) -> None:
    record = open_record(written[codec])
    assert record.complete and len(record) == N and record.n_documents == 100 * N_SHARDS
    assert record.sites == SITES and record.plan == plan(codec) and record.provenance == ORIGIN
    assert np.array_equal(record.ids, IDS) and np.array_equal(record.token_ids, WHOLE.token_ids.numpy())
    assert record.ids.dtype == record.token_ids.dtype == np.int64
    assert [record.dim(site) for site in SITES] == [24, 16]
    assert [record.dtype(site) for site in SITES] == [torch.float32, torch.bfloat16]
    assert record["a"].shape == (N, 24) and record["b.c"].dtype == torch.bfloat16 and len(record["a"]) == N
    for site in SITES:
        if codec != "semq":
            assert same(record[site][:], WHOLE.states[site])
        else:
            wanted = torch.cat([sq.load(path).hidden["sequence"].states[site] for path in record.shards])
            assert same(record[site][:], wanted)
            assert torch.cosine_similarity(wanted.float(), WHOLE.states[site].float()).min() > 0.96
    assert record.verify() == {}
    assert record.n_bytes == sum(path.stat().st_size for path in record.shards)
    assert str(N) in repr(record) and "complete" in repr(record) and "b.c" in repr(record)


def test_each_shard_is_a_snapshot_file(written: dict[str, Path]) -> None:
    record = open_record(written["raw"])
    for number, path in enumerate(record.shards):
        assert path.name == f"shard-{number:06d}.safetensors" and sq.verify(path).passed
        snapshot = sq.load(path)
        assert snapshot.n_tokens == 0 and snapshot.cache.kind == "absent" and snapshot.batch_size == 1
        assert same(load_file(path)["hidden.sequence.states.a"], shard(number).states["a"])
    assert sorted(p.name for p in written["raw"].iterdir()) == sorted(
        [".lock", "record.json", "shards.jsonl", *(path.name for path in record.shards)]
    )


def test_what_the_folder_says(written: dict[str, Path]) -> None:
    told = json.loads((written["raw"] / "record.json").read_bytes())
    assert (written["raw"] / "record.json").read_bytes() == render(told)
    assert told["format"] == "semq_state record" and told["format_version"] == 1
    assert told["plan"] == plan().as_dict() and told["provenance"] == ORIGIN.as_dict()
    *lines, last = journal(written["raw"])
    record = open_record(written["raw"])
    complete = {"n_documents": 1200, "n_rows": N, "n_shards": N_SHARDS, "record_id": record.record_id}
    assert last == {"complete": complete}
    assert [line["number"] for line in lines] == list(range(N_SHARDS))
    for number, line in enumerate(lines):
        rows = shard(number).rows
        assert [line["first"], line["last"]] == rows[[0, -1]].tolist() and line["n_rows"] == len(rows)
        assert (
            line["next"] == [100 * number + 100, 0] and line["n_read"] == number + 1 and line["dataset"] == DIGEST
        )
        assert line["n_bytes"] == record.shards[number].stat().st_size
        assert line["state_id"] == sq.inspect(record.shards[number]).state_id


@pytest.mark.parametrize("codec", CODECS)
def test_rows_with_nan_come_back(codec: str, tmp_path: Path) -> None:
    rows = shard(0)
    rows.states["a"][[3, 8]] = torch.tensor([[float("nan")], [float("inf")]])
    rows.states["b.c"][4, 1] = float("nan")
    with RecordWriter.open(tmp_path / "r", plan(codec), ORIGIN, codec=codec) as writer:
        add(writer, 0, rows)
    record = open_record(tmp_path / "r")
    for site, at in (("a", [3, 8]), ("b.c", [4])):
        assert same(record[site][at], rows.states[site][at])
    with pytest.raises(UnsupportedOperationError, match=r"a, of \(document, position\) \(0, 2\)") as refusal:
        record.index("a")
    assert "NaN" in str(refusal.value)


def test_an_empty_record(tmp_path: Path) -> None:
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        assert (writer.next, writer.n_read, writer.dataset, writer.n_rows, writer.n_bytes) == ((0, 0), 0, "", 0, 0)
        assert len(open_record(tmp_path / "r")) == 0
        writer.finish(0)
    record = open_record(tmp_path / "r")
    assert record.complete and record.n_documents == 0 and len(record) == 0 and record.verify() == {}
    assert record.ids.shape == (0, 2) and list(record.blocks()) == [] and list(record.blocks(seed=1)) == []
    for asked in (lambda: record.dim("a"), lambda: record.of(0), lambda: record.rows([[0, 0]])):
        with pytest.raises(UnsupportedOperationError, match="none yet"):
            asked()


# Whatever ends the writer.


def test_a_killed_writer_goes_on_and_the_record_is_the_same(written: dict[str, Path], tmp_path: Path) -> None:
    whole, chance = open_record(written["raw"]), random.Random(0)
    process, pipe = start(made.writing, tmp_path / "timed")
    began = time.perf_counter()
    assert pipe.poll(60) and pipe.recv() == "done"
    duration = time.perf_counter() - began
    process.join(60)
    lengths = []
    for kill in range(6):
        folder = tmp_path / f"{kill}"
        for _ in range(3):
            process, pipe = start(made.writing, folder)
            time.sleep(chance.uniform(0, duration) * 0.5)
            process.kill()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL or is_done(pipe)
            if not (folder / "record.json").exists():
                continue
            record = open_record(folder)
            assert record.verify() == {} and np.array_equal(record.ids, IDS[: len(record)])
            lengths.append(len(record))
        made.write(folder)
        record = open_record(folder)
        assert record.complete and record.record_id == whole.record_id and record.verify() == {}
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in written["raw"].iterdir())
    assert len(set(lengths)) > 3, lengths


def test_a_shard_without_its_line_is_written_again(written: dict[str, Path], folder: Path) -> None:
    rewrite(folder, journal(folder)[:5])
    (folder / "shard-000005.safetensors").write_bytes(b"half")
    assert len(open_record(folder)) == 5 * 37
    made.write(folder)
    assert open_record(folder).record_id == open_record(written["raw"]).record_id


def test_a_shard_without_its_line_does_not_outlive_the_end(folder: Path) -> None:
    rewrite(folder, journal(folder)[:5])
    with RecordWriter.open(folder, plan(), ORIGIN) as writer:
        writer.finish(600)
    assert not (folder / "shard-000005.safetensors").exists() and (folder / "shard-000004.safetensors").exists()


def test_a_line_that_was_torn_off_counts_as_not_written(written: dict[str, Path], tmp_path: Path) -> None:
    whole = (written["raw"] / "shards.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    folder = tmp_path / "r"
    folder.mkdir()
    shutil.copy(written["raw"] / "record.json", folder)
    for n_bytes in [*range(ends[1] + 1), *range(ends[-2], len(whole))]:
        (folder / "shards.jsonl").write_bytes(whole[:n_bytes])
        record = open_record(folder)
        assert len(record) == 37 * min(N_SHARDS, sum(end <= n_bytes for end in ends)) and not record.complete
    for torn in (b"\x00" * 40 + b"\n", whole[: ends[0] // 2] + b"\n", b"\xff\n"):
        (folder / "shards.jsonl").write_bytes(whole[: ends[0]] + torn)
        assert len(open_record(folder)) == 37


@pytest.mark.parametrize("torn", [b"{", b'{"complete":', b"\x00\x00\n"])
def test_a_writer_goes_on_after_a_torn_line(torn: bytes, written: dict[str, Path], folder: Path) -> None:
    rewrite(folder, journal(folder)[:3])
    with (folder / "shards.jsonl").open("ab") as file:
        file.write(torn)
    made.write(folder)
    assert (folder / "shards.jsonl").read_bytes() == (written["raw"] / "shards.jsonl").read_bytes()


@pytest.mark.parametrize("room", [2_000, 14_000])
def test_a_full_disk_leaves_what_was_there(room: int, tmp_path: Path) -> None:
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=made.on_a_full_disk, args=(theirs, tmp_path / "r", room))
    process.start()
    assert ours.poll(60)
    n_shards, said = ours.recv()
    assert ours.poll(60) and ours.recv() == 37 * n_shards
    process.join(60)
    assert process.exitcode == 0
    # Shards of ours are larger than the first room; in the second the journal is what does not fit.
    assert ("shard-" in said) == (room < 9000) and ("shards.jsonl" in said) == (room > 9000), said
    record = open_record(tmp_path / "r")
    assert len(record) == 37 * (n_shards + 1) and record.verify() == {}
    assert (n_shards > 5) == (room > 9000)
    assert not list((tmp_path / "r").glob(".*.partial"))


# One writer, one record.


def test_a_second_writer_is_refused_and_a_killed_one_is_none(tmp_path: Path) -> None:
    process, _ = start(made.held, tmp_path / "r")
    assert len(open_record(tmp_path / "r")) == 37
    with pytest.raises(StoreError, match="another one that is writing"):
        RecordWriter.open(tmp_path / "r", plan(), ORIGIN)
    process.kill()
    process.join(60)
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        assert writer.n_read == 1 and writer.next == (100, 0) and writer.dataset == DIGEST
        with pytest.raises(StoreError, match="another one that is writing"):
            RecordWriter.open(tmp_path / "r", plan(), ORIGIN)
    RecordWriter.open(tmp_path / "r", plan(), ORIGIN).close()


def test_another_record_is_refused_with_every_difference(folder: Path) -> None:
    other = dataclasses.replace(ORIGIN, dtype="float16", config={"n": 3}, tokenizer=f"sha256:{'2' * 64}")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}
    with pytest.raises(UnsupportedOperationError) as refusal:
        RecordWriter.open(folder, plan(pool="mean", max_tokens=7), other)
    for name in ("pool", "max_tokens", "dtype", "config.n", "tokenizer"):
        assert f"{name}: expected" in str(refusal.value)
    for name in ("states", "shard_bytes", "weights"):
        assert f"{name}: expected" not in str(refusal.value)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"} == before
    # Circumstances may differ.
    RecordWriter.open(folder, plan(), dataclasses.replace(ORIGIN, device="cuda", created="2026")).close()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"other files: thesis\.tex"):
        RecordWriter.open(tmp_path, plan(), ORIGIN)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="can be written to"):
        RecordWriter.open(tmp_path / "thesis.tex", plan(), ORIGIN)
    with pytest.raises(StoreError):
        open_record(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".record.json.abc.partial").touch()
    RecordWriter.open(tmp_path / "new" / "er" / "est", plan(), ORIGIN).close()
    RecordWriter.open(tmp_path / "new2", plan(), ORIGIN).close()
    shutil.rmtree(tmp_path / "new" / "er")
    RecordWriter.open(tmp_path / "new", plan(), ORIGIN).close()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [".lock", "record.json", "shards.jsonl"]


def test_a_plan_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    bad = [
        (dataclasses.replace(plan(), states=("b", "a")), ORIGIN),
        (dataclasses.replace(plan(), max_tokens=-1), ORIGIN),
        (dataclasses.replace(plan(), pool="max"), ORIGIN),
        (plan(), dataclasses.replace(ORIGIN, config={"x": float("nan")})),
        (plan(), dataclasses.replace(ORIGIN, config={"x": 1 << 80})),
        (plan(), dataclasses.replace(ORIGIN, config={"x": "\ud800"})),
        (plan(), dataclasses.replace(ORIGIN, config={"x": {1}})),
        (plan(), dataclasses.replace(ORIGIN, config={1: 1})),
    ]
    for i, (wrong, origin) in enumerate(bad):
        with pytest.raises(UnsupportedOperationError, match="plain values"):
            RecordWriter.open(tmp_path / f"{i}", wrong, origin)
        assert not (tmp_path / f"{i}" / "record.json").exists()
        RecordWriter.open(tmp_path / f"{i}", plan(), ORIGIN).close()


def wrong_rows() -> dict[str, HiddenRows]:
    rows = shard(1)
    a, b = rows.states["a"], rows.states["b.c"]
    ids = rows.rows
    replace = dataclasses.replace
    return {
        "a site less": replace(rows, states={"a": a}),
        "a site more": replace(rows, states={"a": a, "b.c": b, "c": b}),
        "another dim": replace(rows, states={"a": a[:, :8], "b.c": b}),
        "no dim": replace(rows, states={"a": a[:, :0], "b.c": b}),
        "another dtype": replace(rows, states={"a": a.double(), "b.c": b}),
        "integers": replace(rows, states={"a": a.int(), "b.c": b}),
        "fewer states": replace(rows, states={"a": a[:4], "b.c": b}),
        "not increasing": replace(rows, rows=ids.flip(0)),
        "twice": replace(rows, rows=ids.clone().index_copy_(0, torch.tensor([1]), ids[:1])),
        "not after": replace(rows, rows=ids - torch.tensor([100 - 14, 0])),
        "negative": replace(rows, rows=ids - torch.tensor([0, 4])),
        "too far": replace(rows, rows=ids + torch.tensor([1 << 31, 0])),
        "float ids": replace(rows, rows=ids.double()),
        "tokens": replace(rows, tokens="last"),
        "pool": replace(rows, pool="mean"),
        "none": replace(rows, rows=ids[:0], token_ids=ids[:0, 0], states={"a": a[:0], "b.c": b[:0]}),
    }


@pytest.mark.parametrize("name", wrong_rows())
@pytest.mark.parametrize("is_new", [True, False])
def test_rows_that_do_not_go_on_are_refused(name: str, is_new: bool, tmp_path: Path) -> None:
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        add(writer, 0)
        if not is_new:
            writer.close()
            writer = RecordWriter.open(tmp_path / "r", plan(), ORIGIN)
        before = (tmp_path / "r" / "shards.jsonl").read_bytes()
        with pytest.raises(IncompleteStateError):
            writer.append(wrong_rows()[name], next=(1 << 31, 0), n_read=2, dataset=DIGEST)
        assert (tmp_path / "r" / "shards.jsonl").read_bytes() == before
        assert not (tmp_path / "r" / "shard-000001.safetensors").exists()
        add(writer, 1)
        assert len(open_record(tmp_path / "r")) == 74
        writer.close()


@pytest.mark.parametrize("word", ["float32", "bfloat16"])
def test_the_dtype_of_the_plan_holds(word: str, tmp_path: Path) -> None:
    with (
        RecordWriter.open(tmp_path / "r", plan(dtype=word), ORIGIN) as writer,
        pytest.raises(IncompleteStateError, match=word),
    ):
        add(writer, 0)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        last = (*shard(0).rows[-1].tolist(),)
        for wrong in (
            {"next": last}, {"next": (0, 0)}, {"next": (1,)}, {"next": (99, -1)}, {"next": (99, 0.5)},
            {"n_read": -1}, {"n_read": 1.0}, {"dataset": ""},
            {"next": ((1 << 31) + 1, 0)}, {"next": (99, 1 << 32)}, {"n_read": 1 << 48}, {"dataset": "sha256:1"},
        ):  # fmt: skip
            given: Any = {"next": (100, 0), "n_read": 1, "dataset": DIGEST, **wrong}
            with pytest.raises(UnsupportedOperationError):
                writer.append(shard(0), **given)
        writer.append(shard(0), next=(last[0], last[1] + 1), n_read=0, dataset=DIGEST)
        for n in (0, last[0], 1.0, True):
            with pytest.raises(UnsupportedOperationError):
                writer.finish(n)  # type: ignore[arg-type]
        assert not writer.complete
        writer.finish(last[0] + 1)
        for again in (lambda: add(writer, 1), lambda: writer.finish(500)):
            with pytest.raises(UnsupportedOperationError, match="complete"):
                again()
        assert writer.complete and "complete" in repr(writer)
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        assert writer.complete and writer.record_id == open_record(tmp_path / "r").record_id
    writer = RecordWriter.open(tmp_path / "s", plan(), ORIGIN)
    writer.close()
    with pytest.raises(UnsupportedOperationError, match="closed"):
        add(writer, 0)


# Slices, ids and blocks.

BOUNDS = st.none() | st.integers(-N - 5, N + 5)
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.none() | st.integers(-40, 40).filter(bool))


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SLICES | st.lists(st.integers(-N, N - 1), max_size=20) | st.integers(-N, N - 1), kind=st.integers(0, 2))
@example(rows=slice(0, 1, -1), kind=0)
@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_rows_by_number(codec: str, rows: Any, kind: int, written: dict[str, Path]) -> None:
    record = opened(written[codec])
    asked = [lambda x: x, np.array, torch.tensor][kind](rows) if isinstance(rows, list) and rows else rows
    for site in SITES:
        wanted = WHOLE.states[site].view(torch.int16).numpy()[rows if rows != [] else slice(0)]
        found = record[site][asked]
        assert found.dtype == record.dtype(site) and found.shape == (*wanted.shape[:-1], record.dim(site))
        assert not found.numel() or np.array_equal(found.view(torch.int16).numpy(), wanted)


_OPENED: dict[Path, Record] = {}


def opened(folder: Path) -> Record:
    return _OPENED.setdefault(folder, open_record(folder))


def test_rows_by_mask_and_one_by_one(written: dict[str, Path]) -> None:
    column = open_record(written["raw"])["a"]
    mask = np.arange(N) % 7 == 0
    assert same(column[mask], WHOLE.states["a"][::7]) and same(column[torch.from_numpy(mask)], column[mask])
    assert same(torch.stack(list(column)), WHOLE.states["a"])
    found = column[:5]
    found.zero_()
    assert same(column[:5], WHOLE.states["a"][:5])
    for wrong in (N, -N - 1, [0, N], 1.5, "a", [[1]], mask[:5], np.array([0.5]), None, slice("a", None)):
        with pytest.raises(UnsupportedOperationError):
            column[wrong]  # type: ignore[index]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.lists(st.integers(0, N - 1), max_size=30))
@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_rows_by_id(codec: str, at: list[int], written: dict[str, Path]) -> None:
    ids = IDS[at].tolist()
    for asked in (ids, IDS[at], WHOLE.rows[at]):
        found = opened(written[codec]).rows(asked)
        assert found.rows.tolist() == ids and torch.equal(found.token_ids, WHOLE.token_ids[at])
        assert all(same(found.states[site], WHOLE.states[site][at]) for site in SITES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.integers(-3, 100 * N_SHARDS + 3), position=st.integers(-2, 14))
def test_documents_and_rows(document: int, position: int, written: dict[str, Path]) -> None:
    record = opened(written["raw"])
    wanted = WHOLE.of(document)
    if not len(wanted):
        with pytest.raises(UnsupportedOperationError, match=rf"documents 0 to {IDS[-1][0]}"):
            record.of(document)
    else:
        found = record.of(document)
        found.check("rows")
        assert torch.equal(found.rows, wanted.rows) and torch.equal(found.token_ids, wanted.token_ids)
        assert all(same(found.states[site], wanted.states[site]) for site in SITES)
    at = ((WHOLE.rows == torch.tensor([document, position])).all(1)).nonzero().flatten()
    for asked in (lambda: record.at(document, position), lambda: record.rows([[document, position]])):
        if len(at):
            assert same(asked().states["b.c"], WHOLE.states["b.c"][at]) and torch.equal(
                asked().rows, WHOLE.rows[at]
            )
        else:
            with pytest.raises(UnsupportedOperationError, match=rf"document {document}\b"):
                asked()


def test_what_is_not_there_is_named(written: dict[str, Path]) -> None:
    record = open_record(written["raw"])
    with pytest.raises(UnsupportedOperationError, match=r"did you mean b\.c"):
        record["b.d"]
    with pytest.raises(UnsupportedOperationError, match="positions 2 to 10"):
        record.at(2, 3)
    assert "a" in record and "x" not in record and list(record) == list(SITES)
    for wrong in ([[1, 2, 3]], [1, 2], [["a", "b"]], [[0.5, 1]]):
        with pytest.raises(UnsupportedOperationError, match="pairs"):
            record.rows(wrong)
    with pytest.raises(UnsupportedOperationError, match=r"document 9223372036854775807"):
        record.rows([[2, 4], [(1 << 63) - 1, 0]])


def test_a_document_in_two_shards(tmp_path: Path) -> None:
    rows = shard(0)
    halves = [HiddenRows(rows.rows[s], rows.token_ids[s], {n: t[s] for n, t in rows.states.items()})
              for s in (slice(0, 12), slice(12, 37))]  # fmt: skip
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        writer.append(halves[0], next=(4, 6), n_read=2, dataset=DIGEST)
        writer.append(halves[1], next=(100, 0), n_read=9, dataset=DIGEST)
    found = open_record(tmp_path / "r").of(4)
    assert torch.equal(found.rows, rows.of(4).rows) and same(found.states["a"], rows.of(4).states["a"])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 50, 37 * 4, N - 1, N, 8192])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_blocks_hold_each_row_once(codec: str, size: int, seed: int | None, written: dict[str, Path]) -> None:
    record = open_record(written[codec])
    found = list(record.blocks(size, sites=["b.c"], seed=seed))
    assert [len(block) for block in found] == [size] * (N // size) + [N % size] * (N % size > 0)
    ids = torch.cat([block.rows for block in found])
    order = np.lexsort((ids[:, 1].numpy(), ids[:, 0].numpy()))
    assert seed is not None or np.array_equal(order, np.arange(N))
    assert np.array_equal(ids[order].numpy(), IDS)
    assert torch.equal(torch.cat([block.token_ids for block in found])[order], WHOLE.token_ids)
    states = torch.cat([block.states["b.c"] for block in found])[order]
    assert same(states, record["b.c"][:]) and found[0].states.keys() == {"b.c"}
    assert found[0].n_bytes == len(found[0]) * 32


@pytest.mark.parametrize("codec", CODECS)
def test_the_order_is_the_seeds(codec: str, written: dict[str, Path]) -> None:
    def order(seed: int) -> list[tuple[int, int]]:
        blocks = open_record(written[codec]).blocks(50, sites=["a"], seed=seed)
        return [(*row,) for block in blocks for row in block.rows.tolist()]

    assert order(3) == order(3) and order(3) != order(4)


def test_arguments_of_blocks(written: dict[str, Path]) -> None:
    record = open_record(written["raw"])
    for wrong in ({"size": 0}, {"size": 1.5}, {"seed": -1}, {"seed": "x"}, {"sites": ["x"]}):
        with pytest.raises(UnsupportedOperationError):
            record.blocks(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40,960 rows of 64 float32 in 20 shards, 10 MiB: row `i` is `i` everywhere."""
    found = {}
    for codec in ("raw", "exact"):
        found[codec] = tmp_path_factory.mktemp("long") / codec
        one = plan(codec, states=["x"])
        with RecordWriter.open(found[codec], one, ORIGIN, codec=codec, verify=False) as writer:
            for number in range(20):
                at = torch.arange(2048) + 2048 * number
                rows = HiddenRows(torch.stack([at, 0 * at], 1), at, {"x": at[:, None].expand(-1, 64).float()})
                writer.append(rows, next=(2048 * number + 2048, 0), n_read=number, dataset=DIGEST)
    return found


@pytest.mark.parametrize(("codec", "most"), [("raw", 8), ("exact", 12)])
def test_blocks_take_bounded_memory(codec: str, most: int, long: dict[str, Path]) -> None:
    for seed in (None, 0):
        tracemalloc.start()
        for block in open_record(long[codec]).blocks(512, seed=seed):
            assert torch.equal(block.states["x"][:, 0].long(), block.rows[:, 0])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A shard is 0.5 MiB, a block a quarter of that.
        assert peak < most << 19, peak


@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_shuffled_blocks_come_from_everywhere(codec: str, long: dict[str, Path]) -> None:
    found = [block.rows[:, 0].numpy() for block in open_record(long[codec]).blocks(1024, seed=0)]
    n_shards = [len(np.unique(rows // 2048)) for rows in found]
    # 4096 rows of a pool are 16 runs.
    assert min(n_shards) >= (6 if codec == "raw" else 4) and POOL_BLOCKS * 1024 == 16 * RUN_ROWS
    assert all(np.mean(np.diff(rows) == 1) < 0.05 for rows in found)
    assert abs(np.mean(found[0]) - np.mean(found[-1])) < 20_000


def test_a_coded_shard_is_decoded_once_an_epoch(long: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import semq_state.records.shards as module

    loaded: list[str] = []
    load = module.files.load
    monkeypatch.setattr(module.files, "load", lambda path: loaded.append(Path(path).name) or load(path))
    record = open_record(long["exact"])
    for seed in (None, 0):
        loaded.clear()
        for _ in record.blocks(300, seed=seed):
            pass
        assert len(loaded) <= 20 and len(set(loaded)) == len(loaded)


def test_only_the_shards_of_the_rows_are_read(folder: Path) -> None:
    for number in range(N_SHARDS):
        if number not in (0, 4):
            (folder / f"shard-{number:06d}.safetensors").unlink()
    record = open_record(folder)
    assert len(record) == N and repr(record)
    assert same(record["a"][37 * 4 : 37 * 5], shard(4).states["a"]) and same(
        record["a"][[0, 150]], WHOLE.states["a"][[0, 150]]
    )
    assert len(record.of(404)) == 5
    for asked in (lambda: record["a"][:], lambda: record["a"][40], lambda: record.numpy("a"), lambda: record.ids):
        with pytest.raises(StoreError, match="shard-000001"):
            asked()
    with pytest.raises(IntegrityError, match="none"):
        RecordWriter.open(folder, plan(), ORIGIN)
    assert list(record.verify()) == [f"shard-{n:06d}.safetensors" for n in range(N_SHARDS) if n not in (0, 4)]


# Exports.


def test_numpy(written: dict[str, Path], tmp_path: Path) -> None:
    record = open_record(written["raw"])
    assert np.array_equal(record.numpy("a"), WHOLE.states["a"].numpy())
    assert np.array_equal(record.numpy("b.c"), WHOLE.states["b.c"].float().numpy())
    with RecordWriter.open(tmp_path / "r", plan(), ORIGIN) as writer:
        add(writer, 0)
    mapped = open_record(tmp_path / "r").numpy("a")
    assert np.array_equal(mapped, shard(0).states["a"].numpy()) and mapped.dtype == np.float32
    assert not mapped.flags.writeable and not mapped.flags.owndata
    assert open_record(tmp_path / "r").numpy("b.c").dtype == np.float32


def test_an_index_and_a_semq_file(written: dict[str, Path], tmp_path: Path) -> None:
    record = open_record(written["raw"])
    index = record.index("a")
    wanted = sq.SymbolIndex(24)
    wanted.add(WHOLE.states["a"], IDS[:, 0] * 2**32 + IDS[:, 1])
    assert index.index_id == wanted.index_id
    found = index.search(WHOLE.states["a"][:5], k=1).ids[:, 0]
    assert [divmod(int(each), 2**32) for each in found] == [(*row,) for row in IDS[:5].tolist()]
    assert record.index("b.c", operator="phase", parameter=8).operator.parameter == 8
    record.semq(tmp_path / "a.semq", "a")
    own = sq.SymbolIndex(24, c=2.0)
    own.add(WHOLE.states["a"], IDS[:, 0] * 2**32 + IDS[:, 1])
    read = read_semq_index(tmp_path / "a.semq")
    assert np.array_equal(read.contents().packed, own.contents().packed) and np.array_equal(read.ids, own.ids)
    record.semq(tmp_path / "b.semq", "b.c", operator="orbit")
    with pytest.raises(UnsupportedOperationError):
        record.semq(tmp_path / "c.semq", "a", c=3.0)


def test_a_datasets_table(written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    table = open_record(written["exact"]).dataset()
    assert table.column_names == ["document", "position", "token_id", *SITES] and len(table) == N
    found = table.with_format("numpy")
    assert np.array_equal(np.stack([found["document"], found["position"]], 1), IDS)
    assert np.array_equal(found["token_id"], WHOLE.token_ids.numpy())
    for site in SITES:
        assert np.array_equal(np.asarray(found[site]), WHOLE.states[site].float().numpy())
        assert table.features[site].length == WHOLE.states[site].shape[1]
    one = open_record(written["exact"]).dataset(["a"])
    assert one.column_names == ["document", "position", "token_id", "a"]


def test_without_datasets(written: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'semq-state\[datasets\]'"):
        open_record(written["raw"]).dataset()


def test_a_record_goes_to_another_process(written: dict[str, Path]) -> None:
    import pickle

    record = open_record(written["raw"])
    record["a"][:3]
    again = pickle.loads(pickle.dumps(record))  # noqa: S301
    assert again.record_id == record.record_id and same(again["a"][:], WHOLE.states["a"])


# Damage and malice.


@pytest.mark.parametrize("codec", CODECS)
def test_verify_finds_changed_bytes(codec: str, written: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(written[codec], folder)
    chance, done, n_found = random.Random(1), [], 0
    path = folder / "shard-000003.safetensors"
    whole, wanted = path.read_bytes(), sq.load(path)
    begin = int.from_bytes(whole[:8], "little") + 8
    for _ in range(12):
        data = bytearray(whole)
        data[chance.randrange(begin, len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(data))
        failures = open_record(folder).verify(lambda n, total: done.append(n / total))
        assert list(failures) in ([], [path.name])
        n_found += len(failures)
        if not failures:  # a bit of what a writer says of itself, or that a codec does not use
            found = sq.load(path).hidden["sequence"]
            assert all(same(found.states[s], wanted.hidden["sequence"].states[s]) for s in SITES)
            assert torch.equal(found.rows, shard(3).rows) and torch.equal(found.token_ids, shard(3).token_ids)
    assert n_found >= 9 and done[-1] == 1 and len(done) == 12 * N_SHARDS


def test_swapped_shards(folder: Path) -> None:
    first, second = folder / "shard-000001.safetensors", folder / "shard-000002.safetensors"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    record = open_record(folder)
    assert same(record["a"][:37], shard(0).states["a"])
    for asked in (
        lambda: record["a"][37], lambda: record.of(100), lambda: record.ids, lambda: touch_all(record),
        lambda: list(record.blocks(seed=0)), lambda: record.rows([[100, 2]]), lambda: record.numpy("a"),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match="shard-000001"):
            asked()
    failures = record.verify()
    assert list(failures) == [first.name, second.name]
    assert all(isinstance(failure, IntegrityError) for failure in failures.values())


@pytest.mark.parametrize("n_bytes", [0, 7, 100, 3000, -1])
def test_a_shorter_shard_is_refused_before_it_is_mapped(n_bytes: int, folder: Path) -> None:
    path = folder / "shard-000001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:n_bytes])
    record = open_record(folder)
    with pytest.raises(FormatError, match="shard-000001"):
        record["a"][40]
    path.write_bytes(data)
    assert same(record["a"][40], WHOLE.states["a"][40])
    with pytest.raises(IntegrityError, match="a file of"):
        path.write_bytes(data[:-1])
        RecordWriter.open(folder, plan(), ORIGIN)


def test_a_shard_that_became_shorter_is_not_mapped_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import semq_state.records.shards as module

    monkeypatch.setattr(module, "MAX_MAPPED", 2)
    record = open_record(folder)
    touch_all(record)
    assert len(record._shards._mapped._held) == 2
    os.truncate(folder / "shard-000001.safetensors", 3000)
    with pytest.raises(IntegrityError, match="3000"):
        record["a"][40]


def test_the_same_record_with_its_shard_from_another(folder: Path, written: dict[str, Path]) -> None:
    shutil.copy(written["exact"] / "shard-000001.safetensors", folder)
    record = open_record(folder)  # the same state under another lossless codec is the same state
    assert same(record["a"][:], WHOLE.states["a"]) and record.verify() == {}
    shutil.copy(written["semq"] / "shard-000001.safetensors", folder)
    with pytest.raises(IntegrityError, match="shard-000001"):
        open_record(folder)["a"][40]


Edit = Callable[[list[dict[str, Any]]], Any]

EDITS: dict[str, Edit] = {
    "number": lambda lines: lines[2].update(number=3),
    "name": lambda lines: lines[2].update(number="../../x"),
    "field": lambda lines: lines[2].update(file="x"),
    "no field": lambda lines: lines[2].pop("n_read"),
    "state_id": lambda lines: lines[2].update(state_id="sha256:x"),
    "another state": lambda lines: lines[2].update(state_id=f"sha256:{'a' * 64}"),
    "rows": lambda lines: lines[2].update(n_rows=36),
    "no rows": lambda lines: lines[2].update(n_rows=0),
    "many rows": lambda lines: lines[2].update(n_rows=1 << 40),
    "true": lambda lines: lines[2].update(n_rows=True),
    "float": lambda lines: lines[2].update(n_bytes=1.5),
    "negative": lambda lines: lines[2].update(n_read=-1),
    "first": lambda lines: lines[2].update(first=[0, 0]),
    "first alone": lambda lines: lines[2].update(first=[200]),
    "first of text": lambda lines: lines[2].update(first=["a", "b"]),
    "last": lambda lines: lines[2].update(last=[1 << 32, 0]),
    "position": lambda lines: lines[2].update(last=[200, 1 << 32]),
    "next": lambda lines: lines[2].update(next=[0, 0]),
    "dataset": lambda lines: lines[2].update(dataset=""),
    "a list": lambda lines: lines.__setitem__(2, []),
    "dropped": lambda lines: lines.pop(2),
    "last dropped": lambda lines: lines.pop(-2),
    "twice": lambda lines: lines.insert(2, lines[2]),
    "swapped": lambda lines: lines.insert(2, lines.pop(3)),
    "after the end": lambda lines: lines.append(lines[2]),
    "ended twice": lambda lines: lines.append(lines[-1]),
    "n_documents": lambda lines: lines[-1]["complete"].update(n_documents=3),
    "n_rows": lambda lines: lines[-1]["complete"].update(n_rows=3),
    "n_shards": lambda lines: lines[-1]["complete"].update(n_shards=3),
    "record_id": lambda lines: lines[-1]["complete"].update(record_id=f"sha256:{'a' * 64}"),
    "more": lambda lines: lines[-1]["complete"].update(more=3),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_journal_is_refused(name: str, folder: Path) -> None:
    lines = journal(folder)
    EDITS[name](lines)
    rewrite(folder, lines)
    with pytest.raises(FormatError, match=r"shards\.jsonl"):
        open_record(folder)


UNSEEN: dict[str, Edit] = {
    "another state": EDITS["another state"],
    "fewer rows": EDITS["rows"],
    "more rows": lambda lines: lines[2].update(n_rows=39, last=[216, 10]),
    "first": lambda lines: lines[2].update(first=[200, 1]),
    "last": lambda lines: lines[2].update(last=[214, 5]),
    "next state": lambda lines: lines[2].update(state_id=lines[1]["state_id"]),
    # More than any memory: refused before room is made for it.
    "all rows": lambda lines: lines[2].update(n_rows=1 << 47, last=[99_999, 0], next=[100_000, 0]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_an_edited_journal_without_its_end_is_refused_with_the_shard(name: str, folder: Path) -> None:
    lines = journal(folder)[:3]
    UNSEEN[name](lines)
    rewrite(folder, lines)
    record = open_record(folder)
    n = len(record)
    for asked in (
        lambda: record["a"][80], lambda: record["a"][:], lambda: record["a"][:n:3], lambda: record.ids,
        lambda: record.of(200), lambda: touch_all(record), lambda: list(record.blocks(seed=0)),
        lambda: record.numpy("a"), lambda: record.rows([[202, 4]]), lambda: record.index("a"),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match="shard-000002"):
            asked()
    assert list(record.verify()) == ["shard-000002.safetensors"]


def test_more_rows_than_ids_are_refused(folder: Path) -> None:
    lines = journal(folder)[:3]
    lines[2].update(n_rows=1 << 40)
    rewrite(folder, lines)
    with pytest.raises(IntegrityError, match="line 3"):
        open_record(folder)


def test_lines_of_another_rendering_are_refused(folder: Path) -> None:
    whole = (folder / "shards.jsonl").read_bytes()
    for old, new in (
        (b'"n_read":1,', b'"n_read": 1,'),
        (b'"n_read":1,', b'"n_read":0,"n_read":1,'),
        (b"}\n", b"}\r\n"),
    ):
        (folder / "shards.jsonl").write_bytes(whole.replace(old, new, 1))
        with pytest.raises(FormatError, match="line 1"):
            open_record(folder)


DEEP = json.loads("[" * 70 + "]" * 70)

HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda told: told.update(format="other"),
    "version": lambda told: told.update(format_version=2),
    "version of text": lambda told: told.update(format_version="1"),
    "field": lambda told: told.update(more=1),
    "no field": lambda told: told.pop("plan"),
    "plan": lambda told: told.update(plan=[]),
    "plan_id": lambda told: told.update(plan_id=f"sha256:{'a' * 64}"),
    "plan_id of text": lambda told: told.update(plan_id="x"),
    "other plan": lambda told: told["plan"].update(max_tokens=5),
    "other weights": lambda told: told["provenance"].update(weights=f"sha256:{'a' * 64}"),
    "provenance": lambda told: told.update(provenance=3),
    "provenance field": lambda told: told["provenance"].update(more=3),
    "threads": lambda told: told["provenance"].update(threads="3"),
    "deep": lambda told: told["provenance"].update(config={"x": DEEP}),
    "large": lambda told: told["provenance"].update(config={"x": 1 << 70}),
    "surrogate": lambda told: told["provenance"].update(config={"x": "\ud800"}),
    "states": lambda told: told["plan"].update(states="ab"),
    "no states": lambda told: told["plan"].update(states=[]),
    "states twice": lambda told: told["plan"].update(states=["a", "a"]),
    "states of numbers": lambda told: told["plan"].update(states=[1]),
    "long states": lambda told: told["plan"].update(states=["x" * 5000]),
    "stream": lambda told: told["plan"].update(stream="x"),
    "stream of list": lambda told: told["plan"].update(stream=[]),
    "pool": lambda told: told["plan"].update(pool="max"),
    "dtype": lambda told: told["plan"].update(dtype="int8"),
    "tokens": lambda told: told["plan"].update(tokens=None),
    "size": lambda told: told["plan"].update(shard_bytes=-1),
    "true": lambda told: told["plan"].update(batch_tokens=True),
    "huge": lambda told: told["plan"].update(batch_tokens=1 << 60),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description_is_refused(name: str, folder: Path) -> None:
    told = json.loads((folder / "record.json").read_bytes())
    HOSTILE[name](told)
    (folder / "record.json").write_bytes(render(told))
    with pytest.raises(FormatError, match=r"record\.json") as refusal:
        open_record(folder)
    # The digest alone would find most of these, but whoever edits can compute it.
    assert isinstance(refusal.value, IntegrityError) == (name in ("plan_id", "other plan", "other weights"))
    with pytest.raises(FormatError, match=r"record\.json"):
        RecordWriter.open(folder, plan(), ORIGIN)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null\n", b"{}\n", b"[" * 100_000, b"1" * 5000, b"NaN\n"])
def test_a_description_that_is_none(data: bytes, folder: Path) -> None:
    (folder / "record.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"record\.json"):
        open_record(folder)


def test_a_description_of_other_rendering_or_too_large(folder: Path) -> None:
    data = (folder / "record.json").read_bytes()
    (folder / "record.json").write_bytes(b" " + data)
    with pytest.raises(FormatError, match="rendering"):
        open_record(folder)
    with (folder / "record.json").open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(FormatError, match="at most"):
        open_record(folder)
    (folder / "record.json").write_bytes(data)
    with (folder / "shards.jsonl").open("r+b") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(FormatError, match="at most"):
        open_record(folder)


def test_pipes_and_links_are_no_records(folder: Path, tmp_path: Path) -> None:
    for name in ("record.json", "shards.jsonl"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(StoreError, match="regular"):
            open_record(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    rewrite(folder, journal(folder)[:3])
    (tmp_path / "mine").write_bytes((folder / "shards.jsonl").read_bytes())
    (folder / "shards.jsonl").unlink()
    (folder / "shards.jsonl").symlink_to(tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    with RecordWriter.open(folder, plan(), ORIGIN) as writer, pytest.raises(StoreError):
        add(writer, 3)
    assert (tmp_path / "mine").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"states": ["a", "b.d"]}, {"stream": "encoder"}, {"pool": "mean"}, {"tokens": "last"}]
)
def test_shards_that_are_not_of_the_plan_are_refused(change: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    RecordWriter.open(tmp_path / "other", plan(**change), ORIGIN).close()
    shutil.copy(tmp_path / "other" / "record.json", folder)
    rewrite(folder, journal(folder)[:3])
    record = open_record(folder)
    with pytest.raises(IntegrityError, match="hidden states"):
        touch_all(record)
    assert len(record.verify()) == 3


def test_shards_of_other_dims_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = dataclasses.replace(shard(2), states={"a": torch.zeros(37, 25), "b.c": shard(2).states["b.c"]})
    with RecordWriter.open(tmp_path / "other", plan(), ORIGIN) as writer:
        add(writer, 2, rows)
    lines = journal(folder)[:3]
    lines[2]["state_id"] = journal(tmp_path / "other")[0]["state_id"]
    shutil.copy(tmp_path / "other" / "shard-000000.safetensors", folder / "shard-000002.safetensors")
    rewrite(folder, lines)
    record = open_record(folder)
    with pytest.raises(IntegrityError, match="as in the first shard"):
        record["a"][80]
    assert list(record.verify()) == ["shard-000002.safetensors"]


def test_many_lines_are_opened_without_their_shards(written: dict[str, Path], tmp_path: Path) -> None:
    folder, line = tmp_path / "r", journal(written["raw"])[0]
    folder.mkdir()
    shutil.copy(written["raw"] / "record.json", folder)
    rewrite(
        folder,
        [
            line | {"number": i, "first": [50 * i, 2], "last": [50 * i + 20, 2], "next": [50 * i + 50, 0]}
            for i in range(10_000)
        ],
    )
    began = time.perf_counter()
    record = open_record(folder)
    assert len(record) == 370_000 and record.n_documents == 499_971 and not record.complete
    assert time.perf_counter() - began < 5


def test_every_refusal_is_ours() -> None:
    assert issubclass(IntegrityError, SemqStateError) and Plan.from_dict(plan().as_dict()) == plan()
