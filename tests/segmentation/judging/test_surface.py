"""Distances of surfaces: against all pairs of pixels, and MONAI where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from segmentation.judging.surface import surface_scores
from unet.errors import InputError

SPACINGS = ((1.0, 1.0), (0.5, 2.0), (3.0, 0.5, 0.7))


def blobs(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A few overlapping boxes, some at the border."""
    rng, mask = np.random.default_rng(seed), np.zeros(shape, bool)
    for _ in range(3):
        first = [rng.integers(0, n - 1) for n in shape]
        mask[tuple(slice(f, f + rng.integers(1, 9)) for f in first)] = True
    return mask


def surface(mask: np.ndarray) -> np.ndarray:
    """Places (N, D) of the pixels with one outside beside them, or at the border."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inside)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_are_those_of_all_pairs(spacing):
    for seed in range(6):
        shape = (14, 17, 9)[: len(spacing)]
        found, true = blobs(seed, shape), blobs(100 + seed, shape)
        apart = cdist(surface(found) * spacing, surface(true) * spacing)
        there, back = apart.min(axis=1), apart.min(axis=0)
        far = max(np.percentile(there, 95), np.percentile(back, 95))
        near = np.mean(np.concatenate([there, back]) <= 1.5)
        assert surface_scores(found, true, 1.5, spacing) == pytest.approx((far, near))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_are_those_of_monai(spacing):
    metrics = pytest.importorskip("monai.metrics", reason="pip install 'unet-diffusion[bench]'")
    import torch

    for seed in range(6):
        shape = (14, 17, 9)[: len(spacing)]
        pair = blobs(seed, shape), blobs(100 + seed, shape)
        theirs = [torch.from_numpy(mask)[None, None].float() for mask in pair]
        given = {"include_background": True, "spacing": spacing}
        far = metrics.compute_hausdorff_distance(*theirs, percentile=95, **given).item()
        near = metrics.compute_surface_dice(*theirs, class_thresholds=[1.5], **given).item()
        assert surface_scores(*pair, 1.5, spacing) == pytest.approx((far, near), rel=1e-5)


def test_what_is_right_moved_missed_or_absent():
    true = np.zeros((30, 40), bool)
    true[5:15, 5:15] = True
    assert surface_scores(true, true, 0, (1, 1)) == (0, 1)
    assert surface_scores(np.roll(true, 3, 1), true, 3, (1, 2))[0] == 6
    assert surface_scores(np.roll(true, 3, 1), true, 6, (1, 2))[1] == 1
    assert surface_scores(true & False, true, 1, (1, 1)) == (50, 0)
    assert all(map(math.isnan, surface_scores(true, true & False, 1, (1, 1))))
    moved = np.roll(true, 3, 1)
    for white in (1, 255):
        bytes_ = (moved.astype(np.uint8) * white, true.astype(np.uint8) * white)
        assert surface_scores(*bytes_, 1, (1, 1)) == surface_scores(moved, true, 1, (1, 1))
    with pytest.raises(InputError, match=r"found \(30, 39\) and what is true \(30, 40\) differ"):
        surface_scores(true[:, 1:], true, 1, (1, 1))
