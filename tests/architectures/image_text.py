"""Every entry of transformers' mapping for image and text to text, with an image in the prompt if one can be."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    Gemma3nVisionConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
    PreTrainedModel,
    ResNetConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from architectures.cases import N_PROMPT, Case, tokens

Inputs = Callable[[Any], dict[str, Any]]
IMAGE_TOKEN = 500
"""Where the configuration names none, or one of those that a prompt is made of."""


def noise(*shape: int) -> torch.Tensor:
    """Pixels or sound that means nothing, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def at(part: str, **changes: Any) -> dict[str, Any]:
    """Changes to the fields of one part of a configuration."""
    return {f"{part}.{name}": value for name, value in changes.items()}


text, vision = (functools.partial(at, part) for part in ("text_config", "vision_config"))


# --- what `generate` is given ---


def around(model: Any, n: int, token: int) -> dict[str, torch.Tensor]:
    """A prompt with `n` placeholders in the midst of ordinary tokens, and what tells them apart."""
    ids = torch.cat([tokens()[:, :6], torch.full((1, n), token), tokens()[:, 6:]], dim=-1)
    asked = inspect.signature(model.forward).parameters
    kinds = {name: (ids == token).int() for name in ("mm_token_type_ids", "token_type_ids") if name in asked}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}


def rows(features: Any) -> int:
    """How many vectors there are, in one tensor or in many."""
    return features[..., 0].numel() if isinstance(features, torch.Tensor) else sum(rows(part) for part in features)


