"""`exact-predicted` files: identity, fresh processes, what falls back, missing predictors, hostile entries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guessing import DIM, HEADS, N_LAYERS, WEIGHTS, cache_of, predictor_of, snapshot_of
from safetensors.torch import load_file, save_file
from test_hostile import assert_refused, cases, little_memory, put_together, signed, taken_apart

import semq_state as sq
from conftest import tiny_model
from semq_state import calibration, content
from semq_state.calibration import Predictor
from semq_state.codecs import predicted
from semq_state.errors import (
    CalibrationError,
    FormatError,
    IntegrityError,
    SemqStateError,
    UnknownCodecError,
)
from semq_state.measuring.predictor import measure_predictor
from semq_state.snapshot import Snapshot

__all__ = ["little_memory"]

CODEC = "exact-predicted"
N_TOKENS = 100
RUN = 64  # tokens of a section, so that small states have several


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return predictor_of()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="module")
def short_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(predicted, "_ROWS", RUN)
        yield


@pytest.fixture
def kept(predictor: Predictor) -> Path:
    """The predictor in its place."""
    return calibration.save_predictor(predictor, calibration.predictor_place_for(WEIGHTS))


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return snapshot_of(cache_of(N_TOKENS, 3))


def assert_equal(found: Snapshot, expected: Snapshot) -> None:
    ours, theirs = found.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert content.tensor_digests(ours[name]) == content.tensor_digests(tensor), name


@pytest.mark.usefixtures("kept")
def test_identity_is_that_of_every_lossless_codec(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "_ROWS", 1024)
    snapshot = snapshot_of(cache_of(1100, 3))
    exact = sq.save(snapshot, path, codec="exact")
    info = sq.save(snapshot, path, codec=CODEC)
    found = sq.load(path)
    assert info.state_id == exact.state_id == snapshot.state_id == found.state_id
    assert_equal(found, snapshot)
    assert found.coding is None and info.codec == CODEC
    assert info.n_predicted == info.as_dict()["n_predicted"] == 2 * N_LAYERS and exact.n_predicted == 0
    assert info.n_bytes < 0.8 * exact.n_bytes
    verdict = sq.verify(path)
    assert verdict.passed and verdict.n_sections == len(snapshot.tensors()) - 2 * N_LAYERS + 2


@pytest.mark.usefixtures("kept")
def test_same_state_gives_the_same_bytes(snapshot: Snapshot, path: Path) -> None:
    sq.save(snapshot, path, codec=CODEC)
    first = path.read_bytes()
    sq.save(snapshot, path, codec=CODEC, verify=False)
    assert path.read_bytes() == first


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("batch", "n_tokens"), [(1, 1), (3, 70), (2, 64), (70, 3)], ids=str)
def test_states_of_any_size_come_back(batch: int, n_tokens: int, path: Path) -> None:
    expected = snapshot_of(cache_of(n_tokens, 5, batch))
    assert sq.save(expected, path, codec=CODEC).n_predicted == 2 * N_LAYERS
    assert_equal(sq.load(path), expected)


def test_sections_end_with_chunks(path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", 40 * HEADS * DIM * 2)
    calibration.save_predictor(
        replace(predictor), calibration.predictor_place_for(WEIGHTS)
    )  # its digest is another
    expected = snapshot_of(cache_of(N_TOKENS, 3))
    (entry,) = sq.save(expected, path, codec=CODEC).manifest.joint
    assert [(s.start, s.stop) for s in entry.sections] == [(0, 40), (40, 80), (80, 100)]
    assert_equal(sq.load(path), expected)
    draft = taken_apart(path.read_bytes())
    draft["manifest"]["tensors"]["layers.2.values"]["digests"][1] = f"sha256:{'0' * 64}"
    path.write_bytes(put_together(signed(draft)))
    assert list(sq.verify(path).failures) == ["joint.0#1"]
    with pytest.raises(IntegrityError, match=r"joint\.0#1.*layers\.2\.values"):
        sq.load(path)


@pytest.mark.usefixtures("kept")
def test_progress_reaches_the_end(snapshot: Snapshot, path: Path) -> None:
    calls: list[tuple[int, int]] = []
    sq.save(snapshot, path, codec=CODEC, progress=lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1] > 0
    sq.load(path, progress=lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1] > 0


# A fresh process


READ = """
import json, sys, semq_state as sq
from semq_state import content
found = sq.load(sys.argv[1])
print(json.dumps([found.state_id, {n: list(content.tensor_digests(t)) for n, t in found.tensors().items()}]))
"""


@pytest.mark.usefixtures("kept")
def test_a_fresh_process_reads_it(snapshot: Snapshot, path: Path) -> None:
    sq.save(snapshot, path, codec=CODEC)
    command = [sys.executable, "-W", "error", "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ), timeout=120)
    state_id, digests = json.loads(done.stdout)
    assert state_id == snapshot.state_id
    assert digests == {name: list(content.tensor_digests(t)) for name, t in snapshot.tensors().items()}


def test_a_predictor_can_be_named(predictor: Predictor, snapshot: Snapshot, path: Path, tmp_path: Path) -> None:
    own = calibration.save_predictor(predictor, tmp_path / "own.safetensors")
    sq.save(snapshot, path, codec=CODEC, predictor=own)
    assert_equal(sq.load(path, predictor=str(own)), snapshot)


# What is not predicted


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_coded_alone(dtype: str, path: Path) -> None:
    cache = [tensor.to(getattr(torch, dtype)) for tensor in cache_of(40, 3)]
    info = sq.save(snapshot_of(cache), path, codec=CODEC)
    assert info.n_predicted == 0
    assert {s.codec for t in info.manifest.tensors.values() for s in t.sections} == {"planes"}
    assert_equal(sq.load(path), snapshot_of(cache))


def test_a_state_without_bfloat16_needs_no_predictor(path: Path) -> None:
    expected = snapshot_of([tensor.float() for tensor in cache_of(40, 3)])
    assert sq.save(expected, path, codec=CODEC).n_predicted == 0


@pytest.mark.usefixtures("kept")
def test_layers_of_different_lengths_are_coded_alone(path: Path) -> None:
    cache = cache_of(40, 3)
    cache[0], cache[1] = cache[0][:, :, 10:], cache[1][:, :, 10:]
    assert sq.save(snapshot_of(cache), path, codec=CODEC).n_predicted == 0
    assert_equal(sq.load(path), snapshot_of(cache))


@pytest.mark.usefixtures("kept")
def test_companions_are_coded_alone(path: Path) -> None:
    snapshot = snapshot_of(cache_of(40, 3))
    own = replace(snapshot.generation, companions={"assistant": snapshot_of(cache_of(40, 4)).cache})
    expected = replace(snapshot, generation=own)
    assert sq.save(expected, path, codec=CODEC).n_predicted == 2 * N_LAYERS
    assert_equal(sq.load(path), expected)


# Live models


def contexts(n: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 199, (1, length), generator=generator) for _ in range(n)]


def captured(model: Any, n_prompt: int = 30) -> Snapshot:
    ids = contexts(1, n_prompt)[0]
    with sq.capture(model) as run:
        model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    return run.snapshot()


def test_llama_end_to_end(path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    made = measure_predictor(model, contexts(4, 60))
    snapshot = captured(model)
    assert calibration.predictor_for(snapshot.provenance.weights).digest == made.digest
    assert [guess.turn for guess in made.sets[0].guesses] == [0, 0]
    info = sq.save(snapshot, path, codec=CODEC)
    assert info.n_predicted == 4 and info.state_id == snapshot.state_id
    assert_equal(sq.load(path), snapshot)
    ours, theirs = (sq.restore(state, model).generate(max_new_tokens=20) for state in (sq.load(path), snapshot))
    assert torch.equal(ours, theirs)


def test_sliding_and_full_layers_are_sets_of_their_own(path: Path) -> None:
    model = tiny_model("gemma3", dtype=torch.bfloat16)
    made = measure_predictor(model, contexts(4, 60))
    assert sorted(each.layers for each in made.sets) == [(0,), (1,)]
    snapshot = captured(model)
    info = sq.save(snapshot, path, codec=CODEC)
    begins = {entry.names[0]: entry.params["begin"] for entry in info.manifest.joint}
    seen = snapshot.cache.layers[0].meta["n_seen"]
    assert begins == {"layers.0.keys": seen - 11, "layers.1.keys": 0} and seen > 30
    assert_equal(sq.load(path), snapshot)


def test_a_model_in_float32_has_no_predictor() -> None:
    with pytest.raises(CalibrationError, match="exact-max"):
        measure_predictor(tiny_model("llama"), contexts(2, 20))


@pytest.mark.smollm2
def test_the_demo_model_is_predicted(smollm2: tuple[Any, Any], path: Path) -> None:
    model, tokenizer = smollm2
    text = (Path(sq.__file__).parents[1] / "README.md").read_text() * 4
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    measure_predictor(model, list(ids[:, :4096].split(1024, dim=1)), reach=1)
    with sq.capture(model, tokenizer=tokenizer) as run:
        model.generate(ids[:, 512:1024], max_new_tokens=4, do_sample=False)
    snapshot = run.snapshot()
    info = sq.save(snapshot, path, codec=CODEC)
    assert info.n_predicted == 60 and info.cache_bytes / info.n_bytes > 1.7
    assert_equal(sq.load(path), snapshot)


# Predictors that are not there, or not right


def test_saving_without_a_predictor_says_where_it_was_looked_for(
    snapshot: Snapshot, path: Path, folder: Path
) -> None:
    with pytest.raises(CalibrationError, match=f"{folder}.*sha256-{'ab' * 32}-predictor.*exact-max"):
        sq.save(snapshot, path, codec=CODEC)
    assert not path.exists()


def test_a_predictor_of_another_model_is_refused(predictor: Predictor, snapshot: Snapshot, path: Path) -> None:
    other = replace(predictor, weights=f"sha256:{'cd' * 32}")
    with pytest.raises(CalibrationError, match="cdcd"):
        sq.save(snapshot, path, codec=CODEC, predictor=other)


def test_a_missing_predictor_is_named(kept: Path, snapshot: Snapshot, path: Path, predictor: Predictor) -> None:
    sq.save(snapshot, path, codec=CODEC)
    kept.unlink()
    with pytest.raises(CalibrationError, match=f"{predictor.digest} in {kept}.*none"):
        sq.load(path)
    verdict = sq.verify(path)
    assert set(verdict.unchecked) == {"joint.0#0", "joint.0#1"} and not verdict.failures and not verdict.passed
    assert sq.verify(path, predictor=predictor).passed
    assert sq.inspect(path).n_predicted == 2 * N_LAYERS
    assert_equal(sq.load(path, predictor=predictor), snapshot)


def test_another_predictor_is_refused_before_decoding(kept: Path, snapshot: Snapshot, path: Path) -> None:
    sq.save(snapshot, path, codec=CODEC)
    made = calibration.load_predictor(kept)
    layer = replace(made.sets[0].guesses[0], mean=made.sets[0].guesses[0].mean + 1)
    other = replace(made, sets=(replace(made.sets[0], guesses=(layer, *made.sets[0].guesses[1:])),))
    calibration.save_predictor(other, kept)
    with pytest.raises(CalibrationError, match=f"{made.digest}.*{other.digest}"):
        sq.load(path)
    with pytest.raises(CalibrationError, match=f"{made.digest}.*{other.digest}"):
        sq.load(path, predictor=kept)


def test_a_predictor_file_comes_back(predictor: Predictor, kept: Path) -> None:
    found = calibration.load_predictor(kept)
    assert (found.digest, found.weights, found.model_name) == (predictor.digest, WEIGHTS, "tiny")
    assert found.arrays().keys() == predictor.arrays().keys()


def table(change: Callable[[Any], None]) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change of the table of a predictor's file."""
    import msgpack

    def changed(tensors: dict[str, torch.Tensor]) -> None:
        told = msgpack.unpackb(tensors["predictor"].numpy().tobytes())
        change(told)
        tensors["predictor"] = torch.frombuffer(bytearray(msgpack.packb(told)), dtype=torch.uint8)

    return changed


