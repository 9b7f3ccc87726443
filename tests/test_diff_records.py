"""`sq.diff`, `sq.measure_floor` and `sq.verify` of records: what they say of snapshots, on folders."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_diff import CELL, SCHEMA, held
from test_diff_hidden import KEY, flipped, hidden, holding, noisy, numbers, taken, with_site
from test_signing import pairs as pairs
from workers.made import provenance, random

import semq_state as sq
from semq_state.audit import row_cells, rows
from semq_state.audit.floor_files import load_floor
from semq_state.records import Plan, Record, RecordWriter, open_record
from semq_state.snapshot import HiddenRows

DATASET = f"sha256:{'0' * 64}"
OWN = hidden(12, 9, 1, 8)  # 30 rows


def written(
    folder: Path,
    own: HiddenRows,
    *,
    n_shards: int = 3,
    complete: bool = True,
    codec: str = "raw",
    origin: Any = None,
    **plan: Any,
) -> Record:
    """A record of these rows in so many shards."""
    settings = {"stream": "sequence", "dtype": "", "codec": codec, "max_tokens": 64, "batch_tokens": 64,
                "shard_bytes": 1000, **plan}  # fmt: skip
    told = Plan(states=tuple(sorted(own.states)), tokens=own.tokens, pool=own.pool, **settings)
    with RecordWriter.open(folder, told, origin or provenance(), codec=codec, verify=False) as writer:
        for i in range(n_shards):
            part = taken(own, slice(i * len(own) // n_shards, (i + 1) * len(own) // n_shards))
            if len(part):
                document, position = part.rows[-1].tolist()
                writer.append(part, next=(document, position + 1), n_read=i, dataset=DATASET)
        if complete:
            writer.finish(100)
    return open_record(folder)


def cells_of(report: Any) -> dict[str, Any]:
    return {cell.key: numbers(cell) for cell in report.cells if cell.kind == "hidden"}


@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_equal_rows_are_equal_however_they_were_cut(codec: str, tmp_path: Path) -> None:
    a = written(tmp_path / "a", OWN)
    b = written(tmp_path / "b", OWN, n_shards=2, codec=codec, batch_tokens=7)
    report = sq.diff(a, tmp_path / "b")
    assert report.equal and a.record_id != b.record_id
    assert (report.a, report.b) == (a.record_id, b.record_id)
    assert {d.name for d in report.provenance} >= {"plan.batch_tokens"}, "told, and does not count"
    assert report.tokens.as_dict() == {"n_a": 30, "n_b": 30, "first": [None], "values": None, "document": None}
    assert [(cell.key, cell.n_vectors) for cell in report.cells] == [
        (f"hidden.sequence.hidden_states.{i}", 30) for i in range(3)
    ]


def test_one_bit_in_one_row(tmp_path: Path) -> None:
    other = with_site(OWN, r22=flipped(OWN.states["hidden_states.1"][22]))
    report = sq.diff(written(tmp_path / "a", OWN), written(tmp_path / "b", other))
    cell = report.cell(KEY)
    assert (cell.n_bits_changed, cell.n_vectors, cell.first_row) == (1, 30, (3, 0))
    assert (report.first_row, report.first_token, report.first_layer, report.equal) == ((3, 0), 0, 1, False)
    assert [c.key for c in report.cells if not c.equal] == [KEY]


@pytest.mark.parametrize("n_values", [16, 64, 1 << 20])
def test_numbers_do_not_depend_on_blocks(n_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = OWN.states["hidden_states.1"]
    changed = {f"r{i}": states[i] * 1.5 for i in (3, 4, 29)} | {"r20": torch.full((16,), float("nan"))}
    a = written(tmp_path / "a", OWN, codec="exact")
    b = written(tmp_path / "b", taken(with_site(OWN, **changed), [*range(7), *range(8, 30)]), n_shards=4)
    whole = sq.diff(a, b)
    monkeypatch.setattr(row_cells, "VALUES", n_values)
    monkeypatch.setattr(rows, "PAIRS", 3)
    found = sq.diff(a, b)
    assert json.dumps(found.as_dict()["tokens"]) == json.dumps(whole.as_dict()["tokens"])
    for key, said in cells_of(found).items():
        for name, value in cells_of(whole)[key].items():
            if name in ("relative", "mean_cosine"):
                value = pytest.approx(value)
            assert name == "per_token" or said[name] == value, name
        assert said["per_token"]["n_vectors"] == cells_of(whole)[key]["per_token"]["n_vectors"]
        assert said["per_token"]["relative"] == pytest.approx(cells_of(whole)[key]["per_token"]["relative"])
    assert (found.cell(KEY).n_only_a, found.cell(KEY).n_not_finite, found.cell(KEY).first_row) == (1, 1, (0, 3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_diff_of_records_is_that_of_the_same_rows_in_snapshots(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("records")
    n = len(OWN)
    left, right = (sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))) for _ in range(2))
    changed = data.draw(st.sets(st.integers(0, n - 1), max_size=5))
    row = data.draw(st.sampled_from([torch.zeros(16), torch.full((16,), float("inf")), random(16, seed=5)]))
    tokens = OWN.token_ids.clone()
    tokens[sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=3)))] += 1
    other = dataclasses.replace(with_site(OWN, **{f"r{i}": row for i in changed}), token_ids=tokens)
    a, b = taken(OWN, left), taken(other, right)
    threshold = data.draw(st.sampled_from([0, 0.5]))
    shards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    of_records = sq.diff(
        written(folder / "a", a, n_shards=shards[0]),
        written(folder / "b", b, n_shards=shards[1], codec="exact"),
        threshold=threshold,
    )
    of_snapshots = sq.diff(holding(a, batch=4), holding(b, batch=4), threshold=threshold)
    assert cells_of(of_records) == cells_of(of_snapshots)
    assert of_records.missing == {k: v for k, v in of_snapshots.missing.items() if k.startswith("hidden.")}
    assert of_records.first_row == of_snapshots.first_row
    parted = [i for i in left if i in right and tokens[i] != OWN.token_ids[i]]
    earliest = min(parted, key=lambda i: (int(OWN.rows[i, 1]), i), default=None)
    found = of_records.tokens
    assert (found.n_a, found.n_b) == (len(left), len(right))
    if earliest is None:
        assert (found.earliest, found.row, found.values) == (None, None, None)
    else:
        assert [found.row, found.earliest] == OWN.rows[earliest].tolist()
        assert found.values == (int(OWN.token_ids[earliest]), int(tokens[earliest]))
    assert ("hidden.sequence.token_ids" in of_snapshots.others) == bool(parted)
    same = left == right and not parted and not (changed & {*left})
    assert of_records.equal == of_snapshots.equal == same


def test_shuffled_documents(tmp_path: Path) -> None:
    report = sq.diff(written(tmp_path / "a", OWN), written(tmp_path / "b", OWN.select([1, 0, 2, 3])))
    cell = report.cell(KEY)
    assert (cell.n_vectors, cell.n_only_a, cell.n_only_b, cell.n_bits_changed) == (27, 3, 3, 18)
    assert (report.tokens.earliest, report.tokens.document, report.tokens.row) == (0, 0, 0)
    assert report.tokens.values == (0, 100) and report.as_dict()["tokens"]["document"] == 0


def test_where_tokens_part_is_the_lowest_position(tmp_path: Path) -> None:
    tokens = OWN.token_ids.clone()
    tokens[[9, 16, 25]] += 7  # (0, 9), (1, 4), (3, 3)
    report = sq.diff(
        written(tmp_path / "a", OWN), written(tmp_path / "b", dataclasses.replace(OWN, token_ids=tokens))
    )
    assert report.tokens == sq.diff(tmp_path / "a", tmp_path / "b").tokens
    assert (report.tokens.earliest, report.tokens.row, report.tokens.values) == (3, 3, (303, 310))
    assert report.first_token == 3 and not report.equal and all(cell.equal for cell in report.cells)


def test_of_several_documents_that_part_there_the_first_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PAIRS", 3)
    tokens = OWN.token_ids.clone()
    tokens[[15, 25]] += 7  # (1, 3), (3, 3)
    other = written(tmp_path / "b", dataclasses.replace(OWN, token_ids=tokens))
    found = sq.diff(written(tmp_path / "a", OWN), other).tokens
    assert (found.earliest, found.document, found.values) == (3, 1, (103, 110))


def test_what_a_plan_means_is_of_the_structure(tmp_path: Path) -> None:
    a = written(tmp_path / "a", OWN)
    chosen = written(tmp_path / "b", dataclasses.replace(OWN, tokens="chosen"))
    assert [str(d) for d in sq.diff(a, chosen).structure] == ["plan.tokens: expected all, found chosen"]
    encoder = sq.diff(a, written(tmp_path / "c", OWN, stream="encoder"))
    assert [d.name for d in encoder.structure] == ["plan.stream"] and not encoder.equal
    pooled = sq.diff(a, written(tmp_path / "d", hidden(1, 1, pool="mean")))
    assert "plan.pool" in {d.name for d in pooled.structure} and not pooled.cells
    assert pooled.missing[KEY] == "a row for each token in a, pooled (mean) in b"


def test_sites_dtypes_and_dims(tmp_path: Path) -> None:
    a = written(tmp_path / "a", OWN)
    less = {n: t for n, t in OWN.states.items() if n != "hidden_states.1"}
    assert sq.diff(a, written(tmp_path / "b", dataclasses.replace(OWN, states=less))).missing == {KEY: "only in a"}
    half = sq.diff(a, written(tmp_path / "c", OWN.map(lambda t: t.half())))
    assert {d.name for d in half.structure} == {f"hidden.sequence.hidden_states.{i}.dtype" for i in range(3)}
    assert 0 < half.cell(KEY).relative < 1e-3
    wide = {**OWN.states, "hidden_states.1": random(30, 8)}
    with pytest.raises(sq.ModelMismatchError, match=re.escape(f"{KEY}, dim: expected 16, found 8")):
        sq.diff(a, written(tmp_path / "d", dataclasses.replace(OWN, states=wide)))


def test_another_model_is_refused_unless_asked_for(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", OWN), written(tmp_path / "b", OWN, origin=provenance("sha256:cd"))
    with pytest.raises(sq.ModelMismatchError, match="weights"):
        sq.diff(a, b)
    assert sq.diff(a, b, across_models=True).equal


def test_a_snapshot_and_a_record_are_refused(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", OWN), holding(OWN)
    for pair_of in ((a, b), (b, a)):
        with pytest.raises(sq.UnsupportedOperationError, match=r"two snapshots or two records, found a (s|r)"):
            sq.diff(*pair_of)
    with pytest.raises(sq.UnsupportedOperationError, match="a record and a snapshot"):
        sq.measure_floor(a, [b])


def test_an_incomplete_record_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    a = written(tmp_path / "a", OWN)
    b = written(tmp_path / "b", taken(with_site(OWN, r5=torch.zeros(16)), slice(0, 20)), complete=False)
    report = sq.diff(a, b)
    assert report.missing == {"end of b": "the record is incomplete, 20 rows so far"}
    cell = report.cell(KEY)
    assert (cell.n_vectors, cell.n_only_a, cell.n_bits_changed) == (20, 10, 1)
    same = sq.diff(b, b)
    assert not same.equal and same.missing.keys() == {"end of a", "end of b"}, "what is to come may be anything"
    empty = written(tmp_path / "c", OWN, n_shards=0, complete=False)
    report = sq.diff(a, empty)
    assert report.missing["end of b"] == "the record is incomplete, 0 rows so far"
    assert report.missing[KEY] == "no row in common: 30 in a, 0 in b" and not report.structure
    assert sq.diff(*(written(tmp_path / name, OWN, n_shards=0) for name in "de")).equal
    half = written(tmp_path / "f", OWN.map(lambda t: t.half()))
    assert not sq.diff(half, empty).structure, "no row, no dtype"


def test_memory_is_bounded_and_progress_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from semq_state.records import Column

    monkeypatch.setattr(row_cells, "VALUES", 16 * 4)
    asked, seen = [], []
    get = Column.__getitem__

    def counted(self: Column, at: Any) -> torch.Tensor:
        found = get(self, at)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Column, "__getitem__", counted)
    other = with_site(OWN, r22=torch.zeros(16))
    a, b = written(tmp_path / "a", OWN), written(tmp_path / "b", other, n_shards=5)
    sq.diff(a, b, progress=lambda done, total: seen.append((done, total)))
    assert max(asked) <= 4
    # Each block once on each side, and once more those that are equal in the site that is not.
    assert sum(asked) == 2 * 3 * 30 + 26
    assert seen == sorted(seen) and seen[-1] == (3 * 30 * 16 * 4,) * 2


def test_floors_of_records(tmp_path: Path) -> None:
    own = hidden(200, 200)
    written(tmp_path / "own", own)
    nulls = [written(tmp_path / f"null{n}", noisy(own, n, seed=n), batch_tokens=n) for n in (3, 17)]
    floor = sq.measure_floor(tmp_path / "own", [nulls[0], ("17", nulls[1])])
    assert floor.reference == open_record(tmp_path / "own").record_id and floor.varied == ()
    cell = next(cell for cell in floor.cells if cell.name == KEY)
    assert (cell.changed, cell.total, cell.p99) == (17, 400, 1)
    for n, outcome in ((0, "equal"), (42, "within"), (43, "different")):
        found = written(tmp_path / f"found{n}", noisy(own, n, seed=9))
        assert sq.diff(tmp_path / "own", found).within(floor).outcome == outcome
    part = written(tmp_path / "part", taken(own, slice(0, 399)))
    with pytest.raises(
        sq.FloorError, match=r"null run 1 \(.*part\): expected the reference's 400 tokens, found 399"
    ):
        sq.measure_floor(tmp_path / "own", [tmp_path / "part"])
    assert sq.diff(tmp_path / "own", part).within(floor).outcome == "different"
    open_end = written(tmp_path / "open", own, complete=False)
    with pytest.raises(sq.FloorError, match=r"null run 1, end of b: .*incomplete"):
        sq.measure_floor(tmp_path / "own", [open_end])
    assert sq.diff(tmp_path / "own", open_end).within(floor).reasons == (
        "end of b: the record is incomplete, 400 rows so far",
    )


# Verify


def damaged(record: Record, number: int) -> str:
    """Flips a byte of one shard's states; gives its name."""
    path = record.shards[number]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    return path.name


