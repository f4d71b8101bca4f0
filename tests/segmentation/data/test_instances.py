from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import measure

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.instances import (
    BACKGROUND,
    BORDER,
    CELL,
    INSTANCE_NAMES,
    OBJECT_NAMES,
    REACH,
    instance_classes,
    instances_from_classes,
)
from segmentation.data.pairs import pairs_from_arrays
from tests.costs import blurs
from unet.errors import InputError

Array = NDArray[Any]


def touching_cells(seed: int, count: int, size: int, radius: float = np.inf) -> Array:
    """The cells of a Voronoi diagram, numbered from 1; background beyond the radius."""
    points = np.random.default_rng(seed).uniform(0, size, (count, 2))
    pixels = np.moveaxis(np.indices((size, size)), 0, -1)
    distance, cell = cKDTree(points).query(pixels)
    return np.asarray(np.where(distance < radius, cell + 1, 0))


def blocks(mask: Array, side: int) -> Array:
    """Every pixel becomes a square, and every 4-connected part a cell of its own."""
    parts: Array = measure.label(mask, connectivity=1)
    return parts.repeat(side, 0).repeat(side, 1)


def same_cells(a: Array, b: Array) -> bool:
    """Whether two numberings differ in the numbers only."""
    pairs = np.unique(np.array([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def touches(mask: Array) -> Array:
    """Pixels with another cell among their eight neighbours, by brute force."""
    found = np.zeros(mask.shape, bool)
    for r, c in np.ndindex(mask.shape):
        around = mask[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        found[r, c] = mask[r, c] != 0 and ((around != 0) & (around != mask[r, c])).any()
    return found


SMALL = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4)
)


# -- the classes


def test_two_cells_that_touch() -> None:
    mask = np.array(
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 7, 7, 7, 9, 9, 9, 0],
            [0, 7, 7, 7, 9, 9, 9, 0],
            [0, 7, 7, 7, 0, 9, 9, 0],
            [0, 7, 7, 7, 0, 0, 9, 0],
        ]
    )
    assert instance_classes(mask).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 2, 2, 2, 2, 1, 0],
        [0, 1, 2, 2, 2, 2, 1, 0],
        [0, 1, 2, 2, 0, 2, 1, 0],
        [0, 1, 2, 2, 0, 0, 1, 0],
    ]


def test_cells_that_meet_at_a_corner_or_not() -> None:
    corner = np.kron([[1, 0], [0, 2]], np.ones((2, 2), int))
    assert instance_classes(corner).tolist() == [
        [1, 1, 0, 0],
        [1, 2, 0, 0],
        [0, 0, 2, 1],
        [0, 0, 1, 1],
    ]
    assert instance_classes(np.array([[1, 0, 2]])).tolist() == [[1, 0, 1]]


@given(SMALL)
def test_every_cell_keeps_an_inside(mask: Array) -> None:
    classes = instance_classes(mask)
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes == BACKGROUND, mask == 0)
    np.testing.assert_array_equal(np.unique(mask[classes == CELL]), np.unique(mask[mask > 0]))


@given(SMALL)
def test_the_border_is_where_cells_touch(mask: Array) -> None:
    classes, border = instance_classes(mask), touches(mask)
    for number in np.unique(mask[mask > 0]):
        cell = mask == number
        rescued = cell & border & (classes == CELL)
        assert rescued.sum() == (not (cell & ~border).any())  # one pixel of what is border only


@given(SMALL)
def test_the_border_is_no_wider_than_its_reach(mask: Array) -> None:
    classes = instance_classes(mask)
    for number in np.unique(mask[mask > 0]):
        others = ndimage.binary_dilation(
            (mask > 0) & (mask != number), np.ones((2 * REACH + 1,) * 2)
        )
        slivers = (mask == number) & ~others & (classes == BORDER)
        assert not (slivers & ~ndimage.binary_dilation(others, np.ones((3, 3)))).any()


