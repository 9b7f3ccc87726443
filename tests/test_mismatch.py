"""What does not belong together is refused before anything is built, with every difference named."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import semq_state as sq
from conftest import SIZES, tiny_model
from semq_state import content, fingerprint
from semq_state.restore import restore as sq_restore
from semq_state.snapshot import LayerState

SHORT = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 9}
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)

quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def prompt(n_rows: int = 1) -> torch.Tensor:
    return torch.randint(60, 199, (n_rows, 12), generator=torch.Generator().manual_seed(7))


def a_snapshot(model: Any, **kwargs: Any) -> sq.Snapshot:
    with sq.capture(model, **kwargs) as run:
        model.generate(prompt(), **SHORT)
    return run.snapshot()


def words(*more: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("[UNK]", "a", "b", *more))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")


def content_of(model: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The digest of each weight, and what the object holds."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digests = {name: hashlib.sha256(content.raw_bytes(t).data).hexdigest() for name, t in weights.items()}
    return digests, dict(vars(model))


def names(error: sq.ModelMismatchError) -> set[str]:
    return {difference.name for difference in error.differences}


def refused(snapshot: sq.Snapshot, model: Any, **kwargs: Any) -> sq.ModelMismatchError:
    """The refusal of `restore`, which leaves the model as it was and tells each difference in its message."""
    before = content_of(model)
    with pytest.raises(sq.ModelMismatchError) as caught:
        sq.restore(snapshot, model, **kwargs)
    assert content_of(model) == before
    for difference in caught.value.differences:
        assert difference.expected != difference.found
        assert f"{difference.name}: expected {difference.expected}, found {difference.found}" in str(caught.value)
    return caught.value


def like(model: Any, config: Any) -> Any:
    """A model with another configuration and the same weights."""
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def _one_element(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[100, 3] += 1e-3


def _through_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(1.5)


def _other_data(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data + 1


def _other_parameter(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)


def _one_more_buffer(model: Any) -> None:
    model.register_buffer("extra", torch.zeros(3))


def _one_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


CHANGES = [_one_element, _through_data, _other_data, _other_parameter, _one_more_buffer, _one_buffer]


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights(model: Any, change: Callable[[Any], None]) -> None:
    snapshot = a_snapshot(model)
    sq.restore(snapshot, model)
    change(model)
    assert names(refused(snapshot, model)) == {"weights"}
    assert sq.restore(snapshot, model, allow=("weights",)).accepted == ()


def test_weights_of_another_training(model: Any) -> None:
    assert names(refused(a_snapshot(model), tiny_model(seed=1))) == {"weights"}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
         {"config.num_attention_heads", "config.num_key_value_heads", "config.head_dim", "weights"}),
        ({"rms_norm_eps": 1e-5}, {"config.rms_norm_eps"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope.rope_theta", "weights"}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         {"rope.rope_type", "rope.factor", "weights"}),
    ],
    ids=["heads", "norm", "theta", "scaled"],
)  # fmt: skip
def test_another_configuration(model: Any, sizes: dict[str, Any], expected: set[str]) -> None:
    other = like(model, LlamaConfig(**{**SIZES, **sizes}))
    assert names(refused(a_snapshot(model), other)) == expected


def test_another_window() -> None:
    model = tiny_model("mistral")
    other = like(model, MistralConfig(**SIZES, sliding_window=20))
    error = refused(a_snapshot(model), other)
    assert [(d.name, d.expected, d.found) for d in error.differences] == [("config.sliding_window", "16", "20")]


def test_another_class(model: Any) -> None:
    error = refused(a_snapshot(model), tiny_model("qwen3"))
    assert {"config.model_class", "config.model_type", "weights"} <= names(error)


def test_all_differences_in_one_error(model: Any) -> None:
    snapshot = a_snapshot(model, tokenizer=words())
    config = LlamaConfig(
        **{**SIZES, "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    other = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    error = refused(snapshot, other, tokenizer=words("c"))
    assert names(error) == {"weights", "config.num_hidden_layers", "rope.rope_theta", "tokenizer", "dtype"}
    assert "allow=('config', 'dtype', 'rope', 'tokenizer', 'weights')" in str(error)
    assert names(refused(snapshot, other, allow=("weights", "config", "rope"))) == {"dtype"}
    assert isinstance(error, ValueError)


def test_another_tokenizer(model: Any) -> None:
    tokenizer = words("c")
    snapshot = a_snapshot(model, tokenizer=tokenizer)
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)
    sq.restore(snapshot, model, tokenizer=tokenizer)
    assert names(refused(snapshot, model, tokenizer=words("d"))) == {"tokenizer"}
    assert names(refused(snapshot, model, tokenizer=SlowTokenizer())) == {"tokenizer"}
    assert sq.restore(snapshot, model, tokenizer=words("d"), allow=["tokenizer"]).accepted[0].name == "tokenizer"
    sq.restore(snapshot, model)
    sq.restore(a_snapshot(model), model, tokenizer=tokenizer)
    slow = a_snapshot(model, tokenizer=SlowTokenizer())
    sq.restore(slow, model, tokenizer=SlowTokenizer())


class SlowTokenizer:
    """A tokenizer without a backend."""

    special_tokens_map = {"unk_token": "[UNK]"}  # noqa: RUF012

    def get_vocab(self) -> dict[str, int]:
        return {"[UNK]": 0}


def test_another_dtype(model: Any) -> None:
    snapshot = a_snapshot(model)
    assert names(refused(snapshot, copy.deepcopy(model).to(torch.bfloat16))) == {"dtype", "weights"}


@quiet_peft
def test_an_adapter(model: Any, path: Path) -> None:
    plain = a_snapshot(model)
    adapted = get_peft_model(copy.deepcopy(model), LORA)
    assert names(refused(plain, adapted)) == {"weights", "adapters.default"}
    expected = adapted.generate(prompt(), **{**SHORT, "max_new_tokens": 30})
    snapshot = a_snapshot(adapted)
    assert snapshot.provenance.adapters["default"]["peft_type"] == "LORA"
    sq.save(snapshot, path)
    assert torch.equal(sq.restore(sq.load(path), adapted).generate(max_new_tokens=21), expected)
    assert names(refused(snapshot, model)) == {"weights", "adapters.default"}
    adapted.base_model.disable_adapter_layers()
    adapted.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    adapted.set_adapter("second")
    assert {"adapters.default.active", "adapters.second", "weights"} <= names(refused(snapshot, adapted))
    merged = adapted.merge_and_unload()
    assert names(refused(plain, merged)) == {"weights"}


@quiet_peft
def test_an_adapter_that_transformers_added(model: Any, path: Path) -> None:
    plain = a_snapshot(model)
    model.add_adapter(LORA)
    assert names(refused(plain, model)) == {"weights", "adapters.default"}
    sq.save(a_snapshot(model), path)
    sq.restore(sq.load(path), model).generate(max_new_tokens=3)


@pytest.mark.parametrize("allow", [("weight",), ("weights", "versions"), "weights", ("",)])
def test_unknown_names_in_allow(model: Any, allow: Any) -> None:
    with pytest.raises(ValueError, match="allow"):
        sq.restore(a_snapshot(model), model, allow=allow)


def test_a_digest_that_nobody_can_compare(model: Any) -> None:
    snapshot = a_snapshot(model)
    other = dataclasses.replace(snapshot, provenance=dataclasses.replace(snapshot.provenance, weights="md5:0"))
    with pytest.raises(sq.IncompleteStateError, match="digest of the weights"):
        sq.restore(other, model)
    sq.restore(other, model, allow=("weights",))


def test_other_circumstances_are_one_warning(model: Any) -> None:
    snapshot = a_snapshot(model)
    versions = {**snapshot.provenance.versions, "torch": "2.6.0", "transformers": "5.0.0"}
    provenance = dataclasses.replace(
        snapshot.provenance, versions=versions, threads=99, attention="eager", device="cuda", created="never"
    )
    with pytest.warns(UserWarning) as told:
        sq.restore(dataclasses.replace(snapshot, provenance=provenance), model)
    (warning,) = told
    for part in ("versions.torch: expected 2.6.0", "versions.transformers", "threads: expected 99", "attention"):
        assert part in str(warning.message)
    assert warning.filename == __file__


def test_one_model_is_no_difference(model: Any, path: Path) -> None:
    sq.save(a_snapshot(model), path)
    assert sq.restore(sq.load(path), tiny_model()).accepted == ()


def change_layer(i: int, tensors: Any = None, **kwargs: Any) -> Callable[[sq.Snapshot], sq.Snapshot]:
    """Replaces fields of layer `i`; `tensors` makes its tensors from the old ones."""

    def change(snapshot: sq.Snapshot) -> sq.Snapshot:
        layers = list(snapshot.cache.layers)
        new = {**kwargs, "tensors": tensors(layers[i].tensors)} if tensors else kwargs
        layers[i] = dataclasses.replace(layers[i], **new)
        return dataclasses.replace(snapshot, cache=dataclasses.replace(snapshot.cache, layers=tuple(layers)))

    return change


def change_state(**kwargs: Any) -> Callable[[sq.Snapshot], sq.Snapshot]:
    """Replaces fields of the generation's state; a function is given the old value."""

    def change(snapshot: sq.Snapshot) -> sq.Snapshot:
        state = snapshot.generation
        new = {name: value(getattr(state, name)) if callable(value) else value for name, value in kwargs.items()}
        return dataclasses.replace(snapshot, generation=dataclasses.replace(state, **new))

    return change


