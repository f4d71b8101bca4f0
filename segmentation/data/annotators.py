"""Annotators: generated micrographs with six masks each, which disagree in known ways.

The images are those of `segmentation.data.phantom`. Each annotator has a pen, thin or thick, and a
habit: to leave organelles out of the cells, to overlook faint membranes, or neither. All six are
equally likely, so the exact probability of a pixel is the mean of the six masks, and a calibrated
answer is known.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from segmentation.data.phantom import Image, Tissue, draw, grow_tissue
from unet.errors import InputError

PENS, HABITS = ("thin", "thick"), ("organelles out", "faint membranes unseen", "plain")
COUNT = len(PENS) * len(HABITS)

_THICKER = 1.5  # pixels on each side
_FAINT = 0.5  # stain of a membrane, below which some overlook it


def annotated_stack(
    count: int, size: tuple[int, int] = (256, 256), seed: int = 0
) -> tuple[Image, Image]:
    """Images and the masks of all annotators; image i depends on (seed, i) and on the size.

    Returns:
        images: uint8 (N, H, W), the same as of `phantom_stack`.
        masks: uint8 (N, COUNT, H, W), 255 = cell, 0 = membrane; the thin pens first, each with the
            habits in turn. The last thin one draws the labels of `phantom_stack`.

    Raises:
        InputError: a count or size below 1, or a negative seed.
    """
    if count < 1 or min(size) < 1 or seed < 0:
        raise InputError(
            f"annotators: {count} images of {size[0]} x {size[1]} of seed {seed}: give at least 1 "
            "of 1 x 1, and a seed of 0 or more"
        )
    images = np.empty((count, *size), np.uint8)
    masks = np.empty((count, COUNT, *size), np.uint8)
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        tissue = grow_tissue(rng, size)
        drawn = draw(rng, tissue)
        images[i] = drawn.image
        faint = _pieces(tissue, drawn.stain < _FAINT)
        for a in range(COUNT):
            pen, habit = divmod(a, len(HABITS))
            membrane = tissue.cells == 0
            if PENS[pen] == "thick":
                membrane |= tissue.distance <= tissue.half_width + _THICKER
            if HABITS[habit] == "organelles out":
                membrane |= drawn.organelles
            elif HABITS[habit] == "faint membranes unseen":
                membrane &= ~faint
            masks[i, a] = np.where(membrane, 0, 255)
    return images, masks


def _pieces(tissue: Tissue, faint: np.ndarray) -> np.ndarray:
    """Where (H, W) membranes are faint over a stretch that an eye would miss, widened by a thick
    pen."""
    core = faint & (tissue.cells == 0)
    parts, count = ndimage.label(core)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    large = (sizes >= 20) & (np.arange(count + 1) > 0)
    near = faint & (tissue.distance <= tissue.half_width + _THICKER)
    grown: np.ndarray = ndimage.binary_dilation(
        large[parts], iterations=3, mask=near | large[parts]
    )
    return grown
