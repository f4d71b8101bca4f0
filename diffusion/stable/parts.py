"""The parts of a pipeline that diffusers and transformers define, looked at before these read them.

The libraries trust a config: they build whatever it declares, import what it asks for, and look for
weights wherever an index says. A folder that somebody else has made is checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from diffusion.stable.weight_files import check_names
from unet.config import MOST_BLOCKS, MOST_CHANNELS
from unet.errors import InputError, said
from unet.files.writing import read_json

TEXT_STEMS = ("model", "pytorch_model")  # of the names of a text model's weights
Build: TypeAlias = Callable[[dict[str, Any]], nn.Module]

# What makes transformers or diffusers import or fetch code, and what does not.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,),
    "quantization_config": (None,),
    "attn_implementation": (None, "eager", "sdpa"),
    "_attn_implementation": (None, "eager", "sdpa"),
}
_DEPTHS = ("layers_per_block", "num_hidden_layers")
_WEIGHTS = (".safetensors", ".bin")


def check_part(where: Path, build: Build) -> None:
    """Checks the folder of a model of another library before that reads it.

    Args:
        build: makes the model of a config, on the meta device.

    Raises:
        InputError: a config that asks for code, or for more numbers than the weights beside it can
            hold; an index that leads out of the folder.
    """
    described = _checked_config(where / "config.json")
    if (where / "adapter_config.json").exists():
        raise InputError(f"{where} has an adapter_config.json: give a model without an adapter")
    for index in where.glob("*.index*.json"):
        names = read_json(index).get("weight_map")
        check_names(index, names.values() if isinstance(names, dict) else [names])
    try:
        with torch.device("meta"):
            declared = sum(value.numel() for value in build(described).parameters())
    except Exception as error:  # whatever a wrong value leads their code to
        raise InputError(f"{where} cannot be read: {said(error)}") from error
    held = sum(f.stat().st_size for f in where.iterdir() if f.suffix in _WEIGHTS and f.is_file())
    if declared > held:
        raise InputError(
            f"{where} cannot be read: its config declares {declared:,} weights, more than the "
            f"{held:,} bytes of its files can hold"
        )


def check_tokenizer(where: Path) -> None:
    """Raises an InputError for a tokenizer whose config leads out of its folder."""
    file = where / "tokenizer_config.json"
    if file.exists():
        names = read_json(file).get("fast_tokenizer_files")
        check_names(file, names if isinstance(names, list) else [])


def build_autoencoder(values: dict[str, Any]) -> nn.Module:
    """diffusers' AutoencoderKL of a config."""
    from diffusers import AutoencoderKL

    model: nn.Module = AutoencoderKL.from_config(values)
    return model


def build_text_model(values: dict[str, Any]) -> nn.Module:
    """transformers' CLIPTextModel of a config."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model: nn.Module = CLIPTextModel(CLIPTextConfig.from_dict(values))
    return model


def build_projected_text_model(values: dict[str, Any]) -> nn.Module:
    """transformers' CLIPTextModelWithProjection of a config."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model: nn.Module = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(values))
    return model


def _checked_config(file: Path) -> dict[str, Any]:
    described = read_json(file)
    for name, harmless in _HARMLESS.items():
        if described.get(name) not in harmless:
            raise InputError(f"{file} has {name} {described[name]!r:.200}, which is not used here")
    parts: list[Any] = [described]
    for part in parts:  # which grows
        if isinstance(part, dict | list):
            parts.extend(part.values() if isinstance(part, dict) else part)
        elif isinstance(part, int | float) and abs(part) > MOST_CHANNELS:
            raise InputError(f"{file} has the number {part!r:.50}, more than {MOST_CHANNELS}")
    levels = described.get("block_out_channels")
    for name in _DEPTHS:
        depth = described.get(name)
        blocks = len(levels) * depth if isinstance(levels, list) and type(depth) is int else depth
        if type(blocks) is int and blocks > MOST_BLOCKS:
            raise InputError(f"{file} declares {blocks} blocks, more than {MOST_BLOCKS}")
    return described
