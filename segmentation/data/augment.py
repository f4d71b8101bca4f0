"""Augmented training crops: all geometry in one sampling grid, so an image is resampled once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unet.errors import InputError
from unet.symmetries import Flips


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training crops are varied. The defaults only flip and rotate by quarter turns."""

    flips: Flips = True  # True: the eight symmetries of a square; mirror: left to right alone
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
            if name != "flips" and not value >= 0:
                raise InputError(f"augmentation {name}={value} must be 0 (off) or more")

    @property
    def symmetries(self) -> tuple[int, ...]:
        """The symmetries of a square that crops are shown in: quarter turns; from 4 on, mirrored
        first."""
        if self.flips is True:
            return tuple(range(8))
        turns = range(4) if self.rotation >= 90 else (0,)
        return (*turns, *(4 + turn for turn in turns)) if self.flips else tuple(turns)


def augmented_crop(
    image: Tensor,
    maps: Sequence[Tensor],
    rng: np.random.Generator,
    augmentation: Augmentation,
    size: tuple[int, int],
    target_size: tuple[int, int] | None = None,
    corner: tuple[int, int] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """A random augmented crop of an image, and the maps of the pixels at its centre.

    Args:
        image: (C, H, W) float, normalised. Beyond its border it is mirrored.
        maps: (H, W) each: classes, weights.
        rng: the source of all randomness, drawn from in a fixed order.
        augmentation: how the crop is varied.
        size: height and width of the image crop, in pixels.
        target_size: those of the maps, around the same centre (valid convolutions); None: size.
        corner: first row and column of the maps' part, before augmentation; None: random.

    Returns:
        The crop (C, *size), bilinearly sampled, and the maps (*target_size), sampled from the
        nearest pixels.
    """
    target_size = target_size or size
    if corner is None:
        corner = random_corner(image.shape[-2:], rng, target_size)
    rows, columns = _grid(rng, augmentation, size, target_size, corner)
    exact = not (augmentation.rotation or augmentation.scale or augmentation.elastic)
    crop = _nearest([image], rows, columns)[0] if exact else _bilinear(image, rows, columns)
    top, left = ((n - t) // 2 for n, t in zip(size, target_size, strict=True))
    inner = (slice(top, top + target_size[0]), slice(left, left + target_size[1]))
    targets = _nearest(maps, rows[inner], columns[inner])
    return _vary_intensity(crop, rng, augmentation), targets


def random_corner(
    shape: Sequence[int],
    rng: np.random.Generator,
    size: tuple[int, int],
    pixels: NDArray[np.integer[Any]] | None = None,
) -> tuple[int, int]:
    """First row and column of a rectangle inside an image, or around it where it is larger.

    Args:
        shape: height and width of the image.
        size: of the rectangle.
        pixels: flat indices (row * width + column), of which a random one lies at a random place in
            the rectangle; None: any rectangle.
    """
    free = [n - t for n, t in zip(shape, size, strict=True)]
    if pixels is None:
        row, column = (int(rng.integers(0, f + 1)) if f > 0 else f // 2 for f in free)
        return row, column
    pixel = divmod(int(pixels[rng.integers(len(pixels))]), shape[1])
    starts = [p - int(rng.integers(0, t)) for p, t in zip(pixel, size, strict=True)]
    row, column = (
        min(max(s, 0), f) if f > 0 else f // 2 for s, f in zip(starts, free, strict=True)
    )
    return row, column


def _grid(
    rng: np.random.Generator,
    a: Augmentation,
    size: tuple[int, int],
    target_size: tuple[int, int],
    corner: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Row and column in the image, (*size) each, of every pixel of the crop."""
    flip_rows, flip_columns, swap = 0, 0, 0
    if a.flips == "mirror":
        flip_columns = int(rng.integers(0, 2))
    elif a.flips:
        flip_rows, flip_columns, swap = rng.integers(0, 2, 3).tolist()
    angle = math.radians(rng.uniform(-a.rotation, a.rotation))
    zoom = _log_uniform(rng, a.scale)
    bumps = rng.normal(0.0, 1.0, (2, 3, 3)) * a.elastic

    y, x = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size)  # from the centre
    y, x = y[:, None] * (1 - 2 * flip_rows), x * (1 - 2 * flip_columns)
    if swap and size[0] == size[1]:
        y, x = x, y
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    y, x = cos * y + sin * x, cos * x - sin * y
    if a.elastic:
        # "random displacement vectors on a coarse 3 by 3 grid ... bicubic": arXiv 1505.04597, 3.1
        fine = _bicubic(size[0]) @ torch.from_numpy(bumps).float() @ _bicubic(size[1]).T
        y, x = y + fine[0], x + fine[1]
    centre = [c + (t - 1) / 2 for c, t in zip(corner, target_size, strict=True)]
    return y + centre[0], x + centre[1]


@functools.lru_cache(maxsize=8)
def _bicubic(n: int) -> Tensor:
    """(n, 3): the weight of each of 3 points at n places from the first to the last point."""
    unit = torch.eye(3)[None, :, :, None]
    return F.interpolate(unit, (n, 1), mode="bicubic", align_corners=True)[0, ..., 0].T


def _vary_intensity(crop: Tensor, rng: np.random.Generator, a: Augmentation) -> Tensor:
    contrast, shift = _log_uniform(rng, a.contrast), rng.uniform(-a.brightness, a.brightness)
    gamma = _log_uniform(rng, a.gamma)
    blur, noise = rng.uniform(0, a.blur), rng.uniform(0, a.noise)
    if a.gamma:
        low, high = crop.aminmax()
        span = (high - low).clamp_min(1e-6)
        crop = crop.sub_(low).div_(span).pow_(gamma).mul_(span).add_(low)
    if a.contrast or a.brightness:
        crop = crop.mul_(contrast).add_(shift)
    if blur > 0.1:
        crop = _gaussian(crop, blur)
    if a.noise:
        white = rng.standard_normal(tuple(crop.shape), dtype=np.float32)
        crop = crop.add_(torch.from_numpy(white), alpha=noise)
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
    index, period = index.abs(), 2 * n - 2
    if index.max() > period:
        index = index % period  # slow, and seldom needed
    return torch.minimum(index, period - index)


def _nearest(maps: Sequence[Tensor], rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Values of maps (..., H, W) of one size at the nearest pixels."""
    h, w = maps[0].shape[-2:]
    y, x = mirror(rows.round().long(), h), mirror(columns.round().long(), w)
    flat = y * w + x
    return [m.flatten(-2)[..., flat] for m in maps]


def _bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    h, w = image.shape[-2:]
    unit = (columns * (2 / max(w - 1, 1)) - 1, rows * (2 / max(h - 1, 1)) - 1)  # -1 ... 1
    grid = torch.stack(unit, dim=-1)[None]
    return F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=True)[0]
