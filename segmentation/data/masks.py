"""How the values of masks stand for classes, found from the masks themselves. Contradictory masks
are refused with the evidence: which file holds which values in how many pixels. One option then
settles it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet.errors import InputError
from unet.files.mask_values import APART, MAX_CLASSES, Survey
from unet.files.pages import Array

VOID = 255  # by convention the value of pixels that nobody labelled, such as the edges of objects
VOID_WIDTH = 5  # pixels from the rim of such an edge to its middle, at most


@dataclass(frozen=True)
class MaskCleaning:
    """What is done to the stored values of masks before they stand for classes.

    Attributes:
        values: each pixel takes the nearest of them; colours are first averaged over the channels.
        threshold: two classes, 0 and 255: the second one above half of the largest value of the
            mask's kind, which is 1, 255 or 65535.
    """

    values: tuple[int, ...] = ()
    threshold: bool = False

    def __bool__(self) -> bool:
        return bool(self.values) or self.threshold

    def __call__(self, mask: Array) -> Array:
        """(H, W) or (H, W, 3) as stored -> the cleaned values."""
        if not self:
            return mask
        grey = mask if mask.ndim == 2 else mask.mean(axis=2)
        if mask.ndim == 3:
            self._check_colours(mask, grey)
        if self.threshold:
            highest = grey.max()
            white = 1 if highest <= 1 else 255 if highest <= 255 else 65535
            return np.where(grey > white / 2, np.uint8(255), np.uint8(0))
        known = np.array(sorted(set(self.values)))
        place = np.searchsorted((known[1:] + known[:-1]) / 2, grey)
        return known.astype(np.min_scalar_type(int(known.max())))[place]

    def _check_colours(self, mask: Array, grey: Array) -> None:
        """Refuses colours (H, W, 3) most of which are far from all values."""
        coloured = grey[np.ptp(mask.astype(np.int64), axis=2) > 4 * APART]
        values = np.array((0, 255) if self.threshold else self.values)
        far = abs(coloured[:, None] - values).min(axis=1) > 2 * APART
        if far.sum() * 2 > len(coloured):
            raise InputError(
                "its classes are colours, whose greys are none of the values: save it as a PNG "
                "with the true colours, without --mask-values or --threshold-masks"
            )


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
