"""`sq.diff` of hidden states in snapshots: rows paired by (document, position), and how they differ."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_diff import CELL, SCHEMA, held, with_generation, with_layer
from workers.made import random, state

import semq_state as sq
from semq_state.audit import row_cells, rows
from semq_state.audit.cells import percentile
from semq_state.audit.floor_files import load_floor, save_floor
from semq_state.audit.heatmap import panels_of
from semq_state.audit.report import CellDiff
from semq_state.audit.vectors import measure
from semq_state.codecs.semq_rules import best_range
from semq_state.snapshot import HiddenRows, Snapshot

KEY = "hidden.sequence.hidden_states.1"
C = best_range(8)


def ids_of(*lengths: int) -> torch.Tensor:
    """Ids of documents of these lengths."""
    return torch.tensor([(d, p) for d, n in enumerate(lengths) for p in range(n)], dtype=torch.int64).reshape(-1, 2)


def hidden(*lengths: int, dim: int = 16, sites: Sequence[str] = (), **more: Any) -> HiddenRows:
    """Random states of so many tokens of each document, of hidden_states 0 to 2 where no sites are named."""
    ids = ids_of(*lengths)
    names = sites or tuple(f"hidden_states.{i}" for i in range(3))
    states = {name: random(len(ids), dim, seed=i) for i, name in enumerate(names)}
    return HiddenRows(ids, ids[:, 0] * 100 + ids[:, 1], states, **more)


def holding(own: HiddenRows | None, encoder: HiddenRows | None = None, **more: Any) -> Snapshot:
    streams = {name: each for name, each in (("sequence", own), ("encoder", encoder)) if each is not None}
    return dataclasses.replace(state(**{"batch": 2, **more}), hidden=streams)


def with_site(own: HiddenRows, name: str = "hidden_states.1", **rows: Any) -> HiddenRows:
    """The rows with others in one site, by number: `r7=…`."""
    states = own.states[name].clone()
    for number, row in rows.items():
        states[int(number[1:])] = row
    return dataclasses.replace(own, states={**own.states, name: states})


def taken(own: HiddenRows, at: Any) -> HiddenRows:
    """Some rows."""
    return dataclasses.replace(
        own, rows=own.rows[at], token_ids=own.token_ids[at], states={n: t[at] for n, t in own.states.items()}
    )


def flipped(row: torch.Tensor) -> torch.Tensor:
    """The row with its last bit the other way."""
    bits = row.clone().view(torch.int32)
    bits[-1] ^= 1
    return bits.view(torch.float32)


def numbers(cell: CellDiff) -> dict[str, Any]:
    said = cell.as_dict(per_token=True)
    return {name: x for name, x in said.items() if name not in ("where", "name", "layer")}


OWN = hidden(12, 9)


def test_equal_hidden_states_are_equal() -> None:
    report = sq.diff(holding(OWN), holding(OWN.map(torch.clone)))
    assert report.equal and report.first_row is None
    cells = [cell for cell in report.cells if cell.kind == "hidden"]
    assert [cell.key for cell in cells] == [f"hidden.sequence.hidden_states.{i}" for i in range(3)]
    for number, cell in enumerate(cells):
        assert (cell.where, cell.name) == ("hidden.sequence", f"hidden_states.{number}")
        assert (cell.layer, cell.of_sequence, cell.n_units) == (number, True, 17)
        assert (cell.n_vectors, cell.n_only_a, cell.n_only_b, cell.n_bits_changed) == (21, 0, 0, 0)
        assert (cell.min_cosine, cell.mean_cosine, cell.relative, cell.max_abs) == (1, 1, 0, 0)
        assert (cell.beyond, cell.first_row, cell.first_token) == (False, None, None)


def test_one_bit_in_one_row() -> None:
    report = sq.diff(holding(OWN), holding(with_site(OWN, r15=flipped(OWN.states["hidden_states.1"][15]))))
    cell = report.cell(KEY)
    assert (cell.n_bits_changed, cell.n_changed, cell.n_not_finite) == (1, 0, 0)
    assert cell.first_row == report.first_row == (1, 3)
    assert (cell.first_token, report.first_token, report.first_layer, report.equal) == (3, 3, 1, False)
    assert report.first_cell is cell and [c.key for c in report.cells if not c.equal] == [KEY]
    assert not report.others and not report.missing and not report.structure


def test_numbers_worked_out_by_hand() -> None:
    """Norms 5 and 10 are 2048 steps apart, as in the cache's test; positions 0 and 1 of two documents."""
    ids = ids_of(2, 2)
    a = torch.tensor([[3.0, 4, 0, 0], [3, 4, 0, 0], [0, 0, 0, 5], [3, 4, 0, 0]])
    b = torch.tensor([[3.0, 4, 0, 0], [6, 8, 0, 0], [0, 0, 0, 5], [4, 3, 0, 0]])
    left, right = (HiddenRows(ids, ids[:, 0] * 0, {"hidden_states.1": x}) for x in (a, b))
    cell = sq.diff(holding(left), holding(right)).cell(KEY)
    assert (cell.n_vectors, cell.n_bits_changed, cell.n_changed, cell.n_units) == (4, 2, 2, 5)
    assert (cell.hamming, cell.p99, cell.p99_norm, cell.max_abs) == (3, 2, 2048, 4)
    assert cell.min_cosine == pytest.approx(0.96) and cell.mean_cosine == pytest.approx(1 - 0.04 / 4)
    assert cell.relative == pytest.approx(math.sqrt(27 / 100))
    assert (cell.first_row, cell.first_token) == ((0, 1), 1)
    told = cell.per_token
    assert told is not None and told.n_vectors is not None
    assert (told.start, told.hamming.tolist(), told.n_vectors.tolist()) == (0, [0, 3], [2, 2])
    assert told.relative.tolist() == pytest.approx([0, math.sqrt(27 / 50)]) and told.max_abs.tolist() == [0, 4]