def with_features(model: Any, kind: str, token: int, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt with as many placeholders as the model itself makes features of `given`."""
    name = f"get_{kind}_features"
    with torch.no_grad():
        made = getattr(model if hasattr(model, name) else model.model, name)(**given, return_dict=True)
    if not isinstance(made, (torch.Tensor, list, tuple)):
        made = made.last_hidden_state if made.get("pooler_output") is None else made.pooler_output
    return around(model, rows(made), token) | given


def image_token(model: Any) -> int:
    names = ("image_token_id", "image_token_index", "image_patch_id")
    return next(int(token) for name in names if (token := getattr(model.config, name, None)) is not None)


def tiles(*shape: int, **more: Any) -> Inputs:
    """A prompt with one image whose pixels have this shape."""
    return lambda model: with_features(model, "image", image_token(model), pixel_values=noise(*shape), **more)


def image(model: Any, **more: Any) -> dict[str, torch.Tensor]:
    """A prompt with one image of 32 x 32, or of 4 x 4 patches in a row where the model wants them so."""
    owner = model if hasattr(model, "get_image_features") else model.model
    asked = inspect.signature(owner.get_image_features).parameters
    eyes = model.config.vision_config
    if "image_grid_thw" in asked:
        channels = getattr(eyes, "in_channels", None) or getattr(eyes, "num_channels", 3)
        frames = getattr(eyes, "temporal_patch_size", None) or getattr(eyes, "patch_temporal", 1)
        more = {"image_grid_thw": torch.tensor([[1, 4, 4]])} | more
        return tiles(16, channels * frames * eyes.patch_size**2, **more)(model)
    if "image_sizes" in asked:
        more = {"image_sizes": torch.tensor([[32, 32]])} | more
    return tiles(1, 3, 32, 32, **more)(model)


def squares(model: Any) -> dict[str, torch.Tensor]:
    """A prompt with an image in patches that are still squares."""
    side = model.config.vision_config.patch_size
    return tiles(16, 3, side, side, image_grid_thw=torch.tensor([[1, 4, 4]]))(model)


def packed(model: Any) -> dict[str, torch.Tensor]:
    """A prompt with an image whose patches lie in one long row of pixels."""
    side = model.config.vision_config.patch_size
    return tiles(1, 3, side, 64 * side, target_sizes=torch.tensor([[8, 8]]))(model)


def located(size: int) -> Inputs:
    """A prompt with an image of 6 x 6 patches that say where they are."""
    where = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
    return tiles(1, 36, size, image_position_ids=where)


def counted(n: int, *shape: int, **more: Any) -> Inputs:
    """A prompt with `n` placeholders for an image, where the model gives no features to count."""
    return lambda model: around(model, n, image_token(model)) | {"pixel_values": noise(*shape)} | more


def beside(*shape: int, **more: Any) -> Inputs:
    """An ordinary prompt, and an image that takes no place in it."""
    return lambda model: {"input_ids": tokens(), "pixel_values": noise(*shape)} | more


def alone(*shape: int) -> Inputs:
    """Only an image, for an encoder of images."""
    return lambda model: {"pixel_values": noise(*shape)}


def queried(n: int, *shape: int, **more: Any) -> Inputs:
    """A prompt with places for the queries of a Q-Former."""
    return lambda model: around(model, n, IMAGE_TOKEN) | {"pixel_values": noise(*shape)} | more


def flattened(model: Any) -> dict[str, torch.Tensor]:
    """Nine patches with their row and column before them."""
    where = torch.cartesian_prod(torch.arange(1.0, 4.0), torch.arange(1.0, 4.0))
    patches = noise(9, model.config.vision_config.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([where, patches], dim=-1)[None]}


def masked(given: Inputs) -> Inputs:
    """Four places for an image, told by a mask."""
    mask = torch.zeros(1, N_PROMPT, dtype=torch.long)
    mask[:, 3:7] = 1
    return lambda model: {"input_ids": tokens(), "image_embeds_position_mask": mask} | given(model)


def tiled(model: Any) -> dict[str, torch.Tensor]:
    """What cross-attention to the tiles of an image needs: the prompt sees two of four tiles, but for its start."""
    seen = torch.zeros(1, N_PROMPT, 1, 4, dtype=torch.long)
    seen[:, 4:, :, :2] = 1
    return {
        "input_ids": tokens(),
        "attention_mask": ones(1, N_PROMPT),
        "pixel_values": noise(1, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
        "cross_attention_mask": seen,
    }


def protein(model: Any) -> dict[str, torch.Tensor]:
    return {
        "input_ids": tokens(),
        "protein_input_ids": tokens(n=9) % 20 + 5,
        "protein_attention_mask": ones(1, 9),
    }


# --- what is done to the built model ---


def open_gates(model: Any) -> None:
    """Gates that start closed would hide the image."""
    for name, value in model.named_parameters():
        if name.endswith(("_gate", "alpha_cross_attn", "alpha_dense", "gate_attention", "gate_ffw")):
            value.data.fill_(0.5)


def loud(*parts: str) -> Callable[[Any], None]:
    """Larger weights in these parts, whose initial ones let nothing through in a model this small."""

    def prepare(model: Any) -> None:
        torch.manual_seed(0)
        for name, value in model.named_parameters():
            if value.ndim > 1 and any(part in name for part in parts):
                value.data.normal_(std=0.2)

    return prepare


def without(*names: str) -> Callable[[Any], None]:
    """For a `generate` of the model's own that sets these itself."""

    def prepare(model: Any) -> None:
        own = model.generate
        model.generate = lambda **given: own(**{k: v for k, v in given.items() if k not in names})

    return prepare


class EyesConfig(Gemma3nVisionConfig):
    model_type = "eyes"


class Eyes(PreTrainedModel):
    """Stands where transformers wants one of timm's networks."""

    config_class = EyesConfig

    def __init__(self, config: EyesConfig) -> None:
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, 16, 16)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


AutoConfig.register("eyes", EyesConfig, exist_ok=True)
AutoModel.register(EyesConfig, Eyes, exist_ok=True)


