"""Every entry of transformers' mapping for sequence to sequence."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from architectures import image_text
from architectures.cases import Case, tokens
from architectures.image_text import Inputs, around, at, noise, ones, with_features


def audio_token(model: Any) -> int:
    config = model.config
    return int(config.audio_token_id if hasattr(config, "audio_token_id") else config.audio_token_index)


def sound(**given: torch.Tensor) -> Inputs:
    """A prompt with as many placeholders as the model makes features of this sound."""
    return lambda model: with_features(model, "audio", audio_token(model), **given)


def counted(n: int, **given: torch.Tensor) -> Inputs:
    """A prompt with `n` placeholders for this sound."""
    return lambda model: around(model, n, audio_token(model)) | given


MEL = {"input_features": noise(1, 128, 32), "input_features_mask": ones(1, 32)}
WHISPER = at("audio_config", max_source_positions=16, intermediate_size=128)
SPOKEN = at("encoder_config", input_dim=16, dim_head=8, context_size=8, max_pos_emb=16, output_dim=42)
TOKENIZER = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}

DEFAULT = Case()

CHANGED: dict[str, Case] = {
    "audioflamingo3": Case(WHISPER, inputs=sound(**MEL)),
    "bigbird_pegasus": Case({"block_size": 2, "num_random_blocks": 1}),
    "encoder-decoder": Case({"decoder_start_token_id": 0}),
    "fsmt": Case({"src_vocab_size": 512, "tgt_vocab_size": 512, "num_beams": 1}),
    "glmasr": Case(WHISPER, inputs=sound(**MEL)),
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus"),
        Case(SPOKEN | {"window_size": 15, "audio_token_index": 500}, inputs=sound(input_features=noise(1, 20, 16))),
    ),
    "led": Case({"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    "longt5": Case({"local_radius": 3, "global_block_size": 4}),
    "moss_transcribe_diarize": Case(
        WHISPER,
        inputs=sound(input_features=noise(1, 80, 32), input_features_mask=ones(1, 32), padding_mask=ones(1, 5120)),
    ),
    "musicflamingo": Case(WHISPER, inputs=counted(8, **MEL)),
    "nemo_speechlm": Case(inputs=sound(input_features=noise(1, 64, 128), input_features_mask=ones(1, 64))),
    "nllb-moe": Case({"encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "pegasus_x": Case({"block_size": 8, "num_global_tokens": 4}),
    "qwen2_audio": Case(
        WHISPER, inputs=counted(8, input_features=noise(1, 128, 32), feature_attention_mask=ones(1, 32))
    ),
    "qwen3_asr": Case(inputs=sound(input_features=noise(1, 128, 100), input_features_mask=ones(1, 100))),
    "switch_transformers": Case({"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    "t5gemma2": image_text.CASES["t5gemma2"],
    "vibevoice_asr": Case(
        at("acoustic_tokenizer_encoder_config", **TOKENIZER) | at("semantic_tokenizer_encoder_config", **TOKENIZER),
        inputs=sound(input_values=noise(1, 1, 32), padding_mask=ones(1, 32).bool()),
    ),
    "voxtral": Case(WHISPER | {"audio_token_id": 500}, inputs=sound(input_features=noise(1, 128, 32))),
    "voxtral_realtime": Case(inputs=lambda model: {"input_ids": tokens(), "input_features": noise(1, 128, 256)}),
}

CASES = {name: CHANGED.get(name, DEFAULT) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
