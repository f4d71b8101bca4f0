"""Pictures: colours that anybody can tell apart, overlays that stand out, instances."""

from __future__ import annotations

import numpy as np
import pytest
from einops import repeat
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab

from segmentation.data.classes import ClassTable
from segmentation.pictures import (
    COLOURS,
    GREY,
    TINT,
    class_colours,
    class_legend,
    error_legend,
    errors,
    instance_overlay,
    neighbour_colours,
    object_colours,
    overlay,
    overlay_legend,
)
from unet.files.mask_values import MAX_CLASSES

# What a reader without one kind of cones sees, on linear RGB: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(rgb, matrix):
    """sRGB colours (N, 3) of 0 to 255 as they are seen, in CIELAB."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    c = (linear @ np.transpose(matrix)).clip(0, 1)
    return rgb2lab(np.where(c <= 0.0031308, 12.92 * c, 1.055 * c ** (1 / 2.4) - 0.055))


def closest(colours):
    """The least difference of two of the colours (N, 3) in CIELAB."""
    differences = deltaE_ciede2000(colours[:, None], colours[None])
    return differences[~np.eye(len(colours), dtype=bool)].min()


def table_of(count, **more):
    shares = (0.5, *[0.5 / (count - 1)] * (count - 1))
    return ClassTable(values=tuple(range(count)), shares=shares, **more)


def test_colours_differ_from_each_other_and_from_black_and_grey():
    classes = np.arange(MAX_CLASSES)[None]
    colours = rgb2lab(class_colours(classes, MAX_CLASSES)[0])
    assert colours[0].tolist() == [0, 0, 0]  # class 0 is black
    assert closest(colours[:21]) > 18
    assert closest(colours) > 16
    grey = rgb2lab(np.full((1, 3), GREY, np.uint8))
    assert deltaE_ciede2000(colours, grey).min() > 20


@pytest.mark.parametrize("kind", BLINDNESS)
def test_eight_colours_differ_to_any_eye(kind):
    assert closest(seen(COLOURS[:8], BLINDNESS[kind])) > 17


@pytest.mark.parametrize("count", [2, 3, 20, MAX_CLASSES])
def test_legends_say_what_is_drawn(count):
    table = table_of(count, ignore_value=255)
    classes = np.repeat(np.arange(count, dtype=np.uint8), 9)[None].repeat(5, 0)
    masks = class_colours(classes, count)[0, 4::9]
    legend = class_legend(table)
    assert [name for name, _ in legend] == [*map(str, range(count)), "ignored"]
    assert np.array_equal([colour for _, colour in legend][:-1], masks)
    black = np.zeros((*classes.shape, 3), np.uint8)
    drawn = overlay(black, classes, table)[2, 4::9]
    shown = {name: (TINT * np.array(colour)).astype(int) for name, colour in overlay_legend(table)}
    for k in range(count):
        assert np.array_equal(drawn[k], shown.get(str(k), (0, 0, 0))), k
    assert len(shown) == count - 1
    found = errors(black[:1, :2], np.array([[1, 0]]), np.array([[0, 1]]), count)[0].tolist()
    legend_of_errors = [colour for _, colour in error_legend(table)]
    assert [tuple(c) for c in found] == legend_of_errors * (1 if count == 2 else 2)


def test_names_are_in_legends():
    table = table_of(3, names=("background", "cell", "border"))
    assert [name for name, _ in class_legend(table)] == ["background", "cell", "border"]
    assert [name for name, _ in overlay_legend(table)] == ["cell", "border"]


def test_of_two_classes_the_rarer_in_training_is_marked_in_every_image():
    membranes = ClassTable(values=(0, 255), shares=(0.2, 0.8))
    for share in (0.1, 0.9):
        classes = (np.random.default_rng(0).random((40, 40)) > share).astype(np.uint8)
        image = np.full((40, 40, 3), 100, np.uint8)
        marked = (overlay(image, classes, membranes) == COLOURS[0]).all(2)
        assert marked.any()
        assert (classes[marked] == 0).all()
    assert [name for name, _ in overlay_legend(membranes)] == ["0"]


@pytest.mark.parametrize("count", [2, MAX_CLASSES])
def test_an_outline_stands_out_from_any_image(count):
    """Of flat tiles of many colours, those of stained tissue among them, and each class on them."""
    rgb = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), axis=-1).reshape(-1, 3)
    tiles = repeat(rgb.astype(np.uint8), "n c -> h (n w) c", h=8, w=8)
    square = np.pad(np.ones((4, 4), np.uint8), 2)
    for k in range(1, count):
        drawn = overlay(tiles, np.tile(k * square, len(rgb)), table_of(count))
        assert np.array_equal(drawn[:1], tiles[:1])  # beside them nothing is touched
        for outside, inside in ((1, 2), (6, 5)):
            line = [rgb2lab(drawn[4, x::8]) for x in (outside, inside)]
            differences = deltaE_ciede2000(np.array(line), rgb2lab(rgb / 255)[None])
            assert differences.max(0).min() > 20


@given(
    arrays(np.uint8, (12, 13), elements=st.integers(0, 2)),
    st.integers(3, 9),
)
def test_an_overlay_changes_the_marked_and_their_neighbours_alone(classes, count):
    image = np.random.default_rng(0).integers(0, 256, (12, 13, 3), np.uint8)
    before = image.copy()
    drawn = overlay(image, classes, table_of(count))
    assert (drawn.shape, drawn.dtype) == (image.shape, image.dtype)
    assert np.array_equal(image, before)
    far = ~ndimage.binary_dilation(classes > 0, np.ones((3, 3)))
    assert np.array_equal(drawn[far], image[far])


def instances(seed, count=60, size=120):
    """Discs that touch or overlap, numbered from 1 without gaps."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:size, :size]
    numbers = np.zeros((size, size), np.int32)
    for _ in range(count):
        cy, cx, r = *rng.uniform(0, size, 2), rng.uniform(2, 14)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r**2
        numbers[disc & (numbers == 0)] = numbers.max() + 1
    return numbers


