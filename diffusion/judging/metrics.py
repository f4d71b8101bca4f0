"""The quality and variety of samples: distances between sets of features.

Features are (N, D) arrays from one of the extractors of `diffusion.judging.features`. Only the
mathematics is here; whether a figure may be called FID or KID depends on the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from unet.errors import InputError
from unet.words import counted

FloatArray: TypeAlias = NDArray[np.float64]
Features: TypeAlias = NDArray[np.floating[Any]]  # (N, D)

BLOCK_VALUES = 2**23  # float64 values of an intermediate array: 64 MiB


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Batches and accumulators are combined by the pairwise update of Chan, Golub and LeVeque (1983,
    doi:10.1080/00031305.1983.10483115), which loses no digits to large means.

    Attributes:
        count: features so far.
        mean: (D,).
        scatter: (D, D), the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean: FloatArray = np.zeros(dimensions)
        self.scatter: FloatArray = np.zeros((dimensions, dimensions))

    def add(self, features: Features) -> None:
        """Takes up a batch (N, D).

        Raises:
            InputError: another width, no row, values that are not finite.
        """
        batch = _checked(features, "features", least=1)
        part = Moments(batch.shape[1])
        part.count, part.mean = len(batch), batch.mean(axis=0)
        centred = batch - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Takes up another accumulator: as if its batches had been added here."""
        _same_width(len(self.mean), len(other.mean))
        if not other.count:
            return
        total = self.count + other.count
        gap = other.mean - self.mean
        self.scatter += other.scatter + np.outer(gap, gap) * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> FloatArray:
        """The unbiased covariance (D, D).

        Raises:
            InputError: fewer than two features.
        """
        if self.count < 2:
            raise InputError(
                f"a covariance needs at least 2 images, not {self.count}: give more images"
            )
        return self.scatter / (self.count - 1)


def moments(features: Features) -> Moments:
    """The `Moments` of features (N, D)."""
    found = Moments(_checked(features, "features", least=1).shape[1])
    found.add(features)
    return found


def frechet_distance(real: Features | Moments, fake: Features | Moments) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets of features.

    |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) (Dowson and Landau 1982, doi:10.1016/0047-259X(82)90077-X;
    Heusel et al. 2017, arXiv 1706.08500, eq. 6). With S = A A^T and T = B B^T the trace of the
    square root is the sum of the singular values of A^T B, which takes singular covariances as they
    are: no matrix square root, no complex rounding errors, no offset on the diagonal.

    It is biased upwards by about 1 / N (see `sample_warnings`): compare it for equal numbers only.

    Raises:
        InputError: fewer than two images, unequal widths, values that are not finite.
    """
    a = real if isinstance(real, Moments) else moments(real)
    b = fake if isinstance(fake, Moments) else moments(fake)
    _same_width(len(a.mean), len(b.mean))
    s, t = a.covariance, b.covariance
    shared = float(linalg.svdvals(_factor(s).T @ _factor(t)).sum())
    distance = float(((a.mean - b.mean) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * shared)
    return max(0.0, distance)  # rounding


def _factor(covariance: FloatArray) -> FloatArray:
    """A with A A^T = covariance, (D, rank); without the directions that are rounding errors."""
    values, vectors = linalg.eigh(covariance)
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    if not kept.any():  # all features are equal
        return np.zeros((len(values), 1))
    return vectors[:, kept] * np.sqrt(values[kept])


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and the size of a subset."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    real: Features, fake: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, arXiv 1801.01401, sec. 3: averaged over random subsets, without a bias
    that depends on the number of images, so it may be below 0. A subset takes at most half of the
    smaller set, else the subsets were all the same and their spread nothing.

    Raises:
        InputError: fewer than four images, unequal widths, values that are not finite.
    """
    a, b = _checked(real, "real features", least=4), _checked(fake, "fake features", least=4)
    _same_width(a.shape[1], b.shape[1])
    if subsets < 1 or subset_size < 2:
        raise InputError(
            f"subsets={subsets} must be at least 1, subset_size={subset_size} at least 2"
        )
    size = min(subset_size, len(a) // 2, len(b) // 2)
    rng = np.random.default_rng(seed)
    values = [
        _mmd(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]])
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size)


def _mmd(x: FloatArray, y: FloatArray) -> float:
    """The unbiased estimator of arXiv 1801.01401, eq. 4, for two sets of n features."""
    n, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (n * (n - 1)) - 2 * xy.mean())


class PrecisionRecall(NamedTuple):
    """Share of the fake that looks real, and share of the real that the fake covers."""

    precision: float
    recall: float


def precision_recall(real: Features, fake: Features, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    A set's manifold is the union of balls around its features, each as large as the distance to the
    k-th nearest other one. Precision: share of the fake in the manifold of the real; recall: share
    of the real in that of the fake. Both depend on the numbers of images, which should be equal.

    Raises:
        InputError: k images or fewer, unequal widths, values that are not finite.
    """
    if k < 1:
        raise InputError(f"k={k} neighbours must be at least 1")
    a = _checked(real, "real features", least=k + 1)
    b = _checked(fake, "fake features", least=k + 1)
    _same_width(a.shape[1], b.shape[1])
    centre = a.mean(axis=0)  # |x|^2 + |y|^2 - 2 x.y loses digits to a common offset
    a, b = a - centre, b - centre
    return PrecisionRecall(_share_inside(b, a, k), _share_inside(a, b, k))


def _share_inside(points: FloatArray, centres: FloatArray, k: int) -> float:
    """The share of the points that lie in a ball around one of the centres."""
    radii = np.empty(len(centres))  # squared
    for rows in blocks(len(centres), len(centres)):
        distances = squared_distances(centres[rows], centres)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf  # itself
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    inside = 0
    for rows in blocks(len(points), len(centres)):
        distances = squared_distances(points[rows], centres)
        inside += int((distances <= radii).any(axis=1).sum())
    return inside / len(points)


def sample_warnings(images: int, dimensions: int) -> list[str]:
    """Warnings for figures of few images (the number in the smaller set); empty if they suffice."""
    if images > dimensions:
        return []
    return [
        f"{counted(images, 'image')} for {dimensions:,} features: the covariance is singular and "
        "the Fréchet distance too large; compare it only for this number of images"
    ]


def _checked(features: Features, name: str, least: int) -> FloatArray:
    """Features (N, D) in float64, or an InputError: fewer than `least` rows, or not finite."""
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < least or values.shape[1] < 1:
        raise InputError(
            f"{name} of shape {values.shape}: give (N, D), one row per image, at least {least} rows"
        )
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise InputError(f"{name} of image {row} are not finite: look at this image")
    return values


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise InputError(
            f"{a} and {b} features per image cannot be compared: use one extractor for both sets"
        )


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of `length` rows, so that a block of rows of `width` values has a bounded size."""
    rows = max(1, BLOCK_VALUES // max(width, 1))
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared Euclidean distances (N, M) between the rows of a (N, D) and those of b (M, D)."""
    lengths = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    return np.maximum(lengths - 2 * (a @ b.T), 0)
