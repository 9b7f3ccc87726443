"""Every way of generating, interrupted in the middle of a step and resumed from a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    QuantizedCache,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import DFlashCache, MtpCache
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import semq_state as sq
from conftest import SIZES, TINY, tiny_model
from semq_state.caches import rebuild_cache

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 60}
RECORD = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


class StoppedError(Exception):
    """What stops a run in these tests."""


def prompt(n_rows: int = 1, n: int = 12, seed: int = 7) -> torch.Tensor:
    return torch.randint(60, 199, (n_rows, n), generator=torch.Generator().manual_seed(seed))


def encoder_decoder(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        config: Any = T5Config(
            vocab_size=199, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    else:
        config = BartConfig(
            vocab_size=199, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256,
            forced_eos_token_id=None,
        )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def whole(model: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(**kwargs, **RECORD)


def stopped(model: Any, n: int, **kwargs: Any) -> sq.Snapshot:
    """The same run, interrupted half way through the forward pass of step `n + 1`."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > n:
            raise StoppedError

    decoder = model.get_decoder()
    layers = next(getattr(decoder, name) for name in ("layers", "block", "h") if hasattr(decoder, name))
    handle = layers[-1].register_forward_pre_hook(count)
    try:
        with pytest.raises(StoppedError), sq.capture(model) as run:
            whole(model, **kwargs)
    finally:
        handle.remove()
    return run.snapshot()


def through(snapshot: sq.Snapshot, path: Path) -> sq.Snapshot:
    sq.save(snapshot, path)
    loaded = sq.load(path)
    assert loaded.state_id == snapshot.state_id
    return loaded


def assert_same(found: Any, expected: Any, names: tuple[str, ...] = ("logits", "scores")) -> None:
    """The last steps' scores and logits, and all tokens, bit for bit."""
    n_steps = len(found.logits)
    assert 0 < n_steps < len(expected.logits)
    for name in names:
        for mine, theirs in zip(getattr(found, name), getattr(expected, name)[-n_steps:], strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(found.sequences, expected.sequences)


BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 4, "num_return_sequences": 4},
    "two prompts": {"num_beams": 3, "input_ids": prompt(2), "num_return_sequences": 2},
    "end token": {"num_beams": 3, "eos_token_id": list(range(60, 75)), "num_return_sequences": 3},
    "early stopping": {"num_beams": 3, "eos_token_id": list(range(60, 75)), "early_stopping": True},
    "never early": {"num_beams": 3, "eos_token_id": [61, 62], "early_stopping": "never", "length_penalty": 2.0},
    "short is better": {"num_beams": 3, "eos_token_id": list(range(60, 75)), "length_penalty": -1.0},
    "sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.2, "top_k": 50},
    "sampling, end tokens": {"num_beams": 2, "do_sample": True, "eos_token_id": list(range(60, 70))},
    "processors": {"num_beams": 3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
}


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("what", BEAMS)
def test_beam_search(model: Any, what: str, n: int, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, **BEAMS[what]}
    expected = whole(model, **kwargs)
    if len(expected.logits) <= n:
        pytest.skip("the search has ended by then")
    resumed = sq.restore(through(stopped(model, n, **kwargs), path), model)
    found = resumed.generate()
    assert len(found.logits) == len(expected.logits) - n
    assert_same(found, expected)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    for name in ("forward", "_prefill", "_reorder_cache", "_get_top_k_continuations"):
        assert name not in vars(model)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt2"])
def test_beam_search_past_the_window(kind: str, path: Path) -> None:
    model, kwargs = tiny_model(kind), {"input_ids": prompt(2), **GREEDY, "num_beams": 3}
    expected = whole(model, **kwargs)
    found = sq.restore(through(stopped(model, 13, **kwargs), path), model).generate()
    assert_same(found, expected)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)


def test_a_beam_search_gives_plain_tokens_too(model: Any) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, "num_beams": 3}
    expected = model.generate(**kwargs)
    resumed = sq.restore(stopped(model, 5, **kwargs), model)
    assert torch.equal(resumed.generate(return_dict_in_generate=False), expected)
    with pytest.raises(sq.UnsupportedOperationError, match="beam search"):
        resumed.inputs  # noqa: B018
    with pytest.raises(sq.UnsupportedOperationError, match="num_beams"):
        resumed.generate(num_beams=2)
    with pytest.raises(sq.UnsupportedOperationError, match="append"):
        resumed.generate(append=[5, 6])


def test_a_longer_beam_search(model: Any) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, "num_beams": 3}
    expected = whole(model, **{**kwargs, "max_new_tokens": 40})
    found = sq.restore(stopped(model, 10, **kwargs), model).generate(max_new_tokens=30)
    assert_same(found, expected)


