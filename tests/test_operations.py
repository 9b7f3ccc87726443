"""What can be made of a snapshot: fewer tokens, other rows, branches, another device or dtype."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, FalconH1Config, MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import semq_state as sq
from conftest import TINY, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 1.4, "top_k": 60}
RECORD = {"return_dict_in_generate": True, "output_logits": True}
N_PROMPT = 12


def prompt(n_rows: int = 1, n: int = N_PROMPT) -> torch.Tensor:
    return torch.randint(60, 199, (n_rows, n), generator=torch.Generator().manual_seed(7))


def mamba() -> Any:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=199, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4)
    return AutoModelForCausalLM.from_config(config).eval()


def hybrid() -> Any:
    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def run(model: Any, *, checkpoints: Any = (), **kwargs: Any) -> tuple[sq.Snapshot, Any]:
    torch.manual_seed(1)
    with sq.capture(model, checkpoints=checkpoints) as captured:
        whole = model.generate(**{"input_ids": prompt(), **kwargs}, **RECORD)
    return captured.snapshot(), whole


def goes_on(snapshot: sq.Snapshot, model: Any, whole: Any, n_before: int, **kwargs: Any) -> None:
    """Greedy decoding from `snapshot` gives the last tokens and logits of `whole`."""
    found = sq.restore(snapshot, model).generate(**kwargs)
    assert torch.equal(found.sequences, whole.sequences)
    assert len(found.logits) == len(whole.logits) - n_before
    assert all(map(torch.equal, found.logits, whole.logits[n_before:]))


@pytest.mark.parametrize("n", [1, 5, N_PROMPT, N_PROMPT + 1, N_PROMPT + 9, N_PROMPT + 23])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_crop(kind: str, n: int, path: Path) -> None:
    model = tiny_model(kind)
    snapshot, whole = run(model, **GREEDY)
    stored = {name: t.clone() for name, t in snapshot.tensors().items()}
    cropped = snapshot.crop(n)
    assert (cropped.n_tokens, cropped.generation.n_cached) == (n, n - 1)
    assert cropped.state_id != snapshot.state_id
    sq.save(cropped, path)
    if n > N_PROMPT:
        goes_on(sq.load(path), model, whole, n - N_PROMPT)
    else:
        # The prompt's last token is fed alone now, which rounds otherwise than within the prefill.
        expected = model.generate(whole.sequences[:, :n], **{**GREEDY, "max_new_tokens": 10})
        found = sq.restore(sq.load(path), model).generate(max_new_tokens=10)
        assert torch.equal(found.sequences, expected)
    assert all(torch.equal(t, stored[name]) for name, t in snapshot.tensors().items()), "crop must change nothing"


def test_crop_of_padded_rows_and_ended_ones() -> None:
    model, ids = tiny_model(), prompt(3)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    ends = {"eos_token_id": list(range(60, 72)), "pad_token_id": 0}
    kwargs = {"input_ids": ids, "attention_mask": mask, **SAMPLED, **ends}
    snapshot, whole = run(model, **kwargs)
    assert snapshot.generation.finished.any()
    n = N_PROMPT + 3
    cropped = snapshot.crop(n)
    new = whole.sequences[:, N_PROMPT:n]
    assert cropped.generation.finished.tolist() == torch.isin(new, torch.arange(60, 72)).any(-1).tolist()
    plain, expected = run(model, input_ids=ids, attention_mask=mask, **GREEDY)
    goes_on(plain.crop(n), model, expected, 3)


@pytest.mark.parametrize("n", [0, -1, 37, 10**9, 3.0, True, "5", None])
def test_a_crop_that_makes_no_sense(n: Any) -> None:
    snapshot, _ = run(tiny_model(), **GREEDY)
    with pytest.raises(sq.UnsupportedOperationError, match="1 to 36 tokens"):
        snapshot.crop(n)
    assert snapshot.crop(36) is snapshot


FORGETFUL = {"mistral": lambda: tiny_model("mistral"), "gemma3": lambda: tiny_model("gemma3"), "mamba": mamba,
             "falcon_h1": hybrid}  # fmt: skip


@pytest.mark.parametrize("kind", FORGETFUL)
def test_a_crop_beyond_recall_says_where_there_is_one(kind: str) -> None:
    model = FORGETFUL[kind]()
    with pytest.raises(sq.UnsupportedOperationError, match=r"layer 0.*no checkpoint exists; capture\(checkpoints="):
        run(model, **GREEDY)[0].crop(20)
    snapshot, _ = run(model, checkpoints=(16, 20), **GREEDY)
    with pytest.raises(sq.UnsupportedOperationError, match="a checkpoint exists: 16, 20"):
        snapshot.crop(19)


@pytest.mark.parametrize("kind", FORGETFUL)
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_crop_at_checkpoints(kind: str, how: str, path: Path) -> None:
    model, settings = FORGETFUL[kind](), GREEDY if how == "greedy" else SAMPLED
    snapshot, whole = run(model, checkpoints=6, input_ids=prompt(2), **settings)
    sq.save(snapshot, path)
    snapshot = sq.load(path)
    assert [c.n_tokens for c in snapshot.checkpoints] == [18, 24, 30]
    assert sq.inspect(path).as_dict()["checkpoints"] == [18, 24, 30]
    for n in (18, 30):
        # A checkpoint keeps the random state too.
        goes_on(snapshot.crop(n), model, whole, n - N_PROMPT)
    assert [c.n_tokens for c in snapshot.crop(30).checkpoints] == [18, 24]
    goes_on(snapshot.crop(30).crop(18), model, whole, 6)


def test_checkpoints_keep_only_what_is_forgotten() -> None:
    assert all(
        layer.family == "dummy" for c in run(tiny_model(), checkpoints=6, **GREEDY)[0].checkpoints
        for layer in c.cache.layers
    )  # fmt: skip
    snapshot, _ = run(tiny_model("gemma3"), checkpoints=6, **GREEDY)
    assert [layer.family for layer in snapshot.checkpoints[0].cache.layers] == ["sliding", "dummy"]


@pytest.mark.parametrize("checkpoints", [0, -3, (0,), ("a",), (1.5,), True])
def test_checkpoints_that_make_no_sense(checkpoints: Any) -> None:
    with pytest.raises(ValueError, match="checkpoints"):
        sq.capture(tiny_model(), checkpoints=checkpoints)


def test_within_its_window_a_sliding_layer_is_cropped_freely() -> None:
    model = tiny_model("mistral")
    snapshot, whole = run(model, input_ids=prompt(n=6), **{**GREEDY, "max_new_tokens": 9})
    for n in (7, 9, 14):
        goes_on(snapshot.crop(n), model, whole, n - 6)


@pytest.mark.parametrize("rows", [[0], [2], [2, 0], [1, 1, 1], [-1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", [*TINY, "mamba", "falcon_h1"])
def test_select(kind: str, rows: list[int], path: Path) -> None:
    model = FORGETFUL[kind]() if kind in FORGETFUL else tiny_model(kind)
    torch.manual_seed(1)
    with sq.capture(model) as captured:
        whole = model.generate(prompt(3), **{**GREEDY, "max_new_tokens": 10}, **RECORD)
    snapshot = captured.snapshot()
    sq.save(snapshot.select(rows), path)
    found = sq.restore(sq.load(path), model).generate(max_new_tokens=8)
    one = [sq.restore(snapshot.select([row]), model).generate(max_new_tokens=8) for row in rows]
    assert torch.equal(found.sequences[:, :22], whole.sequences[rows])
    for i, alone in enumerate(one):
        assert torch.equal(found.sequences[i], alone.sequences[0])
        # Matrix products of other shapes round otherwise.
        torch.testing.assert_close(found.logits[0][i], alone.logits[0][0], rtol=1e-4, atol=1e-5)


def test_a_repeated_row_is_a_batch_of_branches() -> None:
    model = tiny_model()
    snapshot, _ = run(model, **SAMPLED)
    found = sq.restore(snapshot.select([0] * 6), model).generate(max_new_tokens=12, seed=3).sequences
    assert len({tuple(row) for row in found.tolist()}) > 3


@pytest.mark.parametrize("rows", [[], [3], [-4], [0.0], ["0"], [None], [True]], ids=str)
def test_rows_that_are_not_there(rows: Any) -> None:
    snapshot, _ = run(tiny_model(), input_ids=prompt(3), **GREEDY)
    with pytest.raises(sq.UnsupportedOperationError, match="rows of 0 to 2"):
        snapshot.select(rows)


def test_fork(path: Path) -> None:
    model = tiny_model()
    snapshot, _ = run(model, **SAMPLED)
    left, right = snapshot.fork(2)
    assert left is right is snapshot
    left, right, again = snapshot.fork(3, seeds=(4, 5, 4))
    assert left.state_id == again.state_id != right.state_id
    texts = []
    for branch in (left, right, again):
        sq.save(branch, path)
        assert branch.cache.layers[0].tensors["keys"] is snapshot.cache.layers[0].tensors["keys"]
        texts.append(sq.restore(sq.load(path), model).generate(max_new_tokens=12).sequences)
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])
    expected = sq.restore(snapshot, model).generate(max_new_tokens=12, seed=4).sequences
    assert torch.equal(texts[0], expected)
    for wrong in ({"n": 0}, {"n": 2, "seeds": (1,)}):
        with pytest.raises(ValueError, match="branches"):
            snapshot.fork(**wrong)


def test_another_dtype_only_when_asked_by_name() -> None:
    model = tiny_model()
    snapshot, _ = run(model, **GREEDY)
    assert snapshot.to("cpu").state_id == snapshot.state_id
    half = snapshot.to(dtype=torch.bfloat16)
    assert half.cache.layers[0].tensors["keys"].dtype == torch.bfloat16
    assert half.generation.input_ids.dtype == torch.int64
    assert half.generation.rng["cpu"].dtype == torch.uint8
    assert half.state_id != snapshot.state_id
    other = tiny_model(dtype=torch.bfloat16)
    with pytest.raises(sq.ModelMismatchError, match="weights") as refused:
        sq.restore(half, other)
    assert [d.name for d in refused.value.differences] == ["weights"]
    allowed = sq.restore(half, other, allow=("weights",))
    assert allowed.generate(max_new_tokens=5).sequences.shape == (1, 41)
    with pytest.raises(sq.ModelMismatchError, match="dtype: expected bfloat16, found float32"):
        sq.restore(half, model)
    with pytest.raises(sq.UnsupportedOperationError, match="floating dtype"):
        snapshot.to(dtype=torch.int8)
    with pytest.raises(sq.UnsupportedOperationError, match="dtype="):
        snapshot.to(torch.float16)  # type: ignore[arg-type]


def test_moving_to_another_device() -> None:
    snapshot, _ = run(tiny_model("gemma3"), **GREEDY)
    moved = snapshot.to("meta")
    kinds = {t.device.type for name, t in moved.tensors().items() if ".rng." not in name}
    assert kinds == {"meta"}


def test_a_processor_that_remembers_cannot_be_cropped() -> None:
    snapshot, _ = run(tiny_model(), **GREEDY)
    from semq_state.snapshot import ProcessorState

    state = dataclasses.replace(
        snapshot.generation, processors=(ProcessorState("logits", "Counting", {}, {"n": 3}),)
    )
    with pytest.raises(sq.UnsupportedOperationError, match="Counting"):
        dataclasses.replace(snapshot, generation=state).crop(20)


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
@pytest.mark.parametrize("given", [True, False], ids=["logits", "no logits"])
def test_a_loop_of_ones_own_over_recurrent_layers(kind: str, given: bool, path: Path) -> None:
    model, ids = FORGETFUL[kind](), prompt()
    expected = model.generate(ids, **GREEDY)
    name = "cache_params" if kind == "mamba" else "past_key_values"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, **{name: cache}, use_cache=True).logits
        tokens = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
        last = None
        if given:
            last = model(tokens[:, -1:], **{name: cache}, use_cache=True).logits
    snapshot = sq.snapshot_of(model, cache, tokens, logits=last)
    assert snapshot.generation.n_cached == tokens.shape[1] - (not given)
    sq.save(snapshot, path)
    found = sq.restore(sq.load(path), model).generate(**{**GREEDY, "max_new_tokens": 23})
    assert torch.equal(found, expected)
