"""Scores of a model on labelled images: of the whole set, of each image, and the threshold to use.

Every number of classes has Dice, IoU and accuracy. Two classes also have the scores of the ISBI
2012 challenge, with class 1 as the cells: at the threshold in use, and each at its own best
threshold, as the challenge reports them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from segmentation.data.classes import IGNORE, ClassTable, class_names
from segmentation.data.dataset import SegmentationData
from segmentation.judging.isbi import THRESHOLDS, IsbiMetrics
from segmentation.judging.metrics import ConfusionMatrix
from segmentation.predict import Predictor, Probability, classes
from segmentation.segmenter import RasterSource
from unet.errors import InputError
from unet.words import counted

Mask = NDArray[np.uint8]  # class indices (H, W)

_NAMES = {
    "v_rand": "V_Rand",
    "v_info": "V_Info",
    "rand_error": "Rand error",
    "pixel_error": "pixel error",
    "warping_error": "warping error",
}
_GRID = tuple(i / 100 for i in range(1, 100))  # thresholds to choose from
COARSE = _GRID[4::5]  # where each costs a watershed


@dataclass(frozen=True)
class ImageScores:
    """One image's scores, by name, and what was predicted."""

    index: int  # in the data
    name: str
    scores: dict[str, float]
    shape: tuple[int, int]
    packed: bytes  # the predicted classes, deflated: a fiftieth of them

    @property
    def prediction(self) -> Mask:
        """Predicted class indices (H, W)."""
        return np.frombuffer(zlib.decompress(self.packed), np.uint8).reshape(self.shape)


