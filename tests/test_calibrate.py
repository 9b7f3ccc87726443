"""Calibrations of small random models, and the commands that make and use them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3Config, LlamaConfig, MambaConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import semq_state as sq
from conftest import SIZES, TINY, tiny_model
from semq_state.calibration import Calibration, find, load_calibration, place_for
from semq_state.codecs import Transform
from semq_state.errors import CalibrationError
from semq_state.fingerprint import weights_digest
from semq_state.measuring import steps
from semq_state.symbolic import NotCalibratedWarning

pytestmark = pytest.mark.timeout(120)

SMALL = {"n_contexts": 3, "n_gradients": 2}
N_TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Texts of 64 tokens, and the 24 that follow."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "N_TOKENS": N_TOKENS,
            "_NEXT": 24,
            "_NATURAL": 16,
            "_COPIED": 12,
            "_COPY_SKIPS": 2,
        }.items():
            patch.setattr(steps, name, value)
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 4, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def run(model: Any, n: int = 60, **settings: Any) -> sq.Snapshot:
    prompt = torch.randint(3, 190, (1, n), generator=torch.Generator().manual_seed(4))
    with sq.capture(model) as captured:
        model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
    return captured.snapshot()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Calibration]:
    """A model and its calibration, without text."""
    model = llama()
    return model, sq.calibrate(model, into=tmp_path_factory.mktemp("calibration") / "x", **SMALL)


def test_what_a_calibration_holds(made: tuple[Any, Calibration]) -> None:
    model, calibration = made
    assert calibration.weights == weights_digest(model)
    (layers,) = calibration.sets
    assert layers.layers == (0, 1, 2, 3) and (layers.n_heads, layers.key_dim, layers.value_dim) == (2, 8, 8)
    # Keys are coded before rotary embedding, by the model's own frequencies.
    for keys, values in layers.rotaries:
        assert values is None and keys is not None and (keys.layout, keys.begin, keys.n_dims) == ("half", 0, 8)
        assert keys.inv_freq == pytest.approx(model.model.rotary_emb.inv_freq.tolist())
    assert len(calibration.now) == len(calibration.before) == 199
    steps_ = [point.step for point in calibration.curve]
    assert len(steps_) == 4 and steps_ == sorted(steps_)
    bits = [point.bits_per_value for point in calibration.curve]
    assert bits == sorted(bits, reverse=True) and all(0 < b < 16 for b in bits)
    assert calibration.about["n_contexts"] == 3 and calibration.about["n_tokens"] == 3 * N_TOKENS
    assert calibration.about["texts"] == 0 and calibration.about["seconds"] >= 0
    assert {"torch", "transformers", "semq-state"} == calibration.about["versions"].keys()


def test_a_state_is_coded_by_it(made: tuple[Any, Calibration], path: Path) -> None:
    model, calibration = made
    snapshot = run(model)
    sizes, errors = [], []
    for step in (0.3, 0.03, 0.003):
        info = sq.save(snapshot, path, codec=Transform(calibration, step=step))
        assert info.coding and info.coding.picked == {"keys": "transform", "values": "transform"}
        loaded = sq.load(path, calibration=calibration)
        assert loaded.coding == info.coding
        sizes.append(info.coding.bits_per_value)
        errors.append(max(error.relative for error in info.coding.errors.values()))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    resumed = sq.restore(loaded, model).generate(max_new_tokens=8, do_sample=False)
    again = sq.restore(snapshot, model).generate(max_new_tokens=8, do_sample=False)
    assert resumed.shape == again.shape


def test_the_same_seed_gives_the_same_calibration(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=2)
    first, second = (sq.calibrate(model, into=tmp_path / name, seed=5, **SMALL) for name in ("a", "b"))
    assert first.digest == second.digest == load_calibration(tmp_path / "a").digest
    other = sq.calibrate(model, into=tmp_path / "c", seed=6, **SMALL)
    assert other.digest != first.digest


def test_it_is_found_again_by_the_weights(path: Path, folder: Path) -> None:
    model = tiny_model()
    snapshot = run(model)
    with pytest.warns(NotCalibratedWarning):
        before = sq.save(snapshot, path, codec="compact")
    assert before.coding and before.coding.picked["keys"] == "rotated"
    calibration = sq.calibrate(model, **SMALL)
    found = find(weights_digest(model))
    assert found and found.digest == calibration.digest and place_for(calibration.weights).is_relative_to(folder)
    info = sq.save(snapshot, path, codec="compact")
    assert (
        info.coding and info.coding.calibration == calibration.digest and info.coding.picked["keys"] == "transform"
    )
    assert sq.load(path).coding == info.coding
    with pytest.warns(NotCalibratedWarning):
        sq.save(run(tiny_model(seed=1)), path, codec="compact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_is_left_as_it_was(dtype: torch.dtype, training: bool, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    model.train(training)
    frozen = model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    torch.manual_seed(11)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    own, config = dict(vars(model)), model.config.to_dict()
    calibration = sq.calibrate(model, into=tmp_path / "x", **SMALL)
    assert calibration.weights == weights_digest(model)
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert vars(model).keys() == own.keys() and model.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_windows_and_whole_layers_are_two_sets(tmp_path: Path, path: Path) -> None:
    torch.manual_seed(0)
    config = TINY["gemma3"]()
    config.num_hidden_layers, config.layer_types = 4, ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    calibration = sq.calibrate(model, into=tmp_path / "x", **SMALL)
    assert sorted(layers.layers for layers in calibration.sets) == [(0, 2), (1, 3)]
    turns = [layers.rotaries[0][0] for layers in calibration.sets]
    assert turns[0] is not None and turns[1] is not None and turns[0] != turns[1]
    snapshot = run(model)
    info = sq.save(snapshot, path, codec=Transform(calibration, step=0.05))
    assert info.coding and info.coding.picked == {"keys": "transform", "values": "transform"}
    groups = info.manifest.structure["coded"]
    begins = sorted(g["params"]["begin"] for g in groups)
    assert len(groups) == 2 and begins[0] == 0 and begins[1] > 40
    assert sq.load(path, calibration=calibration).coding == info.coding


def test_latent_attention(tmp_path: Path, path: Path) -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=199, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    calibration = sq.calibrate(model, into=tmp_path / "x", **SMALL)
    snapshot = run(model)
    assert sum(len(layers.layers) for layers in calibration.sets) == 2
    # Its latent is kept as keys; what turns with the position as values.
    layers = calibration.sets[0]
    assert (layers.layers, layers.n_heads, layers.key_dim, layers.value_dim) == ((0, 1), 1, 16, 8)
    assert all(keys is None and values is not None for keys, values in layers.rotaries)
    errors = []
    for step in (3e-2, 3e-3, 3e-4):
        info = sq.save(snapshot, path, codec=Transform(calibration, step=step))
        assert info.coding and info.coding.picked == {"keys": "transform", "values": "transform"}
        assert sq.load(path, calibration=calibration).coding == info.coding
        errors.append(info.coding.errors["layers.0.keys"].relative)
    assert errors[0] > errors[1] > errors[2] < 0.1


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=199, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2, time_step_rank=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(CalibrationError, match="keys and values") as refusal:
        sq.calibrate(model, into=tmp_path / "x", **SMALL)
    assert refusal.value.do and not (tmp_path / "x").exists() and not folder.exists()
    assert all(p.requires_grad for p in model.parameters())


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(195))]


def tokenizer() -> Any:
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def words(n: int, seed: int = 0) -> str:
    return " ".join(
        f"w{i}" for i in torch.randint(0, 195, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def test_texts_in_equal_shares(tmp_path: Path) -> None:
    model, told = tiny_model(), []
    texts = [words(500, seed=1), words(700, seed=2)]
    calibration = sq.calibrate(
        model, tokenizer(), text=texts, into=tmp_path / "x", progress=lambda *step: told.append(step), **SMALL
    )
    assert calibration.about["texts"] == 2
    assert all(0 <= done <= total for _, done, total in told) and told[-1][1] == told[-1][2]
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert len(stages) >= 5
    for stage in stages:
        own = [done for what, done, _ in told if what == stage]
        assert own == sorted(own)
    single = sq.calibrate(model, tokenizer(), text=words(1000, seed=1), into=tmp_path / "y", **SMALL)
    assert single.about["texts"] == 1 and single.digest != calibration.digest


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    for text in ("w1", words(200), [words(2000), words(30)], ["w1", ""]):
        with pytest.raises(CalibrationError, match="tokens") as refusal:
            sq.calibrate(tiny_model(), tokenizer(), text=text, into=tmp_path / "x", **SMALL)
        assert refusal.value.do and not (tmp_path / "x").exists()


def test_a_model_without_a_token_to_begin_with_needs_a_text(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(CalibrationError, match="begin"):
        sq.calibrate(model, into=tmp_path / "x", **SMALL)
    assert sq.calibrate(model, tokenizer(), text=words(1000), into=tmp_path / "x", **SMALL).curve


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="file") as refusal:
        sq.calibrate(tiny_model(), into=tmp_path / "file" / "x", **SMALL)
    assert refusal.value.do


# The commands


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_calibrate_convert_and_inspect(
    cli: Any, model_folder: str, path: Path, tmp_path: Path, folder: Path
) -> None:
    text = tmp_path / "text"
    text.write_text(words(3500))
    code, out, err = cli("calibrate", model_folder, "--text", text, "--json")
    assert code == 0, err
    told = json.loads(out)
    place = Path(told["file"])
    assert place.is_relative_to(folder) and load_calibration(place).digest == told["digest"]
    assert len(told["curve"]) == 4 and told["about"]["texts"] == 1
    prompt = words(40, seed=3)
    code, out, err = cli("run", model_folder, "--prompt", prompt, "--tokens", "4", "--save", path, "--json")
    assert code == 0, err
    compact = tmp_path / "compact"
    code, out, err = cli("convert", path, compact, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["codec"] == "compact" and said["coding"]["calibration"] == told["digest"]
    assert said["coding"]["source"] == sq.inspect(path).state_id
    code, out, err = cli("inspect", compact)
    assert code == 0 and told["digest"] in out and "bits a value" in out and "generation.logits" in out
    assert said["state_id"] in out and said["coding"]["source"] in out and "nats" in out
    assert cli("verify", compact)[0] == 0
    code, out, err = cli("resume", compact, "--model", model_folder, "--tokens", "3", "--json")
    assert code == 0, err
    assert len(json.loads(out)["tokens"]) > 0
    # Carried along, or named, it needs no cache folder.
    embedded, elsewhere = tmp_path / "embedded", tmp_path / "elsewhere"
    assert cli("convert", path, embedded, "--codec", "ratio=4", "--embed-calibration")[0] == 0
    place.rename(elsewhere)
    code, out, err = cli("convert", embedded, tmp_path / "exact", "--codec", "exact", "--json")
    assert code == 0 and json.loads(out)["coding"] is None, err
    code, out, err = cli("convert", compact, tmp_path / "exact", "--codec", "exact")
    assert (code, out) == (2, "") and told["digest"] in err and str(place) in err
    code, out, err = cli("convert", compact, tmp_path / "exact", "--codec", "exact", "--calibration", elsewhere)
    assert code == 0, err
    code, out, err = cli("convert", path, tmp_path / "x", "--codec", "kl=0.01")
    assert code == 2 and "semq-state calibrate" in err and not (tmp_path / "x").exists()
    code, out, err = cli("convert", path, tmp_path / "x", "--codec", "kl=nothing")
    assert code == 2 and "ratio=20" in err


def test_calibrate_in_words_and_refusals(cli: Any, model_folder: str, tmp_path: Path, folder: Path) -> None:
    text, out_file = tmp_path / "text", tmp_path / "calibration"
    text.write_text(words(3500))
    code, out, err = cli("calibrate", model_folder, "--text", text, "--out", out_file)
    assert code == 0, err
    found = load_calibration(out_file)
    assert str(out_file) in out and found.digest in out and "smaller than 16 bits" in out and not folder.exists()
    text.write_text("w1 w2")
    code, out, err = cli("calibrate", model_folder, "--text", text)
    assert (code, out) == (2, "") and "tokens" in err and not folder.exists()
    code, out, err = cli("calibrate", tmp_path / "nothing")
    assert code == 2 and "nothing" in err
    assert dataclasses.is_dataclass(found)
