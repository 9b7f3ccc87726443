"""A whole snapshot, and what can be made of it: fewer tokens, other rows, branches, another device or dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from semq_state import content
from semq_state.errors import UnsupportedOperationError
from semq_state.provenance import Provenance
from semq_state.snapshot.cache import ABSENT, CacheState, Tensors, take_rows
from semq_state.snapshot.coding import Coding
from semq_state.snapshot.generation import GenerationState
from semq_state.snapshot.hidden import SEQUENCE, HiddenRows, hidden_tensors
from semq_state.snapshot.trace import Trace


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `crop` could not find again in a later state, kept as it was.

    Args:
        n_tokens: tokens of each row at that moment.
        cache: the layers that forget; dummies in place of the others.
        rng: torch's random state at that moment.
        attributes: what the model's modules kept of the run at that moment.
    """

    n_tokens: int
    cache: CacheState
    rng: Tensors = field(default_factory=dict)
    attributes: Tensors = field(default_factory=dict)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every tensor under its name in a file."""
        named = self.cache.tensors(prefix)
        named |= {f"{prefix}rng.{name}": t for name, t in sorted(self.rng.items())}
        return named | {f"{prefix}attributes.{name}": t for name, t in sorted(self.attributes.items())}

    def structure(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        names = {"rng": sorted(self.rng), "attributes": sorted(self.attributes)}
        return {"n_tokens": self.n_tokens, "cache": self.cache.structure(), **names}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a model after its last finished token, with its origin.

    Args:
        cache: the cache's tensors and scalars.
        generation: tokens, masks, random state and settings.
        provenance: the model that made it.
        known_digests: tensor name to the digests of its chunks, where a file has told and proved them.
        checkpoints: earlier moments to which `crop` can go back, earliest first.
        coding: of a state that was read from a compact file: how it had been coded, and with what error.
        coded_id: the identity of such a state, which is computed over its symbols; empty for any other.
        trace: the run token by token, where `capture(trace=True)` kept it.
        hidden: hidden states by stream of tokens, where `capture(hidden_states=…)` kept some: `sequence`, and
            `encoder` beside a decoder.
    """

    cache: CacheState
    generation: GenerationState
    provenance: Provenance
    known_digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    checkpoints: tuple[Checkpoint, ...] = ()
    coding: Coding | None = None
    coded_id: str = ""
    trace: Trace | None = None
    hidden: Mapping[str, HiddenRows] = field(default_factory=dict)

    @cached_property
    def state_id(self) -> str:
        """`sha256:…` of everything that this state is; the same wherever and under whatever lossless codec it is
        saved. Of a state read from a compact file it is that file's."""
        if self.coded_id:
            return self.coded_id
        tensors = self.tensors()
        digests = self.known_digests or content.all_digests(tensors)
        whole = content.content_digest(self.structure(), dict(content.specs_of(tensors)), digests)
        return content.state_id(whole, self.provenance.identity())

    @property
    def n_tokens(self) -> int:
        """Tokens so far in each row, prompt included."""
        return int(self.generation.input_ids.shape[-1])

    @property
    def n_new_tokens(self) -> int:
        """Tokens generated since the prompt, in each row."""
        return self.n_tokens - self.generation.prompt_length

    @property
    def batch_size(self) -> int:
        return int(self.generation.input_ids.shape[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state under its name in a file: layer by layer, the names of each in order."""
        named = {**self.cache.tensors(), **self.generation.tensors()}
        for i, checkpoint in enumerate(self.checkpoints):
            named |= checkpoint.tensors(f"checkpoints.{i}.")
        return named | (self.trace.tensors() if self.trace else {}) | hidden_tensors(self.hidden)

    def structure(self) -> dict[str, Any]:
        """Everything of the state that is not a tensor; with `tensors()` it is the whole state."""
        whole: dict[str, Any] = {"cache": self.cache.structure(), "generation": self.generation.structure()}
        if self.checkpoints:
            whole["checkpoints"] = [checkpoint.structure() for checkpoint in self.checkpoints]
        if self.trace:
            whole["trace"] = self.trace.structure()
        if self.hidden:
            whole["hidden"] = {name: each.structure() for name, each in sorted(self.hidden.items())}
        return whole

    def padding(self) -> torch.Tensor | None:
        """Which of the sequence's tokens are padding, `(batch, seq)` bool; None where none is."""
        inputs = self.generation.step_inputs
        mask = inputs.get("decoder_attention_mask")
        if mask is None and not any(name.startswith("encoder_outputs") for name in inputs):
            mask = inputs.get("attention_mask")
        if mask is None or mask.ndim != 2 or mask.shape[0] != self.batch_size or bool(mask.all()):
            return None
        return (mask == 0).cpu()

    def without_cache(self) -> Snapshot:
        """The hidden states and tokens alone, from which nothing can go on. Shares memory."""
        state = self.generation
        kept = {name: t for name, t in state.step_inputs.items() if name.endswith("attention_mask")}
        return Snapshot(
            cache=CacheState(ABSENT),
            generation=GenerationState(
                input_ids=state.input_ids,
                prompt_length=state.prompt_length,
                n_cached=state.n_cached,
                finished=state.finished,
                step_inputs={name: t for name, t in kept.items() if "." not in name},
            ),
            provenance=self.provenance,
            hidden=self.hidden,
        )

    def crop(self, n_tokens: int) -> Snapshot:
        """The state after the first `n_tokens` tokens, as if the run had been stopped there. Shares memory.

        The last of them is fed again. The random state is that of the checkpoint at `n_tokens` where there is
        one, else the present one: what is then sampled is a branch. Greedy decoding needs neither.

        Args:
            n_tokens: tokens of each row that stay, at least 1.

        Raises:
            UnsupportedOperationError: a layer has forgotten that moment (the message says at which counts a
                checkpoint exists; `capture(checkpoints=…)` keeps some), or the state is of a beam search, or a
                processor or companion remembers the tokens that would go.

        Example:
            >>> snapshot.crop(snapshot.generation.prompt_length)  # doctest: +SKIP
        """
        if type(n_tokens) is not int or not 1 <= n_tokens <= self.n_tokens:
            raise UnsupportedOperationError(
                "crop", expected=f"1 to {self.n_tokens} tokens", found=repr(n_tokens), do="name a count in between"
            )
        if n_tokens == self.n_tokens:
            return self
        state = self.generation
        self._require_croppable()
        n_cut = self.n_tokens - n_tokens
        n_all = max(state.n_cached, self.n_tokens - 1) + 1
        n_cached = min(state.n_cached, n_all - n_cut - 1)
        kept = next((c for c in self.checkpoints if c.n_tokens == n_tokens), None)
        try:
            if kept is None and (changing := self._changing_attributes()):
                raise UnsupportedOperationError(
                    ", ".join(changing), expected="a state that still holds its past", found="attributes of modules"
                )
            cache = self.cache.crop(n_cached, kept.cache if kept else None)
        except UnsupportedOperationError as error:
            at = ", ".join(str(c.n_tokens) for c in self.checkpoints)
            raise UnsupportedOperationError(
                f"crop({n_tokens}), {error.where}",
                expected=error.expected,
                found=error.found,
                do=f"crop to a count at which a checkpoint exists: {at}"
                if at
                else "no checkpoint exists; capture(checkpoints=…) keeps some",
            ) from error
        return Snapshot(
            cache=cache,
            generation=dataclasses.replace(
                state,
                input_ids=state.input_ids[:, :n_tokens],
                prompt_length=min(state.prompt_length, n_tokens),
                n_cached=n_cached,
                finished=self._finished_by(n_tokens),
                logits=None,
                step_inputs={
                    name: t.narrow(-1, 0, t.shape[-1] - n_cut) if self._follows_tokens(name, t, n_all) else t
                    for name, t in state.step_inputs.items()
                },
                rng=kept.rng if kept else state.rng,
                attributes=kept.attributes if kept else state.attributes,
            ),
            provenance=self.provenance,
            checkpoints=tuple(c for c in self.checkpoints if c.n_tokens < n_tokens),
            trace=self.trace and self.trace.crop(n_tokens),
            hidden={
                name: each.crop(self._n_seen(n_all - n_cut - 1)) if name == SEQUENCE else each
                for name, each in self.hidden.items()
            },
        )

    def select(self, rows: Sequence[int]) -> Snapshot:
        """The state with these rows of the batch, in this order; a row may be named more than once.

        Args:
            rows: numbers of rows, negative ones counted from the end. Of a beam search: numbers of prompts.

        Raises:
            UnsupportedOperationError: no rows, one that is not there, or a state that cannot be taken apart.

        Example:
            >>> first_row_twice = snapshot.select([0, 0])  # doctest: +SKIP
        """
        state = self.generation
        n_beams = self.batch_size // state.search["scores"].shape[0] if state.search else 1
        n_rows = self.batch_size // n_beams
        given = list(rows)
        if not given or any(type(i) is not int or not -n_rows <= i < n_rows for i in given):
            raise UnsupportedOperationError(
                "select", expected=f"rows of 0 to {n_rows - 1}", found=repr(given), do="name rows that are there"
            )
        if any(p.tensors for p in state.processors):
            names = ", ".join(p.name for p in state.processors if p.tensors)
            raise UnsupportedOperationError(
                "select", expected="processors without tensors of their own", found=names, do="keep all rows"
            )
        prompts = torch.tensor(given) % n_rows
        index = (prompts[:, None] * n_beams + torch.arange(n_beams)).flatten()

        def taken(tensors: Tensors) -> dict[str, torch.Tensor]:
            return {name: take_rows(t, index, _batch_axis(name, t, self.batch_size)) for name, t in tensors.items()}

        return Snapshot(
            cache=self.cache.select(index),
            generation=dataclasses.replace(
                state,
                input_ids=take_rows(state.input_ids, index),
                finished=take_rows(state.finished, index),
                logits=None if state.logits is None else take_rows(state.logits, index),
                step_inputs=taken(state.step_inputs),
                search={name: _search_rows(name, t, prompts, n_beams) for name, t in state.search.items()},
                companions={name: c.select(index) for name, c in state.companions.items()},
                attributes=taken(state.attributes),
            ),
            provenance=self.provenance,
            checkpoints=tuple(
                dataclasses.replace(c, cache=c.cache.select(index), attributes=taken(c.attributes))
                for c in self.checkpoints
            ),
            trace=self.trace and self.trace.select(index),
            hidden={name: each.select(index.tolist()) for name, each in self.hidden.items()},
        )

    def fork(self, n: int, *, seeds: Sequence[int] | None = None) -> tuple[Snapshot, ...]:
        """`n` branches of this state, which share its memory.

        Args:
            n: how many.
            seeds: a random stream of the CPU's generator for each; without them all go on with the present one.

        Example:
            >>> left, right = snapshot.fork(2, seeds=(1, 2))  # doctest: +SKIP
        """
        if n < 1 or (seeds is not None and len(seeds) != n):
            raise ValueError(f"need n >= 1 and as many seeds as branches, got n={n}, seeds={seeds!r}")
        if seeds is None:
            return (self,) * n
        return tuple(
            dataclasses.replace(
                self,
                generation=dataclasses.replace(
                    self.generation, rng={"cpu": torch.Generator().manual_seed(seed).get_state()}
                ),
                known_digests={},
                coding=None,
                coded_id="",
            )
            for seed in seeds
        )

    def to(self, device: str | torch.device | None = None, *, dtype: torch.dtype | None = None) -> Snapshot:
        """The state on another device and, only when asked by name, with floats of another dtype.

        A restore moves a state to its model's device by itself. A change of dtype makes another state, for a model
        of that dtype: its provenance says so, and the model that made the present one is refused.

        Args:
            device: where the tensors shall lie; where they are by default.
            dtype: a floating dtype for the floating tensors of cache, encoder outputs and logits.

        Raises:
            UnsupportedOperationError: `dtype` is not a floating dtype.
        """
        if isinstance(device, torch.dtype):
            raise UnsupportedOperationError("to", expected="a device", found=str(device), do=f"pass dtype={device}")
        if dtype is not None and not dtype.is_floating_point:
            raise UnsupportedOperationError("to", expected="a floating dtype", found=str(dtype))

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device)

        def all_of(tensors: Tensors, function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: function(t) for name, t in tensors.items()}

        state = self.generation
        return Snapshot(
            cache=self.cache.map(moved),
            generation=dataclasses.replace(
                state,
                input_ids=placed(state.input_ids),
                finished=placed(state.finished),
                logits=None if state.logits is None else moved(state.logits),
                step_inputs=all_of(state.step_inputs, moved),
                search=all_of(state.search, placed),
                companions={name: c.map(moved) for name, c in state.companions.items()},
                attributes=all_of(state.attributes, moved),
            ),
            provenance=dataclasses.replace(self.provenance, dtype=str(dtype).removeprefix("torch."))
            if dtype is not None
            else self.provenance,
            known_digests={} if dtype is not None else self.known_digests,
            coding=None if dtype is not None else self.coding,
            coded_id="" if dtype is not None else self.coded_id,
            checkpoints=tuple(
                dataclasses.replace(c, cache=c.cache.map(moved), attributes=all_of(c.attributes, moved))
                for c in self.checkpoints
            ),
            trace=self.trace,
            hidden={name: each.map(moved) for name, each in self.hidden.items()},
        )

    def _n_seen(self, n_tokens: int) -> list[int]:
        """Of each row how many of its first `n_tokens` tokens are no padding."""
        padding = self.padding()
        n_padding = [0] * self.batch_size if padding is None else padding[:, :n_tokens].sum(1).tolist()
        return [n_tokens - n for n in n_padding]

    def _require_croppable(self) -> None:
        state = self.generation
        if self.cache.kind == ABSENT:
            raise UnsupportedOperationError(
                "crop",
                expected="a state with a cache",
                found="hidden states alone, which may have seen all tokens",
                do="take the rows that you want from snapshot.hidden",
            )
        found = "a beam search" if state.search else ", ".join(sorted(state.companions))
        found = found or ", ".join(p.name for p in state.processors if p.tensors or (p.role == "logits" and p.meta))
        if found:
            raise UnsupportedOperationError(
                "crop",
                expected="a state that depends on its tokens alone",
                found=found,
                do="it remembers the tokens that would go; take a snapshot at that moment instead",
            )

    def _follows_tokens(self, name: str, tensor: torch.Tensor, n_tokens: int) -> bool:
        # An encoder's outputs and mask keep their length whatever the decoder does.
        is_other = "." in name or ("encoder_outputs" in self.generation.step_values and "decoder" not in name)
        # Beside an image's tokens in the cache some models count only those of the text.
        return not is_other and tensor.ndim > 0 and tensor.shape[-1] in (n_tokens, self.n_tokens)

    def _changing_attributes(self) -> list[str]:
        # The offset of an image's positions is settled by the prompt.
        return [path for path in self.generation.attributes if not path.endswith("rope_deltas")]

    def _finished_by(self, n_tokens: int) -> torch.Tensor:
        """Rows that had ended within the tokens that stay, as far as end tokens tell."""
        state = self.generation
        ends = state.config.get("eos_token_id")
        if ends is None:
            return torch.zeros_like(state.finished)
        new = state.input_ids[:, state.prompt_length : n_tokens]
        known = torch.tensor([ends] if isinstance(ends, int) else ends, device=new.device)
        return state.finished & torch.isin(new, known).any(-1)


def _batch_axis(name: str, tensor: torch.Tensor, batch_size: int) -> int | None:
    if tensor.ndim == 3 and name.endswith("position_ids"):
        return 1
    return 0 if tensor.ndim and tensor.shape[0] == batch_size else None


def _search_rows(name: str, tensor: torch.Tensor, prompts: torch.Tensor, n_beams: int) -> torch.Tensor:
    taken = take_rows(tensor, prompts)
    if not name.endswith("beam_indices"):
        return taken
    # Beams are numbered through the whole batch.
    moved = taken % n_beams + torch.arange(len(prompts), dtype=taken.dtype)[:, None, None] * n_beams
    return torch.where(taken >= 0, moved, taken)
