"""In which form a state stands in a file: its own tensors, or symbols in place of some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from semq_state import calibration as calibrations
from semq_state import codecs, content, symbolic
from semq_state.calibration import Calibration, Predictor
from semq_state.codecs import AbstractCodec, AbstractVectorCodec, Pco, Planes, Transform, predicted
from semq_state.container import EMBEDDED
from semq_state.content import TensorSpec
from semq_state.errors import CalibrationError, UnknownCodecError
from semq_state.files.joint import Joint, joints_of
from semq_state.snapshot import Coding, SectionError, Snapshot
from semq_state.symbolic import Group, Policy, prefix_of

Codec = str | AbstractCodec | AbstractVectorCodec | Transform | Policy
"""What `save` takes: a preset or another word, or the value of a codec or policy."""

_VALUES = (AbstractCodec, AbstractVectorCodec, Transform, Policy)

EMBEDDED_CALIBRATION = f"{EMBEDDED}calibration."

_TABLE = "table"
_EXACT = Planes()
_SMALL = Planes(layout="channel")
_ENTROPY = Pco()


@dataclass(frozen=True, eq=False)
class Form:
    """What of a state is written.

    Args:
        codec: the preset or codec that was asked for, as a word.
        structure: everything that is not a tensor.
        tensors: by their names in the file.
        coder: the byte codec of every tensor that holds no symbols.
        coding: what coding did to it, the sizes still unknown; None where nothing was lost.
        joints: tensors that are coded together; the others are coded one by one.
    """

    codec: str
    structure: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    coder: AbstractCodec
    coding: Coding | None = None
    joints: tuple[Joint, ...] = ()

    def coder_of(self, name: str) -> AbstractCodec:
        """The byte codec of one tensor."""
        return _ENTROPY if name.startswith("coded.") and ".symbols." in name else self.coder

    @property
    def own_specs(self) -> dict[str, TensorSpec]:
        """Specs of the tensors that are part of the state, not only carried along."""
        return {n: s for n, s in content.specs_of(self.tensors) if not n.startswith(EMBEDDED)}


def check_codec(codec: Codec) -> None:
    """Refuses what `save` takes for no codec, before any work is spent.

    Raises:
        UnknownCodecError: it is none.
    """
    lossless = [*codecs.PRESETS, predicted.PRESET]
    known = codec in lossless or symbolic.is_lossy(codec) if isinstance(codec, str) else isinstance(codec, _VALUES)
    if not known:
        raise UnknownCodecError(
            "codec",
            expected=f"one of {', '.join(lossless)}, {symbolic.words()}, or a codec value",
            found=f"{codec!r:.80}",
            do="choose one",
        )


def form_of(
    snapshot: Snapshot,
    codec: Codec,
    calibration: Calibration | None = None,
    *,
    embed: bool = False,
    predictor: Predictor | None = None,
) -> Form:
    """The form that a codec gives a state.

    Raises:
        UnknownCodecError: no such preset.
        CalibrationError: what was asked for needs a calibration, or that of another model was given.
    """
    if isinstance(codec, AbstractCodec) or (isinstance(codec, str) and codec in codecs.PRESETS):
        coder = codecs.preset(codec)
        word = codec if isinstance(codec, str) else coder.id
        return Form(word, snapshot.structure(), snapshot.tensors(), coder)
    if codec == predicted.PRESET:
        joints = tuple(joints_of(snapshot, predictor)) if predictor else ()
        return Form(predicted.PRESET, snapshot.structure(), snapshot.tensors(), _SMALL, None, joints)
    return _compact(snapshot, codec, calibration, embed)


def _compact(snapshot: Snapshot, codec: Codec, calibration: Calibration | None, embed: bool) -> Form:
    word, policy = _policy(snapshot, codec, calibration)
    for used in (policy.importance, policy.transform.calibration if policy.transform else None):
        if used is not None:
            _check_model(used, snapshot)
    source = snapshot.state_id
    left_out: dict[str, str] = {}
    state = snapshot.generation
    if state.logits is not None and state.n_cached < snapshot.n_tokens:
        left_out["generation.logits"] = "the next token is chosen from those of the next step"
        snapshot = dataclasses.replace(snapshot, generation=dataclasses.replace(state, logits=None))
    tensors = dict(snapshot.tensors())
    groups: list[Group] = []
    errors: dict[str, SectionError] = {}
    n_exact = 0
    for i, made in enumerate(symbolic.symbolise(snapshot, policy)):
        groups.append(made.group)
        errors |= made.errors
        tensors = {name: t for name, t in tensors.items() if name not in made.errors}
        tensors |= {prefix_of(i) + name: tensor for name, tensor in made.tensors.items()}
        n_exact += sum(len(t) for name, t in made.tensors.items() if name.startswith("escaped_at."))
    kl, digest = None, ""
    if policy.transform is not None and any(group.codec == Transform.id for group in groups):
        digest = policy.transform.calibration.digest
        kl = calibrations.kl_at(policy.transform.calibration, policy.transform.step)
        if embed:
            tensors |= _embedded(policy.transform.calibration)
    structure = snapshot.structure()
    if groups:
        structure = {**structure, "coded": [group.as_dict() for group in groups]}
    picked = _picked(snapshot, groups)
    coding = Coding(word, picked, 0.0, 0.0, errors, source, kl, digest, left_out, n_exact)
    return Form(word, structure, tensors, _EXACT, coding)


def measured(form: Form, snapshot: Snapshot, written: Mapping[str, int]) -> Coding:
    """What coding did to a state, with the sizes that are known once its sections are written.

    Args:
        form: what was written.
        snapshot: what it was made of.
        written: tensor of the file to the bytes that its sections took.
    """
    assert form.coding is not None
    coded = sum(n for name, n in written.items() if name.startswith("coded."))
    n_values = sum(snapshot.tensors()[name].numel() for name in form.coding.errors)
    raw = sum(spec.n_bytes for _, spec in content.specs_of(snapshot.tensors()))
    return dataclasses.replace(
        form.coding,
        bits_per_value=8 * coded / max(1, n_values),
        ratio=raw / max(1, sum(n for name, n in written.items() if not name.startswith(EMBEDDED))),
    )


def groups_of(structure: Mapping[str, Any]) -> list[Group]:
    """The groups that a file's structure names.

    Raises:
        FormatError: one of them is malformed.
    """
    told = structure.get("coded", [])
    return [Group.from_dict(each) for each in told] if type(told) is list else [Group.from_dict(told)]


def without_groups(structure: Mapping[str, Any]) -> dict[str, Any]:
    """A file's structure as the state has it."""
    return {name: value for name, value in structure.items() if name != "coded"}


