"""The runs that `benchmarks.audit` judges: null runs, and runs in which something was changed that is not told."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import semq_state as sq
from semq_state.audit.nulls import null_runs
from semq_state.audit.rerun import recomputed
from semq_state.snapshot import CacheState, LayerState, Snapshot

N_PROMPT, N_NEW, N_FLOOR, N_HELD_OUT = 512, 32, 20, 10
CHANGED_LAYER = 15
_SYSTEM = "You are a careful assistant."
_LAST_TURN = "Now say in one sentence what the text above is about."


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run to judge.

    Args:
        name: what was done.
        snapshot: its state, told as if it were the reference's.
        hidden: last hidden states of all tokens, `(seq, hidden)`.
        layer: the lowest layer that it changed; None for a null run.
    """

    name: str
    snapshot: Snapshot
    hidden: torch.Tensor
    layer: int | None = None


def reference(model: Any, tokenizer: Any, text: str) -> tuple[Snapshot, torch.Tensor]:
    """A sampled answer to a chat of `N_PROMPT` tokens, with its trace; and the prompt without its last turn."""
    words = text.split()
    n_words = N_PROMPT
    while True:
        turns = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": "Read this. " + " ".join(words[:n_words])},
            {"role": "assistant", "content": "I have read it."},
            {"role": "user", "content": _LAST_TURN},
        ]
        ids = _ids(tokenizer, turns)
        if ids.shape[1] <= N_PROMPT:
            break
        n_words -= max(1, (ids.shape[1] - N_PROMPT) // 2)
    torch.manual_seed(0)
    with sq.capture(model, tokenizer=tokenizer, trace=True) as run:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, min_new_tokens=N_NEW,
            do_sample=True, temperature=0.7, top_k=50,
        )  # fmt: skip
    return run.snapshot(), _ids(tokenizer, turns[:2])


def nulls(model: Any, snapshot: Snapshot, n_runs: int, seed: int) -> Iterator[Run]:
    """The same tokens under other circumstances that should not matter."""
    hidden: list[torch.Tensor] = []
    with _hidden_states(model, hidden):
        for name, state in null_runs(snapshot, model, n_runs, vary=("threads", "chunks", "batch"), seed=seed):
            yield Run(name, state, _joined(hidden))
            hidden.clear()


def changed(model: Any, other: Any, snapshot: Snapshot, without_last_turn: torch.Tensor) -> Iterator[Run]:
    """Runs in which something was changed; each tells the reference's tokens and origin.

    Args:
        model: that made the snapshot.
        other: the same in another dtype.
        snapshot: the reference.
        without_last_turn: its prompt without the last turn.
    """
    yield Run("nothing (as recorded)", *_again(model, snapshot))
    with _attention(model, "eager"):
        # Keys and values of the first layer come before any attention.
        yield Run("eager attention for sdpa", *_again(model, snapshot), layer=1)
    yield Run("one word of the prompt", *_other_word(model, snapshot), layer=0)
    yield Run(f"{str(other.dtype)[6:]} for {snapshot.provenance.dtype}", *_again(other, snapshot), layer=0)
    for amount in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        name = f"weights of layer {CHANGED_LAYER} x (1 + {amount:g})"
        yield Run(name, *_again(_scaled(model, 1 + amount), snapshot), layer=CHANGED_LAYER)
    for bits in (8, 4):
        yield Run(f"weights rounded to {bits} bits by row", *_again(_rounded(model, bits), snapshot), layer=0)
    yield Run("last user turn dropped", *_dropped(model, snapshot, without_last_turn), layer=0)


def _ids(tokenizer: Any, turns: list[dict[str, str]]) -> torch.Tensor:
    ids: torch.Tensor = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return ids


def _again(model: Any, snapshot: Snapshot) -> tuple[Snapshot, torch.Tensor]:
    hidden: list[torch.Tensor] = []
    with _hidden_states(model, hidden):
        state = recomputed(snapshot, model)
    return _told_as(state, snapshot), _joined(hidden)


