"""`sq.diff`: numbers worked out by hand, alignment of windows, every kind of state, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_operations import hybrid, mamba
from test_ways import encoder_decoder
from transformers import DynamicCache
from workers.made import dynamic, random, state

import semq_state as sq
from conftest import tiny_model
from semq_state.audit.diff import percentile
from semq_state.audit.heatmap import MAX_COLUMNS, panels_of, scale_of
from semq_state.audit.report import Diff
from semq_state.audit.vectors import measure
from semq_state.codecs.semq_rules import Quant, best_range
from semq_state.snapshot import CacheState, LayerState, Snapshot

C = best_range(8)


def one_layer(keys: torch.Tensor, values: torch.Tensor | None = None, **meta: Any) -> LayerState:
    return LayerState(
        "dynamic", {"keys": keys, "values": torch.ones_like(keys) if values is None else values}, meta
    )


def with_layer(snapshot: Snapshot, number: int, **tensors: torch.Tensor) -> Snapshot:
    """The state with other tensors in one layer."""
    layers = list(snapshot.cache.layers)
    layers[number] = dataclasses.replace(layers[number], tensors={**layers[number].tensors, **tensors})
    return dataclasses.replace(snapshot, cache=dataclasses.replace(snapshot.cache, layers=tuple(layers)))


def with_generation(snapshot: Snapshot, **changes: Any) -> Snapshot:
    return dataclasses.replace(snapshot, generation=dataclasses.replace(snapshot.generation, **changes))


def rows(*vectors: list[float]) -> torch.Tensor:
    """One head's tokens, `(1, 1, seq, dim)`."""
    return torch.tensor([[vectors]], dtype=torch.float32)


# Numbers


def test_numbers_worked_out_by_hand() -> None:
    # Units of 4 coordinates end at c / 2 = 1.34: 0.6 is in bin 3 of 8 and 0.8 in bin 4.
    a = state(one_layer(rows([3, 4, 0, 0], [3, 4, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0])), n_cached=4)
    b = with_layer(a, 0, keys=rows([3, 4, 0, 0], [6, 8, 0, 0], [4, 3, 0, 0], [0, 0, 0, 0]))
    report = sq.diff(a, b)
    cell = report.cell("layers.0.keys")
    assert (cell.n_vectors, cell.n_bits_changed, cell.n_changed, cell.n_units) == (4, 2, 2, 5)
    assert cell.per_token is not None
    # Twice as long: the direction stays, the norm's symbol changes. Turned: two coordinates change places.
    assert cell.per_token.hamming.tolist() == [0, 1, 2, 0]
    # Norms 5 and 10 are 2^11 steps apart.
    assert (cell.hamming, cell.p99, cell.p99_norm) == (3, 2, 2048)
    assert cell.per_token.relative.tolist() == pytest.approx([0, 1, math.sqrt(2) / 5, 0], abs=1e-12)
    assert cell.per_token.max_abs.tolist() == [0, 4, 1, 0]
    assert cell.min_cosine == pytest.approx(0.96, abs=1e-12)
    assert cell.mean_cosine == pytest.approx((1 + 1 + 0.96 + 1) / 4, abs=1e-12)
    assert cell.relative == pytest.approx(math.sqrt((25 + 2) / 75))
    assert (cell.max_abs, cell.first_token, cell.beyond) == (4, 1, True)
    assert (report.first_token, report.first_layer, report.equal) == (1, 0, False)
    assert report.cell("layers.0.values").equal


