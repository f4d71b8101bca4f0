"""Whether sampled masks are as several annotators would draw them: sets of masks against sets.

IoU is that of one class, usually the second of two; of two masks without it, it is 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from unet.errors import InputError

Masks = NDArray[np.bool_]  # (N, H, W), where the class is


def ious(first: Masks, second: Masks) -> NDArray[np.float64]:
    """IoU (N, M) of each mask of a set with each of another; what is not 0 is inside.

    Raises:
        InputError: masks of two sizes.
    """
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"masks {first.shape} and {second.shape} are not of one size: compare those of one "
            "image"
        )
    a, b = ((m.reshape(len(m), -1) != 0).astype(np.float64) for m in (first, second))
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def energy_distance(
    samples: Masks, masks: Masks, shares: NDArray[np.floating] | None = None
) -> float:
    """Generalised energy distance, squared, with 1 - IoU (arXiv 1806.05034, eq. 5): the less, the
    better; 0 of a set with itself.

    2 E d(S, Y) - E d(S, S') - E d(Y, Y') over all pairs, those of a mask with itself among them.

    Args:
        shares: (M,) of the annotators' masks, which add up to 1; None: all alike.
    """
    p = np.full(len(samples), 1 / len(samples))
    q = np.full(len(masks), 1 / len(masks)) if shares is None else np.asarray(shares)
    cross, ours, theirs = (
        1 - ious(*pair) for pair in ((samples, masks), (samples, samples), (masks, masks))
    )
    return float(2 * p @ cross @ q - p @ ours @ p - q @ theirs @ q)


def matched_iou(samples: Masks, masks: Masks) -> float:
    """Mean IoU of the best one-to-one matching of samples and masks (HM-IoU, arXiv 1909.13731).

    Both sets are repeated to their least common multiple, so that each mask counts as often as
    each other one: the larger, the better, up to 1.
    """
    count = int(np.lcm(len(samples), len(masks)))
    found = ious(samples, masks)
    found = found.repeat(count // len(samples), axis=0).repeat(count // len(masks), axis=1)
    rows, columns = linear_sum_assignment(found, maximize=True)
    return float(found[rows, columns].mean())
