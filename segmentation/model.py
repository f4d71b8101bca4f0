"""`SegmentationUNet`: the trunk with a head that gives one logit a class and pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from unet.config import UNetConfig
from unet.errors import InputError
from unet.folder import FolderModel
from unet.layers import make_activation, make_norm, unpatch
from unet.model import he_init


class SegmentationUNet(FolderModel):
    """Logits for every pixel.

    Args:
        config: the trunk's shape, without time and context.
        out_channels: classes, or 1 for a single logit (sigmoid) of two classes.
        info: see `FolderModel`.
    """

    task: ClassVar[str] = "segmentation"

    def __init__(
        self, config: UNetConfig, out_channels: int, info: Mapping[str, Any] | None = None
    ) -> None:
        if config.time or config.classes or config.context_channels is not None:
            raise InputError(
                "a segmentation has no timestep, class or context to give: build its network with "
                "time=False, classes=0 and context_channels=None"
            )
        super().__init__(config, out_channels, info)
        channels = config.out_channels
        self.head = nn.Sequential()
        if config.block == "res":  # whose output is neither normalised nor activated yet
            self.head.add_module("norm", make_norm(channels, config))
            self.head.add_module("act", make_activation(config))
        self.head.add_module("conv", nn.Conv2d(channels, out_channels * config.patch**2, 1))
        if config.init == "he":
            he_init(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, out_channels, H, W), smaller with valid padding."""
        return unpatch(self.head(self.trunk(x)), self.config.patch, x.shape[-2:])
