"""What `capture(trace=True)` keeps of each token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import semq_state as sq
from conftest import tiny_model
from semq_state.sketch import N_UNITS, sketch_rule, sketched, symbols_of


def ids(n: int = 9, rows: int = 2) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randint(3, 190, (rows, n))


def traced(model: Any, n_new: int = 6, **options: Any) -> sq.Snapshot:
    with sq.capture(model, trace=True) as run:
        model.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=n_new, **options)
    return run.snapshot()


def test_it_holds_the_tokens_and_the_largest_raw_logits(model: Any) -> None:
    torch.manual_seed(0)
    with sq.capture(model, trace=True) as run:
        out = model.generate(
            input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, do_sample=True,
            temperature=0.3, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    trace = run.snapshot().trace
    assert trace is not None
    assert (trace.begin, trace.n_tokens) == (9, 6)
    assert torch.equal(trace.tokens, out.sequences[:, 9:])
    for i, logits in enumerate(out.logits):
        assert torch.equal(trace.top_logits[:, i], logits.topk(8).values)
        assert torch.equal(trace.top_ids[:, i].long(), logits.topk(8).indices)


def test_norms_are_those_of_the_last_hidden_state(model: Any) -> None:
    snapshot = traced(model, 1)
    with torch.no_grad():
        hidden = model.model(ids()).last_hidden_state[:, -1]
    assert snapshot.trace is not None
    assert torch.allclose(snapshot.trace.norms[:, 0], hidden.norm(dim=-1))
    assert torch.equal(snapshot.trace.prints[:, 0], sketched(hidden)[1])


@pytest.mark.parametrize("dim", [8, 384, 385, 576, 4096])
def test_a_token_takes_less_than_300_bytes(dim: int) -> None:
    config = LlamaConfig(
        vocab_size=199, hidden_size=dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    snapshot = traced(AutoModelForCausalLM.from_config(config).eval(), 2)
    assert snapshot.trace is not None
    assert snapshot.trace.bytes_per_token <= 300


def test_sketches_tell_vectors_apart_and_keep_what_is_close() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(50, 1000)
    rule = sketch_rule(1000)
    own = symbols_of(sketched(vectors)[1], rule)
    close = symbols_of(sketched(vectors + 1e-3 * torch.randn(50, 1000))[1], rule)
    other = symbols_of(sketched(torch.randn(50, 1000))[1], rule)
    assert own.shape == (50, N_UNITS)
    assert (own != close).mean() < 0.01 < 0.8 < (own != other).mean()
    assert np.array_equal(own, symbols_of(sketched(vectors * 7)[1], rule))


def test_vectors_that_are_no_numbers_have_such_norms() -> None:
    norms, prints = sketched(torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0]]))
    assert norms[0].isnan() and norms[1].isinf() and norms[2] == 0
    assert torch.equal(prints[0], prints[2])


def test_an_unknown_rule_is_refused() -> None:
    prints = sketched(torch.randn(2, 20))[1]
    for rule in ({}, {**sketch_rule(20), "seed": 1}, {**sketch_rule(20), "dim": "20"}, sketch_rule(30)):
        with pytest.raises(sq.FormatError, match="trace"):
            symbols_of(prints, rule)


def test_nothing_stays_on_the_model(model: Any) -> None:
    before = dict(model.lm_head._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), sq.capture(model, trace=True):
        assert len(model.lm_head._forward_pre_hooks) == 1
        raise ZeroDivisionError
    assert model.lm_head._forward_pre_hooks == before


def test_it_changes_nothing_of_the_run(model: Any) -> None:
    torch.manual_seed(3)
    plain = model.generate(input_ids=ids(), max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    with sq.capture(model, trace=True):
        again = model.generate(input_ids=ids(), max_new_tokens=8, do_sample=True)
    assert torch.equal(plain, again)


def test_it_goes_through_a_file(model: Any, path: Path) -> None:
    snapshot = traced(model)
    sq.save(snapshot, path)
    again = sq.load(path)
    assert again.state_id == snapshot.state_id
    assert snapshot.trace is not None and again.trace is not None
    assert again.trace.structure() == snapshot.trace.structure()
    assert all(torch.equal(t, again.trace.tensors()[name]) for name, t in snapshot.trace.tensors().items())
    assert sq.verify(path).passed
    sq.save(snapshot, path, codec="raw")
    assert "trace.prints" in load_file(path)


def test_it_is_cut_with_its_snapshot(model: Any) -> None:
    snapshot = traced(model)
    cropped = snapshot.crop(12).trace
    assert cropped is not None and cropped.n_tokens == 3
    assert snapshot.crop(9).trace is None
    row = snapshot.select([1]).trace
    assert row is not None and snapshot.trace is not None
    assert torch.equal(row.tokens, snapshot.trace.tokens[1:])
    assert snapshot.to(torch.device("cpu")).trace is snapshot.trace
    assert snapshot.fork(2, seeds=(1, 2))[0].trace is snapshot.trace


def test_a_resume_is_traced_from_where_it_starts(model: Any) -> None:
    first = traced(model, 4)
    with sq.capture(model, trace=True) as run:
        sq.restore(first, model).generate(max_new_tokens=5)
    trace = run.snapshot().trace
    assert trace is not None and (trace.begin, trace.n_tokens) == (13, 5)


def test_without_it_nothing_is_kept(model: Any) -> None:
    with sq.capture(model) as run:
        model.generate(input_ids=ids(), max_new_tokens=3)
    assert run.snapshot().trace is None and "trace" not in run.snapshot().structure()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_loops_that_choose_otherwise_are_refused_by_name(model: Any, options: dict[str, Any]) -> None:
    row = ids(rows=1)
    with pytest.warns(UserWarning, match="trace=True"), sq.capture(model, trace=True) as run:
        model.generate(input_ids=row, max_new_tokens=4, **options)
    with pytest.raises(sq.UnsupportedOperationError, match="one token"):
        run.snapshot()


def test_models_without_a_head_are_refused_before_anything_is_touched(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(sq.UnsupportedModelError, match="output embeddings"), sq.capture(model, trace=True):
        pass
    assert "_get_logits_processor" not in vars(model)


def test_only_the_plain_parts_of_a_run_are_told(model: Any, path: Path) -> None:
    model.name_or_path = "/home/somebody/models/secret"
    sq.save(traced(model), path)
    data = path.read_bytes()
    assert b"somebody" not in data and b"/home" not in data


def test_traces_of_tiny_models_are_the_same_again() -> None:
    first, second = traced(tiny_model("gemma3")), traced(tiny_model("gemma3"))
    assert first.trace is not None and second.trace is not None
    assert all(
        torch.equal(t, second.trace.tensors()[n]) for n, t in first.trace.tensors().items() if "rng" not in n
    )


@pytest.mark.parametrize("name", ["tokens", "top_ids", "top_logits", "norms", "prints"])
def test_a_trace_whose_parts_do_not_belong_together_is_refused(model: Any, path: Path, name: str) -> None:
    snapshot = traced(model)
    assert snapshot.trace is not None
    tensor = getattr(snapshot.trace, name)
    for wrong in (tensor[:, 1:], tensor[:1], tensor.double(), tensor[None]):
        trace = dataclasses.replace(snapshot.trace, **{name: wrong})
        sq.save(dataclasses.replace(snapshot, trace=trace), path)
        with pytest.raises(sq.IncompleteStateError, match="trace"):
            sq.load(path)
