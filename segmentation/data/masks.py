"""How the values of masks stand for classes, found from the masks themselves. Contradictory masks
are refused with the evidence: which file holds which values in how many pixels. One option then
settles it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet.files.mask_values import MAX_CLASSES, Survey
from unet.files.pages import Array

VOID = 255  # by convention the value of pixels that nobody labelled, such as the edges of objects
VOID_WIDTH = 5  # pixels from the rim of such an edge to its middle, at most


def is_void(survey: Survey, masks: Iterable[Array]) -> bool:
    """Whether 255 marks the edges of objects, as in Pascal VOC, which have no label.

    It does if the other values are 0, 1, 2 ..., three quarters of the pixels of 255 are within
    VOID_WIDTH of another value, and three quarters are in a part that touches two other values.

    Args:
        masks: some of them, (H, W).
    """
    others = sorted(v for v in survey.pixels if isinstance(v, int) and v != VOID)
    if VOID not in survey.pixels or len(others) != len(survey.pixels) - 1:
        return False
    if len(others) < 2 or others[0] > 1 or others[-1] >= VOID // 2:
        return False
    near = between = count = 0
    for mask in masks:
        void = mask == VOID
        near += int((ndimage.distance_transform_edt(void)[void] <= VOID_WIDTH).sum())
        count += int(void.sum())
        parts = ndimage.label(void, np.ones((3, 3)))[0]
        for number, box in enumerate(ndimage.find_objects(parts), 1):
            around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
            part = parts[around] == number
            rim = ndimage.binary_dilation(part, np.ones((3, 3))) & ~part
            between += int(part.sum()) if len(np.unique(mask[around][rim])) > 1 else 0
    return min(near, between) >= 0.75 * count > 0


def are_instances(masks: Iterable[Array], *, expected: bool = False) -> bool:
    """Whether masks (H, W) number objects: 0 and one connected part for each other value.

    In each mask 9 of 10 values are one part, of 9 pixels or more on average; a mask has more than
    three values on average, and the highest one differs between masks, or there are more values
    than there can be classes.

    Args:
        expected: the files are named and stored as numbered masks are: parts are enough.
    """
    values = count = 0
    highest = set()
    for mask in masks:
        if mask.ndim != 2 or mask.min() < 0:
            return False
        numbers, places = np.unique(mask, return_inverse=True)
        order = places.reshape(mask.shape)
        whole = several = 0
        for i, box in enumerate(ndimage.find_objects(order + 1)):
            if box is not None and numbers[i] != 0:
                parts = ndimage.label(order[box] == i, np.ones((3, 3)))[1]
                whole, several = whole + (parts == 1), several + (parts > 1)
        if several > 0.1 * (whole + several) or (mask != 0).sum() < 9 * whole:
            return False
        highest.add(int(numbers[-1]))
        values, count = values + whole, count + 1
    if expected:
        return values > 0
    return values > 3 * count and (len(highest) > 1 or max(highest) > MAX_CLASSES)


def joined(parts: Sequence[Array]) -> tuple[NDArray[np.int32], int, int]:
    """One numbered mask of the masks (H, W) of single objects, from 1 on.

    Returns:
        The mask, the number of pixels that two objects claim (the later one has them), and the
        number of objects with a hole.
    """
    numbers = np.zeros(parts[0].shape[:2], np.int32)
    overlaps = holes = 0
    for number, part in enumerate(parts, 1):
        whole = np.asarray(part.any(axis=2) if part.ndim == 3 else part != 0)
        for box in ndimage.find_objects(whole.astype(np.uint8)):
            inside, region = whole[box], numbers[box]
            overlaps += int((inside & (region > 0)).sum())
            holes += bool((ndimage.binary_fill_holes(inside) != inside).any())
            region[inside] = number
    return numbers, overlaps, holes