def _other_word(model: Any, snapshot: Snapshot) -> tuple[Snapshot, torch.Tensor]:
    """Another token in the middle of the prompt; the one that was there is told."""
    ids = snapshot.generation.input_ids.clone()
    ids[0, N_PROMPT // 2] = ids[0, N_PROMPT // 2 + 40]
    with_other = dataclasses.replace(snapshot, generation=dataclasses.replace(snapshot.generation, input_ids=ids))
    return _again_told(model, with_other, snapshot)


def _again_told(model: Any, real: Snapshot, told: Snapshot) -> tuple[Snapshot, torch.Tensor]:
    state, hidden = _again(model, real)
    return dataclasses.replace(
        state, generation=dataclasses.replace(state.generation, input_ids=told.generation.input_ids)
    ), hidden


def _dropped(model: Any, snapshot: Snapshot, without: torch.Tensor) -> tuple[Snapshot, torch.Tensor]:
    """The recorded answer after a prompt without its last turn; the whole prompt's tokens stand before it in the
    state, computed rightly, so that only what the answer was computed from differs."""
    state = snapshot.generation
    answer = state.input_ids[:, state.prompt_length :]
    ids = torch.cat([without, answer], dim=1)
    short = dataclasses.replace(
        snapshot,
        generation=dataclasses.replace(
            state, input_ids=ids, prompt_length=without.shape[1], n_cached=ids.shape[1] - 1,
            step_inputs={name: t[..., : ids.shape[1]] for name, t in state.step_inputs.items()},
        ),
        trace=snapshot.trace and dataclasses.replace(snapshot.trace, begin=without.shape[1]),
    )  # fmt: skip
    real, hidden = _again(model, short)
    honest, hidden_honest = _again(model, snapshot)
    n = answer.shape[1] - 1
    layers = tuple(
        LayerState(
            x.family,
            {
                name: torch.cat([x.tensors[name][..., :-n, :], y.tensors[name][..., -n:, :]], dim=-2)
                for name in x.tensors
            },
            x.meta,
        )
        for x, y in zip(honest.cache.layers, real.cache.layers, strict=True)
    )
    mixed = dataclasses.replace(
        honest,
        cache=CacheState(honest.cache.kind, layers, honest.cache.meta),
        generation=dataclasses.replace(honest.generation, logits=real.generation.logits),
        trace=real.trace and dataclasses.replace(real.trace, begin=state.prompt_length),
    )
    return mixed, torch.cat([hidden_honest[:-n], hidden[-n:]])


def _told_as(state: Snapshot, told: Snapshot) -> Snapshot:
    """The state in the dtype that is told."""
    dtype = told.cache.layers[0].tensors["keys"].dtype
    return dataclasses.replace(state.to(dtype=dtype), provenance=told.provenance, trace=state.trace)


@torch.no_grad()
def _scaled(model: Any, factor: float) -> Any:
    changed = copy.deepcopy(model)
    for weight in changed.model.layers[CHANGED_LAYER].parameters():
        weight.mul_(factor)
    return changed


@torch.no_grad()
def _rounded(model: Any, bits: int) -> Any:
    """Each row of each linear weight to the nearest of 2^bits - 1 levels between plus and minus its largest."""
    changed, levels = copy.deepcopy(model), 2 ** (bits - 1) - 1
    for module in changed.model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True) / levels
            module.weight.copy_((module.weight / scale).round() * scale)
    return changed


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _hidden_states(model: Any, into: list[torch.Tensor]) -> Iterator[None]:
    def hear(module: Any, args: Any, output: torch.Tensor) -> None:
        into.append(output[0].detach().clone())

    handle = model.model.norm.register_forward_hook(hear)
    try:
        yield
    finally:
        handle.remove()


def _joined(hidden: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(hidden)
