"""Rotary embeddings: undone and redone, refused when damaged, and found on live models of many architectures."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers.models.auto.modeling_auto as auto
from architectures import causal
from architectures.cases import build
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from conftest import SIZES, tiny_model
from semq_state.caches.cache import dump_cache, mark_cache
from semq_state.errors import FormatError, IntegrityError, UnsupportedModelError
from semq_state.generation.undisturbed import undisturbed
from semq_state.measuring import rotary_fit
from semq_state.measuring.rotary_fit import fit
from semq_state.measuring.rotary_of import measured, rotary_of
from semq_state.rotary import MAX_DIMS, ROTARY_LAYOUTS, Rotary

GOOD = {"layout": "half", "begin": 0, "n_dims": 4, "inv_freq": [1.0, 0.01]}
BAD: dict[str, Any] = {
    "a list": [1, 2],
    "nothing": None,
    "no layout": {k: v for k, v in GOOD.items() if k != "layout"},
    "one more": GOOD | {"scale": 1.0},
    "another layout": GOOD | {"layout": "quarter"},
    "layout of no text": GOOD | {"layout": ["half"]},
    "negative begin": GOOD | {"begin": -1},
    "huge begin": GOOD | {"begin": MAX_DIMS + 1},
    "begin of a bool": GOOD | {"begin": False},
    "odd": GOOD | {"n_dims": 3},
    "none turn": GOOD | {"n_dims": 0, "inv_freq": []},
    "float size": GOOD | {"n_dims": 4.0},
    "huge": GOOD | {"n_dims": 1 << 40},
    "too few frequencies": GOOD | {"inv_freq": [1.0]},
    "integers": GOOD | {"inv_freq": [1, 0]},
    "nan": GOOD | {"inv_freq": [1.0, math.nan]},
    "infinity": GOOD | {"inv_freq": [math.inf, 1.0]},
    "more than half a turn": GOOD | {"inv_freq": [3.2, 1.0]},
    "a tuple": GOOD | {"inv_freq": (1.0, 0.01)},
}


def powers(theta: float, n_dims: int, layout: str = "half", begin: int = 0) -> Rotary:
    exponents = torch.arange(0, n_dims, 2, dtype=torch.int64).float() / n_dims
    return Rotary(layout, begin, n_dims, tuple((1.0 / theta**exponents).tolist()))


@st.composite
def rotaries(draw: st.DrawFn) -> tuple[Rotary, int]:
    """Any rotation, and a width that holds it."""
    begin, n_pairs, rest = draw(st.integers(0, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    angle = st.floats(-math.pi, math.pi)
    angles = tuple(draw(st.lists(angle, min_size=n_pairs, max_size=n_pairs)))
    rotary = Rotary(draw(st.sampled_from(ROTARY_LAYOUTS)), begin, 2 * n_pairs, angles)
    return rotary, begin + 2 * n_pairs + rest


@given(rotaries(), st.integers(0, 5), st.integers(0, 1 << 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_undone_and_redone_keys_are_the_same(shape: tuple[Rotary, int], n: int, first: int, seed: int) -> None:
    rotary, head_dim = shape
    keys = torch.randn(2, 3, n, head_dim, generator=torch.Generator().manual_seed(seed))
    before = keys.clone()
    positions = torch.arange(first, first + n)
    turned = rotary.redo(keys, positions)
    torch.testing.assert_close(rotary.undo(turned, positions), keys, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(keys, before)
    assert Rotary.from_dict(rotary.as_dict()) == rotary


def test_pairs_turn_as_written() -> None:
    keys = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0, 9.0]])
    cos, sin = math.cos(3.0), math.sin(3.0)
    half = Rotary("half", 1, 4, (1.0, 0.0)).redo(keys, torch.tensor([3]))
    expected = [9.0, cos - 3 * sin, 2.0, 3 * cos + sin, 4.0, 9.0]
    torch.testing.assert_close(half, torch.tensor([expected]))
    interleaved = Rotary("interleaved", 1, 4, (1.0, 0.0)).redo(keys, torch.tensor([3]))
    expected = [9.0, cos - 2 * sin, 2 * cos + sin, 3.0, 4.0, 9.0]
    torch.testing.assert_close(interleaved, torch.tensor([expected]))


def test_each_row_has_its_own_positions() -> None:
    rotary, keys = powers(1e4, 8), torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 11, 13, 15]])[:, None]
    whole = rotary.undo(keys, positions)
    for row in range(2):
        assert torch.equal(whole[row], rotary.undo(keys[row], positions[row]))


@pytest.mark.parametrize("plain", BAD.values(), ids=BAD)
def test_a_damaged_description_is_refused(plain: object) -> None:
    assert Rotary.from_dict(GOOD).as_dict() == GOOD
    with pytest.raises(FormatError, match="rotary embedding"):
        Rotary.from_dict(plain)


def test_keys_narrower_than_the_slice_are_refused() -> None:
    with pytest.raises(IntegrityError, match="at least 6 channels"):
        Rotary("half", 2, 4, (1.0, 0.1)).redo(torch.zeros(1, 5), torch.tensor([0]))


def samples(rotary: Rotary, head_dim: int, positions: tuple[int, ...] = (1, 2, 4, 18, 102, 900)) -> Any:
    keys = torch.randn(6, head_dim, generator=torch.Generator().manual_seed(0))
    return {p: rotary.redo(keys[:, None], torch.tensor([p]))[:, 0] for p in positions}


@pytest.mark.parametrize("layout", ROTARY_LAYOUTS)
@pytest.mark.parametrize(("begin", "n_dims"), [(0, 32), (0, 8), (24, 8), (8, 16)])
def test_a_rotation_is_measured_without_a_table(layout: str, begin: int, n_dims: int) -> None:
    rotary = powers(1e4, n_dims, layout, begin)
    found = fit(samples(rotary, 32), [], 1e-3).rotary
    assert found is not None
    assert (found.layout, found.begin, found.n_dims) == (layout, begin, n_dims)
    assert found.inv_freq == pytest.approx(rotary.inv_freq, abs=1e-8)


def test_the_models_own_table_is_taken_even_where_it_turns_backwards_or_in_another_order() -> None:
    table = torch.tensor([1.0, 0.3, 0.02, 0.0])
    turned = Rotary("half", 0, 8, tuple((-table[[2, 0, 3, 1]]).tolist()))
    rounded = {p: k.bfloat16() for p, k in samples(turned, 8).items()}
    assert fit(rounded, [table], 4e-2).rotary == turned


def test_of_two_tables_the_right_one_is_taken_in_bfloat16() -> None:
    tables = [torch.tensor(powers(theta, 16).inv_freq) for theta in (1e4, 2e4, 1e6)]
    rounded = {p: k.bfloat16() for p, k in samples(powers(2e4, 16), 16).items()}
    assert fit(rounded, tables, 4e-2).rotary == powers(2e4, 16)


def test_what_is_no_rotation_is_not_taken_for_one() -> None:
    keys = {p: torch.randn(6, 8) for p in (1, 2, 4, 18)}
    assert fit(keys, [], 1e-3) == rotary_fit.Found(reason=rotary_fit.NO_ROTATION)
    same = dict.fromkeys((1, 2, 4), keys[1])
    assert fit(same, [], 1e-3) == rotary_fit.Found(reason=rotary_fit.FIXED)
    mixed = {p: k @ torch.linalg.qr(keys[p].T @ keys[p])[0] for p, k in dict.fromkeys((1, 2, 4), keys[1]).items()}
    assert fit(mixed, [], 1e-3) == rotary_fit.Found(reason=rotary_fit.NO_PAIRS)
    jumping = samples(Rotary("half", 0, 8, (1.0, 0.5, 0.2, 0.1)), 8)
    jumping[902] = jumping.pop(900)
    assert fit(jumping, [], 1e-3) == rotary_fit.Found(reason=rotary_fit.NO_FREQUENCY)


Fact = tuple[str, str, int, int, float] | None
"""Of one cache layer: which tensor turns, its layout, first channel, channels, and the base of its frequencies."""


def keys(layout: str, n_dims: int, theta: float = 1e4, begin: int = 0) -> Fact:
    return "keys", layout, begin, n_dims, theta


def latent(layout: str, n_dims: int) -> Fact:
    return "values", layout, 0, n_dims, 1e4


# As `apply_rotary_pos_emb`, `rotate_half` and the configuration of each architecture say it.
FACTS: dict[str, list[Fact]] = {
    "llama": [keys("half", 8)] * 2,
    "mistral": [keys("half", 8)] * 2,
    "qwen3": [keys("half", 8)] * 2,
    "falcon": [keys("half", 8)] * 2,
    # Partial: a quarter or a half of the channels.
    "gpt_neox": [keys("half", 2)] * 2,
    "phi": [keys("half", 4)] * 2,
    "nemotron": [keys("half", 4)] * 2,
    "glm": [keys("interleaved", 4)] * 2,
    "gptj": [keys("interleaved", 4)] * 2,
    "codegen": [keys("interleaved", 4)] * 2,
    # Whole heads in pairs of neighbours; RoFormer takes no positions, and llama 4 turns complex numbers.
    "cohere": [keys("interleaved", 8, 5e5)] * 2,
    "ernie4_5": [keys("interleaved", 8, 5e5)] * 2,
    "helium": [keys("interleaved", 8, 1e5)] * 2,
    "roformer": [keys("interleaved", 8)] * 2,
    # Layers that do not turn at all, after layers that do.
    "llama4_text": [keys("interleaved", 8, 5e5), None],
    "cohere2": [keys("interleaved", 8), None],
    "smollm3": [keys("half", 8, 2e6), None],
    # Another base for each type of layer.
    "gemma3_text": [keys("half", 8), keys("half", 8, 1e6)],
    "zaya": [keys("half", 4, 5e6), keys("half", 4)],
    # Latent attention caches its rotated part as the values; it comes de-interleaved out of DeepSeek-V3's rotation.
    "deepseek_v2": [latent("interleaved", 16)] * 2,
    "deepseek_v3": [latent("half", 16)] * 2,
    "deepseek_v4": [keys("interleaved", 8, 16e4, begin=8)] * 3,
    # Recurrent layers have no keys.
    "recurrent_gemma": [None, keys("half", 4)],
    "jamba": [None, None],
    # Positions that are added or biased, not turned.
    "gpt2": [None] * 2,
    "bart": [None] * 2,
    "bloom": [None] * 2,
    "mpt": [None] * 2,
}


def small(name: str) -> Any:
    return build(causal.CASES[name], name, auto.MODEL_FOR_CAUSAL_LM_MAPPING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FACTS)
def test_architecture(name: str) -> None:
    found = rotary_of(small(name))
    assert len(found) == len(FACTS[name])
    for layer, fact in zip(found, FACTS[name], strict=True):
        if fact is None:
            assert layer == {}
            continue
        tensor, layout, begin, n_dims, theta = fact
        assert layer.keys() == {tensor}
        assert (layer[tensor].layout, layer[tensor].begin, layer[tensor].n_dims) == (layout, begin, n_dims)
        assert layer[tensor].inv_freq == pytest.approx(powers(theta, n_dims).inv_freq, rel=1e-3, abs=2e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "glm", "gptj", "roformer", "deepseek_v3", "gpt_oss", "gemma4_text"])
def test_equal_tokens_of_an_ordinary_prompt_have_equal_keys_once_undone(name: str) -> None:
    model = small(name)
    ((tensor, rotary),) = rotary_of(model)[0].items()
    ids = torch.tensor([[70, 80, 70, 90, 100, 70, 110, 120, 70]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    cached = dump_cache(mark_cache(cache, model.config.model_type)).layers[0].tensors[tensor]
    undone = rotary.undo(cached, torch.arange(9))
    at = ids[0] == 70
    assert float((cached[..., at, :] - cached[..., :1, :]).norm(dim=-1).max()) > 0.05 * float(
        cached.norm(dim=-1).max()
    )
    torch.testing.assert_close(
        undone[..., at, :], undone[..., :1, :].expand_as(undone[..., at, :]), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_the_keys_of_an_indexer_are_found_beside_those_of_the_layer() -> None:
    for layer in rotary_of(small("deepseek_v32")):
        assert layer.keys() == {"values", "index_keys"}
    assert rotary_of(small("minimax_m3_vl_text"))[1].keys() == {"keys", "index_keys"}


@pytest.mark.filterwarnings("ignore")
def test_tables_that_are_no_powers_are_taken_from_the_model() -> None:
    yarn, proportional = small("gpt_oss"), small("gemma4_text")
    own = tuple(yarn.model.rotary_emb.inv_freq.tolist())
    assert [layer["keys"].inv_freq for layer in rotary_of(yarn)] == [own, own]
    # Gemma 4 turns a quarter of the channels, of both halves of a head.
    full = rotary_of(proportional)[1]["keys"]
    assert (full.n_dims, full.inv_freq[2:]) == (16, (0.0,) * 6)


def longrope() -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 8.0,
    }
    config = Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config)


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES | {"max_position_embeddings": 64}, rope_parameters=rope)
    )


@pytest.mark.parametrize("make", [longrope, dynamic], ids=["longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length(make: Any) -> None:
    model = make()
    short, long = rotary_of(model, n_tokens=10)[0]["keys"], rotary_of(model, n_tokens=100)[0]["keys"]
    assert short == rotary_of(model)[0]["keys"]
    assert all(a >= b for a, b in zip(short.inv_freq, long.inv_freq, strict=True)) and short != long
    if make is longrope:
        expected = [a / b for a, b in zip(powers(1e4, 8).inv_freq, (2.0, 3.0, 4.0, 5.0), strict=True)]
    else:
        expected = list(powers(1e4 * (4.0 * 100 / 64 - 3.0) ** (8 / 6), 8).inv_freq)
    assert long.inv_freq == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_bfloat16(kind: str) -> None:
    exact, rounded = (rotary_of(tiny_model(kind, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(exact, rounded, strict=True):
        assert (a["keys"].layout, a["keys"].n_dims) == (b["keys"].layout, b["keys"].n_dims)
        # Casting a whole model rounds its table as well.
        assert b["keys"].inv_freq == pytest.approx(a["keys"].inv_freq, rel=4e-3)


@pytest.mark.parametrize("make", [tiny_model, longrope, dynamic], ids=["llama", "longrope", "dynamic"])
def test_a_model_is_left_as_it_was(make: Any) -> None:
    model = make().train()
    model.model.layers[0].eval()
    attributes = {name: copy.copy(vars(m)) for name, m in model.named_modules()}
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    rotary_of(model, n_tokens=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (model, model.model.layers[0])] == [True, False]
    for name, module in model.named_modules():
        assert vars(module) == attributes[name]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])


def test_a_model_in_training_is_measured_without_its_dropout() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=0.5))
    expected = rotary_of(model.eval())
    assert expected[1].keys() == {"keys"}
    assert rotary_of(model.train()) == expected


def test_random_numbers_drawn_while_a_model_is_tried_are_not_missed_later(model: Any) -> None:
    state = torch.get_rng_state()
    with undisturbed(model):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_reasons_are_told() -> None:
    gpt2 = measured(tiny_model("gpt2"))
    assert {found.reason for layer in gpt2.layers for found in layer.values()} == {rotary_fit.NO_ROTATION}
    llama = measured(tiny_model())
    assert [layer["values"].reason for layer in llama.layers] == [rotary_fit.FIXED] * 2
    broken = tiny_model()
    broken.model.embed_tokens = torch.nn.Embedding(3, 32)
    assert measured(broken).layers == () and "IndexError" in measured(broken).reason
    with pytest.raises(UnsupportedModelError):
        rotary_of(torch.nn.Linear(2, 2))