def test_a_beam_search_that_has_ended(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, "num_beams": 3}
    with sq.capture(model) as run:
        expected = whole(model, **kwargs)
    found = sq.restore(through(run.snapshot(), path), model).generate()
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert found.logits == ()


def test_rows_of_a_beam_search(model: Any) -> None:
    kwargs = {"input_ids": prompt(3), **GREEDY, "num_beams": 3}
    snapshot = stopped(model, 8, **kwargs)
    found = sq.restore(snapshot.select([2, 0]), model).generate()
    expected = whole(model, **kwargs)
    assert torch.equal(found.sequences, expected.sequences[[2, 0]])
    with pytest.raises(sq.UnsupportedOperationError, match="beam search"):
        snapshot.crop(14)


INCOMPLETE_SEARCH = ("running_scores", "sequences", "beam_indices", "can_improve")


@pytest.mark.parametrize("name", INCOMPLETE_SEARCH)
def test_an_incomplete_search_is_refused(model: Any, name: str) -> None:
    import dataclasses

    snapshot = stopped(model, 5, input_ids=prompt(), **GREEDY, num_beams=3)
    search = {k: t for k, t in snapshot.generation.search.items() if k != name}
    state = dataclasses.replace(snapshot.generation, search=search)
    with pytest.raises(sq.IncompleteStateError, match=name):
        sq.restore(dataclasses.replace(snapshot, generation=state), model)


SEQ2SEQ: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "beams": {**GREEDY, "num_beams": 3},
    "batch": {**GREEDY, "input_ids": prompt(3)},
    "ended rows": {**SAMPLED, "input_ids": prompt(6), "eos_token_id": list(range(60, 66))},
    "encoder penalties": {**GREEDY, "encoder_repetition_penalty": 1.6, "encoder_no_repeat_ngram_size": 2},
    "decoder prompt": {**GREEDY, "decoder_input_ids": torch.tensor([[0, 5, 9, 33]])},
    "attention mask": {**GREEDY, "attention_mask": (prompt() > 90).long()},
    "static": {**GREEDY, "cache_implementation": "static"},
}


@pytest.mark.parametrize("what", SEQ2SEQ)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(kind: str, what: str, path: Path) -> None:
    model = encoder_decoder(kind)
    kwargs = {"input_ids": prompt(), **SEQ2SEQ[what]}
    expected = whole(model, **kwargs)
    calls: list[int] = []
    handle = model.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
    snapshot = through(stopped(model, 9, **kwargs), path)
    calls.clear()
    resumed = sq.restore(snapshot, model)
    # The scores of a row that has ended are its padding's.
    assert_same(resumed.generate(), expected, ("logits",) if what == "ended rows" else ("logits", "scores"))
    assert not calls, "the encoder must not run again"
    handle.remove()
    if what == "greedy":
        found = model.generate(**resumed.inputs, **{**GREEDY, "max_new_tokens": 15})
        assert torch.equal(found, expected.sequences)
        cropped = sq.restore(snapshot.crop(5), model)
        assert torch.equal(cropped.generate().sequences, expected.sequences)


def test_an_encoder_decoder_without_its_encoder_outputs_is_refused() -> None:
    import dataclasses

    model = encoder_decoder("t5")
    snapshot = stopped(model, 5, input_ids=prompt(), **GREEDY)
    state = snapshot.generation
    values = {k: v for k, v in state.step_values.items() if k != "encoder_outputs"}
    inputs = {k: t for k, t in state.step_inputs.items() if not k.startswith("encoder_outputs")}
    without = dataclasses.replace(state, step_values=values, step_inputs=inputs)
    with pytest.raises(sq.IncompleteStateError, match="encoder_outputs"):
        sq.restore(dataclasses.replace(snapshot, generation=without), model)
    cross = dataclasses.replace(
        snapshot.cache.parts["cross"],
        layers=tuple(
            dataclasses.replace(x, tensors={}, meta={"filled": False}) for x in snapshot.cache.parts["cross"].layers
        ),
    )
    cache = dataclasses.replace(snapshot.cache, parts={**snapshot.cache.parts, "cross": cross})
    with pytest.raises(sq.IncompleteStateError, match="cross"):
        sq.restore(dataclasses.replace(snapshot, cache=cache), model)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_loop_of_ones_own_over_an_encoder_decoder(kind: str, path: Path) -> None:
    model, ids = encoder_decoder(kind), prompt()
    mask = (ids > 80).long()
    expected = whole(model, input_ids=ids, attention_mask=mask, **GREEDY)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    tokens = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        encoded = model.get_encoder()(ids, attention_mask=mask, return_dict=True)
        given = {"encoder_outputs": encoded, "attention_mask": mask}
        for _ in range(9):
            logits = model(decoder_input_ids=tokens[:, -1:], past_key_values=cache, **given).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=-1)
    with pytest.raises(sq.IncompleteStateError, match="encoder_outputs"):
        sq.snapshot_of(model, cache, tokens)
    snapshot = through(sq.snapshot_of(model, cache, tokens, inputs=given), path)
    found = sq.restore(snapshot, model).generate(**{**GREEDY, "max_new_tokens": 15}, **RECORD)
    assert_same(found, expected)


