"""The scores of the ISBI 2012 challenge (Arganda-Carreras et al. 2015).

V_Rand and V_Info after border thinning, Rand error, pixel error and warping error
(doi:10.3389/fnana.2015.00142). They can be merged, so that several processes score their share and
one of them reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, sparse
from skimage.segmentation import watershed

from segmentation.judging.metrics import FloatArray, IntArray, mean_known, ratio
from unet.errors import InputError

BoolArray = NDArray[np.bool_]


THRESHOLDS = tuple(i / 10 for i in range(11))


class Score(NamedTuple):
    f: float
    precision: float
    recall: float


UNDEFINED = Score(math.nan, math.nan, math.nan)


def f_score(common: float, truth: float, prediction: float) -> Score:
    """F-score with precision = common / prediction and recall = common / truth; 0 / 0 is 1."""
    return Score(
        float(ratio(2 * common, truth + prediction, 1)),
        float(ratio(common, prediction, 1)),
        float(ratio(common, truth, 1)),
    )


class Overlap(NamedTuple):
    """Sizes in pixels of the segments and of their intersections, inside the true cells only."""

    truth: NDArray[np.int64]
    prediction: NDArray[np.int64]
    both: NDArray[np.int64]
    lines: int  # pixels predicted as membrane: each counts as a segment of one pixel


def components(mask: BoolArray) -> IntArray:
    """4-connected components of a mask (H, W), numbered from 1; 0 outside."""
    return np.asarray(ndimage.label(mask)[0])


def thin_borders(mask: BoolArray) -> IntArray:
    """Components of a cell mask (H, W), grown into the membranes until lines of 0 remain.

    A 4-connected watershed of a flat landscape: all components grow one pixel at a time, and a
    pixel that two of them reach at once becomes line. A mask without cells stays all line.
    """
    return np.asarray(watershed(~mask, components(mask), connectivity=1, watershed_line=True))


def overlap(truth: IntArray, prediction: IntArray) -> Overlap:
    """Contingency table of two label images of equal shape, restricted to truth > 0."""
    cell = truth > 0
    true, predicted = truth[cell], prediction[cell]
    inside = predicted > 0
    truth_sizes, prediction_sizes = np.bincount(true)[1:], np.bincount(predicted)[1:]
    table = sparse.coo_array(
        (np.ones(inside.sum(), np.int64), (true[inside] - 1, predicted[inside] - 1)),
        shape=(truth_sizes.size, prediction_sizes.size),
    )
    both = table.tocsr().data  # duplicates are summed
    return Overlap(truth_sizes, prediction_sizes, both, int((~inside).sum()))


def rand_pairs(sizes: Overlap) -> tuple[int, int, int]:
    """Ordered pairs of pixels (with themselves) in one segment: of both, of truth, of prediction.

    n^2 times the sums of squares of Arganda-Carreras 2015: integers, so that slices pool exactly.
    """
    truth, prediction, both = (int((s**2).sum()) for s in sizes[:3])
    return both + sizes.lines, truth, prediction + sizes.lines


def rand_score(sizes: Overlap) -> Score:
    """V_Rand (Arganda-Carreras 2015); mergers lower precision, splits lower recall.

    NaN without true cells, as is V_Info.
    """
    return f_score(*rand_pairs(sizes)) if sizes.truth.size else UNDEFINED


def info_score(sizes: Overlap) -> Score:
    """V_Info = 2 I / (H(truth) + H(prediction)) (Arganda-Carreras 2015), in nats.

    As with V_Rand, mergers lower precision, here I / H(truth), and splits lower recall, here
    I / H(prediction).
    """
    n = int(sizes.truth.sum())
    if n == 0:
        return UNDEFINED

    def entropy(segments: NDArray[np.int64], lines: int) -> float:
        p = segments[segments > 0] / n
        return lines / n * math.log(n) - float((p * np.log(p)).sum())

    truth, prediction = entropy(sizes.truth, 0), entropy(sizes.prediction, sizes.lines)
    information = truth + prediction - entropy(sizes.both, sizes.lines)
    return f_score(max(information, 0.0), prediction, truth)


# The eight neighbours of a pixel, in circular order; bit k of a code: neighbour k is cell.
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
_BITS = np.arange(256) >> (np.arange(10) % 8)[:, None] & 1
# A simple point can flip without changing the topology of 4-connected cells and 8-connected
# membrane: its connectivity number (Yokoi et al. 1975) is 1.
_NUMBER = [_BITS[k] * (1 - _BITS[k + 1] * _BITS[k + 2]) for k in (1, 3, 5, 7)]
_SIMPLE = (np.sum(_NUMBER, axis=0) == 1).tobytes()  # of each code


def warp(truth: BoolArray, prediction: BoolArray, confidence: FloatArray) -> BoolArray:
    """Flip simple points of `truth` (H, W) towards `prediction` until no flip is left.

    Jain et al. 2010 (doi:10.1109/CVPR.2010.5539950); the most confident pixels go first. What lies
    outside the image is membrane. The result has the topology of `truth`.
    """
    source = np.pad(truth, 1)
    differ = np.flatnonzero(source != np.pad(prediction, 1))
    order = np.argsort(-np.pad(confidence, 1).flat[differ], kind="stable")
    todo: list[int] = differ[order].tolist()
    a, b, c, d, e, f, g, h = (y * source.shape[1] + x for y, x in _RING)
    s = bytearray(source.tobytes())
    before = -1
    while len(todo) != before:
        before, blocked = len(todo), []
        for i in todo:
            low = s[i + a] | s[i + b] << 1 | s[i + c] << 2 | s[i + d] << 3
            if _SIMPLE[low | s[i + e] << 4 | s[i + f] << 5 | s[i + g] << 6 | s[i + h] << 7]:
                s[i] ^= 1
            else:
                blocked.append(i)
        todo = blocked
    return np.frombuffer(s, bool).reshape(source.shape)[1:-1, 1:-1]


def splits_and_mergers(warped: BoolArray, prediction: BoolArray, radius: int = 20) -> int:
    """Pixels where the warped truth still differs and a flip would split or merge cells.

    Flipping a membrane pixel merges if two cells meet in its 3x3 window. Flipping a cell pixel
    splits if two pieces then meet there; pieces count as one if they join within `radius` px.
    """
    segments = np.pad(components(warped), 1)
    surround = np.pad(warped, radius)
    middle = slice(radius - 1, radius + 2)
    errors = 0
    for y, x in np.argwhere(warped != prediction):
        window = segments[y : y + 3, x : x + 3].copy()
        window[1, 1] = 0
        pieces = np.unique(window[window > 0]).size
        if warped[y, x] and pieces == 1:
            around = surround[y : y + 2 * radius + 1, x : x + 2 * radius + 1].copy()
            around[radius, radius] = False
            pieces = np.unique(components(around)[middle, middle]).size - 1
        errors += pieces > 1
    return errors


class SliceScores(NamedTuple):
    """What `IsbiMetrics` keeps of one slice; the first axis of the arrays is the threshold."""

    size: int  # pixels
    scores: FloatArray  # (T, 2, 3) V_Rand and V_Info: F, precision, recall; NaN without true cells
    counts: NDArray[np.int64]  # (T, 2, 3) pixel pairs and cell pixels: both, truth, prediction
    warping: FloatArray  # (T,) splits and mergers; NaN where they were not counted


class IsbiMetrics:
    """The ISBI 2012 scores of the cells, over slices and thresholds.

    A pixel is of class 1 where its probability is > t; class 1 are the cells, as in the challenge,
    or the membranes. V_Rand and V_Info (after border thinning, with their precisions and recalls)
    are means over slices. The errors pool the counts of all slices: `rand_error` is 1 - F of pixel
    pairs in equal segments without thinning, `pixel_error` 1 - F of cell pixels (no share of wrong
    pixels), and `warping_error` the share of pixels that stay splits or mergers. Warping takes
    seconds a slice and is kept for history, so it is counted only with `warping=True`, and never at
    the last threshold, 1 or 0, where a prediction without any cell would win.

    Args:
        cells: the class of the cells, 1 or 0.
    """

    def __init__(
        self, thresholds: Sequence[float] = THRESHOLDS, warping: bool = False, *, cells: int = 1
    ) -> None:
        if len(thresholds) == 0 or not all(0 <= t <= 1 for t in thresholds):
            raise InputError(f"thresholds must lie in 0 to 1, not {list(thresholds)}")
        self.thresholds = tuple(float(t) for t in thresholds)
        self.warping, self.cells = warping, cells
        self.slices: list[SliceScores] = []

    def add(self, probability: ArrayLike, label: ArrayLike, name: str = "") -> None:
        """Score one slice: probability of class 1 (H, W), floats in 0 ... 1; label (H, W), 1 or 0.

        Any label above 0 is class 1.

        A probability is compared in its own precision, so that k / 255 gives the same mask in
        float32 and in float64. Raises InputError for other shapes, types and values.
        """
        p, truth = np.asarray(probability), (np.asarray(label) > 0) == bool(self.cells)
        where = f"slice {name or len(self.slices)}"
        if p.ndim != 2 or p.shape != truth.shape or not p.size:
            raise InputError(
                f"{where}: probability {p.shape} and label {truth.shape} must be 2D images of "
                "equal size; add a stack slice by slice"
            )
        if p.dtype.kind != "f" or not ((p >= 0) & (p <= 1)).all():
            raise InputError(
                f"{where}: probabilities must be floats from 0 to 1, not {p.dtype} from {p.min()} "
                f"to {p.max()}; divide 8-bit values by 255"
            )
        segments = components(truth)

        def score(threshold: float) -> tuple[FloatArray, NDArray[np.int64], float]:
            mask = (p > p.dtype.type(threshold)) == bool(self.cells)
            thinned = overlap(segments, thin_borders(mask))
            scores = np.array((rand_score(thinned), info_score(thinned)))
            pixels = (int((mask & truth).sum()), int(truth.sum()), int(mask.sum()))
            counts = np.array((rand_pairs(overlap(segments, components(mask))), pixels))
            errors = math.nan
            if self.warping and threshold != self.cells:
                confidence = abs(p.astype(np.float64) - threshold)
                errors = splits_and_mergers(warp(truth, mask, confidence), mask)
            return scores, counts, errors

        # The watershed, most of the work, lets other threads run.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            rows = zip(*pool.map(score, self.thresholds), strict=True)
        self.slices.append(SliceScores(p.size, *map(np.array, rows)))

    def merge(self, other: IsbiMetrics) -> None:
        """Append the slices of another accumulator: as if they had been added here."""
        mine, theirs = ((m.thresholds, m.warping, m.cells) for m in (self, other))
        if mine != theirs:
            raise InputError("cannot merge ISBI scores of different thresholds, warping or cells")
        self.slices += other.slices

    def curves(self) -> dict[str, FloatArray]:
        """Every score at every threshold, each (T,): the means over slices and the pooled errors.

        Raises InputError if no slice was added.
        """
        if not self.slices:
            raise InputError("there are no slices to score; add at least one")
        scores = np.stack([s.scores for s in self.slices])  # (N, T, 2, 3)
        curves = {
            f"{score}{part}": np.array([mean_known(column) for column in scores[:, :, i, k].T])
            for i, score in enumerate(("v_rand", "v_info"))
            for k, part in enumerate(("", "_precision", "_recall"))
        }
        counts = np.sum([s.counts for s in self.slices], axis=0)
        both, truth, prediction = np.moveaxis(counts, 2, 0)
        errors = 1 - ratio(2 * both, truth + prediction, 1)
        curves |= {"rand_error": errors[:, 0], "pixel_error": errors[:, 1]}
        pixels = sum(s.size for s in self.slices)
        warping = np.sum([s.warping for s in self.slices], axis=0) / pixels
        return curves if np.isnan(warping).all() else {**curves, "warping_error": warping}

    def at(self, threshold: float) -> dict[str, float]:
        """Every score at one of the thresholds."""
        if threshold not in self.thresholds:
            raise InputError(f"threshold {threshold} is not one of {list(self.thresholds)}")
        i = self.thresholds.index(threshold)
        return {key: float(values[i]) for key, values in self.curves().items()}

    def result(self) -> dict[str, float]:
        """The challenge's figures: each score at its own best threshold, which is given with it.

        A precision or recall is that of the best threshold of its score; the lowest threshold wins
        ties. A score without any defined value is NaN. Raises InputError if no slice was added.
        """
        curves = self.curves()
        best: dict[str, float] = {}
        for key, values in curves.items():
            score = key.removesuffix("_precision").removesuffix("_recall")
            goodness = -curves[score] if score.endswith("error") else curves[score]
            i = int(np.nan_to_num(goodness, nan=-math.inf).argmax())
            best |= {key: float(values[i]), f"{score}_threshold": self.thresholds[i]}
        return best
