"""An interrupted generation, taken through a file, goes on with the tokens and logits of the uninterrupted one."""

from __future__ import annotations

import copy
import functools
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import semq_state as sq
from conftest import TINY, tiny_model
from semq_state.caches import rebuild_cache

RECORD = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 80, "repetition_penalty": 1.3}
GREEDY = {"do_sample": False}
ENDLESS = {"eos_token_id": None, "pad_token_id": 0}
SHORT = {**GREEDY, **ENDLESS, "max_new_tokens": 20}
N_PROMPT = 12


class RunStoppedError(Exception):
    """What stops a run in these tests."""


class StopAfter(BaseStreamer):
    """Raises when token number `n` arrives."""

    def __init__(self, n: int, error: type[BaseException] = RunStoppedError) -> None:
        self._left, self._error = n, error

    def put(self, value: torch.Tensor) -> None:
        if not self._left:
            raise self._error
        self._left -= 1

    def end(self) -> None: ...


def prompt(n_rows: int = 1, n: int = N_PROMPT, seed: int = 7) -> torch.Tensor:
    return torch.randint(60, 199, (n_rows, n), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    """Three rows that begin after 0, 5 and 9 padding tokens."""
    ids, mask = prompt(3), torch.ones(3, N_PROMPT, dtype=torch.int64)
    for row, n in enumerate((0, 5, 9)):
        ids[row, :n], mask[row, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def uninterrupted(model: Any, *, seed: int = 1, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**kwargs, **RECORD)


def interrupted(
    model: Any, n: int, *, seed: int = 1, error: type[BaseException] = RunStoppedError, **kwargs: Any
) -> sq.Snapshot:
    """The state of the same run, stopped after its token number `n`."""
    torch.manual_seed(seed)
    with pytest.raises(error), sq.capture(model) as run:
        model.generate(**kwargs, **RECORD, streamer=StopAfter(n, error))
    snapshot = run.snapshot()
    assert snapshot.n_new_tokens == n
    return snapshot


def through_file(snapshot: sq.Snapshot, path: Path) -> sq.Snapshot:
    sq.save(snapshot, path)
    torch.manual_seed(99)
    return sq.load(path)


def assert_same(found: Any, expected: Any, n: int) -> None:
    """`found` began after token `n` of `expected` and is the same from there."""
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits) - n
    assert all(map(torch.equal, found.logits, expected.logits[n:]))


def ends_early(rows: torch.Tensor) -> int:
    """A token that ends the first row before its token 8 and leaves another row alive beyond token 31."""
    first = {int(t): [_first(row, int(t)) for row in rows] for t in rows[0, 1:8]}
    return next(t for t, at in first.items() if max(at) > 31 and sorted(at)[1] > 9)


def _first(row: torch.Tensor, token: int) -> int:
    found = (row == token).nonzero()
    return int(found[0]) if len(found) else len(row)


WAYS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "greedy": (lambda: {"input_ids": prompt()}, GREEDY),
    "sampled": (lambda: {"input_ids": prompt()}, SAMPLED),
    "padded": (padded, SAMPLED),
    "ended": (padded, SAMPLED),
}


@functools.cache
def a_run(kind: str, dtype: torch.dtype, way: str, n_tokens: int) -> tuple[Any, dict[str, Any], Any]:
    """A model, the arguments of a run and its outcome."""
    model = tiny_model(kind, dtype=dtype)
    inputs, settings = WAYS[way]
    kwargs = {**inputs(), **settings, **ENDLESS, "max_new_tokens": n_tokens}
    if way == "ended":
        tokens = uninterrupted(model, **kwargs).sequences[:, N_PROMPT:]
        kwargs["eos_token_id"] = ends_early(tokens)
    return model, kwargs, uninterrupted(model, **kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "n"), [(torch.float32, 1), (torch.float32, 30), (torch.bfloat16, 4), (torch.bfloat16, 9)], ids=str
)
@pytest.mark.parametrize("kind", TINY)
def test_goes_on_as_if_never_interrupted(kind: str, dtype: torch.dtype, way: str, n: int, path: Path) -> None:
    model, kwargs, expected = a_run(kind, dtype, way, 94)
    snapshot = interrupted(model, n, **kwargs)
    assert snapshot.generation.finished.any() == (way == "ended" and n > 1)
    resumed = sq.restore(through_file(snapshot, path), model)
    assert_same(resumed.generate(), expected, n)
    assert resumed.reused_tokens == N_PROMPT + n - 1


RULES: dict[str, dict[str, Any]] = {
    "min_new_tokens": {"min_new_tokens": 30, "eos_token_id": list(range(3, 60))},
    "min_length": {"min_length": N_PROMPT + 30, "eos_token_id": list(range(3, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(150))},
    "suppress_tokens": {"suppress_tokens": list(range(50))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "decay": {"exponential_decay_length_penalty": (21, 1.5), "eos_token_id": 3},
    "bad_words_ids": {"bad_words_ids": [[7], [8, 9]]},
    "sequence_bias": {"sequence_bias": {(70,): 2.0, (71, 72): -3.0}},
    "renormalize_logits": {"renormalize_logits": True},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.7},
    "eta_cutoff": {"eta_cutoff": 0.004},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[65, 40, 9, 71], ngram_len=4)},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "output_hidden_states": {"output_hidden_states": True, "output_attentions": False},
}


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("rule", RULES)
def test_rules_count_from_the_prompt(model: Any, rule: str, n: int, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 60, **RULES[rule]}
    expected = uninterrupted(model, **kwargs)
    found = sq.restore(through_file(interrupted(model, n, **kwargs), path), model).generate()
    assert_same(found, expected, n)
    assert all(map(torch.equal, found.scores, expected.scores[n:]))