# --- the table ---

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = text(rope_parameters=ROPE | {"mrope_section": [2, 1, 1]})
"""For heads of 8 numbers, all of them turned."""
HALF_TURNED = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
SLIDING_AND_FULL = text(
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=12,
    rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
)
WINDOWED = vision(window_size=64)
PINPOINTS = {"image_grid_pinpoints": [[32, 32], [32, 64], [64, 32]]}
TILED_TWICE = Case(PINPOINTS, inputs=tiles(1, 2, 3, 32, 32, image_sizes=torch.tensor([[32, 32]])))
SAM = at("vision_config.sam_config", output_channels=16, downsample_channels=[16, 32])
SEEN_BY_SAM = loud("vision_tower", "projector")
ONE_OF_MANY = Case(inputs=tiles(1, 1, 3, 32, 32))
MERGED = torch.tensor([[64, 64]])
SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
RESNET = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", hidden_size=32)
CLIP_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = CLIPVisionConfig(**CLIP_SIZES, image_size=32, patch_size=16, model_args={"embed_dim": 32})
GEMMA4_EYES = Gemma4VisionConfig(**CLIP_SIZES, num_key_value_heads=2, head_dim=8, position_embedding_size=16)
GEMMA4_PATCHES = Gemma4UnifiedVisionConfig(patch_size=4, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)
CHAMELEON_WORDS = {"<image>": IMAGE_TOKEN} | {f"IMGIMG{chr(65 + i)}Z": 200 + i for i in range(8)}
EMU3_WORDS = {"<image>": IMAGE_TOKEN, "<|extra_200|>": 499} | {
    f"<|visual token {i:06d}|>": 200 + i for i in range(8)
}
DOTS3_SLIDING = {"num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 32, "qk_nope_head_dim": 48}
BOXES = torch.linspace(0, 1, 4 * N_PROMPT).reshape(1, N_PROMPT, 4)


DEFAULT = Case(inputs=image)

CHANGED: dict[str, Case] = {
    "aria": Case({"projector_patch_to_query_dict": {4: 4}}, inputs=image),
    "blip": Case(
        text(sep_token_id=None), prepare=without("eos_token_id", "pad_token_id"), inputs=beside(1, 3, 32, 32)
    ),
    "blip-2": Case({"image_token_index": IMAGE_TOKEN}, inputs=queried(4, 1, 3, 32, 32)),
    "chameleon": Case(
        {"vocabulary_map": CHAMELEON_WORDS, "image_token_id": IMAGE_TOKEN}
        | at("vq_config", num_embeddings=8, latent_channels=32, resolution=32, **SMALL_VQ),
        inputs=tiles(1, 3, 4, 4),
    ),
    "cohere2_vision": Case({"alignment_intermediate_size": 96}, inputs=image),
    "cohere_compass": Case(SLIDING_AND_FULL, inputs=image),
    "deepseek_ocr2": Case(
        text(
            num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1, num_experts_per_tok=2
        )
        | SAM,
        prepare=SEEN_BY_SAM,
        inputs=image,
    ),
    "deepseek_vl_hybrid": Case(
        inputs=functools.partial(image, high_res_pixel_values=noise(1, 3, 32, 32)),
    ),
    "diffusion_gemma": Case(impossible="writes whole blocks by diffusion with a generate of its own, not by token"),
    "dots3_note": Case(
        text(head_dim=64, per_layer_config={2: DOTS3_SLIDING})
        | vision(adapter_in_dim=32, adapter_out_dim=32)
        | at("audio_config", conv_output_size=256, adapter_out_dim=32),
        inputs=image,
    ),
    "emu3": Case(
        {"vocabulary_map": EMU3_WORDS, "image_token_id": IMAGE_TOKEN}
        | at("vq_config", codebook_size=8, temporal_downsample_factor=1, **SMALL_VQ),
        inputs=tiles(1, 3, 4, 4, image_sizes=torch.tensor([[4, 4]])),
    ),
    "ernie4_5_vl_moe": Case(
        text(moe_intermediate_size=[48, 24], rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}), inputs=image
    ),
    "evolla": Case(
        {"use_cache": True, "aligner_num_add_layers": 1, "resampler_depth": 1, "resampler_dim_head": 8}
        | {"resampler_heads": 2, "resampler_num_latents": 4},
        prepare=open_gates,
        inputs=protein,
    ),
    "exaone4_5": Case(WINDOWED | {"image_token_id": IMAGE_TOKEN, "video_token_id": 501}, inputs=image),
    "fast_vlm": Case({"vision_config": RESNET}, inputs=tiles(1, 3, 16, 16)),
    "florence2": Case(
        vision(depths=[1] * 4, embed_dim=[8, 8, 16, 32], num_heads=[1, 1, 2, 4], num_groups=[1, 1, 2, 4]),
        inputs=tiles(1, 3, 64, 64),
    ),
    "fuyu": Case(inputs=tiles(1, 6, 768)),
    "gemma3": Case({"mm_tokens_per_image": 4}, prepare=loud("mm_input_projection"), inputs=image),
    "gemma3n": Case(
        text(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
        | text(intermediate_size=48, activation_sparsity_pattern=[0.95, 0.0] * 2, vocab_size_per_layer_input=480)
        | {"vision_config": EyesConfig(hidden_size=32, vocab_size=8, vocab_offset=480), "image_token_id": 484}
        | at("audio_config", vocab_offset=488, vocab_size=24)
        | {"vision_soft_tokens_per_image": 4},
        inputs=image,
    ),
    "gemma4": Case({"vision_config": GEMMA4_EYES}, inputs=located(768)),
    "gemma4_unified": Case({"vision_config": GEMMA4_PATCHES}, inputs=located(432)),
    "git": Case(inputs=beside(1, 3, 32, 32)),
    "glm46v": Case(MROPE, inputs=image),
    "glm4v": Case(MROPE, inputs=image),
    "glm4v_moe": Case(text(head_dim=16, rope_parameters=HALF_TURNED), inputs=image),
    "glm5_next": Case(text(index_kpool=4) | vision(projection_intermediate_size=48), inputs=image),
    "glm_ocr": Case(MROPE, inputs=image),
    "glmga": Case(MROPE, inputs=image),
    "got_ocr2": Case(prepare=SEEN_BY_SAM, inputs=image),
    "granite4_vision": Case(
        {"image_grid_pinpoints": [[64, 64], [64, 128]], "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]]}
        | {"spatial_target_layers": [1] * 4, "qformer_config.num_hidden_layers": 1}
        | vision(image_size=64, patch_size=16, hidden_size=64),
        inputs=counted(10, 1, 2, 3, 64, 64, image_sizes=MERGED),
    ),
    "granite_docling": Case(
        vision(scale_factor=2, image_size=64),
        inputs=tiles(1, 1, 3, 64, 64, pixel_attention_mask=ones(1, 1).bool()),
    ),
    "hunyuan_vl": Case(
        text(head_dim=8, rope_parameters=ROPE | {"mrope_section": [1, 1, 1, 1]}) | vision(max_image_size=64),
        inputs=image,
    ),
    "hyperclovax_vision_v2": Case(WINDOWED, inputs=image),
    "idefics": Case(prepare=open_gates, inputs=beside(1, 1, 3, 32, 32, image_attention_mask=ones(1, N_PROMPT, 1))),
    "idefics2": ONE_OF_MANY,
    "idefics3": ONE_OF_MANY,
    "inkling2": Case(inputs=tiles(4, 32, 32, 3, image_grid_thw=torch.tensor([[1, 2, 2]]))),
    "inkling_mm_model": Case(
        vision(patch_size=4, n_layers=4) | at("audio_config", n_mel_bins=8, mel_vocab_size=16),
        inputs=tiles(3, 2, 4, 4, 3),
    ),
    "instructblip": Case(
        {"image_token_index": IMAGE_TOKEN}, inputs=queried(4, 1, 3, 32, 32, qformer_input_ids=tokens(n=7))
    ),
    "instructblipvideo": Case(
        {"video_token_index": IMAGE_TOKEN}, inputs=queried(8, 1, 2, 3, 32, 32, qformer_input_ids=tokens(n=7))
    ),
    "janus": Case(
        vision(num_image_tokens=4)
        | at(
            "vq_config", latent_channels=32, num_embeddings=16, num_patches=2, image_token_embed_dim=32, **SMALL_VQ
        ),
        inputs=image,
    ),
    "kimi_k25": Case(text(first_k_dense_replace=1), inputs=squares),
    "kosmos-2": Case(inputs=masked(alone(1, 3, 32, 32))),
    "kosmos-2.5": Case(vision(max_num_patches=16), inputs=masked(flattened)),
    "lfm2_vl": Case(
        text(num_hidden_layers=2, full_attn_idxs=[1], layer_types=["conv", "full_attention"]),
        inputs=tiles(1, 16, 768, spatial_shapes=torch.tensor([[4, 4]]), pixel_attention_mask=ones(1, 16)),
    ),
    "llama4": Case(
        text(moe_layers=[0, 1], intermediate_size_mlp=48)
        | vision(intermediate_size=128, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32),
        inputs=image,
    ),
    "llava_next": TILED_TWICE,
    "llava_next_video": TILED_TWICE,
    "llava_onevision": TILED_TWICE,
    **dict.fromkeys(
        ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
        Case(
            {"image_token_id": IMAGE_TOKEN, "video_token_id": 501, "insert_layer_id": 1}
            | vision(insert_layer_id=1),
            inputs=packed,
        ),
    ),
    "minimax_m3_vl": Case(
        text(num_hidden_layers=2, layer_types=["full_attention", "minimax_m3_sparse"], dense_intermediate_size=48)
        | text(rotary_dim=4, index_block_size=4, index_topk_blocks=2, head_dim=16, index_head_dim=16),
        inputs=image,
    ),
    "mistral3": Case(inputs=tiles(1, 3, 64, 64, image_sizes=MERGED)),
    "mistral4": Case({"head_dim": 32}),
    "mistral_large4": Case(
        text(num_hidden_layers=4, no_rope_layers=[1, 1, 0, 0], kv_source_layers=[0, 0, 2, 2])
        | text(indexer_types=["full", "shared", "full", "full"]),
        inputs=tiles(1, 3, 64, 64, image_sizes=MERGED),
    ),
    "mllama": Case(
        text(num_hidden_layers=2, cross_attention_layers=[1])
        | vision(num_global_layers=2, intermediate_layers_indices=[0, 1], vision_output_dim=96),
        prepare=open_gates,
        inputs=tiled,
    ),
    "molmo2": Case(
        vision(image_size=[32, 32], patch_size=16, num_position_embeddings=4, num_key_value_heads=4)
        | at("adapter_config", num_key_value_heads=4, vision_feature_layer=[1, 0])
        | {"image_patch_id": IMAGE_TOKEN},
        inputs=tiles(
            1, 4, 768, image_token_pooling=torch.tensor([[0, 1], [2, 3]]), image_grids=torch.tensor([[1, 1, 1, 1]])
        ),
    ),
    "muse_glimmer": Case({"out_hidden_size": 128}, inputs=image),
    "muse_spark": Case(
        {"out_hidden_size": 128} | at("audio_config", num_hidden_layers=4, hidden_sizes=[16] * 4), inputs=image
    ),
    "nemotron_h_omni": Case(
        {"image_token_id": IMAGE_TOKEN, "vision_hidden_size": 32}
        | text(mamba_num_heads=4, mamba_head_dim=16, n_groups=2, moe_shared_expert_intermediate_size=48),
        inputs=tiles(16, 768, image_grid_hw=torch.tensor([[4, 4]])),
    ),
    "paddleocr_vl": Case(MROPE, inputs=squares),
    "perception_lm": Case({"vision_config": CLIP}, inputs=tiles(1, 1, 3, 32, 32)),
    "pi0": Case(impossible="makes actions by flow matching (sample_actions) and has no generate"),
    "pix2struct": Case(text(use_cache=True) | vision(seq_len=16), inputs=flattened),
    "pp_chart2table": Case(prepare=SEEN_BY_SAM, inputs=image),
    "pp_formulanet": Case(
        vision(post_conv_in_channels=16, post_conv_mid_channels=16, post_conv_out_channels=32),
        prepare=loud("model.encoder"),
        inputs=alone(1, 3, 32, 32),
    ),
    "qwen2_5_omni_thinker": Case(WINDOWED | MROPE | {"vision_start_token_id": 505}, inputs=image),
    "qwen2_5_vl": Case(WINDOWED | MROPE, inputs=image),
    "qwen2_vl": Case(MROPE, inputs=image),
    "qwen3_omni_moe_thinker": Case({"vision_start_token_id": 505}, inputs=image),
    "qwen4_exp": Case(
        text(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4)
        | text(
            eos_token_id=2,
            ple_layer_ids=[1],
            number_of_conv_states=...,
            ple_embed_dim=32,
            ngram_vocab_size_base=64,
            hc_lowrank=8,
            split_ngram_parts=1,
        ),
        inputs=image,
    ),
    "shieldgemma2": Case({"mm_tokens_per_image": 4}, prepare=loud("mm_input_projection"), inputs=image),
    "smolvlm": ONE_OF_MANY,
    "step3p7": Case(SLIDING_AND_FULL | text(mlp_layer_types=["dense", "sparse"]), inputs=image),
    "t5gemma2": Case(
        at("encoder", mm_tokens_per_image=4), prepare=loud("mm_input_projection"), inputs=counted(4, 1, 3, 32, 32)
    ),
    "udop": Case({"decoder_start_token_id": 0}, inputs=beside(1, 3, 32, 32, bbox=BOXES)),
    "unlimited_ocr": Case(SAM, prepare=SEEN_BY_SAM, inputs=image),
    "video_llama_3": Case(inputs=functools.partial(image, image_merge_sizes=torch.tensor([2]))),
    "vipllava": Case({"vision_feature_layer": [-2, -1]}, inputs=image),
    "vision-encoder-decoder": Case({"decoder_start_token_id": 0}, inputs=alone(1, 3, 32, 32)),
}

CASES = {name: CHANGED.get(name, DEFAULT) for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
