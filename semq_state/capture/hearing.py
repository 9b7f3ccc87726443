"""What `capture(hidden_states=…)` keeps: rows of each run, or of a plain forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from semq_state.errors import IncompleteStateError, SemqStateError, UnsupportedOperationError
from semq_state.generation.rows import AlreadyEnded
from semq_state.generation.seams import replaced
from semq_state.hidden import Collector, HiddenStates, Listener, Pass, sites_of, streams_of
from semq_state.provenance import Provenance
from semq_state.snapshot import ABSENT, ENCODER, SEQUENCE, CacheState, GenerationState, HiddenRows, Snapshot

_WHERE = "capture(hidden_states=…)"
_NEVER = 1 << 62


class Hearing:
    """Hears a model, and gathers rows run by run.

    Args:
        model: the whole model.
        spec: what to keep.
        generators: those of its modules that run a generation loop, by path.
    """

    def __init__(self, model: Any, spec: HiddenStates, generators: Mapping[str, Any]) -> None:
        self._spec = spec
        self._sites = sites_of(model, spec)
        streams = streams_of(model, tuple(generators.values()))
        self._listener = Listener(self._sites, streams, model, self._on_call)
        self._generators = generators
        self.owner = _owner(streams.paths.get(SEQUENCE, ""), generators)
        self._depth = self._prompt_length = self._prefix = 0
        self._is_new = self._goes_on = False
        self._n_done: int | None = None
        self._ended_at: torch.Tensor | None = None
        self._criteria: Iterable[Any] = ()
        self._forget()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears what the model does in the `with`."""
        with contextlib.ExitStack() as stack:
            for module in self._generators.values():
                stack.enter_context(replaced(module, {"generate": self._generating(module.generate)}))
            stack.enter_context(self._listener.listening())
            yield

    @property
    def failure(self) -> SemqStateError | None:
        """Why what was heard cannot be kept, if so."""
        return self._failure or self._listener.failure

    @property
    def is_plain(self) -> bool:
        """Whether the last that was heard was a forward pass outside of `generate`."""
        return self._plain is not None

    def begin(self, prompt_length: int, criteria: Iterable[Any] | None) -> None:
        """A loop begins.

        Args:
            prompt_length: tokens of each row before the first one that it generates.
            criteria: by which it stops; a resume adds to them, before the first token.
        """
        # What was kept before stands until this loop has a token of its own.
        self._is_new = True
        self._n_done, self._prefix, self._prompt_length = None, 0, prompt_length
        self._criteria = () if criteria is None else criteria

    def give_up(self, error: SemqStateError) -> None:
        """The run cannot be kept; nothing more of it is heard."""
        self._listener.give_up(error)

    def finish(
        self, input_ids: torch.Tensor, ended: torch.Tensor, inputs: Mapping[str, Any], *, drafts: bool
    ) -> None:
        """Another token of each row was chosen, or with `drafts` several at once.

        Raises:
            SemqStateError: what was heard cannot be kept.
        """
        if self._is_new:
            self._is_new = False
            self._forget()
            ended_before = next((each.ended for each in self._criteria if isinstance(each, AlreadyEnded)), None)
            self._goes_on = ended_before is not None
            # Their last token is an end that was never to be read.
            self._ended_at = None if ended_before is None else torch.where(ended_before.cpu(), 0, _NEVER)
        self._add(self._listener.take(), input_ids.cpu(), inputs, drafts=drafts)
        self._n_done = int(input_ids.shape[1]) + self._prefix - 1
        self._ended_at = torch.where(ended.cpu(), self._n_done, _NEVER)

    def rows(self) -> dict[str, HiddenRows]:
        """What was gathered, by stream.

        Raises:
            SemqStateError: what was heard cannot be kept.
        """
        if self.failure:
            raise self.failure
        return {name: each.rows() for name, each in self._collectors.items()}

    def snapshot(self, provenance: Provenance) -> Snapshot:
        """The state of a plain forward pass: hidden states and tokens alone."""
        hidden, passed = self.rows(), self._plain
        assert passed is not None
        shape = passed.shape or (1, 0)
        ids = passed.input_ids
        if ids is None or tuple(ids.shape) != shape:
            ids = torch.zeros(shape[0], 0, dtype=torch.int64)
        mask = {} if passed.mask is None else {"attention_mask": passed.mask}
        return Snapshot(
            cache=CacheState(ABSENT),
            generation=GenerationState(
                input_ids=ids.to(torch.int64),
                prompt_length=int(ids.shape[1]),
                n_cached=shape[1],
                finished=torch.zeros(shape[0], dtype=torch.bool),
                step_inputs=mask,
            ),
            provenance=provenance,
            hidden=hidden,
        )

    def _forget(self) -> None:
        streams = sorted({site.stream for site in self._sites})
        self._collectors = {
            name: Collector(self._spec, [site.name for site in self._sites if site.stream == name])
            for name in streams
        }
        self._failure: SemqStateError | None = None
        self._plain: Pass | None = None

    def _generating(self, original: Any) -> Any:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                self._listener.forget()
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return generate

    def _on_call(self, begins: bool) -> None:
        if self._depth:
            return
        if begins:
            self._listener.forget()
            return
        # The caller's own pass has ended well: nothing of ours may raise in it.
        self._forget()
        try:
            passes = self._listener.take()
            for stream in self._collectors:
                own = [each for each in passes if each.stream == stream]
                heard = [each for each in own if each.states] or own[:1]
                if len(heard) > 1:
                    raise _refused("one forward pass", f"{len(heard)} in one call")
                for each in heard:
                    self._add_whole(each, None)
            self._plain = next((each for each in passes if each.stream == SEQUENCE), passes[0])
            self._plain.states.clear()
        except SemqStateError as error:
            self._failure = error
            self._plain = Pass(SEQUENCE)

    def _add(
        self, passes: Sequence[Pass], input_ids: torch.Tensor, inputs: Mapping[str, Any], *, drafts: bool
    ) -> None:
        for each in passes:
            if each.stream == ENCODER:
                self._add_whole(each, len(input_ids))
        passes = [each for each in passes if each.stream == SEQUENCE]
        if passes and SEQUENCE in self._collectors:
            # A part that decodes within a step (a depth decoder) has no states of the sequence. An assistant may
            # have some, but the pass that checks its drafts is the last.
            heard = [each.settled() for each in passes if each.states] or [{}]
            self._add_steps(heard[-1:] if drafts else heard, input_ids, inputs, drafts=drafts)

    def _add_whole(self, passed: Pass, n_rows: int | None) -> None:
        """All tokens of a pass: a plain one, or an encoder's in front of a loop over `n_rows` rows."""
        collector = self._collectors.get(passed.stream)
        if collector is None:
            return
        states = passed.settled()
        _check_heard(states, self._sites, passed.stream)
        batch, seq = states[next(iter(states))].shape[:2]
        if passed.hides_padding:
            raise IncompleteStateError(
                "attention_mask",
                expected="(batch, seq), from which padding can be told",
                found="another mask",
                do="pass a mask of 0 and 1 for each token",
            )
        positions = _places(passed, batch, seq)
        ids = passed.input_ids
        ids = ids if ids is not None and ids.shape == positions.shape else None
        documents = torch.arange(batch)
        if n_rows and n_rows != batch and n_rows % batch == 0:  # one prompt, several returned sequences
            n = n_rows // batch
            documents, positions = torch.arange(n_rows), positions.repeat_interleave(n, 0)
            states = {name: t.repeat_interleave(n, 0) for name, t in states.items()}
            ids = ids if ids is None else ids.repeat_interleave(n, 0)
        collector.add(states, documents, positions, None if ids is None else ids.cpu())

    def _add_steps(
        self,
        heard: Sequence[Mapping[str, torch.Tensor]],
        input_ids: torch.Tensor,
        inputs: Mapping[str, Any],
        *,
        drafts: bool,
    ) -> None:
        for states in heard:
            _check_heard(states, self._sites, SEQUENCE)
        lengths = [next(iter(states.values())).shape[1] for states in heard]
        n_tokens = int(input_ids.shape[1])
        is_pair = inputs.get("encoder_outputs") is not None
        mask = inputs.get("decoder_attention_mask" if is_pair else "attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if self._n_done is None and not drafts and not is_pair:
            # A prompt of embeddings has no ids; a resume is told of it by what is as long as all tokens.
            counts = inputs.get("position_ids") if mask is None and self._goes_on else mask
            self._prefix = 0 if counts is None else max(0, int(counts.shape[-1]) - n_tokens)
        start = self._start(sum(lengths), n_tokens, len(heard), drafts=drafts)
        end = n_tokens + self._prefix - 1
        whole = counted(mask, len(input_ids), end)
        if self._ended_at is not None:
            whole = torch.where(torch.arange(end) < self._ended_at[:, None], whole, -1)
        tokens = torch.full((len(input_ids), end), -1, dtype=torch.int64)
        if input_ids.ndim == 2:  # audio has several ids a token
            tokens[:, self._prefix :] = input_ids[:, : n_tokens - 1]
        for states, length in zip(heard, lengths, strict=True):
            first, stop = max(start, self._n_done or 0), min(start + length, end)
            if first < stop:
                part = {name: t[:, first - start : stop - start] for name, t in states.items()}
                is_new = torch.arange(first, stop) >= self._prompt_length + self._prefix
                self._collectors[SEQUENCE].add(
                    part,
                    torch.arange(len(input_ids)),
                    whole[:, first:stop],
                    tokens[:, first:stop],
                    is_new.expand(len(input_ids), -1),
                )
            start += length

    def _start(self, n_heard: int, n_tokens: int, n_passes: int, *, drafts: bool) -> int:
        """The place in the sequence of the first token that was heard since the last one was chosen."""
        done = self._n_done
        n_wanted = n_tokens - 1 + self._prefix
        if drafts:
            if done is None and self._goes_on:
                raise _refused("a loop that is heard from its start", "an assisted loop that goes on")
            return done or 0
        if done is None and n_heard > n_wanted and n_passes == 1:
            self._prefix += n_heard - n_wanted  # a model without a mask, or that puts an image before it
            return 0
        start = n_wanted - n_heard
        # Without a cache each step reads everything again.
        if start < 0 or (done is not None and start not in (0, done)):
            raise _refused("one forward pass for each step", f"{n_passes}, of {n_heard} tokens in all")
        return start


def counted(mask: torch.Tensor | None, batch: int, seq: int) -> torch.Tensor:
    """The position of each token among its row's own, `(batch, seq)` int64 on the CPU; -1 at padding."""
    if mask is None:
        return torch.arange(seq).expand(batch, seq)
    own = mask.cpu()[:, :seq] != 0
    if own.shape != (batch, seq):
        raise IncompleteStateError(
            "attention_mask", expected=f"({batch}, {seq})", found=str(tuple(own.shape)), do="cover every token"
        )
    return torch.where(own, own.cumsum(1) - 1, -1)


def _places(passed: Pass, batch: int, seq: int) -> torch.Tensor:
    """The positions of a pass that read all that it says; of one over a cache those behind what the cache holds."""
    mask = passed.mask
    if mask is None or mask.shape[1] == seq or (passed.stream == SEQUENCE and mask.shape[1] < seq):
        return counted(mask, batch, seq)
    if passed.stream == SEQUENCE:
        return counted(mask, batch, mask.shape[1])[:, -seq:]
    if bool((mask != 0).all()):  # frames of audio, of which an encoder makes fewer states
        return counted(None, batch, seq)
    raise IncompleteStateError(
        "attention_mask",
        expected=f"({batch}, {seq}), one for each state of the encoder",
        found=str(tuple(mask.shape)),
        do="encode one row at a time, without padding",
    )


def refused_beams() -> UnsupportedOperationError:
    """The error of a beam search, whose rows change places."""
    return _refused("a loop that follows each row", "a beam search")


def _owner(path: str, generators: Mapping[str, Any]) -> str:
    """The innermost module with a loop of its own that holds the blocks at `path`."""
    return max((name for name in generators if not name or path.startswith(f"{name}.")), key=len, default="")


def _check_heard(states: Mapping[str, torch.Tensor], sites: Sequence[Any], stream: str) -> None:
    silent = [site.name for site in sites if site.stream == stream and site.name not in states]
    if silent:
        raise IncompleteStateError(
            ", ".join(silent[:3]),
            expected="modules that are called in each step",
            found="no call",
            do="name modules that every forward pass goes through",
        )
    shapes = {name: tuple(t.shape[:2]) for name, t in states.items()}
    if len(set(shapes.values())) > 1:
        raise IncompleteStateError(
            _WHERE,
            expected="states of one sequence",
            found=", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:3]),
            do="capture them one at a time",
        )


def _refused(expected: str, found: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(_WHERE, expected=expected, found=found, do="capture without hidden_states")