@given(
    st.integers(0, 10**6).map(instances)
    | arrays(np.int32, (9, 9), elements=st.integers(0, 80)).map(
        lambda a: np.unique(np.append(a, 0), return_inverse=True)[1][:-1].reshape(a.shape)
    )
)
def test_neighbouring_instances_differ_in_colour(numbers):
    colours = neighbour_colours(numbers)
    assert len(colours) == numbers.max(initial=0)
    by_pixel = np.append(-1, colours)[numbers]
    for a, b in (
        (np.s_[1:], np.s_[:-1]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:, 1:], np.s_[:-1, :-1]),
        (np.s_[1:, :-1], np.s_[:-1, 1:]),
    ):
        meet = (numbers[a] != numbers[b]) & (numbers[a] > 0) & (numbers[b] > 0)
        assert (by_pixel[a] != by_pixel[b])[meet].all()


def test_instances_with_a_membrane_between_them_differ_in_colour():
    numbers = np.zeros((20, 200), np.int32)
    for i in range(20):
        numbers[:, 10 * i : 10 * i + 5] = i + 1  # gaps of five pixels
    colours = neighbour_colours(numbers)
    assert (colours[1:] != colours[:-1]).all()


def test_an_instance_has_its_number_where_there_is_room():
    numbers = np.zeros((60, 120), np.int32)
    numbers[5:55, 5:55], numbers[10:15, 70:75], numbers[30:60, 90:120] = 1, 2, 3
    image = np.full((60, 120, 3), 90, np.uint8)
    drawn = instance_overlay(image, numbers)
    assert drawn.shape == image.shape
    white = (drawn == 255).all(2) & (numbers > 0)
    assert [bool(white[numbers == i].any()) for i in (1, 2, 3)] == [True, False, True]
    assert np.array_equal(drawn[:4], image[:4])
    nothing = np.zeros((60, 120), np.int32)
    assert np.array_equal(instance_overlay(image, nothing), image)


def test_objects_differ_in_colour_from_their_neighbours_whatever_their_numbers() -> None:
    numbers = np.array([[0, 7, 7, 900], [0, 7, 7, 900], [-1, 31, 31, 900]], np.int32)
    found = object_colours(numbers)
    colours = {n: {tuple(c) for c in found[numbers == n].tolist()} for n in (-1, 0, 7, 31, 900)}
    assert all(len(c) == 1 for c in colours.values())
    assert len(set.union(*colours.values())) == 5
    assert (colours[0], colours[-1]) == ({(0, 0, 0)}, {(128, 128, 128)})
    assert (object_colours(np.zeros((2, 3), np.int32)) == 0).all()