def test_the_border_is_narrower_in_small_cells() -> None:
    """Two of eight pixels each keep a quarter, and two of six, beside one of twenty."""
    wide = instance_classes(np.repeat([[1, 2]], 8, axis=1).repeat(8, 0))
    assert wide[4].tolist() == [1] * 5 + [2] * 6 + [1] * 5
    strip = np.repeat([1, 2, 3], [20, 6, 20])[None].repeat(8, 0)
    assert instance_classes(strip)[4].tolist() == [1] * 17 + [2] * 5 + [1] * 2 + [2] * 5 + [1] * 17


def test_the_border_cuts_no_cell_in_two() -> None:
    """A waist between two cells, of which a wide border would leave nothing."""
    mask = np.full((24, 40), 3)
    mask[:10, 14:26], mask[14:, 14:26] = 1, 2
    for classes in (instance_classes(mask), instance_classes(mask.T).T):
        assert ndimage.label((classes == CELL) & (mask == 3))[1] == 1
        assert (classes[11:13, 14:26] == CELL).all()


@given(SMALL)
def test_insides_of_two_cells_are_never_neighbours(mask: Array) -> None:
    cells = blocks(mask, 2)  # so that no cell is a single pixel
    inside = instance_classes(cells) == CELL
    for a, b, a_in, b_in in (
        (cells[1:], cells[:-1], inside[1:], inside[:-1]),
        (cells[:, 1:], cells[:, :-1], inside[:, 1:], inside[:, :-1]),
    ):
        assert (a == b)[a_in & b_in].all()


@given(SMALL, st.permutations([3, 77, 65535, 2**20]))
def test_numbers_and_their_type_do_not_matter(mask: Array, numbers: list[int]) -> None:
    classes = instance_classes(mask)
    np.testing.assert_array_equal(instance_classes(np.array([0, *numbers])[mask]), classes)
    np.testing.assert_array_equal(instance_classes(-np.array([0, *numbers])[mask]), classes)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 1], [9, 9, 9]], np.uint8)
    np.testing.assert_array_equal(instance_classes(colours[mask]), classes)


@given(SMALL)
def test_borders_are_symmetric(mask: Array) -> None:
    cells = blocks(mask, 4)
    classes = instance_classes(cells)
    for turned, wanted in (
        (cells[::-1], classes[::-1]),
        (cells[:, ::-1], classes[:, ::-1]),
        (cells.T, classes.T),
    ):
        np.testing.assert_array_equal(instance_classes(turned), wanted)


def test_ignored_pixels_are_no_cell() -> None:
    mask = np.array([[1, 1, 1, 2, 2, 2, 9, 9, 0]])
    assert instance_classes(mask, 9).tolist() == [[1, 2, 2, 2, 2, 1, IGNORE, IGNORE, 0]]
    grey, colour = np.stack([mask] * 3, -1), (9, 9, 9)
    for m, value in ((grey, 9), (grey, colour), (mask, colour)):
        np.testing.assert_array_equal(instance_classes(m, value), instance_classes(mask, 9))
    assert instances_from_classes(instance_classes(mask, 9)).tolist() == [
        [1, 1, 1, 2, 2, 2, 0, 0, 0]
    ]


# -- and back


@given(SMALL)
def test_block_cells_come_back_exactly(mask: Array) -> None:
    cells = blocks(mask, 12)
    assert same_cells(instances_from_classes(instance_classes(cells)), cells)


@pytest.mark.parametrize(("count", "radius"), [(60, np.inf), (60, 14), (200, 9), (400, np.inf)])
def test_touching_cells_come_back_up_to_their_borders(count: int, radius: float) -> None:
    for seed in range(5):
        cells = touching_cells(seed, count, 128, radius)
        classes = instance_classes(cells)
        found = instances_from_classes(classes)
        assert found.max() == len(np.unique(cells[cells > 0]))
        inside = classes == CELL
        assert same_cells(found[inside], cells[inside])
        np.testing.assert_array_equal(found > 0, cells > 0)
        number = np.zeros(found.max() + 1, int)
        number[found[inside]] = cells[inside]
        assert (number[found] == cells).mean() > 0.9