@pytest.mark.parametrize("n_values", [16, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_blocks_give_what_one_measurement_gives(
    n_values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cells, "VALUES", n_values)
    own = hidden(40, 3, 70).map(lambda t: t.to(dtype))
    x = own.states["hidden_states.1"]
    y = x + (random(*x.shape, seed=7) * (random(len(x), 1, seed=8) > 1) * 0.05).to(dtype)
    y[40] = float("nan")
    whole = sq.diff(
        holding(own, batch=3), holding(with_site(own, **{f"r{i}": y[i] for i in range(len(y))}), batch=3)
    )
    cell, found = whole.cell(KEY), measure(x, y, 0, 8, C)
    assert 5 < found.n_bits_changed < 40, "blocks of equal rows among them"
    names = ("n_vectors", "n_bits_changed", "n_not_finite")
    assert [getattr(cell, name) for name in names] == [getattr(found, name) for name in names]
    assert (cell.n_changed, cell.hamming) == (len(found.distances), int(found.hamming.sum()))
    assert (cell.p99, cell.p99_norm) == (percentile(found.distances), percentile(found.norm_steps))
    assert cell.min_cosine == found.min_cosine == 0 and cell.relative == math.inf
    assert cell.mean_cosine == pytest.approx(found.sum_cosine / found.n_vectors)
    told = cell.per_token
    assert told is not None and told.n_vectors is not None
    positions = own.rows[:, 1].numpy()
    for at in range(70):
        of = positions == at
        assert (told.n_vectors[at], told.hamming[at]) == (of.sum(), found.hamming[of].sum())
        wide = float((x[torch.from_numpy(of)].float().double() ** 2).sum())
        error = found.errors[of].sum()
        assert told.relative[at] == pytest.approx(math.sqrt(error / wide)), at
        assert told.max_abs[at] == found.max_abs[of].max()
    assert cell.first_token == min(positions[found.bits_changed > 0])


def test_percentiles_of_many_rows_are_semqs() -> None:
    for n in (1, 2, 99, 100, 101, 250):
        values = np.random.default_rng(n).integers(0, 40, n)
        counted = row_cells._Histogram(40)
        for part in np.array_split(values, 3):
            counted.add(part)
        assert (counted.percentile(), counted.n) == (percentile(values), n)
    assert row_cells._Histogram(40).percentile() == 0


def test_a_scaled_row_changes_its_norm_alone() -> None:
    row = OWN.states["hidden_states.2"][20] * 1.001
    cell = sq.diff(holding(OWN), holding(with_site(OWN, "hidden_states.2", r20=row))).cell(
        "hidden.sequence.hidden_states.2"
    )
    assert (cell.n_changed, cell.hamming, cell.first_row) == (1, 1, (1, 8))
    assert cell.min_cosine > 0.999999 and cell.per_token is not None
    assert cell.per_token.relative[8] > 0.0005


def test_rows_may_be_missing_on_either_side() -> None:
    keep = torch.ones(21, dtype=torch.bool)
    keep[[3, 13]] = False
    other = torch.ones(21, dtype=torch.bool)
    other[[0, 13, 14, 20]] = False
    b = taken(with_site(OWN, r3=torch.zeros(16), r7=torch.zeros(16)), other)
    report = sq.diff(holding(taken(OWN, keep)), holding(b))
    cell = report.cell(KEY)
    assert (cell.n_vectors, cell.n_only_a, cell.n_only_b) == (16, 3, 1)
    assert (cell.n_bits_changed, cell.first_row) == (1, (0, 7)), "row 3 is in one alone"
    unchanged = report.cell("hidden.sequence.hidden_states.0")
    assert not unchanged.equal and not unchanged.beyond and unchanged.n_bits_changed == 0
    told = unchanged.per_token
    assert told is not None and told.n_vectors is not None
    assert told.n_vectors.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    assert not report.others, "the rows are told once"


def test_a_position_without_rows_is_absent_and_not_equal() -> None:
    at = [0, 1, 5, 12, 17]
    own = taken(OWN, at)
    report = sq.diff(holding(own), holding(with_site(own, r2=torch.ones(16))))
    told = report.cell(KEY).per_token
    assert told is not None and told.n_vectors is not None
    assert told.n_vectors.tolist() == [2, 1, 0, 0, 0, 2]
    assert np.isnan(told.relative).tolist() == np.isnan(told.max_abs).tolist() == [n == 0 for n in told.n_vectors]
    (panel,) = (panel for panel in panels_of(report) if panel.name == "hidden.sequence")
    assert panel.layers == (0, 1, 2)
    for values in panel.values.values():
        assert np.isnan(values[:, 2:5]).all() and not np.isnan(values[:, [0, 1, 5]]).any()
    assert json.dumps(report.as_dict(per_token=True), allow_nan=False)


def test_the_share_of_symbols_is_that_of_the_rows_at_a_position() -> None:
    report = sq.diff(holding(OWN), holding(with_site(OWN, r11=OWN.states["hidden_states.1"][11] * 2)))
    panel = next(panel for panel in panels_of(report) if panel.name == "hidden.sequence")
    assert panel.values["share"][1, 11] == pytest.approx(1 / 17), "one document alone is so long"


def test_no_row_in_common_is_said() -> None:
    report = sq.diff(holding(taken(OWN, slice(0, 5))), holding(taken(OWN, slice(5, 21))))
    assert report.missing == {
        f"hidden.sequence.hidden_states.{i}": "no row in common: 5 in a, 16 in b" for i in range(3)
    }
    assert not report.equal and report.first_token is None


def test_documents_in_another_order_differ_from_their_first_row_on() -> None:
    turned = OWN.select([1, 0])
    report = sq.diff(holding(OWN), holding(turned))
    cell = report.cell(KEY)
    assert (cell.n_vectors, cell.n_only_a, cell.n_only_b, cell.n_bits_changed) == (18, 3, 3, 18)
    assert cell.first_row == (0, 0)
    assert report.others == {"hidden.sequence.token_ids": "18 of 18 rows, first (document 0, position 0)"}


def test_token_ids_are_compared_at_paired_rows() -> None:
    tokens = OWN.token_ids.clone()
    tokens[[7, 15]] += 1
    own, other = taken(OWN, slice(2, 21)), dataclasses.replace(OWN, token_ids=tokens)
    report = sq.diff(holding(own), holding(other))
    assert report.others == {"hidden.sequence.token_ids": "2 of 19 rows, first (document 0, position 7)"}


def test_nan_rows() -> None:
    own = with_site(OWN, r4=float("nan"))
    assert sq.diff(holding(own), holding(own.map(torch.clone))).equal, "a NaN is the same bits as itself"
    report = sq.diff(holding(own), holding(with_site(own, r9=float("nan"), r4=torch.ones(16))), threshold=0.5)
    cell = report.cell(KEY)
    assert (cell.n_not_finite, cell.n_changed, cell.hamming, cell.min_cosine) == (2, 2, 34, 0)
    assert (cell.relative, cell.max_abs, cell.first_row) == (math.inf, math.inf, (0, 4))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["cells"][-2]["relative"] is None


def test_the_sign_of_a_zero_is_a_bit() -> None:
    own = with_site(OWN, r6=torch.zeros(16))
    report = sq.diff(holding(own), holding(with_site(own, r6=-torch.zeros(16))))
    cell = report.cell(KEY)
    assert (cell.first_row, cell.n_bits_changed, cell.n_changed, cell.relative) == ((0, 6), 1, 0, 0)


def test_another_dtype_is_compared_as_float32() -> None:
    half = OWN.map(lambda t: t.bfloat16())
    report = sq.diff(holding(half), holding(half.map(lambda t: t.float())))
    assert not report.equal and not report.first_row
    assert {(d.name, d.expected, d.found) for d in report.structure} == {
        (f"hidden.sequence.hidden_states.{i}.dtype", "bfloat16", "float32") for i in range(3)
    }
    assert all(cell.n_bits_changed == 0 and cell.n_vectors == 21 for cell in report.cells if cell.kind == "hidden")
    # Norms of blocks that are equal as float32 count once.
    changed = with_site(half.map(lambda t: t.float()), r0=torch.zeros(16))
    cell = sq.diff(holding(half), holding(changed)).cell(KEY)
    x = half.states["hidden_states.1"].double()
    assert cell.relative == pytest.approx(float(x[0].norm() / x.norm()))


def test_sites_and_streams_of_one_side_are_missing() -> None:
    less = dataclasses.replace(OWN, states={n: t for n, t in OWN.states.items() if n != "hidden_states.1"})
    report = sq.diff(holding(OWN), holding(less, OWN))
    assert report.missing == {
        KEY: "only in a", **{f"hidden.encoder.hidden_states.{i}": "only in b" for i in range(3)}
    }  # fmt: skip
    assert [d.name for d in report.structure] == ["hidden.encoder"] and not report.equal
    assert sq.diff(holding(less), holding(OWN)).missing == {KEY: "only in b"}
    assert not sq.diff(holding(less), holding(OWN)).structure, "missing says it"
    assert sq.diff(holding(OWN), holding(None)).missing.keys() == {
        f"hidden.sequence.hidden_states.{i}" for i in range(3)
    }
    bare = dataclasses.replace(OWN, states={})
    assert sq.diff(holding(bare), holding(bare)).equal
    others = sq.diff(holding(bare), holding(taken(bare, slice(1, None)))).others
    assert others == {"hidden.sequence.rows": "1 only in a, 0 only in b"}


def test_other_settings_are_of_the_structure() -> None:
    report = sq.diff(holding(OWN), holding(dataclasses.replace(OWN, tokens="chosen")))
    assert [str(d) for d in report.structure] == ["hidden.sequence.tokens: expected all, found chosen"]
    assert report.cell(KEY).equal and not report.equal
    pooled = dataclasses.replace(hidden(1, 1), pool="mean")
    report = sq.diff(holding(OWN), holding(pooled))
    assert [d.name for d in report.structure] == ["hidden.sequence.pool"]
    assert report.missing[KEY] == "a row for each token in a, pooled (mean) in b"
    assert not any(cell.kind == "hidden" for cell in report.cells), "rows of one id that mean different things"


def test_pooled_rows_have_no_tokens() -> None:
    pooled = hidden(1, 1, pool="mean")
    report = sq.diff(holding(pooled), holding(with_site(pooled, r1=torch.zeros(16))))
    cell = report.cell(KEY)
    assert (cell.first_row, cell.first_token, cell.of_sequence, cell.per_token) == ((1, 0), None, False, None)
    assert (report.first_token, report.first_layer, report.first_row) == (None, 1, (1, 0))


def test_other_dims_are_refused() -> None:
    other = dataclasses.replace(OWN, states={**OWN.states, "hidden_states.1": random(21, 8)})
    for across in (False, True):
        with pytest.raises(sq.ModelMismatchError, match=re.escape(f"{KEY}, dim: expected 16, found 8")):
            sq.diff(holding(OWN), holding(other), across_models=across)


def test_threshold_is_of_a_row() -> None:
    x = OWN.states["hidden_states.1"]
    b = with_site(OWN, r5=x[5] * 1.01, r17=x[17] * 1.1)
    for threshold, row, token in ((0, (0, 5), 5), (0.005, (0, 5), 5), (0.05, (1, 5), 5), (0.2, None, None)):
        report = sq.diff(holding(OWN), holding(b), threshold=threshold)
        assert (report.first_row, report.first_token) == (row, token), threshold
        assert report.cell(KEY).n_bits_changed == 2


def test_the_first_row_is_by_document_and_the_first_token_by_position() -> None:
    b = with_site(with_site(OWN, r9=torch.zeros(16)), r14=torch.zeros(16))
    report = sq.diff(holding(OWN), holding(b))
    assert (report.first_row, report.first_token) == ((0, 9), 2)


def test_positions_are_those_of_the_cache_under_padding() -> None:
    own = hidden(38, 41)
    a = holding(own, padding=(3, 0))
    b = dataclasses.replace(a, hidden={"sequence": with_site(own, r7=torch.zeros(16))})
    cell = sq.diff(a, b).cell(KEY)
    assert (cell.first_row, cell.first_token) == ((0, 7), 10)
    told = cell.per_token
    assert told is not None and told.n_vectors is not None and told.start == 0
    assert told.n_vectors.tolist() == [1] * 3 + [2] * 38
    # What follows a mask is no padding.
    mask = a.generation.step_inputs["attention_mask"][:, :6]
    a = with_generation(a, step_inputs={"attention_mask": mask})
    b = dataclasses.replace(a, hidden={"sequence": with_site(own, r20=torch.zeros(16))})
    assert sq.diff(a, b).first_token == 23
    a, b = (dataclasses.replace(each, hidden={"encoder": each.hidden["sequence"]}) for each in (a, b))
    assert sq.diff(a, b).cell("hidden.encoder.hidden_states.1").first_token == 20, "tokens of its own"


def test_what_enters_a_layer_comes_before_its_keys() -> None:
    a = holding(OWN)
    keys = a.cache.layers[1].tensors["keys"].clone()
    keys[0, :, 3] += 1
    b = with_layer(holding(with_site(OWN, r3=torch.zeros(16))), 1, keys=keys)
    assert sq.diff(a, b).first_cell.key == KEY  # type: ignore[union-attr]
    low = with_layer(b, 0, keys=b.cache.layers[0].tensors["keys"] + 1)
    assert sq.diff(a, low).first_cell.key == "layers.0.keys"  # type: ignore[union-attr]
    both = dataclasses.replace(low, hidden={**low.hidden, "encoder": with_site(OWN, "hidden_states.2", r0=1.0)})
    with_encoder = dataclasses.replace(a, hidden={**a.hidden, "encoder": OWN})
    report = sq.diff(with_encoder, both)
    assert report.first_cell.key == "hidden.encoder.hidden_states.2"  # type: ignore[union-attr]
    assert not report.cell("hidden.encoder.hidden_states.2").of_sequence and report.first_token == 0


def test_sites_stand_in_the_order_of_layers() -> None:
    names = ["hidden_states.10", "model.norm", "hidden_states.2", "hidden_states.²", "hidden_states." + "9" * 5000]
    own = hidden(3, sites=names)
    report = sq.diff(holding(own, batch=1), holding(own.map(lambda t: t + 1), batch=1))
    cells = [cell for cell in report.cells if cell.kind == "hidden"]
    assert [cell.name for cell in cells] == [names[i] for i in (4, 3, 2, 0, 1)]
    assert (report.first_layer, {cell.layer for cell in cells}) == (2, {2, 10, None})


def test_rows_without_numbers_are_equal() -> None:
    own = hidden(3, dim=0)
    report = sq.diff(holding(own, batch=1), holding(own, batch=1))
    assert report.equal and report.cell(KEY).n_vectors == 3


def test_no_layer_is_named_where_sites_have_none(cli: Any, tmp_path: Path) -> None:
    own = hidden(12, 9, sites=("model.norm", "model.embed"))
    states = {"a": holding(own), "b": holding(with_site(own, "model.norm", r15=torch.zeros(16)))}
    at = {name: tmp_path / f"{name}.safetensors" for name in states}
    for name, snapshot in states.items():
        sq.save(snapshot, at[name])
    code, out, _ = cli("diff", at["a"], at["b"])
    assert code == 1
    assert out.startswith("different: hidden states part at document 1, position 3 (hidden.sequence.model.norm)\n")


def test_very_long_documents_have_no_numbers_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cells, "MAX_POSITIONS", 9)
    monkeypatch.setattr(row_cells, "VALUES", 16 * 5)
    cell = sq.diff(holding(OWN), holding(with_site(OWN, r10=torch.zeros(16)))).cell(KEY)
    assert (cell.per_token, cell.first_row, cell.first_token, cell.n_vectors) == (None, (0, 10), 10, 21)
    own = HiddenRows(torch.tensor([[0, 0], [0, (1 << 32) - 1]]), torch.tensor([0, 1]), {"x": random(2, 4)})
    assert sq.diff(holding(own), holding(own)).equal


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pairs_are_the_common_ids_whatever_the_blocks(data: st.DataObject) -> None:
    ids = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), unique=True, max_size=30).map(sorted)
    left, right = (np.array(data.draw(ids), np.int64).reshape(-1, 2) for _ in range(2))
    step = data.draw(st.integers(1, 8))
    a, b = (rows.Rows(each, each[:, 1], {}, "sequence") for each in (left, right))
    found = [(a.ids[x].tolist(), b.ids[y].tolist()) for x, y in rows.paired(a, b, step)]
    assert all(x == y and 0 < len(x) <= step for x, y in found)
    common = sorted({*map(tuple, left.tolist())} & {*map(tuple, right.tolist())})
    assert [tuple(row) for x, _ in found for row in x] == common


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_diff_is_that_of_the_common_rows_and_counts_the_others(data: st.DataObject) -> None:
    n = len(OWN)
    picks = st.lists(st.booleans(), min_size=n, max_size=n).map(torch.tensor)
    left, right = data.draw(picks), data.draw(picks)
    changed = data.draw(st.sets(st.integers(0, n - 1)))
    other = with_site(OWN, **{f"r{i}": OWN.states["hidden_states.1"][i] + 1 for i in changed})
    found = sq.diff(holding(taken(OWN, left)), holding(taken(other, right))).cell(KEY)
    common = sq.diff(holding(taken(OWN, left & right)), holding(taken(other, left & right))).cell(KEY)
    assert (found.n_only_a, found.n_only_b) == (int((left & ~right).sum()), int((right & ~left).sum()))
    assert numbers(found) == {**numbers(common), "n_only_a": found.n_only_a, "n_only_b": found.n_only_b}
    rows_changed = [tuple(OWN.rows[i].tolist()) for i in sorted(changed) if left[i] and right[i]]
    assert found.n_bits_changed == len(rows_changed)
    assert found.first_row == (rows_changed[0] if rows_changed else None)


