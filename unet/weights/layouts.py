"""The layouts of other projects as tables: our name of every module with weights, and theirs.

Taken from the plan of the config alone: which block, level and step a module stands in.
"""

from __future__ import annotations

from typing import Any, Literal

from unet.config import UNetConfig
from unet.errors import InputError

Layout = Literal["classic", "diffusers", "compvis"]

SMP = "segmentation_models.pytorch"  # whose networks are read alone, by `unet.weights.checkpoints`

COMPVIS_PREFIX = "model.diffusion_model."  # of the U-Net's keys in a full CompVis checkpoint

# A key that a state dict of the layout has once, whatever its config.
LANDMARKS: dict[str, str] = {
    "classic": "inc.double_conv.0.weight",
    "diffusers": "time_embedding.linear_1.weight",
    "compvis": "input_blocks.0.0.weight",
    SMP: "segmentation_head.0.weight",
}

# What a config must have for its modules to have names in a layout.
_NEEDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "classic": {
        "block": ("conv",),
        "skips": ("level",),
        "blocks": (1,),
        "decoder": ("unet",),
        "patch": (1,),
        "norm": ("batch",),
        "down": ("max", "avg"),
        "up": ("transposed", "bilinear", "bilinear-aligned", "nearest"),
        "attention_levels": ((),),
        "middle_attention": (False,),
    },
    "diffusers": {
        "block": ("res",),
        "skips": ("block",),
        "patch": (1,),
        "norm": ("group",),
        "down": ("conv", "conv-asymmetric"),
        "up": ("nearest-conv",),
        "time": (True,),
    },
    "compvis": {
        "block": ("res",),
        "skips": ("block",),
        "patch": (1,),
        "norm": ("group",),
        "down": ("conv", "conv-asymmetric", "avg"),
        "up": ("nearest-conv", "nearest"),
        "time": (True,),
        "middle_attention": (True,),
    },
}

# Inside the parts: our module, theirs.
_CLASSIC_BLOCK = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4"}
_DIFFUSERS_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_COMPVIS_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_DIFFUSERS_ATTENTION = {
    "norm": "group_norm",
    "attention.q": "to_q",
    "attention.k": "to_k",
    "attention.v": "to_v",
    "attention.out": "to_out.0",
}
_COMPVIS_ATTENTION = {"norm": "norm", "attention.qkv": "qkv", "attention.out": "proj_out"}
_TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "self_attention.q": "attn1.to_q",
    "self_attention.k": "attn1.to_k",
    "self_attention.v": "attn1.to_v",
    "self_attention.out": "attn1.to_out.0",
    "norm2": "norm2",
    "cross_attention.q": "attn2.to_q",
    "cross_attention.k": "attn2.to_k",
    "cross_attention.v": "attn2.to_v",
    "cross_attention.out": "attn2.to_out.0",
    "norm3": "norm3",
    "feed_forward.proj": "ff.net.0.proj",
    "feed_forward.out": "ff.net.2",
}


def check_layout(config: UNetConfig, layout: str) -> None:
    """An `InputError` for an unknown layout, or for modules that it has no names for."""
    if layout not in _NEEDS:
        raise InputError(f"unknown layout {layout!r}: choose from {', '.join(_NEEDS)}")
    for name, allowed in _NEEDS[layout].items():
        if (value := getattr(config, name)) not in allowed:
            raise InputError(
                f"the {layout} layout has no names for the modules of {name}={value!r}: it needs "
                f"{name}={' or '.join(map(repr, allowed))}"
            )
    if layout == "compvis" and config.attention == "transformer" and not config.context_channels:
        raise InputError(
            "the compvis layout has no names for a transformer with context_channels=None: its "
            "transformer blocks always have a second attention"
        )


def module_names(config: UNetConfig, layout: Layout) -> dict[str, str]:
    """Our name of every module that can have weights, and theirs: a bijection."""
    parts = {"classic": _classic, "diffusers": _diffusers, "compvis": _compvis}[layout]
    inside = _inside(config, layout)
    table = {}
    for ours, theirs in parts(config).items():
        kind = ours.rpartition(".")[2].rstrip("0123456789")  # the middle has "block1", "block2"
        for a, b in inside[kind].items() if kind in inside else [("", "")]:
            table[f"{ours}.{a}".rstrip(".")] = f"{theirs}.{b}".rstrip(".")
    if len(set(table.values())) != len(table):
        raise AssertionError(f"the table of the {layout} layout gives two modules one name")
    return table


