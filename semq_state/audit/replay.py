"""`sq.replay`: what a snapshot says happened, run again and held against it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from semq_state.audit.diff import BINS, diff
from semq_state.audit.floor import Floor
from semq_state.audit.report import Diff
from semq_state.audit.traces import TraceDiff, compare_traces
from semq_state.audit.verdict import Verdict
from semq_state.errors import Difference, IncompleteStateError, UnsupportedOperationError
from semq_state.provenance import advice
from semq_state.snapshot import Coding, Snapshot

if TYPE_CHECKING:
    from semq_state.audit.rerun import Told

PARTS = ("determinism", "cold", "trace")
"""What a replay can look at."""

How = Literal["steps", "once"]

NOT_ASKED = ("not asked for",)

_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_CODED = 1.05  # a state computed again is not to the last bit the one that was coded
_COARSE = 16  # computed at once, a token may differ in one symbol of so many


@dataclass(frozen=True)
class Replay:
    """What running it again showed.

    Args:
        determinism: resumed from the recorded start, the same tokens and the same state bit for bit?
        cold_equivalence: computed from nothing but the tokens, the same state?
        trace: the same top logits, tokens and hidden states at each generated token?
        circumstances: in which the present run differs from the recorded one: versions, threads, attention.
        report: the recorded state against the one computed from nothing; None where that was not evaluated.
        traces: the recorded trace against the present one; None where that was not evaluated.
    """

    determinism: Verdict
    cold_equivalence: Verdict
    trace: Verdict
    circumstances: tuple[Difference, ...] = ()
    report: Diff | None = None
    traces: TraceDiff | None = None

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return {"determinism": self.determinism, "cold_equivalence": self.cold_equivalence, "trace": self.trace}

    @property
    def passed(self) -> bool:
        """Whether something was evaluated, and all of it holds."""
        outcomes = {verdict.outcome for verdict in self.verdicts.values()}
        return "different" not in outcomes and outcomes != {"not evaluated"}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "passed": self.passed,
            **{name: verdict.as_dict() for name, verdict in self.verdicts.items()},
            "circumstances": [
                {"name": d.name, "expected": d.expected, "found": d.found} for d in self.circumstances
            ],
            "report": self.report.as_dict() if self.report else None,
            "traces": self.traces.as_dict() if self.traces else None,
        }


def replay(
    snapshot: Snapshot,
    model: Any,
    *,
    start: Snapshot | None = None,
    floor: Floor | None = None,
    how: How = "steps",
    parts: Collection[str] = PARTS,
    tokenizer: Any = None,
    allow: Collection[str] = (),
    given: Mapping[str, Any] | None = None,
    told: Told | None = None,
) -> Replay:
    """Runs again what a snapshot says happened, and says what differs.

    **Determinism** goes on from the recorded start, with the recorded random stream and settings: `start`, or else
    the snapshot's own earliest checkpoint (`capture(trace=True)` or `checkpoints=` keep one), or, where nothing was
    sampled, the end of the prompt. **Cold equivalence** computes the state from nothing but its tokens. **Trace**
    compares what `capture(trace=True)` noted of each token.

    Args:
        snapshot: the state in question.
        model: the model that is said to have made it.
        start: a snapshot of the same run at an earlier moment; the two are a record of what lies between.
        floor: the noise of computing again (`measure_floor`) of this snapshot; without it only equal is equal.
        how: `steps` computes the prompt at once and then token by token, as the recorded run did: as dear as
            generating, and equal bit for bit under the same circumstances. `once` computes all tokens in one pass,
            which is much cheaper and rounds otherwise: give it a floor.
        parts: of `PARTS`, what to look at.
        tokenizer: compared with the recorded one.
        allow: differences between recorded and present model to look past, as in `restore`; the verdicts then tell
            what follows from them.
        given: what settings cannot bring back, for `generate`: processors of one's own, an assistant model.
        told: called after each token with the tokens of a row that are done.

    Returns:
        The verdicts, named apart. What cannot be evaluated says why.

    Raises:
        ModelMismatchError: it is another model; every difference is listed.
        IncompleteStateError: `start` is not of this run.
        FloorError: the floor is of another reference.

    Example:
        >>> sq.replay(sq.load("chat.safetensors"), model).determinism.passed  # doctest: +SKIP
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or isinstance(parts, str) or how not in ("steps", "once"):
        raise ValueError(f"`parts` takes names of {PARTS} and `how` steps or once, got {parts!r} and {how!r}")
    from semq_state.audit.rerun import recomputed
    from semq_state.audit.tracing_once import traced_at_once
    from semq_state.fingerprint import fingerprint
    from semq_state.generation.seams import base_model
    from semq_state.restore.checks import check_goes_on, check_model, check_state

    check_goes_on(snapshot)
    # What was asked to be heard is not recorded well enough to be heard again.
    snapshot = dataclasses.replace(snapshot, hidden={}, known_digests={}) if snapshot.hidden else snapshot
    inner = base_model(model)
    with warnings.catch_warnings():
        # Circumstances are part of the answer.
        warnings.simplefilter("ignore")
        check_model(snapshot, inner, tokenizer=tokenizer, allow=allow, wrapper=model)
    check_state(snapshot, inner)
    present = fingerprint(inner, weights="")
    skipped = Verdict("not evaluated", NOT_ASKED)
    determinism = cold = trace = skipped
    report = traces = None
    if "determinism" in parts:
        determinism = _determinism(snapshot, model, start, allow, given, told)
    again = None
    wants_trace = "trace" in parts and snapshot.trace is not None
    if "cold" in parts or (wants_trace and how == "steps"):
        try:
            again = recomputed(snapshot, model, in_steps=how == "steps", told=told)
        except UnsupportedOperationError as error:
            cold = trace = Verdict("not evaluated", (str(error),))
    if "cold" in parts and again is not None:
        report = diff(snapshot, again, across_models=bool(allow), bins=floor.bins if floor else BINS)
        cold = _cold(snapshot, report, floor, how)
    if wants_trace and (again is not None or how == "once"):
        assert snapshot.trace is not None
        try:
            present_trace = again.trace if again and how == "steps" else traced_at_once(snapshot, model, told=told)
            assert present_trace is not None
            traces = compare_traces(snapshot.trace, present_trace)
            trace = _traced(traces, how)
        except UnsupportedOperationError as error:
            trace = Verdict("not evaluated", (str(error),))
    elif "trace" in parts and snapshot.trace is None:
        trace = Verdict("not evaluated", ("the snapshot has no trace: capture with trace=True",))
    return Replay(determinism, cold, trace, tuple(advice(snapshot.provenance, present)), report, traces)