def array(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def filled(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[at] = value
        return tensor

    return changed


def of_set(**fields: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    return table(lambda told: told["sets"][0].update(fields))


HOSTILE_PREDICTORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "one unit changed": array("0.guesses.1.unit", lambda t: t * 2),
    "sums that are not exact": array("0.guesses.1.before", lambda t: torch.full_like(t, 32767)),
    "sums within that are not exact": array("0.guesses.1.within", lambda t: torch.full_like(t, -32768)),
    "a unit of infinity": array("0.guesses.1.unit", filled(0, float("inf"))),
    "a unit of zero": array("0.guesses.1.unit", filled(3, 0.0)),
    "a fineness of NaN": array("0.guesses.0.fineness", filled(0, float("nan"))),
    "a mean of NaN": array("0.guesses.0.mean", filled(0, float("nan"))),
    "a mean too large": array("0.guesses.0.mean", filled(0, 1e31)),
    "coefficients of another dtype": array("0.guesses.1.before", lambda t: t.int()),
    "coefficients in bfloat16": array("0.guesses.1.before", lambda t: t.bfloat16()),
    "one row less": array("0.guesses.1.before", lambda t: t[1:].contiguous()),
    "scalar coefficients": array("0.guesses.1.before", lambda t: t[0, 0].clone()),
    "within of another shape": array("0.guesses.1.within", lambda t: t[1:].contiguous()),
    "within of no columns": array("0.guesses.1.within", lambda t: t[:, :0].contiguous()),
    "the first layer told by one before": array("0.guesses.0.before", lambda t: torch.zeros(64, 64, dtype=t.dtype)),
    "cosines of no angle": array("0.turns.0", lambda t: t * 0 + 2**30),
    "turns of another dtype": array("0.turns.0", lambda t: t.short()),
    "more pairs than channels": array("0.turns.0", lambda t: t.repeat(2, 1)),
    "no pairs": array("0.turns.0", lambda t: t[:0].contiguous()),
    "an array besides": lambda tensors: tensors.update({"0.more": torch.zeros(1)}),
    "an array of no set": lambda tensors: tensors.update({"7.more": torch.zeros(1)}),
    "an array of set minus one": lambda tensors: tensors.update({"-1.more": torch.zeros(1)}),
    "an array without a set": lambda tensors: tensors.update({"more": torch.zeros(1)}),
    "an array missing": lambda tensors: tensors.pop("0.guesses.2.mean"),
    "no table": lambda tensors: tensors.pop("predictor"),
    "a table of floats": lambda tensors: tensors.update(predictor=torch.zeros(3)),
    "a table of nothing": lambda tensors: tensors.update(predictor=torch.zeros(0, dtype=torch.uint8)),
    "a list that claims much": lambda tensors: tensors.update(
        predictor=torch.tensor([0xDD, 0xFF, 0xFF, 0xFF, 0xFF], dtype=torch.uint8)
    ),
    "a table besides": table(lambda told: told.update(more=1)),
    "sets that are no list": table(lambda told: told.update(sets={})),
    "weights that are no text": table(lambda told: told.update(weights=3)),
    "a set besides": table(lambda told: told["sets"].append({})),
    "a set twice": table(lambda told: told["sets"].append(told["sets"][0])),
    "layers that do not ascend": of_set(layers=[0, 2, 1, 3]),
    "layers that are truths": of_set(layers=[False, True, 2, 3]),
    "layers that are text": of_set(layers="abcd"),
    "no layers": of_set(layers=[], turn_of=[]),
    "negative heads": of_set(n_heads=-2, head_dim=-16),
    "no heads": of_set(n_heads=0),
    "very many heads": of_set(n_heads=65535, head_dim=65535),
    "heads of text": of_set(n_heads="2"),
    "an unknown turn": of_set(turn_of=[0, 1, 0, 0]),
    "a turn of text": of_set(turn_of=["0", 0, 0, 0]),
    "turns missing": of_set(turn_of=[0]),
    "an unknown layout": of_set(turns=[{"layout": "spiral", "begin": 0}]),
    "a turn outside": of_set(turns=[{"layout": "half", "begin": 1}]),
    "a turn at a negative place": of_set(turns=[{"layout": "half", "begin": -1}]),
    "turns of nothing": of_set(turns=[None]),
}  # fmt: skip


@cases(HOSTILE_PREDICTORS)
def test_hostile_predictor_is_refused(case: Any, predictor: Predictor, kept: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(kept).items()}
    case(tensors)
    metadata = {"format": "semq_state predictor", "format_version": "1", "digest": predictor.digest}
    save_file(tensors, kept, metadata)
    # Were it not for its parts, the digest would be all that is wrong.
    by_digest = case in (HOSTILE_PREDICTORS["one unit changed"], HOSTILE_PREDICTORS["no table"])
    with pytest.raises(CalibrationError, match="predictor" if by_digest else "a whole predictor"):
        calibration.load_predictor(kept)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"format": "semq_state calibration"}, {"format": "semq_state predictor", "format_version": "2"}],
    ids=len,
)
def test_other_file_is_no_predictor(metadata: dict[str, str], kept: Path) -> None:
    save_file(load_file(kept), kept.with_name("x"), metadata)
    with pytest.raises(CalibrationError):
        calibration.load_predictor(kept.with_name("x"))
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(CalibrationError):
        calibration.load_predictor(kept)


# Hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor, snapshot: Snapshot) -> bytes:
    path = tmp_path_factory.mktemp("good") / "state"
    sq.save(snapshot, path, codec=CODEC, predictor=predictor)
    return path.read_bytes()


Draft = dict[str, Any]
Change = Callable[[Draft], object]


def joint(change: Callable[[list[Any]], object]) -> Change:
    """A change of the one joint entry: names, codec, parameters, sections."""
    return lambda draft: change(draft["manifest"]["joint"][0])


def params(**fields: Any) -> Change:
    return joint(lambda entry: entry[2].update(fields))


def sections(*bounds: tuple[Any, Any]) -> Change:
    def changed(entry: list[Any]) -> None:
        entry[3] = [[name, *pair, digest] for (name, _, _, digest), pair in zip(entry[3], bounds, strict=False)]

    return joint(changed)


def payload(change: Callable[[bytearray], object], *, told: bool = True) -> Change:
    """A change of the first joint section's bytes, with its digest made to fit or not."""

    def changed(draft: Draft) -> None:
        section = draft["sections"]["joint.0#0"]
        data = bytearray(section["data"])
        change(data)
        section.update(data=bytes(data), shape=[len(data)])
        if told:
            draft["manifest"]["joint"][0][3][0][3] = content.digest(np.frombuffer(bytes(data), np.uint8))

    return changed


