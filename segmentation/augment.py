"""Augmented training crops: all geometry in one sampling grid, so an image is resampled once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training crops are varied. The defaults only flip and turn by quarters."""

    flips: bool = True  # along both axes, and quarter turns: the eight symmetries of a square
    rotation: float = 0.0  # largest angle in degrees, uniform
    scale: float = 0.0  # largest zoom as a factor 1 + scale either way, log-uniform
    elastic: float = 0.0  # std in pixels of the displacements at 3 x 3 points (2015: 10)
    brightness: float = 0.0  # largest shift, in standard deviations of the images
    contrast: float = 0.0  # largest factor 1 + contrast either way, log-uniform
    gamma: float = 0.0  # largest exponent 1 + gamma either way, log-uniform
    blur: float = 0.0  # largest std in pixels of a Gaussian
    noise: float = 0.0  # largest std of white noise, in standard deviations of the images

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise InputError(f"augmentation {name}={value} must be 0 (off) or more")


def augmented_crop(
    image: Tensor,
    maps: Sequence[Tensor],
    rng: np.random.Generator,
    augmentation: Augmentation,
    size: tuple[int, int],
    target_size: tuple[int, int] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """A random rectangle of an image, varied, and what belongs to the pixels of its centre.

    Args:
        image: (C, H, W) float, normalised. Beyond its border it is mirrored.
        maps: (H, W) each: classes, weights.
        rng: everything random is drawn from it, in a fixed order.
        augmentation: what is varied.
        size: height and width of the image crop, in pixels.
        target_size: those of the maps, around the same centre (valid convolutions); None: size.

    Returns:
        The crop (C, *size), bilinearly sampled, and the maps (*target_size), of nearest pixels.
    """
    target_size = target_size or size
    rows, columns = _grid(image.shape[-2:], rng, augmentation, size, target_size)
    exact = not (augmentation.rotation or augmentation.scale or augmentation.elastic)
    crop = _nearest(image, rows, columns) if exact else _bilinear(image, rows, columns)
    top, left = ((n - t) // 2 for n, t in zip(size, target_size, strict=True))
    inner = (slice(top, top + target_size[0]), slice(left, left + target_size[1]))
    targets = [_nearest(m[None], rows[inner], columns[inner])[0] for m in maps]
    return _vary_intensity(crop, rng, augmentation), targets


def _grid(
    shape: torch.Size,
    rng: np.random.Generator,
    a: Augmentation,
    size: tuple[int, int],
    target_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Row and column in the image, (*size) each, of every pixel of the crop."""
    # The maps' rectangle lies inside the image where it fits; else both have the same centre.
    free = [n - t for n, t in zip(shape, target_size, strict=True)]
    corner = [int(rng.integers(0, f + 1)) if f > 0 else f // 2 for f in free]
    flip_rows, flip_columns, swap = rng.integers(0, 2, 3) if a.flips else (0, 0, 0)
    angle = math.radians(rng.uniform(-a.rotation, a.rotation))
    zoom = _log_uniform(rng, a.scale)
    bumps = rng.normal(0.0, 1.0, (2, 3, 3)) * a.elastic

    y, x = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size)  # from the centre
    y, x = torch.meshgrid(y * (1 - 2 * flip_rows), x * (1 - 2 * flip_columns), indexing="ij")
    if swap and size[0] == size[1]:
        y, x = x, y
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    y, x = cos * y + sin * x, cos * x - sin * y
    if a.elastic:
        # "random displacement vectors on a coarse 3 by 3 grid ... bicubic": arXiv 1505.04597, 3.1
        coarse = torch.from_numpy(bumps).float()[None]
        fine = F.interpolate(coarse, size, mode="bicubic", align_corners=True)[0]
        y, x = y + fine[0], x + fine[1]
    centre = [c + (t - 1) / 2 for c, t in zip(corner, target_size, strict=True)]
    return y + centre[0], x + centre[1]


def _vary_intensity(crop: Tensor, rng: np.random.Generator, a: Augmentation) -> Tensor:
    contrast, shift = _log_uniform(rng, a.contrast), rng.uniform(-a.brightness, a.brightness)
    gamma = _log_uniform(rng, a.gamma)
    blur, noise = rng.uniform(0, a.blur), rng.uniform(0, a.noise)
    if a.gamma:
        low, high = crop.amin(), crop.amax()
        span = (high - low).clamp_min(1e-6)
        crop = ((crop - low) / span) ** gamma * span + low
    if a.contrast or a.brightness:
        crop = crop * contrast + shift
    if blur > 0.1:
        crop = _gaussian(crop, blur)
    if a.noise:
        white = rng.standard_normal(tuple(crop.shape), dtype=np.float32)
        crop = crop + noise * torch.from_numpy(white)
    return crop


def _log_uniform(rng: np.random.Generator, most: float) -> float:
    return math.exp(rng.uniform(-1, 1) * math.log1p(most))


def _gaussian(image: Tensor, std: float) -> Tensor:
    radius = math.ceil(3 * std)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * std**2))
    kernel = kernel / kernel.sum()
    x = F.pad(image[:, None], (radius,) * 4, mode="replicate")  # (C, 1, H, W): channels apart
    return F.conv2d(F.conv2d(x, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


def mirror(index: Tensor, n: int) -> Tensor:
    """Indices beyond 0 ... n - 1 mirrored at the border pixels, however far they are."""
    if n == 1:
        return torch.zeros_like(index)
    index = index.abs() % (2 * n - 2)
    return torch.minimum(index, 2 * n - 2 - index)


def _nearest(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    y = mirror(rows.round().long(), image.shape[-2])
    x = mirror(columns.round().long(), image.shape[-1])
    return image[:, y, x]


def _bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    h, w = image.shape[-2:]
    y, x = mirror(rows, h), mirror(columns, w)
    unit = [2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1]  # grid_sample's -1 ... 1
    grid = torch.stack(unit, dim=-1)[None]
    return F.grid_sample(image[None], grid, mode="bilinear", align_corners=True)[0]
