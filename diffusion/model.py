"""`DiffusionUNet`: the trunk with a head that predicts an image, such as the noise in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from unet.config import UNetConfig
from unet.folder import FolderModel
from unet.layers import make_activation, make_norm, unpatch, zero_init


class DiffusionUNet(FolderModel):
    """A prediction for every pixel and channel of a noisy image (DDPM, arXiv 2006.11239).

    Args:
        config: the trunk's shape.
        out_channels: the image's channels; twice as many where the variance is learned.
        info: see `FolderModel`.
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

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W); the arguments are those of `UNet`."""
        features = self.trunk(x, t, context, mask=mask, classes=classes)
        return unpatch(self.head(features), self.config.patch, x.shape[-2:])