class Evaluation:
    """Scores accumulated over images; those of several processes can be merged.

    Args:
        threshold: above which a pixel is of the second of two classes.
        thresholds: at which the ISBI scores are tried for `challenge`, half a second for 512 x 512
            pixels; none: not tried.
        warping: also count the warping error, which takes seconds for each image and threshold.
        isbi: False leaves the ISBI scores out.
    """

    def __init__(
        self,
        table: ClassTable,
        threshold: float = 0.5,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        warping: bool = False,
        isbi: bool = True,
    ) -> None:
        two = len(table.values) == 2 and isbi
        self.table, self.threshold = table, threshold
        self.confusion = ConfusionMatrix(len(table.values))
        self.isbi = IsbiMetrics((threshold,), warping) if two else None
        self.tried = IsbiMetrics(thresholds, warping) if two and thresholds else None
        # Pixels of class 0 and 1 above the first k thresholds of the grid, and not the next.
        self.above = np.zeros((2, len(_GRID) + 1), np.int64)
        self.entropy = 0.0  # sum over the pixels
        self.images: list[ImageScores] = []  # in the order of their indices

    def add(self, index: int, name: str, probability: Probability, mask: Mask) -> None:
        """Scores one image: probabilities (K, H, W), as a `Predictor` gives them, and its mask."""
        found = classes(probability, self.threshold)
        confusion = ConfusionMatrix(self.confusion.classes)
        confusion.add(found, mask, ignore=IGNORE)
        self.confusion.merge(confusion)
        entropy = _entropy(probability, mask)
        self.entropy += entropy
        if len(self.table.values) == 2:
            self.above += _counts_above(probability[-1], mask)
        scores = {**_figures(confusion), "loss": entropy / max(int(confusion.counts.sum()), 1)}
        scores |= {
            f"dice {name}": float(v)
            for name, v in zip(class_names(self.table), confusion.dice, strict=True)
        }
        if self.isbi:
            cells = _as_isbi(probability, mask)
            one = IsbiMetrics(self.isbi.thresholds, self.isbi.warping)
            one.add(*cells, name)
            scores |= {key: float(v[0]) for key, v in one.curves().items()}
            self.isbi.merge(one)
            if self.tried:
                self.tried.add(*cells, name)
        packed = zlib.compress(found.tobytes(), 1)
        self.images.append(ImageScores(index, name, scores, mask.shape, packed))

    def merge(self, other: Evaluation) -> None:
        """Adds another share of the images: as if they had been added here."""
        if (self.table.values, self.threshold) != (other.table.values, other.threshold):
            raise InputError("cannot merge scores of different classes or thresholds")
        self.confusion.merge(other.confusion)
        self.entropy += other.entropy
        self.above += other.above
        for mine, theirs in ((self.isbi, other.isbi), (self.tried, other.tried)):
            if mine and theirs:
                mine.merge(theirs)
        self.images = sorted(self.images + other.images, key=lambda image: image.index)

    def scores(self) -> dict[str, float]:
        """Cross-entropy ("loss"), accuracy, mean Dice and IoU; of two classes the ISBI scores."""
        pixels = int(self.confusion.counts.sum())
        found = {"loss": self.entropy / max(pixels, 1), **_figures(self.confusion)}
        if self.isbi and self.isbi.slices:
            found |= {key: float(v[0]) for key, v in self.isbi.curves().items()}
        return found

    def challenge(self) -> dict[str, float]:
        """The ISBI scores, each at its own best threshold on these very images."""
        return self.tried.result() if self.tried and self.tried.slices else {}

    def best_threshold(self, score: Literal["dice", "v_rand"] = "dice") -> float:
        """The threshold with the highest mean Dice, of all pixels together, or mean V_Rand.

        Of equal ones that next to 0.5. It belongs in the model's `info["threshold"]`, where these
        are images that the model did not see. With more than two classes the most probable one is
        taken and no threshold is used: 0.5.

        Args:
            score: dice chooses among 0.01, 0.02, ..., 0.99; v_rand among the `thresholds`.
        """
        if len(self.table.values) != 2:
            return 0.5
        if score == "v_rand":
            if not self.tried:
                raise ValueError("V_Rand chooses among thresholds: evaluate with some")
            return _nearest_best(self.tried.thresholds, self.tried.curves()["v_rand"])
        dice = []
        for k in range(1, len(_GRID) + 1):
            confusion = ConfusionMatrix(2)
            below, above = self.above[:, :k].sum(1), self.above[:, k:].sum(1)
            confusion.counts = np.stack([below, above], axis=1)
            dice.append(confusion.mean_dice)
        return _nearest_best(_GRID, np.array(dice))

    def worst_first(self) -> list[ImageScores]:
        """The images by rising mean Dice; one without a pixel to score comes last."""
        return sorted(self.images, key=lambda image: (_known(image.scores["dice"]), image.index))

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class: its name, Dice, IoU, precision, recall, and share of the true pixels."""
        counts, right = self.confusion.counts, self.confusion.counts.diagonal()
        with np.errstate(invalid="ignore"):
            columns = {
                "dice": self.confusion.dice,
                "iou": self.confusion.iou,
                "precision": right / counts.sum(0),
                "recall": right / counts.sum(1),
                "share": counts.sum(1) / counts.sum(),
            }
        return [
            {"class": name, **{key: float(v[i]) for key, v in columns.items()}}
            for i, name in enumerate(class_names(self.table))
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, the worst image first; undefined scores are None."""
        found = {
            "images": len(self.images),
            "threshold": self.threshold,
            "scores": self.scores(),
            "challenge": self.challenge(),
            "classes": self.per_class(),
            "confusion": self.confusion.counts.tolist(),
            "per_image": [{"name": i.name, **i.scores} for i in self.worst_first()],
        }
        return {key: _jsonable(value) for key, value in found.items()}

    def lines(self, worst: int = 10) -> list[str]:
        """A table for people: classes, ISBI scores, and the worst images."""
        found, best = self.scores(), self.challenge()
        width = max(5, *(len(name) for name in class_names(self.table)))
        row = f"{{:>{width}}}" + "{:>11}" * 5
        count, pixels = len(self.images), self.confusion.counts.sum()
        lines = [
            f"{counted(count, 'image')}, {counted(int(pixels), 'pixel')}"
            + (f", threshold {self.threshold:g}" if self.isbi else ""),
            "",
            row.format("class", "Dice", "IoU", "precision", "recall", "share"),
        ]
        for one in self.per_class():
            keys = ("dice", "iou", "precision", "recall", "share")
            lines.append(row.format(one["class"], *(f"{one[key]:.4f}" for key in keys)))
        lines.append(row.format("mean", f"{found['dice']:.4f}", f"{found['iou']:.4f}", "", "", ""))
        lines.append(f"accuracy {found['accuracy']:.4f}, cross-entropy {found['loss']:.4f}")
        if self.isbi:
            header = ("ISBI 2012", "score", "precision", "recall")
            lines += ["", "{:13}{:>11}{:>11}{:>11}".format(*header) + ("  best" if best else "")]
        for key, name in _NAMES.items():
            if key in found:
                parts = (found.get(key + end) for end in ("", "_precision", "_recall"))
                line = "".join(f"{'' if v is None else f'{v:.5f}':>11}" for v in parts)
                if best:
                    line += f"  {best[key]:.5f} at {best[f'{key}_threshold']:g}"
                lines.append(f"{name:13}{line}")
        shown = [key for key in ("dice", "iou", "accuracy", "v_rand", "v_info") if key in found]
        lines += ["", "".join(f"{key:>10}" for key in shown) + "  worst images"]
        for image in self.worst_first()[:worst]:
            figures = "".join(f"{image.scores[key]:10.4f}" for key in shown)
            lines.append(f"{figures}  {image.name}")
        return lines