def change_cache(change_one: Callable[[Any], Any]) -> Callable[[sq.Snapshot], sq.Snapshot]:
    return lambda snapshot: dataclasses.replace(snapshot, cache=change_one(snapshot.cache))


def _emptied(cache: Any) -> Any:
    layers = tuple(LayerState(layer.family, {}, {**layer.meta, "filled": False}) for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers)


INCOMPLETE: dict[str, tuple[Callable[[sq.Snapshot], sq.Snapshot], str]] = {
    "no keys": (change_layer(1, lambda t: {"values": t["values"]}), "layer 1: expected keys, values"),
    "no tensors": (change_layer(0, lambda t: {}), "layer 0"),
    "no layers": (change_cache(lambda c: dataclasses.replace(c, layers=())), "cached tokens"),
    "all layers empty": (change_cache(_emptied), "cached tokens"),
    "one layer less": (change_cache(lambda c: dataclasses.replace(c, layers=c.layers[:1])), "2 layers"),
    "other batch": (change_layer(0, lambda t: {k: x.repeat(2, 1, 1, 1) for k, x in t.items()}), "layer 0, keys"),
    "flat": (change_layer(0, lambda t: {k: x[0] for k, x in t.items()}), "layer 0, keys"),
    "short layer": (change_layer(1, lambda t: {k: x[:, :, :-1] for k, x in t.items()}), "layer 1"),
    "short values": (change_layer(1, lambda t: {**t, "values": t["values"][:, :, :-1]}), "layer 1"),
    "more heads": (change_layer(1, lambda t: {k: x.repeat(1, 2, 1, 1) for k, x in t.items()}), "heads"),
    "narrow heads": (change_layer(1, lambda t: {k: x[..., :4] for k, x in t.items()}), "head_dim"),
    "n_cached + 1": (change_state(n_cached=lambda n: n + 1), "cached tokens"),
    "n_cached < 0": (change_state(n_cached=-1), "n_cached"),
    "n_cached text": (change_state(n_cached="20"), "n_cached"),
    "logits of another vocabulary": (change_state(logits=lambda x: x[:, :-1]), "logits"),
    "logits of another batch": (change_state(logits=lambda x: x.repeat(2, 1)), "logits"),
    "flat logits": (change_state(logits=lambda x: x[0]), "logits"),
    "scalar logits": (change_state(logits=torch.tensor(1.0)), "logits"),
    "token beyond the vocabulary": (change_state(input_ids=lambda x: x + 180), "tokens below 199"),
    "negative token": (change_state(input_ids=lambda x: x - 199), "tokens below 199"),
    "tokens as int32": (change_state(input_ids=lambda x: x.int()), "int64"),
    "flat tokens": (change_state(input_ids=lambda x: x[0]), "batch, seq"),
    "scalar token": (change_state(input_ids=torch.tensor(5)), "batch, seq"),
    "no tokens": (change_state(input_ids=lambda x: x[:, :0]), "batch, seq"),
    "one token more": (change_state(config={}, input_ids=lambda x: x[:, :-2]), "n_cached"),
    "finished of another batch": (change_state(finished=lambda x: x.repeat(2)), "finished"),
    "finished as numbers": (change_state(finished=lambda x: x.int()), "finished"),
    "prompt_length too long": (change_state(prompt_length=99), "prompt_length"),
    "prompt_length < 0": (change_state(prompt_length=-1), "prompt_length"),
    "prompt_length is true": (change_state(prompt_length=True), "prompt_length"),
    "scalar input": (change_state(step_inputs={"position_ids": torch.tensor(1)}), "position_ids"),
    "short mask": (change_state(step_inputs={"attention_mask": torch.ones(1, 5)}), "attention_mask"),
    "other mask": (change_state(step_inputs={"attention_mask": torch.ones(2, 21)}), "attention_mask"),
    "no random state": (change_state(rng={}), "random state"),
}  # fmt: skip