@pytest.mark.smollm2
def test_stop_strings(smollm2: tuple[Any, Any], path: Path) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("Count: one, two, three,", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, **GREEDY, max_new_tokens=24)[0, -6:])
    kwargs = {**inputs, **GREEDY, "max_new_tokens": 40, "stop_strings": [text.strip()], "tokenizer": tokenizer}
    expected = uninterrupted(model, **kwargs)
    resumed = sq.restore(through_file(interrupted(model, 5, **kwargs), path), model, tokenizer=tokenizer)
    assert_same(resumed.generate(), expected, 5)
    assert 5 < len(expected.logits) < 40


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("given", ["all", "new", "one-cached"])
@pytest.mark.parametrize("plain", [False, True], ids=["config", "no-config"])
def test_a_cache_of_the_callers_own(kind: str, given: str, plain: bool, path: Path) -> None:
    model, ids = tiny_model(kind), prompt(n=20)
    n_before = 1 if given == "one-cached" else 15

    def a_cache() -> DynamicCache:
        cache = DynamicCache() if plain else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :n_before], past_key_values=cache)
        return cache

    kwargs = {**SAMPLED, **ENDLESS, "max_new_tokens": 50, "attention_mask": torch.ones_like(ids)}
    kwargs["input_ids"] = ids if given == "all" else ids[:, n_before:]
    expected = uninterrupted(model, **kwargs, past_key_values=a_cache())
    snapshot = interrupted(model, 10, **kwargs, past_key_values=a_cache())
    resumed = sq.restore(through_file(snapshot, path), model)
    assert_same(resumed.generate(), expected, 10)
    assert resumed.reused_tokens == 20 + 9


class Scaled(LlamaForCausalLM):
    """A model with an argument of its own."""

    def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * scale
        return out


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "scale"])
def test_arguments_of_the_model(name: str, path: Path) -> None:
    model, ids = tiny_model("gpt2" if name == "token_type_ids" else "llama"), prompt()
    if name == "scale":
        torch.manual_seed(0)
        model = Scaled(TINY["llama"]()).eval()
    value = {"position_ids": torch.arange(N_PROMPT)[None] * 5 + 3, "token_type_ids": ids - 50, "scale": 4.0}[name]
    kwargs = {"input_ids": ids, **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs, **{name: value})
    assert not all(map(torch.equal, expected.logits, uninterrupted(model, **kwargs).logits))
    snapshot = interrupted(model, 9, **kwargs, **{name: value})
    assert_same(sq.restore(through_file(snapshot, path), model).generate(), expected, 9)


