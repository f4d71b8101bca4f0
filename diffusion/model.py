"""`DiffusionUNet`: the trunk with a head that predicts an image, such as the noise in one."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion.data.conditions import Ask, Asked, Condition
from diffusion.data.masks import MaskCoding
from diffusion.data.pixels import PixelType
from diffusion.options import DiffusionOptions
from diffusion.text import TextEncoder, WordEncoder
from unet.config import UNetConfig
from unet.errors import InputError
from unet.layers import make_activation, make_norm, unpatch, zero_init
from unet.training.config_file import load_config
from unet.weights.card import Usage
from unet.weights.folder import FolderModel
from unet.words import counted

LARGEST = 2**16  # pixels a side
RUN = "config.yaml"
# Parts that its `info` names, and the options of the run that named them.
_PARTS = {"autoencoder": ("latents",), "text_encoder": ("text_encoder", "latents")}


class DiffusionUNet(FolderModel):
    """A prediction for every pixel and channel of a noisy image (DDPM, arXiv 2006.11239).

    Args:
        config: the trunk's shape.
        out_channels: the image's channels; twice as many where the variance is learned.
        info: see `FolderModel`; with "text", as `WordEncoder.to_dict` gives it, the model has a
            text encoder of its own, `text`, whose tokens are the context.
    """

    task: ClassVar[str] = "diffusion"

    def __init__(
        self, config: UNetConfig, out_channels: int, info: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, out_channels, info)
        channels = config.out_channels
        conv = nn.Conv2d(channels, out_channels * config.patch**2, 3, padding=1)
        if config.zero_init:
            zero_init(conv)
        self.head = nn.Sequential()
        self.head.add_module("norm", make_norm(channels, config))
        self.head.add_module("act", make_activation(config))
        self.head.add_module("conv", conv)
        text = self.info.get("text")
        self.text: TextEncoder | None = None if text is None else WordEncoder.from_dict(text)
        if self.text is not None and self.text.channels != config.context_channels:
            raise InputError(
                f"a text encoder of width {self.text.channels} does not go with "
                f"context_channels={config.context_channels}: both are the same"
            )

    @property
    def condition(self) -> Condition | None:
        """The condition that images are made from, from its `info`; None: from noise alone."""
        saved = self.info.get("condition")
        return None if saved is None else Condition.from_dict(saved)

    @property
    def masks(self) -> MaskCoding | None:
        """The classes of the masks that it makes, from its `info`; None: it makes images alone."""
        saved = self.info.get("target", self.info.get("joint"))
        return None if saved is None else MaskCoding.from_dict(saved)

    @property
    def joint(self) -> bool:
        """Whether masks are made with their images, behind whose channels their codes lie."""
        return "joint" in self.info

    @property
    def image_channels(self) -> int:
        """Channels of what is made; the network gets those of the condition beside them."""
        condition = self.condition
        return self.config.in_channels - (condition.channels if condition else 0)

    @property
    def pixels(self) -> PixelType:
        """The type and the values of the images that it makes, from its `info`."""
        found, masks = PixelType.of(self.info), self.masks
        found.values.each(self.image_channels - (masks.channels if masks else 0))
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on, from its `info`."""
        return trained_size(self.info)

    @property
    def any_size(self) -> bool:
        """Whether pictures of any size are made from pictures of that size: it saw them as they
        are, or parts of them, not resized. Models that do not say it were documented otherwise.
        """
        return self.condition is not None and self.info.get("resized") is False

    @property
    def classes(self) -> list[str]:
        """The names of the classes that it was trained on, from its `info`; empty if there are
        none."""
        names = self.info.get("classes") or []
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise InputError(
                "the model's config.json must give the names of its classes in info.classes, not "
                f"{names!r:.200}: train it with train-ddpm"
            )
        return list(names)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        tokens: Tensor | None = None,
        vector: Tensor | None = None,
        jump: Tensor | None = None,
        picture: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) to (B, out_channels, H, W); the arguments are those of `UNet`.

        With a text encoder, `tokens` (B, L) of `text.tokenize` can stand for context and mask. With
        a condition, `picture` (B, K, H, W) is joined to x.
        """
        if picture is not None:
            if (len(picture), *picture.shape[2:]) != (len(x), *x.shape[2:]):
                raise InputError(
                    f"the picture has shape {tuple(picture.shape)}, but the image "
                    f"{tuple(x.shape)}: give one of its size for each image"
                )
            x = torch.cat([x, picture.to(x.dtype)], dim=1)
        if tokens is not None:
            if self.text is None:
                raise InputError("this model has no text encoder for tokens: give a context")
            context, mask = self.text(tokens)
        features = self.trunk(x, t, context, mask=mask, classes=classes, vector=vector, jump=jump)
        return unpatch(self.head(features), self.config.patch, x.shape[-2:])

    def conditioning(self, wanted: Sequence[Ask]) -> dict[str, Any]:
        """What `forward` is given for images of these classes or texts, or from these pictures
        (K, H, W); None: of any, from none.
        """
        asked, device = [Asked.of(w) for w in wanted], next(self.parameters()).device
        given: dict[str, Any] = {}
        if (condition := self.condition) is not None:
            empty = torch.zeros(condition.channels, *self.size)
            rows = [empty if (read := a.read()) is None else read for a in asked]
            given["picture"] = torch.stack([row.to(device) for row in rows])
        if self.text is not None:
            given |= self.text.encode([str(a.shown or "") for a in asked])._asdict()
        elif self.config.classes:
            indices = [self.config.classes - 1 if a.shown is None else int(a.shown) for a in asked]
            given["classes"] = torch.tensor(indices, device=device)
        return given

    @staticmethod
    def noted(info: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """With the paths of its parts from the folder that it is written to; see `noted_path`."""
        known = {key: info[key] for key in _PARTS if isinstance(info.get(key), str)}
        parts = {key: noted_path(path, folder) for key, path in known.items()}
        run = (folder.resolve().parent / RUN).is_file()  # which knows what has its name alone
        return {**info, **{k: v for k, v in parts.items() if run or Path(folder, v).exists()}}

    @staticmethod
    def placed(info: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """With the paths of its parts from anywhere."""
        known = {key: info[key] for key in _PARTS if isinstance(info.get(key), str)}
        found = {k: placed_path(v, folder, _PARTS[k]) for k, v in known.items()}
        return {**info, **{k: str(path.resolve()) for k, path in found.items()}}

    def usage(self, where: str) -> Usage:
        texts, dtype = bool({"text", "text_encoder"} & self.info.keys()), "uint8"
        wanted = ', prompts="a text"' if texts else ""
        made = "(16, H, W, C)"
        command = f"unet-sample-ddpm --model {shlex.quote(where)} --out samples"
        with suppress(InputError):  # which loading it will say
            dtype = self.pixels.dtype
        with suppress(InputError):
            if self.condition is not None:
                wanted += ', pictures="image.png"'
                command += " --condition pictures"
            if self.joint and self.masks is not None:
                what = "colour" if self.masks.of_colours else "value"
                made = f"(16, H, W, C + {self.masks.depth}), the mask's {what} last"
            elif self.masks is not None and self.condition is not None:
                command = (
                    f"unet-predict-seg --model {shlex.quote(where)} --samples 16 --input images "
                    "--out masks"
                )
        return Usage(
            title="U-Net for diffusion",
            summary="It makes images out of noise.",
            pipeline_tag="text-to-image" if texts else "unconditional-image-generation",
            tags=("diffusion",),
            python=(
                "from diffusion import load\n\n"
                f"sampler = load({json.dumps(where)})\n"
                f"images = sampler(16, seed=0{wanted})  # {dtype} {made}"
            ),
            commands=(command + (' --prompt "a text"' if texts else ""),),
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, str]:
        """What using the model needs, for its card, as far as its `info` can be read."""
        facts, info = {}, self.info
        with suppress(InputError):  # which loading it will say
            facts["Images"] = "{} x {} pixels, {}".format(*self.size, self.pixels)
            if "autoencoder" not in info:
                facts["Images"] += f", {counted(self.image_channels, 'channel')}"
            if classes := self.classes:
                facts["Classes"] = ", ".join(classes)
        facts["Prediction"] = str(info.get("prediction"))
        if isinstance(schedule := info.get("schedule"), Mapping):
            facts["Noise schedule"] = ", ".join(f"{k} {v}" for k, v in schedule.items())
        if "few_steps" in info:
            facts["Few steps"] = (
                "made to be sampled in 1, 2 or 4 (--sampler jump, the default), with guidance "
                f"{info['few_steps']} built in"
            )
        if "steps" in info:
            facts["Steps"] = f"{info['steps']} by default, with the contrast of more"
        if "coupling" in info:
            facts["Coupling"] = "images got noise near them: sample without fresh noise"
        if {"text", "text_encoder"} & info.keys():
            facts["Texts"] = "captions: give prompts, and guidance=3 for images closer to them"
        with suppress(InputError):
            if masks := self.masks:
                facts["Makes"] = f"{'images with ' if self.joint else ''}{masks.said()}"
            if condition := self.condition:
                facts["Made from"] = condition.said()
        if isinstance(lora := info.get("lora"), Mapping):
            facts["LoRA"] = f"of rank {lora.get('rank')}, to be used with {lora.get('base')}"
        if "autoencoder" in info:
            facts["Latents"] = "of an autoencoder, which this folder does not hold"
        return facts


def noted_path(path: str | Path, folder: Path) -> str:
    """What a model folder stores about another model that it needs: the relative path, or only its
    name where the path would lead over the root and disclose folders of this machine.
    """
    path, folder = Path(path).resolve(), folder.resolve()
    if path.parts[:2] != folder.parts[:2]:
        return path.name
    return Path(os.path.relpath(path, folder)).as_posix()


def placed_path(note: str, folder: Path, options: Sequence[str]) -> Path:
    """Where that lies: by the path from the folder (absolute in earlier notes), or, if nothing is
    there, where the first of these options says it, of the run that the folder is part of.
    """
    where = Path(folder, note)
    file = folder.resolve().parent / RUN  # which stays on its machine
    if where.exists() or not file.is_file():
        return where
    run = load_config(DiffusionOptions, file)
    said = next((Path(run[name]) for name in options if run.get(name)), where)
    return said if said.exists() else where


def trained_size(info: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images that a model was trained on, from its `info`."""
    match info.get("size"):
        case [int(height), int(width)] if 0 < height <= LARGEST and 0 < width <= LARGEST:
            return height, width
        case other:
            raise InputError(
                "the model's config.json must give height and width of its images, from 1 to "
                f"{LARGEST}, in info.size, not {other!r:.200}: train it again"
            )
