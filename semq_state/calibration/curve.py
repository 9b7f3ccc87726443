"""From the quality or the size that is wanted to a step, by what a calibration measured.

In units of importance the divergence grows with the square of the step (KL = N p step² / 24 for N tokens of p
numbers, each with the uniform error of a rounding); between two measured points it is interpolated on logarithmic
axes, beyond them the law goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from semq_state.calibration.artifact import Calibration, Measured
from semq_state.errors import CalibrationError

_FINEST, _COARSEST = 2.0**-40, 2.0**40


def step_for_kl(calibration: Calibration, kl: float) -> float:
    """The step at which the next token's mean KL divergence is `kl` nats.

    Raises:
        CalibrationError: nothing was measured.
    """
    return _solved(lambda step: kl_at(calibration, step) - kl)


def step_for_bits(calibration: Calibration, bits_per_value: float) -> float:
    """The step at which the coded tokens take `bits_per_value`.

    Raises:
        CalibrationError: nothing was measured.
    """
    return _solved(lambda step: bits_per_value - bits_at(calibration, step))


def kl_at(calibration: Calibration, step: float) -> float:
    """The expected KL divergence at a step."""
    curve = _curve(calibration)
    low, high = _around(curve, step)
    if low is high:
        return low.kl * (step / low.step) ** 2
    return math.exp(_between(step, low, high, lambda point: math.log(max(point.kl, 1e-12))))


def bits_at(calibration: Calibration, step: float) -> float:
    """The expected bits per value at a step."""
    curve = _curve(calibration)
    low, high = _around(curve, step)
    if low is not high:
        return math.exp(_between(step, low, high, lambda point: math.log(max(point.bits_per_value, 1e-12))))
    if step <= low.step:  # finer than measured: a bit for each halving
        return low.bits_per_value + math.log2(low.step / step)
    return low.bits_per_value * low.step / step


def _curve(calibration: Calibration) -> Sequence[Measured]:
    if not calibration.curve:
        raise CalibrationError(
            "calibration", expected="a measured curve", found="none", do="calibrate again, or give a step"
        )
    return sorted(calibration.curve, key=lambda point: point.step)


def _around(curve: Sequence[Measured], step: float) -> tuple[Measured, Measured]:
    """The measured points on both sides of a step; the same one twice beyond the ends."""
    if step <= curve[0].step:
        return curve[0], curve[0]
    for low, high in pairwise(curve):
        if step <= high.step:
            return low, high
    return curve[-1], curve[-1]


def _between(step: float, low: Measured, high: Measured, of: Callable[[Measured], float]) -> float:
    share = math.log(step / low.step) / math.log(high.step / low.step)
    return of(low) + share * (of(high) - of(low))


def _solved(rising: Callable[[float], float]) -> float:
    """Where a rising function of the step crosses zero, by bisection on a logarithmic axis."""
    low, high = math.log(_FINEST), math.log(_COARSEST)
    for _ in range(60):
        middle = (low + high) / 2
        if rising(math.exp(middle)) > 0:
            high = middle
        else:
            low = middle
    return math.exp(low)
