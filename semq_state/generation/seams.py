"""The methods of `GenerationMixin` that we step into, and how to step into them for the length of a `with`.

`generate` looks these up on the model object at every call, so a replacement in the object's own dictionary is
seen by `generate`, pipelines, threads and wrappers alike, and leaving means removing it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from semq_state.errors import UnsupportedModelError

LOGITS_PROCESSORS = "_get_logits_processor"
STOPPING_CRITERIA = "_get_stopping_criteria"
PREFILL = "_prefill"
STEP_TAKEN = "_update_model_kwargs_for_generation"
CANDIDATES = "_get_candidate_generator"

_MISSING = object()


def base_model(model: Any) -> Any:
    """The `PreTrainedModel` inside `model`: itself, or what an adapter or `torch.compile` wraps.

    Raises:
        UnsupportedModelError: there is none that can generate.
    """
    # A compiled wrapper hands attributes through in one direction only; hooks set there would stay for ever.
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    lacking = [
        seam
        for seam in (LOGITS_PROCESSORS, STOPPING_CRITERIA, PREFILL, STEP_TAKEN, CANDIDATES)
        if not callable(getattr(inner, seam, None))
    ]
    if lacking:
        raise UnsupportedModelError(
            type(model).__name__,
            expected="a transformers model that can generate",
            found=f"no {', '.join(lacking)}",
            do="pass a model of transformers 5.23 or later, from AutoModelForCausalLM say",
        )
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(
            type(inner).__name__,
            expected="a decoder",
            found="an encoder-decoder model",
            do="its encoder outputs cannot be kept yet",
        )
    return inner


@contextlib.contextmanager
def replaced(model: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    """Puts `replacements` in front of `model`'s own attributes, and takes exactly them away again at the end."""
    before = {name: vars(model).get(name, _MISSING) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(model, name, replacement)
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                vars(model).pop(name, None)
            else:
                setattr(model, name, value)
