"""How deep pixels lie in numbered objects, which separates objects that touch.

Objects that touch have one maximum of depth each, with lower depth between them: the maxima are the
markers that a watershed grows over the objects (Vincent and Soille 1991). A network learns the
depth, from 0 at the edge of an object to 1 at its deepest place, whatever its size, and where
objects are. The probabilities of StarDist (Schmidt et al. 2018, arXiv 1806.03535) and the distances
of Naylor et al. 2019 (doi:10.1109/TMI.2018.2865709) are similar.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

Depth = NDArray[np.float32]  # (H, W)

BLUR = 1.0  # pixels: neighbouring maxima of a flat top are one
HEIGHT = 0.1  # above the way to a higher maximum, by which a maximum is an object of its own

_AROUND = np.ones((3, 3), bool)


def depths(numbers: NDArray[np.integer]) -> Depth:
    """The distance to the edge of the object that a pixel is in, divided by the largest such
    distance in it: (H, W), 0 outside. The edge of the image is no edge: an object that it cuts
    continues beyond it.

    Args:
        numbers: (H, W), one for each object, in one piece; 0 and below is none.
    """
    objects = np.maximum(numbers, 0)
    edge = np.zeros(objects.shape, bool)
    for mine, theirs in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = objects[mine] != objects[theirs]
        edge[mine] |= differ
        edge[theirs] |= differ
    if not edge.any():
        return (objects > 0).astype(np.float32)
    distance = ndimage.distance_transform_edt(~edge) + 0.5  # to between two pixels
    known, of = np.unique(objects, return_inverse=True)
    of = of.reshape(objects.shape)
    largest = np.maximum(ndimage.maximum(distance, of, np.arange(len(known))), 1)
    return np.where(objects > 0, distance / largest[of], 0).astype(np.float32)


def markers(depth: Depth) -> NDArray[np.int32]:
    """The maxima of depth (H, W), numbered from 1, which are the middles of objects; 0 elsewhere. A
    maximum counts if no path leads from it to a higher one without going down by HEIGHT.
    """
    smooth = _smooth(depth)
    if np.ptp(smooth) < HEIGHT:  # none of them rises that much
        return np.zeros(depth.shape, np.int32)
    return np.asarray(ndimage.label(h_maxima(smooth, HEIGHT), _AROUND)[0], np.int32)


def grown(middles: NDArray[np.int32], inside: NDArray[np.bool_], depth: Depth) -> NDArray[np.int32]:
    """Objects numbered from 1, 0 elsewhere: (H, W), grown from markers over the pixels of objects.
    A connected part without a marker is an object, too.
    """
    parts, count = ndimage.label(inside)
    marked = np.zeros(count + 1, bool)
    marked[parts[middles > 0]] = True
    marked[0] = True
    start = np.where(inside, middles, 0)
    start = np.where(marked[parts], start, middles.max(initial=0) + parts)
    found = watershed(-_smooth(depth), start, mask=inside)
    numbers = np.unique(found)
    return np.searchsorted(numbers[numbers > 0], found, side="right").astype(np.int32)


def objects_from_depth(inside: NDArray[np.bool_], depth: Depth) -> NDArray[np.int32]:
    """Objects numbered from 1, 0 elsewhere: (H, W), from where objects are and their depth."""
    return grown(markers(depth), inside, depth)


def _smooth(depth: Depth) -> Depth:
    return np.asarray(ndimage.gaussian_filter(depth, BLUR), np.float32)
