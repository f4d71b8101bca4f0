"""Laws of the scores: brute force, other libraries, symmetries, and the challenge's own data."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.measure import euler_number
from skimage.metrics import adapted_rand_error, variation_of_information

from segmentation.judging.isbi import (
    THRESHOLDS,
    IsbiMetrics,
    components,
    info_score,
    overlap,
    rand_pairs,
    rand_score,
    splits_and_mergers,
    thin_borders,
    warp,
)
from segmentation.judging.metrics import ConfusionMatrix
from tests.costs import blurs
from unet.errors import InputError

SEEDS = range(8)


def random_labels(seed: int, size: int = 7, segments: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Two label images with zeros in both."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, segments, (size, size)), rng.integers(0, segments + 1, (size, size))


def blobs(seed: int, size: int = 48, sigma: float = 2.0) -> np.ndarray:
    """A smooth random image, uniform in 0 ... 1."""
    noise = np.random.default_rng(seed).normal(size=(size, size))
    smooth = ndimage.gaussian_filter(noise, sigma)
    return smooth.ravel().argsort().argsort().reshape(size, size) / (size * size - 1)


def two_cells(gap: int = 1, size: int = 15) -> np.ndarray:
    """Two rectangles with a vertical membrane of `gap` pixels between and a frame around them."""
    cells = np.zeros((size, size), bool)
    cells[1:-1, 1:-1] = True
    start = (size - gap) // 2
    cells[:, start : start + gap] = False
    return cells


# ----------------------------------------------------------------------------------------------
# Confusion matrix


def test_confusion_matrix_equals_counting_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(4)
    counts = Counter()
    for _ in range(3):
        target, prediction = rng.integers(0, 4, (2, 5, 6))
        target[0, :2] = 9
        matrix.add(prediction, target, ignore=9)
        counts.update(zip(target.flat, prediction.flat, strict=True))
    for i, j in itertools.product(range(4), repeat=2):
        assert matrix.counts[i, j] == counts[i, j]
    assert matrix.counts.sum() == 3 * (30 - 2)


def test_dice_and_iou_equal_their_set_definitions() -> None:
    target, prediction = np.random.default_rng(1).integers(0, 3, (2, 20, 20))
    matrix = ConfusionMatrix(3)
    matrix.add(prediction, target)
    for c in range(3):
        t, p = target == c, prediction == c
        assert matrix.dice[c] == pytest.approx(2 * (t & p).sum() / (t.sum() + p.sum()), rel=1e-14)
        assert matrix.iou[c] == pytest.approx((t & p).sum() / (t | p).sum(), rel=1e-14)
    assert matrix.accuracy == pytest.approx((target == prediction).mean(), rel=1e-14)
    assert np.allclose(matrix.dice, 2 * matrix.iou / (1 + matrix.iou), rtol=1e-14)


def test_a_class_that_the_truth_lacks_is_left_out_of_the_mean() -> None:
    """Whether it is predicted or not: that costs the classes whose pixels were taken for it."""
    matrix = ConfusionMatrix(4)
    matrix.add([[0, 1], [1, 3]], [[0, 1], [0, 1]])
    assert matrix.occurs.tolist() == [True, True, False, False]
    assert math.isnan(matrix.dice[2])
    assert math.isnan(matrix.iou[2])
    assert matrix.dice[3] == 0  # predicted, though it is nowhere
    assert matrix.mean_dice == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert matrix.mean_iou == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_empty_confusion_matrix_is_nan_without_a_warning() -> None:
    matrix = ConfusionMatrix(2)
    matrix.add(np.zeros((2, 2), int), np.full((2, 2), 255), ignore=255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(math.isnan, (matrix.mean_dice, matrix.mean_iou, matrix.accuracy)))


def test_swapping_prediction_and_target_transposes_the_matrix() -> None:
    a, b = np.random.default_rng(2).integers(0, 3, (2, 9, 9))
    forward, backward = ConfusionMatrix(3), ConfusionMatrix(3)
    forward.add(a, b)
    backward.add(b, a)
    assert (forward.counts == backward.counts.T).all()
    assert (forward.dice == backward.dice).all()


def test_merged_confusion_matrices_are_one() -> None:
    images = np.random.default_rng(3).integers(0, 5, (6, 2, 8, 8), dtype=np.uint8)
    one, parts = ConfusionMatrix(5), [ConfusionMatrix(5), ConfusionMatrix(5)]
    for i, (prediction, target) in enumerate(images):
        one.add(prediction, target)
        parts[i % 2].add(prediction, target)
    parts[0].merge(parts[1])
    assert (parts[0].counts == one.counts).all()
    assert parts[0].mean_dice == one.mean_dice


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "float64"),
        (np.zeros((2, 2), int), np.full((2, 2), 255), "255"),
        (np.zeros((2, 2), int), np.full((2, 2), 3), "3"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "-1"),
    ],
)
def test_confusion_matrix_refuses_what_are_not_classes(
    prediction: np.ndarray, target: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ConfusionMatrix(3).add(prediction, target)


def test_a_confusion_matrix_has_a_class_at_least() -> None:
    ConfusionMatrix(1).add(np.zeros((2, 2), int), np.zeros((2, 2), int))
    with pytest.raises(InputError, match="not 0"):
        ConfusionMatrix(0)


def test_confusion_matrices_of_different_classes_do_not_merge() -> None:
    with pytest.raises(InputError, match="2 and 3"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(InputError, match="at least 1"):
        ConfusionMatrix(0)


# ----------------------------------------------------------------------------------------------
# V_Rand and V_Info of two label images


def singletons(prediction: np.ndarray) -> np.ndarray:
    """The prediction with every 0 replaced by a label of its own."""
    own = np.arange(prediction.size).reshape(prediction.shape) + prediction.max() + 1
    return np.where(prediction > 0, prediction, own)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_rand_equals_brute_force_over_pairs_of_pixels(seed: int) -> None:
    truth, prediction = random_labels(seed)
    pixels = list(zip(truth[truth > 0], singletons(prediction)[truth > 0], strict=True))
    both = in_truth = in_prediction = 0
    for (t1, p1), (t2, p2) in itertools.product(pixels, repeat=2):
        both += t1 == t2 and p1 == p2
        in_truth += t1 == t2
        in_prediction += p1 == p2
    sizes = overlap(truth, prediction)
    assert rand_pairs(sizes) == (both, in_truth, in_prediction)
    precision, recall = both / in_prediction, both / in_truth
    f = 2 * precision * recall / (precision + recall)
    assert rand_score(sizes) == pytest.approx((f, precision, recall), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_info_equals_brute_force_entropies(seed: int) -> None:
    truth, prediction = random_labels(seed)
    t, p = truth[truth > 0].tolist(), singletons(prediction)[truth > 0].tolist()

    def entropy(labels: list) -> float:
        return -sum(c / len(labels) * math.log(c / len(labels)) for c in Counter(labels).values())

    h_truth, h_prediction = entropy(t), entropy(p)
    information = h_truth + h_prediction - entropy(list(zip(t, p, strict=True)))
    f = 2 * information / (h_truth + h_prediction)
    expected = (f, information / h_truth, information / h_prediction)
    assert info_score(overlap(truth, prediction)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_equal_scikit_image_where_nothing_is_predicted_as_membrane(seed: int) -> None:
    truth, prediction = random_labels(seed, size=20)
    prediction += 1
    sizes = overlap(truth, prediction)
    n = int((truth > 0).sum())
    # scikit-image leaves out the pairs of a pixel with itself
    both, in_truth, in_prediction = (pairs - n for pairs in rand_pairs(sizes))
    error = adapted_rand_error(truth, prediction, ignore_labels=(0,))[0]
    assert error == pytest.approx(1 - 2 * both / (in_truth + in_prediction), abs=1e-12)

    bits = variation_of_information(truth, prediction, ignore_labels=(0,))
    share = np.unique(truth[truth > 0], return_counts=True)[1] / n
    h_truth = -(share * np.log(share)).sum()
    f, info_precision, info_recall = info_score(sizes)
    information = info_precision * h_truth
    h_prediction = information / info_recall
    variation = h_truth + h_prediction - 2 * information
    assert variation == pytest.approx(sum(bits) * math.log(2), abs=1e-12)
    assert f == pytest.approx(2 * information / (h_truth + h_prediction), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_relabelling_changes_nothing(seed: int) -> None:
    truth, prediction = random_labels(seed)
    rng = np.random.default_rng(seed)
    relabel = np.concatenate([[0], 1 + rng.permutation(50)])
    renamed = overlap(relabel[truth], relabel[prediction])
    assert rand_pairs(renamed) == rand_pairs(overlap(truth, prediction))
    expected = info_score(overlap(truth, prediction))
    assert info_score(renamed) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("score", [rand_score, info_score])
def test_swapping_the_arguments_swaps_precision_and_recall(score, seed: int) -> None:
    a, b = (labels + 1 for labels in random_labels(seed))
    f, precision, recall = score(overlap(a, b))
    assert score(overlap(b, a)) == pytest.approx((f, recall, precision), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_perfect_prediction_scores_one(seed: int) -> None:
    truth, _ = random_labels(seed)
    assert rand_score(overlap(truth, truth)) == (1, 1, 1)
    assert info_score(overlap(truth, truth)) == pytest.approx((1, 1, 1), abs=1e-12)
    everywhere = np.ones_like(truth)
    assert rand_score(overlap(everywhere, everywhere)) == (1, 1, 1)
    assert info_score(overlap(everywhere, everywhere)) == (1, 1, 1)


def test_one_segment_and_only_lines_have_their_closed_forms() -> None:
    truth, _ = random_labels(0)
    n = (truth > 0).sum()
    a2 = ((np.bincount(truth.flat)[1:] / n) ** 2).sum()
    merged = overlap(truth, np.ones_like(truth))
    assert rand_score(merged) == pytest.approx((2 * a2 / (a2 + 1), a2, 1), abs=1e-12)
    assert info_score(merged).f == pytest.approx(0, abs=1e-12)
    split = overlap(truth, np.zeros_like(truth))
    assert rand_score(split) == pytest.approx((2 / (1 + a2 * n), 1, 1 / (a2 * n)), abs=1e-12)
    assert info_score(split).precision == pytest.approx(1, abs=1e-12)


def test_mergers_cost_precision_and_splits_cost_recall() -> None:
    whole = np.ones((8, 8), int)
    halves = np.repeat([1, 2], 4) * whole
    quarters = halves + 2 * halves.T
    for score in (rand_score, info_score):
        merger, split = score(overlap(quarters, halves)), score(overlap(halves, quarters))
        assert (merger.precision, merger.recall) == pytest.approx((0.5, 1))
        assert (split.precision, split.recall) == pytest.approx((1, 0.5))


def test_without_true_cells_the_scores_are_undefined() -> None:
    sizes = overlap(np.zeros((3, 3), int), np.ones((3, 3), int))
    assert all(map(math.isnan, rand_score(sizes)))
    assert all(map(math.isnan, info_score(sizes)))


# ----------------------------------------------------------------------------------------------
# Border thinning


@pytest.mark.parametrize("gap", [1, 3, 7])
def test_a_wide_membrane_is_thinned_to_its_middle_line(gap: int) -> None:
    cells = two_cells(gap)
    thin = thin_borders(cells)
    middle = cells.shape[1] // 2
    assert (thin[:, middle] == 0).all()
    assert (np.delete(thin, middle, axis=1) > 0).all()
    assert thin[0, 0] != thin[0, -1]


@pytest.mark.parametrize("seed", SEEDS)
def test_thinning_keeps_the_components_and_separates_them(seed: int) -> None:
    mask = blobs(seed) > 0.6
    seeds, thin = components(mask), thin_borders(mask)
    assert (thin[mask] == seeds[mask]).all()
    for a, b in ((thin[1:], thin[:-1]), (thin[:, 1:], thin[:, :-1])):
        assert ((a == b) | (a == 0) | (b == 0)).all()
    assert (thin == 0).mean() < (~mask).mean()


def test_thinning_without_cells_or_membranes() -> None:
    assert (thin_borders(np.zeros((4, 4), bool)) == 0).all()
    assert (thin_borders(np.ones((4, 4), bool)) == 1).all()


# ----------------------------------------------------------------------------------------------
# Warping


def flip_keeps_topology(window: np.ndarray) -> bool:
    """By counting: 4-connected pieces of cell and 8-connected pieces of membrane around a pixel."""
    ring, cross = np.ones((3, 3), bool), ndimage.generate_binary_structure(2, 1)
    ring[1, 1] = cross[1, 1] = False
    cells = ndimage.label(window & ring)[0]
    membranes = ndimage.label(~window & ring, np.ones((3, 3)))[0]
    return len(set(cells[cross]) - {0}) == 1 and membranes.max() == 1


def test_a_pixel_is_warped_exactly_if_it_is_simple() -> None:
    for bits in itertools.product([False, True], repeat=9):
        window = np.array(bits).reshape(3, 3)
        target = window.copy()
        target[1, 1] ^= True
        flipped = (warp(window, target, np.zeros((3, 3))) != window).any()
        assert flipped == flip_keeps_topology(window)


@pytest.mark.parametrize("seed", SEEDS)
def test_warping_keeps_the_topology_and_only_moves_towards_the_prediction(seed: int) -> None:
    truth, p = blobs(seed) > 0.4, blobs(seed + 100)
    warped = warp(truth, p > 0.5, abs(p - 0.5))
    assert ((warped == truth) | (warped == (p > 0.5))).all()
    assert (warped != truth).any()
    assert components(warped).max() == components(truth).max()
    assert euler_number(np.pad(warped, 1), 1) == euler_number(np.pad(truth, 1), 1)


def test_a_moved_membrane_is_no_error() -> None:
    truth = two_cells(gap=3)
    moved = truth.copy()
    moved[1:-1, 6:8] = True
    moved[1:-1, 9:11] = False
    warped = warp(truth, moved, np.ones(truth.shape))
    assert (warped == moved).all()
    assert splits_and_mergers(warped, moved) == 0


def test_a_hole_in_a_membrane_is_one_merger_and_a_new_line_one_split() -> None:
    truth = two_cells()
    merged = truth.copy()
    merged[5, 7] = True
    warped = warp(truth, merged, np.ones(truth.shape))
    assert splits_and_mergers(warped, merged) == 1
    warped = warp(merged, truth, np.ones(truth.shape))
    assert splits_and_mergers(warped, truth) == 1


def test_a_speck_is_neither_split_nor_merger() -> None:
    truth = two_cells()
    speck = truth.copy()
    speck[4, 4] = False
    warped = warp(truth, speck, np.ones(truth.shape))
    assert (warped == truth).all()
    assert splits_and_mergers(warped, speck) == 0


def test_the_most_confident_pixel_is_warped_first_and_of_equal_ones_the_upper_left() -> None:
    """Of a bridge of two pixels between cells, one is warped: the other one would merge them."""
    truth = np.ones((3, 6), bool)
    truth[:, 2:4] = False
    bridged = truth.copy()
    bridged[1, 2:4] = True
    for left, right, warped in ((0.2, 0.1, 2), (0.1, 0.2, 3), (0.1, 0.1, 2)):
        confidence, expected = np.zeros((3, 6)), truth.copy()
        confidence[1, 2:4] = left, right
        expected[1, warped] = True
        np.testing.assert_array_equal(warp(truth, bridged, confidence), expected)


@pytest.mark.parametrize("turns", range(4))
def test_pieces_that_join_within_20_pixels_are_one(turns: int) -> None:
    """A ring that is cut once stays one piece for whoever sees its other side."""
    for height, errors in ((20, 0), (21, 1)):
        ring = np.zeros((height + 5, 9), bool)
        ring[2:-2, 2:-2] = True
        ring[3:-3, 3:-3] = False
        cut = ring.copy()
        cut[2, 4] = False
        ring, cut = (np.rot90(mask, turns) for mask in (ring, cut))
        assert splits_and_mergers(ring, cut) == errors
        assert splits_and_mergers(ring, cut, radius=height) == 0
        assert splits_and_mergers(ring, cut, radius=height - 1) == 1


def splits_and_mergers_by_definition(
    warped: np.ndarray, prediction: np.ndarray, radius: int
) -> int:
    errors = 0
    for y, x in np.argwhere(warped != prediction):

        def pieces(mask: np.ndarray, reach: int, y: int = y, x: int = x) -> int:
            """Pieces of the mask within reach of (y, x) that touch its eight neighbours."""
            near = np.zeros(mask.shape, bool)
            near[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = True
            around = components(mask & near)[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            return len(set(around.flat) - {0})

        without = warped.copy()
        without[y, x] = False
        labels = components(warped)
        labels[y, x] = 0
        around = set(labels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].flat) - {0}
        if warped[y, x] and len(around) == 1:
            errors += pieces(without, radius) > 1
        else:
            errors += len(around) > 1
    return errors


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("radius", [1, 2, 4])
def test_splits_and_mergers_equal_their_definition(seed: int, radius: int) -> None:
    rng = np.random.default_rng(seed)
    warped, prediction = rng.random((2, 14, 17)) < 0.6
    wanted = splits_and_mergers_by_definition(warped, prediction, radius)
    assert splits_and_mergers(warped, prediction, radius) == wanted > 0


# ----------------------------------------------------------------------------------------------
# The accumulator


def filled(seeds: range = range(4), **settings) -> IsbiMetrics:
    metrics = IsbiMetrics(**settings)
    for seed in seeds:
        metrics.add(blobs(seed), blobs(seed) + 0.2 * blobs(seed + 50) > 0.6, f"{seed}.png")
    return metrics


def test_perfect_probabilities_have_no_error() -> None:
    metrics = IsbiMetrics(warping=True)
    metrics.add(two_cells().astype(float), two_cells())
    result = metrics.result()
    for score in ("v_rand", "v_rand_precision", "v_rand_recall", "v_info"):
        assert result[score] == pytest.approx(1, abs=1e-12)
    for error in ("rand_error", "pixel_error", "warping_error"):
        assert result[error] == 0


def test_the_warping_error_is_a_share_of_the_pixels() -> None:
    """A hole in a membrane is one of them; where nothing can be above 1, it is not counted."""
    holed = two_cells().astype(float)
    holed[5, 7] = 1
    metrics = IsbiMetrics(thresholds=(0.5, 1.0), warping=True)
    metrics.add(holed, two_cells())
    assert metrics.curves()["warping_error"][0] == pytest.approx(1 / holed.size)
    assert np.isnan(metrics.curves()["warping_error"][1])


def test_what_is_far_from_the_threshold_is_warped_first() -> None:
    for seed in range(6):
        p, truth = blobs(seed), blobs(seed) + 0.2 * blobs(seed + 50) > 0.6
        metrics = IsbiMetrics(thresholds=(0.3, 0.7), warping=True)
        metrics.add(p, truth)
        for threshold, found in zip((0.3, 0.7), metrics.curves()["warping_error"], strict=True):
            mask = p > threshold
            errors = splits_and_mergers(warp(truth, mask, abs(p - threshold)), mask)
            assert found == pytest.approx(errors / p.size)


def test_nothing_predicted_where_nothing_is_has_no_error() -> None:
    metrics = IsbiMetrics(thresholds=(0.5,))
    metrics.add(np.zeros((4, 4)), np.zeros((4, 4), int))
    assert (metrics.result()["pixel_error"], metrics.result()["rand_error"]) == (0, 0)


def test_result_is_the_mean_over_slices_and_then_the_best_threshold() -> None:
    metrics = filled()
    table = np.zeros((4, len(THRESHOLDS)))
    for i, t in itertools.product(range(4), range(len(THRESHOLDS))):
        truth = components(blobs(i) + 0.2 * blobs(i + 50) > 0.6)
        table[i, t] = rand_score(overlap(truth, thin_borders(blobs(i) > t / 10))).f
    assert metrics.curves()["v_rand"] == pytest.approx(table.mean(0), abs=1e-12)
    result = metrics.result()
    assert result["v_rand"] == pytest.approx(table.mean(0).max(), abs=1e-12)
    assert result["v_rand_threshold"] == THRESHOLDS[table.mean(0).argmax()]
    assert metrics.at(0.5)["v_rand"] == pytest.approx(table[:, 5].mean(), abs=1e-12)


def test_cells_of_class_0_are_scored_as_those_of_class_1() -> None:
    """With the classes swapped, and so the probabilities and the thresholds."""
    plain = filled(warping=True, thresholds=(0.25, 0.5, 0.625))
    swapped = IsbiMetrics(thresholds=(0.375, 0.5, 0.75), warping=True, cells=0)
    for seed in range(4):
        membrane = blobs(seed) + 0.2 * blobs(seed + 50) <= 0.6
        swapped.add(1 - blobs(seed), membrane, f"{seed}.png")
    there = swapped.curves()
    for key, values in plain.curves().items():
        assert there[key][::-1] == pytest.approx(values, abs=1e-12), key
    assert swapped.at(0.375) == pytest.approx(plain.at(0.625))
    with pytest.raises(InputError, match="cells"):
        plain.merge(IsbiMetrics((0.25, 0.5, 0.625), warping=True, cells=0))


def test_rand_and_pixel_error_pool_the_slices() -> None:
    images = [(blobs(i, size), blobs(i + 9, size) > 0.5) for i, size in enumerate((16, 40))]
    metrics = IsbiMetrics(thresholds=(0.5,))
    pairs, pixels = [], []
    for p, label in images:
        metrics.add(p, label)
        pairs.append(rand_pairs(overlap(components(label), components(p > 0.5))))
        pixels.append(((label & (p > 0.5)).sum(), label.sum(), (p > 0.5).sum()))
    for error, counts in (("rand_error", pairs), ("pixel_error", pixels)):
        both, truth, prediction = np.sum(counts, axis=0)
        expected = 1 - 2 * both / (truth + prediction)
        assert metrics.result()[error] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warping", [False, True])
def test_merged_accumulators_are_one(warping: bool) -> None:
    one = filled(range(4), warping=warping)
    for first, second in ((range(2), range(2, 4)), (range(2, 4), range(2))):
        part = pickle.loads(pickle.dumps(filled(first, warping=warping)))
        part.merge(filled(second, warping=warping))
        assert part.result() == one.result()
    assert ("warping_error" in one.result()) == warping


def test_merging_leaves_the_other_accumulator_alone() -> None:
    other = filled(range(1))
    before = copy.deepcopy(other.result())
    filled(range(1, 2)).merge(other)
    assert other.result() == before


def test_all_eight_bit_probabilities_give_one_mask_in_both_precisions() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    results = []
    for dtype in (np.float32, np.float64):
        metrics = IsbiMetrics()
        metrics.add(grey.astype(dtype) / dtype(255), grey > 51)
        results.append(metrics.slices[0].counts[:, 1])
    assert (results[0] == results[1]).all()
    # strictly above: 51 / 255 is not cell at 0.2
    above = [(grey.astype(int) * 10 > 255 * i).sum() for i in range(11)]
    assert results[0][:, 2].tolist() == above


def test_a_slice_without_cells_is_left_out_of_the_means() -> None:
    metrics = filled(range(2))
    expected = metrics.result()
    metrics.add(np.zeros((8, 8)), np.zeros((8, 8), int), "empty")
    assert metrics.result()["v_rand"] == expected["v_rand"]
    only = IsbiMetrics()
    only.add(np.zeros((8, 8)), np.zeros((8, 8), int))
    assert math.isnan(only.result()["v_rand"])
    assert math.isnan(only.at(0.5)["v_info"])


@pytest.mark.parametrize(
    ("probability", "label", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5), int), "equal size"),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4), int), "slice by slice"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), int), "divide"),
        (np.full((4, 4), 255.0), np.zeros((4, 4), int), "divide"),
        (np.full((4, 4), 1.5), np.zeros((4, 4), int), "divide"),
        (np.full((4, 4), np.nan), np.zeros((4, 4), int), "nan"),
        (np.zeros((0, 4)), np.zeros((0, 4), int), "2D"),
    ],
)
def test_isbi_metrics_refuse_what_is_no_probability(
    probability: np.ndarray, label: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        IsbiMetrics().add(probability, label, "7.png")


def test_isbi_metrics_explain_misuse() -> None:
    with pytest.raises(InputError, match="no slices"):
        IsbiMetrics().result()
    with pytest.raises(InputError, match="not one of"):
        filled(range(1)).at(0.55)
    with pytest.raises(InputError, match="merge"):
        IsbiMetrics().merge(IsbiMetrics(warping=True))
    for thresholds in ((), (0.5, 1.5)):
        with pytest.raises(InputError, match="0 to 1"):
            IsbiMetrics(thresholds)


def test_a_slice_of_512_costs_less_than_300_blurs() -> None:
    p = blobs(0, size=512, sigma=2.5)
    assert blurs(IsbiMetrics().add, p, p > 0.3) < 300


# ----------------------------------------------------------------------------------------------
# The thirty training slices of the challenge


@pytest.fixture(scope="module")
def stack() -> tuple[list[np.ndarray], list[np.ndarray]]:
    folder = os.environ.get("ISBI2012_DIR")
    if not folder:
        pytest.skip("ISBI2012_DIR is not set to a folder with image/0.png and label/0.png ...")

    def read(kind: str) -> list[np.ndarray]:
        return [np.array(Image.open(Path(folder, kind, f"{i}.png"))) for i in range(30)]

    return read("image"), read("label")


def mean_scores(truths: list[np.ndarray], predictions: list[np.ndarray]) -> tuple[float, float]:
    sizes = [overlap(t, p) for t, p in zip(truths, predictions, strict=True)]
    return np.mean([rand_score(s).f for s in sizes]), np.mean([info_score(s).f for s in sizes])


def test_isbi_goldens_of_label_images(stack) -> None:
    truths = [components(label > 0) for label in stack[1]]
    assert mean_scores(truths, truths) == pytest.approx((1, 1), abs=1e-12)
    everywhere = [np.ones_like(t) for t in truths]
    assert mean_scores(truths, everywhere) == pytest.approx((0.0779928, 0), abs=5e-8)
    neighbours = mean_scores(truths[:-1], truths[1:])
    assert neighbours == pytest.approx((0.763606, 0.769166), abs=5e-7)


def test_isbi_goldens_of_the_raw_images(stack) -> None:
    metrics = IsbiMetrics(thresholds=(0.3, 0.5))  # the best ones, for speed
    for image, label in zip(*stack, strict=True):
        metrics.add(image / 255, label)
    result = metrics.result()
    assert result["v_rand"] == pytest.approx(0.665836, abs=5e-7)
    assert result["v_info"] == pytest.approx(0.814877, abs=5e-7)
    assert result["pixel_error"] == pytest.approx(0.1137216, abs=5e-8)


def test_isbi_golden_pixel_error_of_cells_everywhere(stack) -> None:
    metrics = IsbiMetrics(thresholds=(0.5,))
    for label in stack[1]:
        metrics.add(np.ones(label.shape), label)
    assert metrics.result()["pixel_error"] == pytest.approx(0.1233628, abs=5e-8)


@pytest.mark.slow
def test_the_goldens_are_the_best_of_all_eleven_thresholds(stack) -> None:
    metrics = IsbiMetrics()
    for image, label in zip(*stack, strict=True):
        metrics.add((image / np.float32(255)).astype(np.float32), label)
    result = metrics.result()
    scores = (result["v_rand"], result["v_info"], result["pixel_error"])
    assert scores == pytest.approx((0.665836, 0.814877, 0.1137216), abs=5e-7)
    assert (result["v_rand_threshold"], result["v_info_threshold"]) == (0.5, 0.5)
