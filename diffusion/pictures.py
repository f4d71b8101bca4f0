"""Pictures to judge a diffusion model by: grids, strips and GIFs of samples, titled tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from unet.files.pictures import LETTERS, RGB, composite, font, panel
from unet.files.writing import replacing

Images = NDArray[np.uint8]  # (N, H, W, C)

GRID = 720  # pixels a side that a grid of small images is enlarged to, at most
CELL = 128  # a picture in a table, about
LINE = 20  # a line of text
_FRAMES, _LAST = 120, 1500  # milliseconds of a GIF


def enlarged(image: RGB, side: int) -> RGB:
    """The image with each pixel as a square, as large as fits into `side`; never smaller."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def fewer_pixels(image: Images) -> RGB:
    """An image (H, W, C) in colours, by whole pixels smaller where a side is above GRID."""
    picture = Image.fromarray(composite(image))
    return np.asarray(picture.reduce(max(1, math.ceil(max(picture.size) / GRID))))


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """Images in rows, left to right; a square where `columns` is not given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    cells = [enlarged(composite(image), GRID // columns) for image in images]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return panel(rows, largest=1024)


def strip(frames: Sequence[Images], count: int = 10) -> Image.Image:
    """A row for each image: `count` of the frames (N, H, W, C), evenly spread, the last at last."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    rows = [
        [enlarged(composite(frames[j][i]), GRID // len(chosen)) for j in chosen]
        for i in range(len(frames[0]))
    ]
    return panel(rows)


def write_gif(path: Path, frames: Sequence[Images]) -> None:
    """An animation of grids; the last frame stays a while."""
    grey = frames[0].shape[-1] == 1
    grids = [grid(frame) for frame in frames]
    pictures = [g.convert("L") if grey else g.quantize(dither=Image.Dither.NONE) for g in grids]
    times = [_FRAMES] * (len(pictures) - 1) + [_LAST]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0
        )


def table(rows: Mapping[str, Sequence[RGB]], titles: Sequence[str]) -> Image.Image:
    """Pictures of one size in named rows and titled columns."""
    cells = [[cell(picture) for picture in row] for row in rows.values()]
    height, width, _ = cells[0][0].shape
    above = LINE * max(title.count("\n") + 1 for title in titles)
    head = [lettered("", LINE, above), *(lettered(title, width, above) for title in titles)]
    names = [np.rot90(lettered(name, height, LINE)) for name in rows]
    return panel([head, *([name, *row] for name, row in zip(names, cells, strict=True))])


def cell(picture: RGB) -> RGB:
    """A picture, enlarged or reduced to about 128 pixels a side."""
    image = Image.fromarray(enlarged(picture, CELL))
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return np.asarray(image)


def lettered(text: str, width: int, height: int) -> RGB:
    """Lines of text in the middle of a white tile."""
    tile = Image.new("RGB", (width, height), "white")
    draw, middle = ImageDraw.Draw(tile), (width / 2, height / 2)
    draw.text(middle, text, "black", font(LETTERS), anchor="mm", align="center")
    return np.asarray(tile)
