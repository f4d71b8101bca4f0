"""Pictures to look at: panels of them in rows, with titles and a legend, and axes that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # it takes half a second to import
    from matplotlib.axes import Axes

RGB = NDArray[np.uint8]  # (H, W, 3)
Colour: TypeAlias = tuple[int, int, int]
Legend: TypeAlias = Sequence[tuple[str, Colour]]  # what each colour stands for

LETTERS = 13  # pixels of a line's letters
_GAP = 4  # white pixels between the tiles of a panel
_LINE, _SWATCH = 20, 12  # of a legend: the height of a line, the side of a square of colour
_LONGEST = 60  # characters of a name in a legend or title
_WIDE = 8  # largest value over the least, from which on an axis is logarithmic


# How microscopists show channels: each in a colour of its own, added up.
_STAINS = ((0, 90, 255), (0, 255, 0), (255, 0, 0), (255, 0, 255), (255, 255, 0), (0, 255, 255))


def composite(image: NDArray[np.uint8]) -> RGB:
    """An image (H, W, C) as (H, W, 3): grey, RGB, or each channel in a colour, added up.

    Two channels are green and magenta, more are blue, green, red, magenta, yellow and cyan. Where
    many pixels would be white, as of bright channels of a satellite, all are made darker.
    """
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 3:
        return image
    colours = ((0, 255, 0), (255, 0, 255)) if channels == 2 else _STAINS
    shown = np.array([colours[i % len(colours)] for i in range(channels)]) / 255
    added = image @ shown
    bright = np.quantile(added.max(axis=2), 0.99) if added.size else 0
    return np.clip(np.rint(added * (255 / max(bright, 255))), 0, 255).astype(np.uint8)


def panel(
    rows: Sequence[Sequence[RGB]],
    largest: int = 512,
    *,
    titles: Sequence[str] = (),
    legend: Legend = (),
) -> Image.Image:
    """Pictures (H, W, 3) in rows and columns, each scaled down to `largest` pixels a side at most.

    Args:
        titles: of the columns, above them.
        legend: drawn below the pictures, in as many lines as it takes.
    """
    pictures = [[Image.fromarray(p) for p in row] for row in rows]
    for row in pictures:
        for picture in row:
            picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    titles = [shortened(title) for title in titles]
    widths = [max(p.width for p in column if p) for column in zip_longest(*pictures)]
    widths = [max(pair) for pair in zip_longest(widths, map(_width, titles), fillvalue=0)]
    head, heights = _LINE * bool(titles), [max(p.height for p in row) + _GAP for row in pictures]
    width = sum(width + _GAP for width in widths) + _GAP
    below = key(legend, width) if legend else Image.new("RGB", (width, 0))
    size = max(width, below.width), head + sum(heights) + _GAP + below.height
    sheet = Image.new("RGB", size, "white")
    draw, lefts = ImageDraw.Draw(sheet), np.cumsum([_GAP, *(w + _GAP for w in widths)]).tolist()
    for title, left, wide in zip(titles, lefts, widths, strict=False):
        draw.text((left + wide / 2, head / 2 + 1), title, "black", font(LETTERS), anchor="mm")
    top = head + _GAP
    for row, height in zip(pictures, heights, strict=True):
        for picture, left in zip(row, lefts, strict=False):
            sheet.paste(picture, (left, top))
        top += height
    sheet.paste(below, (0, top))
    return sheet


def key(legend: Legend, width: int) -> Image.Image:
    """Squares of colour, each with its name, in lines of at most `width` pixels.

    It is wider where a single name is: nothing is cut off but the middle of a very long name.
    """
    places: list[tuple[int, int]] = []  # left and top of each
    right, line = _GAP, 0
    for name, _ in legend:
        wide = _SWATCH + 2 * _GAP + _width(shortened(name))
        if places and right + wide + _GAP > width:
            right, line = _GAP, line + 1
        places.append((right, _GAP + line * _LINE))
        width, right = max(width, right + wide + _GAP), right + wide + 5 * _GAP
    sheet = Image.new("RGB", (width, (line + 1) * _LINE + 2 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for (left, top), (name, colour) in zip(places, legend, strict=True):
        above = top + (_LINE - _SWATCH) // 2
        square = (left, above, left + _SWATCH - 1, above + _SWATCH - 1)
        draw.rectangle(square, tuple(colour), "#888888")
        middle = (left + _SWATCH + 2 * _GAP, top + _LINE / 2)
        draw.text(middle, shortened(name), "black", font(LETTERS), anchor="lm")
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont:
    """Letters of that many pixels, of most alphabets: Pillow's own font has not even an é."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def shortened(name: str, longest: int = _LONGEST) -> str:
    """The name on one line, without its middle where it is longer than that many characters."""
    line, half = " ".join(name.split()), longest // 2 - 1
    return line if len(line) <= longest else f"{line[:half]}…{line[-half:]}"


def marker_of(points: Sized) -> str:
    """The marker of a line through these points: a single one has no line, and is a dot."""
    return "." if len(points) == 1 else ""


def fit_axis(axes: Axes, values: NDArray[np.floating]) -> None:
    """Lets the y axis follow values: logarithmic, with round ticks, where positive ones span far.

    Args:
        values: those to see, in any order; what is not finite does not count.
    """
    known = values[np.isfinite(values)]
    if not known.size or known.min() == known.max():
        return
    low, high = float(known.min()), float(known.max())
    if low <= 0 or high <= _WIDE * low:
        margin = (high - low) / 20
        axes.set_ylim(low - margin, high + margin)
        return
    margin = (high / low) ** 0.05
    low, high = low / margin, high * margin
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 6 else (1,)
    ticks = [t for power in powers for m in steps if low < (t := m * 10.0**power) < high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _width(text: str) -> int:
    return math.ceil(font(LETTERS).getlength(text))