def each_tensor(**fields: Any) -> Change:
    """A change of the entries of all joint tensors."""
    return lambda draft: [draft["manifest"]["tensors"][n].update(fields) for n in draft["manifest"]["joint"][0][0]]


def own_section(draft: Draft) -> None:
    entry = draft["manifest"]["tensors"]["generation.logits"]["sections"][0]
    draft["manifest"]["tensors"]["layers.0.keys"]["sections"] = [["extra", 0, N_TOKENS, *entry[3:]]]
    draft["sections"]["extra"] = {"dtype": "U8", "shape": [9000], "data": bytes(9000)}


def as_version(version: int) -> Change:
    def changed(draft: Draft) -> None:
        draft["manifest"]["format_version"] = version
        draft["manifest"].pop("report")

    return changed


def flip(at: int) -> Callable[[bytearray], object]:
    def changed(data: bytearray) -> None:
        data[at] ^= 1

    return changed


BYTE = {"dtype": "U8", "shape": [1], "data": b"x"}

HOSTILE: dict[str, tuple[type[SemqStateError], str, Change]] = {
    "a section is missing": (IntegrityError, "joint.0#1", lambda d: d["sections"].pop("joint.0#1")),
    "a section is left over": (
        IntegrityError,
        "more",
        lambda d: d["sections"].update(more=BYTE),
    ),
    "a section twice": (IntegrityError, "once", joint(lambda e: e[3][1].__setitem__(0, "joint.0#0"))),
    "the manifest as a section": (IntegrityError, "once", joint(lambda e: e[3][1].__setitem__(0, "manifest"))),
    "a tensor's section as a joint one": (
        IntegrityError,
        "once",
        joint(lambda e: e[3][1].__setitem__(0, "generation.logits")),
    ),
    "no joint entries": (FormatError, "layers.0.keys", lambda d: d["manifest"].update(joint=[])),
    "joint entries of text": (FormatError, "joint", lambda d: d["manifest"].update(joint="x")),
    "an entry of text": (FormatError, "four fields", lambda d: d["manifest"].update(joint=["abcd"])),
    "an entry of five": (FormatError, "four fields", joint(lambda e: e.append(1))),
    "an entry twice": (FormatError, "once", lambda d: d["manifest"]["joint"].append(d["manifest"]["joint"][0])),
    "a name twice": (FormatError, "once", joint(lambda e: e[0].append(e[0][0]))),
    "a name missing": (FormatError, "layers.3.values", joint(lambda e: e[0].pop())),
    "a name unknown": (FormatError, "together|jointly", joint(lambda e: e[0].__setitem__(0, "layers.9.keys"))),
    "a name that stands alone": (FormatError, "jointly", joint(lambda e: e[0].append("generation.logits"))),
    "a name of a number": (FormatError, "text", joint(lambda e: e[0].__setitem__(0, 3))),
    "no names": (FormatError, "one spec", joint(lambda e: e[0].clear())),
    "names in another order": (CalibrationError, "joint.0#0.*set of 8", joint(lambda e: e[0].reverse())),
    "a tensor with sections too": (FormatError, "jointly", own_section),
    "a tensor of another shape": (
        FormatError,
        "one spec",
        lambda d: d["manifest"]["tensors"]["layers.1.keys"].update(shape=[1, 1, N_TOKENS, 32]),
    ),
    "all tensors of another dtype": (IntegrityError, "joint.0#0.*bf16", each_tensor(dtype="F16")),
    "all tensors of another shape": (IntegrityError, "joint.0#0.*bf16", each_tensor(shape=[1, 1, N_TOKENS, 32])),
    "all tensors of more rows": (IntegrityError, "joint.0#0", each_tensor(shape=[2, HEADS, N_TOKENS, DIM])),
    "all tensors without rows": (FormatError, "joint section", each_tensor(shape=[0, HEADS, N_TOKENS, DIM])),
    "a gap": (FormatError, "from 64", sections((0, 64), (65, 100))),
    "an overlap": (FormatError, "from 64", sections((0, 64), (60, 100))),
    "an end too early": (FormatError, "100 tokens", sections((0, 64), (64, 99))),
    "an end too late": (FormatError, "100 tokens", sections((0, 64), (64, 101))),
    "no sections": (FormatError, "100 tokens", joint(lambda e: e[3].clear())),
    "an empty section": (FormatError, "from 0", sections((0, 0), (0, 100))),
    "a negative start": (FormatError, "size", sections((-1, 64), (64, 100))),
    "a start of text": (FormatError, "size", sections(("0", 64), (64, 100))),
    "a section of three": (FormatError, "four fields", joint(lambda e: e[3][0].pop())),
    "a section's name of a number": (FormatError, "text", joint(lambda e: e[3][0].__setitem__(0, 3))),
    "no digest": (FormatError, "digest", joint(lambda e: e[3][0].__setitem__(3, "md5:00"))),
    "other bounds": (IntegrityError, r"joint\.0#0", sections((0, 60), (60, 100))),
    "an unknown codec": (UnknownCodecError, r"joint\.0#0.*newer", joint(lambda e: e.__setitem__(1, "planes"))),
    "a codec of a number": (FormatError, "text", joint(lambda e: e.__setitem__(1, 5))),
    "parameters of text": (FormatError, "table", joint(lambda e: e.__setitem__(2, "x"))),
    "a parameter missing": (IntegrityError, r"joint\.0#0.*predictor", joint(lambda e: e[2].pop("begin"))),
    "a parameter besides": (IntegrityError, r"joint\.0#0.*predictor", params(more=1)),
    "another predictor": (CalibrationError, r"joint\.0#0.*sha256:00", params(predictor="sha256:00")),
    "a predictor of a number": (IntegrityError, r"joint\.0#0", params(predictor=3)),
    "a set that is not there": (CalibrationError, r"joint\.0#0.*set 1 of 1", params(set=1)),
    "a set from the end": (CalibrationError, r"joint\.0#0.*set -1", params(set=-1)),
    "a set of truth": (IntegrityError, r"joint\.0#0", params(set=False)),
    "a negative place": (IntegrityError, r"joint\.0#0.*at -1", params(begin=-1)),
    "a place far away": (IntegrityError, r"joint\.0#0.*at 16777216", params(begin=1 << 24)),
    "a place of a huge number": (IntegrityError, r"joint\.0#0", params(begin=1 << 60)),
    "another place": (IntegrityError, r"joint\.0#0", params(begin=5)),
    "a bit of the payload": (IntegrityError, r"joint\.0#0", payload(flip(-1), told=False)),
    "a bit at its end, and the digest": (IntegrityError, r"joint\.0#0", payload(flip(-1))),
    "a size in the payload, and the digest": (IntegrityError, r"joint\.0#0", payload(flip(3))),
    "a shorter payload, and the digest": (IntegrityError, r"joint\.0#0", payload(lambda data: data.pop())),
    "a longer payload, and the digest": (
        IntegrityError,
        r"joint\.0#0.*zeros",
        payload(lambda data: data.append(1)),
    ),
    "a payload of few bytes": (
        IntegrityError,
        r"joint\.0#0.*claim of",
        payload(lambda data: data.__delitem__(slice(60, None))),
    ),
    "no payload": (IntegrityError, r"joint\.0#0.*claim of", payload(lambda data: data.clear())),
    "a payload that is no run of bytes": (
        IntegrityError,
        r"joint\.0#0",
        lambda d: d["sections"]["joint.0#0"].update(dtype="BOOL"),
    ),
    "version 2 with joint entries": (FormatError, "fields", as_version(2)),
    "no field for them": (FormatError, "fields", lambda d: d["manifest"].pop("joint")),
}


