"""One small model, or a few of different layout, of each of timm's modules: architecture and options."""

from __future__ import annotations

from typing import Any

import timm

Options = dict[str, Any]

PIXELS = 64


def input_of(pixels: int) -> Options:
    """The options by which a model for images of any size gets images of this size."""
    return {"pretrained_cfg_overlay": {"input_size": (3, pixels, pixels)}}


SMALL_IMAGES: Options = {"img_size": PIXELS}
VIT: Options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
STAGES: Options = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}
WINDOWS: Options = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}
SMALL: dict[str, Options] = {
    # plain ViTs and relatives, among them the blocks that token-level tuners refuse
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch16_18x2_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "vit_small_r26_s32_224": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "vit_small_patch16_dinov3_qkvb": VIT,
    "vit_pe_core_base_patch16_224": {**VIT, "attn_pool_num_heads": 3},
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_224": VIT,
    "eva02_enormous_patch14_clip_224": VIT,
    "naflexvit_base_patch16_gap": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "samvit_base_patch16_224": {**VIT, "img_size": 64, "global_attn_indexes": (1,), "neck_chans": 24},
    "deepseek_vit_412m": {"img_size": 84, "embed_dim": 48, "depth": 2, "num_heads": 3, "out_features": 48},
    "gemma4_vit_167m": {"img_size": 96, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_kv_heads": 3, "head_dim": 16},
    "qwen3_vit_88m": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "cait_xxs24_224": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "convit_tiny": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "local_up_to_layer": 1},
    "crossvit_tiny_240": {},
    "xcit_nano_12_p16_224": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "tnt_s_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads_outer": 3},
    "volo_d1_224": SMALL_IMAGES,
    "gmlp_ti16_224": SMALL_IMAGES,
    "mixer_s32_224": SMALL_IMAGES,
    # hierarchical transformers
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "swinv2_cr_tiny_224": WINDOWS,
    "hiera_tiny_224": {"embed_dim": 32, "stages": (1, 1, 1, 1), "img_size": 64},
    "sam2_hiera_tiny": {"embed_dim": 32, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
    "mvitv2_tiny": SMALL_IMAGES,
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, **STAGES, "num_heads": (1, 1, 2, 2)},
    "nest_tiny": SMALL_IMAGES,
    "davit_tiny": {**STAGES, "num_heads": (1, 1, 2, 2)},
    "gcvit_xxtiny": SMALL_IMAGES,
    "focalnet_tiny_srf": {},
    "coat_lite_tiny": SMALL_IMAGES,
    "pit_ti_224": SMALL_IMAGES,
    "tiny_vit_5m_224": {},
    "levit_128s": SMALL_IMAGES,
    "efficientvit_m0": SMALL_IMAGES,
    "nextvit_small": {},
    "vitamin_small_224": SMALL_IMAGES,
    "maxvit_rmlp_pico_rw_256": SMALL_IMAGES,
    "visformer_tiny": SMALL_IMAGES,
    "efficientformer_l1": {},
    "efficientformerv2_s0": SMALL_IMAGES,
    "swiftformer_xs": {},
    "sequencer2d_s": {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32)},
    "caformer_s18": {},
    "efficientvit_b0": {},
    "edgenext_xx_small": {},
    "iformer_t": {},
    "efficientvim_m1": {},
    "lowformer_b0": {},
    "cpubone_nano": {},
    "shvit_s1": {},
    "repvit_m0_9": {},
    "mobilevit_xxs": {},
    "fastvit_t8": {},
    # convolutions
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "convnext_zepto_rms": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "inception_next_atto": {"depths": (1, 1, 1, 1)},
    "convmixer_768_32": {},
    "csatv2": {},
    "test_mambaout": {},
    "starnet_s050": {},
    "test_byobnet": {},
    "eca_halonext26ts": input_of(256),
    "lambda_resnet26t": input_of(128),
    "test_resnet": {},
    "resnest14d": {},
    "skresnet18": {},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "resnetv2_18": {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)},
    "nf_regnet_b0": {},
    "regnetx_002": {},
    "rexnet_100": {},
    "rdnet_tiny": {},
    "densenet121": {},
    "dla46x_c": {},
    "dpn48b": {},
    "ese_vovnet19b_slim_dw": {},
    "cs3darknet_s": {},
    "cspnext_tiny": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv5_base": {},
    "hardcorenas_a": {},
    "fasternet_t0": {},
    "ghostnet_050": {},
    "repghostnet_050": {},
    "hgnetv2_b0": {},
    "hrnet_w18_small": {},
    "lcnetv2_small": {},
    "legacy_seresnet18": {},
    "legacy_xception": {},
    "xception41": {},
    "inception_v3": input_of(96),
    "inception_v4": input_of(96),
    "inception_resnet_v2": input_of(96),
    "nasnetalarge": {},
    "pnasnet5large": {},
    "selecsls42": {},
    "tresnet_m": {},
    "vgg11": {},
}
"""Architecture → arguments that make it small; where there are none, it is the smallest of its module."""
LARGE = frozenset(
    [
        "maxvit_rmlp_pico_rw_256",
        "visformer_tiny",
        "efficientformer_l1",
        "caformer_s18",
        "efficientvim_m1",
        "lowformer_b0",
        "shvit_s1",
        "lambda_resnet26t",
        "resnest14d",
        "skresnet18",
        "res2net50_14w_8s",
        "nf_regnet_b0",
        "rdnet_tiny",
        "dpn48b",
        "mobilenetv5_base",
        "hrnet_w18_small",
        "legacy_seresnet18",
        "legacy_xception",
        "xception41",
        "inception_v3",
        "inception_v4",
        "inception_resnet_v2",
        "nasnetalarge",
        "pnasnet5large",
        "selecsls42",
        "tresnet_m",
        "vgg11",
    ]
)
"""Models without options that make them small: only features are tried with them, to keep the whole to ten minutes."""


def options_of(name: str) -> Options:
    """The options of an architecture of :data:`SMALL`; models for images of any size get small images."""
    options = SMALL[name]
    sized = {"img_size", "pretrained_cfg_overlay"} & options.keys()
    return options if sized or timm.get_pretrained_cfg(name).fixed_input_size else {**options, **input_of(PIXELS)}