def naive(a: torch.Tensor, b: torch.Tensor, axis: int | None, bins: int) -> dict[str, Any]:
    """The same numbers vector by vector."""
    dim, c = a.shape[-1], best_range(bins)
    n_tokens = 1 if axis is None else a.shape[axis]
    hamming, worst, cosines, changed = np.zeros(n_tokens, int), np.zeros(n_tokens), [], 0
    for token in range(n_tokens):
        parts = (x if axis is None else x.select(axis, token) for x in (a, b))
        for x, y in zip(*(p.reshape(-1, dim).float().numpy() for p in parts), strict=True):
            changed += x.tobytes() != y.tobytes()
            lengths = [np.linalg.norm(v.astype(np.float64)) for v in (x, y)]
            symbols = [
                Quant(dim, bins, c).symbols((v / np.float32(n or 1))[None])
                for v, n in zip((x, y), lengths, strict=True)
            ]
            norms = [np.float32(n).view(np.uint32) >> 12 for n in lengths]
            hamming[token] += int((symbols[0] != symbols[1]).sum()) + int(norms[0] != norms[1])
            worst[token] = max(worst[token], float(np.abs(x.astype(np.float64) - y).max()))
            product = lengths[0] * lengths[1]
            cosines.append(float(x.astype(np.float64) @ y) / product if product else float(lengths == [0, 0]))
    return {"hamming": hamming.tolist(), "max_abs": worst.tolist(), "cosines": cosines, "changed": changed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3, 50, 8), 2), ((1, 2, 700, 64), 2), ((30, 2, 5), 0), ((2, 5, 7), None), ((3, 40_000), None)],
)
def test_blocks_give_what_single_vectors_give(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    a = random(*shape).to(dtype)
    noise = random(*shape, seed=1) * (random(*shape[:-1], 1, seed=2) > -0.5) * 0.02
    b = a + noise.to(dtype)
    a.view(-1, shape[-1])[0] = 0
    if shape[0] == 1:
        b = b.movedim(1, 2).contiguous().movedim(2, 1)
    bins = 8 if axis else 3
    found, expected = measure(a, b, axis, bins, best_range(bins)), naive(a, b, axis, bins)
    assert found.hamming.tolist() == expected["hamming"] and found.distances.sum() == found.hamming.sum()
    assert found.n_bits_changed == expected["changed"] > 0
    assert found.max_abs.tolist() == pytest.approx(expected["max_abs"])
    for sums, of in ((found.squares, a), (found.errors, a.float().double() - b.float().double())):
        wide = of.double() ** 2
        whole = wide.sum()[None] if axis is None else wide.movedim(axis, 0).flatten(1).sum(1)
        assert sums.tolist() == pytest.approx(whole.tolist(), rel=1e-6)
    assert found.min_cosine == pytest.approx(min(expected["cosines"]))
    assert found.sum_cosine == pytest.approx(sum(expected["cosines"]))


def test_vectors_longer_than_semq_takes_are_cut() -> None:
    a = random(1, 70_000)
    b = a.clone()
    b[0, -1] += 40  # in the second piece, whose norm and symbols change; the first stays as it was
    found = measure(a, b, None, 8, C)
    assert 1 < int(found.hamming[0]) <= 70_000 - 65_536 + 1


def test_scaled_weights_are_seen_although_no_direction_changes() -> None:
    a = state()
    layer = a.cache.layers[1].tensors
    cell = sq.diff(a, with_layer(a, 1, values=layer["values"] * 1.001)).cell("layers.1.values")
    assert cell.n_changed == cell.n_vectors == 80
    assert cell.min_cosine > 0.999999 and cell.relative == pytest.approx(0.001, rel=1e-3)


def test_nan_infinity_and_signed_zero() -> None:
    nan, inf = float("nan"), float("inf")
    a = state(one_layer(rows([1, nan, 0, 0], [1, 2, 3, 4], [inf, 0, 0, 0], [0, 1, 0, 0])), n_cached=4)
    assert sq.diff(a, with_layer(a, 0)).equal, "a NaN is the same bits as itself"
    b = with_layer(a, 0, keys=rows([1, nan, 0, 0], [1, 2, nan, 4], [inf, 0, 0, 1], [-0.0, 1, 0, 0]))
    report = sq.diff(a, b)
    cell = report.cell("layers.0.keys")
    assert cell.per_token is not None
    assert (cell.n_bits_changed, cell.n_changed, cell.n_not_finite) == (3, 2, 2)
    assert cell.per_token.hamming.tolist() == [0, 5, 5, 0], "all units of what is not finite"
    assert cell.per_token.relative.tolist() == [0, inf, inf, 0]
    assert (cell.relative, cell.max_abs, cell.min_cosine, cell.first_token) == (inf, inf, 0, 1)
    assert sq.diff(a, b, threshold=0.5).first_token == 1
    assert json.loads(json.dumps(report.as_dict(per_token=True), allow_nan=False))["cells"][0]["relative"] is None
    zero = sq.diff(a, with_layer(a, 0, keys=rows([1, nan, 0, 0], [1, 2, 3, 4], [inf, 0, 0, 0], [-0.0, 1, 0, 0])))
    assert not zero.equal and zero.first_token == 3 and zero.cells[0].n_changed == 0
    empty = state(one_layer(torch.zeros(1, 1, 2, 4)), n_cached=2)
    cell = sq.diff(empty, with_layer(empty, 0, keys=-torch.zeros(1, 1, 2, 4))).cells[0]
    assert (cell.n_bits_changed, cell.n_changed, cell.min_cosine, cell.relative) == (2, 0, 1, 0)


def test_extreme_values_do_not_overflow() -> None:
    a = state(one_layer(rows([3e38, -3e38, 0, 1], [1e-40, 0, 0, 0])), n_cached=2)
    cell = sq.diff(a, with_layer(a, 0, keys=rows([-3e38, 3e38, 0, 1], [2e-40, 0, 0, 0]))).cells[0]
    assert cell.n_not_finite == 0 and cell.min_cosine == pytest.approx(-1)
    assert cell.max_abs == pytest.approx(6e38) and cell.relative == pytest.approx(2)


def test_threshold_is_a_relative_error_of_a_token() -> None:
    a = state(dynamic(), dynamic(seed=1))
    keys, values = (a.cache.layers[i].tensors[n].clone() for i, n in ((0, "keys"), (1, "values")))
    keys[:, :, 30] *= 1.1
    values[:, :, 5] *= 1.01
    b = with_layer(with_layer(a, 0, keys=keys), 1, values=values)
    for threshold, token, layer in ((0, 5, 0), (0.005, 5, 0), (0.05, 30, 0), (0.2, None, None)):
        report = sq.diff(a, b, threshold=threshold)
        assert (report.first_token, report.first_layer) == (token, layer), threshold
        assert not report.equal
    assert sq.diff(a, b, threshold=0.005).first_cell.key == "layers.0.keys"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="threshold"):
        sq.diff(a, b, threshold=float("nan"))