@pytest.mark.parametrize("what", INCOMPLETE)
def test_incomplete_states(model: Any, what: str) -> None:
    change, where = INCOMPLETE[what]
    before = content_of(model)
    with pytest.raises(sq.IncompleteStateError, match=where):
        sq.restore(change(a_snapshot(model)), model)
    assert content_of(model) == before


@pytest.mark.parametrize(
    "meta", [{"n_seen": 20}, {"window": 16}, {"window": "16", "n_seen": 20}, {"window": 1, "n_seen": 20}], ids=str
)
def test_incomplete_windows(meta: dict[str, Any]) -> None:
    model = tiny_model("mistral")
    with pytest.raises(sq.IncompleteStateError, match="layer 0"):
        sq.restore(change_layer(0, meta={"filled": True, **meta})(a_snapshot(model)), model)
    cut = change_layer(0, lambda t: {k: x[:, :, 1:] for k, x in t.items()})
    with pytest.raises(sq.IncompleteStateError, match="of a window of 16"):
        sq.restore(cut(a_snapshot(model)), model)


@pytest.mark.parametrize("state", [torch.zeros(7, dtype=torch.uint8), torch.zeros(5056)], ids=str)
def test_a_random_state_that_is_none(model: Any, state: torch.Tensor) -> None:
    resumed = sq.restore(change_state(rng={"cpu": state})(a_snapshot(model)), model)
    with pytest.raises(sq.IncompleteStateError, match="random state of 'cpu'"):
        resumed.generate(max_new_tokens=2)
    resumed.generate(max_new_tokens=2, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device must be missing")
def test_a_random_stream_of_a_missing_device(model: Any) -> None:
    snapshot = a_snapshot(model)
    rng = {**snapshot.generation.rng, "cuda:0": torch.zeros(16, dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="cuda:0 cannot go on") as told:
        sq.restore(change_state(rng=rng)(snapshot), model).generate(max_new_tokens=2)
    assert told[0].filename == __file__


def test_unknown_kinds(model: Any) -> None:
    snapshot = a_snapshot(model)
    with pytest.raises(sq.UnsupportedModelError, match="'hologram'"):
        sq.restore(change_layer(1, family="hologram")(snapshot), model)
    with pytest.raises(sq.UnsupportedModelError, match="'paged'"):
        sq.restore(change_cache(lambda c: dataclasses.replace(c, kind="paged"))(snapshot), model)


@pytest.mark.parametrize(
    ("sizes", "where"),
    [
        ({"num_hidden_layers": 3}, "3 layers"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, r"\(4, 4\) heads"),
        ({"vocab_size": 100}, "tokens below 100"),
    ],
    ids=str,
)
def test_allow_does_not_make_a_state_fit(model: Any, sizes: dict[str, int], where: str) -> None:
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **sizes})).eval()
    with pytest.raises(sq.IncompleteStateError, match=where):
        sq.restore(a_snapshot(model), other, allow=("weights", "config"))


