"""Generated cells that touch, with numbered masks: python benchmarks/touching.py DIR.

Ellipses of 6 to 11 px in groups, each of its own brightness, blurred, over noise. 44 images; hold
out the last 12 with --val-names 32-43.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet.files.images import write_image

COUNT, SIZE = 44, 160


def touching_cells(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """An image and its mask with a number for each cell, (SIZE, SIZE) each."""
    rng = np.random.default_rng(seed)
    numbers, light = np.zeros((SIZE, SIZE), np.uint16), np.zeros((SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE]
    for _ in range(rng.integers(4, 8)):
        centre = rng.uniform(0, SIZE, 2)
        for _ in range(rng.integers(2, 8)):
            row, column = centre + rng.normal(0, 14, 2)
            long, angle = rng.uniform(6, 11), rng.uniform(0, np.pi)
            short = long * rng.uniform(0.65, 1)
            u = (y - row) * np.cos(angle) + (x - column) * np.sin(angle)
            v = (x - column) * np.cos(angle) - (y - row) * np.sin(angle)
            radius = (u / long) ** 2 + (v / short) ** 2
            free = (radius < 1) & (numbers == 0)
            if free.sum() > max(20, 0.75 * (radius < 1).sum()):
                numbers[free] = numbers.max() + 1
                light[free] = rng.uniform(0.5, 1) * (1 - 0.25 * radius[free])
    light = ndimage.gaussian_filter(light, 1.5)
    light += 0.3 * ndimage.gaussian_filter(rng.standard_normal(light.shape), 2)
    light += rng.normal(0, 0.08, light.shape)
    return np.clip(100 + 120 * light, 0, 255).astype(np.uint8), numbers


def main(folder: Path) -> None:
    for i in range(COUNT):
        image, numbers = touching_cells(i)
        write_image(folder / "images" / f"{i:02d}.png", image)
        write_image(folder / "masks" / f"{i:02d}.tif", numbers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
