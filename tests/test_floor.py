"""`sq.measure_floor`: the envelope in integers, verdicts with named reasons, and files that cannot be edited."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import folder as folder
from test_diff import in_weights, prefilled, with_generation, with_layer
from workers.made import dynamic, random, state

import semq_state as sq
from conftest import tiny_model
from semq_state.audit.floor import MARGIN, Floor, FloorCell, check_margin
from semq_state.audit.floor_files import MAX_BYTES, load_floor, save_floor
from semq_state.snapshot import Snapshot

N = 200  # tokens of a state here, of 2 heads


def reference() -> Snapshot:
    return state(dynamic(seq=N), dynamic(seq=N, seed=1), n_cached=N)


def noisy(of: Snapshot, n_changed: int, *, layer: int = 1, seed: int = 0) -> Snapshot:
    """The state with so many of one layer's 400 keys one symbol longer, at random places."""
    keys = of.cache.layers[layer].tensors["keys"].clone()
    places = torch.randperm(keys.shape[2] * 2, generator=torch.Generator().manual_seed(seed))[:n_changed]
    keys.view(-1, keys.shape[-1])[places] *= 1.001
    return with_layer(of, layer, keys=keys)


def floor_of(*changed: int, **options: Any) -> Floor:
    own = reference()
    return sq.measure_floor(own, (noisy(own, n, seed=i) for i, n in enumerate(changed)), **options)


def cell(floor: Floor, name: str = "layers.1.keys") -> FloorCell:
    return next(each for each in floor.cells if each.name == name)


def test_the_floor_is_the_worst_of_all_null_runs() -> None:
    floor = floor_of(3, 17, 5)
    assert (floor.reference, floor.n_nulls, floor.bins, floor.c_thousandths) == (reference().state_id, 3, 8, 2680)
    assert floor.margin == MARGIN == (2, 8) and floor.varied == ()
    assert [each.name for each in floor.cells] == [
        "layers.0.keys", "layers.0.values", "layers.1.keys", "layers.1.values", "generation.logits",
    ]  # fmt: skip
    assert cell(floor) == FloorCell("layers.1.keys", 17, 400, 1, 4, 9)
    assert cell(floor, "layers.0.keys") == FloorCell("layers.0.keys", 0, 400, 0, 0, 9)


def test_shares_are_compared_without_rounding() -> None:
    found = sq.diff(reference(), reference()).cells[0]
    big = 10**17
    start = FloorCell("x", big, 3 * big, 0, 0, 9)
    # 10^17 / 3*10^17 against one more in a total of one more: as floats both are 1/3.
    above = dataclasses.replace(found, n_changed=big + 1, n_vectors=3 * big + 2)
    below = dataclasses.replace(found, n_changed=big + 1, n_vectors=3 * big + 4)
    assert (big + 1) / (3 * big + 2) == big / (3 * big) == (big + 1) / (3 * big + 4)
    assert start.widened(above).changed == big + 1
    assert start.widened(below).changed == big


def test_semqs_own_rule_and_ours() -> None:
    own = reference()
    strict, ours = floor_of(10, margin=(1, 0)), floor_of(10)
    for n, by_strict, by_ours in ((0, "equal", "equal"), (10, "within", "within"), (11, "different", "within"),
                                  (28, "different", "within"), (29, "different", "different")):  # fmt: skip
        report = sq.diff(own, noisy(own, n, seed=7))
        assert (report.within(strict).outcome, report.within(ours).outcome) == (by_strict, by_ours), n
        assert report.within(ours).passed is (by_ours != "different")
    # Twice ten and eight more.
    assert report.within(ours).reasons == ("layers.1.keys: 29 of 400 vectors changed, the floor allows 28",)
    assert report.within(strict).reasons == ("layers.1.keys: 29 of 400 vectors changed, the floor allows 10",)


def test_few_vectors_that_changed_much_are_no_noise() -> None:
    own = reference()
    keys = own.cache.layers[0].tensors["keys"].clone()
    keys[0, 0, 50] = -keys[0, 0, 50]
    verdict = sq.diff(own, with_layer(own, 0, keys=keys)).within(floor_of(10))
    assert verdict.reasons == ("layers.0.keys: changed vectors differ in 8 symbols (99 %), the floor allows 1",)


def test_a_change_of_scale_is_no_noise_although_it_changes_one_symbol() -> None:
    """Where noise changes a symbol in every vector, counts say nothing any more."""
    own = reference()
    keys = own.cache.layers[1].tensors["keys"]
    noise = with_layer(own, 1, keys=keys + 0.004 * random(*keys.shape, seed=8))
    scaled = with_layer(own, 1, keys=(keys + 0.004 * random(*keys.shape, seed=9)) * 1.05)
    floor = sq.measure_floor(own, [noise])
    (reason,) = sq.diff(own, scaled).within(floor).reasons
    assert reason.startswith("layers.1.keys: norms differ by ")


