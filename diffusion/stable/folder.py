"""Reading Stable Diffusion: a diffusers pipeline folder, or one file with the U-Net's weights.

Local files only, and nothing in them is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.model import DiffusionUNet
from diffusion.stable.kinds import check_keys, check_parts
from diffusion.stable.parts import (
    TEXT_STEMS,
    Build,
    build_autoencoder,
    build_projected_text_model,
    build_text_model,
    check_part,
    check_tokenizer,
)
from diffusion.stable.schedule import PipelineSchedule
from diffusion.stable.weight_files import shards, variant_of, weight_files
from unet import PRESETS, UNetConfig
from unet.errors import InputError, said
from unet.files.writing import read_json
from unet.weights.convert import detect_layout, from_layout
from unet.weights.diffusers_config import config_from_diffusers
from unet.weights.folder import load_strictly, near
from unet.weights.layouts import Layout
from unet.weights.pickles import check_whole, load_by_name
from unet.weights.wrappings import all_keys, has_network, unwrapped

CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "",
    "scheduler": "scheduler_config.json",
}
XL_CONFIGS = {"text_encoder_2": "config.json", "tokenizer_2": ""}  # which XL has beside them
STEM = "diffusion_pytorch_model"  # of the names of weights that diffusers writes
# Fields of a config that the shapes of the weights show.
_SHOWN = (
    *("in_channels", "channels", "multipliers", "blocks", "attention_levels"),
    *("context_channels", "transformer_depth", "linear_projections", "vector_channels"),
)


def check_folder(folder: Path, *, with_unet: bool = True) -> None:
    """Raises an InputError that names the first part that a pipeline folder lacks."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder: give a diffusers pipeline folder, which holds "
            f"{', '.join(f'{part}/' for part in CONFIGS)}{near(folder)}"
        )
    check_parts(folder)
    for part, config in (CONFIGS | (XL_CONFIGS if is_xl(folder) else {})).items():
        if part == "unet" and not with_unet:
            continue
        if not (folder / part).is_dir() or not (folder / part / config).exists():
            missing = f"{part}/{config}"
            raise InputError(
                f"{folder} lacks {missing}: a pipeline folder holds "
                f"{', '.join(f'{name}/' for name in CONFIGS)}"
            )


def is_xl(folder: Path) -> bool:
    """Whether a pipeline folder is of Stable Diffusion XL, which reads texts by two models."""
    return any((folder / part).exists() for part in XL_CONFIGS)


