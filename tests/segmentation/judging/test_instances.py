"""Scores of objects, against their definitions and by laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from segmentation.data.instances import UNKNOWN, smallest_counted, without_small
from segmentation.judging.instances import IOUS, Overlaps
from tests.costs import blurs
from unet.errors import InputError

Array = NDArray[Any]


def grids(largest: int) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.int32, (6, 7), elements=st.integers(0, largest))


def scores(found: Array, true: Array) -> dict[str, float]:
    return Overlaps.of(found, true).scores()


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a == pytest.approx(b, nan_ok=True)


def numbers_of(mask: Array) -> list[int]:
    return [n for n in np.unique(mask).tolist() if n > 0]


def iou_table(found: Array, true: Array) -> Array:
    """IoU of each true object with each that was found, one pair after the other."""
    table = np.zeros((len(numbers_of(true)), len(numbers_of(found))))
    for i, t in enumerate(numbers_of(true)):
        for j, f in enumerate(numbers_of(found)):
            table[i, j] = ((true == t) & (found == f)).sum() / ((true == t) | (found == f)).sum()
    return table


def by_definition(found: Array, true: Array) -> dict[str, float]:
    """As in stardist.matching (an optimal assignment at each IoU), Kirillov et al. 2019, and Kumar
    et al. 2017.
    """
    table = iou_table(found, true)
    n, m = table.shape
    precision, matched = [], 0.0
    for t in IOUS:
        cost = -(table >= t).astype(float) - table / (2 * max(min(n, m), 1))
        i, j = linear_sum_assignment(cost)
        right = table[i, j] >= t
        tp = int(right.sum())
        precision.append(tp / (n + m - tp) if n + m else math.nan)
        if t == 0.5:
            first, matched = tp, float(table[i, j][right].sum())
    common = union = 0
    used = set()
    for row, t in zip(table, numbers_of(true), strict=True):
        a, b = true == t, np.zeros_like(true, bool)
        if row.any():
            best = numbers_of(found)[int(row.argmax())]
            b = found == best
            used.add(best)
        common, union = common + (a & b).sum(), union + (a | b).sum()
    union += sum((found == f).sum() for f in numbers_of(found) if f not in used)
    return {
        "ap": float(np.mean(precision)),
        "ap50": precision[0],
        "ap75": precision[5],
        "pq": 2 * matched / (n + m) if n + m else math.nan,
        "sq": matched / first if first else math.nan,
        "rq": 2 * first / (n + m) if n + m else math.nan,
        "objects": n,
        "found": m,
        "count_error": abs(n - m),
        "aji": common / union if union else math.nan,
    }


def tied(found: Array, true: Array) -> bool:
    """Whether the aggregated Jaccard index takes one or the other of two equal partners."""
    return any((np.diff(np.sort(row))[-1:] == 0).any() for row in iou_table(found, true))


@given(grids(4), grids(4))
def test_scores_are_those_of_the_definitions(found: Array, true: Array) -> None:
    wanted, ours = by_definition(found, true), scores(found, true)
    if tied(found, true):
        wanted["aji"] = ours["aji"]
    assert same(ours, wanted)


@given(grids(3), st.integers(0, 2**32 - 1))
def test_objects_that_are_halved_are_matched_as_well_as_can_be(true: Array, seed: int) -> None:
    """Here are the pairs of an IoU of exactly 0.5, of which not all can be matched."""
    found = true * 2 + np.random.default_rng(seed).integers(0, 2, true.shape) * (true > 0)
    for a, b in ((found, true), (true, found)):
        wanted, ours = by_definition(a, b), scores(a, b)
        assert (ours["ap50"], ours["rq"]) == pytest.approx(
            (wanted["ap50"], wanted["rq"]), nan_ok=True
        )


@given(grids(5))
def test_what_is_found_as_it_is_scores_one(true: Array) -> None:
    found = scores(true, true)
    for key in ("ap", "ap50", "ap75", "pq", "sq", "rq", "aji"):
        assert found[key] == 1 or (math.isnan(found[key]) and not true.any())
    assert found["count_error"] == 0


@given(grids(4), grids(4), st.permutations(range(1, 5)))
def test_numbers_say_nothing(found: Array, true: Array, order: list[int]) -> None:
    renumbered, wanted = np.array([0, *(1000 * n for n in order)]), scores(found, true)
    for ours in (scores(renumbered[found], true), scores(found, renumbered[true])):
        if tied(found, true):
            ours["aji"] = wanted["aji"]
        assert same(ours, wanted)


@given(grids(4), grids(4))
def test_what_is_found_and_what_is_true_change_places(found: Array, true: Array) -> None:
    """False positives become false negatives, which average precision and PQ weigh alike."""
    here, there = Overlaps.of(found, true), Overlaps.of(true, found)
    assert (here.true, here.found) == (there.found, there.true)
    assert sorted(here.matched) == sorted(there.matched)
    keys = ("ap", "ap50", "pq", "rq", "count_error")
    a, b = here.scores(), there.scores()
    assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys], nan_ok=True)


def test_an_object_in_two_pieces() -> None:
    """Of ten pixels one half of seven matches up to IoU 0.7, the other of three is spare."""
    true = np.ones((1, 10), int)
    found = np.array([[1] * 7 + [2] * 3])
    ours = scores(found, true)
    assert Overlaps.of(found, true).precision()["0.7"] == 0.5
    assert (ours["ap50"], ours["ap75"]) == (0.5, 0)
    assert ours["ap"] == pytest.approx(0.5 * 5 / 10)  # 0.5, 0.55, ..., 0.7
    assert (ours["sq"], ours["rq"]) == pytest.approx((0.7, 2 / 3))
    assert ours["pq"] == pytest.approx(0.7 * 2 / 3)
    assert ours["aji"] == pytest.approx(7 / 13)
    assert (ours["objects"], ours["found"], ours["count_error"]) == (1, 2, 1)


def test_two_objects_that_melted_into_one() -> None:
    ours = scores(np.ones((1, 10), int), np.array([[1] * 7 + [2] * 3]))
    assert (ours["ap50"], ours["count_error"]) == (0.5, 1)
    assert ours["aji"] == pytest.approx((7 + 3) / (10 + 10))


def test_images_without_objects() -> None:
    nothing, one = np.zeros((3, 3), int), np.eye(3, dtype=int)
    assert math.isnan(scores(nothing, nothing)["ap"])
    assert scores(one, nothing)["ap"] == scores(nothing, one)["ap"] == 0
    assert scores(one, nothing)["aji"] == scores(nothing, one)["aji"] == 0
    both = Overlaps.of(nothing, nothing) + Overlaps.of(one, one)
    assert (both.images, both.scores()["ap"]) == (2, 1)
    assert math.isnan(Overlaps().scores()["count_error"])


@given(grids(4), grids(4), grids(4), grids(4))
def test_images_together_are_one_image_but_for_the_counts(
    found: Array, true: Array, more: Array, other: Array
) -> None:
    added = (Overlaps.of(found, true) + Overlaps.of(more, other)).scores()
    joined = scores(
        np.concatenate([found, np.where(more, more + 10, 0)]),
        np.concatenate([true, np.where(other, other + 10, 0)]),
    )
    assert same(added | {"count_error": 0}, joined | {"count_error": 0})


@given(grids(4), grids(4), hnp.arrays(bool, (6, 7)))
def test_pixels_that_do_not_count_are_as_if_cut_away(
    found: Array, true: Array, unknown: Array
) -> None:
    kept = ~unknown
    ours = scores(found, np.where(unknown, UNKNOWN, true))
    assert same(ours, scores(found[kept][None], true[kept][None]))


def test_what_was_found_below_0_is_no_object() -> None:
    true = np.array([[0, 1, 1], [2, 2, 0]])
    found = np.where(true == 0, -1, true)
    assert scores(found, true) == scores(true, true)


def test_images_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"found \(2, 2\) and true \(2, 3\) differ"):
        Overlaps.of(np.zeros((2, 2), int), np.zeros((2, 3), int))


def test_a_thousand_objects_cost_less_than_60_blurs() -> None:
    true = np.arange(40 * 40).reshape(40, 40).repeat(32, 0).repeat(32, 1)
    found = np.roll(true, 5, axis=1)
    assert Overlaps.of(found, true).scores()["ap50"] > 0.9
    assert blurs(lambda: Overlaps.of(found, true).scores()) < 60


def test_the_smallest_object_that_counts() -> None:
    sizes = np.repeat(np.arange(1, 201), np.arange(1, 201))  # objects of 1, 2, ..., 200 pixels
    assert smallest_counted([sizes[None]]) == 2
    assert smallest_counted([np.zeros((2, 2), int)]) == smallest_counted([]) == 1
    assert smallest_counted([np.array([[1, 1, 1, UNKNOWN, 0]])]) == 3


def test_small_objects_are_left_out_and_the_others_numbered_anew() -> None:
    numbers = np.array([[1, 2, 2, 3, 0, 4, 4, 4]], np.int32)
    assert without_small(numbers, 2).tolist() == [[0, 1, 1, 0, 0, 2, 2, 2]]
    assert without_small(numbers, 0).tolist() == numbers.tolist()
    assert not without_small(numbers * 0, 1).any()
