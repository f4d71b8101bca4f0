"""Objects as flows: the arrows, and the way back."""

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
from segmentation.data.flows import flows, follow, gathered, objects_from_flow
from segmentation.data.instances import UNKNOWN
from segmentation.data.pairs import pairs_from_arrays
from segmentation.data.samples import CropSamples
from segmentation.losses import FlowLoss, cross_entropy

Array = NDArray[Any]


def touching(seed: int, count: int = 40, size: int = 96) -> Array:
    """Convex cells of a Voronoi diagram, numbered from 1, in front of a background."""
    points = np.random.default_rng(seed).uniform(0, size, (count, 2))
    apart = [p for i, p in enumerate(points) if np.hypot(*(points[:i] - p).T).min(initial=99) > 9]
    distance, cell = cKDTree(apart).query(np.moveaxis(np.indices((size, size)), 0, -1))
    return np.asarray(np.where(distance < 13, cell + 1, 0))


def same_objects(a: Array, b: Array) -> bool:
    """Whether two numberings differ in the numbers only."""
    pairs = np.unique(np.array([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def test_arrows_point_to_the_middle_of_their_object() -> None:
    numbers = np.zeros((9, 16), int)
    numbers[1:8, 2:7], numbers[1:8, 7:14], numbers[0, 15] = 4, 9, UNKNOWN
    found = flows(numbers)
    assert found.dtype == np.float32
    assert (found[:, numbers <= 0] == 0).all()
    rows, columns = np.indices(numbers.shape)
    for number, (row, column) in ((4, (4, 4)), (9, (4, 10))):
        inside = numbers == number
        way = np.stack([row - rows, column - columns])[:, inside]
        length = np.hypot(*way)
        np.testing.assert_allclose(found[:, inside], way / np.maximum(length, 1), atol=1e-6)
    assert (flows(np.zeros((3, 4), int)) == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_objects_come_back_from_their_flow(seed: int) -> None:
    numbers = touching(seed)
    found = objects_from_flow(numbers > 0, flows(numbers))
    assert found.dtype == np.int32
    assert same_objects(found, numbers)
    assert np.array_equal(np.unique(found), np.arange(len(np.unique(numbers))))
    # Touching cells, which are fewer 4-connected parts.
    assert ndimage.label(numbers > 0)[1] < found.max() / 2


def test_a_flow_that_is_known_in_part_gives_those_objects() -> None:
    numbers = touching(1)
    kept = np.where(np.isin(numbers, np.unique(numbers)[1::2]), numbers, 0)
    ends = follow(flows(numbers), numbers > 0)
    found = gathered(np.where(kept > 0, ends, -1))
    assert same_objects(found, kept)
    assert same_objects(objects_from_flow(kept > 0, flows(numbers)), kept)


def test_nothing_and_arrows_that_lead_nowhere_are_no_error() -> None:
    nowhere = np.zeros((12, 13), bool)
    assert objects_from_flow(nowhere, np.zeros((2, 12, 13), np.float32)).max() == 0
    outwards = np.full((2, 12, 13), 5.0, np.float32)
    assert objects_from_flow(~nowhere, outwards).max() == 1  # all end in the corner
    one = objects_from_flow(np.ones((1, 1), bool), np.zeros((2, 1, 1), np.float32))
    assert one.shape == (1, 1)


def test_long_ways_are_followed_to_their_end() -> None:
    numbers = np.ones((3, 700), int)
    assert objects_from_flow(numbers > 0, flows(numbers)).tolist() == numbers.tolist()


def test_crops_have_the_arrows_of_the_objects_as_they_lie_in_them() -> None:
    numbers = np.stack([touching(s, size=64) for s in range(2)]).astype(np.uint16)
    images = (numbers % 5 * 50).astype(np.uint8)
    data = SegmentationData(pairs_from_arrays(images, numbers), instances=True)
    bent = Augmentation(rotation=180, scale=0.2, elastic=3)
    samples = CropSamples(data, bent, (48, 48), (48, 48), border=(10.0, 5.0))
    sample = samples[0, 0]
    assert sample["flow"].shape == (2, 48, 48)
    inside = (sample["mask"] == 1).numpy()
    found = objects_from_flow(inside, sample["flow"].numpy())
    assert (found[inside] > 0).mean() > 0.98
    lengths = np.hypot(*sample["flow"].numpy())
    assert (lengths[~inside] == 0).all()
    assert np.median(lengths[inside]) == pytest.approx(1)
    # The weights know the cells apart that touch.
    assert samples.weights(0).numpy()[numbers[0] > 0].max() > 8


def test_the_loss_of_arrows_is_of_the_pixels_of_objects() -> None:
    torch.manual_seed(0)
    logits, flow = torch.randn(2, 3, 5, 6), torch.randn(2, 2, 5, 6)
    mask = torch.randint(0, 2, (2, 5, 6))
    mask[0, 0] = 255
    loss = FlowLoss(cross_entropy)
    found = loss(logits, mask, None, flow)
    other = torch.where((mask == 1)[:, None], logits[:, 1:], torch.tensor(torch.nan))
    assert torch.equal(loss(torch.cat([logits[:, :1], other], 1), mask, None, flow), found)
    exact = loss(torch.cat([logits[:, :1], flow], 1), mask, None, flow)
    assert exact == pytest.approx(float(cross_entropy(logits[:, :1], mask)))
    assert found > exact
