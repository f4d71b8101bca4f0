"""`SegmentationUNet`: the trunk with a head that gives one logit a class and pixel."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn

from segmentation.data.classes import ClassTable
from segmentation.data.normalisation import Normalisation
from segmentation.data.regions import known_regions
from segmentation.data.slices import known_slices
from unet.config import UNetConfig
from unet.errors import InputError
from unet.layers import make_activation, make_norm, unpatch
from unet.model import he_init
from unet.weights.card import Usage
from unet.weights.folder import FolderModel
from unet.words import channels_said

DEPTH = "depth"  # how a model knows objects apart; none said: by a border class, or not at all
DEPTH_CHANNELS = 2  # logit and depth


class SegmentationUNet(FolderModel):
    """Logits for every pixel.

    Args:
        config: the trunk's shape, without time and context.
        out_channels: classes, or 1 for a single logit (sigmoid) of two classes.
        info: see `FolderModel`; with a true "deep_supervision" each coarser level of the decoder
            has a head of its own, for training; with "objects": "depth" the channels are a logit of
            what is an object, and the depth in it (`segmentation.data.depths`); with "regions" they
            are regions, with a sigmoid each (`segmentation.data.regions`); with a true "refined"
            the logits are refined (see `refine`).

    Attributes:
        refine: a convolution of 3 x 3 of each channel's logits, which is added to them. The pixels
            of a patch are decided one by one, so that edges would have teeth; here they see their
            neighbours. It starts at zero.
    """

    task: ClassVar[str] = "segmentation"

    def __init__(
        self, config: UNetConfig, out_channels: int, info: Mapping[str, Any] | None = None
    ) -> None:
        if config.embedding_channels or config.context_channels is not None:
            raise InputError(
                "a segmentation has no timestep, class, vector or context to give: build its "
                "network with time=False, classes=0, vector_channels=0 and context_channels=None"
            )
        super().__init__(config, out_channels, info)
        if (known := self.info.get("objects")) not in (None, DEPTH):
            raise InputError(
                f"the model encodes objects as {known!r}, which this version cannot read: update "
                "unet-diffusion"
            )
        if self.depth and out_channels != DEPTH_CHANNELS:
            raise InputError(
                f"a model of depths has {DEPTH_CHANNELS} channels, a logit and the depth, not "
                f"{out_channels}"
            )
        channels = config.out_channels
        self.head = nn.Sequential()
        if config.block == "res":  # whose output is neither normalised nor activated yet
            self.head.add_module("norm", make_norm(channels, config))
            self.head.add_module("act", make_activation(config))
        self.head.add_module("conv", nn.Conv2d(channels, out_channels * config.patch**2, 1))
        self.refine: nn.Conv2d | None = None
        self.coarse_heads = nn.ModuleList()
        if self.info.get("deep_supervision"):
            levels = config.levels - (config.skips == "level")
            widths = config.decoder_channels[1:levels]
            if config.decoder != "unet" or config.padding == "valid" or not widths:
                raise InputError(
                    "deep supervision needs decoder='unet', padding='same' and coarser levels in "
                    f"the decoder, not decoder={config.decoder!r}, padding={config.padding!r}, "
                    f"multipliers={config.multipliers}: train without it"
                )
            self.coarse_heads.extend(nn.Conv2d(w, out_channels, 1) for w in reversed(widths))
        if config.init == "he":
            he_init(self.head)
            he_init(self.coarse_heads)
        if self.info.get("refined"):
            c = out_channels
            self.refine = nn.Conv2d(c, c, 3, 1, 1, groups=c, bias=False, padding_mode="replicate")
            nn.init.zeros_(self.refine.weight)

    @property
    def overlapping(self) -> bool:
        """Whether it gives regions, with a sigmoid each (`segmentation.data.regions`)."""
        return "regions" in self.info

    @property
    def depth(self) -> bool:
        """Whether it gives the depth in objects beside their probability."""
        return self.info.get("objects") == DEPTH

    @overload
    def forward(self, x: Tensor, *, deep: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, deep: Literal[True]) -> list[Tensor]: ...
    def forward(self, x: Tensor, *, deep: bool = False) -> Tensor | list[Tensor]:
        """(B, in_channels, H, W) to logits (B, out_channels, H, W), smaller with valid padding.

        With `deep` a list of them, before those the logits of the coarser levels, as small as these
        are, the coarsest first.
        """
        maps: list[Tensor] | None = [] if deep else None
        features = self.trunk(x, maps=maps)
        logits = unpatch(self.head(features), self.config.patch, x.shape[-2:])
        if self.refine is not None:
            logits = logits + self.refine(logits)
        if maps is None:
            return logits
        pairs = zip(self.coarse_heads, maps[1:-1], strict=True)
        return [*(head(m) for head, m in pairs), logits]

    def usage(self, where: str) -> Usage:
        facts = {}
        try:
            images = Normalisation.from_dict(self.info.get("normalisation", {}))
            slices = known_slices(self.info)
            kind = channels_said(len(images.mean) // slices, self.info.get("channel_names") or ())
            kind = f"stacks, {slices} neighbouring slices together, {kind}" if slices > 1 else kind
            facts["Images"] = f"{kind}, {images.dtype}, as stored: the model normalises them itself"
            table = ClassTable.from_dict(self.info.get("classes", {}))
            names = table.names or [f"class {i}" for i in range(len(table.values))]
            pairs = zip(table.values, names, strict=True)
            if "temperature" in self.info:
                facts["Probabilities"] = f"calibrated, temperature {self.info['temperature']!s:.6}"
            facts["Mask values"] = ", ".join(f"{value} ({name})" for value, name in pairs)
            if regions := known_regions(self.info, table):
                facts["Regions"] = (
                    f"{regions.lines()}; masks show the later one, by its first value"
                )
        except InputError:  # which loading it will say
            pass
        model, given = shlex.quote(where), '"image.png")  # or an array (H, W) or (H, W, C'
        if self.info.get("slices", 1) != 1:
            given = '"stack.tif")  # or an array (N, H, W) or (N, H, W, C'
        return Usage(
            title="U-Net for segmentation",
            summary=(
                "It finds regions of an image, which may overlap."
                if self.overlapping
                else "It gives every pixel of an image a class."
            ),
            pipeline_tag="image-segmentation",
            tags=("segmentation",),
            python=(
                "from segmentation import load\n\n"
                f"model = load({json.dumps(where)})\n"
                f"mask = model({given})"
            ),
            commands=(
                f"unet-predict-seg --model {model} --input images --out predictions",
                f"unet-eval-seg --model {model} --data labelled --out scores",
            ),
            facts=facts,
        )