def test_verify_names_the_shard(tmp_path: Path) -> None:
    record = written(tmp_path / "a", OWN)
    found = sq.verify(tmp_path / "a")
    assert found.passed and (found.state_id, found.n_sections, found.vouched) == (record.record_id, 3, None)
    assert found.signature == "no signature"
    seen: list[tuple[int, int]] = []
    sq.verify(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (record.n_bytes,) * 2
    name = damaged(record, 1)
    assert list(sq.verify(tmp_path / "a").failures) == [name]
    record.shards[2].unlink()
    assert list(sq.verify(tmp_path / "a").failures) == [name, record.shards[2].name]
    (tmp_path / "a" / "record.json").write_text("{}")
    found = sq.verify(tmp_path / "a")
    assert list(found.failures) == ["record"] and not found.passed
    with pytest.raises(sq.StoreError):
        sq.verify(tmp_path)


def test_an_incomplete_record_is_not_whole(tmp_path: Path) -> None:
    written(tmp_path / "a", OWN, complete=False)
    found = sq.verify(tmp_path / "a")
    assert found.unchecked == {"end": "the record is incomplete, 30 rows so far"}
    assert not found.failures and not found.whole


def test_each_shard_must_be_signed(tmp_path: Path, pairs: Path) -> None:
    record = written(tmp_path / "a", OWN)
    private, public = pairs / "ed25519", pairs / "ed25519.pub"
    assert sq.verify(tmp_path / "a", key=public).vouched is False
    for shard in record.shards[:2]:
        sq.sign(shard, private)
    found = sq.verify(tmp_path / "a", key=public)
    assert found.vouched is False and found.whole and not found.passed
    assert found.signature.startswith("2 of 3 shards are signed by the keys; shard-000002.safetensors: ")
    sq.sign(record.shards[2], private)
    found = sq.verify(tmp_path / "a", key=public)
    assert found.vouched and found.passed and found.signature.startswith("each of 3 shards signed by ")
    assert found.signature.endswith("nobody signed that these are all")
    unasked = sq.verify(tmp_path / "a")
    assert unasked.vouched is None and unasked.signers == found.signers and "not checked" in unasked.signature
    assert sq.verify(written(tmp_path / "b", OWN, n_shards=0).folder, key=public).vouched is False


def test_a_damaged_signature_inside_a_shard_fails_it(tmp_path: Path, pairs: Path) -> None:
    record = written(tmp_path / "a", OWN)
    sq.sign(record.shards[1], pairs / "ed25519", inside=True)
    assert sq.verify(tmp_path / "a").passed
    data = record.shards[1].read_bytes()
    at = data.rindex(b"payloadType")
    record.shards[1].write_bytes(data[:at] + b"PayloadType" + data[at + 11 :])
    assert list(sq.verify(tmp_path / "a").failures) == [record.shards[1].name]


# JSON and the command line


def test_json_has_the_documented_fields(tmp_path: Path) -> None:
    other = with_site(OWN, r22=torch.zeros(16))
    report = sq.diff(written(tmp_path / "a", OWN), written(tmp_path / "b", other))
    said = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert said.pop("first_row") == [3, 0]
    held(said, SCHEMA)
    for cell in said["cells"]:
        cell.pop("first_row")
        held(cell, CELL)


def test_command_line_answers_and_exit_codes(cli: Any, tmp_path: Path) -> None:
    tokens = OWN.token_ids.clone()
    tokens[15] += 1
    made: dict[str, tuple[HiddenRows, dict[str, Any]]] = {
        "a": (OWN, {}),
        "same": (OWN, {"n_shards": 1}),
        "other": (with_site(OWN, r22=torch.zeros(16)), {}),
        "tokens": (dataclasses.replace(OWN, token_ids=tokens), {}),
        "less": (taken(OWN, slice(0, 28)), {"complete": False}),
        "model": (OWN, {"origin": provenance("sha256:cd")}),
    }
    at = {name: tmp_path / name for name in made}
    for name, (own, more) in made.items():
        written(at[name], own, **more)
    code, out, err = cli("diff", at["a"], at["same"])
    identity = open_record(at["a"]).record_id
    assert (code, out.splitlines()[0], err) == (0, f"equal: 30 rows, 3 tensors, bit for bit; {identity}", "")
    code, out, _ = cli("diff", at["a"], at["other"])
    assert code == 1 and "; hidden states part at document 3, position 0\n" in out
    code, out, _ = cli("diff", at["a"], at["tokens"])
    assert code == 1 and out.startswith("different: tokens part at 3 (document 1): 103 ≠ 104\n")
    code, out, _ = cli("diff", at["a"], at["less"])
    assert code == 1 and "30 and 28 rows" in out and "  end of b: the record is incomplete" in out
    code, out, err = cli("diff", at["a"], at["model"])
    assert (code, out) == (2, "") and "--across-models" in err
    assert cli("diff", at["a"], at["model"], "--across-models")[0] == 0
    code, out, _ = cli("diff", at["a"], at["other"], "--json", "--per-token", "--html", tmp_path / "map.html")
    said = json.loads(out)
    assert (code, said["first_row"], said["tokens"]["document"]) == (1, [3, 0], None)
    assert len(said["cells"][1]["per_token"]["hamming"]) == 12 and (tmp_path / "map.html").stat().st_size
    sq.save(holding(hidden(5)), tmp_path / "snapshot.safetensors")
    code, _, err = cli("diff", at["a"], tmp_path / "snapshot.safetensors")
    assert code == 2 and "two snapshots or two records" in err
    (tmp_path / "none").mkdir()
    assert cli("diff", at["a"], tmp_path / "none")[0] == 2

    floor = tmp_path / "floor.json"
    code, out, err = cli("floor", at["a"], at["same"], at["other"], "--out", floor)
    assert code == 0, err
    assert load_floor(floor).reference == identity and f"most in {KEY}: 1 of 30 vectors" in out
    code, out, _ = cli("diff", at["a"], at["other"], "--floor", floor)
    assert code == 0 and out.endswith("by the floor: within\n")
    code, _, err = cli("floor", at["a"], at["less"], "--out", floor)
    assert code == 2 and "less" in err
    code, _, err = cli("floor", at["a"], at["same"], "--runs", "2", "--out", floor)
    assert code == 2 and "null runs of a record are recordings" in err

    code, out, _ = cli("verify", at["a"])
    assert (code, out.splitlines()[0]) == (0, f"whole: 3 shards, {identity}")
    code, out, _ = cli("verify", at["less"])
    assert code == 2 and "  end: the record is incomplete" in out
    name = damaged(open_record(at["other"]), 0)
    code, out, _ = cli("verify", at["other"], "--json")
    assert code == 1 and list(json.loads(out)["failures"]) == [name]
