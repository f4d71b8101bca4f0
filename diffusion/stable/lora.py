"""LoRA (arXiv 2106.09685): small changes of a model's weights, trained, written, read and merged.

A file holds two matrices for each layer that it changes, whose product is added to its weights. It
is read in the names of peft and diffusers, older ones of theirs, and kohya's; it is written in
those of diffusers, where the network has names there, and else in ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from unet.attention import Attention, SpatialTransformer
from unet.config import UNetConfig
from unet.errors import InputError, said
from unet.layers import Linear
from unet.weights.layouts import Layout, check_layout, module_names

LORA = "pytorch_lora_weights.safetensors"  # which diffusers looks for in a folder

_KEY = re.compile(
    r"(?P<layer>.+?)(\.(lora_(?P<a>A|B|down|up)|lora\.(?P<b>down|up))|_lora\.(?P<c>down|up))"
    r"(\.default)?\.weight"
)
_DOWN = {"A", "down"}
# What stands before the names of a part's layers, and the part; nothing: the U-Net.
_PARTS = {
    "unet.": "unet",
    "lora_unet_": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
}
Layers = Mapping[str, nn.Module]  # by the spellings of their names, as `_spelt` has them


# ----------------------------------------------------------------------------------------------
# Training


class LoraLayer(nn.Module):
    """A linear layer or convolution, and beside it two small ones whose product changes it.

    W x + B A x with A (rank, in) at random and B (out, rank) zero (eq. 3, without its scale, as
    alpha is the rank). A convolution's A has its kernel, its B is 1x1.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        down: nn.Linear | nn.Conv2d
        up: nn.Linear | nn.Conv2d
        if isinstance(base, nn.Conv2d):
            same = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding")}
            down = nn.Conv2d(base.in_channels, rank, **same, bias=False)
            up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            down = Linear(base.in_features, rank, bias=False)
            up = Linear(rank, base.out_features, bias=False)
        nn.init.normal_(down.weight, std=1 / rank)
        nn.init.zeros_(up.weight)
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora_targets(model: DiffusionUNet) -> list[str]:
    """The names of the layers that a LoRA changes: q, k, v and out of the attentions in spatial
    transformers, as diffusers has it; of a network without these all layers of its steps."""
    steps = ("trunk.encoder.", "trunk.middle.", "trunk.decoder.")
    inside = {name: m for name, m in model.named_modules() if name.startswith(steps)}
    if any(isinstance(m, SpatialTransformer) for m in inside.values()):
        found = (n for n, m in inside.items() if isinstance(m, Attention))
        return [f"{name}.{part}" for name in found for part in ("q", "k", "v", "out")]
    return [name for name, m in inside.items() if isinstance(m, nn.Linear | nn.Conv2d)]


def add_lora(model: DiffusionUNet, rank: int) -> None:
    """Freezes a model and puts LoRA layers around those of `lora_targets`, in place."""
    model.requires_grad_(False)
    for name in lora_targets(model):
        parent, _, own = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, LoraLayer(layer, rank))


def lora_state(model: DiffusionUNet) -> dict[str, Tensor]:
    """What `add_lora` put into a model, by the names that a file has."""
    names = _written_names(model.config)
    state = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for part, module in (("A", layer.down), ("B", layer.up)):
                weight = module.get_parameter("weight").detach()
                state[f"{names.get(name, name)}.lora_{part}.weight"] = weight.cpu().contiguous()
    return state


def _written_names(config: UNetConfig) -> dict[str, str]:
    try:
        check_layout(config, "diffusers")
    except InputError:
        return {}
    return {ours: f"unet.{theirs}" for ours, theirs in module_names(config, "diffusers").items()}


# ----------------------------------------------------------------------------------------------
# Files


class Change(NamedTuple):
    """What is added to the weights of one layer: scale * up @ down."""

    down: Tensor  # (rank, in), or of a convolution (rank, in, kernel, kernel)
    up: Tensor  # (out, rank), or (out, rank, 1, 1)
    scale: float

    def of(self, weight: Tensor) -> Tensor | None:
        """The change in float32, of the shape of the weight; None: it is of another layer.

        Linear layers and 1x1 convolutions stand for each other.
        """
        up, down = self.up.float().flatten(1), self.down.float()
        if self.up.shape[1] != len(down) or self.up[0, 0].numel() != 1:
            return None
        found = torch.tensordot(up, down, dims=1)
        if found.shape[:2] != weight.shape[:2] or found.numel() != weight.numel():
            return None
        return self.scale * found.reshape(weight.shape)


