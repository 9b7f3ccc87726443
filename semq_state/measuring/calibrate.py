"""`sq.calibrate`: a live model to a calibration."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from semq_state import calibration as calibrations
from semq_state.calibration import Calibration

_N_PREDICTED = 8  # texts from which keys and values are predicted by one another

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps of it done so far and in all."""


def calibrate(
    model: Any,
    tokenizer: Any = None,
    *,
    text: str | Sequence[str] | None = None,
    into: str | os.PathLike[str] | None = None,
    n_contexts: int = 26,
    n_gradients: int = 8,
    seed: int = 0,
    lossless: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Measures what compact snapshots of a model's states need to know, once for a model.

    How its keys and values vary together, which of them its next words depend on, and which tokens. The result is
    saved where `sq.save(codec="compact")` finds it by the digest of the weights.

    Args:
        model: a decoder with keys and values, on any device; left as it was.
        tokenizer: for `text`.
        text: what to run it on, one text or several in equal shares: the more like what will be saved the better;
            a mixture of prose and code serves both. Without any the model writes its own.
        into: a file for the calibration, instead of its place in the cache folder.
        n_contexts: pieces of 1,024 tokens.
        n_gradients: on how many of them gradients are taken.
        seed: of labels, signs and samples.
        lossless: measure as well what `sq.save(codec="exact-predicted")` needs, for a model in bfloat16; it is kept
            beside the calibration.
        progress: called with what is done, and how much of it.

    Returns:
        The calibration, saved.

    Raises:
        CalibrationError: the text is too short, or the model has no keys and values to transform; recurrent states
            stay exact, and other states take codecs without a calibration.

    Example:
        >>> sq.calibrate(model, tokenizer, text=prose + code)  # doctest: +SKIP
        >>> sq.save(run.snapshot(), "chat.safetensors", codec="compact")  # doctest: +SKIP
    """
    from semq_state.fingerprint import weights_digest
    from semq_state.measuring.steps import calibrated

    began = time.monotonic()
    tell = progress or (lambda words, done, total: None)
    texts = [text] if isinstance(text, str) else list(text or ())
    weights = weights_digest(model)
    made = calibrated(model, tokenizer, texts, n_contexts, n_gradients, seed, tell)
    about = {**made.about, "seconds": round(time.monotonic() - began, 1)}
    done = replace(made, weights=weights, about=about)
    calibrations.save_calibration(done, into or calibrations.place_for(done.weights))
    if lossless:
        _measure_predictor(model, tokenizer, texts, seed, tell)
    return done


def _measure_predictor(model: Any, tokenizer: Any, texts: list[str], seed: int, tell: Progress) -> None:
    from semq_state.measuring import contexts
    from semq_state.measuring.predictor import measure_predictor
    from semq_state.measuring.steps import N_TOKENS

    n = _N_PREDICTED
    runs = (
        contexts.pieces(tokenizer, texts, n, N_TOKENS) if texts else contexts.samples(model, n, N_TOKENS, seed=seed)
    )
    measure_predictor(model, runs, progress=lambda done, total: tell("lossless", done, total))
