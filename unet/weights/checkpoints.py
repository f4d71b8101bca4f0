"""`read_checkpoint`: segmentations of other projects, from the files that these save.

Two networks have an exact counterpart here: the classic one of milesial's Pytorch-UNet and of what
copies it, and of segmentation_models.pytorch (smp) the Unet with the encoder vgg13_bn. Their shape
is found from the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet.config import UNetConfig
from unet.errors import InputError
from unet.model import UNet
from unet.weights.convert import from_layout
from unet.weights.folder import check_fit, load_weights
from unet.weights.layouts import SMP
from unet.weights.pickles import check_whole, load_by_name
from unet.weights.wrappings import has_network, unwrapped

BLOCKS = 5  # of the decoder that vgg13_bn has at its depth of 5; below them is smp's "center"
# Of 8-bit images, as these projects show them to their networks: from 0 to 1, or as ImageNet's.
UNIT = ((0.0,), (255.0,))
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class Checkpoint(NamedTuple):
    """A segmentation in a file.

    Attributes:
        what: the network, and how its images are scaled, in words.
        config: of its trunk.
        info: its normalisation, as the models of this project keep it.
        state: of a `SegmentationUNet`; of smp without the head, whose convolution is 3x3.
    """

    what: str
    config: UNetConfig
    info: dict[str, Any]
    state: dict[str, Tensor]


def read_checkpoint(file: Path) -> Checkpoint:
    """The segmentation in a .pt, .pth, .ckpt, .bin or .safetensors file, as whoever saved it.

    Prefixes and wrappers are taken off, see `unet.weights.wrappings.unwrapped`.

    Raises:
        InputError: an unreadable file, or a pickle with code in it; a network without a counterpart
            here, with the layers that tell it.
    """
    content = load_weights(file) if file.suffix == ".safetensors" else load_by_name(file)
    for layout, read in ((SMP, _smp), ("classic", _classic)):
        if has_network(content, layout):
            try:
                state = unwrapped(content, layout)
                check_whole(state)
                return read(state)
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
    raise InputError(
        f"{file} holds no network that starts a training here, with its "
        f"{', '.join(map(repr, list(content)[:3]))} ...: give a model folder, or a checkpoint of "
        "milesial's Pytorch-UNet, or of segmentation_models.pytorch's Unet with vgg13_bn"
    )


def _classic(state: Mapping[str, Any]) -> Checkpoint:
    """Of one with two classes the difference of the two logits becomes the one that we have."""
    downs = sum(f"down{n}.maxpool_conv.1.double_conv.0.weight" in state for n in range(1, 100))
    levels = ["inc", *(f"down{n}.maxpool_conv.1" for n in range(1, downs + 1))]
    widths = [_shape(state, f"{level}.double_conv.3.weight")[0] for level in levels]
    ups = [f"up{n}.conv.double_conv" for n in range(downs, 0, -1)]
    decoder = [_shape(state, f"{up}.3.weight")[0] for up in ups]
    wide = any(_shape(state, f"{up}.0.weight")[0] != w for up, w in zip(ups, decoder, strict=True))
    config = UNetConfig(
        in_channels=_shape(state, "inc.double_conv.0.weight")[1],
        **_widths(widths, decoder),
        decoder_mid="half-in" if wide else "out",
        conv_bias="inc.double_conv.0.bias" in state,
        up="transposed" if "up1.up.weight" in state else "bilinear-aligned",
    )
    ours = _float(from_layout(state, config, "classic"))
    if len(ours["head.conv.bias"]) == 2:
        for name in ("head.conv.weight", "head.conv.bias"):
            ours[name] = ours[name][1:] - ours[name][:1]
    return Checkpoint("Pytorch-UNet, images from 0 to 1", config, _scaled(config, *UNIT), ours)


def _smp(state: Mapping[str, Any]) -> Checkpoint:
    """smp's finest level has no skip: the weights of the one that we have are zero.

    The encoder's convolutions have a bias, which the mean of the norm behind them takes up.
    """
    heads = ("classification_head.", "segmentation_head.")
    kept = {k: v for k, v in state.items() if not k.startswith(heads)}
    found = [k for k in kept if k.startswith("encoder.") and getattr(kept[k], "ndim", 0) == 4]
    convs = [f"encoder.features.{7 * n + i}.weight" for n in range(BLOCKS) for i in (0, 3)]
    blocks = sum(f"decoder.blocks.{n}.conv1.0.weight" in kept for n in range(BLOCKS + 1))
    if set(found) != set(convs) or blocks != BLOCKS or "decoder.center.1.0.weight" not in kept:
        raise InputError(
            "of segmentation_models.pytorch's networks only the Unet with the encoder vgg13_bn and "
            f"{BLOCKS} blocks in its decoder has a counterpart here, and this one has {blocks} "
            f"there and {len(found)} convolutional layers in its encoder"
            f"{''.join(f', {key}' for key in found[:2])}: train it there, or begin without --init"
        )
    widths = [_shape(kept, f"encoder.features.{7 * n}.weight")[0] for n in range(BLOCKS)]
    widths.append(_shape(kept, "decoder.center.1.0.weight")[0])
    decoder = [_shape(kept, f"decoder.blocks.{n}.conv2.0.weight")[0] for n in range(BLOCKS)][::-1]
    config = UNetConfig(
        in_channels=_shape(kept, "encoder.features.0.weight")[1],
        **_widths(widths, decoder),
        up="nearest",
    )
    table = _smp_names()
    with torch.device("meta"):
        wanted = _renamed(UNet(config).state_dict(), table)
        last = f"decoder.blocks.{BLOCKS - 1}.conv1.0.weight"
        wanted[last] = wanted[last][:, widths[0] :]
        convolutions = [k for k, v in wanted.items() if k.startswith("encoder.") and v.ndim == 4]
        wanted |= {k.replace("weight", "bias"): wanted[k][:, 0, 0, 0] for k in convolutions}
    check_fit(wanted, kept, "a Unet of segmentation_models.pytorch with another encoder or decoder")
    state = _float(kept)
    for name in convolutions:
        number = int(name.split(".")[2])
        mean = f"encoder.features.{number + 1}.running_mean"
        state[mean] = state[mean] - state.pop(f"encoder.features.{number}.bias")
    first = state[last]
    state[last] = torch.cat([first.new_zeros(len(first), widths[0], 3, 3), first], dim=1)
    for n, level in enumerate(range(BLOCKS - 1, 0, -1)):  # they join the kept map behind
        name = f"decoder.blocks.{n}.conv1.0.weight"
        state[name] = state[name].roll(widths[level], dims=1)
    ours = _renamed(state, {theirs: mine for mine, theirs in table.items()})
    scaled = IMAGENET if config.in_channels == 3 else UNIT
    scale = "scaled as ImageNet's" if scaled is IMAGENET else "from 0 to 1"
    said = f"smp's Unet with vgg13_bn, without its head, images {scale}"
    trunk = {f"trunk.{name}": value for name, value in ours.items()}
    return Checkpoint(said, config, _scaled(config, *scaled), trunk)


def _smp_names() -> dict[str, str]:
    """Our modules and smp's: two convolutions and norms a level, a pooling behind them."""
    theirs = {}
    for level in range(BLOCKS):
        for i, part in enumerate(("conv1", "norm1", "conv2", "norm2")):
            number = 7 * level + i + (i > 1)  # behind each norm there is an activation
            theirs[f"encoder.{2 * level}.block.{part}"] = f"encoder.features.{number}"
        for part in "12":
            ours, block = f"decoder.{2 * level + 1}.block", f"decoder.blocks.{level}"
            theirs[f"{ours}.conv{part}"] = f"{block}.conv{part}.0"
            theirs[f"{ours}.norm{part}"] = f"{block}.conv{part}.1"
    for i, part in enumerate("12"):
        theirs[f"middle.block1.conv{part}"] = f"decoder.center.{i}.0"
        theirs[f"middle.block1.norm{part}"] = f"decoder.center.{i}.1"
    return theirs


def _renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    parts = ((key.rpartition("."), value) for key, value in state.items())
    return {f"{table[module]}.{kind}": value for (module, _, kind), value in parts}


def _widths(encoder: Sequence[int], decoder: Sequence[int]) -> dict[str, Any]:
    """The fields of a config for these channels, finest level first."""
    unit = math.gcd(*encoder, *decoder)
    if not unit:
        raise InputError("one of its layers has no channels")
    return {
        "channels": unit,
        "multipliers": tuple(width // unit for width in encoder),
        "decoder_multipliers": tuple(width // unit for width in decoder),
    }


def _shape(state: Mapping[str, Any], key: str) -> torch.Size:
    """Of the weights of a convolution."""
    value = state.get(key)
    if not isinstance(value, Tensor) or value.ndim != 4:
        raise InputError(f"the network in it lacks the convolution {key}")
    return value.shape


def _float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _scaled(config: UNetConfig, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    count = config.in_channels // len(mean)
    scale = {"mean": [*mean] * count, "std": [*std] * count, "dtype": "uint8"}
    return {"normalisation": scale}