def test_changes_below_a_symbol_are_within() -> None:
    own = reference()
    keys = own.cache.layers[0].tensors["keys"]
    report = sq.diff(own, with_layer(own, 0, keys=keys * (1 + 1e-6)))
    assert report.cells[0].n_changed < 5 < report.cells[0].n_bits_changed
    assert report.within(floor_of(10)).outcome == "within" and not report.equal


def test_reasons_are_named_first_difference_first() -> None:
    own = reference()
    ids = own.generation.input_ids.clone()
    ids[0, 17] += 1
    changed = with_generation(noisy(own, 200, layer=0), input_ids=ids, finished=torch.tensor([True]))
    floor = floor_of(10)
    assert sq.diff(own, changed).within(floor).reasons == (
        "tokens: part at 17",
        "layers.0.keys: 200 of 400 vectors changed, the floor allows 8",
        "generation.finished: 1 of 1 values",
    )
    reasons = sq.diff(own, own.crop(120)).within(floor).reasons
    assert reasons[:2] == (
        f"tokens: 120 of the reference's {N + 1}",
        "layers.0.keys: 238 of the reference's 400 vectors are here",
    )
    assert "generation.logits: missing" in reasons
    assert "generation.n_cached: 200 in the reference, 119 here" in reasons


def test_what_varied_among_null_runs_is_excused() -> None:
    own = with_generation(reference(), rng={"cpu": torch.zeros(16, dtype=torch.uint8)})
    other = with_generation(own, rng={"cpu": torch.ones(16, dtype=torch.uint8)}, config={"a": 1}, logits=None)
    third = with_generation(own, rng={"cpu": torch.full((16,), 2, dtype=torch.uint8)}, config={"a": 2}, logits=None)
    floor = sq.measure_floor(own, [other])
    assert floor.varied == (
        "generation.config.a", "generation.has_logits", "generation.logits", "generation.rng.cpu",
    )  # fmt: skip
    assert sq.diff(own, third).within(floor).outcome == "within"
    assert sq.diff(own, third).within(sq.measure_floor(own, [own])).outcome == "different"


def test_another_model_is_never_within() -> None:
    own, other = reference(), dataclasses.replace(reference(), provenance=state(weights="sha256:1").provenance)
    verdict = sq.diff(own, other, across_models=True).within(floor_of(400))
    assert verdict.outcome == "different" and verdict.reasons[0].startswith("weights: ")
    with pytest.raises(sq.ModelMismatchError):
        sq.measure_floor(own, [other])


def test_a_floor_of_another_reference_or_rule_is_refused() -> None:
    own = reference()
    floor = floor_of(10)
    changed = noisy(own, 3)
    with pytest.raises(sq.FloorError, match="pass it first"):
        sq.diff(changed, own).within(floor)
    with pytest.raises(sq.FloorError, match="pass the floor's reference first"):
        sq.diff(changed, changed).within(floor)
    with pytest.raises(sq.FloorError, match="bins=8"):
        sq.diff(own, changed, bins=4).within(floor)
    with pytest.raises(sq.FloorError, match="1000"):
        sq.diff(own, changed).within(dataclasses.replace(floor, c_thousandths=2000))


def test_null_runs_that_are_none_are_named(path: Path) -> None:
    own = reference()
    with pytest.raises(sq.FloorError, match="at least one null run"):
        sq.measure_floor(own, [])
    ids = own.generation.input_ids.clone()
    ids[0, 30] += 1
    with pytest.raises(
        sq.FloorError, match=r"null run 2: expected the reference's 201 tokens, found others from 30"
    ):
        sq.measure_floor(own, [own, with_generation(own, input_ids=ids)])
    with pytest.raises(
        sq.FloorError, match=r"null run 1 \(2 threads\): expected the reference's 201 tokens, found 9"
    ):
        sq.measure_floor(own, [("2 threads", own.crop(9))])
    sq.save(own.crop(9), path)
    with pytest.raises(sq.FloorError, match=path.name):
        sq.measure_floor(own, [path])
    fewer = dataclasses.replace(own, cache=own.cache.crop(150))
    with pytest.raises(sq.FloorError, match=r"layers.0.keys: expected 400 vectors"):
        sq.measure_floor(own, [fewer])
    for margin in ((0, 8), (1, -1), (2.0, 8), (1, True), (1,), "ab", None):
        with pytest.raises(sq.FloorError, match="margin"):
            check_margin(margin)


