"""Any transformers configuration, made small: a few hundred thousand parameters, two layers of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

N_VOCABULARY = 512

SMALL: dict[str, int] = {
    # widths
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "embed_dim",
            "dim",
            "decoder_hidden_size",
            "hidden_dim",
            "embedding_size",
            "attention_hidden_size",
            "projection_dim",
            "output_dim",
            "out_hidden_size",
            "text_hidden_size",
            "projector_hidden_size",
            "adapter_input_size",
            "audio_hidden_size",
            "encoder_hidden_size",
            "word_embed_proj_dim",
            "patch_embed_hidden_size",
            "projection_hidden_size",
            "image_text_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "shared_expert_intermediate_size",
            "expert_intermediate_size",
            "ffn_hidden_size",
            "feed_forward_size",
            "shared_intermediate_size",
        ),
        48,
    ),
    # depth
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_layers",
            "n_layer",
            "n_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "depth",
            "num_hidden_groups",
            "layers",
        ),
        2,
    ),
    **dict.fromkeys(("num_query_tokens", "latent_query_num"), 4),
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "swa_num_attention_heads",
            "decoder_attention_heads",
            "attention_heads",
            "num_attention_heads_per_layer",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim", "swa_head_dim"), 8),
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    "qk_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1
    ),
    # windows, so that a short run crosses them
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "attention_window", "attention_window_size"), 12
    ),
    "attention_chunk_size": 16,
    # tables
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), N_VOCABULARY),
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_target_positions",
            "max_source_positions",
            "max_seq_len",
            "seq_length",
        ),
        256,
    ),
    # recurrent layers
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    "time_step_rank": 4,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    # vision, sound and what else only some have
    "moe_hidden_size": 32,
    **dict.fromkeys(("shared_experts_intermediate_size", "mlp_dim", "share_expert_dim"), 48),
    **dict.fromkeys(("output_channels", "downsample_hidden_size"), 16),
    "num_position_embeddings": 16,
    "image_size": 32,
    "patch_size": 16,
}
"""Sizes by the names that most configurations use. What fits none stays, unless a table of its own says so."""

PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "attention_types",
    "indexer_types",
)

NAMED_LAYERS = ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes")
"""Lists of the layers of a vision encoder that are special: the last of two."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def shrunk(config: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """A new configuration like `config`, with small sizes.

    Args:
        config: an instance with its defaults.
        changes: field to value, over the general table; `text_config.layers` reaches into a part; None as a
            value of a part keeps it as it is.
    """
    return type(config)(**_small_fields(config, dict(changes or {})))


def _small_fields(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    parts = {name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None}
    special = [name for name in fields if name.endswith(("_token_id", "_token_index"))]
    layers = _kept_layers(fields) if not any(name in changes for name in DEPTHS) else {}
    latent = _latent(fields)
    for name in list(fields):
        if name in parts or name in layers:
            continue
        if name in SMALL and type(fields[name]) is int:
            fields[name] = min(fields[name], SMALL[name]) if fields[name] > 0 else fields[name]
        elif name in NAMED_LAYERS and fields[name]:
            fields[name] = [1]
        elif name in PER_LAYER:
            # Left to the class, which derives it from the number of layers.
            del fields[name]
        elif name in special and isinstance(fields[name], int) and fields[name] >= N_VOCABULARY:
            # Those of the whole differ from each other, and from those of its parts.
            fields[name] = N_VOCABULARY - 1 - special.index(name) - (8 if parts else 0)
    fields |= layers
    if fields.get("forced_eos_token_id") is not None:
        # It would make the last token of the first part another one than that of the whole run.
        fields["forced_eos_token_id"] = None
    if (
        config.is_encoder_decoder
        and not parts
        and all(fields.get(f"{name}_token_id") is None for name in ("bos", "decoder_start"))
    ):
        fields["decoder_start_token_id"] = 0
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if isinstance(rope, dict) and isinstance(rope.get("mrope_section"), (list, tuple)):
            old, new = (_head_dim(which) for which in (config.to_dict(), fields | changes))
            half = int(sum(rope["mrope_section"]) * new // old)
            fields[name] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    for name in parts:
        own = {k[len(name) + 1 :]: v for k, v in changes.items() if k.startswith(name + ".")}
        fields[name] = shrunk(getattr(config, name), own)
    fields |= latent | {k: v for k, v in changes.items() if "." not in k}
    return {k: v for k, v in fields.items() if v is not ...}


def _head_dim(fields: Mapping[str, Any]) -> int:
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


def _kept_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers and all lists of one value a layer, for the first layer of each kind, two at least."""
    depth = next((name for name in DEPTHS if fields.get(name)), None)
    listed = (
        {}
        if depth is None
        else {k: v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == fields[depth] > 2}
    )
    kinds = [v for k, v in listed.items() if k in PER_LAYER]
    if depth is None or not kinds:
        return {}
    first = {kind: i for i, kind in reversed(list(enumerate(zip(*kinds, strict=True))))}
    kept = sorted(first.values()) if len(first) > 1 else [0, 1]
    small = {depth: len(kept)} | {k: [_small(k, v[i]) for i in kept] for k, v in listed.items()}
    if isinstance(fields.get("per_layer_config"), dict):
        own = {
            int(k): {n: 2 * SMALL[n] if n in SMALL else v for n, v in values.items()}
            for k, values in fields["per_layer_config"].items()
        }
        small["per_layer_config"] = {new: own[old] for new, old in enumerate(kept) if old in own}
    return small


def _small(name: str, value: Any) -> Any:
    return min(value, SMALL[name]) if name in SMALL and type(value) is int else value


def _latent(fields: dict[str, Any]) -> dict[str, Any]:
    """Multi-head latent attention has as many key heads as heads, and widths that depend on each other."""
    if type(fields.get("kv_lora_rank")) is not int:
        return {}
    heads = {"num_key_value_heads": SMALL["num_attention_heads"]} if "num_key_value_heads" in fields else {}
    rotary = fields.get("head_dim") == fields.get("qk_rope_head_dim", ...)
    return heads | ({"head_dim": SMALL["qk_rope_head_dim"]} if rotary else {})
