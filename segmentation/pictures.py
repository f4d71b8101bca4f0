"""Pictures for judging a segmentation: masks in colours, overlays, error maps, legends."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import expand_labels

from segmentation.data.classes import IGNORE, ClassTable, class_names
from segmentation.data.samples import CropSamples
from segmentation.data.slices import middle
from unet.files.pages import missing
from unet.files.pictures import RGB, Colour, Legend, composite, font, panel, shortened

SAMPLES = 16  # in the picture of augmented crops

# As far from each other as colours can be, from black and from mid grey, by CIEDE2000: 16 and more,
# the first twenty 18, and the first eight 17 to readers of any colour vision (protanopia,
# deuteranopia and tritanopia after Machado et al., 2009). The first stands out on grey images and
# on stained tissue.
_CODES = """
00dce6 fff000 d20069 3c87ff 699600 5a0ff0 ff9687 784b00 005a4b c387d2 a5ffb4
78000f 69005a c3965a 004b87 4b9687 a55a4b 785a96 f05a00 000f78 c3d2ff 4b5a00
fff0c3 ffd2f0 007896 d200e1 a5b487 00b4f0 00d20f f06996 ff003c
"""
COLOURS: RGB = np.array([list(bytes.fromhex(code)) for code in _CODES.split()], np.uint8)
GREY = 128  # ignored pixels
TOO_HIGH: Colour = (213, 94, 0)
TOO_LOW: Colour = (0, 114, 178)

TINT = 0.35  # share of the colour inside of a part
PALETTE = 8  # colours for instances, before others are needed
NEAR = 4  # pixels by which instances grow to meet their neighbours
SMALLEST, LARGEST = 9, 16  # pixels of an instance's number


def grey_or_rgb(image: NDArray[Any], nodata: float | None = None) -> RGB:
    """An image (H, W, C) of any type as (H, W, 3) uint8, to look at.

    8-bit images of one or three channels stay as they are; others are stretched to the 0.5 and 99.5
    percentiles of their values, of other numbers of channels each by itself, which are then added
    up in colours (`unet.files.pictures.composite`). In these, pixels where nothing was measured are
    black.

    Args:
        nodata: the value of pixels where nothing was measured, beside NaN.
    """
    alike = image.shape[2] in (1, 3)
    if image.dtype == np.uint8 and alike:
        return composite(image)
    known = ~missing(image, nodata)
    parts = [image] if alike else np.split(image, image.shape[2], axis=2)
    return composite(np.concatenate([_stretched(part, known) for part in parts], axis=2))


def _stretched(image: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.uint8]:
    low, high = np.percentile(image[known], [0.5, 99.5]) if known.any() else (0, 1)
    scaled = np.where(known[..., None], (image - low) / max(high - low, 1e-12), 0)
    return (np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def class_colours(classes: NDArray[np.integer], count: int) -> RGB:
    """Class indices (H, W) as (H, W, 3): black to white where there are two, else colours."""
    table = np.zeros((256, 3), np.uint8)
    table[1:count] = 255 if count == 2 else COLOURS[: count - 1]
    table[IGNORE] = GREY
    return table[classes]


def object_colours(numbers: NDArray[np.integer]) -> RGB:
    """Numbered objects (H, W) as (H, W, 3): neighbours in different colours, black where none is,
    grey below 0, where pixels do not count.
    """
    known = np.unique(numbers[numbers > 0])
    anew = np.where(numbers > 0, np.searchsorted(known, numbers) + 1, 0)
    table = np.concatenate([np.zeros((1, 3), np.uint8), COLOURS[neighbour_colours(anew)]])
    picture = table[anew]
    picture[numbers < 0] = GREY
    return picture


def class_legend(table: ClassTable) -> Legend:
    """What the colours of `class_colours` stand for."""
    names = _names(table)
    shown = [*range(len(names)), *[IGNORE] * (table.ignore_value is not None)]
    colours = class_colours(np.array([shown]), len(names))[0]
    return list(zip([*names, "ignored"], map(_colour, colours), strict=False))


def error_legend(table: ClassTable) -> Legend:
    """What the colours of `errors` stand for."""
    names = _names(table)
    if len(names) != 2:
        return [("error: another class", TOO_HIGH)]
    low, high = (shortened(name, 20) for name in names)
    return [
        (f"error: {high} instead of {low}", TOO_HIGH),
        (f"error: {low} instead of {high}", TOO_LOW),
    ]


def overlay(image: RGB, classes: NDArray[np.integer], table: ClassTable) -> RGB:
    """The image with its classes (H, W) over it, tinted and outlined.

    Of two classes the one that was the rarer in training is marked, otherwise all but the first.
    """
    if len(table.values) == 2:
        return _marked(image, (classes == _rarer(table)).astype(np.uint8), COLOURS)
    return _marked(image, np.where(classes == IGNORE, 0, classes), COLOURS)


def overlay_legend(table: ClassTable) -> Legend:
    """What the colours of `overlay` stand for."""
    names = _names(table)
    marked = [names[_rarer(table)]] if len(names) == 2 else names[1:]
    return list(zip(marked, map(_colour, COLOURS), strict=False))


def instance_overlay(image: RGB, numbers: NDArray[np.integer]) -> RGB:
    """The image with its instances over it: tinted, outlined, numbered where there is room.

    Neighbours, such as two cells with a membrane between them, differ in colour.

    Args:
        numbers: (H, W), from 1, without gaps; 0 elsewhere.
    """
    picture = Image.fromarray(_marked(image, numbers, COLOURS[neighbour_colours(numbers)]))
    draw = ImageDraw.Draw(picture)
    inside = np.pad((numbers > 0) & ~_edges(numbers), 1)  # a number stays within the image
    room = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    every = range(1, int(numbers.max(initial=0)) + 1)
    for number, (y, x) in zip(every, ndimage.maximum_position(room, numbers, every), strict=True):
        digits = len(str(number))
        # Digits of this font are 0.64 of its size wide and 0.73 high.
        size = int(min(LARGEST, 2 * room[y, x] / np.hypot(0.64 * digits, 0.73)))
        if size >= SMALLEST:
            draw.text(
                (x, y),
                str(number),
                "white",
                font(size),
                anchor="mm",
                stroke_width=1,
                stroke_fill="black",
            )
    return np.asarray(picture)


def neighbour_colours(numbers: NDArray[np.integer]) -> NDArray[np.intp]:
    """For each instance the row of its colour in COLOURS, which differs from those of its
    neighbours.

    Each takes the first that none before it has, of eight in turn, so that few are needed and all
    are seen.

    Args:
        numbers: (H, W), from 1, without gaps; 0 elsewhere.
    """
    grown, pairs = expand_labels(numbers, NEAR), []
    for a, b in (
        (grown[1:], grown[:-1]),
        (grown[:, 1:], grown[:, :-1]),
        (grown[1:, 1:], grown[:-1, :-1]),
        (grown[1:, :-1], grown[:-1, 1:]),
    ):
        meet = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.maximum(a[meet], b[meet]), np.minimum(a[meet], b[meet])], 1))
    before: dict[int, list[int]] = {}
    for later, earlier in np.unique(np.concatenate(pairs), axis=0).tolist():
        before.setdefault(later, []).append(earlier)
    count = int(numbers.max(initial=0))
    found = np.zeros(count + 1, np.intp)  # that of instance i at i
    for i in range(1, count + 1):
        taken = set(found[before.get(i, [])].tolist())
        first = [(i + k) % PALETTE for k in range(PALETTE)]
        free = (c for c in [*first, *range(PALETTE, len(COLOURS))] if c not in taken)
        found[i] = next(free, i % len(COLOURS))
    return found[1:]


def errors(
    image: RGB, prediction: NDArray[np.integer], target: NDArray[np.integer], count: int
) -> RGB:
    """The image, pale and grey, with wrong pixels orange; of two classes blue where class 1 is
    missed.
    """
    out = 128 + np.asarray(Image.fromarray(image).convert("L").convert("RGB")) // 2
    valid = target != IGNORE
    out[valid & (prediction != target)] = TOO_HIGH
    if count == 2:
        out[valid & (prediction < target)] = TOO_LOW
    return out


def augmented(samples: CropSamples) -> Image.Image:
    """Samples of the first epochs with their masks below them, below those the depth of objects
    and the weights, where there are some.
    """
    rows, count = [], len(samples.data.table.values)
    for start in range(0, SAMPLES, 8):
        crops = [samples[divmod(i, len(samples))] for i in range(start, start + 8)]
        images = [c["image"].permute(1, 2, 0).numpy() for c in crops]
        rows.append([grey_or_rgb(middle(image, samples.data.slices)) for image in images])
        rows.append([class_colours(c["mask"].numpy(), count) for c in crops])
        if samples.data.instances:
            deep = [(255 * c["depth"][..., None].numpy()).astype(np.uint8) for c in crops]
            rows.append([grey_or_rgb(d) for d in deep])
        if samples.border is not None:
            rows.append([grey_or_rgb(c["weight"][..., None].numpy()) for c in crops])
    return panel(rows, largest=192, legend=class_legend(samples.data.table))


def _marked(image: RGB, parts: NDArray[np.integer], colours: RGB) -> RGB:
    """Tints and outlines the parts (H, W) of an image; part i has the colour i - 1, 0 is none.

    The outline is a pixel of the part's colour and, outside of all parts, one of black, or of white
    around dark colours: whatever the colour of the image, one of the two stands out.
    """
    out, shown, edges = image.copy(), parts > 0, _edges(parts)
    inside, inner, outer = shown & ~edges, shown & edges, ~shown & edges
    tint = colours[parts[inside] - 1]
    out[inside] = ((1 - TINT) * image[inside] + TINT * tint).astype(np.uint8)
    out[inner] = colours[parts[inner] - 1]
    nearby = ndimage.maximum_filter(parts, 3)[outer]
    out[outer] = outline_colours(colours)[nearby - 1]
    return out


def outline_colours(colours: RGB) -> RGB:
    """Black around light colours (N, 3), white around dark ones."""
    dark = rgb2lab(colours)[:, :1] < 55
    return np.where(dark, 255, 0).repeat(3, axis=1).astype(np.uint8)


def _edges(parts: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels with one of another part among their eight neighbours."""
    return np.asarray(ndimage.maximum_filter(parts, 3) != ndimage.minimum_filter(parts, 3))


def _names(table: ClassTable) -> list[str]:
    return [shortened(name, 30) for name in class_names(table)]


def _rarer(table: ClassTable) -> int:
    """The rarer of two classes."""
    return int(table.shares[1] <= table.shares[0])


def _colour(row: NDArray[np.integer]) -> Colour:
    r, g, b = row.tolist()
    return r, g, b
