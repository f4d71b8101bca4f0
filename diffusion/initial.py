"""The weights that a training run starts from, and those that it leaves as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from diffusion.stable.folder import read_unet
from unet.attention import SpatialTransformer
from unet.errors import InputError
from unet.files.writing import read_json
from unet.weights.folder import load_strictly, read_config, read_weights

_CLASSES = "trunk.class_embedding."


def their_unet(path: str) -> Path | None:
    """The folder of the diffusers U-Net that --init names; None: it is one of ours."""
    inside, file = Path(path, "unet"), Path(path, "config.json")
    if inside.is_dir():
        return inside
    theirs = file.is_file() and "_class_name" in read_json(file)
    return Path(path).resolve() if theirs else None


def initialise(model: DiffusionUNet, path: str) -> None:
    """Starts from a model of either task, or of diffusers: all of its weights that the model has.

    What belongs to classes and texts is taken over only where these are the same.

    Raises:
        InputError: a trunk of another shape.
    """
    state, info = _start(path)
    own = model.state_dict()
    differs = tuple(
        prefix
        for key, prefix in (("classes", _CLASSES), ("text", "text."))
        if info.get(key) != model.info.get(key)
    )
    trunk = {
        k: v for k, v in state.items() if k.startswith("trunk.") and not k.startswith(_CLASSES)
    }
    rest = {k: v for k, v in own.items() if not k.startswith("trunk.") or k.startswith(_CLASSES)}
    for k in rest.keys() & state.keys():
        if state[k].shape == rest[k].shape and not k.startswith(differs):
            rest[k] = state[k]
    load_strictly(model, {**trunk, **rest}, path)


def _start(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a model under our names, in float32, and what else is known of it."""
    if unet := their_unet(path):
        state = read_unet(unet).state_dict()
        return {k: v.float() for k, v in state.items()}, {}
    return read_weights(Path(path)), read_config(Path(path))["info"]


def freeze_all_but_attention(model: DiffusionUNet) -> None:
    """Leaves the spatial transformers alone to be trained.

    Raises:
        InputError: the network has none.
    """
    transformers = [m for m in model.modules() if isinstance(m, SpatialTransformer)]
    if not transformers:
        raise InputError(
            "--trained attention needs a network with spatial transformers, such as Stable "
            "Diffusion's, and this one has none: leave it out"
        )
    model.requires_grad_(False)
    for transformer in transformers:
        transformer.requires_grad_(True)
        transformer.norm.register_forward_pre_hook(_with_gradient)


def _with_gradient(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """PyTorch 2.13 crashes in a group norm that is trained on a channels_last input that is not,
    on a CPU: so the input is."""
    (x,) = args
    return (x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(),)
