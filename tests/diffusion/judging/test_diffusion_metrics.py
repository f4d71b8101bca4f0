"""Distances between samples and images: closed forms, brute force, and what must be refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import linalg, stats
from scipy.spatial.distance import cdist

from diffusion.judging import metrics
from diffusion.judging.copies import memorisation, nearest_neighbours
from diffusion.judging.metrics import (
    Moments,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
    sample_warnings,
)
from unet import InputError


def gaussian(seed: int, count: int, width: int = 6, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.uniform(-1, 1, (width, width)) + shift


def pictures(seed: int, count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def exact(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """Moments with just this mean and covariance."""
    found = Moments(len(mean))
    found.count, found.mean, found.scatter = 101, mean, covariance * 100
    return found


# -- Fréchet distance -----------------------------------------------------------------------------


def test_frechet_distance_is_the_formula_with_the_matrix_square_root():
    a, b = gaussian(0, 200), gaussian(1, 150, shift=0.3)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ t).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_gaussians_that_share_their_axes():
    rotation = linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    v, w = np.array([4.0, 1, 0.25, 9, 0]), np.array([1.0, 1, 4, 0, 0])
    mean, other = np.zeros(5), np.arange(5.0)
    found = frechet_distance(
        exact(mean, rotation @ np.diag(v) @ rotation.T),
        exact(other, rotation @ np.diag(w) @ rotation.T),
    )
    assert found == pytest.approx((other**2).sum() + ((np.sqrt(v) - np.sqrt(w)) ** 2).sum())


@pytest.mark.parametrize("count", [2, 5, 40])
def test_frechet_distance_takes_fewer_images_than_features(count):
    # Of one-dimensional Gaussians in 64 features: m differ by 0, the deviations by a factor of 3.
    direction = np.full(64, 1 / 8)
    values = np.random.default_rng(0).standard_normal(count)
    a, b = np.outer(values, direction), np.outer(3 * values, direction)
    expected = 4 * values.var(ddof=1) + (2 * values.mean()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    wide = gaussian(1, count, 64)
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-7 * np.trace(np.cov(wide.T)))
    assert frechet_distance(wide, wide + 2) == pytest.approx(4 * 64)


def test_frechet_distance_of_constant_features():
    assert frechet_distance(np.ones((3, 2)), np.full((4, 2), 2.0)) == 2


def test_moments_of_parts_are_the_moments_of_the_whole():
    features = gaussian(2, 101).astype(np.float32) + 1e4
    parts = [Moments(6), Moments(6), Moments(6)]  # the last one stays empty
    for i, batch in enumerate(np.array_split(features, 7)):
        parts[i % 2].add(batch)
    whole = Moments(6)
    for part in parts:
        whole.merge(part)
    exactly = features.astype(np.float64)
    assert whole.count == 101
    np.testing.assert_allclose(whole.mean, exactly.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(exactly, rowvar=False), rtol=1e-9)
    assert frechet_distance(whole, features) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(parts[0].covariance, parts[0].covariance.T)


# -- kernel distance ------------------------------------------------------------------------------


def test_kernel_distance_of_one_subset_is_the_sum_over_pairs():
    a, b = gaussian(0, 8, 3), gaussian(1, 9, 3, shift=0.5)
    # The permutations that are drawn decide the subset: the same ones here.
    rng = np.random.default_rng(5)
    x, y = a[rng.permutation(8)[:4]], b[rng.permutation(9)[:4]]

    def k(u, v):
        return (u @ v / 3 + 1) ** 3

    same = sum(k(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(4), 2))
    across = sum(k(u, v) for u in x for v in y)
    found = kernel_distance(a, b, subsets=1, seed=5)
    assert found.mean == pytest.approx(same / 12 - 2 * across / 16)
    assert found.subset_size == 4
    assert found.std == 0


def test_kernel_distance_has_no_bias_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    means = []
    for shift in (0.0, 0.2, 0.4):
        a, b = rng.standard_normal((2, 4000, 4))
        found = kernel_distance(a, b + shift, subsets=40, subset_size=500)
        assert found.subset_size == 500
        means.append(found.mean)
    assert abs(means[0]) < 0.01 < means[1] < means[2]
    large = [kernel_distance(*rng.standard_normal((2, n, 4)), seed=n).mean for n in (20, 40, 80)]
    assert abs(np.mean(large)) < 0.3  # a biased estimator has E k(x, x) / n > 1 / 20 * (1 + 1)^3


def test_kernel_distance_is_repeatable():
    a, b = gaussian(0, 50), gaussian(1, 60)
    assert kernel_distance(a, b, seed=3) == kernel_distance(a, b, seed=3)
    assert kernel_distance(a, b, seed=3) != kernel_distance(a, b, seed=4)


# -- precision and recall -------------------------------------------------------------------------


def brute_force_share(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # the nearest is the point itself
    return float((cdist(points, centres) <= radii).any(axis=1).mean())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [1, 1000, metrics.BLOCK_VALUES])
def test_precision_and_recall_by_brute_force(monkeypatch, k, block):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block)
    real, fake = gaussian(0, 80, 3), gaussian(0, 50, 3)[:, ::-1] * 0.6 + 100
    real = real + 100
    found = precision_recall(real, fake, k)
    expected = brute_force_share(fake, real, k), brute_force_share(real, fake, k)
    assert found == pytest.approx(expected)
    assert 0 < found.recall < found.precision < 1


def test_precision_without_recall_and_the_reverse():
    real = np.concatenate([gaussian(0, 60, 2), gaussian(1, 60, 2, shift=50)])
    one_mode = gaussian(0, 60, 2)  # half of the real
    assert precision_recall(real, one_mode) == (1, 0.5)
    assert precision_recall(one_mode, real) == (0.5, 1)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)


# -- nearest training images ----------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 700, metrics.BLOCK_VALUES])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_nearest_neighbours_by_brute_force(monkeypatch, block, shape):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block)
    training, samples = pictures(0, 37, *shape), pictures(1, 9, *shape)
    samples[4] = training[20] = training[11]  # a copy; of equals the first counts
    found = nearest_neighbours(samples, training, k=3)
    every = cdist(samples.reshape(9, -1).astype(float), training.reshape(37, -1).astype(float))
    order = np.argsort(every, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(found.indices, order)
    expected = np.take_along_axis(every, order, axis=1) / np.sqrt(np.prod(shape))
    np.testing.assert_allclose(found.distances, expected)
    assert found.indices[4].tolist()[:2] == [11, 20]
    assert found.distances[4].tolist()[:2] == [0, 0]


def test_distances_are_in_grey_levels():
    black = np.zeros((1, 7, 5), np.uint8)
    assert nearest_neighbours(black, black + 30).distances == 30
    assert nearest_neighbours(black, (black + 30)[..., None]).distances == 30  # grey is grey


def test_copies_are_told_from_new_images():
    training, held_out = pictures(0, 300, 6, 6), pictures(1, 200, 6, 6)
    new, noisy = pictures(2, 400, 6, 6), np.clip(training[:100].astype(int) + 2, 0, 255)
    honest = memorisation(new, held_out, training)
    assert honest.ratio == pytest.approx(1, abs=0.05)
    assert honest.copies < 0.04
    assert honest.warning == ""
    copied = memorisation(np.concatenate([new[:300], noisy.astype(np.uint8)]), held_out, training)
    assert copied.copies == pytest.approx(0.25, abs=0.03)
    assert copied.ratios[300:].max() < 0.05
    np.testing.assert_array_equal(copied.neighbours.indices[300:, 0], np.arange(100))
    assert "99 held-out" in memorisation(new, held_out[:99], training).warning


def test_samples_of_the_distribution_are_called_copies_one_time_in_a_hundred():
    training, held_out = pictures(0, 200, 4, 4), pictures(1, 3000, 4, 4)
    count = round(memorisation(pictures(2, 3000, 4, 4), held_out, training).copies * 3000)
    assert stats.binomtest(count, 3000, 0.01).pvalue > 0.001


# -- what is refused, and what is said ------------------------------------------------------------

GOOD = gaussian(0, 10)


@pytest.mark.parametrize("figure", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize(
    ("fake", "part"),
    [
        (GOOD[:1], "least|at least 2"),
        (GOOD[:, :4], "6 and 4 features"),
        (GOOD[0], r"shape \(6,\)"),
        (np.where(np.arange(60).reshape(10, 6) == 20, np.nan, GOOD), "of image 3 are not finite"),
    ],
)
def test_unusable_features_are_refused(figure, fake, part):
    with pytest.raises(InputError, match=part):
        figure(GOOD, fake)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: precision_recall(GOOD, GOOD, k=0), "k=0"),
        (lambda: precision_recall(GOOD[:3], GOOD, k=3), "at least 4"),
        (lambda: kernel_distance(GOOD, GOOD, subsets=0), "subsets=0"),
        (lambda: kernel_distance(GOOD, GOOD, subset_size=1), "subset_size=1"),
        (lambda: Moments(6).add(GOOD[:, :2]), "6 and 2 features"),
        (lambda: moments(GOOD[:1]).covariance, "at least 2 images, not 1"),
        (lambda: nearest_neighbours(pictures(0, 2, 4, 4), pictures(0, 2, 4, 5)), "resize one"),
        (lambda: nearest_neighbours(pictures(0, 2, 4, 4), pictures(0, 2, 4, 4, 3)), "resize one"),
        (lambda: nearest_neighbours(GOOD, pictures(0, 2, 4, 4)), "samples are float64"),
        (lambda: nearest_neighbours(pictures(0, 2, 4, 4), pictures(0, 2, 4, 4)[:0]), "at least"),
        (lambda: nearest_neighbours(*[pictures(0, 2, 4, 4)] * 2, k=3), "to the number"),
        (lambda: memorisation(*[pictures(0, 3, 4, 4)] * 3), "are copies"),
    ],
)
def test_mistakes_are_named(call, part):
    with pytest.raises(InputError, match=part):
        call()


def test_few_images_are_said():
    assert sample_warnings(2049, 2048) == []
    (singular,) = sample_warnings(2900, 4096)
    assert "2,900 images for 4,096 features" in singular
