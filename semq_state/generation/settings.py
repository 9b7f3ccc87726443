"""A resolved `GenerationConfig` as plain values, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from semq_state.provenance import plain

_NOT_KEPT = ("transformers_version", "_from_model_config", "compile_config")
# `compile_config` is about speed; it holds objects of torch's own.


def encoder_tokens_matter(config: GenerationConfig) -> bool:
    """Whether a processor compares what is generated with the encoder's tokens."""
    penalty, ngram = config.encoder_repetition_penalty, config.encoder_no_repeat_ngram_size
    return (penalty is not None and penalty != 1.0) or bool(ngram)


def dump_config(config: GenerationConfig) -> dict[str, Any]:
    """The settings that a generation ran with, defaults included."""
    values = {
        name: _without_objects(value)
        for name, value in config.to_dict().items()
        if name not in _NOT_KEPT and not name.endswith("_tensor")
    }
    return {name: plain(value) for name, value in sorted(values.items())}


def rebuild_config(values: Mapping[str, Any]) -> GenerationConfig:
    """The inverse of `dump_config`; a setting that this transformers does not know is reported, not obeyed."""
    known = GenerationConfig().to_dict().keys()
    unknown = sorted(name for name, value in values.items() if name not in known and value is not None)
    if unknown:
        warnings.warn(
            f"generation settings that this version of transformers does not know were left out: {unknown}",
            stacklevel=3,
        )
    kept = {name: value for name, value in values.items() if name in known and value is not None}
    watermark = kept.get("watermarking_config")
    if watermark is not None:
        # `GenerationConfig` would make either a `WatermarkingConfig`.
        kind = SynthIDTextWatermarkingConfig if "ngram_len" in watermark else WatermarkingConfig
        kept["watermarking_config"] = kind(**watermark)
    return GenerationConfig(**kept)


def _without_objects(value: Any) -> Any:
    """A setting in the other form that `generate` takes, where `plain` could not give it back."""
    if isinstance(value, (WatermarkingConfig, SynthIDTextWatermarkingConfig)):
        return value.to_dict()
    if isinstance(value, Mapping) and any(isinstance(key, tuple) for key in value):
        return [[list(tokens), bias] for tokens, bias in value.items()]
    return value