def test_null_runs_are_taken_one_at_a_time() -> None:
    own, alive = reference(), []

    def nulls() -> Iterator[Snapshot]:
        for i in range(4):
            alive.append(i)
            yield noisy(own, i + 1)

    assert sq.measure_floor(own, nulls()).n_nulls == len(alive) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_model_in_pieces_is_noise_and_other_weights_are_not(dtype: torch.dtype) -> None:
    """Prefills in one piece and in others differ in the last bits; so does nothing else."""
    model = tiny_model("llama", dtype=dtype)
    ids = torch.randint(60, 199, (1, 120), generator=torch.Generator().manual_seed(0))

    def pieces(*sizes: int) -> Snapshot:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for piece in ids.split(list(sizes), 1):
                logits = model(piece, past_key_values=cache, use_cache=True).logits
        return sq.snapshot_of(model, cache, ids, logits=logits[:, -1])

    own = prefilled(model, ids, in_pieces=False)
    floor = sq.measure_floor(own, (pieces(n, 120 - n) for n in range(10, 110, 12)))
    assert sq.diff(own, pieces(50, 30, 40)).within(floor).passed
    by = 1.001 if dtype == torch.float32 else 1.02
    changed = in_weights(model, lambda name, w: w * by if "layers.1.self_attn.v_proj" in name else w)
    report = sq.diff(own, prefilled(changed, ids, in_pieces=False), across_models=True)
    reasons = report.within(floor).reasons
    assert reasons[0].startswith("weights: ") and reasons[1].startswith("layers.1.values: ")


