"""A whole snapshot to groups of symbols, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from semq_state import codecs
from semq_state.calibration import Calibration
from semq_state.codecs.transform import Transform
from semq_state.content import spec_of
from semq_state.snapshot import Snapshot
from semq_state.symbolic import transforming
from semq_state.symbolic.encoding import CodedGroup, coded, decoded, vectors
from semq_state.symbolic.groups import Group, Stack
from semq_state.symbolic.importances import importance_of
from semq_state.symbolic.policy import Policy
from semq_state.symbolic.targets import Target, padding_of, targets

Tensors = Mapping[str, torch.Tensor]

_GROUP_BYTES = 64 << 20
"""Tensors stacked for a codec take at most this much, so that memory does not grow with the number of layers."""


def symbolise(snapshot: Snapshot, policy: Policy) -> Iterator[CodedGroup]:
    """Codes what the policy names, group by group; what is in no group stays exact."""
    tensors = snapshot.tensors()
    left = {target.name: target for target in targets(snapshot)}
    padding = padding_of(snapshot)
    n_sinks, n_recent = policy.n_sinks, policy.n_recent
    if policy.transform is not None:
        n_cached, ids = snapshot.generation.n_cached, tensors["generation.input_ids"]
        for i, layers in enumerate(policy.transform.calibration.sets):
            stacks = transforming.stacks_of(layers, left, tensors)
            if not stacks:
                continue
            first = left[stacks[0].names[0]]
            span = first.span(n_sinks, n_recent)
            if span[0] < span[1]:
                place = (first.begin, padding)
                tokens = transforming.tokens_of(
                    policy.transform.calibration, ids, n_cached, *place, span, first.seq - span[1]
                )
                ways = transforming.coder(policy.transform, i, stacks, tokens, *place)
                yield coded(tensors, stacks, span, Transform.id, *ways, first.late_sinks(padding, n_sinks, span))
            left = {name: t for name, t in left.items() if name not in {n for s in stacks for n in s.names}}
    for first, stack in _alike(left.values(), tensors, policy):
        span, codec = first.span(n_sinks, n_recent), policy.codecs[first.kind]
        if span[0] < span[1]:
            late = first.late_sinks(padding, n_sinks, span)
            told = None if policy.importance is None else importance_of(stack, policy.importance)
            yield coded(tensors, [stack], span, codec.id, *vectors(codec, told), late)


def restored(
    group: Group, parts: Tensors, exact: Tensors, n_cached: int, calibration: Callable[[str], Calibration]
) -> dict[str, torch.Tensor]:
    """The tensors that a group stands for.

    Args:
        group: what the file says.
        parts: its tensors, by their names without the group's prefix.
        exact: the state's exact tensors, the token ids among them.
        n_cached: tokens of the sequence that the cache holds.
        calibration: from a digest to the calibration.

    Raises:
        UnknownCodecError: there is no such codec.
        CalibrationError: its calibration is not there, or does not fit.
        IntegrityError: its parts are damaged.
    """
    if group.codec != Transform.id:
        return decoded(group, parts, vectors(codecs.vector_decoder(group.codec))[1])
    found = calibration(str(group.params.get("calibration")))
    return decoded(group, parts, transforming.decoder(group, found, exact, n_cached))


def _alike(targets: Iterable[Target], tensors: Tensors, policy: Policy) -> Iterator[tuple[Target, Stack]]:
    """Targets that can be stacked: of one kind, dtype, shape and place, a bounded number of bytes at a time."""
    runs: dict[object, list[Target]] = {}
    for target in targets:
        if target.kind in policy.codecs:
            key = (target.kind, spec_of(tensors[target.name]), target.begin, target.ends)
            runs.setdefault(key, []).append(target)
    for run in runs.values():
        spec = spec_of(tensors[run[0].name])
        n = max(1, _GROUP_BYTES // max(1, spec.n_bytes))
        for i in range(0, len(run), n):
            yield run[i], Stack(run[i].kind, tuple(t.name for t in run[i : i + n]), spec)