def decoded(
    structure: Mapping[str, Any], tensors: dict[str, torch.Tensor], calibration: Callable[[str], Calibration]
) -> dict[str, torch.Tensor]:
    """A file's tensors as the state has them: symbols decoded, what was carried along left out.

    Raises:
        CalibrationError: a calibration is not there, or does not fit.
        IntegrityError, UnknownCodecError: a group cannot be decoded.
    """
    own = {name: t for name, t in tensors.items() if not name.startswith((EMBEDDED, "coded."))}
    n_cached = structure["generation"]["n_cached"]
    found = dict(own)
    for i, group in enumerate(groups_of(structure)):
        parts = {name: tensors[prefix_of(i) + name] for name in group.parts()}
        found |= symbolic.restored(group, parts, own, n_cached, calibration)
    return found


def embedded_calibration(tensors: Mapping[str, torch.Tensor]) -> Calibration | None:
    """The calibration that a file carries along; None where it carries none.

    Raises:
        CalibrationError: it is damaged.
    """
    prefix = EMBEDDED_CALIBRATION
    own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    if _TABLE not in own:
        return None
    return calibrations.of_parts(own.pop(_TABLE), own, "embedded calibration")


def _embedded(calibration: Calibration) -> dict[str, torch.Tensor]:
    named = {_TABLE: calibrations.table_of(calibration), **calibration.tensors()}
    return {EMBEDDED_CALIBRATION + name: tensor for name, tensor in named.items()}


def _policy(snapshot: Snapshot, codec: Codec, calibration: Calibration | None) -> tuple[str, Policy]:
    """The word for what was asked for, and the policy."""
    if isinstance(codec, Policy):
        return "policy", codec
    if isinstance(codec, AbstractVectorCodec):
        return codec.id, symbolic.everywhere(codec)
    if isinstance(codec, Transform):
        return codec.id, Policy(transform=codec)
    check_codec(codec)
    assert isinstance(codec, str)
    return codec, symbolic.policy_for(codec, calibration, snapshot.provenance.model_name)


def _check_model(calibration: Calibration, snapshot: Snapshot) -> None:
    weights = snapshot.provenance.weights
    if calibration.weights != weights:
        raise CalibrationError(
            f"calibration {calibration.digest:.24}…",
            expected=f"one of the model that made this state, weights {weights:.24}…",
            found=f"one of {calibration.model_name or 'another model'}, weights {calibration.weights:.24}…",
            do="calibrate the state's own model",
        )


def _picked(snapshot: Snapshot, groups: list[Group]) -> dict[str, str]:
    """Kind of state to the codecs that it got, in words."""
    taken = {name: group.codec for group in groups for name in group.names()}
    found: dict[str, set[str]] = {}
    for kind, names in symbolic.kinds_of(snapshot).items():
        found[kind] = {taken.get(name, "exact") for name in names}
    return {kind: " and ".join(sorted(ids)) for kind, ids in sorted(found.items())}