# Floors


def noisy(own: HiddenRows, n_changed: int, seed: int = 0) -> HiddenRows:
    """The rows with so many of one site's a symbol longer, at random places."""
    at = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:n_changed].tolist()
    return with_site(own, **{f"r{i}": own.states["hidden_states.1"][i] * 1.001 for i in at})


def test_floors_over_hidden_states(tmp_path: Path) -> None:
    own = hidden(200, 200)
    reference = holding(own)
    floor = sq.measure_floor(reference, (holding(noisy(own, n, seed=n)) for n in (3, 17, 5)))
    cell = next(cell for cell in floor.cells if cell.name == KEY)
    assert (cell.changed, cell.total, cell.p99, cell.n_units) == (17, 400, 1, 17)
    save_floor(floor, tmp_path / "floor.json")
    assert load_floor(tmp_path / "floor.json") == floor
    for n, outcome in ((0, "equal"), (17, "within"), (42, "within"), (43, "different")):
        verdict = sq.diff(reference, holding(noisy(own, n, seed=9))).within(floor)
        assert verdict.outcome == outcome, n
    assert verdict.reasons == (f"{KEY}: 43 of 400 vectors changed, the floor allows 42",)
    fewer = sq.diff(reference, holding(taken(own, slice(1, None)))).within(floor)
    assert f"{KEY}: 399 of the reference's 400 vectors are here" in fewer.reasons
    tokens = dataclasses.replace(own, token_ids=own.token_ids + 1)
    assert sq.diff(reference, holding(tokens)).within(floor).reasons == (
        "hidden.sequence.token_ids: 400 of 400 rows, first (document 0, position 0)",
    )
    gone = dataclasses.replace(own, states={n: t for n, t in own.states.items() if n != "hidden_states.1"})
    assert sq.diff(reference, holding(gone)).within(floor).reasons == (f"{KEY}: missing",)