def test_percentile_is_semqs() -> None:
    for m in (1, 2, 99, 100, 101, 250):
        distances = np.random.default_rng(m).permutation(np.arange(1, m + 1))
        assert percentile(distances) == m - m // 100
    assert percentile(np.zeros(0, np.int64)) == 0


def test_both_directions_say_the_same() -> None:
    a, b = state(), state(dynamic(), dynamic(seed=3))
    there, back = sq.diff(a, b), sq.diff(b, a)
    for x, y in zip(there.cells, back.cells, strict=True):
        same = ("key", "n_vectors", "n_bits_changed", "n_changed", "hamming", "p99", "max_abs", "first_token")
        assert [getattr(x, name) for name in same] == [getattr(y, name) for name in same]
        assert x.min_cosine == pytest.approx(y.min_cosine, abs=1e-15)
    assert (there.a, there.b) == (back.b, back.a) == (a.state_id, b.state_id)
    assert (there.first_token, there.first_layer) == (back.first_token, back.first_layer)


# Tokens, positions and what stands beside


def test_where_tokens_part_row_by_row() -> None:
    a = state(batch=3)
    ids = a.generation.input_ids.clone()
    ids[1, 30] += 1
    ids[2, 17] += 1
    tokens = sq.diff(a, with_generation(a, input_ids=ids)).tokens
    assert tokens.first == (None, 30, 17) and (tokens.earliest, tokens.row) == (17, 2)
    assert tokens.values == (int(ids[2, 17]) - 1, int(ids[2, 17]))
    report = sq.diff(a, with_generation(a, input_ids=ids))
    assert (report.first_token, report.first_layer, report.equal) == (17, None, False)


