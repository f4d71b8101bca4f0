"""Cells that touch: generated ones with numbered masks, and what a threshold alone finds.

    python benchmarks/touching.py DIR
    python benchmarks/touching.py --otsu DIR HELD_OUT

The first writes 44 images: ellipses of 6 to 11 px in groups, each of its own brightness, blurred,
over noise; hold out the last 12 with --val-names 32-43. The second is the floor under every
network: the connected parts above Otsu's threshold, or below where the background is bright
(stained tissue), of the last so many images of a folder, by kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from segmentation.data.instances import object_numbers, smallest_counted, without_small
from segmentation.data.pairs import find_pairs
from segmentation.judging.instances import Overlaps
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


def floor(folder: Path, held_out: int) -> None:
    """Prints the scores of Otsu's threshold; smaller objects than theirs do not count."""
    pairs = find_pairs(folder)
    masks = [object_numbers(pair.read_mask()) for pair in pairs]
    smallest = smallest_counted(masks[:-held_out])
    kinds = {"fluorescence": Overlaps(), "stained": Overlaps()}
    for pair, mask in zip(pairs[-held_out:], masks[-held_out:], strict=True):
        grey = pair.read_image().mean(axis=2)
        threshold = threshold_otsu(grey)
        stained = np.median(grey) > threshold
        parts, _ = ndimage.label(grey < threshold if stained else grey > threshold)
        found = Overlaps.of(without_small(parts.astype(np.int32), smallest), mask)
        kinds["stained" if stained else "fluorescence"] += found
    for kind, overlaps in [*kinds.items(), ("all", sum(kinds.values(), Overlaps()))]:
        if not overlaps.images:
            continue
        scores = overlaps.scores()
        figures = "  ".join(f"{k} {scores[k]:.3f}" for k in ("ap50", "ap", "pq", "count_error"))
        print(f"{kind}, {overlaps.images} images: {figures}")


def main(folder: Path) -> None:
    for i in range(COUNT):
        image, numbers = touching_cells(i)
        write_image(folder / "images" / f"{i:02d}.png", image)
        write_image(folder / "masks" / f"{i:02d}.tif", numbers)


if __name__ == "__main__":
    if sys.argv[1] == "--otsu":
        floor(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
