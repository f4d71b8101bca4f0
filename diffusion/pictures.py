"""Pictures to judge a diffusion model by: grids, strips and GIFs of samples, titled tables."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unet.files import replacing
from unet.pictures import RGB, panel

Images = NDArray[np.uint8]  # (N, H, W, C), C = 1 or 3

GRID = 720  # pixels a side that a grid of small images is enlarged to, at most
CELL = 112  # and a picture in a table
_FRAMES, _LAST = 120, 1500  # milliseconds of a GIF


def rgb(image: NDArray[np.uint8]) -> RGB:
    """An image (H, W, C), C = 1 or 3, as (H, W, 3)."""
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def enlarged(image: RGB, side: int) -> RGB:
    """The image with each pixel as a square, as large as fits into `side`; never smaller."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """Images in rows, left to right; a square where `columns` is not given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    cells = [enlarged(rgb(image), GRID // columns) for image in images]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return panel(rows, largest=1024)


def strip(frames: Sequence[Images], count: int = 10) -> Image.Image:
    """A row for each image: `count` of the frames (N, H, W, C), evenly spread, the last at last."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    rows = [
        [enlarged(rgb(frames[j][i]), GRID // len(chosen)) for j in chosen]
        for i in range(len(frames[0]))
    ]
    return panel(rows)


def write_gif(path: Path, frames: Sequence[Images]) -> None:
    """An animation of grids; the last frame stays a while."""
    pictures = [grid(frame).quantize(dither=Image.Dither.NONE) for frame in frames]
    times = [_FRAMES] * (len(pictures) - 1) + [_LAST]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0
        )


def table(rows: Mapping[str, Sequence[RGB]], titles: Sequence[str]) -> Image.Image:
    """Pictures in named rows and titled columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 * len(titles) + 1.2, 1.25 * len(rows) + 0.4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(enlarged(picture, CELL), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