def test_a_shorter_state_is_compared_as_far_as_it_goes() -> None:
    a = state()
    b = a.crop(20)
    report = sq.diff(a, b)
    assert not report.equal and (report.first_token, report.first_layer) == (None, None)
    assert (report.tokens.n_a, report.tokens.n_b, report.tokens.first) == (41, 20, (None,))
    cell = report.cell("layers.1.keys")
    assert (cell.n_vectors, cell.n_only_a, cell.n_only_b, cell.n_bits_changed) == (38, 42, 0, 0)
    assert {d.name for d in report.structure} >= {"generation.n_cached", "generation.has_logits"}
    assert sq.diff(b, a).cell("layers.1.keys").n_only_b == 42


def window(whole: torch.Tensor, n_seen: int, family: str = "sliding") -> LayerState:
    """The last tokens of `whole`, of which `n_seen` have gone by."""
    length = 8
    kept = min(n_seen, length - 1 if family == "sliding" else length)
    tensors = {name: whole[:, :, n_seen - kept : n_seen] + i for i, name in enumerate(("keys", "values"))}
    size = {"window": length} if family == "sliding" else {"max_length": length, "n_counted": n_seen}
    return LayerState(family, tensors, {**size, "n_seen": n_seen, "filled": True})


@pytest.mark.parametrize("family", ["sliding", "static-sliding"])
def test_windows_are_aligned_by_position(family: str) -> None:
    whole = random(1, 2, 40, 8)
    n_kept = 7 if family == "sliding" else 8
    a, b = state(window(whole, 20, family), n_cached=20), state(window(whole, 23, family), n_cached=23)
    cell = sq.diff(a, b).cell("layers.0.keys")
    assert (cell.n_vectors, cell.n_only_a, cell.n_only_b) == (2 * (n_kept - 3), 6, 6)
    assert cell.n_bits_changed == 0 and cell.per_token is not None and cell.per_token.start == 23 - n_kept
    other = whole.clone()
    other[:, :, 18] += 1
    report = sq.diff(a, state(window(other, 23, family), n_cached=23))
    assert report.first_token == 18 and report.cell("layers.0.keys").n_bits_changed == 2


def test_nothing_in_common_is_said() -> None:
    whole = random(1, 2, 40, 8)
    report = sq.diff(state(window(whole, 9), n_cached=9), state(window(whole, 30), n_cached=30))
    assert not report.equal
    assert report.missing == {
        f"layers.0.{name}": "no position in common: 2 to 8 in a, 23 to 29 in b" for name in ("keys", "values")
    }


def test_a_layer_without_tokens_has_nothing_to_compare() -> None:
    a = state(dynamic(), LayerState("dynamic", {}, {"filled": False}))
    report = sq.diff(a, state(dynamic(), dynamic(seed=1)))
    assert report.missing == {"layers.1.keys": "only in b", "layers.1.values": "only in b"} and not report.equal


def test_cross_attention_has_tokens_of_its_own() -> None:
    def pair(cross: torch.Tensor) -> Snapshot:
        own = CacheState("dynamic", (dynamic(seq=12), dynamic(seq=12, seed=1)))
        other = CacheState("dynamic", (one_layer(cross), dynamic(seq=23, seed=3)))
        cache = CacheState("encoder-decoder", (), {"is_updated": [[0, True]]}, {"self": own, "cross": other})
        return dataclasses.replace(state(n_cached=12), cache=cache)

    cross = random(1, 2, 23, 8)
    changed = cross.clone()
    changed[:, :, 20] += 1
    report = sq.diff(pair(cross), pair(changed))
    cell = report.cell("cross.layers.0.keys")
    assert (cell.first_token, cell.of_sequence, cell.layer) == (20, False, 0)
    assert (report.first_token, report.first_layer, report.equal) == (None, 0, False)
    assert report.cell("self.layers.1.keys").of_sequence


def test_a_fixed_layer_has_tokens_of_its_own() -> None:
    a = state(one_layer(random(1, 2, 40, 8), fixed=True))
    b = with_layer(a, 0, keys=a.cache.layers[0].tensors["keys"] + 1)
    assert sq.diff(a, b).first_token is None and sq.diff(a, b).first_layer == 0


def test_lowest_layer_and_earliest_token_may_stand_apart() -> None:
    a = state()
    low, high = (layer.tensors["keys"].clone() for layer in a.cache.layers)
    low[:, :, 33] += 1
    high[:, :, 4] += 1
    report = sq.diff(a, with_layer(with_layer(a, 0, keys=low), 1, keys=high))
    assert (report.first_token, report.first_layer) == (4, 0)


