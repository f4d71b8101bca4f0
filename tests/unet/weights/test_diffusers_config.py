"""Configs of diffusers: published ones give the presets, and what we cannot express is named."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest

from unet.config import UNetConfig
from unet.errors import InputError
from unet.presets import PRESETS
from unet.weights.diffusers_config import (
    _DEFAULTS,
    _FIXED,
    _IGNORED,
    config_from_diffusers,
    config_to_diffusers,
)

# config.json of google/ddpm-cifar10-32, as published.
CIFAR: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBA = CIFAR | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*4 * ["DownBlock2D"], "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *4 * ["UpBlock2D"]],
}
# unet/config.json of CompVis/stable-diffusion-v1-4 and, below, stabilityai/stable-diffusion-2.
SD1: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]],
}
SD2 = SD1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0.
XL = SD1 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", *2 * ["CrossAttnDownBlock2D"]],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [*2 * ["CrossAttnUpBlock2D"], "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
PUBLISHED = {"ddpm-cifar10": CIFAR, "ddpm-256": CELEBA, "sd-v1": SD1, "sd-v2": SD2, "sdxl": XL}


def preset(name: str) -> UNetConfig:
    return replace(PRESETS[name].config, dropout=0.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_presets(name: str) -> None:
    values = json.loads(json.dumps(PUBLISHED[name]))
    assert config_from_diffusers(values) == (preset(name), PRESETS[name].out_channels)
    assert values == PUBLISHED[name]


@pytest.mark.parametrize(
    "config",
    [
        *(preset(name) for name in PUBLISHED),
        replace(preset("ddpm-cifar10"), scale_shift=True, classes=10, dropout=0.25),
        replace(preset("ddpm-cifar10"), attention_levels=(0, 3), head_channels=64, down="conv"),
        replace(preset("ddpm-cifar10"), attention_levels=(), middle_attention=False),
        replace(preset("sd-v2"), transformer_depth=3, classes=7, scale_shift=True),
        replace(preset("sd-v2"), transformer_depth=(1, 2, 4, 3), vector_channels=9, vector_waves=2),
        replace(preset("sd-v1"), activation="gelu", time_cos_first=False, time_freq_shift=1),
        replace(preset("sd-v1"), attention_levels=(), multipliers=(1, 3), blocks=4),
    ],
)
def test_there_and_back_gives_the_same_config_and_diffusers_takes_it(config: UNetConfig) -> None:
    values = config_to_diffusers(config, 5)
    assert json.loads(json.dumps(values)) == values
    assert config_from_diffusers(values) == (config, 5)
    cls = getattr(diffusers, values["_class_name"])
    assert set(values) - {"_class_name"} <= set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_every_field_of_diffusers_is_known_with_its_default(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    for field, parameter in parameters.items():
        if field in _DEFAULTS[name]:
            assert _DEFAULTS[name][field] == parameter.default
        elif field in _FIXED:
            assert parameter.default in _FIXED[field]
        else:
            assert field in _IGNORED
    later = {"mid_block_type", "time_embedding_dim"}  # than the oldest diffusers that we take
    assert set(_DEFAULTS[name]) - later <= set(parameters)


def test_missing_fields_are_diffusers_defaults() -> None:
    config, out_channels = config_from_diffusers({"_class_name": "UNet2DConditionModel"})
    assert (config, out_channels) == (replace(preset("sd-v1"), context_channels=1280), 4)


@pytest.mark.parametrize("heads", [8, [8, 8, 8, 8]])
def test_one_number_and_one_a_level_are_the_same(heads: int | list[int]) -> None:
    each = {"layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4}
    values = SD1 | each | {"attention_head_dim": heads, "transformer_layers_per_block": [1] * 4}
    assert config_from_diffusers(values)[0] == preset("sd-v1")


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        (SD1, "_class_name", "UNet3DConditionModel"),
        (SD1, "_class_name", None),
        (SD1, "addition_embed_type", "text_time"),  # without its sizes
        (SD1, "addition_embed_type", "text"),
        (SD1, "conv_in_kernel", 5),
        (SD1, "num_attention_heads", 8),
        (SD1, "only_cross_attention", True),
        (SD1, "class_embed_type", "projection"),
        (SD1, "a_field_of_the_future", 1),
        (SD1, "mid_block_type", "UNetMidBlock2D"),
        (SD1, "mid_block_type", None),
        (SD1, "act_fn", "mish"),
        (SD1, "downsample_padding", 2),
        (SD1, "resnet_time_scale_shift", "ada_group"),
        (SD1, "norm_num_groups", None),
        (SD1, "in_channels", "four"),
        (SD1, "flip_sin_to_cos", 1),
        (SD1, "block_out_channels", [320, 640, 1000, 1280]),
        (SD1, "block_out_channels", [320, 640, 1280]),
        (SD1, "block_out_channels", ["320", 640, 1280, 1280]),
        (SD1, "block_out_channels", [0, 640, 1280, 1280]),
        (SD1, "layers_per_block", [2, 2, 2, 3]),
        (SD1, "cross_attention_dim", [768, 768, 1024, 768]),
        (SD1, "cross_attention_dim", None),
        (SD1, "transformer_layers_per_block", [[1, 2], 1, 4, 4]),
        (SD1, "attention_head_dim", [8, 10, 20, 20]),
        (SD1, "attention_head_dim", 7),
        (SD1, "attention_head_dim", None),
        (SD1, "time_embedding_dim", 512),
        (SD1, "down_block_types", [*3 * ["SimpleCrossAttnDownBlock2D"], "DownBlock2D"]),
        (SD1, "up_block_types", [*3 * ["CrossAttnUpBlock2D"], "UpBlock2D"]),
        (CIFAR, "attention_head_dim", [8, 8, 8, 8]),
        (CIFAR, "act_fn", "gelu"),
        (CIFAR, "time_embedding_type", "fourier"),
        (CIFAR, "downsample_type", "resnet"),
        (CIFAR, "center_input_sample", True),
        (CIFAR, "attn_norm_num_groups", 16),
        (CIFAR | {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups", None),
    ],
)
def test_field_that_our_unet_cannot_express_is_named_with_its_value(
    values: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(InputError) as caught:
        config_from_diffusers(values | {field: value})
    shown = tuple(value) if isinstance(value, list) else value
    assert f"{field}={shown!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(PRESETS["classic"].config, activation="silu"), "block='conv'"),
        (replace(preset("ddpm-cifar10"), multipliers=(2, 2, 4)), "channels=128"),
        (replace(preset("ddpm-cifar10"), decoder_multipliers=(1, 1, 2, 2)), "decoder_multipliers="),
        (replace(preset("ddpm-cifar10"), patch=2), "patch=2"),
        (replace(preset("ddpm-cifar10"), norm="batch"), "norm='batch'"),
        (replace(preset("ddpm-cifar10"), time=False), "time=False"),
        (replace(preset("ddpm-cifar10"), down="avg"), "down='avg'"),
        (replace(preset("ddpm-cifar10"), up="nearest"), "up='nearest'"),
        (replace(preset("ddpm-cifar10"), activation="gelu"), "act_fn='gelu'"),
        (replace(preset("ddpm-cifar10"), activation="leaky-relu"), "act_fn='leaky-relu'"),
        (replace(preset("ddpm-cifar10"), attention_levels=(0, 1), heads=4), "heads=4"),
        (
            replace(preset("ddpm-cifar10"), dropout=0.1, dropout_at="bottom"),
            "dropout_at='bottom'",
        ),
        (replace(preset("sd-v1"), context_channels=None), "cross_attention_dim=None"),
        (replace(preset("sd-v1"), middle_attention=False), "middle_attention=False"),
    ],
)
def test_config_that_diffusers_cannot_express_is_named(config: UNetConfig, named: str) -> None:
    with pytest.raises(InputError, match=named):
        config_to_diffusers(config, 3)


def test_heads_and_head_channels_are_the_same_where_the_widths_are() -> None:
    config = replace(preset("ddpm-cifar10"), heads=4)  # attention at 256 channels only
    assert config_to_diffusers(config, 3)["attention_head_dim"] == 64
    assert config_to_diffusers(replace(config, heads=1), 3)["attention_head_dim"] is None