def test_null_runs_with_other_rows_or_sites_are_none() -> None:
    gone = dataclasses.replace(OWN, states={n: t for n, t in OWN.states.items() if n != "hidden_states.1"})
    cases: Mapping[str, HiddenRows] = {
        "expected 21 vectors at the reference's positions, found 20": taken(OWN, slice(1, None)),
        f"{re.escape(KEY)}: expected what the reference has, found only in a": gone,
    }
    for words, null in cases.items():
        with pytest.raises(sq.FloorError, match=words):
            sq.measure_floor(holding(OWN), [holding(null)])


def test_a_floor_without_hidden_states_does_not_excuse_them() -> None:
    plain = sq.measure_floor(holding(None), [holding(None)])
    floor = dataclasses.replace(plain, reference=holding(OWN).state_id)
    reasons = sq.diff(holding(OWN), holding(noisy(OWN, 2))).within(floor).reasons
    assert reasons == (f"{KEY}: not in the floor",)
    assert sq.diff(holding(OWN), holding(OWN)).within(floor).outcome == "equal"


# JSON and the command line


def test_json_has_the_documented_fields() -> None:
    said = sq.diff(holding(OWN), holding(with_site(OWN, r15=torch.zeros(16)))).as_dict(per_token=True)
    assert list(said).index("first_row") == list(said).index("first_cell") + 1
    assert said.pop("first_row") == [1, 3]
    held(said, SCHEMA)
    cells = {f"{cell['where']}.{cell['name']}": cell for cell in said["cells"]}
    assert cells[KEY].pop("first_row") == [1, 3]
    assert cells["hidden.sequence.hidden_states.0"]["first_row"] is None
    assert cells[KEY].pop("per_token")["n_vectors"][9:] == [1, 1, 1]
    held(cells[KEY], CELL)
    assert "first_row" not in cells["layers.0.keys"]
    assert "first_row" not in sq.diff(holding(None), holding(None)).as_dict()


