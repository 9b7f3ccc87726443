"""`SymbolIndex`: exact whatever the batch, order and threads; files and identities; what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import semq_state as sq
from semq_state.codecs.semq_rules import Orbit, Phase, Quant, best_range
from semq_state.errors import FormatError, IntegrityError, StoreError, UnsupportedOperationError
from semq_state.interchange import SemqFile, read_semq
from semq_state.search import read_semq_index, scan, write_semq_index
from semq_state.search.contents import Contents
from semq_state.search.decoding import Decoder
from semq_state.search.index_file import write_index

RULES: dict[str, dict[str, Any]] = {
    **{f"quant{bins}": {"bins": bins} for bins in (2, 3, 4, 8, 11, 16, 32, 64)},
    "quant8-semq": {"bins": 8, "c": 2.0},
    "phase16": {"operator": "phase"},
    "phase100": {"operator": "phase", "bins": 100},
    "orbit50": {"operator": "orbit"},
}


def gaussian(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def built(n: int = 300, dim: int = 36, seed: int = 0, **options: Any) -> sq.SymbolIndex:
    index = sq.SymbolIndex(dim, **options)
    index.add(gaussian(n, dim, seed))
    return index


def plain_cosines(index: sq.SymbolIndex, queries: np.ndarray) -> np.ndarray:
    """Every cosine by SEMQ's own decoding, in float64, rounded once."""
    contents = index.contents()
    decoded = index.operator.decode(index.operator.unpack(contents.packed)).astype(np.float64)
    decoded /= np.maximum(np.linalg.norm(decoded, axis=1, keepdims=True), 1e-30)
    units = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    return (units.astype(np.float32).astype(np.float64) @ decoded.T).astype(np.float32)


