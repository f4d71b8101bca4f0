"""Masks with a number for each cell, as classes, and back.

Touching cells would merge into one. `segmentation.data.depths` separates them; models of earlier
versions learnt a border class between them, and are still read and scored that way.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from segmentation.data.classes import IGNORE
from unet.files.mask_values import Value, value_codes
from unet.files.pages import Array

BACKGROUND, CELL, BORDER = range(3)
INSTANCE_NAMES = ("background", "cell", "border")  # of models of earlier versions
OBJECT_NAMES = INSTANCE_NAMES[:2]

REACH = 3  # rows and columns of a border, to each side of where two cells touch
LEAST_INSIDE = 0.25  # of a cell, that a border wider than a pixel leaves
UNKNOWN = -1  # the number of pixels that do not count

_AROUND = np.ones((3, 3), bool)


def instance_classes(mask: Array, ignore_value: Value | None = None) -> NDArray[np.uint8]:
    """Background, cell, or border where two cells touch: (H, W) uint8.

    Border pixels are those of a cell with a pixel of another cell at most REACH rows and columns
    away, so a border is six pixels wide: a network hardly learns a border of two pixels, and does
    not separate cells that touch (docs/experiments.md). The border is narrower in a cell of which
    less than a quarter would be left, or not one piece. Slivers that it would cut off from a cell
    are border, too. A cell that would be border altogether keeps one pixel near its middle. The
    insides of two cells are never 4-neighbours, so that each 4-connected part of class 1 belongs to
    one cell (unless both are but border, and one is a single pixel).

    Args:
        mask: (H, W) integers or (H, W, 3) colours, one for each cell; 0 is background.
        ignore_value: of pixels that do not count: they are no cell and become IGNORE.
    """
    numbers = object_numbers(mask, ignore_value)
    ignored, inside = numbers == UNKNOWN, numbers > 0
    cells = np.where(inside, numbers, 0)
    touches = _near_another(cells, 1)
    for reach in range(2, REACH + 1):
        wider = _near_another(cells, reach)
        touches |= wider & _well_inside(cells, inside & ~wider)[cells]
    classes = np.where(touches, BORDER, np.where(inside, CELL, BACKGROUND)).astype(np.uint8)
    classes[_slivers(cells, classes)] = BORDER
    has_inside = np.bincount(cells[classes == CELL], minlength=cells.max() + 1) > 0
    classes[_middles(cells, inside & ~has_inside[cells])] = CELL
    classes[ignored] = IGNORE
    return classes


def object_classes(mask: Array, ignore_value: Value | None = None) -> NDArray[np.uint8]:
    """Background, cell, or IGNORE: (H, W) uint8; mask and value are as in `instance_classes`."""
    numbers = object_numbers(mask, ignore_value)
    return np.where(numbers == UNKNOWN, IGNORE, numbers > 0).astype(np.uint8)


def object_numbers(mask: Array, ignore_value: Value | None = None) -> NDArray[np.int32]:
    """Objects numbered from 1 on in the order of their values, 0 is background: (H, W).

    Args:
        mask: (H, W) integers or (H, W, 3) colours, one for each object; 0 is background.
        ignore_value: of pixels that do not count: they become UNKNOWN.
    """
    codes = value_codes(mask)
    ignored = np.zeros(codes.shape, bool)
    if ignore_value is not None:
        channels = mask if mask.ndim == 3 else mask[:, :, None]
        ignored = (channels == np.array(ignore_value)).all(axis=2)  # a number is a grey colour
    inside = (codes != 0) & ~ignored
    numbers = np.where(ignored, UNKNOWN, 0).astype(np.int32)
    numbers[inside] = np.unique(codes[inside], return_inverse=True)[1] + 1
    return numbers


def smallest_counted(masks: Iterable[NDArray[np.integer]]) -> int:
    """The size in pixels below which 1 % of the objects of numbered masks (H, W) are; at least
    1."""
    sizes = [np.bincount(mask[mask > 0]) for mask in masks]
    found = np.concatenate([size[size > 0] for size in sizes]) if sizes else np.zeros(0)
    return int(np.percentile(found, 1, method="lower")) if found.size else 1


def without_small(numbers: NDArray[np.int32], least: int) -> NDArray[np.int32]:
    """Numbered objects (H, W) of that many pixels or more, numbered anew from 1 on."""
    kept = np.bincount(numbers.ravel()) >= least
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return renumbered[numbers]


def instances_from_classes(classes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Cells numbered from 1, 0 elsewhere: (H, W), of background, cell and border (H, W).

    The 4-connected parts of class 1 grow at equal speed into the border, not into the background.
    This undoes `instance_classes`, except for border pixels that do not touch the inside of their
    cell, or that touch the pixel that another cell kept.
    """
    numbers, _ = ndimage.label(classes == CELL)
    grown = watershed(
        np.zeros(classes.shape, np.uint8),
        markers=numbers,
        connectivity=_AROUND,
        mask=(classes == CELL) | (classes == BORDER),
    )
    return np.asarray(grown, np.int32)


def _near_another(cells: Array, reach: int) -> NDArray[np.bool_]:
    """Pixels of cells with one of another cell at most so many rows and columns away."""
    inside, size = cells > 0, 2 * reach + 1
    highest = ndimage.maximum_filter(cells, size)
    lowest = ndimage.minimum_filter(np.where(inside, cells, cells.max() + 1), size)
    return np.asarray(inside & ((highest != cells) | (lowest != cells)))


def _well_inside(cells: Array, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each number: whether the chosen pixels of the cell are one piece and a large enough part
    of it."""
    count = int(cells.max()) + 1
    sizes, left = (np.bincount(cells[where], minlength=count) for where in (cells >= 0, inside))
    parts, number = ndimage.label(inside)
    of = np.zeros(number, int)
    of[parts[inside] - 1] = cells[inside]
    whole = np.bincount(of, minlength=count) == 1
    return np.asarray(whole & (left >= LEAST_INSIDE * sizes))


def _slivers(cells: Array, classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Parts of cells without a pixel away from the border; the largest part of a cell that has no
    others is not one.
    """
    inside = classes == CELL
    parts, number = ndimage.label(inside)
    kept = np.zeros(number + 1, bool)
    kept[parts[ndimage.maximum_filter(classes, 3) < BORDER]] = True
    kept[0] = True  # outside of cells
    cell = np.zeros(number, int)
    cell[parts[inside] - 1] = cells[inside]
    order = np.lexsort((-np.bincount(parts[inside] - 1, minlength=number), cell))
    kept[1 + order[np.unique(cell[order], return_index=True)[1]]] = True
    return ~kept[parts]


def _middles(cells: Array, chosen: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Rows and columns of one pixel of each cell in the chosen pixels.

    No two are 4-neighbours where the cells have a pixel with an even sum of row and column: one of
    these is taken, the nearest to the middle.
    """
    rows, columns = np.nonzero(chosen)
    _, cell, count = np.unique(cells[rows, columns], return_inverse=True, return_counts=True)
    row, column = (np.bincount(cell, at) / count for at in (rows, columns))
    distance = np.hypot(rows - row[cell], columns - column[cell])
    order = np.lexsort((distance, (rows + columns) % 2, cell))
    first = order[np.cumsum(count) - count]
    return rows[first], columns[first]