def _determinism(
    snapshot: Snapshot,
    model: Any,
    start: Snapshot | None,
    allow: Collection[str],
    given: Mapping[str, Any] | None,
    told: Told | None,
) -> Verdict:
    from semq_state.audit.rerun import continued

    try:
        begin = _start(snapshot) if start is None else _checked_start(start, snapshot)
        again = continued(begin, model, snapshot.n_tokens, allow=allow, given=given, told=told)
    except UnsupportedOperationError as error:
        return Verdict("not evaluated", (str(error),))
    reasons = [*_settings(begin, snapshot), *_tokens(snapshot, again)]
    if not reasons:
        reasons = _states(snapshot, again)
    return Verdict("different", tuple(reasons)) if reasons else Verdict("equal")


def _start(snapshot: Snapshot) -> Snapshot:
    """The earliest moment that the snapshot itself can go back to, with the random state of that moment."""
    state = snapshot.generation
    if not state.config:
        raise _no_start("a loop of one's own, whose steps are not recorded")
    if snapshot.coding is not None:
        raise _no_start("a state that was coded with loss")
    kept = [c.n_tokens for c in snapshot.checkpoints if c.rng and c.n_tokens > state.prompt_length]
    if kept:
        return snapshot.crop(min(kept))
    if state.config.get("do_sample"):
        raise _no_start("a sampled run without the random state of its start")
    if snapshot.n_tokens <= state.prompt_length + 1:
        raise _no_start("one generated token")
    return snapshot.crop(state.prompt_length + 1)


def _no_start(found: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "replay from the start",
        expected="a recorded start",
        found=found,
        do="pass start=, or capture with trace=True or checkpoints=",
    )


def _checked_start(start: Snapshot, snapshot: Snapshot) -> Snapshot:
    theirs, ours = start.generation.input_ids, snapshot.generation.input_ids
    n = theirs.shape[1]
    if theirs.shape[0] != ours.shape[0] or n >= ours.shape[1] or not torch.equal(theirs, ours[:, :n]):
        raise IncompleteStateError(
            "start",
            expected=f"the first tokens of the run, fewer than its {ours.shape[1]}, for {ours.shape[0]} rows",
            found=f"others, {tuple(theirs.shape)}",
            do="pass a snapshot of the same run at an earlier moment",
        )
    if start.provenance.weights != snapshot.provenance.weights:
        raise IncompleteStateError(
            "start",
            expected=f"weights {snapshot.provenance.weights:.24}…",
            found=f"{start.provenance.weights:.24}…",
        )
    # Where it was to end is known of the later state: the earlier one may have ended where it was taken.
    lengths = {name: value for name, value in snapshot.generation.config.items() if name in _LENGTHS}
    config = {**start.generation.config, **lengths}
    return dataclasses.replace(start, generation=dataclasses.replace(start.generation, config=config))


