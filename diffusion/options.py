"""Command lines of the diffusion scripts: training and sampling. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unet.errors import InputError
from unet.training.options import FitOptions


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(FitOptions):
    """Train a diffusion model: a U-Net that predicts the noise in an image."""

    out: Path = Path("runs/ddpm")
    """Run folder to make: config.yaml, metrics.jsonl, samples/, model/, state/."""

    batch_size: int = 64
    """Images an optimizer step, over all processes and accumulated parts together."""

    lr: float = 2e-3
    """Highest learning rate."""

    weight_decay: float = 0.01
    """Weight decay."""

    data: str = "shapes"
    """A folder of images, an .npz with `images` (and `labels`), a TIFF stack; shapes: generated
    pictures of coloured shapes."""

    size: int | None = None
    """Side in pixels to which the images are resized and cropped; none given: as they are."""

    channels: Literal[1, 3] | None = None
    """1 reads the images as grey, 3 as RGB; none given: as they are."""

    crops: bool = False
    """Cut random squares of --size out of large images, instead of resizing them."""

    flips: bool | None = None
    """Mirror images left to right at random; none given: not where they have classes or captions.
    """

    val: float = 0.02
    """Images that are held out from training: below 1 a share, from 1 on a number."""

    skip_bad: bool = False
    """Leave out images that cannot be read, naming them, instead of stopping."""

    classes: bool = False
    """Learn to make images of a class: subfolders, or the `labels` of an .npz."""

    label_dropout: float = 0.1
    """Share of the images that are shown without their class, as guidance needs it."""

    network: str = "auto"
    """auto: width and levels by image size, number of images and budget; or a preset
    (scripts/describe.py --list shows them)."""

    width: int | None = None
    """Channels of the finest level, instead of the network's."""

    init: str | None = None
    """Model folder whose weights to start from: a whole model, or only its trunk where the heads
    differ."""

    noise: Literal["cosine", "linear", "scaled-linear", "sigmoid"] = "cosine"
    """Noise schedule."""

    timesteps: int = 1000
    """Noise levels T."""

    zero_snr: bool = False
    """Leave no signal at all at the last noise level (not with eps)."""

    prediction: Literal["v", "eps", "x0"] = "v"
    """What the network predicts: the noise, the image, or v, a mixture of both."""

    learn_variance: bool = False
    """Learn the variance of the reverse steps as well, by the hybrid loss."""

    weighting: Literal["plain", "min-snr"] = "plain"
    """Weight of the noise levels in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise InputError(f"--size {self.size} must be at least 1 pixel")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"--label-dropout {self.label_dropout} must be in [0, 1)")
        if self.width is not None and self.width < 1:
            raise InputError(f"--width {self.width} must be at least 1")
        if self.zero_snr and self.prediction == "eps":
            raise InputError(
                "--zero-snr leaves no signal at the last noise level, where --prediction eps says "
                "nothing about the image: choose --prediction v or x0"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are made by a trained model."""

    steps: int = 20
    """Steps from noise to image."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp-2m", "dpmpp-2m-sde"] = "dpmpp-2m"
    """Sampler. heun evaluates the network twice a step, the others once."""

    spacing: Literal["trailing", "leading", "linspace", "karras"] = "trailing"
    """How the steps are spread over the noise levels."""

    eta: float = 0.0
    """With ddim: share of fresh noise in each step, from 0 (none) to 1 (as ddpm)."""

    variance: Literal["fixed-small", "fixed-large", "learned"] = "fixed-small"
    """With ddpm: variance of the noise in each step."""

    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""

    guidance_rescale: float = 0.0
    """How far the spread that guidance widens is brought back, from 0 to 1."""

    guidance_interval: tuple[float, float] = (0.0, math.inf)
    """Guide only between these noise levels (noise per signal)."""

    clip: Literal["static", "dynamic", "none"] = "static"
    """Keep predicted images in range: clamped, or scaled by their largest values (dynamic)."""

    seed: int = 0
    """Seed; image 7 of a seed is the same whatever the number of images and the batch size."""

    batch_size: int = 64
    """Images at a time."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must be from 0 to below 2^32")
        if self.eta and self.sampler != "ddim":
            raise InputError(f"--eta {self.eta} is for --sampler ddim, not {self.sampler}")
        if self.variance != "fixed-small" and self.sampler != "ddpm":
            raise InputError(
                f"--variance {self.variance} is for --sampler ddpm, not {self.sampler}"
            )