def read_schedule(folder: Path) -> PipelineSchedule:
    """What `scheduler/` says of the noise."""
    file = folder / "scheduler" / CONFIGS["scheduler"]
    try:
        return PipelineSchedule.from_dict(read_json(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


# ----------------------------------------------------------------------------------------------
# The U-Net


def read_unet(where: Path) -> DiffusionUNet:
    """The U-Net of a pipeline's `unet/`, or of such a folder alone.

    Raises:
        InputError: a config that we cannot express, no weights, weights that do not fit it.
    """
    config, out_channels = read_unet_config(where)
    found = weight_files(where, STEM)
    if not found:
        raise InputError(
            f"{where} lacks its weights: {STEM}.safetensors or .bin, a variant of it such as "
            f"{STEM}.fp16.safetensors, or {STEM}.safetensors.index.json and its shards"
        )
    file = found[0].file
    return _built(read_weights(file), config, out_channels, "diffusers", file)


def read_checkpoint(file: Path, folder: Path) -> DiffusionUNet:
    """The U-Net of a single file or of shards, in the names of CompVis or of diffusers.

    Where the pipeline folder has a `unet/config.json` of the same shapes, that is its config; else
    it is found from the shapes of the weights.

    Raises:
        InputError: no such file; a pickle with code in it; no Stable Diffusion U-Net.
    """
    if re.search(r"-\d{5}-of-\d{5}\.", file.name):
        raise InputError(
            f"{file} is one of several shards: give their index, which ends in .index.json"
        )
    state = read_weights(file)
    where = folder / "unet"
    given = read_unet_config(where) if (where / "config.json").is_file() else None
    try:
        layout = detect_layout(state)
    except InputError as error:
        raise InputError(f"{file} holds no Stable Diffusion U-Net: {error}") from error
    if layout == "diffusers":
        if given is None:
            raise InputError(f"{file} has diffusers' names, so {folder} needs a unet/config.json")
        return _built(state, *given, layout, file)
    try:
        config, out_channels = config_from_compvis(state)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if given and all(getattr(given[0], name) == getattr(config, name) for name in _SHOWN):
        config = given[0]
    return _built(state, config, out_channels, "compvis", file)


def config_from_compvis(state: Mapping[str, Tensor]) -> tuple[UNetConfig, int]:
    """The config and the output channels of Stable Diffusion's U-Net, from the shapes of its
    weights under CompVis' names.

    The number of heads has no trace in the shapes: it is 8, or with linear projections one for 64
    channels, as in Stable Diffusion 1, and in 2 and XL.

    Raises:
        InputError: no such U-Net.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    try:
        channels, in_channels, *_ = shapes["input_blocks.0.0.weight"]
        numbers = [int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.", key))]
        count = max(numbers) + 1
        levels = 1 + sum(f"input_blocks.{n}.0.op.weight" in shapes for n in range(count))
        blocks = count // levels - 1
        firsts = [1 + i * (blocks + 1) for i in range(levels)]
        widths = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
        at = [i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.proj_in.weight" in shapes]
        transformers = [f"input_blocks.{n}.1" for n in firsts[:-1]]
        depths = tuple(_depth(shapes, name) for name in (*transformers, "middle_block.1"))
        same = len({depths[i] for i in (*at, levels - 1)}) == 1
        middle = "middle_block.1.transformer_blocks"
        linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
        config = replace(
            PRESETS["sd-v1"].config,
            in_channels=in_channels,
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=blocks,
            attention_levels=tuple(at),
            heads=None if linear else 8,
            head_channels=64 if linear else None,
            context_channels=shapes[f"{middle}.0.attn2.to_k.weight"][1],
            transformer_depth=depths[-1] if same else depths,
            linear_projections=linear,
            vector_channels=shapes.get("label_emb.0.0.weight", (0, 0))[1],
        )
        return config, shapes["out.2.bias"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            "the weights are not those of a Stable Diffusion U-Net of version 1, 2 or XL, as their "
            f"names and shapes show ({error})"
        ) from error


def _depth(shapes: Mapping[str, Any], name: str) -> int:
    """The transformer blocks in a SpatialTransformer, 1 where there is none."""
    start = f"{name}.transformer_blocks."
    blocks = {key[len(start) :].split(".")[0] for key in shapes if key.startswith(start)}
    return max(1, len(blocks))


def read_unet_config(where: Path) -> tuple[UNetConfig, int]:
    """The config and the output channels of a pipeline's `unet/`."""
    file = where / "config.json"
    try:
        return config_from_diffusers(read_json(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _built(
    state: Mapping[str, Tensor], config: UNetConfig, out_channels: int, layout: Layout, file: Path
) -> DiffusionUNet:
    try:
        state = from_layout(state, config, layout)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    with torch.device("meta"):
        unet = DiffusionUNet(config, out_channels)
    load_strictly(unet, state, str(file))
    return unet.eval()


# ----------------------------------------------------------------------------------------------
# Files


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, a `.ckpt`, `.pt`, `.pth` or `.bin`, or of the shards of an
    index, by name; of whatever holds a U-Net among other things, those of the U-Net.

    Raises:
        InputError: no such file, an unreadable one, a pickle with code in it, or the weights of
            another kind, such as a LoRA.
    """
    if not file.is_file():
        raise InputError(f"there is no checkpoint {file}")
    if file.suffix == ".json":
        return {k: v for shard in shards(file) for k, v in read_weights(shard).items()}
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as weights:
                keys = _unet({key: key for key in weights.keys()}, file)  # noqa: SIM118
                return {name: weights.get_tensor(key) for name, key in keys.items()}
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(
                f"{file} cannot be read as safetensors weights: {said(error)}"
            ) from error
    return _unet(load_by_name(file), file)


def _unet(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What belongs to the U-Net, by its own names; all of it where none is found."""
    check_keys(all_keys(content), file)
    layouts: list[Layout] = [n for n in ("diffusers", "compvis") if has_network(content, n)]
    try:
        found = unwrapped(content, layouts[0]) if len(layouts) == 1 else dict(content)
        check_whole(found)
        return found
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


# ----------------------------------------------------------------------------------------------
# The other parts, by the libraries that define them


def read_autoencoder(where: Path) -> Any:
    """diffusers' AutoencoderKL of a pipeline's `vae/`, in float32."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise _missing("diffusers") from error
    described = ("_class_name", "AutoencoderKL")
    return _by_library(AutoencoderKL, build_autoencoder, where, described, STEM)


def read_text_model(folder: Path, *, second: bool = False) -> tuple[Any, Any]:
    """transformers' CLIPTextModel of `text_encoder/`, in float32, and its tokenizer.

    Args:
        second: of XL, the CLIPTextModelWithProjection of `text_encoder_2/` instead.
    """
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    except ImportError as error:
        raise _missing("transformers") from error
    end = "_2" if second else ""
    where = folder / f"text_encoder{end}"
    described = ("model_type", "clip_text_model")
    kind, build = (
        (CLIPTextModelWithProjection, build_projected_text_model)
        if second
        else (CLIPTextModel, build_text_model)
    )
    model = _by_library(kind, build, where, described, *TEXT_STEMS)
    where = folder / f"tokenizer{end}"
    check_tokenizer(where)
    try:
        return model, CLIPTokenizer.from_pretrained(where, local_files_only=True)
    except Exception as error:  # whatever a damaged file leads their many readers to
        raise InputError(f"{where} cannot be read as a CLIP tokenizer: {said(error)}") from error


def _by_library(
    kind: Any, build: Build, where: Path, described: tuple[str, str], *stems: str
) -> Any:
    """A model by its library's from_pretrained; weights that are missing are an error.

    Args:
        described: a field of its config, and what it must be.
        stems: of the names of its weights.
    """
    field, wanted = described
    if (found := read_json(where / "config.json").get(field)) != wanted:
        raise InputError(
            f"{where / 'config.json'} has {field} {found!r}, but Stable Diffusion's is {wanted!r}"
        )
    check_part(where, build)
    try:
        model, report = kind.from_pretrained(
            where,
            local_files_only=True,
            variant=variant_of(where, *stems),
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged file leads their many readers to
        raise InputError(f"{where} cannot be read: {said(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            raise InputError(
                f"the weights in {where} do not fit its config: {report[problem]!s:.300}"
            )
    return model.eval().requires_grad_(False)


def _missing(library: str) -> InputError:
    return InputError(
        f"Stable Diffusion needs {library}, which is not installed: run pip install "
        "'unet-diffusion[sd]'"
    )