@pytest.fixture
def assistant(model: Any) -> Any:
    """A copy of the model with slightly other weights: it guesses right now and then."""
    torch.manual_seed(3)
    other = tiny_model()
    for p in other.parameters():
        p.data += torch.randn_like(p) * 0.004
    other.generation_config.eos_token_id = None
    return other


@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_assisted(model: Any, assistant: Any, how: str, n: int, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **(GREEDY if how == "greedy" else SAMPLED), "assistant_model": assistant}
    assistant.generation_config.num_assistant_tokens = 4
    # The number of guesses then follows how many were right, which is state.
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    expected = whole(model, **kwargs)
    snapshot = through(stopped(model, n, **kwargs), path)
    assert 12 < snapshot.n_tokens < 36 and "assistant" in snapshot.generation.companions
    found = sq.restore(snapshot, model).generate(assistant_model=assistant)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_assisted_past_the_window(kind: str, path: Path) -> None:
    model, assistant = tiny_model(kind), tiny_model(kind)
    for p in assistant.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.003
    assistant.generation_config.eos_token_id = None
    kwargs = {"input_ids": prompt(), **GREEDY, "max_new_tokens": 40, "assistant_model": assistant}
    expected = whole(model, **kwargs)
    found = sq.restore(through(stopped(model, 8, **kwargs), path), model).generate(assistant_model=assistant)
    assert_same(found, expected)


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_prompt_lookup(model: Any, how: str, path: Path) -> None:
    ids = prompt(n=5).repeat(1, 4)
    kwargs = {"input_ids": ids, **(GREEDY if how == "greedy" else SAMPLED), "prompt_lookup_num_tokens": 3}
    expected = whole(model, **kwargs)
    assert_same(sq.restore(through(stopped(model, 6, **kwargs), path), model).generate(), expected)


def test_a_model_that_assists_itself(model: Any, path: Path) -> None:
    model.generation_config.eos_token_id = None
    kwargs = {"input_ids": prompt(), **GREEDY, "assistant_model": model}
    expected = whole(model, **kwargs)
    with sq.capture(model) as run:
        whole(model, **{**kwargs, "max_new_tokens": 14})
    snapshot = through(run.snapshot(), path)
    found = sq.restore(snapshot, model).generate(assistant_model=model, max_new_tokens=36 - snapshot.n_tokens)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_missing_assistant_is_told(model: Any, assistant: Any) -> None:
    snapshot = stopped(model, 2, input_ids=prompt(), **GREEDY, assistant_model=assistant)
    expected = whole(model, input_ids=prompt(), **GREEDY)
    with pytest.warns(UserWarning, match="assistant_model"):
        found = sq.restore(snapshot, model).generate()
    assert torch.equal(found.sequences, expected.sequences)


GUIDED: dict[str, dict[str, Any]] = {
    "last token": {},
    "negative prompt": {"negative_prompt_ids": prompt(n=5, seed=3)},
    "without cache": {"negative_prompt_ids": prompt(n=5, seed=3), "use_cache": False},
}


@pytest.mark.parametrize("what", GUIDED)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_guidance(kind: str, what: str, path: Path) -> None:
    model = tiny_model(kind)
    kwargs = {"input_ids": prompt(), **SAMPLED, "guidance_scale": 1.7, **GUIDED[what]}
    expected = whole(model, **kwargs)
    # Two forward passes a step: stopped between the two of step 9.
    snapshot = through(stopped(model, 17, **kwargs), path)
    assert ("guidance" in snapshot.generation.companions) == (what != "without cache")
    resumed = sq.restore(snapshot, model)
    if what == "without cache":
        with pytest.warns(UserWarning, match="holds no cache"):
            assert_same(resumed.generate(), expected)
    else:
        assert_same(resumed.generate(), expected)


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize("kind", TINY)
def test_static_cache(kind: str, how: str, path: Path) -> None:
    model, beams = tiny_model(kind), {"num_beams": 3} if how == "beams" else {}
    kwargs = {"input_ids": prompt(2), **GREEDY, "cache_implementation": "static", **beams}
    expected = whole(model, **kwargs)
    snapshot = stopped(model, 11, **kwargs)
    whole(model, **{**kwargs, "input_ids": prompt(2, seed=9)})  # writes over the same buffers
    found = sq.restore(through(snapshot, path), model).generate()
    assert_same(found, expected)
    assert all(layer.family.startswith("static") for layer in snapshot.cache.layers)


