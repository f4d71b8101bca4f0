"""Dice, IoU and accuracy of a segmentation with any number of classes, over a whole set.

Matrices can be merged, so that several processes score their share and one of them reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unet.errors import InputError

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float64]


def ratio(part: ArrayLike, whole: ArrayLike, empty: float) -> FloatArray:
    """part / whole, elementwise; `empty` where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, float(empty)), where=whole != 0)


def mean_known(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = [float(v) for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else math.nan


class ConfusionMatrix:
    """Pixels by true and predicted class, and the scores that follow from them.

    The mean scores are over the classes that the truth has: of a class without a true pixel there
    is nothing to find, and its pixels that were predicted count against the classes they lie in.

    Attributes:
        counts: (K, K) pixels of true class i that were predicted as class j.
    """

    def __init__(self, classes: int) -> None:
        if classes < 1:
            raise InputError(f"a confusion matrix needs at least 1 class, not {classes}")
        self.classes = classes
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), np.int64)

    def add(self, prediction: ArrayLike, target: ArrayLike, ignore: int | None = None) -> None:
        """Counts the pixels of predicted and true class indices of equal shape.

        Args:
            ignore: index in the target of pixels that do not count.

        Raises:
            InputError: other shapes, or what are no class indices.
        """
        true, predicted = np.asarray(target), np.asarray(prediction)
        if true.shape != predicted.shape:
            raise InputError(
                f"prediction {predicted.shape} and target {true.shape} differ in shape; score "
                "every image against its own mask"
            )
        kept = np.ones(true.shape, bool) if ignore is None else true != ignore
        true, predicted = true[kept], predicted[kept]
        last = self.classes - 1
        for name, v in (("prediction", predicted), ("target", true)):
            if v.size and not (v.dtype.kind in "biu" and 0 <= v.min() <= v.max() <= last):
                raise InputError(
                    f"{name} holds {v.dtype} values from {v.min()} to {v.max()}, not class indices "
                    f"0 to {last}; take the argmax, map mask values to classes, or ignore a value"
                )
        index = true.astype(np.int64) * self.classes + predicted.astype(np.int64)
        pairs = np.bincount(index, minlength=self.classes**2)
        self.counts += pairs.reshape(self.classes, self.classes)

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of another matrix: as if they had been added here."""
        if other.classes != self.classes:
            raise InputError(
                f"cannot merge confusion matrices of {self.classes} and {other.classes} classes"
            )
        self.counts += other.counts

    @property
    def occurs(self) -> NDArray[np.bool_]:
        """(K,) whether the truth has a pixel of the class."""
        return np.asarray(self.counts.sum(1) > 0)

    @property
    def dice(self) -> FloatArray:
        """(K,) 2 |A and B| / (|A| + |B|); NaN of a class that is in neither."""
        sizes = self.counts.sum(0) + self.counts.sum(1)
        return ratio(2 * self.counts.diagonal(), sizes, math.nan)

    @property
    def iou(self) -> FloatArray:
        """(K,) |A and B| / |A or B|; NaN of a class that is in neither."""
        both = self.counts.diagonal()
        return ratio(both, self.counts.sum(0) + self.counts.sum(1) - both, math.nan)

    @property
    def mean_dice(self) -> float:
        """Mean Dice of the classes that the truth has; NaN if it has none."""
        return mean_known(self.dice[self.occurs])

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the classes that the truth has; NaN if it has none."""
        return mean_known(self.iou[self.occurs])

    @property
    def accuracy(self) -> float:
        """Share of the pixels whose class was found; NaN of none."""
        return float(ratio(self.counts.trace(), self.counts.sum(), math.nan))
