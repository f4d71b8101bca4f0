"""Stable Diffusion pipelines with a few random weights, as folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

SIDE = 64  # pixels a side, 8 times that of the latents
TOKENS = 16  # that the text model takes

VERSIONS: dict[str, dict[str, Any]] = {
    "v1": {
        "unet": {"attention_head_dim": 8},
        "scheduler": {"prediction_type": "epsilon"},
        "text": {"hidden_act": "quick_gelu"},
    },
    "v2": {
        "unet": {"attention_head_dim": [1, 2], "use_linear_projection": True},
        "scheduler": {"prediction_type": "v_prediction"},
        "text": {"hidden_act": "gelu"},
    },
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows the letters, and pieces of three words."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "n</w>")]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    described = {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def tiny_unet(version: str = "v1", in_channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=in_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        **VERSIONS[version]["unet"],
    )


def text_config(words: int, **more: Any) -> CLIPTextConfig:
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
    }
    return CLIPTextConfig(vocab_size=words, **(small | more))


def tiny_autoencoder(**more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=SIDE,
        **more,
    )


def write_xl(folder: Path, **more: Any) -> Path:
    """A pipeline folder of Stable Diffusion XL's shape."""
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    tokenizer, second = (
        CLIPTokenizer.from_pretrained(folder / f"tokenizer{n}") for n in ("", "_2")
    )
    second.pad_token = "a</w>"  # another than the first one's, as XL has it
    torch.manual_seed(2)
    # An end of text where none is looked for: the first models of CLIP pooled at the largest token.
    end = {"eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextModel(text_config(len(tokenizer), **end))
    wide = {"hidden_size": 24, "hidden_act": "gelu", "projection_dim": 12}
    text_2 = CLIPTextModelWithProjection(text_config(len(second), **wide, **end))
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 4, 4],
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    euler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**euler, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
        **more,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_pipeline(folder: Path, version: str = "v1", in_channels: int = 4) -> Path:
    """A pipeline folder; "v2" predicts v, has linear projections and heads of 64 channels."""
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextModel(text_config(len(tokenizer), **VERSIONS[version]["text"]))
    pipeline = StableDiffusionPipeline(
        vae=tiny_autoencoder(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=tiny_unet(version, in_channels),
        scheduler=DDIMScheduler(**SCHEDULER, **VERSIONS[version]["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