def _inside(config: UNetConfig, layout: Layout) -> dict[str, dict[str, str]]:
    """The modules inside each kind of part; a part that is not here is a module itself."""
    if layout == "classic":
        return {"block": _CLASSIC_BLOCK, "up": {"up": "up"}}
    attention = _DIFFUSERS_ATTENTION if layout == "diffusers" else _COMPVIS_ATTENTION
    if config.attention == "transformer":  # is the same in both
        attention = {name: name for name in ("norm", "proj_in", "proj_out")} | {
            f"blocks.{n}.{ours}": f"transformer_blocks.{n}.{theirs}"
            for n in range(max(config.transformer_depths))
            for ours, theirs in _TRANSFORMER_BLOCK.items()
        }
    return {
        "block": _DIFFUSERS_BLOCK if layout == "diffusers" else _COMPVIS_BLOCK,
        "attention": attention,
        "down": {"conv": "conv" if layout == "diffusers" else "op"},
        "up": {"conv": "conv"},
    }


def _classic(config: UNetConfig) -> dict[str, str]:
    parts = {"head.conv": "outc.conv"}
    bottom = config.levels - 1
    for level in range(config.levels):
        ours = "trunk.middle.block1" if level == bottom else f"trunk.encoder.{2 * level}.block"
        theirs = f"down{level}.maxpool_conv.1" if level else "inc"
        parts[ours] = f"{theirs}.double_conv"
    for i in range(bottom):
        parts[f"trunk.decoder.{2 * i}.up"] = f"up{i + 1}"
        parts[f"trunk.decoder.{2 * i + 1}.block"] = f"up{i + 1}.conv.double_conv"
    return parts


def _diffusers(config: UNetConfig) -> dict[str, str]:
    parts = {
        "trunk.time_embedding.linear1": "time_embedding.linear_1",
        "trunk.time_embedding.linear2": "time_embedding.linear_2",
        "trunk.class_embedding": "class_embedding",
        "trunk.vector_embedding.linear1": "add_embedding.linear_1",
        "trunk.vector_embedding.linear2": "add_embedding.linear_2",
        "trunk.encoder.0.stem.conv": "conv_in",
        "trunk.middle.block1": "mid_block.resnets.0",
        "trunk.middle.attention1": "mid_block.attentions.0",
        "trunk.middle.block2": "mid_block.resnets.1",
        "head.norm": "conv_norm_out",
        "head.conv": "conv_out",
    }
    steps = config.blocks + 1  # of an encoder level: its blocks and the downsampling
    for level in range(config.levels):
        for j in range(config.blocks):
            ours = f"trunk.encoder.{1 + level * steps + j}"
            parts[f"{ours}.block"] = f"down_blocks.{level}.resnets.{j}"
            parts[f"{ours}.attention"] = f"down_blocks.{level}.attentions.{j}"
        ours = f"trunk.encoder.{(level + 1) * steps}"
        parts[f"{ours}.down"] = f"down_blocks.{level}.downsamplers.0"
    steps += 1  # of a decoder level: one block more; the upsampling is ours of the next level
    for i in range(config.levels):
        for j in range(config.blocks + 1):
            ours = f"trunk.decoder.{i * steps + j}"
            parts[f"{ours}.block"] = f"up_blocks.{i}.resnets.{j}"
            parts[f"{ours}.attention"] = f"up_blocks.{i}.attentions.{j}"
        ours = f"trunk.decoder.{(i + 1) * steps - 1}"
        parts[f"{ours}.up"] = f"up_blocks.{i}.upsamplers.0"
    return parts


def _compvis(config: UNetConfig) -> dict[str, str]:
    parts = {
        "trunk.time_embedding.linear1": "time_embed.0",
        "trunk.time_embedding.linear2": "time_embed.2",
        "trunk.class_embedding": "label_emb",
        "trunk.vector_embedding.linear1": "label_emb.0.0",
        "trunk.vector_embedding.linear2": "label_emb.0.2",
        "trunk.encoder.0.stem.conv": "input_blocks.0.0",
        "trunk.middle.block1": "middle_block.0",
        "trunk.middle.attention1": "middle_block.1",
        "trunk.middle.block2": "middle_block.2",
        "head.norm": "out.0",
        "head.conv": "out.2",
    }
    for n in range(1, config.levels * (config.blocks + 1)):  # their steps are ours
        if n % (config.blocks + 1):
            parts[f"trunk.encoder.{n}.block"] = f"input_blocks.{n}.0"
            parts[f"trunk.encoder.{n}.attention"] = f"input_blocks.{n}.1"
        else:
            parts[f"trunk.encoder.{n}.down"] = f"input_blocks.{n}.0"
    for n in range(config.levels * (config.blocks + 1)):
        i, j = divmod(n, config.blocks + 1)
        ours = f"trunk.decoder.{n + i}"  # i upsamplings stand before it
        parts[f"{ours}.block"] = f"output_blocks.{n}.0"
        parts[f"{ours}.attention"] = f"output_blocks.{n}.1"
        if j == config.blocks:  # the upsampling: behind the attention, where there is one
            last = 2 if config.levels - 1 - i in config.attention_levels else 1
            parts[f"trunk.decoder.{n + i + 1}.up"] = f"output_blocks.{n}.{last}"
    return parts