def test_what_stands_beside_is_compared_for_equality() -> None:
    a = state(padding=(3,), rng={"cpu": torch.arange(16, dtype=torch.uint8)})
    assert sq.diff(a, a).equal
    mask = a.generation.step_inputs["attention_mask"].clone()
    mask[0, 7] = 0
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "mask": ({"step_inputs": {"attention_mask": mask}}, "generation.inputs.attention_mask", "1 of 41 values"),
        "none": ({"step_inputs": {}}, "generation.inputs.attention_mask", "only in a"),
        "rng": ({"rng": {"cpu": torch.zeros(16, dtype=torch.uint8)}}, "generation.rng.cpu", "15 of 16 values"),
        "ended": ({"finished": torch.tensor([True])}, "generation.finished", "1 of 1 values"),
        "attribute": ({"attributes": {"model.x": random(3)}}, "generation.attributes.model.x", "only in b"),
    }
    for what, (changes, name, words) in cases.items():
        report = sq.diff(a, with_generation(a, **changes))
        assert report.others == {name: words} and not report.equal, what
        assert (report.first_token, report.first_layer) == (None, None)
    report = sq.diff(a, with_generation(a, config={"temperature": 0.5}))
    assert [str(d) for d in report.structure] == ["generation.config.temperature: expected nothing, found 0.5"]
    assert not report.equal


def test_logits_and_encoder_outputs_are_kinds_of_their_own() -> None:
    hidden = random(1, 9, 16)
    a = with_generation(state(), step_inputs={"encoder_outputs.last_hidden_state": hidden})
    b = with_generation(
        a, logits=a.generation.logits + 1, step_inputs={"encoder_outputs.last_hidden_state": -hidden}
    )
    report = sq.diff(a, b)
    logits = report.cell("generation.logits")
    assert (logits.kind, logits.n_vectors, logits.per_token, logits.layer) == ("logits", 1, None, None)
    outputs = report.cell("generation.inputs.encoder_outputs.last_hidden_state")
    assert (outputs.kind, outputs.n_vectors, outputs.min_cosine) == ("encoder", 9, pytest.approx(-1))
    assert (report.first_token, report.first_layer) == (None, None) and not report.others


def test_circumstances_are_told_and_do_not_count() -> None:
    a = state()
    b = dataclasses.replace(a, provenance=dataclasses.replace(a.provenance, threads=7, versions={"torch": "3"}))
    report = sq.diff(a, b)
    assert report.equal and {d.name for d in report.provenance} == {"threads", "versions.torch"}


def test_companions_come_after_the_model_itself() -> None:
    assistant = CacheState("dynamic", (dynamic(seq=10, seed=5),))
    a = state(companions={"assistant": assistant})
    b = with_generation(a, companions={"assistant": CacheState("dynamic", (dynamic(seq=10, seed=6),))})
    report = sq.diff(a, b)
    assert report.first_cell is not None and report.first_cell.where == "generation.companions.assistant.layers.0"
    assert report.first_layer == 0


# Every kind of state, from live models


def prefilled(model: Any, ids: torch.Tensor, *, in_pieces: bool) -> Snapshot:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids.split(5 if in_pieces else ids.shape[1], 1):
            logits = model(piece, past_key_values=cache, use_cache=True).logits
    return sq.snapshot_of(model, cache, ids, logits=logits[:, -1])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_state_made_in_pieces_is_nearly_the_same(kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.randint(60, 199, (2, 40), generator=torch.Generator().manual_seed(0))
    a, b = (prefilled(model, ids, in_pieces=pieces) for pieces in (False, True))
    assert sq.diff(a, a).equal
    report = sq.diff(a, b)
    assert {cell.kind for cell in report.cells} == {"keys", "values", "logits"} and not report.missing
    assert max(cell.relative for cell in report.cells) < 1e-5
    assert sq.diff(a, b, threshold=1e-4).first_token is None
    perturbed = tiny_model(kind)
    ids[:, 35] = 61
    other = sq.diff(a, prefilled(perturbed, ids, in_pieces=False), threshold=1e-3)
    assert (other.first_token, other.first_layer) == (35, 0)


def generated(model: Any, n_tokens: int = 12, **more: Any) -> Snapshot:
    ids = torch.randint(60, 199, (1, 9), generator=torch.Generator().manual_seed(3))
    with sq.capture(model) as run:
        model.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, **more)
    return run.snapshot()