def test_held_out_null_runs_seldom_exceed_the_margin() -> None:
    """What the module says of simulated counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(10 ** rng.uniform(-1, 3, (1000, 1, 60)), (1000, 21, 60))
    worst, held_out = counts[:, :20].max(axis=1), counts[:, 20]
    assert 0.8 < (held_out > worst).any(axis=1).mean() < 0.95
    assert (held_out > MARGIN[0] * worst + MARGIN[1]).any(axis=1).mean() < 0.003


# Files


def test_a_floor_comes_back_from_its_file(tmp_path: Path) -> None:
    floor = dataclasses.replace(floor_of(3, 17), varied=("generation.rng.cpu", "é\u2028"))
    save_floor(floor, tmp_path / "floor.json")
    assert load_floor(tmp_path / "floor.json") == floor
    first = (tmp_path / "floor.json").read_bytes()
    save_floor(load_floor(tmp_path / "floor.json"), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first
    assert not any(isinstance(x, float) for x in _leaves(json.loads(first)))
    own = reference()
    assert sq.diff(own, noisy(own, 20)).within(load_floor(tmp_path / "floor.json")).outcome == "within"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


Edit = Callable[[dict[str, Any]], None]
EDITS: dict[str, Edit] = {
    "changed": lambda said: said["cells"][2].update(changed=100),
    "p99": lambda said: said["cells"][2].update(p99=9),
    "margin": lambda said: said.update(margin=[64, 8]),
    "reference": lambda said: said.update(reference=f"sha256:{'0' * 64}"),
    "varied": lambda said: said["varied"].append("generation.finished"),
    "fewer cells": lambda said: said["cells"].pop(),
    "order": lambda said: said["cells"].reverse(),
    "digest": lambda said: said.update(digest=f"sha256:{'0' * 64}"),
    "another field": lambda said: said.update(more=1),
    "no field": lambda said: said.pop("bins"),
    "another cell field": lambda said: said["cells"][0].update(more=1),
    "float": lambda said: said.update(n_nulls=2.0),
    "bool": lambda said: said["cells"][2].update(changed=True),
    "bool version": lambda said: said.update(version=True),
    "text": lambda said: said.update(n_nulls="2"),
    "p99_norm": lambda said: said["cells"][2].update(p99_norm=99),
    "negative": lambda said: said["cells"][2].update(changed=-1),
    "more than all": lambda said: said["cells"][2].update(changed=401),
    "no vectors": lambda said: said["cells"][2].update(total=0),
    "huge": lambda said: said["cells"][2].update(total=10**30),
    "twice": lambda said: said["cells"].append(said["cells"][0]),
    "bins": lambda said: said.update(bins=65),
    "format": lambda said: said.update(format="another"),
    "version": lambda said: said.update(version=2),
    "cells": lambda said: said.update(cells={}),
    "name": lambda said: said["cells"][0].update(name=""),
    "null": lambda said: said.update(margin=None),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_file_is_refused(what: str, tmp_path: Path) -> None:
    save_floor(floor_of(3, 17), tmp_path / "floor.json")
    said = json.loads((tmp_path / "floor.json").read_text())
    EDITS[what](said)
    (tmp_path / "floor.json").write_text(json.dumps(said))
    with pytest.raises(sq.FloorError, match="measure the floor again"):
        load_floor(tmp_path / "floor.json")


def test_values_are_checked_whatever_the_digest_says(tmp_path: Path) -> None:
    floor = floor_of(3)
    cells = (dataclasses.replace(floor.cells[0], changed=True), *floor.cells[1:])
    for wrong in ({"cells": cells}, {"n_nulls": True}, {"bins": 1}, {"reference": "sha256:x"}):
        save_floor(dataclasses.replace(floor, **wrong), tmp_path / "floor.json")
        with pytest.raises(sq.FloorError, match="measure the floor again"):
            load_floor(tmp_path / "floor.json")


def test_what_is_no_strict_json_is_refused(tmp_path: Path) -> None:
    save_floor(floor_of(3), path := tmp_path / "floor.json")
    text = path.read_text()
    for words, other in {
        "each field once": text.replace('"bins": 8', '"bins": 8, "bins": 8'),
        "integers only": text.replace('"bins": 8', '"bins": NaN'),
        "integers": text.replace('"bins": 8', '"bins": 8e0'),
        "a floor": text[:-3],
        "floor": "[" * 100_000,
        "the fields": "[]",
        "at most": " " * (MAX_BYTES + 1),
    }.items():
        path.write_text(other)
        with pytest.raises(sq.FloorError, match=words):
            load_floor(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(sq.FloorError):
        load_floor(path)
    with pytest.raises(sq.StoreError):
        load_floor(tmp_path / "no.json")


# The command line


def test_floor_and_diff_from_the_command_line(cli: Any, tmp_path: Path) -> None:
    own = reference()
    states = {"own": own, "n1": noisy(own, 5), "n2": noisy(own, 9, seed=1), "like": noisy(own, 12, seed=2),
              "changed": noisy(own, 300), "short": own.crop(20)}  # fmt: skip
    at = {name: tmp_path / f"{name}.safetensors" for name in states}
    for name, snapshot in states.items():
        sq.save(snapshot, at[name])
    out = tmp_path / "floor.json"
    code, text, err = cli("floor", at["own"], at["n1"], at["n2"], "--out", out)
    assert code == 0, err
    assert text.startswith(f"floor of {own.state_id} from 2 null runs in {out}\n")
    assert "most in layers.1.keys: 9 of 400 vectors" in text
    assert load_floor(out).n_nulls == 2
    code, text, _ = cli("diff", at["own"], at["like"], "--floor", out)
    assert code == 0 and text.endswith("by the floor: within\n")
    code, text, _ = cli("diff", at["own"], at["changed"], "--floor", out, "--json")
    said = json.loads(text)["verdict"]
    assert (code, said["outcome"], said["passed"]) == (1, "different", False)
    assert said["reasons"] == ["layers.1.keys: 300 of 400 vectors changed, the floor allows 26"]
    code, _, err = cli("diff", at["like"], at["own"], "--floor", out)
    assert code == 2 and "pass it first" in err
    assert cli("diff", at["own"], at["like"], "--floor", out, "--bins", "4")[0] == 2
    code, _, err = cli("floor", at["own"], at["short"], "--out", out)
    assert code == 2 and "short.safetensors" in err
    code, text, _ = cli("floor", at["own"], at["n1"], "--out", out, "--margin", "1", "0", "--bins", "4", "--json")
    said = json.loads(text)
    assert (code, said["margin"], said["bins"], said["n_nulls"]) == (0, [1, 0], 4, 1)
    for missing in ((), (at["own"],), ("--prompt", "w1"), (at["own"], "--runs", "1", "--vary", "x")):
        assert cli("floor", *missing, "--out", out)[0] == 2, missing
    assert cli("floor", at["own"], at["n1"], "--out", tmp_path / "no" / "floor.json")[0] == 2


def test_null_runs_are_made_from_a_model(cli: Any, folder: str, tmp_path: Path) -> None:
    out, kept = tmp_path / "floor.json", tmp_path / "reference.safetensors"
    prompt = " ".join(f"w{i}" for i in range(30))
    code, text, err = cli(
        "floor", "--runs", "3", "--model", folder, "--prompt", prompt, "--tokens", "6",
        "--save-reference", kept, "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(text)["reference"] == sq.inspect(kept).state_id
    other = tmp_path / "other.json"
    assert cli("floor", "--runs", "1", folder, "--prompt", prompt, "--tokens", "6", "--out", other)[0] == 0
    assert load_floor(other).reference == sq.inspect(tmp_path / "other-reference.safetensors").state_id
    assert cli("diff", kept, kept, "--floor", out)[0] == 0
    code, text, err = cli(
        "floor", kept, "--runs", "2", "--model", folder, "--vary", "chunks,attention", "--out", out
    )
    assert code == 0, err
    assert load_floor(out).n_nulls == 2
