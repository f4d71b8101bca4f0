"""Objects by their depth: what is learnt, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from segmentation.data.augment import Augmentation
from segmentation.data.dataset import SegmentationData
from segmentation.data.depths import depths, grown, markers, objects_from_depth
from segmentation.data.instances import UNKNOWN
from segmentation.data.pairs import pairs_from_arrays
from segmentation.data.samples import CropSamples
from segmentation.judging.instances import Overlaps
from segmentation.losses import DepthLoss, cross_entropy

Array = NDArray[Any]


def touching(seed: int, count: int = 40, size: int = 96) -> Array:
    """Convex cells of a Voronoi diagram, numbered from 1, in front of a background."""
    points = np.random.default_rng(seed).uniform(0, size, (count, 2))
    apart = [p for i, p in enumerate(points) if np.hypot(*(points[:i] - p).T).min(initial=99) > 9]
    distance, cell = cKDTree(apart).query(np.moveaxis(np.indices((size, size)), 0, -1))
    return np.asarray(np.where(distance < 13, cell + 1, 0))


def test_depth_grows_from_the_edge_of_an_object_to_one() -> None:
    numbers = np.zeros((9, 16), int)
    numbers[1:8, 2:7], numbers[1:8, 7:14], numbers[0, 15] = 4, 9, UNKNOWN
    found = depths(numbers)
    assert found.dtype == np.float32
    assert (found[numbers <= 0] == 0).all()
    np.testing.assert_allclose(found[4, 2:7], np.array([0.5, 1.5, 2.5, 1.5, 0.5]) / 2.5)
    np.testing.assert_allclose(found[4, 7:14], np.array([1, 3, 5, 7, 5, 3, 1]) / 7)
    for number in (4, 9):
        assert found[numbers == number].max() == 1
    for turn in (np.rot90, np.fliplr, np.transpose):
        np.testing.assert_array_equal(depths(turn(numbers)), turn(found))


def test_the_edge_of_the_image_is_no_edge_of_an_object() -> None:
    assert depths(np.ones((4, 5), int)).tolist() == [[1] * 5] * 4
    assert depths(np.zeros((4, 5), int)).max() == 0
    cut = np.repeat([[0, 0, 1, 1, 1, 1]], 3, axis=0)
    np.testing.assert_allclose(depths(cut)[1], np.array([0, 0, 0.5, 1.5, 2.5, 3.5]) / 3.5)


@pytest.mark.parametrize("seed", range(3))
def test_objects_come_back_from_their_depth(seed: int) -> None:
    numbers = touching(seed)
    inside = numbers > 0
    found = objects_from_depth(inside, depths(numbers))
    assert found.dtype == np.int32
    assert found.max() == len(np.unique(numbers)) - 1
    np.testing.assert_array_equal(found > 0, inside)
    assert Overlaps.of(found, numbers).scores()["ap75"] == 1
    # Touching cells, which are fewer 4-connected parts.
    assert ndimage.label(inside)[1] < found.max() / 2


def test_parts_without_a_maximum_are_objects_too() -> None:
    inside = np.zeros((12, 20), bool)
    inside[2:8, 2:8] = inside[3:9, 12:17] = True
    none = np.zeros(inside.shape, np.float32)
    assert markers(none).max() == 0
    np.testing.assert_array_equal(objects_from_depth(inside, none), ndimage.label(inside)[0])
    assert objects_from_depth(~inside & inside, none).max() == 0
    one = depths(np.where(np.arange(20) < 10, inside, 0).astype(int))
    assert objects_from_depth(inside, one).max() == 2
    far = np.roll(one, 4, axis=0)[:, ::-1]  # a maximum outside of all objects is none
    assert objects_from_depth(inside & (np.arange(20) < 10), far).max() == 1
    assert grown(markers(one), inside & False, one).max() == 0


def test_crops_have_the_depth_of_the_objects_as_they_lie_in_them() -> None:
    numbers = np.stack([touching(s, size=64) for s in range(2)]).astype(np.uint16)
    images = (numbers % 5 * 50).astype(np.uint8)
    data = SegmentationData(pairs_from_arrays(images, numbers), instances=True)
    bent = Augmentation(rotation=180, scale=0.2, elastic=3)
    samples = CropSamples(data, bent, (48, 48), (48, 48), border=(10.0, 5.0))
    sample = samples[0, 0]
    assert sample["depth"].shape == (48, 48)
    np.testing.assert_array_equal(sample["depth"] > 0, sample["mask"] == 1)
    assert sample["depth"].max() == 1
    # The weights know the cells apart that touch.
    assert samples.weights(0).numpy()[numbers[0] > 0].max() > 8


def test_the_loss_of_the_depth_is_of_the_pixels_that_count() -> None:
    torch.manual_seed(0)
    logits, depth = torch.randn(2, 2, 5, 6), torch.randn(2, 5, 6)
    mask = torch.randint(0, 2, (2, 5, 6))
    mask[0, 0] = 255
    loss = DepthLoss(cross_entropy)
    found = loss(logits, mask, None, depth)
    wrong = logits[:, 1].masked_fill(mask == 255, torch.nan)
    assert torch.equal(loss(torch.stack([logits[:, 0], wrong], 1), mask, None, depth), found)
    exact = loss(torch.stack([logits[:, 0], depth], 1), mask, None, depth)
    assert exact == pytest.approx(float(cross_entropy(logits[:, :1], mask)))
    errors = (logits[:, 1] - depth)[mask != 255]
    assert found - exact == pytest.approx(5 * float(errors.square().mean()), rel=1e-4)