def a_plain_list(model: Any) -> Any:
    return [torch.zeros(1, 2, 3, 8)]


def a_subclass(model: Any) -> Any:
    class OwnCache(DynamicCache):
        pass

    return OwnCache(config=model.config)


def a_foreign_layer(model: Any) -> Any:
    cache = DynamicCache(config=model.config)

    class OwnLayer(type(cache.layers[0])):  # type: ignore[misc]
        pass

    cache.layers[1] = OwnLayer()
    return cache


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (a_plain_list, "plain list of llama"),
        (a_subclass, "OwnCache"),
        (a_foreign_layer, "OwnLayer"),
    ],
)
def test_caches_that_cannot_be_kept(model: Any, make: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(sq.UnsupportedModelError, match=name):
        sq.snapshot_of(model, make(model), prompt())


@pytest.mark.parametrize(("make", "name"), [(a_subclass, "OwnCache"), (a_foreign_layer, "OwnLayer")])
def test_a_run_with_such_a_cache_goes_on(model: Any, make: Callable[[Any], Any], name: str) -> None:
    expected = model.generate(prompt(), **SHORT, past_key_values=make(model))
    with pytest.warns(UserWarning, match="cannot be kept"), sq.capture(model) as run:
        assert torch.equal(model.generate(prompt(), **SHORT, past_key_values=make(model)), expected)
    with pytest.raises(sq.UnsupportedModelError, match=name):
        run.snapshot()


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: LlamaModel(LlamaConfig(**SIZES)), "LlamaModel"),
        (lambda: "smollm2", "str"),
        (lambda: None, "NoneType"),
    ],
    ids=["layer", "headless", "name", "none"],
)
def test_what_is_no_such_model(model: Any, make: Callable[[], Any], found: str) -> None:
    snapshot = a_snapshot(model)
    for use in (sq.capture, lambda m: sq.snapshot_of(m, None, prompt()), lambda m: sq_restore(snapshot, m)):
        with pytest.raises(sq.UnsupportedModelError, match=found):
            use(make())