def _settings(begin: Snapshot, end: Snapshot) -> list[str]:
    """Settings in which the end of a record contradicts its start."""
    ours, theirs = begin.generation.config, end.generation.config
    return [
        f"settings: {name} was {ours.get(name)!r} at the start and is {theirs.get(name)!r} at the end"
        for name in sorted({*ours, *theirs})
        if name not in _LENGTHS and ours.get(name) != theirs.get(name)
    ]


def _tokens(recorded: Snapshot, again: Snapshot) -> list[str]:
    ours, theirs = recorded.generation.input_ids, again.generation.input_ids.cpu()
    n = min(ours.shape[1], theirs.shape[1])
    apart = (ours[:, :n].cpu() != theirs[:, :n]).any(dim=0).nonzero()
    if len(apart):
        at = int(apart[0])
        row = int((ours[:, at].cpu() != theirs[:, at]).nonzero()[0])
        return [f"tokens: part at {at}, row {row}: recorded {int(ours[row, at])}, now {int(theirs[row, at])}"]
    if ours.shape[1] != theirs.shape[1]:
        return [f"tokens: {ours.shape[1]} recorded, the run ended after {theirs.shape[1]} now"]
    return []


def _states(recorded: Snapshot, again: Snapshot) -> list[str]:
    """Tensors that are not the same bits; of a state that was coded with loss, only the exact ones."""
    coded = set(recorded.coding.errors) if recorded.coding else set()
    left_out = set(recorded.coding.left_out) if recorded.coding else set()
    ours = _compared(recorded, coded | left_out)
    theirs = _compared(again, coded | left_out)
    names = [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]
    return [f"{name}: not the same bits" for name in names]


def _compared(snapshot: Snapshot, left_out: Collection[str]) -> dict[str, torch.Tensor]:
    tensors = {**snapshot.cache.tensors(), **snapshot.generation.tensors()}
    return {name: t for name, t in tensors.items() if name not in left_out}


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) if a.numel() else True


def _cold(snapshot: Snapshot, report: Diff, floor: Floor | None, how: How) -> Verdict:
    if floor is not None:
        return report.within(floor)
    if report.first_layer is None and report.first_token is None:
        return Verdict("equal")
    if snapshot.coding is not None:
        return _as_coded(snapshot.coding, report)
    hint = ("computed at once it rounds otherwise: whether that is all, a floor tells",) if how == "once" else ()
    return Verdict("different", (_from(report), *hint))


def _from(report: Diff) -> str:
    layer = "no layer" if report.first_layer is None else f"layer {report.first_layer}"
    token = "" if report.first_token is None else f", token {report.first_token} on"
    return f"different from {layer}{token}"


def _as_coded(coding: Coding, report: Diff) -> Verdict:
    """A state that was coded with loss differs by what its file says that coding did, or by more."""
    beyond = [
        f"{cell.key}: relative error {cell.relative:.4g}, coding made {coding.errors[cell.key].relative:.4g}"
        if cell.key in coding.errors
        else f"{cell.key}: differs, and was not coded"
        for cell in report.cells
        if cell.beyond
        and (cell.key not in coding.errors or cell.relative > coding.errors[cell.key].relative * _CODED)
    ]
    if beyond:
        return Verdict("different", (_from(report), *beyond))
    return Verdict("within", ("it differs by no more than the error that its coding had recorded",))


def _traced(traces: TraceDiff, how: How) -> Verdict:
    if traces.equal:
        return Verdict("equal")
    allowed = traces.n_units // _COARSE if how == "once" else 0
    at = traces.first_token(hamming=allowed, logits=float("inf") if how == "once" else 0.0)
    if at is None:
        return Verdict(
            "within", (f"at most {int(traces.hamming.max())} of {traces.n_units} symbols a token differ",)
        )
    worst = traces.hamming[:, at - traces.begin].max()
    return Verdict("different", (f"different from token {at} on: {int(worst)} of {traces.n_units} symbols there",))
