"""What work costs as a multiple of other work, so that a slow machine fails no test."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage


def blurs(work: Callable[..., object], *given: object, calls: int = 3) -> float:
    """The processor time of `work(*given)` in Gaussian blurs of 512 x 512 pixels.

    Of each the fastest of some calls counts, as another program may be in the way of one.
    """
    image = np.random.default_rng(0).random((512, 512))
    return min(_seconds(work, *given) for _ in range(calls)) / min(
        _seconds(ndimage.gaussian_filter, image, 3) for _ in range(10)
    )


def _seconds(work: Callable[..., object], *given: object) -> float:
    start = time.process_time()
    work(*given)
    return time.process_time() - start