def test_a_predicted_border_grows_into_the_cells_beside_it_only() -> None:
    classes = np.array(
        [
            [1, 2, 2, 2, 2, 1, 0, 2],
            [1, 1, 2, 2, 1, 1, 0, 2],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ],
        np.uint8,
    )
    found = instances_from_classes(classes)
    assert found.tolist() == [
        [1, 1, 1, 2, 2, 2, 0, 0],
        [1, 1, 1, 2, 2, 2, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert not instances_from_classes(np.full((3, 3), BORDER, np.uint8)).any()
    assert (instances_from_classes(np.full((3, 3), CELL, np.uint8)) == 1).all()


def test_500_cells_cost_less_than_20_blurs() -> None:
    assert blurs(instance_classes, touching_cells(0, 500, 512).astype(np.uint16)) < 20


# -- in a data set


def test_a_data_set_of_instances() -> None:
    cells = np.stack([touching_cells(seed, 60, 64, 6) for seed in range(3)])
    cells[2, :, :9] = 999
    pairs = pairs_from_arrays(np.zeros((3, 64, 64), np.uint8), cells)
    found = SegmentationData(pairs[:2], pairs[2:])
    assert found.instances
    assert "the masks number objects" in found.describe()
    named = SegmentationData(pairs[:2], pairs[2:], names=["background", "nucleus"])
    assert "names of classes are left out, as the masks number objects" in named.describe()
    data = SegmentationData(pairs[:2], pairs[2:], instances=True, ignore_value=999)
    for i, mask in enumerate(cells):
        wanted = np.where(mask == 999, IGNORE, mask > 0)
        np.testing.assert_array_equal(data.load(i)[1], wanted)
    assert data.table.values == (BACKGROUND, CELL)
    assert data.table.names == OBJECT_NAMES
    assert data.table.ignore_value == IGNORE
    assert ClassTable.from_dict(json.loads(json.dumps(data.table.to_dict()))) == data.table
    lines = data.describe().splitlines()
    assert [line.split()[3] for line in lines[1:4]] == [*OBJECT_NAMES, "ignored"]
    kept = {"normalisation": data.normalisation, "ignore_value": 999}
    later = SegmentationData([], pairs, table=data.table, instances=True, **kept)
    np.testing.assert_array_equal(later.load(2)[1], data.load(2)[1])
    bordered = replace(data.table, values=(0, 1, 2), shares=(0.5, 0.3, 0.2), names=INSTANCE_NAMES)
    before = SegmentationData([], pairs, table=bordered, **kept)
    np.testing.assert_array_equal(before.load(2)[1], instance_classes(cells[2], 999))


def test_what_may_be_few_objects_is_told() -> None:
    cells = np.stack([touching_cells(seed, 14 + seed, 64, 6) for seed in range(3)])
    found = SegmentationData(pairs_from_arrays(np.zeros((3, 64, 64), np.uint8), cells), [])
    assert not found.instances
    assert "if the masks number objects, give --instances" in found.describe()


def test_a_class_may_be_absent_if_it_has_a_name() -> None:
    table = ClassTable.of([np.array([[0, 1]])], ignore_value=IGNORE, names=INSTANCE_NAMES)
    assert table.values == (0, 1, 2)
    assert table.shares == (0.5, 0.5, 0.0)
    assert table.lines()[0] == "value   0 -> background  50.00%"
    with pytest.raises(InputError, match="all mask pixels have the value 0, but two are needed"):
        ClassTable.of([np.zeros((2, 2), int)], names=INSTANCE_NAMES)
    with pytest.raises(InputError, match="3 shares, 2 names"):
        ClassTable.from_dict(table.to_dict() | {"names": ["a", "b"]})
    assert ClassTable.from_dict(table.to_dict() | {"names": []}).names == ()
