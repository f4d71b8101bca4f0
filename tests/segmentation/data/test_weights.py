"""Laws of the border weight map: the formula by brute force and by hand, symmetries, speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from segmentation.data.classes import IGNORE
from segmentation.data.phantom import phantom_stack
from segmentation.data.weights import border_weights, find_cells
from tests.costs import blurs
from unet.errors import InputError
from unet.files.images import read_mask


def brute_force(cells: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """w0 exp(-(d1 + d2)^2 / (2 sigma^2)) from all pairs of pixels; `cells` is numbered from 1."""
    h, w = cells.shape
    borders = []
    for number in range(1, cells.max() + 1):
        border = [
            (y, x)
            for y, x in np.argwhere(cells == number)
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            if 0 <= v < h and 0 <= u < w and cells[v, u] != number
        ]
        if border:
            borders.append(np.array(border))
    weights = np.zeros((h, w))
    for y, x in np.ndindex(h, w):
        distances = sorted(np.hypot(*(b - (y, x)).T).min() for b in borders)
        if len(distances) > 1:
            weights[y, x] = w0 * math.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return weights


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    smooth=st.sampled_from([0.0, 0.7, 1.5]),
    sigma=st.sampled_from([0.4, 1.0, 5.0]),
)
@settings(max_examples=60)
def test_equals_the_formula_by_brute_force(
    seed: int, shape: tuple[int, int], smooth: float, sigma: float
) -> None:
    noise = np.random.default_rng(seed).normal(size=shape)
    mask = ndimage.gaussian_filter(noise, smooth) > 0 if smooth else noise > 0
    expected = brute_force(ndimage.label(mask)[0], 10.0, sigma) + np.where(mask, 0.5, 2.0)
    weights = border_weights(mask, 10.0, sigma, (2.0, 0.5))
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)
    assert weights.dtype == np.float32


def test_cells_beyond_the_reach_of_each_other_change_nothing() -> None:
    mask = np.zeros((40, 200), bool)
    mask[10:20, 5:15] = mask[10:30, 60:90] = mask[15:18, 93:190] = True
    expected = 1 + brute_force(ndimage.label(mask)[0], 10.0, 2.0)
    np.testing.assert_allclose(border_weights(mask, sigma=2.0), expected, rtol=1e-6)


def test_hand_made_example() -> None:
    #             two columns of cell, three of background, two of cell; the image's edge is none
    mask = np.array([[1, 1, 0, 0, 0, 1, 1]] * 3)
    d1_plus_d2 = np.array([1 + 5, 0 + 4, 1 + 3, 2 + 2, 3 + 1, 4 + 0, 5 + 1])
    row = np.where(mask[0], 3.0, 0.5) + 10 * np.exp(-(d1_plus_d2**2) / 50)
    np.testing.assert_allclose(border_weights(mask, class_weights=(0.5, 3.0)), [row] * 3, rtol=1e-6)


def test_without_a_second_cell_only_the_class_counts() -> None:
    one = np.zeros((9, 9), bool)
    one[2:5, 3:8] = True
    for mask in (one, np.zeros((9, 9), bool), np.ones((9, 9), bool)):
        np.testing.assert_array_equal(
            border_weights(mask, class_weights=(1.0, 4.0)), np.where(mask, 4, 1)
        )


def test_diagonal_contact_does_not_join_cells() -> None:
    mask = np.kron(np.eye(2, dtype=bool), np.ones((4, 4), bool))
    assert border_weights(mask).max() > 10


def test_numbered_cells_may_touch_and_a_mask_is_cells_of_one_number() -> None:
    mask = np.array([[1, 1, 0, 1, 1, 1]] * 4, bool)
    numbered = ndimage.label(mask)[0]
    np.testing.assert_array_equal(border_weights(numbered), border_weights(mask))
    np.testing.assert_array_equal(border_weights(mask.astype(np.uint8) * 255), border_weights(mask))
    touching = np.array([[1, 1, 1, 7, 7, 7]] * 4)
    row = 1 + 10 * np.exp(-(np.array([5, 3, 1, 1, 3, 5]) ** 2) / 50)
    np.testing.assert_allclose(border_weights(touching), [row] * 4, rtol=1e-6)


@pytest.mark.parametrize("turn", range(4))
def test_turns_and_flips_with_the_mask(turn: int) -> None:
    mask = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(30, 41)), 2) > 0
    weights = border_weights(mask)
    np.testing.assert_allclose(border_weights(np.rot90(mask, turn)), np.rot90(weights, turn))
    np.testing.assert_allclose(border_weights(mask[:, ::-1]), weights[:, ::-1])


def test_hundreds_of_cells_cost_less_than_60_blurs() -> None:
    y, x = np.mgrid[:512, :512]
    mask = (y % 24 > 1) & (x % 24 > 1)
    assert blurs(border_weights, mask) < 60
    weights = border_weights(mask)
    assert ndimage.label(mask)[1] > 400
    tile = brute_force(ndimage.label(mask[:73, :73])[0], 10.0, 5.0)
    np.testing.assert_allclose(weights[:49, :49], 1 + tile[:49, :49], rtol=1e-6)


def test_membranes_of_real_slices_are_heavier_than_their_cells(isbi2012: Path) -> None:
    for i in range(0, 30, 6):
        cells = np.asarray(Image.open(isbi2012 / f"label/{i}.png")) > 0
        weights = border_weights(cells)
        assert weights[~cells].mean() > 2 * weights[cells].mean()


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (np.zeros((2, 3, 4), bool), {}, r"labels \(H, W\)"),
        (np.zeros((3, 4)), {}, "float64"),
        (np.zeros((3, 4), bool), {"sigma": 0.0}, "sigma > 0"),
        (np.zeros((3, 4), bool), {"w0": -1.0}, "w0 >= 0"),
        (np.zeros((3, 4), bool), {"w0": math.nan}, "nan"),
        (np.zeros((3, 4), bool), {"class_weights": (1.0,)}, "must be 2 numbers"),
    ],
)
def test_wrong_arguments_are_refused(labels: Any, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        border_weights(labels, **options)


# -- which class are cells, and whether membranes part them ---------------------------------------


def membranes(size: int = 128) -> list[NDArray[np.uint8]]:
    return list(phantom_stack(3, (size, size), seed=4)[1] // 255)


def swapped(masks: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The same with the two classes swapped."""
    return [np.where(mask == IGNORE, mask, 1 - mask).astype(np.uint8) for mask in masks]


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("zoom", ["half", "as drawn", "double"])
def test_membranes_are_found_at_any_resolution_and_whichever_class_they_are(
    size: int, zoom: str
) -> None:
    masks = membranes(size)
    if zoom == "half":
        masks = [mask[::2, ::2] for mask in masks]
    elif zoom == "double":
        masks = [mask.repeat(2, 0).repeat(2, 1) for mask in masks]
    assert find_cells(masks) == (1, True)
    assert find_cells(swapped(masks)) == (0, True)


