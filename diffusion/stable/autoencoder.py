"""`Autoencoder`: between images and the latents that a diffusion model works on.

Latent diffusion (arXiv 2112.10752, sec. 3.1); the network is diffusers' AutoencoderKL.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.stable.folder import read_autoencoder
from unet.errors import InputError


class Autoencoder:
    """A frozen autoencoder, in float32: half precision overflows in some of them.

    Latents are (z - shift) * scale, which brings them to about unit variance (sec. G of the paper).

    Args:
        model: a diffusers AutoencoderKL.
        folder: where it comes from.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model.eval().requires_grad_(False), folder
        config = model.config
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)  # pixels a latent, a side
        self.channels: int = config.latent_channels
        self.image_channels: int = config.in_channels

    @classmethod
    def from_folder(cls, path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
        """Of a folder of diffusers' AutoencoderKL, or of a pipeline folder with `vae/`.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        given = Path(path)
        folder = given / "vae" if os.path.isdir(given / "vae") else given
        if not os.path.isfile(folder / "config.json"):  # False for an impossible name, too
            raise InputError(
                f"'{given}' holds no autoencoder: give a folder with the config.json of diffusers' "
                "AutoencoderKL, or a pipeline folder with vae/"
            )
        return cls(read_autoencoder(folder).to(device), folder.resolve())

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image.

        Raises:
            InputError: its sides are not multiples of the factor.
        """
        if height % self.factor or width % self.factor:
            near = max(1, round(min(height, width) / self.factor)) * self.factor
            raise InputError(
                f"images of {height} x {width} cannot be encoded, as a latent stands for "
                f"{self.factor} x {self.factor} pixels: give a --size that is a multiple of "
                f"{self.factor}, such as {near}"
            )
        return height // self.factor, width // self.factor

    def fingerprint(self) -> str:
        """A hash of the config and the weights."""
        sha = hashlib.sha256((self.folder / "config.json").read_bytes())
        for weight in self.model.state_dict().values():
            sha.update(weight.cpu().numpy().tobytes())
        return sha.hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior, each (B, c, h, w), on the CPU.

        Args:
            images: (B, C, H, W) in [-1, 1].
        """
        with torch.autocast(self.model.device.type, enabled=False):
            posterior = self.model.encode(images.to(self.model.device)).latent_dist
        mean, std = ((posterior.mean - self.shift) * self.scale, posterior.std * self.scale)
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), about in [-1, 1], of latents (B, c, h, w); one at a time."""
        z = latents.to(self.model.device, torch.float32) / self.scale + self.shift
        with torch.autocast(self.model.device.type, enabled=False):
            return torch.cat([self.model.decode(part).sample for part in z.split(1)])
