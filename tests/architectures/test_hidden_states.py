"""Of every architecture, what the blocks hear is what transformers gives as hidden states, bit for bit."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.models.auto.modeling_auto as auto
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5EncoderModel
from transformers.utils import ModelOutput

from architectures import sweep
from architectures.cases import Case, build, tokens
from architectures.image_text import noise
from semq_state.errors import UnsupportedModelError
from semq_state.hidden.stacks import Stack, input_of, output_of, stacks_of

MASKED: dict[str, Case] = {
    **dict.fromkeys(("albert", "bert", "roberta", "electra", "xlm-roberta", "mpnet", "deberta-v2"), Case()),
    "distilbert": Case({"hidden_dim": 48}),
    "modernbert": Case({"layer_types": ["full_attention", "sliding_attention"]}),
}
READ: dict[str, Case] = {
    **MASKED,
    **dict.fromkeys(("big_bird", "clip_text_model", "flaubert", "funnel", "longformer", "squeezebert"), Case()),
}
SPOKEN = {
    "whisper": Case(
        {"max_source_positions": 16},
        inputs=lambda model: {"input_features": noise(1, model.config.num_mel_bins, 32)},
    ),
    "speech_to_text": Case(inputs=lambda model: {"input_features": noise(1, 32, 80)}),
}
MAPPINGS = {
    **sweep.MAPPINGS,
    "read": (auto.MODEL_MAPPING, READ),
    "masked": (auto.MODEL_FOR_MASKED_LM_MAPPING, MASKED),
    "spoken": (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, SPOKEN),
}
CASES = {
    f"{mapping}-{name}": (mapping, name)
    for mapping, (_, known) in MAPPINGS.items()
    for name, case in known.items()
    if not case.impossible
}
LISTENING = replace(
    sweep.MAPPINGS["seq2seq"][1]["voxtral_realtime"],
    inputs=lambda model: {"input_ids": tokens(1, 32), "input_features": noise(1, 128, 256)},
)
"""In `generate` its sound runs ahead of the prompt; in one forward call both are of one length."""

AFTER_BLOCKS = (
    "transformers counts from the state after the first block; the last it gives before and after the norm"
)
DEEPSTACK = "image features are added between two blocks; transformers gives the state before that"
# fmt: off
DIFFERS = {
    **dict.fromkeys(
        ("causal-mamba", "causal-mamba2", "causal-falcon_mamba", "causal-rwkv"), (AFTER_BLOCKS, "0 1 out 0")
    ),
    "causal-mllama": ("without an image some blocks are skipped; transformers counts only the others", "3 states"),
    "image-text-blip": ("transformers gives the states of its image encoder", "0 1 2 out 0"),
    **dict.fromkeys(
        ("image-text-cohere_compass", "image-text-cosmos3_omni", "image-text-granite4_vision",
         "image-text-granite_docling", "image-text-qwen3_omni_moe_thinker", "image-text-qwen3_vl",
         "image-text-qwen3_vl_moe"),
        (DEEPSTACK, "1"),
    ),
    "image-text-git": ("the states of the image stand before those of the tokens", "more than tokens"),
    "image-text-idefics": ("the image is attended to between two blocks; transformers gives the state before", "1"),
    "read-clip_text_model": ("transformers gives the last state as it is before the final norm", "2"),
}
"""Where other states are heard: why, and which differ (`out 0`: what block 0 returned, from state 1)."""

SEVERAL = "one list of blocks, as many as it has layers"
REFUSED = {
    "causal-blt": SEVERAL,
    "causal-cpmant": "a learnt prompt before the sequence",
    **dict.fromkeys(
        ("causal-gemma3n", "causal-gemma3n_text", "image-text-gemma3n"), "(streams, batch, seq, hidden)"
    ),
    "causal-hrm_text": "found model.L_module.layers, model.H_module.layers",
    **dict.fromkeys(("causal-prophetnet", "seq2seq-prophetnet"), "once more for each n-gram"),
    "causal-reformer": "reversible blocks",
    "causal-xlm": "found transformer.attentions, transformer.ffns",
    "causal-xlnet": "(seq, batch, hidden)",
    "seq2seq-fsmt": "FSMTDecoder",
    "read-albert": "found encoder.albert_layer_groups",
    "masked-albert": "found albert.encoder.albert_layer_groups",
    "read-big_bird": "padded to their block size",
    "read-flaubert": "found attentions, ffns",
    "read-funnel": SEVERAL,
    "read-longformer": "padded to their window",
    "read-squeezebert": "(batch, hidden, seq)",
}
"""What of the message tells why."""

WITHOUT_ENCODER = {
    "seq2seq-bigbird_pegasus": "blocks that hear the sequence padded to their block size",
    "seq2seq-led": "blocks that hear the sequence padded to their window",
    "seq2seq-pegasus_x": "blocks that hear the sequence padded to their window",
    **dict.fromkeys(
        ("image-text-pix2struct", "image-text-pp_formulanet", "image-text-vision-encoder-decoder"), "it sees images"
    ),
}
# fmt: on


class Heard:
    """What the blocks of a stack are called with and return, call by call, and the last state."""

    def __init__(self, n: int) -> None:
        self.inputs: list[list[torch.Tensor]] = [[] for _ in range(n)]
        self.outputs: list[list[torch.Tensor]] = [[] for _ in range(n)]
        self.last: list[torch.Tensor] = []


@contextmanager
def heard_in(stack: Stack) -> Iterator[Heard]:
    heard, handles = Heard(len(stack.blocks)), []

    # Copies, as a model may write into its states later.
    def before(into: list[torch.Tensor]) -> Callable[..., None]:
        return lambda module, args, kwargs: into.append(input_of(args, kwargs).clone())

    def after(into: list[torch.Tensor]) -> Callable[..., None]:
        return lambda module, args, output: into.append(output_of(output).clone())

    for block, inputs, outputs in zip(stack.blocks, heard.inputs, heard.outputs, strict=True):
        handles.append(block.register_forward_pre_hook(before(inputs), with_kwargs=True))
        handles.append(block.register_forward_hook(after(outputs)))
    handles.append(stack.last.register_forward_hook(after(heard.last)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def built(id_: str) -> tuple[Any, dict[str, Any]]:
    """The small model, and what one forward call of it is given."""
    mapping, name = CASES[id_]
    auto_mapping, cases = MAPPINGS[mapping]
    case = LISTENING if name == "voxtral_realtime" else cases[name]
    model = build(case, name, auto_mapping)
    inputs = copy.deepcopy(case.inputs(model))
    if model.config.is_encoder_decoder:
        inputs.setdefault("decoder_input_ids", tokens(1, 5))
    return model, inputs


def given_by(output: Any, stack: Stack) -> tuple[torch.Tensor, ...]:
    """The hidden states of this stack that transformers gives, none if it gives none."""
    output = output.get("language_model_outputs", output)
    names = ("encoder_hidden_states",) if stack.name else ("decoder_hidden_states", "hidden_states")
    return next((output[name] for name in names if output.get(name) is not None), ())


def differences(heard: Heard, given: tuple[torch.Tensor, ...], ids: torch.Tensor | None) -> str:
    """The numbers of the states that differ, and those of the blocks that return another state than the next."""
    if len(given) != len(heard.inputs) + 1:
        return f"{len(given)} states"
    states = [*heard.inputs, heard.last]
    differing = [str(i) for i, found in enumerate(states) if not same(found, given[i])]
    differing += [f"out {i}" for i, found in enumerate(heard.outputs[:-1]) if not same(found, given[i + 1])]
    if ids is not None and any(state.shape[:2] != ids.shape for state in heard.last):
        differing.append("more than tokens")
    return " ".join(differing)


def same(found: list[torch.Tensor], given: Any) -> bool:
    return len(found) == 1 and isinstance(given, torch.Tensor) and torch.equal(found[0], given)


def found_in(model: Any, inputs: dict[str, Any]) -> dict[str, str]:
    """By name of each stack, what differs in one forward call."""
    stacks = stacks_of(model)
    with ExitStack() as listening, torch.no_grad():
        heard = [listening.enter_context(heard_in(stack)) for stack in stacks]
        output = model(**inputs, output_hidden_states=True)
    ids = {"": inputs.get("decoder_input_ids", inputs.get("input_ids"))}
    found = {
        stack.name: differences(each, given_by(output, stack), ids.get(stack.name))
        for stack, each in zip(stacks, heard, strict=True)
    }
    if output.get("encoder_hidden_states") is not None:
        found.setdefault("encoder", "no stack")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("id_", CASES)
def test_the_hidden_states_of_transformers_are_heard(id_: str) -> None:
    sweep.quiet()
    model, inputs = built(id_)
    if id_ in REFUSED:
        with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[id_])):
            stacks_of(model)
        return
    found = found_in(model, inputs)
    assert found.pop("encoder", "") == ("no stack" if id_ in WITHOUT_ENCODER else "")
    assert found == {"": DIFFERS[id_][1] if id_ in DIFFERS else ""}


def test_the_tables_name_only_what_is_tried_and_little_of_it() -> None:
    assert {*DIFFERS, *REFUSED, *WITHOUT_ENCODER} <= set(CASES)
    assert not set(DIFFERS) & set(REFUSED)
    of_generators = {id_ for id_, (mapping, _) in CASES.items() if mapping in sweep.MAPPINGS}
    assert len(of_generators & {*DIFFERS, *REFUSED}) < 0.1 * len(of_generators)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_without_its_decoder_is_what_the_model_reads() -> None:
    sweep.quiet()
    model = T5EncoderModel(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)).eval()
    (stack,) = stacks_of(model)
    assert (stack.name, stack.root, stack.path) == ("", model, "encoder.block")
    assert found_in(model, {"input_ids": tokens()}) == {"": ""}


@pytest.mark.filterwarnings("ignore")
def test_blocks_are_found_in_adapters_and_compiled_models() -> None:
    model, _ = built("causal-llama")
    (plain,) = stacks_of(model)
    assert stacks_of(torch.compile(model))[0].blocks == plain.blocks
    (adapted,) = stacks_of(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert (adapted.root, adapted.path, adapted.blocks) == (model, plain.path, plain.blocks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.__setitem__(1, layers[0]),
        lambda layers: layers.append(copy.deepcopy(layers[0])),
        lambda layers: layers.__setitem__(1, torch.nn.Linear(32, 32)),
        lambda layers: layers[1].add_module("inner", copy.deepcopy(layers[0])),
    ],
    ids=["one twice", "more than layers", "one of another kind", "one in another"],
)
def test_lists_that_are_not_one_block_a_layer_are_refused(change: Callable[[Any], None]) -> None:
    model, _ = built("causal-llama")
    change(model.model.layers)
    with pytest.raises(UnsupportedModelError, match=r"found model\.layers; name modules instead: HiddenStates\("):
        stacks_of(model)


@pytest.mark.filterwarnings("ignore")
def test_one_block_twice_is_refused_where_transformers_does_not_say_what_it_records() -> None:
    model, _ = built("causal-gptj")
    model.transformer.h[1] = model.transformer.h[0]
    with pytest.raises(UnsupportedModelError, match=r"found transformer\.h;"):
        stacks_of(model)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear: expected a transformers model"):
        stacks_of(torch.nn.Linear(2, 2))


def test_states_are_read_where_blocks_put_them() -> None:
    states, other = torch.zeros(1, 2, 3), torch.ones(1)
    assert input_of((None, states, other), {}) is input_of((), {"mask": other, "hidden_states": states}) is states
    assert output_of(states) is output_of((None, states, other)) is output_of([states]) is states
    assert output_of(ModelOutput(first=other, last_hidden_state=states)) is states
    assert output_of(ModelOutput(first=states, second=other)) is states
    assert input_of((3,), {"mask": other}) is output_of(None) is output_of((None, 3)) is None