def test_membranes_of_real_slices_are_found(isbi2012: Path) -> None:
    real = [read_mask(isbi2012 / f"label/{i}.png") // 255 for i in range(0, 30, 7)]
    assert find_cells(real) == (1, True)
    assert find_cells(swapped(real)) == (0, True)


def test_membranes_with_thick_places_are_found() -> None:
    """A tenth of their pixels is a thick patch, such as tissue that is no cell."""
    masks = membranes(256)
    for mask in masks:
        thick = int(0.1 * (mask == 0).sum())
        mask[: int(thick**0.5), : int(thick**0.5)] = 0
    assert find_cells(masks) == (1, True)


def vessels(seed: int, size: int = 256) -> NDArray[np.uint8]:
    """Trees of vessels three pixels wide, which grow in from the sides and branch: 1, else 0."""
    rng = np.random.default_rng(seed)
    found = np.zeros((size, size), np.uint8)
    for _ in range(4):
        todo = [(np.array([rng.uniform(0, size), 0.0]), rng.normal(0, 0.3), rng.integers(100, 250))]
        while todo:
            place, angle, steps = todo.pop()
            for left in range(steps, 0, -1):
                angle += rng.normal(0, 0.06)
                place = place + np.array([np.sin(angle), np.cos(angle)])
                if not ((place >= 0) & (place < size)).all():
                    break
                found[tuple(place.astype(int))] = 1
                if rng.random() < 0.01:
                    todo.append((place, angle + rng.choice([-0.7, 0.7]), left // 2))
        found = np.rot90(found)
    return ndimage.binary_dilation(found).astype(np.uint8)


def strokes(seed: int, size: int = 128) -> NDArray[np.uint8]:
    """Rings and strokes in rows, as letters are: 1, else 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :12]
    ring = abs(np.hypot(y - 8, x - 6) - 4) < 1
    letters = [ring, ring | (x == 2), abs(x - 6) < 1, (abs(x - 6) < 1) | (y == 3)]
    rows = [np.hstack([letters[i] for i in rng.integers(0, 4, size // 12)]) for _ in range(8)]
    return np.vstack(rows).astype(np.uint8)


def others(kind: str) -> NDArray[np.uint8]:
    y, x = np.mgrid[:128, :128]
    mask = {
        "blobs": (y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 100,
        "dense blobs": (y % 24 - 12) ** 2 + (x % 24 - 12) ** 2 < 100,
        "half planes": y + x > 120,
        "two halves": abs(x - 64) > 2,
        "wide gaps": (y % 64 < 48) & (x % 128 < 90),
        "nothing": np.zeros((128, 128), bool),
    }
    if kind in mask:
        return mask[kind].astype(np.uint8)
    return vessels(1) if kind == "vessels" else strokes(1)


KINDS = "blobs", "dense blobs", "half planes", "two halves", "wide gaps", "nothing"


@pytest.mark.parametrize("kind", [*KINDS, "vessels", "strokes"])
def test_other_masks_are_none_of_these(kind: str) -> None:
    masks = [others(kind)] * 2
    assert not find_cells(masks).parted
    assert not find_cells(swapped(masks)).parted


def test_vessels_are_none_whatever_way_they_grow() -> None:
    for seed in range(12):
        masks = [vessels(4 * seed + i) for i in range(4)]
        assert not find_cells(masks).parted, seed
        assert not find_cells(swapped(masks)).parted, seed


@pytest.mark.parametrize("kind", ["blobs", "dense blobs", "wide gaps"])
def test_cells_are_the_class_in_more_pieces_and_specks_do_not_count(kind: str) -> None:
    mask = others(kind)
    mask[(mask == 1) & (np.random.default_rng(0).random(mask.shape) < 0.002)] = 0
    assert find_cells([mask]).label == 1
    assert find_cells(swapped([mask])).label == 0


def test_ignored_pixels_part_nothing() -> None:
    masks = membranes(256)
    for mask in masks:
        mask[:, 80:160] = IGNORE
    assert find_cells(masks) == (1, True)
    halves = others("half planes")
    halves[:, ::9] = IGNORE
    halves[::9] = IGNORE
    assert not find_cells([halves]).parted
    assert not find_cells([np.full((8, 8), IGNORE, np.uint8)]).parted
