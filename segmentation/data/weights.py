"""Pixel weights: the border weight map of the U-Net paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage import measure

from segmentation.data.classes import IGNORE
from unet.errors import InputError

LEAST_CELLS = 2.5  # an image that membranes part
NARROW = 0.75  # half of a gap, as a share of the depth of the cells


def check_class_weights(class_weights: Sequence[float], classes: int) -> None:
    """Raise InputError if they are not one finite number of 0 or more for each class, or all 0."""
    weights = list(class_weights)
    if len(weights) != classes or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise InputError(
            f"class_weights must be {classes} numbers, one for each class, of 0 or more and not "
            f"all 0, not {weights}"
        )


class Cells(NamedTuple):
    """Which of two classes is cells, and what lies between them."""

    label: int  # the class that lies in more pieces: 0 or 1
    parted: bool  # whether thin membranes of the other class part them


def find_cells(masks: Iterable[NDArray[np.uint8]]) -> Cells:
    """Which class of masks with two classes is cells, and whether thin membranes separate them.

    Both follow from shapes alone, so that they are the same at any resolution, and whichever class
    has the lower mask value. Pieces count by their size, as 1 / sum(share^2) (the inverse Simpson
    index): n equal cells are n pieces, however many specks lie beside them. Thin membranes separate
    the cells if there are more than 2.5 pieces per image and the pixels of the other class lie in
    gaps between two cells that are

    - narrow: their median half-width is below 3/4 of the cells' median depth, as that of a
      background around cells is not;
    - most of that class: at 3/4 of its pixels the half-width is below three times the median, as it
      is not along a vessel that ends within a cell.

    Args:
        masks: class indices (H, W), IGNORE where nothing is known.
    """
    known = [mask for mask in masks if (mask != IGNORE).any()]
    pieces = [_pieces([mask == k for mask in known]) for k in (0, 1)]
    label = int(pieces[1] >= pieces[0])
    if not pieces[1 - label] or pieces[label] < LEAST_CELLS:
        return Cells(label, parted=False)
    gaps = np.concatenate([_half_gaps(mask == label)[mask == 1 - label] for mask in known])
    depths = [ndimage.distance_transform_edt(mask == label)[mask == label] for mask in known]
    half, most = np.quantile(gaps, (0.5, 0.75), method="lower")
    return Cells(
        label, parted=bool(half < NARROW * np.median(np.concatenate(depths)) and most < 3 * half)
    )


def _pieces(masks: Sequence[NDArray[np.bool_]]) -> float:
    """The effective number of pieces (inverse Simpson index) of an image; 0 without a pixel."""
    sizes = [np.bincount(ndimage.label(mask)[0][mask]).astype(float) for mask in masks]
    pairs = sum(float(size.sum()) ** 2 for size in sizes)
    return pairs / max(sum(float((size**2).sum()) for size in sizes), 1.0)


def _half_gaps(cells: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Half-widths in px of the gaps between two cells (H, W), as seen from the pixels in them.

    The distance to the nearest cell, and on to where another one is as near; inf if there is none.
    """
    parts = ndimage.label(cells)[0]
    near, (rows, columns) = ndimage.distance_transform_edt(~cells, return_indices=True)
    owner = parts[rows, columns]
    apart = np.ones(cells.shape, bool)
    for mine, theirs in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        same = owner[mine] == owner[theirs]
        apart[mine] &= same
        apart[theirs] &= same
    if apart.all():
        return np.full(cells.shape, np.inf)
    return np.asarray(near + ndimage.distance_transform_edt(apart))


def border_weights(
    labels: ArrayLike,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weights: Sequence[float] = (1.0, 1.0),
) -> NDArray[np.float32]:
    """w(x) = w_c(x) + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015, eq. 2).

    d1 and d2 are the distances in px, between centres of pixels, from x to the border of the
    nearest and of the second nearest cell. A cell is a 4-connected region of one value other than
    0, and its border are its pixels with a 4-neighbour that is not of the cell: so d1 is 0 on a
    border and grows into the cell as it does outside. The edge of the image is no border.

    Args:
        labels: (H, W) bool or integer, 0 outside cells: a mask, or cells with a number each.
        w0: added where two borders meet.
        sigma: width in px.
        class_weights: w_c outside and inside cells.

    Returns:
        (H, W), exact but for less than 1e-8 far from all but one cell.

    Raises:
        InputError: labels of another shape or type, values out of range.
    """
    array: NDArray[Any] = np.asarray(labels)
    if array.ndim != 2 or array.dtype.kind not in "bui":
        raise InputError(
            f"a border weight map needs labels (H, W) of bool or integers, not {array.dtype} "
            f"{array.shape}"
        )
    if not (0 <= w0 < math.inf and 0 < sigma < math.inf):
        raise InputError(f"border weights need w0 >= 0 and sigma > 0, not {w0} and {sigma}")
    check_class_weights(class_weights, 2)
    reach = math.ceil(sigma * math.sqrt(2 * math.log(max(w0 / 1e-8, 1)))) + 1
    cells = measure.label(array, background=0, connectivity=1)
    d1, d2 = np.full((2, *array.shape), np.inf)
    for number, box in enumerate(ndimage.find_objects(cells), 1):
        near = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        cell = cells[near] == number
        border = cell & ~ndimage.binary_erosion(cell, border_value=1)
        distance = ndimage.distance_transform_edt(~border)
        d2[near] = np.minimum(d2[near], np.maximum(d1[near], distance))
        d1[near] = np.minimum(d1[near], distance)
    by_class = np.where(cells > 0, class_weights[1], class_weights[0])
    return np.asarray(by_class + w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), np.float32)
