"""Which class of transformers' own registry a configuration belongs to."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

GENERATING = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.AutoModelForSeq2SeqLM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
"""Auto classes of models that generate text, to the names of their architectures by type of model."""


def auto_class(config: Any) -> Any:
    """The auto class that has this configuration's architecture; the first that generates text with it."""
    fitting = [auto for auto, names in GENERATING.items() if config.model_type in names]
    if AutoModelForCausalLM in fitting and getattr(config, "is_encoder_decoder", False):
        fitting.remove(AutoModelForCausalLM)
    return next(iter(fitting), AutoModelForCausalLM)
