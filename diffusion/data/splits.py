"""Which images, or crops of them, are trained on, and which are held out.

A place is a row (image, top, left): a whole image at 0, 0, or a crop of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from unet.errors import InputError
from unet.files.pages import ImageInfo
from unet.words import counted

LEAST_VAL, MOST_VAL = 16, 1000  # held-out images where a share is asked for


def whole_places(images: Sequence[int]) -> NDArray[np.int64]:
    """Places (N, 3) of whole images."""
    return np.pad(np.array(images, np.int64)[:, None], ((0, 0), (0, 2)))


def grid_places(infos: Iterable[tuple[int, ImageInfo]], size: tuple[int, int]) -> NDArray[np.int64]:
    """Places (N, 3) of the crops of this size that a grid over each of these images has."""
    places = []
    for image, info in infos:
        tops, lefts = (
            np.linspace(0, n - side, n // side).astype(int).tolist()
            for n, side in zip((info.height, info.width), size, strict=True)
        )
        places += [(image, top, left) for top in tops for left in lefts]
    return np.array(places, np.int64).reshape(-1, 3)


def split(
    places: NDArray[np.int64], group: NDArray[np.int64], val: float, seed: int, *, crops: bool
) -> tuple[list[int], list[int]]:
    """The places that are trained on and those that are held out, by their indices.

    Whole images are in random order, crops in that of the places; crops of the last images are held
    out, and of a single image its lowest rows.

    Args:
        group: (images,): images with the same number are on one side.
        val: held-out groups, see `diffusion.data.images.DiffusionData`.
        seed: of the order.

    Raises:
        InputError: a number that is none; nothing is left to train on.
    """
    if not 0 <= val < np.inf or (val >= 1 and val != int(val)):
        raise InputError(
            f"val {val}: give a share between 0 and 1, a number of images, or 0 to hold out none"
        )
    if val and crops and len(np.unique(places[:, 0])) == 1:
        return _split_rows(places, val)
    of: dict[int, list[int]] = {}  # group -> its places
    for place, number in enumerate(group[places[:, 0]].tolist()):
        of.setdefault(number, []).append(place)
    count = len(of)
    least = 1 if crops else max(1, min(LEAST_VAL, count // 4))
    held_out = int(val) if val >= 1 or not val else min(max(round(val * count), least), MOST_VAL)
    if held_out >= count:
        raise InputError(
            f"{held_out} of {counted(count, 'image')} held out leave none to train on: give more "
            "images, or hold out none (val 0)"
        )
    groups = list(of)
    if not crops:
        groups = [groups[i] for i in np.random.default_rng(seed).permutation(count).tolist()]
    train, held = (
        [place for number in part for place in of[number]]
        for part in (groups[: count - held_out], groups[count - held_out :])
    )
    return (sorted(train), sorted(held)) if crops else (train, held)


def _split_rows(places: NDArray[np.int64], val: float) -> tuple[list[int], list[int]]:
    """The crops of a single image: its lowest rows of crops are held out."""
    tops = places[:, 1]
    rows = np.unique(tops)
    held_out = max(1, round(len(rows) * (val if val < 1 else val / len(tops))))
    if held_out >= len(rows):
        raise InputError(
            f"a single image with {counted(len(rows), 'row')} of crops of which {held_out} "
            "are held out leaves none to train on: give more or larger images or a smaller "
            "size, or hold out none (val 0)"
        )
    last = tops >= rows[-held_out]
    return np.flatnonzero(~last).tolist(), np.flatnonzero(last).tolist()
