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

TOP_CONTINUATIONS = "_get_top_k_continuations"
RUNNING_BEAMS = "_get_running_beams_for_next_iteration"
FINISHED_BEAMS = "_update_finished_beams"
EARLY_STOP = "_check_early_stop_heuristic"
BEAMS_LEFT = "_beam_search_has_unfinished_sequences"
REORDER = "_reorder_cache"

MODEL_INPUTS = "_prepare_model_inputs"
ENCODER = "_maybe_prepare_encoder_kwargs_for_generation"
DECODER_INPUTS = "_prepare_decoder_input_ids_for_generation"
EXPAND = "_expand_inputs_for_generation"
PREPARE_CACHE = "_prepare_cache_for_generation"
VALIDATE = "_validate_model_kwargs"
NEXT_INPUTS = "prepare_inputs_for_generation"

_NEEDED = (
    LOGITS_PROCESSORS, STOPPING_CRITERIA, PREFILL, STEP_TAKEN, CANDIDATES, TOP_CONTINUATIONS, RUNNING_BEAMS,
    FINISHED_BEAMS, EARLY_STOP, BEAMS_LEFT, MODEL_INPUTS, ENCODER, DECODER_INPUTS, EXPAND, PREPARE_CACHE, VALIDATE,
    NEXT_INPUTS,
)  # fmt: skip

_MODEL = ("config", "named_modules", "num_parameters", "dtype")

_MISSING = object()


def base_model(model: Any, *, generates: bool = True) -> Any:
    """The `PreTrainedModel` inside `model`: itself, or what an adapter or `torch.compile` wraps.

    Args:
        model: the model, or a wrapper around it.
        generates: whether it has to be able to; an encoder is not.

    Raises:
        UnsupportedModelError: there is none, or none that can generate.
    """
    # A compiled wrapper hands attributes through in one direction only; hooks set there would stay for ever.
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    lacking = _lacking(inner) if generates else [name for name in _MODEL if not hasattr(inner, name)]
    if lacking:
        raise UnsupportedModelError(
            type(model).__name__,
            expected=f"a transformers model{' that can generate' if generates else ''}",
            found=f"no {', '.join(lacking)}",
            do="pass a model of transformers 5.23 or later, from AutoModelForCausalLM say",
        )
    return inner


def generators(model: Any) -> dict[str, Any]:
    """The modules of `model` that run a generation loop, by path; `model` itself is the first, under `""`.

    Some models only prepare a prompt and have a part of theirs generate (BLIP-2's language model, say).
    """
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, LOGITS_PROCESSORS) and not _lacking(module)
    }


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


def _lacking(model: Any) -> list[str]:
    return [seam for seam in _NEEDED if not callable(getattr(model, seam, None))]