@pytest.mark.parametrize("n_embeds", [1, 12])
def test_inputs_embeds(model: Any, n_embeds: int, path: Path) -> None:
    embeds = model.get_input_embeddings()(prompt(n=n_embeds)).detach()
    kwargs = {"inputs_embeds": embeds, **GREEDY, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    assert_same(sq.restore(through_file(interrupted(model, 9, **kwargs), path), model).generate(), expected, 9)


def test_several_sequences_of_one_prompt(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40, "num_return_sequences": 3}
    expected = uninterrupted(model, **kwargs)
    assert_same(sq.restore(through_file(interrupted(model, 9, **kwargs), path), model).generate(), expected, 9)


def test_without_a_cache(model: Any, path: Path) -> None:
    kwargs = {**padded(), **SAMPLED, **ENDLESS, "max_new_tokens": 40, "use_cache": False}
    expected = uninterrupted(model, **kwargs)
    resumed = sq.restore(through_file(interrupted(model, 9, **kwargs), path), model)
    with pytest.warns(UserWarning, match=r"21 tokens .*computed again") as told:
        found = resumed.generate()
    assert told[0].filename == __file__
    assert_same(found, expected, 9)
    assert resumed.reused_tokens == 0


def test_the_last_of_several_calls_counts(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    with pytest.raises(RunStoppedError), sq.capture(model) as run:
        model.generate(prompt(2, 5), **GREEDY, **ENDLESS, max_new_tokens=7)
        assert run.snapshot().batch_size == 2
        torch.manual_seed(1)
        model.generate(**kwargs, **RECORD, streamer=StopAfter(9))
    assert_same(sq.restore(through_file(run.snapshot(), path), model).generate(), expected, 9)


def test_two_turns_on_one_cache(model: Any, path: Path) -> None:
    def two_turns(streamer: Any = None) -> Any:
        torch.manual_seed(1)
        cache = DynamicCache(config=model.config)
        first = model.generate(prompt(), **SAMPLED, **ENDLESS, max_new_tokens=10, past_key_values=cache)
        ids = torch.cat([first, prompt(n=4)], dim=-1)
        return model.generate(
            ids, **SAMPLED, **ENDLESS, max_new_tokens=40, past_key_values=cache, streamer=streamer, **RECORD
        )

    expected = two_turns()
    with pytest.raises(RunStoppedError), sq.capture(model) as run:
        two_turns(StopAfter(9))
    snapshot = through_file(run.snapshot(), path)
    assert snapshot.generation.prompt_length == N_PROMPT + 10 + 4
    assert_same(sq.restore(snapshot, model).generate(), expected, 9)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_capture_changes_nothing(model: Any, settings: dict[str, Any]) -> None:
    kwargs = {**padded(), **settings, "eos_token_id": 90, "pad_token_id": 0, "max_new_tokens": 40}
    expected, state = uninterrupted(model, **kwargs), torch.get_rng_state()
    with sq.capture(model):
        found = uninterrupted(model, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert_same(found, expected, 0)
    assert all(map(torch.equal, found.scores, expected.scores))
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


class Tokens(BaseStreamer):
    """Hands tokens to another thread, as `TextIteratorStreamer` hands it text."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[torch.Tensor | None] = queue.Queue()

    def put(self, value: torch.Tensor) -> None:
        self.arrived.put(value)

    def end(self) -> None:
        self.arrived.put(None)


def test_a_stream_read_in_another_thread(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 94}
    expected, streamer = uninterrupted(model, **kwargs), Tokens()

    def target() -> None:
        torch.manual_seed(1)
        model.generate(**kwargs, **RECORD, streamer=streamer)

    with sq.capture(model) as run:
        thread = threading.Thread(target=target)
        thread.start()
        for _ in range(10):
            streamer.arrived.get(timeout=60)
        snapshot = run.snapshot()
        thread.join()
    assert snapshot.n_new_tokens >= 9
    resumed = sq.restore(through_file(snapshot, path), model)
    assert_same(resumed.generate(), expected, snapshot.n_new_tokens)


def test_a_snapshot_stays_as_it_is_while_generation_goes_on(model: Any, path: Path) -> None:
    kwargs = {**padded(), **SAMPLED, **ENDLESS, "max_new_tokens": 60}
    expected, snapshots = uninterrupted(model, **kwargs), []

    class Taking(Tokens):
        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 1:
                snapshots.append(run.snapshot())

    with sq.capture(model) as run:
        uninterrupted(model, **kwargs, streamer=Taking())
    assert [s.n_new_tokens for s in snapshots] == list(range(1, 61))
    for snapshot in (snapshots[0], snapshots[17], snapshots[58]):
        resumed = sq.restore(through_file(snapshot, path), model)
        assert_same(resumed.generate(), expected, snapshot.n_new_tokens)


@pytest.mark.parametrize("settings", [GREEDY, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("form", ["behind", "logits", "no logits"])
@pytest.mark.parametrize("kind", TINY)
def test_a_loop_of_ones_own(kind: str, form: str, settings: dict[str, Any], path: Path) -> None:
    model, n = tiny_model(kind), 3 if form == "no logits" else 9
    inputs = {"input_ids": prompt(n=6)}
    expected = uninterrupted(model, **inputs, **settings, **ENDLESS, max_new_tokens=n + 64)
    ids, cache, logits = inputs["input_ids"], DynamicCache(config=model.config), None
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(n):
            logits = model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits
            chosen = torch.multinomial(logits[:, -1].softmax(-1), 1)
            chosen = chosen if settings["do_sample"] else logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, chosen], dim=-1)
        if form != "behind":
            logits = model(ids[:, -1:], past_key_values=cache).logits
    given = logits if form == "logits" else None
    snapshot = through_file(sq.snapshot_of(model, cache, ids, prompt_length=6, logits=given), path)
    assert (snapshot.n_new_tokens, snapshot.generation.n_cached) == (n, 6 + n - (form == "behind"))
    resumed = sq.restore(snapshot, model)
    assert_same(resumed.generate(max_new_tokens=64, **settings, **ENDLESS, **RECORD), expected, n)


@pytest.mark.parametrize("given", [True, False], ids=["logits", "no logits"])
@pytest.mark.parametrize("kind", TINY)
def test_the_inputs_by_hand_where_all_tokens_are_cached(kind: str, given: bool) -> None:
    model, ids = tiny_model(kind), prompt(n=9)
    for n in (9, 40):
        ids, cache = prompt(n=n), DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            logits = model(ids[:, -1:], past_key_values=cache).logits
        if n > 9 and kind in ("mistral", "gemma3"):
            resumed = sq.restore(sq.snapshot_of(model, cache, ids, logits=logits), model)
            with pytest.raises(sq.UnsupportedOperationError, match="folded or dropped"):
                _ = resumed.inputs
            continue
        resumed = sq.restore(sq.snapshot_of(model, cache, ids, logits=logits if given else None), model)
        found = uninterrupted(model, **resumed.inputs, **SHORT)
        assert_same(resumed.generate(**SHORT, **RECORD), found, 0)


def test_a_padded_loop_of_ones_own(model: Any, path: Path) -> None:
    inputs = padded()
    expected = uninterrupted(model, **inputs, **GREEDY, **ENDLESS, max_new_tokens=65)
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
    mask = torch.cat([mask, mask.new_ones(3, 1)], dim=-1)
    positions = torch.cat([positions, positions[:, -1:] + 1], dim=-1)
    for given in ({}, {"position_ids": positions}):
        snapshot = sq.snapshot_of(model, cache, ids, attention_mask=mask, prompt_length=N_PROMPT, **given)
        resumed = sq.restore(through_file(snapshot, path), model)
        assert_same(resumed.generate(max_new_tokens=64, **GREEDY, **ENDLESS, **RECORD), expected, 1)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_full_window_needs_the_logits(kind: str) -> None:
    model, ids, cache = tiny_model(kind), prompt(n=40), DynamicCache(config=TINY[kind]())
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(sq.IncompleteStateError, match="logits"):
        sq.snapshot_of(model, cache, ids)


@pytest.mark.parametrize(
    ("what", "change", "match"),
    [
        ("ids", lambda ids: ids[0], "batch, seq"),
        ("ids", lambda ids: ids[:, :5], "all 12 tokens"),
        ("attention_mask", lambda ids: torch.ones(1, 5), "cover every token"),
        ("position_ids", lambda ids: torch.ones(1, 5), "cover every token"),
    ],
)
def test_a_loop_that_does_not_fit_is_refused(model: Any, what: str, change: Any, match: str) -> None:
    ids, cache = prompt(), DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
    kwargs = {} if what == "ids" else {what: change(ids)}
    with pytest.raises(sq.IncompleteStateError, match=match):
        sq.snapshot_of(model, cache, change(ids) if what == "ids" else ids, logits=logits, **kwargs)


class Limit:
    """Raises beyond a length; it remembers nothing, so a snapshot needs nothing of it."""

    def __init__(self, length: int | None, error: type[BaseException] = RunStoppedError) -> None:
        self.length, self.error = length, error

    def check(self, n: int) -> None:
        if self.length is not None and n > self.length:
            raise self.error


class LimitedLogits(Limit, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.check(input_ids.shape[1])
        return scores


class LimitedStop(Limit, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.check(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def _by_processor(model: Any, limit: Any, error: Any, **kwargs: Any) -> None:
    model.generate(**kwargs, logits_processor=LogitsProcessorList([LimitedLogits(limit, error)]))


def _by_criterion(model: Any, limit: Any, error: Any, **kwargs: Any) -> None:
    model.generate(**kwargs, stopping_criteria=[LimitedStop(limit, error)])


def _by_hook(name: str, before: bool) -> Callable[..., None]:
    def run(model: Any, limit: int, error: Any, **kwargs: Any) -> None:
        calls = iter(range(limit - N_PROMPT + 1))

        def stop(*_: Any) -> None:
            if next(calls, None) is None:
                raise error

        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(stop) if before else module.register_forward_hook(stop)
        try:
            model.generate(**kwargs)
        finally:
            handle.remove()

    return run


BREAKS: dict[str, Callable[..., None]] = {
    "processor": _by_processor,
    "criterion": _by_criterion,
    "before the layers": _by_hook("model.layers.0", before=True),
    "between the layers": _by_hook("model.layers.1", before=True),
    "inside a layer": _by_hook("model.layers.0.self_attn", before=False),
    "after the layers": _by_hook("lm_head", before=False),
}


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize(("kind", "error"), [("llama", RunStoppedError), ("gemma3", KeyboardInterrupt)])
def test_a_run_that_breaks_off(kind: str, where: str, error: type[BaseException], path: Path) -> None:
    model, kwargs, expected = a_run(kind, torch.float32, "padded", 94)
    torch.manual_seed(1)
    before = dict(vars(model))
    with pytest.raises(error), sq.capture(model) as run:
        BREAKS[where](model, N_PROMPT + 20, error, **kwargs, **RECORD)
    assert vars(model) == before
    snapshot = through_file(run.snapshot(), path)
    assert snapshot.n_new_tokens == (20 if where == "criterion" else 21)
    again = {
        "processor": {"logits_processor": [LimitedLogits(None)]},
        "criterion": {"stopping_criteria": [LimitedStop(None)]},
    }
    assert_same(sq.restore(snapshot, model).generate(**again.get(where, {})), expected, snapshot.n_new_tokens)


def test_a_keyboard_interrupt_from_a_streamer(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 60}
    expected = uninterrupted(model, **kwargs)
    snapshot = interrupted(model, 7, error=KeyboardInterrupt, **kwargs)
    assert_same(sq.restore(through_file(snapshot, path), model).generate(), expected, 7)


def test_a_prefill_that_breaks_off_leaves_no_state(model: Any) -> None:
    with pytest.raises(RunStoppedError), sq.capture(model) as run:
        _by_hook("model.layers.1", before=True)(model, N_PROMPT - 1, RunStoppedError, input_ids=prompt(), **SHORT)
    with pytest.raises(sq.IncompleteStateError, match="at least one generated token"):
        run.snapshot()


@pytest.mark.parametrize("error", [None, RunStoppedError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(model: Any, error: type[BaseException] | None) -> None:
    before, hooks = dict(vars(model)), [len(m._forward_hooks) for m in model.modules()]
    streamer = StopAfter(5, error) if error else None
    try:
        with sq.capture(model) as run:
            assert vars(model) != before
            model.generate(prompt(), **SHORT, streamer=streamer)
    except (RunStoppedError, KeyboardInterrupt):
        assert error
    assert vars(model) == before
    streamer = StopAfter(5, error) if error else None
    resumed = sq.restore(run.snapshot(), model)
    try:
        resumed.generate(max_new_tokens=9, streamer=streamer)
    except (RunStoppedError, KeyboardInterrupt):
        assert error
    assert vars(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_compiled_wrapper_is_left_as_it_was(model: Any, path: Path) -> None:
    compiled, before = torch.compile(model, backend="eager"), dict(vars(model))
    expected = model.generate(prompt(), **SHORT)
    with sq.capture(compiled) as run:
        assert torch.equal(compiled.generate(prompt(), **SHORT), expected)
    assert vars(model) == before
    longer = {**SHORT, "max_new_tokens": 30}
    resumed = sq.restore(through_file(run.snapshot(), path), compiled)
    assert torch.equal(resumed.generate(max_new_tokens=10), model.generate(prompt(), **longer))
    assert vars(model) == before


def test_inference_mode(model: Any, path: Path) -> None:
    kwargs = {**padded(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    with torch.inference_mode():
        snapshot = interrupted(model, 9, **kwargs)
    assert_same(sq.restore(snapshot, model).generate(), expected, 9)
    snapshot = through_file(snapshot, path)
    with torch.inference_mode():
        assert_same(sq.restore(snapshot, model).generate(), expected, 9)


def test_a_model_that_drops_out(path: Path) -> None:
    model, kwargs = tiny_model("gpt2").train(), {"input_ids": prompt(), **GREEDY, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    assert not torch.equal(expected.sequences, uninterrupted(model, seed=2, **kwargs).sequences)
    assert_same(sq.restore(through_file(interrupted(model, 9, **kwargs), path), model).generate(), expected, 9)


def test_a_capture_is_entered_once_and_first(model: Any) -> None:
    run = sq.capture(model)
    with pytest.raises(sq.IncompleteStateError, match="was entered"):
        run.snapshot()
    with run, pytest.raises(RuntimeError, match="entered before"):
        run.__enter__()
    with pytest.raises(ValueError, match="every"):
        sq.capture(model, every=0)


def test_nested_captures(model: Any, path: Path) -> None:
    kwargs = {**padded(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    torch.manual_seed(1)
    with pytest.raises(RunStoppedError), sq.capture(model) as outer, sq.capture(model) as inner:
        model.generate(**kwargs, **RECORD, streamer=StopAfter(9))
    assert outer.snapshot().state_id == inner.snapshot().state_id
    for run in (outer, inner):
        assert_same(sq.restore(through_file(run.snapshot(), path), model).generate(), expected, 9)


@pytest.mark.parametrize("way", WAYS)
def test_three_legs(way: str, path: Path) -> None:
    model, kwargs, expected = a_run("gemma3", torch.float32, way, 94)
    snapshot = through_file(interrupted(model, 8, **kwargs), path)
    for n in (9, 31, 32):
        with pytest.raises(RunStoppedError), sq.capture(model) as run:
            sq.restore(snapshot, model).generate(streamer=StopAfter(n - snapshot.n_new_tokens))
        snapshot = through_file(run.snapshot(), path)
        assert snapshot.n_new_tokens == n
    assert_same(sq.restore(snapshot, model).generate(), expected, 32)


@pytest.mark.parametrize("rule", ["min_new_tokens", "decay", "synthid", "encoder_repetition_penalty"])
def test_rules_count_from_the_prompt_in_a_third_leg(model: Any, rule: str, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 60, **RULES[rule]}
    expected = uninterrupted(model, **kwargs)
    first = through_file(interrupted(model, 7, **kwargs), path)
    with pytest.raises(RunStoppedError), sq.capture(model) as run:
        sq.restore(first, model).generate(streamer=StopAfter(6))
    found = sq.restore(through_file(run.snapshot(), path), model).generate()
    assert_same(found, expected, 13)
    assert all(map(torch.equal, found.scores, expected.scores[13:]))


def test_ends_where_the_recorded_run_would_have(model: Any) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS}
    snapshot = interrupted(model, 10, **kwargs, max_new_tokens=40)
    resumed = sq.restore(snapshot, model)
    longer = uninterrupted(model, **kwargs, max_new_tokens=70).sequences
    assert torch.equal(resumed.generate().sequences, longer[:, : N_PROMPT + 40])
    assert torch.equal(resumed.generate(max_new_tokens=60).sequences, longer)
    assert torch.equal(resumed.generate(max_length=N_PROMPT + 50).sequences, longer[:, : N_PROMPT + 50])


@pytest.mark.parametrize("as_dict", [True, False])
def test_nothing_is_left_after_the_end(model: Any, as_dict: bool) -> None:
    kwargs = {"input_ids": prompt(), **SHORT}
    with sq.capture(model) as run:
        ids = model.generate(**kwargs)
    resumed = sq.restore(run.snapshot(), model)
    with pytest.warns(UserWarning, match="had come to its end") as told:
        found = resumed.generate(return_dict_in_generate=as_dict)
    assert told[0].filename == __file__
    assert torch.equal(found.sequences if as_dict else found, ids)
    kwargs["max_new_tokens"] = 45
    assert torch.equal(resumed.generate(max_new_tokens=25), model.generate(**kwargs))


def test_an_end_token_is_the_end(model: Any) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, "pad_token_id": 0, "max_new_tokens": 60}
    end = int(model.generate(**kwargs, eos_token_id=None)[0, N_PROMPT + 3])
    with sq.capture(model) as run:
        ids = model.generate(**kwargs, eos_token_id=end)
    assert ids.shape[1] < N_PROMPT + 60
    with pytest.warns(UserWarning, match="had come to its end"):
        assert torch.equal(sq.restore(run.snapshot(), model).generate(max_new_tokens=9), ids)
    turn = torch.tensor([[70, 71]])
    kwargs["input_ids"] = torch.cat([ids, turn], dim=-1)
    expected = model.generate(**kwargs, eos_token_id=end)
    assert torch.equal(sq.restore(run.snapshot(), model).generate(append=turn), expected)


class StopRows(StoppingCriteria):
    """Stops row `i` when it is `lengths[i]` long."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1]


@pytest.mark.parametrize("n", [4, 5, 6, 12])
def test_rows_that_a_rule_of_the_callers_own_stopped(model: Any, n: int, path: Path) -> None:
    rule = StopRows(N_PROMPT + 5, N_PROMPT + 12, 999)
    kwargs = {**padded(), **SAMPLED, "eos_token_id": 198, "pad_token_id": 0, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs, stopping_criteria=[rule])
    assert not expected.sequences[0, N_PROMPT + 5 :].any() and expected.sequences[0, N_PROMPT + 4]
    snapshot = through_file(interrupted(model, n, **kwargs, stopping_criteria=[rule]), path)
    assert_same(sq.restore(snapshot, model).generate(stopping_criteria=[rule]), expected, n)


def test_seeds_are_branches(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    resumed = sq.restore(through_file(interrupted(model, 9, **kwargs), path), model)
    branches = [resumed.generate(seed=seed).sequences for seed in (1, 2, 1)]
    assert torch.equal(branches[0], branches[2])
    assert not torch.equal(branches[0], branches[1])
    assert all(torch.equal(b[:, : N_PROMPT + 9], branches[0][:, : N_PROMPT + 9]) for b in branches)
    by_hand = uninterrupted(model, seed=2, **resumed.inputs, **SAMPLED, **ENDLESS, max_new_tokens=31)
    assert torch.equal(by_hand.sequences, branches[1])
    assert torch.equal(resumed.generate().sequences, uninterrupted(model, **kwargs).sequences)


def test_other_settings_are_a_branch(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    resumed = sq.restore(through_file(interrupted(model, 9, **kwargs), path), model)
    greedy = model.generate(**resumed.inputs, **SHORT)
    config = GenerationConfig(**SHORT)
    assert torch.equal(resumed.generate(generation_config=config), greedy)
    assert config.max_new_tokens == 20
    by_hand = uninterrupted(model, **resumed.inputs, **{**SAMPLED, "top_k": 3}, **ENDLESS, max_new_tokens=31)
    assert torch.equal(resumed.generate(top_k=3, seed=1).sequences, by_hand.sequences)
    assert len(resumed.generate(max_new_tokens=31, min_new_tokens=31, eos_token_id=[*range(3, 198)]).logits) == 31


def test_the_models_defaults_of_today_do_not_matter(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs)
    snapshot = through_file(interrupted(model, 9, **kwargs), path)
    model.generation_config.suppress_tokens = list(range(3, 198))
    assert_same(sq.restore(snapshot, model).generate(), expected, 9)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", TINY)
def test_the_next_turn(kind: str, rows: int, path: Path) -> None:
    model, inputs = tiny_model(kind), padded() if rows == 3 else {"input_ids": prompt()}
    torch.manual_seed(1)
    with sq.capture(model) as run:
        first = model.generate(**inputs, **SAMPLED, **ENDLESS, **RECORD, max_new_tokens=25)
    cache, turn, state = copy.deepcopy(first.past_key_values), prompt(rows, 6, seed=3), torch.get_rng_state()
    ids = torch.cat([first.sequences, turn], dim=-1)
    mask = torch.ones_like(ids)
    mask[:, :N_PROMPT] = inputs.get("attention_mask", 1)
    expected = model.generate(
        ids, attention_mask=mask, past_key_values=cache, **SAMPLED, **ENDLESS, **RECORD, max_new_tokens=25
    )
    resumed = sq.restore(through_file(run.snapshot(), path), model)
    for append in (turn, turn.tolist()):
        assert_same(resumed.generate(append=append), expected, 0)
        assert resumed.reused_tokens == N_PROMPT + 24
    torch.set_rng_state(state)
    by_hand = model.generate(ids, attention_mask=mask, **SAMPLED, **ENDLESS, max_new_tokens=3)
    assert torch.equal(by_hand[:, : ids.shape[1]], expected.sequences[:, : ids.shape[1]])


def test_the_next_turn_of_a_run_cut_short(model: Any, path: Path) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, **ENDLESS}
    snapshot = through_file(interrupted(model, 9, **kwargs, max_new_tokens=40), path)
    with sq.capture(model) as run:
        found = sq.restore(snapshot, model).generate(append=[70, 71])
    assert found.sequences.shape[1] == N_PROMPT + 9 + 2 + 40
    ids = torch.cat([snapshot.generation.input_ids, torch.tensor([[70, 71]])], dim=-1)
    expected = model.generate(ids, **GREEDY, **ENDLESS, max_new_tokens=40)
    assert torch.equal(found.sequences, expected)
    assert run.snapshot().generation.prompt_length == N_PROMPT + 9 + 2


@pytest.mark.parametrize("append", [[], [[1], [2]], [[[1]]]])
def test_a_turn_that_does_not_fit_is_refused(model: Any, append: Any) -> None:
    resumed = sq.restore(interrupted(model, 2, input_ids=prompt(), **SHORT), model)
    with pytest.raises(sq.UnsupportedOperationError, match="append"):
        resumed.generate(append=append)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"input_ids": prompt()},
        {"past_key_values": None},
        {"attention_mask": None},
        {"num_return_sequences": 2},
        {"num_beams": 2},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_that_contradict_a_resume_are_refused(model: Any, kwargs: dict[str, Any]) -> None:
    resumed = sq.restore(interrupted(model, 2, input_ids=prompt(), **SHORT), model)
    with pytest.raises(sq.UnsupportedOperationError, match=next(iter(kwargs))):
        resumed.generate(**kwargs)


@pytest.mark.parametrize("kind", TINY)
def test_forks_share_memory_and_nothing_else(kind: str) -> None:
    model = tiny_model(kind)
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    snapshot = interrupted(model, 20, **kwargs)
    stored = {name: t.clone() for name, t in snapshot.tensors().items()}
    branches = sq.restore(snapshot, model).fork(3, seeds=(4, 5, 4))
    caches = [branch.inputs["past_key_values"] for branch in branches]
    for i, state in enumerate(snapshot.cache.layers):
        for name, tensor in state.tensors.items():
            assert {getattr(c.layers[i], name).data_ptr() for c in caches} == {tensor.data_ptr()}
    left, right, again = (branch.generate().sequences for branch in branches)
    assert torch.equal(left, again) and not torch.equal(left, right)
    assert all(torch.equal(t, stored[name]) for name, t in snapshot.tensors().items())
    assert torch.equal(
        sq.restore(snapshot, model).fork(1)[0].generate().sequences, uninterrupted(model, **kwargs).sequences
    )


@pytest.mark.parametrize(("n", "seeds"), [(0, None), (2, (1,)), (1, (1, 2))])
def test_forks_need_a_seed_each(model: Any, n: int, seeds: Any) -> None:
    resumed = sq.restore(interrupted(model, 2, input_ids=prompt(), **SHORT), model)
    with pytest.raises(ValueError, match="branches"):
        resumed.fork(n, seeds=seeds)


@pytest.mark.parametrize("inputs", [lambda: {"input_ids": prompt()}, padded], ids=["one", "padded"])
@pytest.mark.parametrize("kind", TINY)
def test_the_inputs_by_hand(kind: str, inputs: Any, path: Path) -> None:
    model, kwargs = tiny_model(kind), {**inputs(), **GREEDY, **ENDLESS}
    expected = uninterrupted(model, **kwargs, max_new_tokens=40)
    snapshot = through_file(interrupted(model, 20, **kwargs, max_new_tokens=40), path)
    given = sq.restore(snapshot, model).inputs
    assert_same(model.generate(**given, **GREEDY, **ENDLESS, **RECORD, max_new_tokens=20), expected, 20)


def test_the_inputs_by_hand_where_only_new_tokens_were_given(model: Any, path: Path) -> None:
    ids, cache = prompt(n=20), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    kwargs = {"input_ids": ids[:, 15:], "attention_mask": torch.ones_like(ids), **GREEDY, **ENDLESS}
    expected = uninterrupted(model, **kwargs, past_key_values=copy.deepcopy(cache), max_new_tokens=40)
    snapshot = interrupted(model, 20, **kwargs, past_key_values=cache, max_new_tokens=40)
    given = sq.restore(through_file(snapshot, path), model).inputs
    found = model.generate(**given, **GREEDY, **ENDLESS, **RECORD, max_new_tokens=20)
    assert torch.equal(found.sequences[:, -20:], expected.sequences[:, -20:])
    assert all(map(torch.equal, found.logits, expected.logits[20:]))


def test_reused_tokens_are_measured(model: Any) -> None:
    kwargs = {"input_ids": prompt(), **GREEDY, **ENDLESS, "max_new_tokens": 40}
    resumed, fed = sq.restore(interrupted(model, 20, **kwargs), model), []
    assert resumed.reused_tokens == N_PROMPT + 19
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    resumed.generate()
    handle.remove()
    assert fed == [1] * 20 and resumed.reused_tokens == N_PROMPT + 19


class Alternating(LogitsProcessor):
    """Forbids half of the vocabulary, in turns that it counts itself."""

    def __init__(self) -> None:
        self.turn, self.seen = 0, torch.zeros(199, dtype=torch.int64)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        self.seen[input_ids[:, -1]] += 1
        scores = scores - self.seen
        scores[:, self.turn % 3 :: 3] = float("-inf")
        return scores


class Counting(StoppingCriteria):
    """Stops at its own call number `n`."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls >= self.n)


class KeptAlternating(Alternating):
    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn, self.seen = state["turn"], state["seen"].clone()


class KeptCounting(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_stateful_processors_go_on(model: Any, path: Path) -> None:
    def own() -> dict[str, Any]:
        return {"logits_processor": [KeptAlternating()], "stopping_criteria": [KeptCounting(33)]}

    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 60}
    expected = uninterrupted(model, **kwargs, **own())
    assert len(expected.logits) == 33
    snapshot = through_file(interrupted(model, 10, **kwargs, **own()), path)
    resumed = sq.restore(snapshot, model)
    assert_same(resumed.generate(**own()), expected, 10)
    assert_same(resumed.generate(**own()), expected, 10)
    with pytest.warns(UserWarning, match="Kept.* was not passed again") as told:
        resumed.generate()
    assert len(told) == 2


@pytest.mark.parametrize(
    "own",
    [lambda: {"logits_processor": [Alternating()]}, lambda: {"stopping_criteria": [Counting(33)]}],
    ids=["logits", "stopping"],
)
def test_stateful_processors_that_cannot_be_kept_are_refused(model: Any, own: Callable[[], Any]) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs, **own())
    with sq.capture(model) as run:
        assert_same(uninterrupted(model, **kwargs, **own()), expected, 0)
    with pytest.raises(sq.IncompleteStateError, match="state_dict"):
        run.snapshot()


@pytest.mark.parametrize(
    "own",
    [
        {"logits_processor": [LimitedLogits(None)]},
        {"stopping_criteria": [LimitedStop(None)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(100))},
    ],
    ids=["logits", "stopping", "prefix"],
)
def test_a_rule_that_is_not_passed_again_is_told(model: Any, own: dict[str, Any], path: Path) -> None:
    kwargs = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 40}
    expected = uninterrupted(model, **kwargs, **own)
    resumed = sq.restore(through_file(interrupted(model, 9, **kwargs, **own), path), model)
    assert_same(resumed.generate(**own), expected, 9)
    with pytest.warns(UserWarning, match="was not passed again"):
        resumed.generate()


def test_another_processor_of_that_name_is_refused(model: Any) -> None:
    class KeptCounting(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"other": 0}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls = state["other"]

    own = {"stopping_criteria": [globals()["KeptCounting"](33)]}
    resumed = sq.restore(interrupted(model, 2, input_ids=prompt(), **SHORT, **own), model)
    with pytest.raises(sq.IncompleteStateError, match=r"state of KeptCounting.*KeyError"):
        resumed.generate(stopping_criteria=[KeptCounting(33)])


def test_max_time_keeps_counting(model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])

    def tick(*_: Any) -> None:
        clock[0] += 1

    handle = model.register_forward_pre_hook(tick)
    kwargs = {"input_ids": prompt(), **GREEDY, **ENDLESS, "max_new_tokens": 60, "max_time": 30.0}
    expected = uninterrupted(model, **kwargs)
    assert len(expected.logits) == 31
    snapshot = through_file(interrupted(model, 10, **kwargs), path)
    clock[0] += 500
    assert_same(sq.restore(snapshot, model).generate(), expected, 10)
    handle.remove()


UNKNOWN: dict[str, Any] = {**SHORT, "max_new_tokens": 5, "assistant_early_exit": 1}
"""A way of guessing tokens whose state cannot be kept: the model's own first layers."""


def test_what_cannot_be_kept_is_refused_and_still_works(model: Any) -> None:
    expected = model.generate(prompt(), **UNKNOWN)
    with pytest.warns(UserWarning, match="cannot be kept") as told, sq.capture(model) as run:
        assert torch.equal(model.generate(prompt(), **UNKNOWN), expected)
        with pytest.raises(sq.UnsupportedOperationError):
            run.snapshot()
    assert len(told) == 1
    with pytest.raises(sq.UnsupportedOperationError, match="EarlyExitCandidateGenerator"):
        run.snapshot()


def test_a_refused_run_does_not_hide_the_next(model: Any) -> None:
    with pytest.warns(UserWarning, match="cannot be kept"), sq.capture(model) as run:
        model.generate(prompt(), **UNKNOWN)
        ids = model.generate(prompt(), **GREEDY, **ENDLESS, max_new_tokens=5)
    assert torch.equal(run.snapshot().generation.input_ids, ids)


def test_autosave_always_holds_the_newest_state(model: Any, path: Path) -> None:
    kwargs, seen = {"input_ids": prompt(), **SAMPLED, **ENDLESS, "max_new_tokens": 60}, []
    expected = uninterrupted(model, **kwargs)

    class Looking(Tokens):
        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 1:
                seen.append(sq.inspect(path).n_tokens - N_PROMPT)

    with sq.capture(model, autosave=path, every=8) as run:
        uninterrupted(model, **kwargs, streamer=Looking())
    assert sorted(set(seen)) == [1, 9, 17, 25, 33, 41, 49, 57]
    assert run.n_saved == 9 and sq.inspect(path).n_tokens == N_PROMPT + 60
    with pytest.raises(RunStoppedError), sq.capture(model, autosave=path, every=50):
        uninterrupted(model, **kwargs, streamer=StopAfter(30))
    assert_same(sq.restore(sq.load(path), model).generate(), expected, 30)


def test_autosave_tells_once_what_cannot_be_kept(model: Any, path: Path) -> None:
    expected = model.generate(prompt(), **UNKNOWN)
    with (
        pytest.warns(UserWarning, match="autosave failed") as told,
        pytest.raises(sq.UnsupportedOperationError),
        sq.capture(model, autosave=path, every=64),
    ):
        assert torch.equal(model.generate(prompt(), **UNKNOWN), expected)
    assert len(told) == 1
    assert not path.exists()


def test_autosave_goes_on_when_the_disk_refuses(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    expected = model.generate(prompt(), **SHORT)
    with (
        pytest.warns(UserWarning, match="autosave failed, generation goes on"),
        pytest.raises(sq.StoreError),
        sq.capture(model, autosave=folder / "x.safetensors", every=8),
    ):
        folder.rmdir()
        assert torch.equal(model.generate(prompt(), **SHORT), expected)
    with pytest.raises(sq.StoreError), sq.capture(model, autosave=folder / "x.safetensors"):
        pass


def test_an_exception_of_the_run_is_not_replaced_by_ours(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        pytest.warns(UserWarning, match="was not saved|autosave failed"),
        pytest.raises(RunStoppedError),
        sq.capture(model, autosave=folder / "x.safetensors"),
    ):
        folder.rmdir()
        model.generate(prompt(), **SHORT, streamer=StopAfter(3))


def test_a_snapshot_shares_the_live_cache(model: Any) -> None:
    with sq.capture(model) as run:
        result = model.generate(prompt(), **GREEDY, **ENDLESS, max_new_tokens=9, return_dict_in_generate=True)
    live = result.past_key_values.layers[0].keys
    assert run.snapshot().cache.layers[0].tensors["keys"].data_ptr() == live.data_ptr()
    rebuilt = rebuild_cache(run.snapshot().cache, lambda layer: torch.device("cpu"))
    assert rebuilt.layers[0].keys.data_ptr() == live.data_ptr()


def test_a_cache_that_was_cut_and_filled_again_is_refused(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with sq.capture(model) as run:
        model.generate(prompt(), **GREEDY, **ENDLESS, max_new_tokens=9, past_key_values=cache)
    cache.crop(-8)
    with pytest.raises(sq.IncompleteStateError, match="cache"):
        run.snapshot()
    with torch.no_grad():
        model(prompt(n=10, seed=3), past_key_values=cache)
    with pytest.raises(sq.IncompleteStateError, match="cache"):
        run.snapshot()