def read_lora(file: Path) -> dict[str, Change]:
    """The changes in a file, by the names of the layers that it has.

    Raises:
        InputError: no such file, an unreadable one, or what is no LoRA or one of another kind.
    """
    if not file.is_file():
        raise InputError(f"there is no LoRA {file}")
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no LoRA that is read here: give a .safetensors file")
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError, TypeError) as error:
        raise InputError(f"{file} cannot be read as safetensors weights: {said(error)}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, part = _parsed(key)
        if not part or (part != "alpha" and value.ndim not in (2, 4)) or not value.numel():
            raise InputError(
                f"{file} is no LoRA that is read here, as {key!r:.200} in it shows: give one of "
                "two matrices per layer (lora_A and lora_B, or lora_down and lora_up), not DoRA, "
                "LoHa, LoKr, or a whole model"
            )
        parts.setdefault(layer, {})[part] = value
    if not parts:
        raise InputError(f"{file} is empty")
    alphas = _Alphas.of(metadata, file)
    found = {}
    for layer, held in parts.items():
        if missing := {"down", "up"} - held.keys():
            raise InputError(f"{file} lacks the {missing.pop()} matrix of {layer}: copy it whole")
        rank = len(held["down"])
        alpha = float(held["alpha"]) if "alpha" in held else alphas.at(layer, rank)
        if not math.isfinite(alpha):
            raise InputError(f"{file} has alpha {alpha} for {layer}, which must be a number")
        found[layer] = Change(held["down"], held["up"], alpha / rank)
    return found


def _parsed(key: str) -> tuple[str, str]:
    """The layer of a key, and what of it: down, up, alpha; nothing: it is no LoRA's."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    if (match := _KEY.fullmatch(key)) is None:
        return key, ""
    part = match["a"] or match["b"] or match["c"]
    return match["layer"], "down" if part in _DOWN else "up"


class _Alphas(NamedTuple):
    """The alphas that peft leaves in the file's metadata."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, str], file: Path) -> _Alphas:
        try:
            values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            assert isinstance(values, dict)
        except (ValueError, RecursionError, AssertionError) as error:
            raise InputError(f"{file} has damaged lora_adapter_metadata") from error
        for name, value in values.items():
            if value and name.split(".")[-1] in ("use_dora", "use_rslora", "alpha_pattern"):
                raise InputError(f"{file} has {name} {value!r:.100}, which is not read here")
        return cls(values)

    def at(self, layer: str, rank: int) -> float:
        alpha = self.values.get(f"{_place(layer)[0]}.lora_alpha", rank)
        return float(alpha) if isinstance(alpha, int | float) else math.nan


# ----------------------------------------------------------------------------------------------
# Merging


def merge_loras(
    given: Sequence[str], unet: DiffusionUNet, texts: Mapping[str, nn.Module] | None = None
) -> None:
    """Adds the changes of LoRA files to the weights of a model, in place.

    Args:
        given: FILE or FILE:WEIGHT each, as `split_weight` takes them.
        texts: the text encoders by the names of their folders in a pipeline.

    Raises:
        InputError: a file that is no LoRA, or one of another model, with the first layer that does
            not fit; then nothing is changed by it.
    """
    layers = {"unet": _unet_layers(unet)}
    layers |= {part: _text_layers(model) for part, model in (texts or {}).items()}
    for one in given:
        file, weight = split_weight(one)
        merge(read_lora(file), layers, weight, str(file))


def split_weight(given: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT as the file and the weight, 1 where none is given; a folder, such as
    RUN/model, stands for the LoRA in it."""
    name, _, number = given.rpartition(":")
    try:
        weight = float(number) if name else 1.0
    except ValueError:  # the colon is the name's
        weight, name = 1.0, given
    if not math.isfinite(weight):
        raise InputError(f"--lora {given}: the weight must be a number, such as {name}:0.8")
    path = Path(name or given)
    return (path / LORA if path.is_dir() else path), weight


def merge(
    changes: Mapping[str, Change], layers: Mapping[str, Layers], weight: float, where: str
) -> None:
    """Adds `weight` times the changes to the layers of each part, once all are known to fit."""
    found = []
    for name, change in changes.items():
        part, spelt = _place(name)
        layer = layers.get(part, {}).get(spelt)
        if layer is None:
            raise InputError(
                f"{where} does not fit the model, which has no layer {name}: it was made for "
                "another kind of model"
            )
        mine = layer.get_parameter("weight")
        delta = change.of(mine)
        if delta is None:
            raise InputError(
                f"{where} does not fit the model: for {name} it has {tuple(change.down.shape)} and "
                f"{tuple(change.up.shape)}, but the layer is {tuple(mine.shape)}: it was made for "
                "another size of model"
            )
        found.append((mine, change))
    with torch.no_grad():
        for mine, change in found:
            delta = change.of(mine)
            assert delta is not None
            mine.copy_(mine.float() + weight * delta.to(mine.device))


def _place(name: str) -> tuple[str, str]:
    """The part of a pipeline that a layer of a file is in, and its name as `_spelt` has it."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    for prefix, part in _PARTS.items():
        if name.startswith(prefix):
            return part, _spelt(name.removeprefix(prefix))
    return "unet", _spelt(name)


def _spelt(name: str) -> str:
    """A name with underscores for points, as kohya's files have it: the others lose nothing."""
    return name.replace(".", "_")


def _unet_layers(unet: DiffusionUNet) -> Layers:
    tables: list[Mapping[str, str]] = [{}]
    layouts: tuple[Layout, ...] = ("diffusers", "compvis")
    for layout in layouts:
        try:
            check_layout(unet.config, layout)
        except InputError:
            continue
        tables.append(module_names(unet.config, layout))
    found = {}
    for name, layer in _changeable(unet):
        for spelt in {_spelt(table.get(name, name)) for table in tables}:
            found[spelt] = layer
            if spelt.endswith("to_out_0"):  # without its number in older files
                found[spelt.removesuffix("_0")] = layer
    return found


def _text_layers(model: nn.Module) -> Layers:
    found = {}
    for name, layer in _changeable(model):
        for spelling in {name, name if name.startswith("text_") else f"text_model.{name}"}:
            found[_spelt(spelling)] = layer
    return found


def _changeable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer
