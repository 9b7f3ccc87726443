"""What `capture(hidden_states=…)` keeps: which rows, bit for bit those of transformers, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import image_text
from architectures.cases import build
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BertConfig,
    BertModel,
    DynamicCache,
    MambaConfig,
    MixtralConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

import semq_state as sq
from conftest import SIZES, TINY, tiny_model
from semq_state.hidden import Collector, HiddenStates
from semq_state.snapshot import HiddenRows
from semq_state.snapshot.assembly import assemble

N_PROMPT, N_NEW = 9, 6
GREEDY: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TOLD = {"output_hidden_states": True, "return_dict_in_generate": True}
ALL = HiddenStates(layers="all")
SMALL: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    **TINY,
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "mamba": lambda: MambaConfig(vocab_size=199, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2),
    "t5": lambda: T5Config(
        vocab_size=199, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": lambda: BartConfig(
        vocab_size=199, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256,
        forced_eos_token_id=None,
    ),
}  # fmt: skip
PAIRS = ("t5", "bart")
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@functools.cache
def built(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind in PAIRS else AutoModelForCausalLM
    return auto.from_config(CONFIGS[kind]()).to(dtype).eval()


@functools.cache
def bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL)).eval()


def prompt(n_rows: int = 1, n: int = N_PROMPT) -> dict[str, torch.Tensor]:
    ids = torch.randint(60, 199, (n_rows, n), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(*, side: str = "left") -> dict[str, torch.Tensor]:
    """Two rows, the second of which has three tokens of padding."""
    inputs = prompt(2)
    at = slice(0, 3) if side == "left" else slice(-3, None)
    inputs["attention_mask"][1, at] = 0
    inputs["input_ids"][1, at] = 0
    return inputs


def heard(model: Any, spec: HiddenStates, **kwargs: Any) -> tuple[sq.Snapshot, Any]:
    with sq.capture(model, hidden_states=spec) as run:
        out = model.generate(**{**GREEDY, **kwargs})
    return run.snapshot(), out


def sequence(model: Any, spec: HiddenStates = ALL, **kwargs: Any) -> HiddenRows:
    return heard(model, spec, **kwargs)[0].hidden["sequence"]


def told(passes: Any, layer: int, *, n_padding: tuple[int, ...]) -> torch.Tensor:
    """The rows that transformers tells of a layer, without the padding at the start of each row."""
    whole = torch.cat([each[layer] for each in passes], dim=1)
    return torch.cat([row[n:] for row, n in zip(whole, n_padding, strict=True)])


def row_ids(*rows: range) -> list[list[int]]:
    return [[document, position] for document, row in enumerate(rows) for position in row]


def assert_same(found: HiddenRows, wanted: HiddenRows) -> None:
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.token_ids, wanted.token_ids)
    assert found.structure() == wanted.structure()
    for name, states in wanted.states.items():
        assert found.states[name].dtype == states.dtype
        assert torch.equal(found.states[name], states), name


def behind(rows: HiddenRows, starts: list[int]) -> HiddenRows:
    """The rows from these positions on."""
    kept = rows.rows[:, 1] >= torch.tensor(starts)[rows.rows[:, 0]]
    return dataclasses.replace(
        rows, rows=rows.rows[kept], token_ids=rows.token_ids[kept],
        states={name: t[kept] for name, t in rows.states.items()},
    )  # fmt: skip


# What transformers tells, bit for bit


@pytest.mark.parametrize("kind", [*TINY, "mixtral", "mamba"])
def test_layers_are_those_that_transformers_tells(kind: str) -> None:
    model, inputs = built(kind), padded()
    if kind == "mamba":  # has no padding
        inputs = prompt(2)
    n_padding = (0, 0 if kind == "mamba" else 3)
    snapshot, out = heard(model, ALL, **inputs, **TOLD)
    found = snapshot.hidden["sequence"]
    n = N_PROMPT + N_NEW - 1
    assert found.rows.tolist() == row_ids(range(n), range(n - n_padding[1]))
    own = torch.cat([row[k:-1] for row, k in zip(out.sequences, n_padding, strict=True)])
    assert torch.equal(found.token_ids, own)
    assert sorted(found.states) == [f"hidden_states.{i}" for i in range(3)]
    for i in range(3):
        # Mamba tells what its blocks give, and nothing of what the first one reads.
        theirs = i - 1 if kind == "mamba" and i == 1 else i
        if kind != "mamba" or i:
            wanted = told(out.hidden_states, theirs, n_padding=n_padding)
            assert torch.equal(found.states[f"hidden_states.{i}"], wanted)
    assert (found.tokens, found.pool, len(found)) == ("all", "", len(own))
    assert found.n_bytes == 3 * len(own) * 32 * 4


@pytest.mark.parametrize("kind", PAIRS)
def test_both_stacks_of_a_pair(kind: str) -> None:
    inputs = padded(side="right")
    snapshot, out = heard(built(kind), ALL, **inputs, **TOLD)
    own, read = snapshot.hidden["sequence"], snapshot.hidden["encoder"]
    assert own.rows.tolist() == row_ids(range(N_NEW), range(N_NEW))
    assert torch.equal(own.token_ids, out.sequences[:, :-1].flatten())
    assert read.rows.tolist() == row_ids(range(9), range(6))
    assert torch.equal(read.token_ids, inputs["input_ids"][inputs["attention_mask"] > 0])
    for i in range(3):
        name = f"hidden_states.{i}"
        assert torch.equal(own.states[name], told(out.decoder_hidden_states, i, n_padding=(0, 0)))
        assert torch.equal(read.states[name], out.encoder_hidden_states[i][inputs["attention_mask"] > 0])


def test_what_was_generated_of_a_pair() -> None:
    hidden = heard(built("t5"), HiddenStates(tokens="generated"), **prompt())[0].hidden
    assert hidden["sequence"].rows.tolist() == row_ids(range(1, N_NEW))
    assert not len(hidden["encoder"]) and hidden["encoder"].states["hidden_states.2"].shape == (0, 32)


def test_a_pair_that_returns_several_sequences_reads_its_prompt_for_each() -> None:
    model, inputs = built("bart"), padded(side="right")
    torch.manual_seed(0)
    found = heard(model, ALL, **inputs, do_sample=True, num_return_sequences=2)[0].hidden
    alone = heard(model, ALL, **inputs)[0].hidden["encoder"]
    assert_same(found["encoder"], alone.select([0, 0, 1, 1]))
    assert found["sequence"].rows.tolist() == row_ids(*[range(N_NEW)] * 4)


SITES = {
    "llama": ("model.layers.*.mlp", 2),
    "gpt2": ("transformer.h.*.attn", 2),  # gives a tuple
    "mixtral": ("model.layers.*.mlp.experts", 2),  # takes tokens without rows
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_modules_are_what_a_hook_hears(kind: str) -> None:
    model, (pattern, n), inputs = built(kind), SITES[kind], padded()
    outputs: dict[str, list[torch.Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def hear(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(path, []).append(tensor.reshape(2, -1, 32))

        return hear

    snapshot, _ = heard(model, HiddenStates(modules=pattern), **inputs)
    found = snapshot.hidden["sequence"]
    paths = list(found.states)
    assert len(paths) == n and all(path.startswith(pattern.split("*")[0]) for path in paths)
    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    model.generate(**inputs, **GREEDY)
    [handle.remove() for handle in handles]
    for path in paths:
        assert torch.equal(found.states[path], told([[x] for x in outputs[path]], 0, n_padding=(0, 3)))


def test_a_plain_pass_of_an_encoder() -> None:
    model, inputs = bert(), padded(side="right")
    spec = HiddenStates(layers="all", modules=["encoder.layer.0.output", "embeddings"])
    with sq.capture(model, hidden_states=spec) as run, torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    snapshot = run.snapshot()
    found, own = snapshot.hidden["sequence"], inputs["attention_mask"] > 0
    assert found.rows.tolist() == row_ids(range(9), range(6))
    assert torch.equal(found.token_ids, inputs["input_ids"][own])
    for i, states in enumerate(out.hidden_states):
        assert torch.equal(found.states[f"hidden_states.{i}"], states[own])
    assert torch.equal(found.states["encoder.layer.0.output"], out.hidden_states[1][own])
    assert torch.equal(found.states["embeddings"], out.hidden_states[0][own])
    assert torch.equal(snapshot.generation.input_ids, inputs["input_ids"])
    assert torch.equal(snapshot.generation.step_inputs["attention_mask"], inputs["attention_mask"])
    assert (snapshot.generation.prompt_length, snapshot.generation.n_cached) == (9, 9)
    assert not snapshot.generation.finished.any() and snapshot.generation.finished.shape == (2,)


@pytest.mark.parametrize("how", ["positional", "embeddings", "without mask"])
def test_ways_to_call_a_model(how: str) -> None:
    model, inputs = bert(), prompt(2)
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state.flatten(0, 1)
    embeds = model.embeddings.word_embeddings(inputs["input_ids"])
    with sq.capture(model, hidden_states=HiddenStates()) as run, torch.no_grad():
        if how == "positional":
            model(inputs["input_ids"], inputs["attention_mask"])
        elif how == "embeddings":
            model(inputs_embeds=embeds)
        else:
            model(inputs["input_ids"])
    snapshot = run.snapshot()
    found = snapshot.hidden["sequence"]
    assert torch.equal(found.states["hidden_states.2"], wanted)
    assert found.rows.tolist() == row_ids(range(9), range(9))
    ids = [-1] * 18 if how == "embeddings" else inputs["input_ids"].flatten().tolist()
    assert found.token_ids.tolist() == ids
    assert snapshot.generation.input_ids.shape == (2, 0 if how == "embeddings" else 9)


def test_a_plain_pass_of_a_causal_model_or_of_its_inside(model: Any) -> None:
    inputs = padded()
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    found = run.snapshot().hidden["sequence"]
    assert torch.equal(found.states["hidden_states.1"], out.hidden_states[1][inputs["attention_mask"] > 0])
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        model.model(**inputs)
    assert_same(run.snapshot().hidden["sequence"], found)


def test_a_plain_pass_of_a_pair_and_of_its_encoder_alone() -> None:
    model, inputs = built("t5"), padded(side="right")
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        out = model(**inputs, decoder_input_ids=torch.zeros(2, 4, dtype=torch.int64), output_hidden_states=True)
    hidden = run.snapshot().hidden
    assert torch.equal(hidden["sequence"].states["hidden_states.1"], out.decoder_hidden_states[1].flatten(0, 1))
    assert hidden["encoder"].rows.tolist() == row_ids(range(9), range(6))
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        model.get_encoder()(**inputs)
    snapshot = run.snapshot()
    assert_same(snapshot.hidden["encoder"], hidden["encoder"])
    assert not len(snapshot.hidden["sequence"])
    assert torch.equal(snapshot.generation.input_ids, inputs["input_ids"])


@pytest.mark.parametrize("kind", ["llava", "blip-2"])
def test_an_image_in_the_prompt(kind: str) -> None:
    case = image_text.CASES[kind]
    model = build(case, kind, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    inputs = case.inputs(model)
    snapshot, out = heard(model, ALL, **inputs, **TOLD)
    found = snapshot.hidden["sequence"]
    n = inputs["input_ids"].shape[1]
    assert found.rows.tolist() == row_ids(range(n + N_NEW - 1))
    passes = out.hidden_states
    for i in range(len(passes[0])):
        assert torch.equal(found.states[f"hidden_states.{i}"], told(passes, i, n_padding=(0,)))
    after = heard(model, HiddenStates(tokens="generated"), **inputs)[0].hidden["sequence"]
    assert after.rows.tolist() == [[0, n + i] for i in range(N_NEW - 1)]


@quiet_peft
def test_an_adapter_is_heard_inside(path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    snapshot, out = heard(adapted, ALL, **prompt(2), **TOLD)
    found = snapshot.hidden["sequence"]
    assert torch.equal(found.states["hidden_states.2"], told(out.hidden_states, 2, n_padding=(0, 0)))
    with sq.capture(adapted, hidden_states=ALL) as run, torch.no_grad():
        again = adapted(**prompt(2), output_hidden_states=True)
    assert torch.equal(
        run.snapshot().hidden["sequence"].states["hidden_states.1"], again.hidden_states[1].flatten(0, 1)
    )


def test_bfloat16_stays_and_another_dtype_is_cast() -> None:
    model = built("llama", torch.bfloat16)
    own = sequence(model, **prompt())
    assert own.states["hidden_states.1"].dtype == torch.bfloat16
    cast = sequence(model, HiddenStates(layers="all", dtype=torch.float16), **prompt())
    assert torch.equal(cast.states["hidden_states.1"], own.states["hidden_states.1"].half())
    mean = sequence(model, HiddenStates(layers=1, pool="mean"), **prompt()).states["hidden_states.1"]
    assert mean.dtype == torch.float32
    wanted = own.states["hidden_states.1"].float().mean(0)
    assert torch.allclose(mean[0], wanted, rtol=1e-5, atol=1e-6)
    low = sequence(model, HiddenStates(layers=1, pool="mean", dtype=torch.bfloat16), **prompt())
    assert torch.equal(low.states["hidden_states.1"], mean.bfloat16())


# Rows that end, and runs that go on


def ending(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> int:
    """A token that ends the first row in its fourth step or before, and not the second one."""
    out = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12, **kwargs})[:, inputs["input_ids"].shape[1] :]
    return next(int(t) for t in out[0, 1:5] if t not in out[1])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_row_that_ends_has_no_more_rows(kind: str) -> None:
    model, inputs = built(kind), padded()
    end = ending(model, inputs)
    rule = {"eos_token_id": end, "max_new_tokens": 12}
    snapshot, out = heard(model, ALL, **inputs, **rule)
    found = snapshot.hidden["sequence"]
    place = (out[0, N_PROMPT:] == end).nonzero()[0].item() + N_PROMPT
    assert found.rows.tolist() == row_ids(range(place), range(6 + 11))
    assert end not in found.of(0).token_ids[N_PROMPT:]
    alone = sequence(model, ALL, **{name: t[:1] for name, t in inputs.items()}, **rule)
    assert torch.equal(alone.rows, found.of(0).rows) and torch.equal(alone.token_ids, found.of(0).token_ids)
    assert torch.allclose(alone.states["hidden_states.2"], found.of(0).states["hidden_states.2"], atol=1e-4)


@pytest.mark.parametrize("how", ["as it was", "cropped"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba", "t5"])
def test_a_resume_goes_on_with_the_same_rows(kind: str, how: str, path: Path) -> None:
    if how == "cropped" and kind in ("mamba", "mistral"):
        pytest.skip("has forgotten")
    n_padding = 3 if kind in ("llama", "mistral") else 0
    model, inputs = built(kind), padded() if n_padding else prompt(2)
    rule = {"max_new_tokens": 12, "eos_token_id": None if kind == "t5" else ending(model, inputs)}
    whole, out = heard(model, ALL, **inputs, **rule)
    snapshot, _ = heard(model, ALL, **inputs, **{**rule, "max_new_tokens": 7})
    assert snapshot.generation.finished[0] == (kind != "t5")
    if how == "cropped":
        snapshot = snapshot.crop(snapshot.n_tokens - 1)
        shorter, _ = heard(model, ALL, **inputs, **{**rule, "max_new_tokens": 6})
        assert_same(snapshot.hidden["sequence"], shorter.hidden["sequence"])
    sq.save(snapshot, path)
    with sq.capture(model, hidden_states=ALL) as run:
        again = sq.restore(sq.load(path), model).generate(max_new_tokens=12 - snapshot.n_new_tokens)
    assert torch.equal(again, out)
    n = snapshot.n_tokens - 1
    begins = [n if kind == "t5" else 10_000, n - n_padding]
    assert_same(run.snapshot().hidden["sequence"], behind(whole.hidden["sequence"], begins))


def test_a_resume_without_a_cache_reads_everything_again(model: Any) -> None:
    options = {**prompt(), "use_cache": False}
    whole = sequence(model, **options, max_new_tokens=9)
    first, _ = heard(model, ALL, **options)
    with sq.capture(model, hidden_states=ALL) as run, pytest.warns(UserWarning, match="no cache"):
        sq.restore(first, model).generate(max_new_tokens=3)
    found = run.snapshot().hidden["sequence"]
    assert torch.equal(found.rows, whole.rows) and torch.equal(found.token_ids, whole.token_ids)
    assert torch.allclose(found.states["hidden_states.2"], whole.states["hidden_states.2"], atol=1e-5)


def test_a_resume_after_a_prompt_of_embeddings_counts_on(model: Any) -> None:
    embeds = model.get_input_embeddings()(prompt()["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": prompt()["attention_mask"]}
    whole = sequence(model, **inputs, max_new_tokens=9)
    first, _ = heard(model, ALL, **inputs)
    assert whole.rows.tolist() == row_ids(range(N_PROMPT + 8))
    assert whole.token_ids[:N_PROMPT].tolist() == [-1] * N_PROMPT and (whole.token_ids[N_PROMPT:] >= 0).all()
    after = sequence(model, HiddenStates(tokens="generated"), **inputs, max_new_tokens=9)
    assert_same(
        dataclasses.replace(after, tokens="all").of(0),
        dataclasses.replace(
            behind(whole, [N_PROMPT]),
            states={"hidden_states.2": behind(whole, [N_PROMPT]).states["hidden_states.2"]},
        ),
    )
    told_ids = sequence(model, **prompt(), max_new_tokens=9)
    assert torch.equal(whole.states["hidden_states.2"], told_ids.states["hidden_states.2"])
    with sq.capture(model, hidden_states=ALL) as run:
        sq.restore(first, model).generate(max_new_tokens=3)
    assert_same(run.snapshot().hidden["sequence"], behind(whole, [N_PROMPT + N_NEW - 1]))


def test_a_resume_knows_what_was_generated(model: Any) -> None:
    first, _ = heard(model, ALL, **padded())
    wanted = sequence(model, HiddenStates(tokens="generated"), **padded(), max_new_tokens=10)
    with sq.capture(model, hidden_states=HiddenStates(tokens="generated")) as run:
        sq.restore(first, model).generate(max_new_tokens=4)
    n = first.n_tokens - 1
    assert_same(run.snapshot().hidden["sequence"], behind(wanted, [n, n - 3]))


def test_the_next_turn_is_heard(model: Any) -> None:
    first, out = heard(model, ALL, **prompt())
    more = torch.tensor([[70, 71, 72]])
    with sq.capture(model, hidden_states=ALL) as run:
        sq.restore(first, model).generate(append=more, max_new_tokens=3)
    found = run.snapshot().hidden["sequence"]
    begin = N_PROMPT + N_NEW - 1
    assert found.rows.tolist() == [[0, i] for i in range(begin, begin + 6)]
    assert found.token_ids[:4].tolist() == [int(out[0, -1]), 70, 71, 72]


# Which tokens


@pytest.mark.parametrize(
    ("tokens", "word", "rows"),
    [
        ("all", "all", (range(14), range(11))),
        ("generated", "generated", (range(9, 14), range(6, 11))),
        ("last", "last", (range(13, 14), range(10, 11))),
        (slice(None), "::", (range(14), range(11))),
        (slice(2, 12, 3), "2:12:3", (range(2, 12, 3), range(2, 11, 3))),
        (slice(10, None), "10::", (range(10, 14), range(10, 11))),
        (slice(None, 1), ":1:", (range(1), range(1))),
        (slice(0, 0), "0:0:", (range(0), range(0))),
        (slice(-3, None), "-3::", (range(11, 14), range(8, 11))),
        (slice(1, -9, 2), "1:-9:2", (range(1, 5, 2), range(1, 2, 2))),
        (slice(-100, -13), "-100:-13:", (range(1), range(0))),
        (lambda ids, positions: positions % 4 == 1, "chosen", (range(1, 14, 4), range(1, 11, 4))),
        (lambda ids, positions: [False] * len(ids), "chosen", (range(0), range(0))),
    ],
    ids=lambda each: "rule" if callable(each) else str(each),
)
def test_which_tokens(model: Any, tokens: Any, word: str, rows: tuple[range, range]) -> None:
    found = sequence(model, HiddenStates(layers="all", tokens=tokens), **padded())
    everything = sequence(model, **padded())
    assert found.rows.tolist() == row_ids(*rows) and found.tokens == word
    kept = torch.tensor(
        [i for i, row in enumerate(everything.rows.tolist()) if row in row_ids(*rows)], dtype=torch.int64
    )
    assert torch.equal(found.token_ids, everything.token_ids[kept])
    for name, states in everything.states.items():
        assert found.states[name].shape == (len(kept), 32) and torch.equal(found.states[name], states[kept])


def test_a_rule_sees_the_tokens_of_one_row(model: Any) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def rule(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), positions.tolist()))
        return ids == ids[0]

    inputs = padded()
    sequence(model, HiddenStates(tokens=rule), **inputs, max_new_tokens=2)
    assert seen[:2] == [
        (inputs["input_ids"][0].tolist(), list(range(9))),
        (inputs["input_ids"][1, 3:].tolist(), list(range(6))),
    ]
    assert [positions for _, positions in seen[2:]] == [[9], [6]]


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (lambda ids, positions: positions, "int64"),
        (lambda ids, positions: positions[1:] > 3, "bool"),
        (lambda ids, positions: True, r"bool \(\)"),
        (lambda ids, positions: None, "Error"),
        (lambda ids, positions: 1 / 0, "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_rule_that_answers_wrongly_is_refused_and_the_run_goes_on(
    model: Any, rule: Any, found: str, plain: bool
) -> None:
    with sq.capture(model, hidden_states=HiddenStates(tokens=rule)) as run:
        if plain:
            model(**prompt())
        else:
            with pytest.warns(UserWarning, match="cannot be kept"):
                assert model.generate(**prompt(), **GREEDY).shape == (1, N_PROMPT + N_NEW)
    with pytest.raises(sq.UnsupportedOperationError, match=found) as refusal:
        run.snapshot()
    assert refusal.value.where == "HiddenStates, tokens" and refusal.value.expected and refusal.value.do


@pytest.mark.parametrize("tokens", ["all", "generated", slice(2, 8), lambda ids, positions: positions > 100])
def test_pooling(model: Any, tokens: Any) -> None:
    spec = HiddenStates(layers=(0, 2), tokens=tokens)
    rows = sequence(model, spec, **padded())
    mean = sequence(model, dataclasses.replace(spec, pool="mean"), **padded())
    last = sequence(model, dataclasses.replace(spec, pool="last"), **padded())
    documents = [i for i in range(2) if len(rows.of(i))]
    for pooled, word in ((mean, "mean"), (last, "last")):
        assert pooled.rows.tolist() == [[i, 0] for i in documents] and pooled.pool == word
        assert pooled.tokens == spec.word
    assert mean.token_ids.tolist() == [-1] * len(documents)
    assert last.token_ids.tolist() == [int(rows.of(i).token_ids[-1]) for i in documents]
    for name, states in mean.states.items():
        for i, document in enumerate(documents):
            own = rows.of(document).states[name]
            assert torch.allclose(states[i], own.double().mean(0).float(), atol=1e-6)
            assert torch.equal(last.states[name][i], own[-1])
        assert states.shape == last.states[name].shape == (len(documents), 32)


@pytest.mark.parametrize("choice", [{"pool": "mean"}, {"pool": "last"}, {"tokens": "last"}])
def test_one_row_a_document_over_many_steps(model: Any, choice: dict[str, Any]) -> None:
    found = sequence(model, HiddenStates(**choice), **padded(), max_new_tokens=80)
    everything = sequence(model, HiddenStates(), **padded(), max_new_tokens=80)
    for i in range(2):
        own = everything.of(i).states["hidden_states.2"]
        wanted = own.double().mean(0).float() if choice.get("pool") == "mean" else own[-1]
        assert torch.allclose(found.states["hidden_states.2"][i], wanted, atol=1e-6)
    assert len(found) == 2


def test_padding_that_is_no_number_leaves_a_mean_alone() -> None:
    spec = HiddenStates(pool="mean")
    collector = Collector(spec, ["x"])
    states = torch.tensor([[[math.nan], [1.0], [3.0]]])
    collector.add({"x": states}, torch.tensor([0]), torch.tensor([[-1, 0, 1]]), None)
    assert collector.rows().states["x"].tolist() == [[2.0]]


def test_documents_may_come_in_any_order() -> None:
    collector = Collector(HiddenStates(), ["x"])
    for document in (4, 1, 3):
        states = torch.full((1, 2, 3), float(document))
        collector.add({"x": states}, torch.tensor([document]), torch.tensor([[0, 1]]), torch.tensor([[7, 8]]))
    found = collector.rows()
    assert found.rows.tolist() == [[1, 0], [1, 1], [3, 0], [3, 1], [4, 0], [4, 1]]
    assert found.states["x"][:, 0].tolist() == [1, 1, 3, 3, 4, 4] and found.token_ids.tolist() == [7, 8] * 3
    assert found.of(3).states["x"].tolist() == [[3.0] * 3] * 2 and not len(found.of(2))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("layers", {"layers": "some"}),
    ("layers", {"layers": (0, 1.0)}),
    ("layers", {"layers": (True,)}),
    ("layers", {"layers": True}),
    ("modules", {"modules": ""}),
    ("modules", {"modules": [3]}),
    ("tokens", {"tokens": "first"}),
    ("tokens", {"tokens": 3}),
    ("tokens", {"tokens": None}),
    ("tokens", {"tokens": slice(0, 8, 0)}),
    ("tokens", {"tokens": slice(8, 0, -1)}),
    ("tokens", {"tokens": slice(0, 2.0)}),
    ("tokens", {"tokens": slice(True, None)}),
    ("pool", {"pool": "max"}),
    ("pool", {"pool": "mean", "tokens": "last"}),
    ("pool", {"pool": "last", "tokens": slice(-2, None)}),
    ("pool", {"pool": "mean", "tokens": slice(0, -2)}),
    ("dtype", {"dtype": torch.int64}),
    ("dtype", {"dtype": "float32"}),
]


@pytest.mark.parametrize(("name", "choice"), WRONG, ids=str)
def test_choices_that_are_none(name: str, choice: dict[str, Any]) -> None:
    with pytest.raises(sq.UnsupportedOperationError) as refusal:
        HiddenStates(**choice)
    assert refusal.value.where == f"HiddenStates, {name}"
    assert refusal.value.expected and refusal.value.found and refusal.value.do


def test_choices_are_settled() -> None:
    assert HiddenStates() == HiddenStates(layers=-1) == HiddenStates(layers=[-1])
    assert HiddenStates().layers == (-1,) and HiddenStates(modules="a").layers is None
    assert HiddenStates(layers=0, modules="a").modules == ("a",) and HiddenStates(modules=["a"]).modules == ("a",)
    assert HiddenStates(layers="all").layers == "all"
    assert HiddenStates(tokens="generated", pool="last").pool == "last"


# Ways to generate


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "top_k": 40},
        {"num_return_sequences": 3, "do_sample": True},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_ways_to_generate(kind: str, options: dict[str, Any]) -> None:
    model, inputs = built(kind), padded()
    torch.manual_seed(2)
    snapshot, out = heard(model, ALL, **inputs, **options, **TOLD)
    found, n = snapshot.hidden["sequence"], N_PROMPT + N_NEW - 1
    n_rows = options.get("num_return_sequences", 1)
    n_padding = [0] * n_rows + [3] * n_rows
    assert found.rows.tolist() == row_ids(*[range(n - k) for k in n_padding])
    assert torch.equal(found.token_ids, torch.cat([r[k:-1] for r, k in zip(out.sequences, n_padding, strict=True)]))
    with torch.no_grad():
        mask = torch.ones_like(out.sequences)[:, :-1]
        mask[n_rows:, :3] = 0
        at = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(out.sequences[:, :-1], attention_mask=mask, position_ids=at, output_hidden_states=True)
    for i, states in enumerate(whole.hidden_states):
        assert torch.allclose(found.states[f"hidden_states.{i}"], states[mask > 0], atol=1e-4)
    if "prefill_chunk_size" not in options and options.get("use_cache", True):
        for i in range(3):
            wanted = told(out.hidden_states, i, n_padding=tuple(n_padding))
            assert torch.equal(found.states[f"hidden_states.{i}"], wanted)


def repeated() -> dict[str, torch.Tensor]:
    ids = prompt(n=4)["input_ids"].repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assisted(kind: str, model: Any) -> tuple[dict[str, Any], list[int]]:
    """Options of an assisted run, and a list that counts the drafts that the model was given."""
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3}, []
    if kind == "itself":
        model.generation_config.eos_token_id = None
        return {"assistant_model": model}, []
    other = tiny_model()
    for p in other.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.004
    other.generation_config.eos_token_id = None
    other.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": other}, []


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "itself"])
def test_rejected_drafts_never_enter(model: Any, kind: str) -> None:
    options, _ = assisted(kind, model)
    read = 0

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal read
        read += kwargs["input_ids"].shape[1]

    handle = model.register_forward_hook(count, with_kwargs=True)
    snapshot, out = heard(model, ALL, **repeated(), max_new_tokens=24, **options)
    handle.remove()
    found = snapshot.hidden["sequence"]
    assert read > len(found)  # drafts were rejected, or read by the assistant
    assert found.rows.tolist() == row_ids(range(12 + 23)) and torch.equal(found.token_ids, out[0, :-1])
    with torch.no_grad():
        whole = model(out[:, :-1], output_hidden_states=True).hidden_states
    for i, states in enumerate(whole):
        assert torch.allclose(found.states[f"hidden_states.{i}"], states[0], atol=1e-4)
    after = sequence(model, HiddenStates(tokens="generated"), **repeated(), max_new_tokens=24, **options)
    assert after.rows.tolist() == [[0, i] for i in range(12, 35)]


def test_an_assistant_that_is_the_model_itself_is_not_heard(model: Any) -> None:
    passes: list[torch.Tensor] = []
    options, _ = assisted("itself", model)
    checked = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: passes.append((args[0].shape[1], args[0].detach()))
    )
    found = sequence(model, HiddenStates(layers=0), **repeated(), max_new_tokens=3, **options)
    checked.remove()
    assert len(passes) > 2 and found.rows.tolist() == row_ids(range(14))


@pytest.mark.parametrize("n", [1, 5])
def test_an_assisted_run_that_goes_on_is_refused(model: Any, n: int) -> None:
    inputs, options = prompt(n=2), {"prompt_lookup_num_tokens": 8}
    inputs["input_ids"][:] = 70
    first, _ = heard(model, ALL, **inputs, max_new_tokens=n, **options)
    with sq.capture(model, hidden_states=ALL) as run, pytest.warns(UserWarning, match="cannot be kept"):
        sq.restore(first, model).generate(max_new_tokens=8)
    with pytest.raises(sq.UnsupportedOperationError, match="assisted loop that goes on"):
        run.snapshot()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_beams": 2}, "a beam search"),
        ({"guidance_scale": 1.7}, "2, of 10 tokens"),
        ({"guidance_scale": 1.7, "max_new_tokens": 1}, "2, of 10 tokens"),
        ({"guidance_scale": 1.7, "use_cache": False}, "2, of 10 tokens"),
    ],
    ids=str,
)
def test_loops_of_another_kind_are_refused_by_name(model: Any, options: dict[str, Any], found: str) -> None:
    plain = model.generate(**prompt(), **{**GREEDY, **options})
    with sq.capture(model, hidden_states=ALL) as run:
        with pytest.warns(UserWarning, match="cannot be kept"):
            again = model.generate(**prompt(), **{**GREEDY, **options})
        assert not held(run)
    assert torch.equal(plain, again)
    with pytest.raises(sq.UnsupportedOperationError, match=found) as refusal:
        run.snapshot()
    assert refusal.value.where and refusal.value.expected and refusal.value.do


def held(run: Any) -> list[Any]:
    """What the ear still holds."""
    return list(run._hearing._listener.passes)


def test_a_run_that_cannot_be_kept_holds_nothing(model: Any) -> None:
    class Cache(DynamicCache):
        pass

    kinds: list[int] = []
    with sq.capture(model, hidden_states=ALL) as run:
        handle = model.register_forward_hook(lambda *_: kinds.append(len(held(run))))
        with pytest.warns(UserWarning, match="cannot be kept"):
            model.generate(**prompt(), **GREEDY, past_key_values=Cache(config=model.config))
        handle.remove()
        assert not held(run)
    assert max(kinds) == 1
    with pytest.raises(sq.UnsupportedModelError):
        run.snapshot()


# What cannot be kept


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (HiddenStates(modules="model.layer.*.mlp"), ["model.layer.*.mlp", "model.layers.*.mlp"]),
        (HiddenStates(modules=("lm_head", "nothing")), ["nothing", "LlamaForCausalLM"]),
        (HiddenStates(modules="model.layers.7.mlp"), ["layers.7", "model.layers.*.mlp"]),
        (HiddenStates(modules="model.layers.*"), []),
        (HiddenStates(modules="**.q_proj"), []),
        (HiddenStates(modules="mlp"), ["mlp"]),
        (HiddenStates(layers=3), ["layers=3", "0 to 2", "2 blocks", "3 hidden"]),
        (HiddenStates(layers=(0, -4)), ["layers=-4", "-1 to -3"]),
        (HiddenStates(layers=(0, -3)), []),
    ],
    ids=str,
)
def test_places_that_are_not_there(model: Any, spec: HiddenStates, words: list[str]) -> None:
    if not words:
        with sq.capture(model, hidden_states=spec):
            return
    with pytest.raises(sq.UnsupportedOperationError) as refusal, sq.capture(model, hidden_states=spec):
        pass
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert_untouched(model)


def test_patterns() -> None:
    model = built("llama")
    for pattern, n in {
        "model.layers.*.mlp": 2, "**.mlp": 2, "model.layers.1.**": 13, "**.?_proj": 8, "model.**.up_*": 2, "*": 2,
        "**.layers.0.self_attn": 1,
    }.items():  # fmt: skip
        from semq_state.hidden import sites_of

        assert len(sites_of(model, HiddenStates(modules=pattern))) == n, pattern
    found = sites_of(model, HiddenStates(layers=(2, -1, 0), modules=("model.norm", "model.n*")))
    assert [(site.name, site.reads) for site in found] == [
        ("hidden_states.2", "output"), ("hidden_states.0", "input"), ("model.norm", "output")
    ]  # fmt: skip


def test_modules_of_a_pair_belong_to_their_stream() -> None:
    spec = HiddenStates(layers=(0,), modules=("encoder.block.*", "decoder.block.0", "lm_head"))
    hidden = heard(built("t5"), spec, **prompt())[0].hidden
    assert sorted(hidden["encoder"].states) == ["encoder.block.0", "encoder.block.1", "hidden_states.0"]
    assert sorted(hidden["sequence"].states) == ["decoder.block.0", "hidden_states.0", "lm_head"]
    only = heard(built("t5"), HiddenStates(modules="encoder.block.0"), **prompt())[0].hidden
    assert list(only) == ["encoder"]


class Twice(torch.nn.Module):
    """Calls what is inside it once more."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.inner(x)


