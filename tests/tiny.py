# SPDX-License-Identifier: Apache-2.0
"""A tiny random image classifier of every family in transformers, and noise that its forward accepts."""

import copy
import math

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel

LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PLAIN = {**LAYERS, "image_size": 8, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONVNEXT = {**STAGES, "num_stages": 2, "image_size": 8}
WINDOWS = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
PYRAMID = {**STAGES, "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
# config class: what makes it tiny
TRANSFORMERS: dict[str, dict] = {
    "BeitConfig": PLAIN,
    "BitConfig": {**STAGES, "embedding_size": 8, "num_groups": 4},
    "CLIPConfig": {"vision_config": PLAIN},
    "ConvNextConfig": CONVNEXT,
    "ConvNextV2Config": CONVNEXT,
    "CvtConfig": {"embed_dim": [8, 16], "num_heads": [1, 2], "depth": [1, 2], "cls_token": [False, True]},
    "Data2VecVisionConfig": PLAIN,
    "DeiTConfig": PLAIN,
    "DinatConfig": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1], [1]]},
    "Dinov2Config": PLAIN,
    "Dinov2WithRegistersConfig": PLAIN,
    "DonutSwinConfig": WINDOWS,
    "EfficientNetConfig": {
        "image_size": 32,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 128,  # the width of the last convolution, which is 1280 times the coefficient
    },
    "FocalNetConfig": {**STAGES, "image_size": 8, "embed_dim": 8},
    "HGNetV2Config": {
        "embedding_size": 8,
        "stem_channels": [3, 8, 8],
        **dict.fromkeys(("hidden_sizes", "stage_in_channels", "stage_mid_channels", "stage_out_channels"), [8] * 4),
        **dict.fromkeys(("depths", "stage_num_blocks", "stage_numb_of_layers"), [1] * 4),
    },
    "HieraConfig": {
        "image_size": [8, 8],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "num_query_pool": 1,
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True, False],
    },
    "IJepaConfig": PLAIN,
    "ImageGPTConfig": {"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "LevitConfig": {
        "image_size": 16,
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [1, 1, 1],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "MetaClip2Config": {"vision_config": PLAIN},
    "MobileNetV1Config": {"image_size": 32, "depth_multiplier": 0.01},
    "MobileNetV2Config": {"image_size": 32, "depth_multiplier": 0.01},
    "MobileViTConfig": {"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7},
    "MobileViTV2Config": {
        "image_size": 64,
        "width_multiplier": 0.1,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [80, 80, 80],
    },
    "PerceiverConfig": {
        "image_size": 8,
        "num_latents": 4,
        "d_latents": 16,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "qk_channels": 16,
        "v_channels": 16,
    },
    "PoolFormerConfig": {**STAGES, "num_encoder_blocks": 2},
    "PPLCNetConfig": {"scale": 0.1, "class_expand": 16},
    "PvtConfig": {**PYRAMID, "image_size": 8, "sequence_reduction_ratios": [2, 1]},
    "PvtV2Config": {**PYRAMID, "image_size": 8, "sr_ratios": [2, 1]},
    "RegNetConfig": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "ResNetConfig": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "SegformerConfig": {**PYRAMID, "sr_ratios": [2, 1]},
    "ShieldGemma2Config": {
        "text_config": {**LAYERS, "vocab_size": 9, "num_key_value_heads": 1, "head_dim": 8},
        "vision_config": PLAIN,
        "mm_tokens_per_image": 1,
        "image_token_index": 8,
        "yes_token_index": 5,
        "no_token_index": 6,
    },
    "SiglipConfig": {"vision_config": PLAIN},
    "Siglip2Config": {"vision_config": {**LAYERS, "patch_size": 4, "num_patches": 4}},
    "SwiftFormerConfig": {"image_size": 32, "depths": [1] * 4, "embed_dims": [8, 8, 8, 16]},
    "SwinConfig": WINDOWS,
    "Swinv2Config": WINDOWS,
    "TextNetConfig": {
        "image_size": [32, 32],
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 8, 8, 16],
        "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
        "conv_layer_strides": [[2]] * 4,
    },
    "TimmWrapperConfig": {"architecture": "test_resnet"},
    "ViTConfig": PLAIN,
    "ViTMSNConfig": PLAIN,
}


def model_classes() -> list[tuple[type, type]]:
    """Every pair of a config class and a model class that the installed transformers calls an image classifier."""
    pairs = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items()
    return [(config, model) for config, found in pairs for model in (found if isinstance(found, tuple) else (found,))]


def build(config_class: type, model_class: type, num_labels: int = 7, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, in float32 and eval mode; ShieldGemma2 has two labels whatever is asked for."""
    torch.manual_seed(seed)
    # At the usual 0.02, and with statistics other than those of images, narrow convolutions let images fade to nothing
    settings = {"initializer_range": 0.2, **copy.deepcopy(TRANSFORMERS[config_class.__name__])}
    model = model_class(config_class(**settings, num_labels=num_labels)).float().eval()
    update_bn([inputs(model, 8)[model.main_input_name]], model)
    return model


def inputs(model: PreTrainedModel, n: int = 2) -> dict[str, Tensor]:
    """Keyword arguments of a forward: n images of noise, the same at each call."""
    generator, config, name = torch.Generator().manual_seed(0), model.config, model.main_input_name
    vision = getattr(config, "vision_config", config)
    if config.model_type == "imagegpt":
        return {name: torch.randint(config.vocab_size, (n, config.n_positions), generator=generator)}
    if config.model_type == "siglip2":
        side = math.isqrt(vision.num_patches)
        patches = torch.randn(n, side**2, 3 * vision.patch_size**2, generator=generator)
        mask = torch.ones(n, side**2, dtype=torch.long)
        return {name: patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((n, 2), side)}
    size = getattr(vision, "image_size", 32)
    if type(model).__name__.endswith(("Fourier", "ConvProcessing")):
        size = 224  # these two Perceivers ignore their config's
    height, width = (size, size) if isinstance(size, int) else size
    images = {"pixel_values": torch.randn(n, 3, height, width, generator=generator)}
    if config.model_type == "shieldgemma2":
        return {"input_ids": torch.tensor([[config.image_token_index, 1]] * n), **images}
    return {name: images["pixel_values"]}
