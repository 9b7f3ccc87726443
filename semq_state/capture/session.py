"""`sq.capture`: the context manager around `model.generate`, and its autosave."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from semq_state import files, stores
from semq_state.codecs import AbstractCodec, preset
from semq_state.errors import IncompleteStateError, SemqStateError
from semq_state.fingerprint import MODES, WeightsMark, fingerprint, mark_weights
from semq_state.generation.seams import base_model, generators, replaced
from semq_state.hidden import HiddenStates
from semq_state.provenance import Provenance
from semq_state.sealing import SealTo, check_keys
from semq_state.snapshot import Snapshot

if TYPE_CHECKING:
    from semq_state.capture.hearing import Hearing
    from semq_state.capture.recorder import Recorder


class Capture:
    """A running capture. Enter it, call `model.generate`, ask for `snapshot()` inside or after the `with`."""

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        autosave: str | os.PathLike[str] | None = None,
        every: int = 64,
        codec: str | AbstractCodec = "exact",
        weights: str = "full",
        checkpoints: int | Collection[int] = (),
        trace: bool = False,
        hidden_states: HiddenStates | None = None,
        seal: SealTo | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1 token, got {every}")
        if weights not in MODES:
            raise ValueError(f"`weights` must be one of {MODES}, got {weights!r}")
        preset(codec)
        self._checkpoints = _checked(checkpoints)
        self._trace = trace
        self._wrapper = model
        self._hidden_states = hidden_states
        self._model = base_model(model, generates=hidden_states is None)
        self._hearing: Hearing | None = None
        self._tokenizer = tokenizer
        self._autosave = Path(autosave) if autosave is not None else None
        self._every = every
        self._codec = codec
        self._seal = seal
        self._weights = weights
        self._stack = contextlib.ExitStack()
        self._recorders: dict[str, Recorder] = {}
        self._mark: WeightsMark | None = None
        self._provenance: Provenance | None = None
        self._n_unsaved = 0
        self._n_saved = 0
        self._tried = False

    def __enter__(self) -> Capture:
        if self._mark is not None:
            raise RuntimeError("this capture was entered before; make a new one with sq.capture(model)")
        if self._autosave is not None:
            stores.check_writable(self._autosave)
        if self._seal is not None:
            check_keys(self._seal)
        from semq_state.capture.recorder import Recorder
        from semq_state.capture.tracing import tracers

        modules = generators(self._model)
        if self._hidden_states is not None:
            from semq_state.capture.hearing import Hearing

            self._hearing = Hearing(self._model, self._hidden_states, modules)
        traced = tracers(modules) if self._trace else {}
        self._mark = mark_weights(self._model)
        for path, module in modules.items():
            tracer = traced.get(path)
            recorder = Recorder(
                module,
                self._on_step,
                tells=self._autosave is None,
                wants_checkpoint=self._wants_checkpoint,
                tracer=tracer,
                hearing=self._hearing if self._hearing and path == self._hearing.owner else None,
            )
            self._recorders[path] = recorder
            if tracer:
                self._stack.enter_context(tracer.listening())
            self._stack.enter_context(replaced(module, recorder.replacements()))
        if self._hearing:
            self._stack.enter_context(self._hearing.listening())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        is_plain = self._hearing is not None and self._hearing.is_plain
        if self._autosave is None or not (self._n_unsaved or is_plain):
            return
        try:
            self._save()
        except SemqStateError as failure:
            if error is None:
                raise
            # The run's own exception matters more; it must not be replaced by ours.
            warnings.warn(f"the last state was not saved: {failure}", stacklevel=2)

    @property
    def n_saved(self) -> int:
        """How often autosave has written the file."""
        return self._n_saved

    def snapshot(self) -> Snapshot:
        """The state after the last finished token, also after an exception or an interrupt.

        The snapshot shares memory with the live cache; it stays as it is when generation goes on.

        Returns:
            The snapshot of the last `generate` call in this capture.

        Raises:
            IncompleteStateError: no token was finished yet, something in the state cannot be kept, or the
                weights were changed since the capture began.
            UnsupportedModelError: no cache family knows the model's cache.
            UnsupportedOperationError: this way of generating cannot be kept.
        """
        if self._mark is None:
            raise IncompleteStateError(
                "capture",
                expected="a capture that was entered",
                found="a new one",
                do="use it in a `with`",
            )
        changed = [name for name in self._mark.changed(self._model) if name in self._mark.held]
        if changed:
            raise IncompleteStateError(
                f"weights ({', '.join(changed[:3])}{' …' if len(changed) > 3 else ''})",
                expected="the weights with which the capture began",
                found="other values",
                do="nobody could say which model made this state; capture again",
            )
        if self._provenance is None:
            self._provenance = fingerprint(
                self._model, self._tokenizer, weights=self._weights, adapters_of=self._wrapper
            )
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        provenance = dataclasses.replace(self._provenance, created=now)
        if self._hearing and self._hearing.is_plain:
            return self._hearing.snapshot(provenance)
        # A part that generates within a step of the whole (a depth decoder) is not what was asked for.
        path = next((path for path, recorder in self._recorders.items() if recorder.last or recorder.refused), "")
        if path not in self._recorders:
            raise IncompleteStateError(
                "capture",
                expected="at least one forward pass",
                found="none",
                do="call the model inside the `with`",
            )
        return self._recorders[path].snapshot(provenance, path)

    def _wants_checkpoint(self, n_tokens: int) -> bool:
        wanted = self._checkpoints
        return n_tokens % wanted == 0 if isinstance(wanted, int) else n_tokens in wanted

    def _on_step(self) -> None:
        self._n_unsaved += 1
        if self._autosave is None:
            return
        # The first token is saved at once: the prefill behind it is the dearest part to lose.
        if self._tried and self._n_unsaved < self._every:
            return
        self._tried = True
        try:
            self._save()
        except SemqStateError as failure:
            self._n_unsaved = 0
            warnings.warn(f"autosave failed, generation goes on: {failure}", stacklevel=2)

    def _save(self) -> None:
        assert self._autosave is not None
        files.save(self.snapshot(), self._autosave, codec=self._codec, seal=self._seal)
        self._n_saved += 1
        self._n_unsaved = 0


def capture(
    model: Any,
    *,
    tokenizer: Any = None,
    autosave: str | os.PathLike[str] | None = None,
    every: int = 64,
    codec: str | AbstractCodec = "exact",
    weights: str = "full",
    checkpoints: int | Collection[int] = (),
    trace: bool = False,
    hidden_states: HiddenStates | None = None,
    seal: SealTo | None = None,
) -> Capture:
    """Records what the next step of `model.generate` needs, without changing what generate returns.

    Args:
        model: a transformers model, or a PEFT wrapper around one.
        tokenizer: its tokenizer; its digest joins the provenance, so that a restore can compare it.
        autosave: a file that always holds the newest complete snapshot: from the first token on, every `every`
            tokens, and at the end of the `with`, however that ends.
        every: tokens between two autosaves.
        codec: what autosave saves with; see `save`.
        weights: `full` reads all weights once for the digest; `sampled` is the cheaper mode for very large
            models (`semq_state.fingerprint.MODES`).
        checkpoints: token counts (prompt included), or every so many tokens, at which to keep what layers that
            forget (recurrent states, windows) hold, so that `Snapshot.crop` can go back there. What other layers
            hold is not kept twice.
        trace: keep evidence of each generated token (`Snapshot.trace`, less than 300 bytes of a row's token), so
            that the run can be replayed cheaply later, and a checkpoint at the first token, from which it can be
            replayed bit for bit. For loops that choose one token of each row at a time.
        hidden_states: keep hidden states as well (`Snapshot.hidden`), of `generate` or of plain forward passes, of
            which the last one counts. With it, models that cannot generate are taken too.
        seal: what autosave encrypts to; see `save`. A passphrase costs half a second at each save, other keys
            nothing.

    Returns:
        The capture, to be used in a `with`.

    Raises:
        UnsupportedModelError: the model cannot be captured.
        StoreError: the autosave folder cannot be written to, or a key file is missing.
        DecryptionError: a key file to seal to is none.

    Example:
        >>> with sq.capture(model, tokenizer=tokenizer) as run:  # doctest: +SKIP
        ...     model.generate(**inputs, max_new_tokens=200, do_sample=True)
        >>> snapshot = run.snapshot()  # doctest: +SKIP
    """
    return Capture(
        model,
        tokenizer=tokenizer,
        autosave=autosave,
        every=every,
        codec=codec,
        weights=weights,
        checkpoints=checkpoints,
        trace=trace,
        hidden_states=hidden_states,
        seal=seal,
    )


def _checked(checkpoints: int | Collection[int]) -> int | frozenset[int]:
    counts = [checkpoints] if isinstance(checkpoints, int) else list(checkpoints)
    if any(type(n) is not int or n < 1 for n in counts):
        raise ValueError(f"`checkpoints` takes counts of tokens of 1 or more, got {checkpoints!r}")
    return checkpoints if isinstance(checkpoints, int) else frozenset(counts)
