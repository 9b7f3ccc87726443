"""How each entry of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING` is built small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures.cases import Case
from architectures.shrink import shrunk


def _part(name: str, part: str, **changes: Any) -> Callable[[], Any]:
    """The small configuration of one part of a composite: the entry's class takes only that."""
    return lambda: shrunk(getattr(CONFIG_MAPPING[name](), part), changes)


def _wake(model: Any) -> None:
    """Random values where the initial ones are all zero: such a weight hides the state that it multiplies."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def _open_gates(model: Any) -> None:
    """Input gates that start almost closed leave the normaliser of xLSTM without effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "igate" in name:
                parameter.fill_(4.0) if name.endswith("bias") else parameter.normal_(std=0.02)
            elif ".q." in name or ".k." in name:
                parameter.normal_(std=0.2)


AS_DECODER = Case({"is_decoder": True})
ROTARY = Case({"rotary_dim": 4})
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
HYBRID = ["linear_attention", "full_attention"]
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "per_layer_config": ...,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
DOTS3 = {
    "per_layer_config": ...,
    "head_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
    "shared_experts_intermediate_size": 48,
}
QWEN4 = {
    "hc_lowrank": 8,
    "number_of_conv_states": ...,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 512,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
LLAMA4 = {"moe_layers": [0, 1], "intermediate_size_mlp": 48}
PATTERN = Case(
    impossible="its own generate lays the delayed codebooks out over the whole run and undoes that in its result: "
    "a run of 5 tokens is no start of a run of 12"
)
DRAFTER = Case(
    impossible="its configuration has all layers share keys, which `kv_sharing_modes` then refuses on building; "
    "a drafter, it also needs the hidden states and keys of a target model at every step"
)


def _within(part: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in changes.items()}


def _gemma3n() -> Any:
    """Its image encoder is one of the package timm; another one stands in, as a text prompt never meets it."""
    config = shrunk(CONFIG_MAPPING["gemma3n"](), _within("text_config", GEMMA3N))
    own = config.vision_config
    encoder = shrunk(CONFIG_MAPPING["siglip_vision_model"]())
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(encoder, name, getattr(own, name))
    # Assigned without the check of its class.
    config.__dict__["vision_config"] = encoder
    return config


# fmt: off
CHANGED: dict[str, Case] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
         "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        AS_DECODER,
    ),
    "bailing_hybrid": Case({"num_expert_group": 2}),
    "bamba": Case(MAMBA2 | {"attn_layer_indices": [1]}),
    "big_bird": Case({"is_decoder": True, "attention_type": "original_full"}),
    "blt": Case({
        "local_attention_window_len": 12,
        "encoder_config.sliding_window": 12,
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 512,
        "encoder_config.hidden_size_global": 32,
        "decoder_config.hidden_size_global": 32,
    }),
    "codegen": ROTARY,
    "cohere_compass_text": Case({
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    }),
    "cpmant": Case({"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32}),
    "ctrl": Case({"dff": 48}),
    "dbrx": Case({"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}),
    "deepseek_v2": Case({"num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "deepseek_v3": Case({"first_k_dense_replace": 1}),
    "deepseek_v4": Case({
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_parameters": ...,
        "qk_rope_head_dim": 8,
        "compress_rates": {"compressed_sparse_attention": 5, "heavily_compressed_attention": 9},
        "o_groups": 2,
        "index_topk": 2,
    }),
    "doge": Case({"keep_window_size": 8}),
    "dots1": Case({
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }),
    "dots3_note": Case(config=_part("dots3_note", "text_config", **DOTS3)),
    "dots3_note_text": Case(DOTS3),
    "emu3": Case(config=_part("emu3", "text_config")),
    "falcon_h1": Case(MAMBA2 | {"mamba_d_ssm": 64}),
    "flint": Case({"mlp_only_layers": [0]}),
    "gemma3n": Case(config=_gemma3n),
    "gemma3n_text": Case(GEMMA3N),
    "gemma4": Case(_within("text_config", GEMMA4)),
    "gemma4_assistant": DRAFTER,
    "gemma4_text": Case(GEMMA4),
    "gemma4_unified": Case(_within("text_config", GEMMA4)),
    "gemma4_unified_assistant": DRAFTER,
    "gemma4_unified_text": Case(GEMMA4),
    "glm_moe_dsa": Case({"indexer_types": ["full", "shared"]}),
    "got_ocr2": Case({"vision_config.mlp_dim": 48, "vision_config.output_channels": 32}),
    "gpt_neo": Case({"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": ...}),
    "gptj": ROTARY,
    "granitemoe_swa": Case({"shared_intermediate_size": 48}),
    "granitemoehybrid": Case(MAMBA2 | {"num_hidden_layers": 2, "layer_types": HYBRID}),
    "granitemoeshared": Case({"shared_intermediate_size": 48}),
    "hrm_text": Case({"num_hidden_layers": 2, "num_layers_per_stack": ...}),
    "hunyuan_v1_dense": Case({"head_dim": 8}),
    "hunyuan_v1_moe": Case({"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "inkling2_text": Case({"rel_extent": 16}),
    "inkling_text": Case({"rel_extent": 16}),
    "jamba": Case({"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "laguna": Case({"layer_types": ["full_attention", "sliding_attention"]}),
    "lfm2": Case({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}),
    "lfm2_moe": Case({
        "num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
    }),
    "llama4": Case(config=_part("llama4", "text_config", **LLAMA4)),
    "llama4_text": Case(LLAMA4),
    "longcat_flash": Case({"expert_ffn_hidden_size": 48, "zero_expert_num": 2}),
    "mamba2": Case({"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "marian": Case({"decoder_vocab_size": 512}),
    "mellum": Case({"layer_types": ["full_attention", "sliding_attention"]}),
    "minimax": Case({"block_size": 8}),
    "minimax_m3_vl_text": Case({
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "dense_intermediate_size": 48,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    }),
    "ministral": Case({"head_dim": 8}),
    "mllama": Case({"text_config.num_hidden_layers": 3, "text_config.cross_attention_layers": [1]}),
    "mpt": Case({"use_cache": True}),
    "musicgen": PATTERN,
    "musicgen_melody": PATTERN,
    "nemotron": Case({"num_key_value_heads": 2}),
    "nemotron_h": Case({
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "moe_shared_expert_intermediate_size": 48,
    }),
    "phi4_multimodal": Case({
        "audio_config.num_blocks": 2,
        "audio_config.ext_pw_out_channel": 32,
        "audio_config.depthwise_separable_out_channel": 32,
        "audio_config.nemo_conv_channels": 32,
    }),
    "qwen3_5": Case(config=_part("qwen3_5", "text_config")),
    "qwen3_5_moe": Case(config=_part("qwen3_5_moe", "text_config")),
    "qwen4_exp": Case(config=_part("qwen4_exp", "text_config", **QWEN4), prepare=_wake),
    "qwen4_exp_text": Case(QWEN4, prepare=_wake),
    "recurrent_gemma": Case({"num_hidden_layers": 2, "block_types": ["recurrent", "attention"], "lru_width": 32}),
    "reformer": Case({
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    }),
    "rembert": Case({"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 32}),
    "roc_bert": Case({
        "is_decoder": True,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 512,
        "shape_vocab_size": 512,
    }),
    "smollm3": Case({"no_rope_layers": [1, 0]}),
    "xlm": Case({"emb_dim": 32}),
    "xlnet": Case({"mem_len": 12, "d_head": 8, "d_inner": 48}),
    "xlstm": Case({"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2}, prepare=_open_gates),
    "xmod": Case({"is_decoder": True}, prepare=lambda model: model.set_default_language("en_XX")),
    "zamba": Case({
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    }),
    "zamba2": Case({
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": ...,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
    }),
    "zaya": Case({"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 12}, prepare=_wake),
}
# fmt: on
"""What needs more than the general reduction."""

CASES = {name: CHANGED.get(name, Case()) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
"""One case an entry."""
