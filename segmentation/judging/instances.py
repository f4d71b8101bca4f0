"""Scores of numbered objects: average precision, panoptic quality, aggregated Jaccard, counts.

An object that was found is matched to a true one where their IoU is 0.5 or more. Above 0.5 there is
one such partner at most. At exactly 0.5 there may be two, where one of the two objects consists of
two equal halves that the other numbering parts, and these overlap nothing else: so matches taken
greedily by falling IoU are as many as can be, and those of 0.5 are those of every higher threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segmentation.judging.metrics import ratio
from unet.errors import InputError

Numbers = NDArray[np.integer]  # of objects, (H, W): 0 is background, below 0 does not count

IOUS = tuple(i / 20 for i in range(10, 20))  # 0.5, 0.55, ..., 0.95


@dataclass(frozen=True)
class Overlaps:
    """What the scores of an image follow from; those of several images add up.

    Attributes:
        true, found: objects in the truth, and objects that were found.
        matched: IoU of each pair that is matched, 0.5 or more.
        common, union: numerator and denominator of the aggregated Jaccard index, in pixels.
        miscounted: sum over the images of the difference of the two numbers of objects.
        images: how many they are.
    """

    true: int = 0
    found: int = 0
    matched: tuple[float, ...] = ()
    common: int = 0
    union: int = 0
    miscounted: int = 0
    images: int = 0

    @classmethod
    def of(cls, found: Numbers, true: Numbers) -> Overlaps:
        """Those of one image: objects that were found, and true ones, (H, W) each.

        Pixels below 0 in the truth do not count; what was found below 0 is no object.

        Raises:
            InputError: other shapes.
        """
        if found.shape != true.shape:
            raise InputError(
                f"objects found {found.shape} and true {true.shape} differ in shape: score every "
                "image against its own mask"
            )
        kept = true >= 0
        _, a = np.unique(np.append(true[kept], 0), return_inverse=True)
        _, b = np.unique(np.append(np.maximum(found[kept], 0), 0), return_inverse=True)
        a, b = a[:-1], b[:-1]  # 0 is background, whether a pixel is or not
        columns = int(b.max(initial=0)) + 1
        pairs, pixels = np.unique(a * columns + b, return_counts=True)
        rows, cols = pairs // columns, pairs % columns
        true_size = np.bincount(a, minlength=1)
        found_size = np.bincount(b, minlength=1)
        both = (rows > 0) & (cols > 0)
        i, j, common = rows[both], cols[both], pixels[both]
        union = true_size[i] + found_size[j] - common
        iou = common / union
        order = np.argsort(-iou, kind="stable")
        i, j, common, union, iou = (x[order] for x in (i, j, common, union, iou))
        _, first = np.unique(i, return_index=True)  # the best partner of each true object
        taken = np.unique(j[first])
        missed = np.setdiff1d(np.arange(1, len(true_size)), i)
        spare = np.setdiff1d(np.arange(1, len(found_size)), taken)
        n, m = len(true_size) - 1, len(found_size) - 1
        return cls(
            true=n,
            found=m,
            matched=_greedy(i, j, iou),
            common=int(common[first].sum()),
            union=int(union[first].sum() + true_size[missed].sum() + found_size[spare].sum()),
            miscounted=abs(m - n),
            images=1,
        )

    def __add__(self, other: Overlaps) -> Overlaps:
        return Overlaps(
            *(
                mine + theirs
                for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )

    def scores(self) -> dict[str, float]:
        """By name, from 0 to 1 but for the counts; NaN where nothing is and nothing was found.

        - ap50, ap75: TP / (TP + FP + FN) of the pairs whose IoU is at least 0.5 and 0.75, as in
          StarDist and the 2018 Data Science Bowl; ap: the mean from 0.5 to 0.95 in steps of 0.05.
        - pq = sq rq: panoptic quality (Kirillov et al. 2019, arXiv 1801.00868) of the pairs from
          0.5 on: rq is the F-score of finding objects, sq the mean IoU of those that were found.
        - aji: aggregated Jaccard index (Kumar et al. 2017, doi:10.1109/TMI.2017.2677499).
        - objects, found: how many there are, and were found; count_error: the difference, as the
          mean of its absolute value over the images.
        """
        ap = np.array(list(self.precision().values()))
        tp, total = len(self.matched), math.fsum(self.matched)
        return {
            "ap": float(ap.mean()),
            "ap50": float(ap[0]),
            "ap75": float(ap[5]),
            "pq": float(ratio(2 * total, self.true + self.found, math.nan)),
            "sq": float(ratio(total, tp, math.nan)),
            "rq": float(ratio(2 * tp, self.true + self.found, math.nan)),
            "aji": float(ratio(self.common, self.union, math.nan)),
            "objects": float(self.true),
            "found": float(self.found),
            "count_error": float(ratio(self.miscounted, self.images, math.nan)),
        }

    def precision(self) -> dict[str, float]:
        """Average precision at each IoU of IOUS: "0.5" ... "0.95"."""
        right = np.array([sum(iou >= t for iou in self.matched) for t in IOUS])
        found = ratio(right, self.true + self.found - right, math.nan)
        return {f"{t:g}": value for t, value in zip(IOUS, found.tolist(), strict=True)}


def _greedy(i: Numbers, j: Numbers, iou: NDArray[np.float64]) -> tuple[float, ...]:
    """IoU of pairs (i, j) by falling IoU, from 0.5 on, in which no object occurs twice."""
    true: set[int] = set()
    found: set[int] = set()
    matched = []
    for a, b, value in zip(i.tolist(), j.tolist(), iou.tolist(), strict=True):
        if value < IOUS[0]:
            break
        if a not in true and b not in found:
            true.add(a)
            found.add(b)
            matched.append(value)
    return tuple(matched)
