"""Laws of augmented crops: image and mask move together, exactly where nothing is resampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from segmentation.data import augment
from segmentation.data.augment import Augmentation, mirror
from unet import InputError

OFF = Augmentation(flips=False)
EVERYTHING = Augmentation(
    rotation=180, scale=0.3, elastic=10, brightness=1, contrast=1, gamma=1, blur=2, noise=1
)


def augmented_crop(image, mask, *arguments):
    """The crop and its one map."""
    crop, (target,) = augment.augmented_crop(image, [mask], *arguments)
    return crop, target


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coordinates(h: int, w: int) -> torch.Tensor:
    """(2, h, w): row and column of each pixel, as an image of two channels."""
    return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float()


@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 12))
def test_without_augmentation_a_crop_is_a_slice(seed, h, w):
    image, mask = coordinates(12, 12), torch.arange(144).reshape(12, 12)
    crop, target = augmented_crop(image, mask, rng(seed), OFF, (h, w))
    top, left = crop[:, 0, 0].int().tolist()
    assert torch.equal(crop, image[:, top : top + h, left : left + w])
    assert torch.equal(target, mask[top : top + h, left : left + w])


def test_flips_give_the_eight_symmetries_and_no_other():
    image = torch.arange(9.0).reshape(1, 3, 3)
    seen = {
        str(augmented_crop(image, image[0].int(), rng(i), Augmentation(), (3, 3))[0][0].tolist())
        for i in range(200)
    }
    turned = [torch.rot90(image[0], k) for k in range(4)]
    symmetries = {str(t.tolist()) for x in turned for t in (x, x.T)}
    assert seen == symmetries


@given(st.integers(0, 99))
def test_image_and_mask_move_together(seed):
    h, w = 64, 48
    image = coordinates(h, w)
    mask = torch.arange(h * w).reshape(h, w)
    geometry = Augmentation(rotation=180, scale=0.3, elastic=4)
    crop, target = augmented_crop(image, mask, rng(seed), geometry, (40, 40), (20, 20))
    inner = crop[:, 10:30, 10:30]
    found = torch.stack([target // w, target % w]).float()
    # Inside the image the two coordinates that were sampled round to the pixel of the mask; near
    # the border the mirrored coordinates cannot be told from the image alone.
    inside = (inner > 1).all(0) & (inner[0] < h - 2) & (inner[1] < w - 2)
    assert (inner - found).abs().amax(0)[inside].max() <= 0.5 + 1e-3


@given(st.integers(0, 99))
def test_rotation_and_scale_are_a_similarity_about_the_centre(seed):
    image = coordinates(200, 200)
    geometry = Augmentation(rotation=30, scale=0.25)
    crop, _ = augmented_crop(image, image[0].int(), rng(seed), geometry, (50, 50))
    down, right = crop[:, 30, 20] - crop[:, 20, 20], crop[:, 20, 30] - crop[:, 20, 20]
    assert float(down.norm()) == pytest.approx(float(right.norm()), rel=1e-3)
    assert float(down @ right) == pytest.approx(0, abs=0.05)
    assert 10 / 1.26 < down.norm() < 10 * 1.26
    angle = math.degrees(math.asin(float(down.abs().min() / down.norm())))
    assert angle <= 30.1


def test_elastic_displacements_have_the_given_deviation_on_a_coarse_grid():
    image = coordinates(301, 301)
    corners = []
    for seed in range(300):
        crop, _ = augmented_crop(
            image, image[0].int(), rng(seed), Augmentation(flips=False, elastic=5), (101, 101)
        )
        plain, _ = augmented_crop(image, image[0].int(), rng(seed), OFF, (101, 101))
        moved = crop - plain
        corners.append(moved[:, 50, 50])
        # Bicubic between points 50 pixels apart: neighbours move almost alike, where no mirrored
        # border is near.
        inside = ((plain > 30) & (plain < 270)).all(0)[1:]
        assert (moved[:, 1:] - moved[:, :-1]).abs().amax(0)[inside].max() < 1.0
    assert torch.stack(corners).std() == pytest.approx(5, rel=0.1)


def test_beyond_the_border_the_image_is_mirrored():
    image = torch.arange(4.0).expand(1, 4, 4)
    crop, _ = augmented_crop(image, image[0].int(), rng(), OFF, (4, 10))
    assert crop[0, 0].tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]
    assert mirror(torch.arange(-7, 8), 1).tolist() == [0] * 15


@pytest.mark.parametrize("seed", range(4))
def test_a_varied_crop_is_interpolated_as_by_scipy(seed):
    image = torch.rand(1, 60, 40, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(2400).reshape(60, 40)
    geometry = Augmentation(rotation=180, scale=0.3, elastic=6)
    crop, target = augmented_crop(image, mask, rng(seed), geometry, (90, 50))
    places = np.stack(augment._grid(rng(seed), geometry, (90, 50), (90, 50), (-15, -5)))
    found = ndimage.map_coordinates(image[0].numpy(), places, order=1, mode="mirror")
    np.testing.assert_allclose(crop[0].numpy(), found, atol=1e-4)
    nearest = ndimage.map_coordinates(mask.numpy(), places.round(), order=0, mode="mirror")
    np.testing.assert_array_equal(target.numpy(), nearest)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_displacements_are_bicubic_as_those_of_torch(n):
    coarse = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(n))
    expected = F.interpolate(coarse, (n, 17), mode="bicubic", align_corners=True)[0, 0]
    found = augment._bicubic(n) @ coarse[0, 0] @ augment._bicubic(17).T
    torch.testing.assert_close(found, expected)


def test_the_mask_of_a_valid_crop_is_its_centre():
    image = coordinates(30, 30)
    crop, target = augmented_crop(image, (image[0] * 30).int(), rng(), OFF, (28, 28), (8, 8))
    assert target.shape == (8, 8)
    assert torch.equal((crop[0, 10:18, 10:18] * 30).int(), target)


def test_the_same_generator_gives_the_same_sample_and_another_one_does_not():
    image, mask = torch.rand(1, 40, 40), torch.randint(0, 2, (40, 40))
    first, again, other = (
        augmented_crop(image, mask, rng(seed), EVERYTHING, (32, 32)) for seed in (1, 1, 2)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].isfinite().all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "gamma", "blur", "noise"])
def test_intensity_changes_move_no_pixel(name):
    image, mask = torch.rand(2, 16, 16), torch.randint(0, 2, (16, 16))
    plain, target = augmented_crop(image, mask, rng(3), OFF, (12, 12))
    varied = Augmentation(flips=False, **{name: 1.5})
    crop, same = augmented_crop(image, mask, rng(3), varied, (12, 12))
    assert torch.equal(target, same)
    assert not torch.equal(crop, plain)
    if name in ("brightness", "contrast", "gamma"):  # monotone
        assert torch.equal(crop.flatten(1).argsort(), plain.flatten(1).argsort())


def test_negative_strengths_are_refused():
    with pytest.raises(InputError, match="elastic=-1 must be 0"):
        Augmentation(elastic=-1)