def test_a_snapshot_of_a_static_cache_stays_when_the_cache_is_used_again(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    expected = whole(model, input_ids=prompt(), **GREEDY)
    with sq.capture(model) as run:
        model.generate(prompt(), **{**GREEDY, "max_new_tokens": 9}, past_key_values=cache)
    snapshot = run.snapshot()
    cache.reset()
    model.generate(prompt(seed=9), **GREEDY, past_key_values=cache)
    assert torch.equal(sq.restore(snapshot, model).generate(max_new_tokens=15), expected.sequences)


def test_a_static_cache_that_was_written_over_is_refused(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    with sq.capture(model) as run:
        model.generate(prompt(), **GREEDY, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        model(prompt(n=40, seed=9), past_key_values=cache)
    with pytest.raises(sq.IncompleteStateError, match="cut or changed"):
        run.snapshot()


def wide_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "hidden_size": 256, "head_dim": 64})).eval()


BACKENDS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1, "residual_length": 8},
    "quanto": {"nbits": 4, "residual_length": 8},
}


@pytest.mark.filterwarnings("ignore")  # the quantisers' own, on import
@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_cache(backend: str, n: int, path: Path) -> None:
    if backend != "fp8":
        pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])
    model = wide_model()
    settings = {"backend": backend, **BACKENDS[backend]}
    kwargs = {"input_ids": prompt(2), **GREEDY, "cache_implementation": "quantized", "cache_config": settings}
    expected = whole(model, **kwargs)
    snapshot = through(stopped(model, n, **kwargs), path)
    assert {layer.family for layer in snapshot.cache.layers} == {backend}
    raw = sum(
        t.numel() * t.element_size()
        for t in stopped(model, n, input_ids=prompt(2), **GREEDY).cache.tensors().values()
    )
    assert snapshot.cache.n_bytes < raw / 2
    assert_same(sq.restore(snapshot, model).generate(), expected)


def test_a_quantized_cache_with_beams(path: Path) -> None:
    model = wide_model()
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    kwargs = {"input_ids": prompt(2), **GREEDY, "num_beams": 3, **cache}
    expected = whole(model, **kwargs)
    assert_same(sq.restore(through(stopped(model, 7, **kwargs), path), model).generate(), expected)


def test_an_offloading_cache_stays_on_a_device_without_cuda(model: Any, path: Path) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt()[:, :-1], past_key_values=cache)
    cache.offloading, cache.only_non_sliding = True, False
    snapshot = through(sq.snapshot_of(model, cache, prompt()), path)
    assert snapshot.cache.meta == {"grows": False, "offloading": True, "only_non_sliding": False}
    expected = model.generate(prompt(), **GREEDY)
    assert torch.equal(sq.restore(snapshot, model).generate(**GREEDY), expected)


def test_a_cache_passed_in_by_hand(path: Path) -> None:
    model = wide_model()
    kwargs = {"input_ids": prompt(), **GREEDY}
    expected = whole(model, **kwargs, past_key_values=QuantizedCache("fp8", model.config))
    snapshot = stopped(model, 6, **kwargs, past_key_values=QuantizedCache("fp8", model.config))
    assert_same(sq.restore(through(snapshot, path), model).generate(), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_static_cache_compiled(model: Any, path: Path) -> None:
    compiled = CompileConfig(fullgraph=False)
    compiled._compile_all_devices = True  # transformers' own switch for devices where it would not by default
    kwargs = {"input_ids": prompt(), **GREEDY, "cache_implementation": "static", "compile_config": compiled}
    expected = whole(model, **kwargs)
    assert hasattr(model, "_compiled_call")

    class Stop(BaseStreamer):  # type: ignore[misc]
        left = 9

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if self.left < 0:
                raise StoppedError

        def end(self) -> None: ...

    with pytest.raises(StoppedError), sq.capture(model) as run:
        whole(model, **kwargs, streamer=Stop())
    snapshot = through(run.snapshot(), path)
    assert_same(sq.restore(snapshot, model).generate(compile_config=compiled), expected)


@pytest.mark.parametrize("kind", [MtpCache, DFlashCache])
def test_caches_of_several_tokens_ahead(model: Any, kind: Any, path: Path) -> None:
    cache = kind(config=model.config)
    with torch.no_grad():
        model(prompt()[:, :-1], past_key_values=cache)
    if kind is DFlashCache:
        cache.set_previous_accepted_tokens(3)
    snapshot = through(sq.snapshot_of(model, cache, prompt()), path)
    rebuilt = rebuild_cache(snapshot.cache, lambda layer: torch.device("cpu"))
    assert type(rebuilt) is kind
    for layer in range(2):
        assert torch.equal(rebuilt.layers[layer].keys, cache.layers[layer].keys)
        assert rebuilt.get_query_offset(layer) == cache.get_query_offset(layer) > 11
        assert rebuilt.get_mask_sizes(4, layer) == cache.get_mask_sizes(4, layer)
