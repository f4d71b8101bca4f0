"""Numbered objects as a field of arrows that point to their middles, and back.

Of objects that touch, each pixel follows the arrows to the middle of its own: pixels that end
together are one object. After Stringer et al. 2021, "Cellpose: a generalist algorithm for cellular
segmentation" (doi:10.1038/s41592-020-01018-x), with straight arrows instead of those of a spreading
heat, which cost a hundred times as much to make for each training crop. An object of which a pixel
does not see the middle, such as a horseshoe, may fall into pieces.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

Flow = NDArray[np.float32]  # (2, H, W): rows and columns

BLUR = 2.0  # pixels by which ends are spread, lest an object have two middles
NEAR = 5  # pixels a side of the square in which there is one middle
LEAST_ENDS = 0.1  # pixels that end at a place, blurred, and make it a middle
LOOK, STILL = 16, 1.0  # every so many steps, pixels that moved no further than this have arrived
MOST_STEPS = 1024  # pixels of way


def flows(numbers: NDArray[np.integer]) -> Flow:
    """Unit arrows to the middle of each object, which shrink to 0 within a pixel of it: (2, H, W).

    The middle is the pixel of the object that is nearest to its centre of mass.

    Args:
        numbers: (H, W), one for each object; 0 and below is none, where the arrows are 0.
    """
    found = np.zeros((2, *numbers.shape), np.float32)
    rows, columns = np.nonzero(numbers > 0)
    if not rows.size:
        return found
    _, of, count = np.unique(numbers[rows, columns], return_inverse=True, return_counts=True)
    row, column = (np.bincount(of, at) / count for at in (rows, columns))
    order = np.lexsort((np.hypot(rows - row[of], columns - column[of]), of))
    middle = order[np.cumsum(count) - count]
    way = np.stack([rows[middle][of] - rows, columns[middle][of] - columns])
    found[:, rows, columns] = way / np.maximum(np.hypot(*way), 1)
    return found


def follow(flow: Flow, inside: NDArray[np.bool_]) -> NDArray[np.intp]:
    """To which pixel (row times width + column) each of the chosen pixels flows; -1 elsewhere.

    Steps of Euler's method, arrows being linear between pixels, until nothing moves on.
    """
    h, w = inside.shape
    ends = np.full((h, w), -1)
    start = torch.from_numpy(np.argwhere(inside)).float()
    if not len(start):
        return ends
    field = torch.from_numpy(np.ascontiguousarray(flow[::-1]))[None]  # x before y
    scale, edge = (torch.tensor([max(n - 1, 1) for n in (h, w)]) for _ in "12")
    place, moving = start.clone(), torch.arange(len(start))
    for _ in range(0, MOST_STEPS, LOOK):
        at = before = place[moving]
        for _ in range(LOOK):
            grid = (2 * at / scale - 1).flip(1)[None, None]
            step = F.grid_sample(field, grid, padding_mode="border", align_corners=True)
            at = (at + step[0, :, 0].T.flip(1)).clamp_min(0).minimum(edge)
        place[moving] = at
        moving = moving[(at - before).norm(dim=1) > STILL]
        if not len(moving):
            break
    row, column = place.round().long().numpy().T
    ends[inside] = row * w + column
    return ends


def gathered(ends: NDArray[np.intp]) -> NDArray[np.int32]:
    """Objects numbered from 1, 0 elsewhere, (H, W), of the ends that `follow` gives.

    Places where many pixels end are middles; a pixel belongs to the middle to whose surroundings it
    flowed.
    """
    arrived = np.bincount(ends[ends >= 0], minlength=ends.size).reshape(ends.shape)
    many = ndimage.gaussian_filter(arrived.astype(np.float32), BLUR)
    peaks = (many == ndimage.maximum_filter(many, NEAR)) & (many > LEAST_ENDS)
    middles, _ = ndimage.label(peaks, np.ones((3, 3)))
    around = watershed(-many, middles, mask=many > LEAST_ENDS / 100, connectivity=2)
    found = np.where(ends >= 0, around.ravel()[ends], 0)
    numbers = np.unique(found)
    return np.searchsorted(numbers[numbers > 0], found, side="right").astype(np.int32)


def objects_from_flow(inside: NDArray[np.bool_], flow: Flow) -> NDArray[np.int32]:
    """Objects numbered from 1, 0 elsewhere: (H, W), of where objects are and a flow (2, H, W)."""
    return gathered(follow(flow, inside))
