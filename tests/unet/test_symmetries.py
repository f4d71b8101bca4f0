"""Images that look alike either way up, streets, digits, letters, and too little to tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segmentation.data.phantom import phantom_stack
from unet.files.images import read_image
from unet.symmetries import Symmetries, find_symmetries

Images = Sequence[NDArray[Any]]  # (C, H, W) each


def found(images: Images, crop: int, seed: int = 0) -> Symmetries:
    return find_symmetries(images.__getitem__, range(len(images)), (crop, crop), seed=seed)


def membranes(count: int, side: int = 128) -> Images:
    return [image[None] for image in phantom_stack(count, (side, side))[0]]


def noise(count: int, side: int = 64) -> Images:
    return list(np.random.default_rng(0).integers(0, 256, (count, 1, side, side), np.uint8))


def streets(count: int, side: int = 96) -> Images:
    """A sky that brightens downwards, houses at the horizon, and the ground."""
    rng, images = np.random.default_rng(0), []
    for _ in range(count):
        horizon = int(rng.uniform(0.35, 0.65) * side)
        row = np.arange(side)[:, None]
        image = np.where(row < horizon, 150 + 0.4 * row, 80.0) + rng.normal(0, 10, (side, side))
        for _ in range(6):
            width, high = rng.integers(6, 20), rng.integers(5, 25)
            left = rng.integers(side - width + 1)
            image[horizon - high : horizon + 4, left : left + width] = rng.uniform(40, 200)
        images.append(image[None])
    return images


def digits(count: int) -> Images:
    """One digit in each image, about its middle."""
    rng, font, images = np.random.default_rng(0), ImageFont.load_default(24), []
    for _ in range(count):
        image = Image.new("L", (32, 32))
        at = (16 + int(rng.integers(-2, 3)), 16 + int(rng.integers(-2, 3)))
        digit = str(rng.choice([2, 3, 4, 5, 6, 7, 9]))
        ImageDraw.Draw(image).text(at, digit, fill=255, font=font, anchor="mm")
        images.append(np.array(image)[None])
    return images


def letters(count: int, side: int = 128) -> Images:
    """Letters and digits all over."""
    rng, font, images = np.random.default_rng(0), ImageFont.load_default(16), []
    for _ in range(count):
        image = Image.new("L", (side, side), 240)
        for letter in rng.choice(list("0123456789ABCDEFGHRSabdefghjkpqrty"), 16 * side // 128 * 4):
            at = tuple(rng.integers(0, side - 16, 2).tolist())
            ImageDraw.Draw(image).text(at, str(letter), fill=int(rng.integers(120)), font=font)
        images.append(np.array(image)[None])
    return images


@pytest.mark.parametrize("images", [membranes(24), noise(24)], ids=["membranes", "noise"])
def test_what_looks_alike_either_way_up_has_all_symmetries(images: Images) -> None:
    flips, why = found(images, 64)
    assert flips is True
    assert "up and down cannot be told apart" in why
    assert "of 240 crops of 24 images" in why


def test_of_streets_up_and_down_are_told_but_not_left_and_right() -> None:
    flips, why = found(streets(32), 96)
    assert flips == "mirror", why
    assert "up and down can be told apart" in why


def test_digits_and_letters_have_no_symmetry() -> None:
    assert found(digits(128), 32).flips is False
    assert found(letters(24), 128).flips is False


@pytest.mark.parametrize("count", [1, 7, 8, 20])
@pytest.mark.parametrize("side", [1, 5, 9, 50])
def test_few_and_tiny_images_tell_nothing(count: int, side: int) -> None:
    flips, why = found(noise(count, side), 64)
    assert flips is True, why
    assert (" to tell" in why) == (count < 8 or side < 8)


def test_slices_of_a_stack_are_not_recognised_by_their_tissue() -> None:
    """Each is the one before with a little of another."""
    first, last = np.stack(membranes(2)).astype(np.float64)
    stack = [first + (last - first) * t for t in np.linspace(0, 1, 24)]
    assert found(stack, 128) == (True, "slices of one stack are too alike to tell")


def test_constant_images_have_all_symmetries() -> None:
    for count in (1, 10):
        assert found([np.zeros((3, 40, 30))] * count, 256).flips is True


def test_the_answer_is_the_same_each_time_and_no_other_randomness_moves() -> None:
    images = digits(64)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert found(images, 32) == found(images, 32)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_micrographs(isbi2012: Path) -> None:
    slices = [read_image(isbi2012 / f"image/{i}.png").transpose(2, 0, 1) for i in range(24)]
    for crop in (64, 256, 512):
        assert found(slices, crop).flips is True


def test_handwriting(mnist: Path) -> None:
    with np.load(mnist / "mnist_train.npz") as archive:
        images = archive["images"].reshape(-1, 1, 28, 28)
    assert found(images, 28).flips is False
    assert found(images[:48], 28).flips is False
