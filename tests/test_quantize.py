"""`sq.quantize` on small random models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, T5Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import semq_state as sq
from conftest import SIZES, tiny_model
from semq_state.errors import CalibrationError, ModelMismatchError, QuantizationError, UnsupportedModelError
from semq_state.fingerprint import weights_digest
from semq_state.quantizers import hessian
from semq_state.weights import calibrating, layer
from semq_state.weights.linear import QuantizedLinear
from semq_state.weights.quantize import quantize
from semq_state.weights.recipes import METHODS, Recipe

pytestmark = pytest.mark.timeout(120)

SHORT: dict[str, Any] = {"n_windows": 4, "window": 64}
IDS = torch.arange(3, 43)[None]


def tokenizer() -> Any:
    made = Tokenizer(WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 190)}}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def text(n: int = 400, seed: int = 0) -> str:
    found = torch.randint(1, 190, (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in found.tolist())


def made(model: Any, method: Any = "gptq", bits: int = 3, group: int = 0, **options: Any) -> Any:
    return quantize(model, method, bits, group, text(), tokenizer=tokenizer(), **{**SHORT, **options})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def off(model: Any, wanted: torch.Tensor) -> float:
    return float((logits(model) - wanted).norm() / wanted.norm())


class TestMethods:
    @pytest.mark.parametrize("group", [0, 8, 12])
    @pytest.mark.parametrize("method", list(METHODS))
    def test_more_bits_are_nearer_the_model(self, method: str, group: int) -> None:
        wanted = logits(tiny_model())
        found = [off(made(tiny_model(), method, bits, group), wanted) for bits in (2, 4, 8)]
        assert found[0] > 2 * found[1] > 4 * found[2]
        # SEMQ's range cuts off some values however many bits there are.
        assert found[2] < (0.1 if method == "semq" else 0.03)

    @pytest.mark.parametrize("method", list(METHODS))
    def test_weights_are_a_few_levels_of_each_group(self, method: str) -> None:
        model = made(tiny_model(), method, 2, 8)
        for name, matrix in model.semq_weights.matrices.items():
            if matrix.bits != 2:
                continue
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, matrix.weight())
            if matrix.branch is None and matrix.smoothing is None:
                kept = torch.zeros(weight.numel(), dtype=torch.bool)
                if matrix.escaped_at is not None:
                    kept[matrix.escaped_at] = True
                for group, left in zip(weight.view(-1, 8), kept.view(-1, 8), strict=True):
                    assert len(group[~left].unique()) <= 4

    def test_compensation_is_nearer_than_the_nearest(self) -> None:
        wanted = logits(tiny_model())
        near = off(made(tiny_model(), "rtn", 2, embedding_bits=0), wanted)
        assert off(made(tiny_model(), "gptq", 2, embedding_bits=0), wanted) < 0.9 * near
        assert off(made(tiny_model(), "neuqi", 2, embedding_bits=0), wanted) < 0.9 * near

    def test_septq_keeps_a_hundredth(self) -> None:
        model = made(tiny_model(), Recipe("septq", fit="shrunk", share=0.05), 2)
        for matrix in model.semq_weights.matrices.values():
            if matrix.bits == 2:
                assert matrix.escaped_at is not None
                assert len(matrix.escaped_at) == int(0.05 * matrix.rows * matrix.cols)

    def test_every_layer_is_quantised_from_what_the_ones_before_it_make(self, monkeypatch: Any) -> None:
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def noted(weight: torch.Tensor, *arguments: Any) -> Any:
            inputs = arguments[3]
            if inputs is not None:
                seen[len(seen)] = weight.clone(), inputs.values.clone()
            return layer.quantized(weight, *arguments)

        monkeypatch.setattr("semq_state.weights.quantize.quantized", noted)
        original, model = tiny_model(), made(tiny_model(), "gptq", 2, embedding_bits=0)
        ids = calibrating.windows(tokenizer(), text(), 4, 64)
        given: list[tuple[str, torch.Tensor]] = []
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, arguments, name=name: given.append((name, arguments[0].flatten(0, 1)))
            )
        with torch.no_grad():
            calibrating.read(model, ids)
        assert len(given) == len(seen) == 14
        for (name, inputs), (weight, told) in zip(given, seen.values(), strict=True):
            assert torch.equal(weight, original.get_submodule(name).weight)
            assert torch.allclose(inputs, told, atol=1e-5), name

    def test_layers_that_share_inputs_share_a_hessian(self, monkeypatch: Any) -> None:
        counted = []

        original = hessian.hessian

        def noted(inputs: torch.Tensor) -> torch.Tensor:
            counted.append(inputs.shape)
            return original(inputs)

        monkeypatch.setattr(hessian, "hessian", noted)
        made(tiny_model(), "gptq", 3)
        # Queries, keys and values; output; gate and up; down: of two blocks.
        assert len(counted) == 8

    def test_the_same_call_makes_the_same_weights(self) -> None:
        first, second = (made(tiny_model(), "neuqi", 3, 8) for _ in range(2))
        assert weights_digest(first) == weights_digest(second)

    def test_neuqi_and_rtn_do_without_a_text(self) -> None:
        wanted = logits(tiny_model())
        near = off(quantize(tiny_model(), "rtn", 2, 0, embedding_bits=0), wanted)
        assert off(quantize(tiny_model(), "neuqi", 2, 0, embedding_bits=0), wanted) < near

    def test_the_grid_of_neuqi_heeds_the_inputs(self) -> None:
        weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        values = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 32)
        recipe = Recipe("neuqi", fit="neuqi", compensated=False)
        inputs = layer.Inputs(values, "x")
        lost = [
            float(((layer.quantized(weight, recipe, 2, 32, given).weight() - weight) @ values.T).square().mean())
            for given in (inputs, None)
        ]
        assert lost[0] < 0.5 * lost[1]


class TestModels:
    @pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen3", "mistral"])
    @pytest.mark.parametrize("dequantize", ["load", "call"])
    def test_others_run(self, kind: str, dequantize: Any) -> None:
        wanted = logits(tiny_model(kind))
        model = made(tiny_model(kind), "gptq", 6, 8, dequantize=dequantize)
        assert off(model, wanted) < 0.2
        assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape == (1, 45)

    @pytest.mark.parametrize("method", list(METHODS))
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_dequantised_at_each_call_is_the_same_bit_for_bit(self, method: str, kind: str) -> None:
        one = made(tiny_model(kind, dtype=torch.bfloat16), method, 3, 8)
        other = made(tiny_model(kind, dtype=torch.bfloat16), method, 3, 8, dequantize="call")
        assert any(isinstance(module, QuantizedLinear) for module in other.modules())
        assert not any(isinstance(module, QuantizedLinear) for module in one.modules())
        assert torch.equal(logits(one), logits(other)) or kind == "gpt2"
        assert (logits(one) - logits(other)).abs().max() < 0.02
        assert weights_digest(one) == weights_digest(other)

    def test_dequantised_at_each_call_takes_less_memory(self) -> None:
        def held(model: Any) -> int:
            inner = model.model.layers
            return sum(t.numel() * t.element_size() for t in [*inner.parameters(), *inner.buffers()])

        config = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).to(torch.bfloat16)
        one, other = made(copy.deepcopy(model), "rtn", 3), made(model, "rtn", 3, dequantize="call")
        assert held(other) < 0.25 * held(one)

    def test_tied_embeddings_stay_one_tensor_and_are_quantised_once(self) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
        wanted = logits(model)
        made(model, "rtn", 8, embedding_bits=4)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert [m.bits for m in model.semq_weights.matrices.values()].count(4) == 1
        assert model.semq_weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert 0.001 < off(model, wanted) < 0.2

    def test_embeddings_are_left_where_they_shall_be(self) -> None:
        model = tiny_model()
        before = model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()
        made(model, "gptq", 2, embedding_bits=0)
        assert torch.equal(model.model.embed_tokens.weight, before[0])
        assert torch.equal(model.lm_head.weight, before[1])
        assert "model.embed_tokens.weight" in model.semq_weights.recipe["left"]

    def test_an_encoder_decoder(self) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 199, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = T5Config(**sizes, decoder_start_token_id=0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        made(model, "gptq", 4)
        assert len([m for m in model.semq_weights.matrices.values() if m.bits == 4]) > 20
        assert not model.semq_weights.recipe["unreached"]

    def test_experts_that_are_no_linear_layers_are_left_and_told(self) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2)).eval()
        made(model, "gptq", 4)
        assert any("experts" in name for name in model.semq_weights.recipe["left"])

    def test_a_layer_that_the_text_never_reaches_is_rounded_alone_and_told(self) -> None:
        model = tiny_model()
        model.model.aside = nn.Linear(8, 8)
        made(model, "gptq", 4)
        assert model.semq_weights.recipe["unreached"] == ["model.aside"]
        assert len(model.model.aside.weight[0].unique()) <= 16

    def test_skipped_layers_stay(self) -> None:
        model = tiny_model()
        before = {name: p.clone() for name, p in model.named_parameters()}
        made(model, "gptq", 2, skip=("o_proj", "model.layers.0.mlp.up_proj"))
        same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"} <= same
        assert "model.layers.0.mlp.up_proj.weight" in same
        assert "model.layers.1.mlp.up_proj.weight" not in same

    def test_rounded_inputs(self) -> None:
        wanted = logits(tiny_model())
        fine, coarse = (off(made(tiny_model(), "specquant", 8, activation_bits=n), wanted) for n in (8, 3))
        assert fine < 0.03 < 0.04 < coarse
        model = made(tiny_model(), "gptq", 8, activation_bits=3)
        assert 0.05 < off(model, wanted) < 1

    def test_nothing_stays_behind_on_the_model(self) -> None:
        model = tiny_model()
        made(model, "gptq", 3)
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not model.training
        assert all(type(module).__module__.startswith(("torch", "transformers")) for module in model.modules())


class TestDistillation:
    def test_moves_scales_and_zero_points_alone_towards_the_model(self) -> None:
        plain, trained = made(tiny_model(), "neuqi", 2, 8), made(tiny_model(), "neuqi", 2, 8, distill_steps=40)
        told = trained.semq_weights.recipe
        assert told["distill_steps"] == 40
        assert told["distill_loss"][-1] < told["distill_loss"][0]
        for name, matrix in trained.semq_weights.matrices.items():
            before = plain.semq_weights.matrices[name]
            assert torch.equal(matrix.symbols, before.symbols)
            assert torch.equal(matrix.scale, before.scale) == (matrix.bits != 2)
        wanted = logits(tiny_model())
        assert off(trained, wanted) < off(plain, wanted)

    @pytest.mark.parametrize("options", [{"method": "specquant"}, {"method": "septq"}, {"activation_bits": 4}])
    def test_of_every_kind_of_matrix(self, options: dict[str, Any]) -> None:
        model = made(tiny_model(), **{"method": "gptq", **options}, bits=3, distill_steps=3)
        for name, matrix in model.semq_weights.matrices.items():
            assert torch.equal(model.get_submodule(name).weight, matrix.weight())
        assert all(module.__class__.__name__ != "Trained" for module in model.modules())


class TestProvenance:
    def test_states_say_which_weights_made_them(self) -> None:
        original = weights_digest(tiny_model())
        model = made(tiny_model(), "gptq", 4, 8)
        with sq.capture(model) as run:
            model.generate(IDS, max_new_tokens=4, do_sample=False)
        told = run.snapshot().provenance
        assert told.quantization["original"] == original
        assert (told.quantization["method"], told.quantization["bits"], told.quantization["group"]) == (
            "gptq",
            4,
            8,
        )
        assert told.weights == weights_digest(model) != original

    def test_going_on_under_quantised_weights_is_refused_unless_allowed_by_name(self) -> None:
        model = tiny_model()
        with sq.capture(model) as run:
            model.generate(IDS, max_new_tokens=4, do_sample=False)
        snapshot = run.snapshot()
        small = made(tiny_model(), "gptq", 4)
        with pytest.raises(ModelMismatchError) as refused:
            sq.restore(snapshot, small)
        assert {d.name.partition(".")[0] for d in refused.value.differences} == {"weights", "quantization"}
        resumed = sq.restore(snapshot, small, allow=("weights", "quantization"))
        assert {"quantization.method", "quantization.original"} <= {d.name for d in resumed.accepted}
        assert resumed.generate(max_new_tokens=3).shape == (1, 47)


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [{"bits": 1}, {"bits": 9}, {"bits": 2.5}, {"group": -1}, {"embedding_bits": 1}, {"activation_bits": 1},
         {"n_windows": 0}, {"window": 1}, {"dequantize": "never"}, {"method": "magic"}, {"skip": ("nothing",)}],
        ids=str,
    )  # fmt: skip
    def test_arguments_out_of_range(self, options: dict[str, Any]) -> None:
        model = tiny_model()
        before = weights_digest(model)
        with pytest.raises(ValueError, match="|".join(options)):
            made(model, **{"method": "gptq", **options})
        assert weights_digest(model) == before

    def test_a_method_that_needs_a_text(self) -> None:
        with pytest.raises(CalibrationError, match=r"'gptq'.*calibration text.*'rtn' or 'neuqi' or 'semq'"):
            quantize(tiny_model(), "gptq", 3)

    def test_a_text_that_is_too_short(self) -> None:
        with pytest.raises(CalibrationError, match=r"at least 256 tokens.*found 99 tokens"):
            quantize(tiny_model(), "gptq", 3, calibration_text=text(99), tokenizer=tokenizer(), **SHORT)

    def test_a_text_without_a_tokenizer(self) -> None:
        with pytest.raises(CalibrationError, match="tokenizer"):
            quantize(tiny_model(), "gptq", 3, calibration_text=text())

    def test_a_model_that_is_quantised(self) -> None:
        with pytest.raises(UnsupportedModelError, match="quantised"):
            made(made(tiny_model(), "rtn", 3), "rtn", 3)

    def test_a_model_without_linear_layers(self) -> None:
        model = tiny_model()
        model.model.layers = nn.ModuleList()
        with pytest.raises(UnsupportedModelError, match="linear layers"):
            made(model, "rtn", 3)

    def test_a_weight_that_is_no_number(self) -> None:
        model = tiny_model()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
        with pytest.raises(QuantizationError, match="NaN"):
            made(model, "gptq", 3)
        assert not any("forward" in module.__dict__ for module in model.modules())

    def test_dead_columns_become_nothing(self) -> None:
        model = tiny_model()
        model.model.layers[0].input_layernorm.weight.data[5] = 0
        made(model, "gptq", 8)
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight[:, 5].abs().max() < 1e-3
        assert weight[:, 4].abs().max() > 1e-3

    def test_fewer_tokens_than_channels(self) -> None:
        model = made(tiny_model(), "gptq", 4, n_windows=1, window=8)
        assert torch.isfinite(logits(model)).all()


def test_recipes_are_checked() -> None:
    with pytest.raises(ValueError, match="fit"):
        Recipe("x", fit="best")
    with pytest.raises(ValueError, match="share"):
        Recipe("x", share=0.5)
    with pytest.raises(ValueError, match="frequencies"):
        dataclasses.replace(METHODS["specquant"], frequencies=-1)
