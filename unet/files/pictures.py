"""Panels: pictures in rows, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = NDArray[np.uint8]  # (H, W, 3)

_GAP = 4  # white pixels between the tiles of a panel


# How microscopists show channels: each in a colour of its own, added up.
_STAINS = ((0, 90, 255), (0, 255, 0), (255, 0, 0), (255, 0, 255), (255, 255, 0), (0, 255, 255))


def composite(image: NDArray[np.uint8]) -> RGB:
    """An image (H, W, C) as (H, W, 3): grey, RGB, or each channel in a colour, added up.

    Two channels are green and magenta, more are blue, green, red, magenta, yellow and cyan.
    """
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 3:
        return image
    colours = ((0, 255, 0), (255, 0, 255)) if channels == 2 else _STAINS
    shown = np.array([colours[i % len(colours)] for i in range(channels)]) / 255
    return np.clip(np.rint(image @ shown), 0, 255).astype(np.uint8)


def panel(rows: Sequence[Sequence[RGB]], largest: int = 512) -> Image.Image:
    """Pictures (H, W, 3) in rows, each scaled down to at most `largest` pixels a side."""
    pictures = [[Image.fromarray(p) for p in row] for row in rows]
    for row in pictures:
        for picture in row:
            picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    width = max(sum(p.width + _GAP for p in row) for row in pictures) + _GAP
    heights = [max(p.height for p in row) + _GAP for row in pictures]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    top = _GAP
    for row, height in zip(pictures, heights, strict=True):
        left = _GAP
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
        top += height
    return sheet