class Overwrites(Twice):
    """Writes over what is inside it gave."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).mul_(1.0)


class Gives(Twice):
    """Gives something else beside."""

    def __init__(self, inner: torch.nn.Module, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(inner)
        self.beside = Answer(answer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.beside(x)
        return self.inner(x)


class Answer(torch.nn.Module):
    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(x)


class Silent(Twice):
    """Does without what is inside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Buffered(torch.nn.Module):
    """Gives the same memory each time, as a captured graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept.setdefault(x.shape, torch.empty_like(x))
        return kept.copy_(x)


def beside(model: Any, wrap: Callable[[Any], Any]) -> None:
    layer = model.model.layers[1]
    layer.mlp = wrap(layer.mlp)


INNER = "model.layers.1.mlp.inner"
BESIDE = "model.layers.1.mlp.beside"
BAD: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "called twice": (lambda m: beside(m, Twice), INNER, "more than once"),
    "shared": (
        lambda m: setattr(m.model.layers[1], "mlp", m.model.layers[0].mlp),
        "model.layers.0.mlp",
        "more than",
    ),
    "written over": (lambda m: beside(m, Overwrites), INNER, "wrote over"),
    "not called": (lambda m: beside(m, Silent), INNER, "no call"),
    "none": (lambda m: beside(m, lambda x: Gives(x, lambda x: None)), BESIDE, "found none"),
    "text": (lambda m: beside(m, lambda x: Gives(x, lambda x: ("a", 1))), BESIDE, "found none"),
    "numbers": (lambda m: beside(m, lambda x: Gives(x, lambda x: x.long())), BESIDE, "int64"),
    "one axis": (lambda m: beside(m, lambda x: Gives(x, lambda x: x[0, 0])), BESIDE, r"\(32,\)"),
    "a row for all": (lambda m: beside(m, lambda x: Gives(x, lambda x: x[:, 0])), BESIDE, r"\(1, 32\)"),
    "one token": (lambda m: None, "lm_head", r"expected states of the tokens that were read, \(1, 9, dim\), found"),
    "other axes": (lambda m: beside(m, lambda x: Gives(x, lambda x: x.mT)), BESIDE, r"\(1, 32, 9\)"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_kept_is_told_and_the_run_goes_on(how: str) -> None:
    change, site, words = BAD[how]
    model = tiny_model()
    change(model)
    plain = model.generate(**prompt(), **GREEDY)
    with sq.capture(model, hidden_states=HiddenStates(modules=site)) as run:
        with pytest.warns(UserWarning, match="cannot be kept") as warned:
            again = model.generate(**prompt(), **GREEDY)
        assert len(warned) == 1 and not held(run)
    assert torch.equal(plain, again)
    with pytest.raises(sq.IncompleteStateError, match=words) as refusal:
        run.snapshot()
    assert refusal.value.where == site and refusal.value.expected and refusal.value.found and refusal.value.do
    if how == "one token":
        return
    with sq.capture(model, hidden_states=HiddenStates(modules=site)) as run, torch.no_grad():
        model(**prompt())
    with pytest.raises(sq.IncompleteStateError, match=words):
        run.snapshot()


def test_vectors_of_changing_length_are_refused(model: Any) -> None:
    beside(model, lambda inner: Gives(inner, lambda x: x[..., : x.shape[1]]))
    with (
        sq.capture(model, hidden_states=HiddenStates(modules=BESIDE)) as run,
        pytest.warns(UserWarning, match="cannot be kept"),
    ):
        model.generate(**prompt(), **GREEDY)
    with pytest.raises(sq.IncompleteStateError, match="vectors of 9 numbers"):
        run.snapshot()


def test_more_axes_are_one_vector(model: Any) -> None:
    beside(model, lambda inner: Gives(inner, lambda x: {"first": x.unflatten(-1, (4, 8))}))
    found = sequence(model, HiddenStates(modules=BESIDE), **prompt())
    beside(model, lambda gives: Gives(gives.inner, lambda x: x))
    wanted = sequence(model, HiddenStates(modules=BESIDE), **prompt())
    assert torch.equal(found.states[BESIDE], wanted.states[BESIDE])


def test_memory_that_is_used_again_does_not_change_rows(model: Any) -> None:
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, Buffered())
    spec = HiddenStates(modules="model.layers.0.mlp.*")
    found = sequence(model, spec, **prompt())
    assert torch.equal(found.states["model.layers.0.mlp.0"], found.states["model.layers.0.mlp.1"])


def test_what_the_caller_does_with_an_output_does_not_change_rows() -> None:
    model = bert()
    with sq.capture(model, hidden_states=HiddenStates()) as run, torch.no_grad():
        out = model(**prompt(2)).last_hidden_state
        wanted = out.clone()
        out.zero_()
    assert torch.equal(run.snapshot().hidden["sequence"].states["hidden_states.2"], wanted.flatten(0, 1))


def test_a_block_that_is_shared_is_refused() -> None:
    torch.manual_seed(0)
    model = AlbertModel(AlbertConfig(**{**SMALL, "embedding_size": 16, "intermediate_size": 48})).eval()
    with pytest.raises(sq.UnsupportedModelError, match="list of blocks"), sq.capture(model, hidden_states=ALL):
        pass
    name = "encoder.albert_layer_groups.0"
    with sq.capture(model, hidden_states=HiddenStates(modules=name)) as run, torch.no_grad():
        model(**prompt())
    with pytest.raises(sq.IncompleteStateError, match="more than once"):
        run.snapshot()
    with sq.capture(model, hidden_states=HiddenStates(modules="encoder")) as run, torch.no_grad():
        out = model(**prompt())
    assert torch.equal(run.snapshot().hidden["sequence"].states["encoder"], out.last_hidden_state[0])


def test_a_mask_without_padding_in_it_is_refused() -> None:
    model = bert()
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        model(prompt()["input_ids"], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(sq.IncompleteStateError, match="another mask") as refusal:
        run.snapshot()
    assert refusal.value.where == "attention_mask"


def test_sites_of_unequal_length_are_refused(model: Any) -> None:
    beside(model, lambda inner: Gives(inner, lambda x: x[:, :-1]))
    with sq.capture(model, hidden_states=HiddenStates(layers=0, modules=BESIDE)) as run, torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 5, 32))
    with pytest.raises(sq.IncompleteStateError, match=r"\(1, 5, dim\), found \(1, 4, 32\)"):
        run.snapshot()


def test_two_passes_in_one_call_are_refused() -> None:
    model = copy.deepcopy(built("t5"))
    forward = model.forward
    model.forward = lambda **kwargs: [forward(**kwargs) for _ in range(2)]
    with sq.capture(model, hidden_states=ALL) as run, torch.no_grad():
        model(**prompt(), decoder_input_ids=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(sq.UnsupportedOperationError, match="2 in one call"):
        run.snapshot()


def test_nothing_was_called(model: Any) -> None:
    with sq.capture(model, hidden_states=ALL) as run:
        pass
    with pytest.raises(sq.IncompleteStateError, match="at least one"):
        run.snapshot()
    with sq.capture(bert(), hidden_states=ALL) as run, pytest.raises(sq.IncompleteStateError, match="forward pass"):
        run.snapshot()
    with pytest.raises(sq.UnsupportedModelError, match="generate"):
        sq.capture(bert())


# A run after another


def test_each_run_begins_afresh(model: Any) -> None:
    single = sequence(model, **prompt())
    with sq.capture(model, hidden_states=ALL) as run:
        model.generate(**padded(), **GREEDY)
        model.generate(**prompt(), **GREEDY)
        assert_same(run.snapshot().hidden["sequence"], single)
        model(**prompt(n=4))
        assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(4))
        model(**prompt(n=5))
        assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(5))
        assert run.snapshot().cache.kind == "absent"
        model.generate(**prompt(), **GREEDY)
        assert_same(run.snapshot().hidden["sequence"], single)
        assert run.snapshot().cache.kind != "absent"


def test_a_good_run_after_a_bad_one(model: Any) -> None:
    with sq.capture(model, hidden_states=ALL) as run:
        with pytest.warns(UserWarning, match="cannot be kept"):
            model.generate(**prompt(), **GREEDY, num_beams=2)
        model.generate(**prompt(), **GREEDY)
        assert_same(run.snapshot().hidden["sequence"], sequence(model, **prompt()))
        model(prompt()["input_ids"], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
        with pytest.raises(sq.IncompleteStateError):
            run.snapshot()
        model(**prompt(n=4))
        assert len(run.snapshot().hidden["sequence"]) == 4


class StopError(Exception):
    """What stops a run here."""


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_an_interrupt_keeps_the_last_token(model: Any, kind: type[BaseException], n: int) -> None:
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > n:
            raise kind

    before = sequence(model, **padded())
    with sq.capture(model, hidden_states=ALL) as run:
        model.generate(**padded(), **GREEDY)
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(kind):
            model.generate(**prompt(), **GREEDY)
        handle.remove()
        snapshot = run.snapshot()
        wanted = sequence(model, **prompt(), max_new_tokens=n) if n else before
        assert_same(snapshot.hidden["sequence"], wanted)
        model.generate(**prompt(), **GREEDY)
        assert_same(run.snapshot().hidden["sequence"], sequence(model, **prompt()))
        model(**prompt(n=4))
        assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(4))
    assert_untouched(model)


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["", "model", "model.layers.1"])
def test_an_interrupted_plain_pass_changes_nothing(model: Any, kind: type[BaseException], where: str) -> None:
    def stop(*_: Any) -> None:
        raise kind

    with sq.capture(model, hidden_states=ALL) as run:
        model(**prompt(n=5))
        for inner in (model, model.model):
            handle = model.get_submodule(where).register_forward_pre_hook(stop, prepend=True)
            if where or inner is model:
                with pytest.raises(kind):
                    inner(**prompt())
            handle.remove()
            assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(5))
        model(**prompt(n=3))
        assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(3))
        model.model(**prompt(n=6))
        assert run.snapshot().hidden["sequence"].rows.tolist() == row_ids(range(6))
        model.generate(**prompt(), **GREEDY)
        assert_same(run.snapshot().hidden["sequence"], sequence(model, **prompt()))


def assert_untouched(model: Any) -> None:
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called and not module._forward_hooks_with_kwargs
        assert not {"generate", "forward", "_get_stopping_criteria"} & vars(module).keys()


def test_nothing_stays_on_the_model(model: Any) -> None:
    with pytest.raises(ZeroDivisionError), sq.capture(model, hidden_states=ALL):
        assert "generate" in vars(model) and model.model.layers[0]._forward_pre_hooks
        model.generate(**prompt(), **GREEDY)
        raise ZeroDivisionError
    assert_untouched(model)


def test_the_run_is_the_same_with_it(model: Any) -> None:
    for _ in range(2):
        torch.manual_seed(3)
        plain = model.generate(**padded(), **{**GREEDY, "do_sample": True})
        torch.manual_seed(3)
        _, again = heard(model, HiddenStates(layers="all", modules="**.mlp"), **padded(), do_sample=True)
        assert torch.equal(plain, again)
    assert_untouched(model)


def test_a_capture_in_a_capture(model: Any) -> None:
    with sq.capture(model, hidden_states=ALL) as outer:
        with sq.capture(model, hidden_states=HiddenStates(tokens="last")) as inner, sq.capture(model) as plain:
            model.generate(**padded(), **GREEDY)
        assert "generate" in vars(model)
        assert_same(outer.snapshot().hidden["sequence"], sequence(model, **padded()))
        model.generate(**prompt(), **GREEDY)
    assert_untouched(model)
    assert_same(inner.snapshot().hidden["sequence"], sequence(model, HiddenStates(tokens="last"), **padded()))
    assert_same(outer.snapshot().hidden["sequence"], sequence(model, **prompt()))
    assert not plain.snapshot().hidden


def test_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        found = sequence(model, **padded())
    assert_same(found, sequence(model, **padded()))


# Snapshots


@functools.cache
def kept() -> sq.Snapshot:
    return heard(built("llama"), HiddenStates(layers="all", modules="model.layers.*.mlp"), **padded())[0]


@pytest.mark.parametrize("codec", ["exact", "raw", "exact-max"])
@pytest.mark.parametrize("of", ["generate", "alone", "plain", "pair"])
def test_it_goes_through_a_file(codec: str, of: str, path: Path) -> None:
    if of == "pair":
        snapshot = heard(built("t5"), ALL, **padded(side="right"))[0]
    elif of == "plain":
        with sq.capture(bert(), hidden_states=ALL) as run, torch.no_grad():
            bert()(**padded(side="right"))
        snapshot = run.snapshot()
    else:
        snapshot = kept().without_cache() if of == "alone" else kept()
    sq.save(snapshot, path, codec=codec)
    again = sq.load(path)
    assert again.state_id == snapshot.state_id and again.structure() == snapshot.structure()
    assert again.hidden.keys() == snapshot.hidden.keys()
    for name, rows in snapshot.hidden.items():
        assert_same(again.hidden[name], rows)
    assert sq.verify(path).passed


@pytest.mark.parametrize("codec", ["semq", "rotated"])
def test_compact_files(codec: str, path: Path) -> None:
    snapshot = kept()
    rows = snapshot.hidden["sequence"]
    states = {name: t.clone() for name, t in rows.states.items()}
    states["hidden_states.1"][4, 7] = math.nan
    states["hidden_states.1"][9] = math.inf
    snapshot = dataclasses.replace(snapshot, hidden={"sequence": dataclasses.replace(rows, states=states)})
    sq.save(snapshot, path, codec=codec)
    found = sq.load(path)
    own = found.hidden["sequence"]
    assert torch.equal(own.rows, rows.rows) and torch.equal(own.token_ids, rows.token_ids)
    for name, wanted in states.items():
        exact = wanted[~wanted.isfinite().all(1)]
        assert torch.equal(own.states[name][~wanted.isfinite().all(1)].view(torch.int32), exact.view(torch.int32))
        finite = wanted.isfinite().all(1)
        error = (own.states[name][finite] - wanted[finite]).norm() / wanted[finite].norm()
        assert 0 < error < 0.5, (name, error)
    assert sq.verify(path).passed
    assert sq.load(path).state_id == found.state_id != snapshot.state_id


@pytest.mark.parametrize("tokens", ["all", "generated", slice(2, 11, 2), lambda ids, positions: positions % 3 == 0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_crop_is_a_run_that_stopped_there(kind: str, tokens: Any) -> None:
    spec = HiddenStates(layers="all", tokens=tokens)
    snapshot, _ = heard(built(kind), spec, **padded())
    for n in range(1, N_NEW):
        wanted = heard(built(kind), spec, **padded(), max_new_tokens=n)[0]
        assert_same(snapshot.crop(N_PROMPT + n).hidden["sequence"], wanted.hidden["sequence"])
    inside = snapshot.crop(5).hidden["sequence"]
    assert inside.rows[:, 1].max() < 4 if len(inside) else tokens == "generated"
    assert not (inside.rows[inside.rows[:, 0] == 1][:, 1] > 0).any()


def test_a_crop_of_a_pair_leaves_the_encoder() -> None:
    snapshot, _ = heard(built("t5"), ALL, **padded(side="right"))
    cropped = snapshot.crop(3).hidden
    assert_same(cropped["encoder"], snapshot.hidden["encoder"])
    assert cropped["sequence"].rows.tolist() == row_ids(range(2), range(2))


def test_a_crop_without_a_cache(model: Any) -> None:
    snapshot, _ = heard(model, ALL, **padded(), use_cache=False)
    wanted, _ = heard(model, ALL, **padded(), use_cache=False, max_new_tokens=3)
    assert_same(snapshot.crop(N_PROMPT + 3).hidden["sequence"], wanted.hidden["sequence"])


@pytest.mark.parametrize(
    "choice",
    [{"tokens": "last"}, {"tokens": slice(-3, None)}, {"tokens": slice(0, -1)}, {"pool": "mean"}, {"pool": "last"}],
    ids=str,
)
def test_what_cannot_be_cropped(model: Any, choice: dict[str, Any], path: Path) -> None:
    snapshot, _ = heard(model, HiddenStates(**choice), **padded())
    sq.save(snapshot, path)
    for each in (snapshot, sq.load(path)):
        with pytest.raises(sq.UnsupportedOperationError, match="hidden states") as refusal:
            each.crop(10)
        assert refusal.value.found and refusal.value.do
    dataclasses.replace(snapshot, hidden={}).crop(10)
    assert_same(snapshot.select([1]).hidden["sequence"], snapshot.hidden["sequence"].select([1]))
    with pytest.raises(sq.UnsupportedOperationError, match="a state with a cache"):
        snapshot.without_cache().crop(10)


def test_rows_of_a_batch() -> None:
    own = kept().hidden["sequence"]
    for rows in ([1], [0, 0, 1], [-1, -2], [1, 1]):
        taken = kept().select(rows)
        found = taken.hidden["sequence"]
        for i, row in enumerate(rows):
            part, wanted = found.of(i), own.of(row % 2)
            assert torch.equal(part.rows[:, 1], wanted.rows[:, 1]) and (part.rows[:, 0] == i).all()
            assert torch.equal(part.token_ids, wanted.token_ids)
            for name, states in wanted.states.items():
                assert torch.equal(part.states[name], states)
        found.check("hidden", taken.batch_size)
        assert len(found) == sum(len(own.of(row % 2)) for row in rows)


def test_other_operations(model: Any) -> None:
    snapshot, _ = heard(model, ALL, **padded())
    own = snapshot.hidden["sequence"]
    assert snapshot.fork(2, seeds=(1, 2))[1].hidden["sequence"] is own
    cast = snapshot.to(dtype=torch.bfloat16).hidden["sequence"]
    assert torch.equal(cast.rows, own.rows) and torch.equal(cast.token_ids, own.token_ids)
    assert torch.equal(cast.states["hidden_states.1"], own.states["hidden_states.1"].bfloat16())
    alone = snapshot.without_cache()
    assert_same(alone.hidden["sequence"], own)
    assert alone.generation.step_inputs.keys() == {"attention_mask"} and alone.cache.kind == "absent"
    assert not any(name.startswith("layers") for name in alone.tensors())
    assert torch.equal(alone.generation.input_ids, snapshot.generation.input_ids)
    assert alone.state_id != snapshot.state_id != dataclasses.replace(snapshot, hidden={}).state_id


def test_hidden_states_alone_do_not_go_on(model: Any, path: Path) -> None:
    alone = heard(model, ALL, **padded())[0].without_cache()
    sq.save(alone, path)
    for each in (alone, sq.load(path)):
        for go_on in (sq.restore, sq.replay):
            with pytest.raises(sq.IncompleteStateError, match="hidden states alone") as refusal:
                go_on(each, model)
            assert refusal.value.where == "cache" and refusal.value.do


def changed(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda structure, tensors: tensors.update({name: tensor})


def told_as(*way: Any, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *path, last = way
        for step in path:
            structure = structure[step]
        structure[last] = value

    return change


def moved(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    structure["hidden"]["other"] = structure["hidden"].pop("sequence")
    for name in [name for name in tensors if name.startswith("hidden.sequence.")]:
        tensors[name.replace("sequence", "other", 1)] = tensors.pop(name)


N_ROWS = 14 + 11
ROWS, STATES = "hidden.sequence.rows", "hidden.sequence.states.hidden_states.1"
HIDDEN = ("hidden", "sequence")
AT = torch.tensor(row_ids(range(14), range(11)))
LIES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = {
    "rows one too few": changed(ROWS, AT[1:]),
    "rows in int32": changed(ROWS, AT.int()),
    "rows of three": changed(ROWS, torch.zeros(N_ROWS, 3, dtype=torch.int64)),
    "rows of one axis": changed(ROWS, AT[:, 0]),
    "rows without axes": changed(ROWS, torch.tensor(3)),
    "rows none": changed(ROWS, AT[:0]),
    "rows the wrong way round": changed(ROWS, AT.flip(0)),
    "rows twice": changed(ROWS, torch.cat([AT[:1], AT[:-1]])),
    "rows from minus one": changed(ROWS, AT - 1),
    "rows far away": changed(ROWS, torch.cat([AT[:-1], torch.tensor([[1, 1 << 32]])])),
    "a document that is not there": changed(ROWS, torch.cat([AT[:-1], torch.tensor([[2, 0]])])),
    "ids in floats": changed("hidden.sequence.token_ids", torch.zeros(N_ROWS)),
    "ids too few": changed("hidden.sequence.token_ids", torch.zeros(N_ROWS - 1, dtype=torch.int64)),
    "states too few": changed(STATES, torch.zeros(N_ROWS - 1, 32)),
    "states in numbers": changed(STATES, torch.zeros(N_ROWS, 32, dtype=torch.int64)),
    "states of one axis": changed(STATES, torch.zeros(N_ROWS)),
    "states of three axes": changed(STATES, torch.zeros(N_ROWS, 4, 8)),
    "states besides": changed("hidden.sequence.states.more", torch.zeros(N_ROWS, 32)),
    "states not there": told_as(*HIDDEN, "states", value=["hidden_states.1", "more"]),
    "states out of order": told_as(
        *HIDDEN, "states", value=["hidden_states.2", "hidden_states.1", "hidden_states.0"]
    ),
    "states in numbers as names": told_as(*HIDDEN, "states", value=[1, 2]),
    "states a table": told_as(*HIDDEN, "states", value={}),
    "tokens a number": told_as(*HIDDEN, "tokens", value=1),
    "pool none": told_as(*HIDDEN, "pool", value=None),
    "more": told_as(*HIDDEN, "more", value=1),
    "hidden a list": told_as("hidden", value=[]),
    "hidden none": told_as("hidden", value=None),
    "stream a list": told_as(*HIDDEN, value=[]),
    "another stream": moved,
    "hidden not told": lambda structure, tensors: structure.pop("hidden"),
}


@pytest.mark.parametrize("name", LIES)
def test_states_that_were_put_together_wrongly(name: str) -> None:
    snapshot = heard_once()
    structure, tensors = {**snapshot.structure()}, snapshot.tensors()
    structure["hidden"] = {"sequence": {**structure["hidden"]["sequence"]}}
    assemble(structure, tensors, snapshot.provenance, {})
    LIES[name](structure, tensors)
    with pytest.raises((sq.IncompleteStateError, TypeError, KeyError)):
        assemble(structure, tensors, snapshot.provenance, {})


@functools.cache
def heard_once() -> sq.Snapshot:
    return heard(built("llama"), ALL, **padded())[0]


@pytest.mark.parametrize("name", ["rows", "states"])
def test_a_file_with_such_a_lie_is_refused(name: str, path: Path) -> None:
    snapshot = heard_once()
    rows = snapshot.hidden["sequence"]
    wrong = dataclasses.replace(rows, rows=rows.rows.flip(0)) if name == "rows" else rows.map(lambda t: t[1:])
    sq.save(dataclasses.replace(snapshot, hidden={"sequence": wrong}), path)
    with pytest.raises(sq.IncompleteStateError, match=f"hidden.sequence.{name}"):
        sq.load(path)


# Autosave


def test_autosave_around_generate(model: Any, path: Path) -> None:
    with sq.capture(model, hidden_states=ALL, autosave=path, every=2) as run:
        model.generate(**padded(), **GREEDY)
        assert run.n_saved == 3
        assert sq.load(path).n_new_tokens == 5
    assert run.n_saved == 4
    assert_same(sq.load(path).hidden["sequence"], sequence(model, **padded()))


def test_autosave_of_a_run_that_cannot_be_kept(model: Any, path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="autosave failed, generation goes on"),
        pytest.raises(sq.UnsupportedOperationError),
        sq.capture(model, hidden_states=ALL, autosave=path, every=4),
    ):
        model.generate(**prompt(), **GREEDY, num_beams=2)
    assert not path.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_autosave_around_a_plain_pass(path: Path, fails: bool) -> None:
    model = bert()
    if fails:
        with (
            pytest.warns(UserWarning, match="not saved"),
            pytest.raises(StopError),
            sq.capture(model, hidden_states=HiddenStates(modules="pooler"), autosave=path),
        ):
            model(**prompt())
            raise StopError
        assert not path.exists()
        return
    with sq.capture(model, hidden_states=ALL, autosave=path) as run, torch.no_grad():
        model(**prompt(2))
        out = model(**padded(side="right"), output_hidden_states=True).hidden_states
    assert run.n_saved == 1
    found = sq.load(path)
    assert found.state_id == run.snapshot().state_id
    own = padded(side="right")["attention_mask"] > 0
    assert torch.equal(found.hidden["sequence"].states["hidden_states.1"], out[1][own])