def test_command_line_answers_and_exit_codes(cli: Any, tmp_path: Path) -> None:
    made = {
        "a": OWN,
        "same": OWN.map(torch.clone),
        "other": with_site(OWN, r15=torch.zeros(16)),
        "dims": dataclasses.replace(OWN, states={"hidden_states.1": random(21, 8)}),
    }
    at = {name: tmp_path / f"{name}.safetensors" for name in made}
    for name, own in made.items():
        sq.save(holding(own), at[name])
    code, out, err = cli("diff", at["a"], at["same"])
    assert (code, out.split(":")[0], err) == (0, "equal", "")
    code, out, _ = cli("diff", at["a"], at["other"])
    assert code == 1
    assert out.startswith(
        f"different: states part at token 3, first layer 1 ({KEY}); hidden states part at document 1, position 3\n"
    )
    assert re.search(re.escape(KEY) + r" +document 1, 3 +21 +1 +1", out)
    code, out, err = cli("diff", at["a"], at["dims"])
    assert (code, out) == (2, "") and "dim: expected 16, found 8" in err
    code, out, _ = cli("diff", at["a"], at["other"], "--json", "--html", tmp_path / "map.html")
    assert (code, json.loads(out)["first_row"]) == (1, [1, 3])
    assert "hidden.sequence" in (tmp_path / "map.html").read_text()
    code, out, err = cli("floor", at["a"], at["other"], "--out", tmp_path / "floor.json")
    assert code == 0, err
    assert f"most in {KEY}: 1 of 21 vectors" in out
    assert cli("diff", at["a"], at["other"], "--floor", tmp_path / "floor.json")[0] == 0