def expected(cosines: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    return np.array([ids[sorted(range(len(ids)), key=lambda i: (-row[i], i))[:k]] for row in cosines])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dim", [4, 36])
def test_search_is_a_plain_search_of_what_symbols_stand_for(name: str, dim: int) -> None:
    index, queries = built(500, dim, **RULES[name]), gaussian(70, dim, 1)
    found, cosines = index.search(queries, 10), plain_cosines(index, queries)
    # Few symbols are many equal rows, which are in the order of their ids.
    assert np.array_equal(found.ids, expected(cosines, index.ids, 10))
    assert np.array_equal(found.scores, np.take_along_axis(cosines, found.ids, 1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dim", [4, 36, 44])
def test_the_quick_decoder_is_the_operator(name: str, dim: int) -> None:
    index = built(50, dim, **RULES[name])
    packed = index.contents().packed
    decoded = index.operator.decode(index.operator.unpack(packed))
    assert np.array_equal(Decoder(index.operator)(packed), decoded)


@pytest.mark.parametrize("dim", [1, 5, 37])
def test_odd_dims(dim: int) -> None:
    for bins in (2, 4, 8):
        index, queries = built(40, dim, bins=bins), gaussian(3, dim, 1)
        scores = index.search(queries, 40).scores
        assert np.array_equal(scores, -np.sort(-plain_cosines(index, queries), axis=1))


def test_symbols_against_symbols() -> None:
    index, queries = built(), gaussian(9, 36, 1)
    other = sq.SymbolIndex(36)
    other.add(queries)
    found = index.search_symbols(queries, 5)
    again = index.search(other.rows(other.ids), 5)
    assert np.array_equal(found.ids, again.ids)
    np.testing.assert_allclose(found.scores, again.scores, atol=1e-6)
    assert not np.array_equal(found.scores, index.search(queries, 5).scores)


def test_scores_do_not_depend_on_batch_threads_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = built(5000, 96), gaussian(90, 96, 1)
    whole = index.search(queries, 20)
    singles = [index.search(queries[i : i + 1], 20) for i in range(90)]
    assert np.array_equal(whole.ids, np.concatenate([each.ids for each in singles]))
    assert np.array_equal(whole.scores, np.concatenate([each.scores for each in singles]))
    order = np.random.default_rng(2).permutation(5000)
    shuffled = sq.SymbolIndex(96)
    shuffled.add(gaussian(5000, 96)[order], ids=order)
    monkeypatch.setattr(scan, "_THREAD_ROWS", 100)
    monkeypatch.setattr(scan, "_QUERIES", 32)
    for threads in (1, 2, 7):
        monkeypatch.setattr(scan, "n_workers", lambda threads=threads: threads)
        for other in (index, shuffled):
            found = other.search(queries, 20)
            assert np.array_equal(found.ids, whole.ids)
            assert np.array_equal(found.scores, whole.scores)


def test_threads_are_used_for_large_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []
    whole = scan.Scanned._scan
    monkeypatch.setattr(scan, "n_workers", lambda: 3)
    monkeypatch.setattr(scan.Scanned, "_scan", lambda *args: ranges.append(args[3:]) or whole(*args))
    built(100_000, 8).search(gaussian(2, 8, 1), 3)
    assert sorted(ranges) == [(0, 33333), (33333, 66666), (66666, 100_000)]


def test_of_equal_rows_the_smaller_id_comes_first() -> None:
    row = gaussian(1, 16)
    numbers = sq.SymbolIndex(16)
    numbers.add(np.repeat(row, 50, axis=0), ids=np.arange(50)[::-1])
    assert numbers.search(row, 12).ids.tolist() == [list(range(12))]
    texts = sq.SymbolIndex(16)
    texts.add(np.repeat(row, 4, axis=0), ids=["é", "b", "a", "\U0001f600"])
    assert texts.search(row, 4).ids.tolist() == [["a", "b", "é", "\U0001f600"]]


def test_a_crowd_of_equal_rows_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_CROWD", 500)
    rows = gaussian(9000, 24)
    rows[3000:8000] = rows[3000]
    index = sq.SymbolIndex(24)
    index.add(rows[::-1], ids=np.arange(9000)[::-1])
    sizes = []
    best = scan.Scanned.best
    monkeypatch.setattr(scan.Scanned, "best", lambda *args: sizes.append(args[2].shape[1]) or best(*args))
    queries = np.concatenate([rows[3000:3001], gaussian(3, 24, 1)])
    found = index.search(queries, 30)
    assert found.ids[0].tolist() == list(range(3000, 3030))
    assert np.array_equal(np.sort(plain_cosines(index, queries))[:, :-31:-1], found.scores)
    assert len(sizes) > 2
    assert max(sizes) < 5000


def test_near_ties_are_ordered_by_their_exact_cosines() -> None:
    """Rows so alike that float32 products cannot tell them apart."""
    dim = 512
    rows, queries = np.repeat(gaussian(1, dim), 3000, axis=0), gaussian(4, dim, 1)
    rows[:, 256:] *= np.random.default_rng(3).choice([-1, 1], (3000, 256))
    queries[:, 256:] *= 1e-5
    index = sq.SymbolIndex(dim)
    index.add(rows)
    cosines = plain_cosines(index, queries)
    found = index.search(queries, 50)
    assert np.array_equal(found.scores, -np.sort(-cosines, axis=1)[:, :50])
    assert np.array_equal(found.ids, expected(cosines, index.ids, 50))


def test_fewer_rows_than_k() -> None:
    index, queries = sq.SymbolIndex(8), gaussian(3, 8)
    for found in (index.search(queries, 5), index.search_symbols(queries, 5)):
        assert found.ids.shape == found.scores.shape == (3, 0)
    index.add(gaussian(2, 8, 1))
    assert sorted(index.search(queries, 5).ids[0]) == [0, 1]
    assert index.search(queries[:0], 5).ids.shape == (0, 2)
    assert index.add(gaussian(0, 8)).tolist() == []
    assert len(index) == 2


def test_k_beyond_a_block() -> None:
    index, queries = built(6000, 16), gaussian(3, 16, 1)
    found = index.search(queries, 5500)
    assert np.array_equal(found.scores, -np.sort(-plain_cosines(index, queries))[:, :5500])
    assert all(len(set(row)) == 5500 for row in found.ids.tolist())


def test_ids_continue_after_the_largest() -> None:
    index = sq.SymbolIndex(8)
    assert index.add(gaussian(3, 8)).tolist() == [0, 1, 2]
    assert index.add(gaussian(2, 8), ids=[70, 5]).tolist() == [70, 5]
    assert index.add(gaussian(2, 8)).tolist() == [71, 72]
    index.remove([72, 1])
    assert index.add(gaussian(1, 8)).tolist() == [72]
    assert index.ids.tolist() == [0, 2, 70, 5, 71, 72]
    assert index.ids.dtype == np.int64


def test_removed_rows_are_not_found() -> None:
    index, queries = built(200, 20), gaussian(5, 20, 1)
    first = index.search(queries, 3).ids
    gone = np.unique(first)
    index.remove(gone)
    assert len(index) == 200 - len(gone)
    found = index.search(queries, 10)
    assert not np.isin(found.ids, gone).any()
    left = np.setdiff1d(np.arange(200), gone)
    other = sq.SymbolIndex(20)
    other.add(gaussian(200, 20)[left], ids=left)
    assert np.array_equal(other.search(queries, 10).ids, found.ids)
    assert other.index_id == index.index_id
    index.remove(left)
    assert len(index) == 0
    assert index.index_id == sq.SymbolIndex(20).index_id
    index.add(gaussian(1, 20), ids=["now a text"])  # an empty index takes either kind
    assert index.search(queries[:1]).ids.tolist() == [["now a text"]]


def test_rows_come_back_with_their_norms() -> None:
    vectors = gaussian(100, 64) * np.linspace(0.01, 1000, 100, dtype=np.float32)[:, None]
    index = sq.SymbolIndex(64, bins=64)
    index.add(vectors, ids=[f"row {i}" for i in range(100)])
    back = index.rows(["row 7", "row 3"])
    assert back.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), np.linalg.norm(vectors[[7, 3]], axis=1), rtol=1e-6)
    assert np.linalg.norm(back - vectors[[7, 3]]) < 0.03 * np.linalg.norm(vectors[[7, 3]])
    np.testing.assert_allclose(np.linalg.norm(index.rows(["row 9"], unit=True), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_and_arrays_of_every_float(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(gaussian(20, 16)).to(dtype)
    index, other = sq.SymbolIndex(16), sq.SymbolIndex(16)
    index.add(tensor.requires_grad_())
    other.add(tensor.detach().double().numpy())
    assert index.index_id == other.index_id
    assert index.search(tensor, 1).ids[:, 0].tolist() == list(range(20))


def test_overlap_with_a_search_of_the_vectors_grows_with_the_bits() -> None:
    vectors, queries = gaussian(4000, 64), gaussian(64, 64, 1)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    true = np.argsort(-queries @ units.T, axis=1)[:, :10]
    overlaps = []
    for bins in (2, 4, 8, 16, 32, 64):
        index = sq.SymbolIndex(64, bins=bins)
        index.add(vectors)
        found = index.search(queries).ids
        overlaps.append(np.mean([len(set(a) & set(b)) for a, b in zip(true, found, strict=True)]) / 10)
    assert overlaps == sorted(overlaps)
    assert overlaps[0] > 0.5
    assert overlaps[2] > 0.85
    assert overlaps[5] > 0.97


def test_classify() -> None:
    centres = gaussian(3, 32) * 3
    rng = np.random.default_rng(1)
    kinds = rng.integers(0, 3, 300)
    index = sq.SymbolIndex(32)
    index.add(centres[kinds] + gaussian(300, 32, 2))
    labels = {i: "abc"[kind] for i, kind in enumerate(kinds)}
    assert index.classify(centres + gaussian(3, 32, 3), labels, k=7) == ["a", "b", "c"]
    pair = sq.SymbolIndex(2)
    pair.add(np.array([[1.0, 0.1], [0.1, 1.0]]), ids=["far", "near"])
    assert pair.classify(np.array([[0.0, 1.0]]), {"far": 0, "near": 1}, k=2) == [1]  # one vote each
    with pytest.raises(UnsupportedOperationError, match="none for 'far'"):
        pair.classify(np.array([[1.0, 0.0]]), {"near": 1})
    with pytest.raises(UnsupportedOperationError, match="rows in the index"):
        sq.SymbolIndex(2).classify(np.array([[1.0, 0.0]]), {})


# Files and identity.


@pytest.mark.parametrize("name", RULES)
def test_a_saved_index_is_the_index(name: str, tmp_path: Path) -> None:
    index, queries = built(60, **RULES[name]), gaussian(4, 36, 1)
    index.save(tmp_path / "a.safetensors")
    loaded = sq.SymbolIndex.load(tmp_path / "a.safetensors")
    assert loaded.index_id == index.index_id
    assert loaded.operator == index.operator
    assert np.array_equal(loaded.search(queries).scores, index.search(queries).scores)
    assert np.array_equal(loaded.rows([3]), index.rows([3]))
    assert loaded.add(gaussian(1, 36)).tolist() == [60]
    loaded.remove([60])
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_texts_and_nothing_in_a_file(tmp_path: Path) -> None:
    index = sq.SymbolIndex(8)
    index.save(tmp_path / "empty")
    assert len(sq.SymbolIndex.load(tmp_path / "empty")) == 0
    index.add(gaussian(3, 8), ids=["ü", "b" * 4096, "a\n"])
    index.save(tmp_path / "texts")
    loaded = sq.SymbolIndex.load(tmp_path / "texts")
    assert loaded.ids.tolist() == ["a\n", "b" * 4096, "ü"]
    assert loaded.index_id == index.index_id
    assert np.array_equal(loaded.rows(index.ids), index.rows(index.ids))
    assert load_file(tmp_path / "texts")["rows"].shape == (3, 4)


def test_identity_is_of_the_contents_whatever_their_order() -> None:
    vectors = gaussian(30, 12)
    one, other = sq.SymbolIndex(12), sq.SymbolIndex(12)
    one.add(vectors)
    for i in np.random.default_rng(0).permutation(30):
        other.add(vectors[i : i + 1], ids=[int(i)])
    assert one.index_id == other.index_id
    ids = {one.index_id}
    for change in ("norm", "symbols", "id", "rule", "texts"):
        changed = sq.SymbolIndex(12, bins=7 if change == "rule" else 8)
        rows = vectors.copy()
        rows[3] *= {"norm": 2, "symbols": -1}.get(change, 1)
        given: list[Any] = [*range(29), 40 if change == "id" else 29]
        changed.add(rows, ids=[f"{i:02}" for i in given] if change == "texts" else given)
        ids.add(changed.index_id)
    assert len(ids) == 6


def test_the_identity_of_a_small_index_never_changes() -> None:
    index = sq.SymbolIndex(4, bins=4, c=2.0)
    index.add(np.array([[0.6, 0.8, 0, 0], [0, 0, 3.0, 4.0]]), ids=[7, 9])
    contents = index.contents()
    assert contents.norms.tolist() == [1.0, 5.0]
    assert contents.packed.tobytes().hex() == "3e09a40f"
    sections = {
        "ids": ["I64", [2], struct.pack("<2q", 7, 9)],
        "norms": ["F32", [2], struct.pack("<2f", 1, 5)],
        "rows": ["U8", [2, 2], bytes.fromhex("3e09a40f")],
    }
    tensors = {
        name: [dtype, shape, [f"sha256:{hashlib.sha256(data).hexdigest()}"]]
        for name, (dtype, shape, data) in sections.items()
    }
    rule = {"c": 2.0, "dim": 4, "operator": "quant", "parameter": 4, "rule_revision": 0}
    told = hashlib.sha256(msgpack.packb({"structure": rule, "tensors": tensors})).hexdigest()
    assert told == "3a7f2c5743527cde7691cc368617a825392f97ccc52f7fc83e45b355846afc0b"
    assert index.index_id == f"sha256:{told}"


def saved(folder: Path, ids: Any = None) -> Path:
    index = sq.SymbolIndex(8)
    index.add(gaussian(3, 8), ids=ids)
    index.save(folder / "index")
    return folder / "index"


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    found: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return found


@pytest.mark.parametrize("ids", [None, ["a", "b", "c"]], ids=["numbers", "texts"])
def test_every_changed_byte_and_every_cut_is_noticed(tmp_path: Path, ids: Any) -> None:
    path = saved(tmp_path, ids)
    data = path.read_bytes()
    n_header = 8 + int.from_bytes(data[:8], "little")
    spaces = {i for i in range(n_header) if data[i : i + 1] == b" "}
    for at in set(range(len(data))) - spaces:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(FormatError):
            sq.SymbolIndex.load(path)
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError):
            sq.SymbolIndex.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError):
        sq.SymbolIndex.load(path)


METADATA: dict[str, tuple[dict[str, str], str]] = {
    "another file": ({"format": "semq_state"}, "an index of symbols"),
    "a later version": ({"format_version": "2"}, "later semq_state"),
    "more metadata": ({"note": "x"}, "format, format_version, rule and digest"),
    "no rule": ({"rule": "{}"}, "rule"),
    "a list as rule": ({"rule": "[]"}, "rule"),
    "deep rule": ({"rule": "[" * 100_000}, "rule"),
    "wide rule": ({"rule": '{"c":2.68,"dim":65537,"operator":"quant","parameter":8,"rule_revision":0}'}, "65537"),
    "another rule": (
        {"rule": '{"c":2.68,"dim":16,"operator":"quant","parameter":8,"rule_revision":0}'},
        "sections",
    ),
    "revision": ({"rule": '{"c":2.68,"dim":8,"operator":"quant","parameter":8,"rule_revision":1}'}, "rule"),
    "digest": ({"digest": "sha256:" + "0" * 64}, "0000"),
}


@pytest.mark.parametrize("name", METADATA)
def test_foreign_metadata(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    changes, message = METADATA[name]
    save_file(load_file(path), path, metadata_of(path) | changes)
    with pytest.raises(IntegrityError if name == "digest" else FormatError, match=message):
        sq.SymbolIndex.load(path)


TENSORS: dict[str, Any] = {
    "fewer norms": {"norms": np.ones(2, np.float32)},
    "norms of another kind": {"norms": np.ones(3, np.float64)},
    "a matrix of norms": {"norms": np.ones((3, 1), np.float32)},
    "narrow rows": {"rows": np.zeros((3, 3), np.uint8)},
    "another section": {"more": np.zeros(1, np.uint8)},
    "both ids": {"id_ends": np.ones(3, np.int64)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_foreign_sections(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    save_file(load_file(path) | TENSORS[name], path, metadata_of(path))
    with pytest.raises(FormatError, match="sections"):
        sq.SymbolIndex.load(path)


def objects(*texts: str) -> np.ndarray:
    return np.array(texts, object)


CONTENTS: dict[str, tuple[dict[str, Any], str]] = {
    "ids in another order": ({"ids": np.array([2, 1, 3])}, "increasing numbers"),
    "an id twice": ({"ids": np.array([1, 1, 3])}, "increasing numbers"),
    "a negative id": ({"ids": np.array([-1, 1, 3])}, "increasing numbers"),
    "texts in another order": ({"ids": objects("b", "a", "c")}, "increasing strings"),
    "an empty text": ({"ids": objects("", "a", "c")}, "increasing ends"),
    "a NUL": ({"ids": objects("a\0", "b", "c")}, "without NUL"),
    "a long text": ({"ids": objects("a" * 4097, "b", "c")}, "4,096 bytes"),
    "a norm of NaN": ({"norms": np.array([1, np.nan, 1], np.float32)}, "norms"),
    "an infinite norm": ({"norms": np.array([1, np.inf, 1], np.float32)}, "norms"),
    "a negative norm": ({"norms": np.array([1, -1, 1], np.float32)}, "norms"),
    "no norm": ({"norms": np.array([1, 0, 1], np.float32)}, "norms"),
    "padding": ({"packed": np.full((3, 3), 0xE0, np.uint8)}, "padding bits"),
    "no symbol": ({"packed": np.full((3, 3), 0x1F, np.uint8)}, "symbols below 6"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrong_contents_under_a_right_digest(tmp_path: Path, name: str) -> None:
    changes, message = CONTENTS[name]
    good = Contents(Quant(7, 3), np.arange(3), np.ones(3, np.float32), np.zeros((3, 3), np.uint8))
    write_index(tmp_path / "x", good)
    assert len(sq.SymbolIndex.load(tmp_path / "x")) == 3
    write_index(tmp_path / "x", dataclasses.replace(good, **changes))
    with pytest.raises(FormatError, match=message) as caught:
        sq.SymbolIndex.load(tmp_path / "x")
    assert not isinstance(caught.value, IntegrityError)


def test_ends_that_lie_are_refused_before_texts_are_cut(tmp_path: Path) -> None:
    path = saved(tmp_path, ["a", "b", "c"])
    for ends in ([1, 2, 4], [1, 1, 3], [-1, 2, 3], [0, 2, 3], [1, 1 << 62, 3]):
        tensors = load_file(path) | {"id_ends": np.array(ends, np.int64)}
        save_file(tensors, tmp_path / "x", metadata_of(path))
        with pytest.raises(FormatError, match="increasing ends"):
            sq.SymbolIndex.load(tmp_path / "x")


def test_claims_of_size_take_no_memory(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    for old, new in ((b'"shape":[3]', b'"shape":[3000000000]'), (b"[3,4]", b"[3,4000000000]")):
        n_header = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + n_header].replace(old, new).rstrip()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n_header :])
        with pytest.raises(FormatError):
            sq.SymbolIndex.load(path)


def test_stores_that_refuse(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        built().save(tmp_path / "none" / "a")
    with pytest.raises(StoreError):
        sq.SymbolIndex.load(tmp_path / "none")
    assert not list(tmp_path.iterdir())


# What is refused, and that nothing has changed then.


def bad(row: int, value: float) -> np.ndarray:
    rows = gaussian(5, 8)
    rows[row] = value
    return rows


ROWS: dict[str, tuple[Any, str]] = {
    "NaN": (bad(3, np.nan), "row 3: expected finite values"),
    "infinity": (bad(1, np.inf), "row 1: expected finite values"),
    "zeros": (bad(4, 0), "row 4: expected a norm .* no direction"),
    "subnormal": (bad(2, 1e-40), "row 2: expected a norm"),
    "too large": (np.full((1, 8), 1e39), "row 0: expected a norm"),
    "wrong dim": (gaussian(2, 9), r"shape \(n, 8\), found \(2, 9\)"),
    "one vector": (gaussian(1, 8)[0], r"found \(8,\)"),
    "integers": (np.ones((2, 8), int), "floats .*found int64"),
    "a list": ([[1.0] * 8], "floats .*found list"),
    "integer tensor": (torch.ones(2, 8, dtype=torch.int32), "found torch.int32"),
}


@pytest.mark.parametrize("name", ROWS)
def test_refused_rows_change_nothing(name: str) -> None:
    rows, message = ROWS[name]
    index = built(3, 8)
    before = index.index_id
    for call in (index.add, index.search, index.search_symbols):
        with pytest.raises(UnsupportedOperationError, match=message):
            call(rows)
    assert (len(index), index.index_id) == (3, before)


IDS: dict[str, tuple[Any, str]] = {
    "twice": ([5, 5], "one that repeats"),
    "taken": ([5, 1], "found 1, which has a row"),
    "too few": ([5], "expected 2, one for each row"),
    "negative": ([5, -1], "numbers of 0 to"),
    "too large": ([5, 1 << 63], "numbers of 0 to"),
    "floats": (np.array([5.0, 6.0]), "numbers of 0 to"),
    "booleans": ([True, False], "numbers of 0 to"),
    "mixed": ([5, "a"], "numbers of 0 to"),
    "texts beside numbers": (["a", "b"], "expected numbers, as the index has them"),
    "a text": ("ab", "in a list"),
    "a number": (5, "in a list"),
    "an array of no dimension": (np.array(5), "in a list"),
}


@pytest.mark.parametrize("name", IDS)
def test_refused_ids_change_nothing(name: str) -> None:
    ids, message = IDS[name]
    index = built(3, 8)
    before = index.index_id
    with pytest.raises(UnsupportedOperationError, match=message):
        index.add(gaussian(2, 8), ids=ids)
    assert (len(index), index.index_id) == (3, before)


@pytest.mark.parametrize("text", ["", "a\0b", "a" * 4097, "\ud800"])
def test_refused_texts(text: str) -> None:
    with pytest.raises(UnsupportedOperationError, match="4096 bytes"):
        sq.SymbolIndex(8).add(gaussian(1, 8), ids=[text])


def test_texts_ask_for_texts() -> None:
    index = sq.SymbolIndex(8)
    index.add(gaussian(1, 8), ids=["a"])
    with pytest.raises(UnsupportedOperationError, match="strings, as the index has them"):
        index.add(gaussian(1, 8))
    with pytest.raises(UnsupportedOperationError, match="strings, as the index has them"):
        index.add(gaussian(1, 8), ids=[1])
    numbers = sq.SymbolIndex(8)
    numbers.add(gaussian(1, 8), ids=[(1 << 63) - 1])
    with pytest.raises(UnsupportedOperationError, match="numbers up to"):
        numbers.add(gaussian(1, 8))


def test_unknown_ids_remove_nothing() -> None:
    index = built(3, 8)
    for ids, message in (([1, 9], "found 9"), ([1, 1], "repeats"), (["1"], "found '1'")):
        with pytest.raises(UnsupportedOperationError, match=message):
            index.remove(ids)
    with pytest.raises(UnsupportedOperationError, match="found 9"):
        index.rows([9])
    index.remove([])
    assert len(index) == 3


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_refused_k(k: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="k: expected 1 or more"):
        built(3, 8).search(gaussian(1, 8), k)


@pytest.mark.parametrize(
    "options",
    [{"operator": "other"}, {"bins": 1}, {"bins": 65}, {"c": 0.0}, {"operator": "phase", "c": 2.0}, {"dim": 0}],
)
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOperationError):
        sq.SymbolIndex(**{"dim": 8, **options})


# Other systems.


@pytest.mark.parametrize("operator", [Quant(12, 4), Phase(12), Orbit(12)], ids=lambda each: each.name)
@pytest.mark.parametrize("ids", [[3, 1, 2], ["c", "a", "b"]], ids=["numbers", "texts"])
def test_semq_files(tmp_path: Path, operator: Any, ids: Any) -> None:
    units = gaussian(3, 12)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    index = sq.SymbolIndex(
        12, bins=operator.parameter, operator=operator.name, c=2.0 if operator.name == "quant" else None
    )
    index.add(units * np.float32(1.0001), ids=ids)
    file = write_semq_index(index, tmp_path / "a.semq", manifest={"encoder": "x"})
    assert read_semq(tmp_path / "a.semq") == file
    again = read_semq_index(tmp_path / "a.semq")
    assert np.array_equal(again.search(units).ids, index.search(units).ids)
    exact = sq.SymbolIndex(12, bins=operator.parameter, operator=operator.name, c=index.operator.__dict__.get("c"))
    exact.add(units, ids=ids)
    assert exact.index_id == again.index_id  # unit rows have SEMQ's own symbols, and a norm of 1
    assert exact.contents().packed.tobytes() == SemqFile.from_vectors(ids, units, operator=operator).rows.tobytes()


def test_semq_files_have_semqs_range(tmp_path: Path) -> None:
    assert sq.SymbolIndex(8).operator == Quant(8, 8, best_range(8))
    with pytest.raises(UnsupportedOperationError, match=r"2\.0"):
        write_semq_index(built(3, 8), tmp_path / "a.semq")


def test_faiss_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    from semq_state_integrations import faiss as ours

    monkeypatch.setattr(ours, "_BATCH", 300)
    monkeypatch.setattr(ours, "_TRAINING", 600)
    index = sq.SymbolIndex(32)
    index.add(gaussian(1000, 32), ids=np.arange(1000) * 7)
    queries = gaussian(20, 32, 1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = index.search(queries)
    scores, ids = ours.to_faiss(index).search(queries, 10)
    assert np.array_equal(ids, found.ids)
    np.testing.assert_allclose(scores, found.scores, atol=1e-6)
    trained = ours.to_faiss(index, factory="SQ8")
    assert np.mean([len(set(a) & set(b)) for a, b in zip(trained.search(queries, 10)[1], ids, strict=True)]) > 9
    assert trained.ntotal == ours.to_faiss(index, factory="IVF4,PQ8x4").ntotal == 1000
    for factory in ("Nonsense", "PQ7"):
        with pytest.raises(UnsupportedOperationError, match="another factory"):
            ours.to_faiss(index, factory=factory)
    texts = sq.SymbolIndex(32)
    texts.add(gaussian(1, 32), ids=["a"])
    with pytest.raises(UnsupportedOperationError, match="numbers only"):
        ours.to_faiss(texts)
    assert ours.to_faiss(sq.SymbolIndex(32)).ntotal == 0


def test_without_faiss_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from semq_state_integrations.faiss import to_faiss

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'semq-state\[faiss\]'"):
        to_faiss(built(3, 8))


def test_repr_and_sizes() -> None:
    index = built(3, 384)
    assert index.n_bytes == 192 + 8
    assert repr(index).startswith("SymbolIndex(3 rows, {'operator': 'quant', 'dim': 384")
    assert index.dim == 384
    index.ids[0] = 9
    assert index.ids.tolist() == [0, 1, 2]