def evaluate(
    predict: Predictor,
    data: SegmentationData,
    indices: Sequence[int],
    *,
    threshold: float = 0.5,
    thresholds: Sequence[float] = THRESHOLDS,
    warping: bool = False,
) -> Evaluation:
    """Predicts images of the data and scores them against their masks.

    Each model normalises the images as it was trained; the masks are read with the data's class
    table, which must be the models'. With two classes ignored pixels count as membrane, in mask
    and prediction alike, where the ISBI scores look at connected parts.

    Args:
        indices: of the images, such as `data.val`; of several processes, each gives its share and
            merges what the others found.
        threshold, thresholds, warping: as for `Evaluation`.

    Raises:
        InputError: no image.
    """
    if not indices:
        raise InputError("there is no image to score")
    found = Evaluation(data.table, threshold, thresholds=thresholds, warping=warping)
    for i in tqdm(indices, unit="image", desc="scoring", leave=False, disable=None):
        probability = predict(RasterSource(data.pairs[i].read_image(), data.pairs[i].info.nodata))
        found.add(i, data.pairs[i].name, probability, data.load(i)[1])
    return found


def _counts_above(probability: NDArray[np.floating[Any]], mask: Mask) -> NDArray[np.int64]:
    """(2, 100): pixels of each class by the number of thresholds of the grid that they exceed."""
    grid = np.array(_GRID, probability.dtype)
    exceeded = np.searchsorted(grid, probability)
    counts = [np.bincount(exceeded[mask == k], minlength=len(grid) + 1) for k in (0, 1)]
    return np.array(counts, np.int64)


def _nearest_best(thresholds: Sequence[float], scores: NDArray[np.float64]) -> float:
    if np.isnan(scores).all():
        return 0.5
    best = np.array(thresholds)[scores >= np.nanmax(scores) - 1e-12]
    return float(best[abs(best - 0.5).argmin()])


def _entropy(probability: Probability, mask: Mask) -> float:
    """Cross-entropy in nats, summed over the pixels that count; probabilities (K, H, W)."""
    valid = mask != IGNORE
    p = probability if len(probability) > 1 else np.concatenate([1 - probability, probability])
    true = np.take_along_axis(p, np.where(valid, mask, 0)[None].astype(np.int64), axis=0)[0]
    return -float(np.log(np.maximum(true[valid], 1e-7), dtype=np.float64).sum())


def _figures(confusion: ConfusionMatrix) -> dict[str, float]:
    return {
        "dice": confusion.mean_dice,
        "iou": confusion.mean_iou,
        "accuracy": confusion.accuracy,
    }


def _as_isbi(probability: Probability, mask: Mask) -> tuple[Probability, Mask]:
    """Probability and label of cell (H, W), as the challenge has them."""
    # The weights of overlapping tiles add up to 1 but for rounding.
    cell = np.where(mask == IGNORE, 0, np.clip(probability[-1], 0, 1))
    return cell, (mask == 1).astype(np.uint8)


def _known(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _jsonable(value: Any) -> Any:
    """`value` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