def in_weights(model: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(change(name, weight))
    return model


KINDS: Mapping[str, tuple[Callable[[], Any], set[str]]] = {
    "mamba": (mamba, {"convolution", "recurrent", "logits"}),
    "falcon_h1": (hybrid, {"convolution", "recurrent", "keys", "values", "logits"}),
    "t5": (lambda: encoder_decoder("t5"), {"keys", "values", "logits", "encoder"}),
    "mistral": (lambda: tiny_model("mistral"), {"keys", "values", "logits"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state(kind: str, path: Path) -> None:
    make, kinds = KINDS[kind]
    a = generated(make())
    sq.save(a, path)
    again = sq.diff(path, generated(make()))
    assert again.equal and {cell.kind for cell in again.cells} == kinds
    other = generated(in_weights(make(), lambda name, w: w * 1.05))
    with pytest.raises(sq.ModelMismatchError, match="weights") as refused:
        sq.diff(a, other)
    assert "--across-models" in str(refused.value)
    report = sq.diff(a, other, across_models=True)
    assert not report.equal and report.first_layer == 0 and "weights" in {d.name for d in report.provenance}
    assert all(cell.n_changed for cell in report.cells if cell.layer is not None)
    if kind == "mamba":
        assert report.first_token == report.tokens.earliest, "no layer has tokens"


# Refusals


def test_another_shape_is_refused_whatever_the_option() -> None:
    a = state()
    cases = {
        "batch": state(batch=2),
        "cache, layers": state(dynamic(), dynamic(), dynamic()),
        "family": state(dynamic(), dynamic(family="static", meta={"max_length": 50, "n_seen": 40})),
        "layers.0.keys, shape": state(dynamic(heads=3), dynamic(heads=3)),
        "layers.1.values, shape": state(dynamic(), dynamic(dims=(8, 9))),
        "layer 1, tensors": state(dynamic(), LayerState("dynamic", {"keys": random(1, 2, 40, 8)}, {})),
        "generation.logits": state(logits=random(1, 4)),
    }
    for words, b in cases.items():
        for across in (False, True):
            with pytest.raises(sq.ModelMismatchError, match=re.escape(words)):
                sq.diff(a, b, across_models=across)


def test_bins_out_of_limits_are_refused() -> None:
    for bins in (0, 1, 65, 8.0, True):
        with pytest.raises(sq.UnsupportedOperationError, match="bins"):
            sq.diff(state(), state(), bins=bins)


def test_dtypes_may_differ_across_models() -> None:
    a = state(dynamic(dtype=torch.bfloat16), dynamic(seed=1, dtype=torch.bfloat16))
    b = a.to(dtype=torch.float32)
    report = sq.diff(a, b, across_models=True)
    assert not report.equal and all(cell.n_bits_changed == 0 for cell in report.cells)
    assert "layers.0.keys.dtype" in {d.name for d in report.structure}


# JSON, pictures and the command line


SCHEMA: dict[str, Any] = {
    "schema": int, "equal": bool, "first_token": (int, type(None)), "first_layer": (int, type(None)),
    "first_cell": (str, type(None)), "a": str, "b": str, "bins": int, "c": float, "threshold": float,
    "tokens": dict, "cells": list, "others": dict, "missing": dict, "structure": list, "provenance": list,
}  # fmt: skip
CELL: dict[str, Any] = {
    "where": str, "name": str, "kind": str, "layer": (int, type(None)), "of_sequence": bool, "n_units": int,
    "n_vectors": int, "n_only_a": int, "n_only_b": int, "n_bits_changed": int, "n_changed": int,
    "n_not_finite": int, "hamming": int, "p99": int, "p99_norm": int, "min_cosine": float, "mean_cosine": float,
    "relative": (float, type(None)), "max_abs": (float, type(None)), "beyond": bool,
    "first_token": (int, type(None)),
}  # fmt: skip


def held(said: dict[str, Any], schema: dict[str, Any]) -> None:
    assert list(said) == list(schema)
    for name, kinds in schema.items():
        assert isinstance(said[name], kinds) and (kinds is not int or type(said[name]) is int), name


def test_json_has_the_documented_fields() -> None:
    a = state()
    report = sq.diff(a, state(dynamic(), dynamic(seed=9), logits=random(1, 3, seed=5)))
    said = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    held(said, SCHEMA)
    for cell in said["cells"]:
        held(cell, CELL)
    assert len(json.dumps(said)) < 4000, "small without the tokens' numbers"
    whole = report.as_dict(per_token=True)
    numbers = whole["cells"][2]["per_token"]
    assert numbers["start"] == 0 and {len(numbers[name]) for name in ("hamming", "relative", "max_abs")} == {40}
    assert sum(numbers["hamming"]) == whole["cells"][2]["hamming"]
    assert whole["cells"][-1]["per_token"] is None, "logits have no tokens"


def long_report(n: int = 2500) -> Diff:
    a = state(dynamic(seq=n, heads=1, dims=(4, 4)), dynamic(seq=n, heads=1, dims=(4, 4), seed=1), n_cached=n)
    keys = a.cache.layers[1].tensors["keys"].clone()
    keys[:, :, 1700] *= 3
    keys[:, :, 1800] = float("nan")
    return sq.diff(a, with_layer(a, 1, keys=keys))


def test_panels_show_the_worst_token_of_a_column() -> None:
    keys, values = panels_of(long_report())
    assert (keys.name, values.name, keys.layers, keys.width) == ("keys", "values", (0, 1), 3)
    assert keys.values["relative"].shape == (2, 834) and keys.values["relative"].shape[1] <= MAX_COLUMNS
    assert keys.values["relative"][1, 1700 // 3] == pytest.approx(2)
    assert np.isinf(keys.values["relative"][1, 600]) and np.count_nonzero(keys.values["relative"]) == 2
    assert keys.values["share"][1, 1700 // 3] == pytest.approx(1 / 5), "the norm alone"
    assert not values.values["relative"].any()
    low, high = scale_of([keys.values["relative"]])
    assert low <= 2 <= high and high / low >= 9.99


def test_windows_leave_the_rest_of_their_row_empty() -> None:
    a = state(window(random(1, 2, 40, 8), 40), dynamic())
    panel = panels_of(sq.diff(a, a))[0]
    assert (panel.start, panel.stop) == (0, 40)
    assert np.isnan(panel.values["relative"][0, :33]).all() and not panel.values["relative"][0, 33:].any()


def test_png(tmp_path: Path) -> None:
    report = long_report()
    report.save_png(tmp_path / "map.png", title="a $\\frac & b")
    data = (tmp_path / "map.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") > 1000
    sq.diff(state(), state()).save_png(tmp_path / "equal.png")


def test_png_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sq.UnsupportedOperationError, match=re.escape("pip install 'semq-state[plot]'")):
        long_report().save_png(tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_html_needs_nothing_else_and_escapes_texts(tmp_path: Path) -> None:
    title = '</title><script>alert(1)</script>__DATA__ & "x"'
    long_report().save_html(tmp_path / "map.html", title=title)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;/title&gt;&lt;script&gt;alert(1)" in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?:|src=|@import|url\(|<link", page.replace("default-src", "").replace("-src", ""))
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert [p["name"] for p in data["panels"]] == ["keys", "values"] and data["first"] == 1700
    assert data["panels"][0]["values"]["relative"][1][600] == -2
    assert data["panels"][0]["values"]["relative"][1][1700 // 3] == 2


def test_a_name_from_a_file_cannot_leave_the_pages_data(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    cache = CacheState("x", (), {}, {evil: CacheState("dynamic", (dynamic(),))})
    a = dataclasses.replace(state(), cache=cache)
    sq.diff(a, a).save_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert evil not in page and "<img" not in page


def test_the_pages_script_runs(tmp_path: Path) -> None:
    node = subprocess.run(["which", "node"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    if not node:
        pytest.skip("no node here")
    long_report().save_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    (tmp_path / "data.json").write_text(data)
    (tmp_path / "run.js").write_text(PAGE_STUB % json.dumps(str(tmp_path / "data.json")) + script + PAGE_CHECKS)
    done = subprocess.run([node, str(tmp_path / "run.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tip"].startswith("layer 1, keys, tokens 1698 to 1700 (worst)\nrelative error: 2.00\n")
    assert "symbols changed: 20.0 %" in said["tip"] and "NaN or infinity" in said["nan"]
    assert "worst of 3 tokens" in said["caption"] and said["options"] == ["keys", "values"]


PAGE_STUB = """
const elements = {};
const rules = {get: (t, k) => t[k] ?? (() => {}), set: (t, k, v) => { t[k] = v; return true; }};
const pen = () => new Proxy({}, rules);
function element() {
  return {style: {}, value: 0, clientWidth: 1064, children: [], append(x) { this.children.push(x); },
    getContext: pen, getBoundingClientRect: () => ({left: 0, top: 0, width: 1064, height: 500})};
}
globalThis.document = {getElementById: id => elements[id] ??= element(), createElement: element};
globalThis.window = {devicePixelRatio: 1, innerWidth: 1200, innerHeight: 800};
globalThis.ImageData = class { constructor(w, h) { this.data = new Uint8ClampedArray(4 * w * h); } };
document.getElementById("data").textContent = require("fs").readFileSync(%s, "utf8");
document.getElementById("metric").value = "relative";
"""
PAGE_CHECKS = """
const at = token => { elements.map.onmousemove({clientX: 56 + (token + .5) / 2500 * 1000, clientY: 24 + 1.5 * 26});
  return elements.tip.textContent; };
process.stdout.write(JSON.stringify({tip: at(1700), nan: at(1800), caption: elements.caption.textContent,
  options: elements.kind.children.map(x => x.textContent)}));
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    a = state()
    ids = a.generation.input_ids.clone()
    ids[0, 17] += 1
    made = {
        "a": a,
        "same": a,
        "other": with_layer(a, 1, keys=a.cache.layers[1].tensors["keys"] * 1.1),
        "tokens": with_generation(a, input_ids=ids),
        "model": state(weights=f"sha256:{'cd' * 32}"),
        "shape": state(batch=2),
    }
    for name, snapshot in made.items():
        sq.save(snapshot, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in made}


def test_command_line_answers_and_exit_codes(cli: Any, files: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = cli("diff", files["a"], files["same"])
    assert (code, out.split(":")[0], err) == (0, "equal", "")
    code, out, _ = cli("diff", files["a"], files["other"])
    assert code == 1
    assert out.startswith("different: states part at token 0, first layer 1 (layers.1.keys)\n")
    assert re.search(r"layers\.1\.keys +0 +80 +80 +80", out) and "4 more are equal" in out
    code, out, _ = cli("diff", files["a"], files["tokens"])
    assert code == 1 and re.match(r"different: tokens part at 17 \(row 0\): (\d+) ≠ (\d+)", out)
    code, out, err = cli("diff", files["a"], files["model"])
    assert (code, out) == (2, "") and "--across-models" in err and "weights" in err
    assert cli("diff", files["a"], files["model"], "--across-models")[0] == 0
    assert cli("diff", files["a"], files["shape"], "--across-models")[0] == 2
    assert cli("diff", files["a"], tmp_path / "no.safetensors")[0] == 2
    png, html = tmp_path / "map.png", tmp_path / "map.html"
    code, out, _ = cli(
        "diff", files["a"], files["other"], "--json", "--per-token", "--png", png, "--html", html, "--bins", "4"
    )
    said = json.loads(out)
    assert (code, said["first_layer"], said["bins"]) == (1, 1, 4) and png.stat().st_size and html.stat().st_size
    assert len(said["cells"][2]["per_token"]["hamming"]) == 40
    code, out, _ = cli("diff", files["a"], files["other"], "--threshold", "0.5", "--json")
    assert (code, json.loads(out)["first_layer"]) == (1, None)