def count_reads(monkeypatch: pytest.MonkeyPatch, name: str = "_whole") -> list[int]:
    read, n = getattr(fingerprint, name), [0]

    def counted(tensor: torch.Tensor) -> str:
        n[0] += 1
        return str(read(tensor))

    monkeypatch.setattr(fingerprint, name, counted)
    return n


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_a_digest_is_remembered(model: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = count_reads(monkeypatch, "_whole" if mode == "full" else "_sampled")
    n_weights = len(list(model.named_parameters())) + len(list(model.named_buffers()))
    snapshot = a_snapshot(model, weights=mode)
    assert n == [n_weights]
    for _ in range(3):
        sq.restore(snapshot, model)
        assert a_snapshot(model, weights=mode).provenance.weights == snapshot.provenance.weights
    assert n == [n_weights]
    sq.restore(snapshot, tiny_model())
    assert n == [2 * n_weights]


@pytest.mark.parametrize("mode", ["full", "sampled"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_remembered_digest_is_not_used_for_other_weights(
    model: Any, change: Callable[[Any], None], mode: str
) -> None:
    before = fingerprint.weights_digest(model, mode)
    change(model)
    after = fingerprint.weights_digest(model, mode)
    assert after != before
    assert after == fingerprint.weights_digest(copy.deepcopy(model), mode)


def test_a_parameter_that_differs_in_one_value_is_another(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before, weight = fingerprint.weights_digest(model), model.lm_head.weight.detach()
    at = torch.zeros_like(weight, dtype=torch.bool)
    at[100, 3] = True
    model.lm_head.weight = torch.nn.Parameter(torch.where(at, 9.0, weight))
    assert fingerprint.weights_digest(model) != before


def test_sampled_digests(model: Any) -> None:
    snapshot = a_snapshot(model, weights="sampled")
    assert snapshot.provenance.weights.startswith("sampled:")
    assert sq.restore(snapshot, tiny_model()).accepted == ()
    assert names(refused(snapshot, tiny_model(seed=1))) == {"weights"}
    with pytest.raises(ValueError, match="full"):
        sq.capture(model, weights="none")
    with pytest.raises(ValueError, match="full"):
        sq.snapshot_of(model, None, prompt(), weights="none")


def test_weights_that_are_nowhere_to_read(model: Any) -> None:
    model.lm_head.to("meta")
    with pytest.raises(sq.UnsupportedModelError, match="meta device"):
        fingerprint.weights_digest(model)


@pytest.mark.parametrize("change", [_one_element, _other_parameter, _one_buffer])
def test_weights_that_change_during_a_capture(model: Any, change: Callable[[Any], None], path: Path) -> None:
    with sq.capture(model) as run:
        model.generate(prompt(), **SHORT)
        run.snapshot()
        change(model)
        with pytest.raises(sq.IncompleteStateError, match="weights"):
            run.snapshot()
    with pytest.raises(sq.IncompleteStateError, match=r"lm_head\.weight|inv_freq"):
        run.snapshot()


def test_numbers_and_names_in_a_configuration_are_compared_as_such(model: Any) -> None:
    snapshot = a_snapshot(model)
    other = like(model, LlamaConfig(**SIZES))
    other.config.attention_dropout = math.nan
    error = refused(snapshot, other)
    assert [(d.name, d.found) for d in error.differences] == [("config.attention_dropout", "nan")]
