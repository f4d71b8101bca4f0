"""Pixel weights: the border weight map of the U-Net paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage import measure

from segmentation.data.classes import IGNORE
from unet.errors import InputError

MEMBRANE = 12  # pixels from a cell within which a membrane lies


def check_class_weights(class_weights: Sequence[float], classes: int) -> None:
    """Raise InputError if they are not one finite number of 0 or more for each class, or all 0."""
    weights = list(class_weights)
    if len(weights) != classes or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise InputError(
            f"class_weights must be {classes} numbers, one for each class, of 0 or more and not "
            f"all 0, not {weights}"
        )


def are_parted_by_membranes(masks: Iterable[NDArray[np.uint8]]) -> bool:
    """Whether class 1 are cells that nothing but thin membranes, class 0, part.

    That is where class 1 is most of the image, in five pieces an image or more, and 19 of 20 pixels
    of class 0 are within 12 pixels of it.

    Args:
        masks: class indices (H, W), IGNORE where nothing is known.
    """
    cells = pixels = thin = rest = pieces = images = 0
    for mask in masks:
        if (mask == IGNORE).all():
            continue
        cell = mask == 1
        images += 1
        pieces += ndimage.label(cell)[1]
        cells, pixels = cells + int(cell.sum()), pixels + int((mask != IGNORE).sum())
        gaps = ndimage.distance_transform_edt(~cell)[mask == 0]
        thin, rest = thin + int((gaps <= MEMBRANE).sum()), rest + gaps.size
    return cells > 0.5 * pixels and pieces >= 5 * images and thin >= 0.95 * rest > 0


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
