"""Where the hidden states of a live model flow: the blocks of its sequences, and how to read what passes them.

Numbering is that of transformers' `output_hidden_states=True`: state `i` is what block `i` is called with, and the
last one, behind all blocks, what the model hands to its heads, normally after the final norm. Where something is
added between two blocks (image features, say), a block is called with another state than the one before returned.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.errors import UnsupportedModelError

STATES = ("hidden_states", "inputs_embeds", "hidden_state", "x")
"""Keywords under which a block may be given its states."""

_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers",
    "encoder_layers", "num_encoder_layers",
)  # fmt: skip
_READ = {"input_ids", "inputs_embeds"}
_LISTENED_TO = {"input_features"}
_BEFORE_HEAD = {"Pix2StructTextModel": "final_layer_norm"}
"""Of models that have their blocks and their head in one: what the head is given."""

_OTHER_STATES = {
    "BigBirdLayer": "blocks that hear the sequence padded to their block size",
    "BigBirdPegasusEncoderLayer": "blocks that hear the sequence padded to their block size",
    "CpmAntTransformerBlock": "blocks that hear a learnt prompt before the sequence",
    "Gemma3nTextDecoderLayer": "states of shape (streams, batch, seq, hidden)",
    "LEDEncoderLayer": "blocks that hear the sequence padded to their window",
    "LongformerLayer": "blocks that hear the sequence padded to their window",
    "MusicgenMelodyDecoderLayer": "blocks that hear what the decoder is conditioned on before the sequence",
    "PegasusXEncoderLayer": "blocks that hear the sequence padded to their window, and global tokens beside it",
    "ProphetNetDecoderLayer": "blocks that hear the sequence once more for each n-gram",
    "ReformerLayer": "reversible blocks, with two states each",
    "SqueezeBertModule": "states of shape (batch, hidden, seq)",
    "XLNetLayer": "states of shape (seq, batch, hidden)",
}
"""Blocks whose states are not those of the sequence that the model is given, one for each of its tokens.

Those of BigBird are where attention is full.
"""


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of one sequence of a model, first block first.

    Args:
        name: `""` for the sequence that the model generates or reads; `encoder` for the encoder beside a decoder.
        root: the module whose forward call takes the `input_ids` (or `inputs_embeds`) and the `attention_mask` of
            this sequence: the model itself, or of an encoder-decoder the decoder and the encoder.
        path: where the list of blocks is in the model (inside adapters and `torch.compile`), `model.layers` say.
        blocks: the modules, each called once in a forward call (or skipped by the model), with states
            `(batch, seq, hidden)`, or `(batch, seq, streams, hidden)` where there are several residual streams;
            `seq` is more than the tokens where a model puts images beside them itself (GIT).
        last: the module whose output is the last state; `output_of` reads it.
    """

    name: str
    root: torch.nn.Module
    path: str
    blocks: tuple[torch.nn.Module, ...]
    last: torch.nn.Module


@dataclass(frozen=True, eq=False)
class _Found:
    """A list of blocks; no blocks where it is not sure that each is called once, one after the other."""

    owner: Any
    path: str
    blocks: tuple[torch.nn.Module, ...]


