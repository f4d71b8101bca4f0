"""Distances of sets of masks against brute force, and their laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from segmentation.judging.distributions import energy_distance, ious, matched_iou
from unet.errors import InputError


def iou(a, b):
    either = (a | b).sum()
    return (a & b).sum() / either if either else 1.0


@pytest.mark.parametrize("seed", range(4))
def test_both_distances_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    samples, masks = rng.random((4, 5, 6)) < 0.4, rng.random((2, 5, 6)) < 0.6
    samples[0] = masks[0] = False  # IoU 1 by definition
    assert ious(samples, masks)[1, 1] == pytest.approx(iou(samples[1], masks[1]))
    bytes_ = (samples.astype(np.uint8) * 255, masks.astype(np.uint8) * 255)
    assert np.array_equal(ious(*bytes_), ious(samples, masks))
    with pytest.raises(InputError, match=r"\(4, 5, 6\) and \(2, 5, 5\) are not of one size"):
        ious(samples, masks[..., 1:])

    def mean(a, b):
        return np.mean([1 - iou(x, y) for x, y in itertools.product(a, b)])

    expected = 2 * mean(samples, masks) - mean(samples, samples) - mean(masks, masks)
    assert energy_distance(samples, masks) == pytest.approx(expected)
    repeated = np.concatenate([masks, masks[:1]])
    weighted = energy_distance(samples, masks, np.array([2 / 3, 1 / 3]))
    assert energy_distance(samples, repeated) == pytest.approx(weighted)
    four = np.concatenate([masks, masks])
    best = max(
        np.mean([iou(s, four[i]) for s, i in zip(samples, order, strict=True)])
        for order in itertools.permutations(range(4))
    )
    assert matched_iou(samples, masks) == pytest.approx(best)
    assert matched_iou(masks, samples) == pytest.approx(best)


def test_a_set_is_as_itself_in_any_order():
    masks = np.random.default_rng(0).random((6, 8, 8)) < 0.5
    assert energy_distance(masks[::-1], masks) == pytest.approx(0, abs=1e-12)
    assert matched_iou(masks[::-1], masks) == 1
    three = masks[[0, 0, 1, 2]]
    assert matched_iou(three, masks[:3]) < 1  # as one counts too often
    assert energy_distance(three, masks[:3]) > 0