@pytest.mark.usefixtures("kept")
@cases(HOSTILE)
def test_hostile_joint_entry_is_refused(
    case: tuple[type[SemqStateError], str, Change], good: bytes, path: Path
) -> None:
    kind, words, change = case
    draft = taken_apart(good)
    change(draft)
    assert_refused(path, put_together(signed(draft)), kind)
    with pytest.raises(kind, match=words):
        sq.load(path)
    verdict = sq.verify(path)
    if "joint" in words and "#0" in words and "claim" not in words and verdict.state_id:
        assert "joint.0#0" in {**verdict.failures, **verdict.unchecked} and not verdict.passed


@pytest.mark.usefixtures("kept")
def test_damage_to_a_joint_section_is_named(good: bytes, path: Path) -> None:
    n_header = int.from_bytes(good[:8], "little")
    entry = json.loads(good[8 : 8 + n_header])["joint.0#1"]["data_offsets"]
    for at in np.linspace(entry[0], entry[1] - 1, 20).astype(int).tolist():
        data = bytearray(good)
        data[8 + n_header + at] ^= 4
        path.write_bytes(data)
        assert set(sq.verify(path).failures) == {"joint.0#1"}
        with pytest.raises(IntegrityError, match=r"joint\.0#1"):
            sq.load(path)
