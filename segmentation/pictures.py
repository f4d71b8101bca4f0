"""Pictures to judge a segmentation by: overlays, error maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.classes import IGNORE
from segmentation.data.samples import CropSamples
from unet.files.pictures import RGB, panel

SAMPLES = 16  # in the picture of augmented crops

# Okabe and Ito's colours, which readers with any colour vision can tell apart.
_COLOURS = np.array(
    [
        [0, 114, 178],
        [230, 159, 0],
        [0, 158, 115],
        [204, 121, 167],
        [86, 180, 233],
        [213, 94, 0],
        [240, 228, 66],
    ]
)


def grey_or_rgb(image: NDArray[Any]) -> RGB:
    """An image (H, W, C) of any type as (H, W, 3) uint8, stretched to its 0.5 and 99.5 percentiles.

    8-bit images stay as they are.
    """
    if image.dtype != np.uint8:
        low, high = np.percentile(image, [0.5, 99.5])
        image = (np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]


def class_colours(classes: NDArray[np.integer], count: int) -> RGB:
    """Class indices (H, W) as (H, W, 3): black to white where there are two, else colours."""
    table = np.zeros((256, 3), np.uint8)
    if count == 2:
        table[1] = 255
    else:
        table[1:count] = [_COLOURS[(i - 1) % len(_COLOURS)] for i in range(1, count)]
    table[IGNORE] = 128
    return table[classes]


def overlay(image: RGB, classes: NDArray[np.integer], count: int, alpha: float = 0.5) -> RGB:
    """The image with its segmentation over it.

    Of two classes the one with fewer pixels is tinted, otherwise every class but the first.
    """
    tint = np.zeros_like(image)
    if count == 2:
        shown = classes == int(np.mean(classes == 1) < 0.5)
        tint[:] = _COLOURS[5]
    else:
        shown = (classes > 0) & (classes != IGNORE)
        tint = class_colours(classes, count)
    mixed = (1 - alpha) * image + alpha * tint
    return np.where(shown[..., None], mixed, image).astype(np.uint8)


def errors(
    image: RGB, prediction: NDArray[np.integer], target: NDArray[np.integer], count: int
) -> RGB:
    """The image, paled, with wrong pixels orange; of two classes blue where class 1 is missed."""
    out = 128 + image // 2
    valid = target != IGNORE
    out[valid & (prediction != target)] = _COLOURS[5]
    if count == 2:
        out[valid & (prediction < target)] = _COLOURS[0]
    return out


def augmented(samples: CropSamples) -> Image.Image:
    """Samples of the first epochs with their masks below them, and weights below those."""
    rows, count = [], len(samples.data.table.values)
    for start in range(0, SAMPLES, 8):
        crops = [samples[divmod(i, len(samples))] for i in range(start, start + 8)]
        rows.append([grey_or_rgb(c["image"].permute(1, 2, 0).numpy()) for c in crops])
        rows.append([class_colours(c["mask"].numpy(), count) for c in crops])
        if samples.border is not None:
            rows.append([grey_or_rgb(c["weight"][..., None].numpy()) for c in crops])
    return panel(rows, largest=192)
