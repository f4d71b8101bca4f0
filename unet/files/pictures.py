"""Panels: pictures in rows, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = NDArray[np.uint8]  # (H, W, 3)

_GAP = 4  # white pixels between the tiles of a panel


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
