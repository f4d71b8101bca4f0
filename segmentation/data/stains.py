"""Stains: synthetic fluorescence images of two channels, with exact labels and no files.

Nuclei shine in the first channel, cytoplasm in the second, as a camera of 12 bits sees them:
blurred, of a brightness of its own for each cell, over an uneven ground, with shot noise, and with
a little of the first stain in the second channel. Neither channel alone tells all classes:
cytoplasm is faint over nuclei, and some nuclei belong to cells that the second stain has missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segmentation.data.phantom import smooth_noise
from unet.errors import InputError

CHANNELS = ("nuclei", "cytoplasm")
NAMES = ("ground", "cytoplasm", "nucleus")  # of the classes 0, 1 and 2
WHITE = 4095  # of 12 bits

_SPACING = 30  # pixels between the centres of cells, at least
_PHOTONS = 120.0  # at the brightest, which set the shot noise
_BLUR = 1.2  # pixels, of the microscope
_LEAK = 0.12  # of the first stain into the second channel


@dataclass(frozen=True)
class Stained:
    """An image and its labels.

    Attributes:
        image: (H, W, 2) uint16, 0 to WHITE.
        classes: (H, W) uint8, as NAMES.
        cells: (H, W) int32, the cells numbered from 1, their nuclei with them.
    """

    image: NDArray[np.uint16]
    classes: NDArray[np.uint8]
    cells: NDArray[np.int32]


def stained_slice(seed: int, size: tuple[int, int] = (256, 256)) -> Stained:
    """One image, the same for the same seed and size.

    Raises:
        InputError: a size below 32 x 32.
    """
    if min(size) < 32:
        raise InputError(f"stains of {size[0]} x {size[1]}: give at least 32 x 32 pixels")
    rng = np.random.default_rng(seed)
    cells, nuclei = np.zeros(size, np.int32), np.zeros(size, np.int32)
    centres = _scattered(rng, size)
    for number, (y, x) in enumerate(centres, 1):
        radius = rng.uniform(13, 21)
        body = _blob(rng, size, (y, x), radius, 0.18) & (cells == 0)
        shift = rng.normal(0, 0.12 * radius, 2)
        core = _blob(rng, size, (y + shift[0], x + shift[1]), radius * rng.uniform(0.4, 0.55), 0.1)
        cells[body] = number
        nuclei[body & core] = number
    count = len(centres) + 1
    bright, stained = (rng.uniform(0.35, 1.0, count) for _ in range(2))
    stained[rng.random(count) < 0.1] = 0.12  # missed by the second stain
    bright[0] = stained[0] = 0
    texture = 1 + 0.25 * smooth_noise(rng, size, 3.0)
    first = bright[nuclei] * texture
    rim = np.exp(-ndimage.distance_transform_edt(cells == ndimage.minimum_filter(cells, 3)) / 4)
    fibres = 0.7 + 0.3 * smooth_noise(rng, size, 2.0) + 0.5 * rim
    second = stained[cells] * fibres * np.where(nuclei > 0, 0.55, 1.0) + _LEAK * first
    ground = 0.06 + 0.03 * smooth_noise(rng, size, 60.0)
    channels = [ndimage.gaussian_filter(c, _BLUR) + ground for c in (first, second)]
    light = np.clip(np.stack(channels, axis=-1), 0, None) / 1.4
    seen = rng.poisson(light * _PHOTONS) / _PHOTONS + rng.normal(0, 0.008, light.shape)
    image = np.clip(np.rint(seen * WHITE), 0, WHITE).astype(np.uint16)
    classes = np.where(nuclei > 0, 2, np.where(cells > 0, 1, 0)).astype(np.uint8)
    return Stained(image, classes, cells)


def stained_stack(
    count: int, size: tuple[int, int] = (256, 256), seed: int = 0
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Images (N, H, W, 2) and classes (N, H, W); another seed gives other images."""
    slices = [stained_slice(seed * 100_003 + i, size) for i in range(count)]
    return np.stack([s.image for s in slices]), np.stack([s.classes for s in slices])


def _scattered(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Centres that are _SPACING apart, as many as a few hundred throws find."""
    found: list[tuple[float, float]] = []
    for _ in range(6 * (size[0] * size[1]) // _SPACING**2):
        y, x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        if all((y - a) ** 2 + (x - b) ** 2 >= _SPACING**2 for a, b in found):
            found.append((y, x))
    return found


def _blob(
    rng: np.random.Generator,
    size: tuple[int, int],
    centre: tuple[float, float],
    radius: float,
    wobble: float,
) -> NDArray[np.bool_]:
    """A rounded outline (H, W): a circle that is stretched and swings with a few waves."""
    stretch = rng.uniform(0.85, 1.18)
    waves = [(k, rng.normal(0, wobble / k), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]
    most = radius * (1 + sum(abs(height) for _, height, _ in waves))
    dy, dx = (np.arange(n) - c for n, c in zip(size, centre, strict=True))
    near = np.ix_(abs(dy) * stretch < most, abs(dx) / stretch < most)
    dy, dx = dy[near[0]], dx[near[1]]
    angle = np.arctan2(dy, dx)
    reach = sum(height * np.cos(k * angle + phase) for k, height, phase in waves)
    inside = np.zeros(size, bool)
    inside[near] = np.hypot(dy * stretch, dx / stretch) < radius * (1 + reach)
    return inside
