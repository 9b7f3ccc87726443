"""Tensors that are coded together: chosen, and coded a run of tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semq_state import content, symbolic
from semq_state.calibration import GuessSet, Predictor
from semq_state.codecs import predicted
from semq_state.container import JointEntry, JointSection
from semq_state.content import TensorSpec
from semq_state.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Joint:
    """Tensors to be coded together.

    Args:
        guesses: what guesses them.
        params: what the file says of them.
        spec: of each tensor.
    """

    guesses: GuessSet
    params: Mapping[str, Any]
    spec: TensorSpec

    @property
    def names(self) -> tuple[str, ...]:
        return self.guesses.names()


@dataclass(frozen=True)
class JointJob:
    """One section to write: tokens `start` to `stop` of joint tensors `number`."""

    number: int
    section: str
    start: int
    stop: int


def joints_of(snapshot: Snapshot, predictor: Predictor) -> list[Joint]:
    """What of a state a predictor can take; the rest is coded tensor by tensor."""
    tensors, found = snapshot.tensors(), []
    targets = {target.name: target for target in symbolic.targets(snapshot)}
    for i, guesses in enumerate(predictor.sets):
        names = guesses.names()
        if not all(name in targets for name in names):
            continue
        specs, begins = [content.spec_of(tensors[n]) for n in names], [targets[n].begin for n in names]
        if predicted.takes(guesses, specs, begins):
            found.append(Joint(guesses, predicted.params_of(predictor, i, begins[0]), specs[0]))
    return found


def is_predictable(snapshot: Snapshot) -> bool:
    """Whether there is anything that some predictor could take."""
    tensors = snapshot.tensors()
    return any(tensors[target.name].dtype == torch.bfloat16 for target in symbolic.targets(snapshot))


def jobs_of(joints: Sequence[Joint]) -> list[JointJob]:
    """The sections of all joint tensors, in file order."""
    return [
        JointJob(number, f"joint.{number}#{i}", start, stop)
        for number, joint in enumerate(joints)
        for i, (start, stop) in enumerate(predicted.runs(joint.spec))
    ]


def coded(joints: Sequence[Joint], tensors: Mapping[str, torch.Tensor], job: JointJob) -> bytes:
    """The payload of one section."""
    joint = joints[job.number]
    shape = joint.spec.chunk(job.start, job.stop).shape
    words = [
        content.raw_bytes(content.chunk_of(tensors[name], job.start, job.stop)).view("<u2").reshape(shape)
        for name in joint.names
    ]
    return predicted.encode(joint.guesses, joint.params["begin"] + job.start, words)


def entries_of(joints: Sequence[Joint], jobs: Sequence[tuple[JointJob, str]]) -> tuple[JointEntry, ...]:
    """What the manifest says of them.

    Args:
        joints: what was coded.
        jobs: its sections, with the digest of each payload.
    """
    sections: list[list[JointSection]] = [[] for _ in joints]
    for job, digest in jobs:
        sections[job.number].append(JointSection(job.section, job.start, job.stop, digest))
    return tuple(
        JointEntry(joint.names, predicted.ID, joint.params, tuple(own))
        for joint, own in zip(joints, sections, strict=True)
    )