def stacks_of(model: Any) -> tuple[Stack, ...]:
    """The stacks of a transformers model: `""`, and `encoder` where one stands beside a decoder.

    Vision towers are no stacks, and an encoder whose blocks cannot be found or hear another sequence is left out.

    Raises:
        UnsupportedModelError: of the sequence that the model generates or reads, there is no list of blocks, or
            more than one, or the blocks hear another sequence.
    """
    whole = getattr(model, "_orig_mod", model)
    whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if not _is_part(whole):
        raise _refusal(model, expected="a transformers model", found="another object")
    speaking = _speaking(whole)
    decoder = speaking.get_decoder()
    if not speaking.config.is_encoder_decoder or decoder is speaking:
        alone = _blocks_of(whole, speaking, _READ)
        return (Stack("", whole, alone.path, alone.blocks, _last_of(whole, alone.owner)),)
    if not _is_part(decoder):
        raise _refusal(whole, expected="a decoder that is a model", found=type(decoder).__name__)
    found = [_stack("", whole, decoder, _READ)]
    encoder = speaking.get_encoder()
    if _is_part(encoder) and encoder is not speaking:
        with contextlib.suppress(UnsupportedModelError):
            found.append(_stack("encoder", whole, encoder, _READ | _LISTENED_TO))
    return tuple(found)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The states that a block is called with: the first tensor by position, or under a name of `STATES`."""
    named = (kwargs.get(name) for name in STATES)
    return next((value for value in (*args, *named) if isinstance(value, torch.Tensor)), None)


def output_of(output: Any) -> torch.Tensor | None:
    """The states that a module returns: the tensor, `last_hidden_state`, or the first tensor of several."""
    if isinstance(output, Mapping):
        last = output.get("last_hidden_state")
        output = tuple(output.values()) if last is None else last
    several = output if isinstance(output, (tuple, list)) else (output,)
    return next((value for value in several if isinstance(value, torch.Tensor)), None)


def _is_part(module: Any) -> bool:
    """Whether it is a model of transformers, which has a configuration and may say what it records."""
    return isinstance(module, torch.nn.Module) and hasattr(module, "get_decoder") and hasattr(module, "config")


def _speaking(whole: Any) -> Any:
    """The encoder-decoder that an image-text model speaks with, or else the model itself."""
    part = whole
    while not part.config.is_encoder_decoder:
        inner = part.get_decoder()
        if inner is part or not _is_part(inner):
            return whole
        part = inner
    return part


def _stack(name: str, whole: Any, part: Any, inputs: set[str]) -> Stack:
    found = _blocks_of(whole, part, inputs)
    return Stack(name, found.owner, found.path, found.blocks, _last_of(whole, found.owner))


def _blocks_of(whole: Any, part: Any, inputs: set[str]) -> _Found:
    """The blocks of what `part` takes as one of `inputs`, with their path in `whole`."""
    paths = {module: path for path, module in whole.named_modules()}
    texts = _text_configs(part)
    found = [
        _Found(owner, paths[blocks], _in_order(owner, blocks, recorded))
        for owner in part.modules()
        if _is_part(owner) and type(owner.config) in texts and _takes(owner, inputs)
        for blocks, recorded in _lists_of(owner)
    ]
    if len(found) > 1:
        inner = part.get_decoder()
        within = {inner, *inner.modules()} if isinstance(inner, torch.nn.Module) else set()
        found = [at for at in found if at.owner in within]
    if len(found) != 1 or not found[0].blocks:
        raise _refusal(
            whole,
            expected="one list of blocks, as many as it has layers, each with one hidden state",
            found=", ".join(at.path for at in found) or "none",
        )
    kinds = {type(block).__name__ for block in found[0].blocks}
    if getattr(found[0].owner.config, "attention_type", None) != "original_full":
        for kind in kinds & set(_OTHER_STATES):
            raise _refusal(
                whole,
                expected="states (batch, seq, …) of the sequence that the model reads",
                found=_OTHER_STATES[kind],
            )
    return found[0]


def _last_of(whole: Any, owner: Any) -> torch.nn.Module:
    """The module that returns the last state: the model around the blocks, unless it has a head in it."""
    head = owner.get_output_embeddings()
    if head is None or isinstance(head, torch.nn.Embedding):
        return owner  # type: ignore[no-any-return]
    if type(owner).__name__ not in _BEFORE_HEAD:
        raise _refusal(whole, expected="a model without a head around its blocks", found=type(owner).__name__)
    return owner.get_submodule(_BEFORE_HEAD[type(owner).__name__])  # type: ignore[no-any-return]


def _takes(owner: Any, inputs: set[str]) -> bool:
    return not inputs.isdisjoint(inspect.signature(owner.forward).parameters)


def _text_configs(part: Any) -> set[type]:
    try:
        return {type(part.config), type(part.config.get_text_config(decoder=True))}
    except ValueError:
        return {type(part.config)}


def _lists_of(owner: Any) -> Iterator[tuple[torch.nn.ModuleList, set[torch.nn.Module] | None]]:
    """The lists that may be the blocks of `owner`, with what transformers records if it says so.

    It says so in `_can_record_outputs`. Where it does not, any list of modules with modules in them may be it.
    """
    lists = [module for module in _own(owner) if isinstance(module, torch.nn.ModuleList)]
    specs = (getattr(owner, "_can_record_outputs", None) or {}).get("hidden_states")
    if specs is None:
        yield from ((blocks, None) for blocks in lists if _are_composed(blocks))
        return
    recorded = set(_recorded(owner, specs if isinstance(specs, list) else [specs]))
    yield from ((blocks, recorded) for blocks in lists if not recorded.isdisjoint(blocks.modules()))


def _own(module: torch.nn.Module, *, lists: bool = False) -> Iterator[torch.nn.Module]:
    """What is inside a module, without the inside of other models and, unless asked for, that of lists."""
    for child in module.children():
        if _is_part(child):
            continue
        yield child
        if lists or not isinstance(child, torch.nn.ModuleList):
            yield from _own(child, lists=lists)


def _recorded(owner: torch.nn.Module, specs: Sequence[Any]) -> Iterator[torch.nn.Module]:
    kinds = tuple(kind for spec in specs if isinstance(kind := getattr(spec, "target_class", spec), type))
    return (module for module in _own(owner, lists=True) if isinstance(module, kinds))


def _are_composed(blocks: torch.nn.ModuleList) -> bool:
    return all(any(True for _ in block.children()) for block in blocks)


def _in_order(
    owner: Any, blocks: torch.nn.ModuleList, recorded: set[torch.nn.Module] | None
) -> tuple[torch.nn.Module, ...]:
    """The blocks, if they are as many as the model has layers and each has one state to record."""
    depths = {n for name in _DEPTHS if type(n := getattr(owner.config, name, None)) is int}
    if len(set(blocks)) != len(blocks) or len(blocks) not in depths:
        return ()
    if recorded is not None:
        per_block = [len(recorded.intersection(block.modules())) for block in blocks]
        if set(per_block) != {1} or sum(per_block) != len(recorded):
            return ()
    return tuple(blocks)


def _refusal(model: Any, *, expected: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the hidden states of {type(model).__name__}",
        expected=expected,
        found=found,
        do="name modules instead: HiddenStates(modules=...)",
    )
