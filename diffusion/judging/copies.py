"""Whether samples are new: the training images nearest to them, pixel by pixel."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from diffusion.judging.metrics import FloatArray, blocks, squared_distances
from unet.errors import InputError
from unet.words import counted

Images: TypeAlias = NDArray[np.uint8]  # (N, H, W) or (N, H, W, C)

COPY_QUANTILE = 0.01  # of the held-out distances, below which a sample counts as a likely copy


class Neighbours(NamedTuple):
    """For each sample its k nearest training images, nearest first."""

    distances: FloatArray  # (N, k), root mean square difference in grey levels of 0 to 255
    indices: NDArray[np.int64]  # (N, k) into the training images


def nearest_neighbours(samples: Images, training: Images, k: int = 1) -> Neighbours:
    """The training images that are nearest to each sample, pixel by pixel.

    Memory does not grow with the number of training images, which may be mapped from a file. The
    distances are exact: sums of squared 8-bit differences are whole numbers in float64.

    Raises:
        InputError: images that are not uint8 or of another size; fewer than k training images.
    """
    for name, images in (("samples", samples), ("training images", training)):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
            raise InputError(
                f"the {name} are {images.dtype} of shape {images.shape}: give uint8 (N, H, W) or "
                "(N, H, W, C), at least one"
            )
    if _with_channels(samples.shape) != _with_channels(training.shape):
        raise InputError(
            f"samples of {samples.shape[1:]} cannot be compared with training images of "
            f"{training.shape[1:]}: resize one of them"
        )
    if not 1 <= k <= len(training):
        raise InputError(f"k={k} must be from 1 to the number of training images, {len(training)}")
    pixels = math.prod(samples.shape[1:])
    distances = np.full((len(samples), k), np.inf)
    indices = np.zeros((len(samples), k), np.int64)
    for columns in blocks(len(training), pixels):
        block = _flat(training[columns])
        for rows in blocks(len(samples), max(len(block), pixels)):
            found = squared_distances(_flat(samples[rows]), block)
            near, nearest = _smallest(found, min(k, len(block)))
            both = np.hstack([distances[rows], near])
            which = np.hstack([indices[rows], nearest + columns.start])
            best = np.argsort(both, axis=1, kind="stable")[:, :k]  # of equals the earlier one
            distances[rows] = np.take_along_axis(both, best, axis=1)
            indices[rows] = np.take_along_axis(which, best, axis=1)
    return Neighbours(np.sqrt(distances / pixels), indices)


class Memorisation(NamedTuple):
    """How near samples are to the training images, against how near unseen images are.

    Attributes:
        ratios: (N,) distance of each sample to its nearest training image, divided by the median of
            that distance over the held-out images: 0 for a copy, about 1 for an image as new as a
            held-out one.
        copies: share of the samples that are nearer to a training image than all but 1 % of the
            held-out images are; a model that learned the distribution and nothing by heart has
            about 0.01. Plain or blurred samples are near to many images: look at the pairs.
        neighbours: the nearest training image of each sample, k = 1.
        warning: why the figures are rough; empty where they are not.
    """

    ratios: FloatArray
    copies: float
    neighbours: Neighbours
    warning: str

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return float(np.median(self.ratios))


def memorisation(samples: Images, held_out: Images, training: Images) -> Memorisation:
    """Compares the samples' nearest training images with those of images that were not trained on.

    The comparison of arXiv 2004.05675 (Meehan, Chaudhuri and Dasgupta 2020), with shares and ratios
    in place of a test statistic.

    Raises:
        InputError: as `nearest_neighbours`; every held-out image is a training image as well.
    """
    found = nearest_neighbours(samples, training)
    unseen = nearest_neighbours(held_out, training).distances[:, 0]
    usual = float(np.median(unseen))
    if usual == 0:
        raise InputError(
            "most held-out images are copies of training images, so they say nothing about "
            "memorisation: hold out images that are not trained on"
        )
    distances = found.distances[:, 0]
    copies = float((distances < np.quantile(unseen, COPY_QUANTILE)).mean())
    few = round(1 / COPY_QUANTILE)
    warning = ""
    if len(unseen) < few:
        warning = (
            "the share of likely copies is rough: it rests on "
            f"{counted(len(unseen), 'held-out image')}, fewer than {few}"
        )
    return Memorisation(distances / usual, copies, found, warning)


def _smallest(values: FloatArray, k: int) -> tuple[FloatArray, NDArray[np.int64]]:
    """The k smallest of each row (N, M) in order, and where they are; of equals the first."""
    left = values.copy()
    places = np.empty((len(values), k), np.int64)
    for i in range(k):  # k is small: sorting millions of values takes longer
        places[:, i] = left.argmin(axis=1)
        np.put_along_axis(left, places[:, i : i + 1], np.inf, axis=1)
    return np.take_along_axis(values, places, axis=1), places


def _flat(images: Images) -> FloatArray:
    """Images as rows (N, D)."""
    return rearrange(images, "n ... -> n (...)").astype(np.float64)


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W, C) of the shape of images."""
    return (*shape[1:], 1) if len(shape) == 3 else shape[1:]
