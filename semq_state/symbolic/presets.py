"""From a word to a policy: which codec, at which step, for the model at hand."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

from semq_state.calibration import Calibration, kl_at
from semq_state.codecs import (
    AbstractVectorCodec,
    AbstractWeightedCodec,
    Neuqi,
    Rotated,
    Semq,
    Septq,
    Specquant,
    Transform,
    Uniform,
)
from semq_state.errors import CalibrationError, UnknownCodecError
from semq_state.symbolic.policy import Policy, everywhere

KL = {"near": 0.0003, "compact": 0.0016, "tiny": 0.010}
"""Mean KL divergence of the next token, in nats, that a preset asks of a calibrated transform."""

STEPS = {"near": 0.1, "compact": 0.3, "tiny": 0.6}
"""Step of the rotated codec that stands in where there is no calibration, by the same measure of quality."""

CODECS: dict[str, AbstractVectorCodec] = {
    "rotated": Rotated(),
    "uniform": Uniform(),
    "semq": Semq(),
    "neuqi": Neuqi(bits=4),
    "septq": Septq(bits=4),
    "specquant": Specquant(bits=4),
}
"""Codecs that can be asked for by their id, with their defaults."""

SCALED = Semq(centred=True, scaled=True)
"""What `semq` means for hidden states, whose channels differ a hundredfold."""

_TARGET = re.compile(r"(kl|ratio)=(\d*\.?\d+(?:[eE][+-]?\d+)?)")


class NotCalibratedWarning(UserWarning):
    """A preset took the codec that needs no calibration, because there is none for this model."""


def is_lossy(codec: str) -> bool:
    """Whether a word asks for a lossy codec."""
    return codec in KL or codec in CODECS or _TARGET.fullmatch(codec) is not None


def words() -> str:
    """What can be asked for, for messages."""
    return ", ".join([*KL, *CODECS, "kl=0.002", "ratio=20"])


def policy_for(codec: str, calibration: Calibration | None, model: str) -> Policy:
    """The policy that a word asks for.

    Args:
        codec: a preset, `kl=…`, `ratio=…`, or the id of a codec.
        calibration: of the model whose state is coded; None where there is none.
        model: its name, for messages.

    Raises:
        CalibrationError: `kl=` or `ratio=` without a calibration.
        UnknownCodecError: no such word.
    """
    if codec in CODECS:
        policy = everywhere(CODECS[codec])
        if codec == Semq.id:
            return Policy({**policy.codecs, "hidden": SCALED})
        weighs = isinstance(CODECS[codec], AbstractWeightedCodec)
        return replace(policy, importance=calibration) if weighs else policy
    target = _TARGET.fullmatch(codec)
    if codec not in KL and not target:
        raise UnknownCodecError("codec", expected=words(), found=f"{codec!r:.80}", do="choose one")
    if calibration is None:
        if target:
            raise CalibrationError(
                f"codec {codec!r}",
                expected="a calibration of this model, whose measured curve leads to a step",
                found="none",
                do=f"run `semq-state calibrate {model or 'MODEL'}` once, or take near, compact or tiny",
            )
        warnings.warn(
            f"no calibration for {model or 'this model'}: {codec!r} takes the rotated codec, of the same quality "
            f"but several times larger; `semq-state calibrate {model or 'MODEL'}` makes one",
            NotCalibratedWarning,
            stacklevel=4,
        )
        return everywhere(Rotated(step=STEPS[codec]))
    if target:
        value = float(target[2])
        if not 0 < value < float("inf"):
            raise UnknownCodecError(
                "codec",
                expected=f"a positive number after {target[1]}=",
                found=f"{codec:.80}",
                do="choose one, 0.002 or 20 say",
            )
        transform = Transform(calibration, kl=value) if target[1] == "kl" else Transform(calibration, ratio=value)
    else:
        transform = Transform(calibration, kl=KL[codec])
    # Layers that the calibration does not have must not be worse than those that it has.
    kl = kl_at(calibration, transform.step)
    name = next((name for name in ("tiny", "compact") if kl >= 0.99 * KL[name]), "near")
    fallback = everywhere(Rotated(step=STEPS[name]))
    return Policy(fallback.codecs, transform)
