"""Scores of a model on labelled images: of the whole set, of each image, and the threshold to use.

Every number of classes has Dice, IoU and accuracy; of two classes they are at the threshold in use.
If one of them is cells between thin membranes, there are also the scores of the ISBI 2012 challenge
for the cells: at the threshold in use, and each at its own best one, as the challenge reports them.
Of numbered objects there are the scores of objects (`segmentation.judging.instances`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from segmentation.data.classes import IGNORE, ClassTable, class_names
from segmentation.data.dataset import SegmentationData
from segmentation.data.depths import Depth, grown, markers
from segmentation.data.instances import instances_from_classes, without_small
from segmentation.data.regions import Regions
from segmentation.judging.calibration import Calibration, fingerprint, fitted_on, full
from segmentation.judging.instances import Numbers, Overlaps
from segmentation.judging.isbi import THRESHOLDS, IsbiMetrics
from segmentation.judging.metrics import ConfusionMatrix, mean_known
from segmentation.predict import Predictor, Probability, classes
from segmentation.segmenter import RasterSource, smallest_object
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
LISTED = ("ap50", "ap", "pq", "dice", "iou", "accuracy", "v_rand", "v_info")  # of each image
_GRID = tuple(i / 100 for i in range(1, 100))  # thresholds to choose from
COARSE = _GRID[4::5]  # where each costs a watershed
OBJECTS = (0.3, 0.4, 0.5, 0.6, 0.7)  # of what is an object: further out, few are found


@dataclass(frozen=True)
class ImageScores:
    """One image's scores, by name, and what was predicted."""

    index: int  # in the data
    name: str
    scores: dict[str, float]
    shape: tuple[int, int]
    packed: bytes  # the predicted classes, deflated: a fiftieth of them
    packed_objects: bytes = b""  # and the objects, where the masks number some
    packed_regions: bytes = b""  # and where each region is, of a model of regions

    @property
    def prediction(self) -> Mask:
        """Predicted class indices (H, W)."""
        return np.frombuffer(zlib.decompress(self.packed), np.uint8).reshape(self.shape)

    @property
    def regions(self) -> NDArray[np.bool_] | None:
        """Where (R, H, W) each region was found, None of a model of classes."""
        if not self.packed_regions:
            return None
        return np.frombuffer(zlib.decompress(self.packed_regions), bool).reshape(-1, *self.shape)

    @property
    def objects(self) -> NDArray[np.int32] | None:
        """Numbers (H, W) of the objects that were found, None where the masks number none."""
        if not self.packed_objects:
            return None
        return np.frombuffer(zlib.decompress(self.packed_objects), np.int32).reshape(self.shape)


class Evaluation:
    """Scores accumulated over images; those of several processes can be merged.

    Args:
        threshold: above which a pixel is of the second of two classes.
        thresholds: at which the ISBI scores are tried for `challenge`, beside the threshold in use:
            half a second for 512 x 512 pixels; none: not tried. Where depth parts objects, at which
            these are tried, beside the threshold in use.
        cells: which of two classes is cells between membranes; None: there are no ISBI scores.
        warping: also count the warping error, which takes seconds for each image and threshold.
        smallest: of objects: those that were found with fewer pixels do not count.
        regions: what is found instead of the table's classes: Dice, IoU and loss are theirs, the
            confusion and the accuracy those of the label map.
    """

    def __init__(
        self,
        table: ClassTable,
        threshold: float = 0.5,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        cells: int | None = None,
        warping: bool = False,
        smallest: int = 0,
        regions: Regions | None = None,
    ) -> None:
        table = regions.table if regions else table
        self.table, self.threshold, self.smallest = table, threshold, smallest
        self.regions = regions
        self.by_region = [ConfusionMatrix(2) for _ in regions.names] if regions else []
        self.tried = sorted({threshold, *thresholds})  # for objects
        # Of the images that came with numbered objects, at each threshold.
        self.at_each: dict[float, Overlaps] = {}
        self.confusion = ConfusionMatrix(len(table.values))
        self.isbi: IsbiMetrics | None = None
        if self.has_threshold and cells is not None:
            self.isbi = IsbiMetrics(sorted({threshold, *thresholds}), warping, cells=cells)
        # Pixels of class 0 and 1 above the first k thresholds of the grid, and not the next.
        self.above = np.zeros((2, len(_GRID) + 1), np.int64)
        self.entropy = 0.0  # sum over the pixels
        self.calibration = Calibration(len(table.values))
        self.fitted = 0  # images that tell nothing of it, as the temperature was fitted on them
        self.images: list[ImageScores] = []  # in the order of their indices

    @property
    def objects(self) -> Overlaps | None:
        """Of the images that came with numbered objects, at the threshold in use."""
        return self.at_each.get(self.threshold)

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold separates the classes; of more than two the most probable is
        taken."""
        return len(self.table.values) == 2

    def add(
        self,
        index: int,
        name: str,
        probability: Probability,
        mask: Mask,
        objects: Numbers | None = None,
        depth: Depth | None = None,
        *,
        fitted: bool = False,
    ) -> None:
        """Scores one image: probabilities (K, H, W), as a `Predictor` gives them, and its mask.

        Args:
            objects: numbers (H, W) of the objects in the mask, where the classes are of such.
            fitted: a temperature was fitted on it, so that it does not count for the calibration.
            depth: (H, W), which separates predicted objects; None: their border class does.
        """
        by_region: list[ConfusionMatrix] = []
        found = classes(probability, self.threshold, self.regions)
        if self.regions:
            entropy = _entropy_of_regions(probability, self.regions.true(mask))
            by_region = self._of_regions(probability, mask)
            for whole, part in zip(self.by_region, by_region, strict=True):
                whole.merge(part)
            mask = self.regions.true_map(mask)
        else:
            entropy = _entropy(probability, mask)
            if fitted:
                self.fitted += 1
            else:
                self.calibration.add(probability, mask)
        confusion = ConfusionMatrix(self.confusion.classes)
        confusion.add(found, mask, ignore=IGNORE)
        self.confusion.merge(confusion)
        self.entropy += entropy
        if self.has_threshold:
            self.above += _counts_above(probability[-1], mask)
        scores = _figures(confusion, by_region)
        scores |= {"loss": entropy / max(int(confusion.counts.sum()), 1)}
        dice = _of_true(confusion, "dice")
        if by_region:
            dice = np.array([_of_true(one, "dice")[1] for one in by_region])
        scores |= {f"dice {kind}": float(v) for kind, v in zip(self.kinds, dice, strict=True)}
        if self.isbi:
            one = IsbiMetrics(self.isbi.thresholds, self.isbi.warping, cells=self.isbi.cells)
            one.add(*_as_isbi(probability, mask, self.isbi.cells), name)
            scores |= one.at(self.threshold)
            self.isbi.merge(one)
        packed = {"packed": zlib.compress(found.tobytes(), 1)}
        if self.regions:
            inside = self.regions.found(probability, self.threshold)
            packed["packed_regions"] = zlib.compress(inside.tobytes(), 1)
        if objects is not None:
            for threshold, parted in self._parted(found, probability, depth):
                here = Overlaps.of(parted, objects)
                self.at_each[threshold] = here + self.at_each.get(threshold, Overlaps())
                if threshold == self.threshold:
                    scores |= here.scores()
                    packed["packed_objects"] = zlib.compress(parted.tobytes(), 1)
        self.images.append(ImageScores(index, name, scores, mask.shape, **packed))

    @property
    def kinds(self) -> list[str]:
        """The names of what is found: classes or regions."""
        return list(self.regions.names) if self.regions else class_names(self.table)

    def _of_regions(self, probability: Probability, mask: Mask) -> list[ConfusionMatrix]:
        """Of each region, whether pixels are in it."""
        assert self.regions is not None
        each = [ConfusionMatrix(2) for _ in self.regions.names]
        found = self.regions.found(probability, self.threshold)
        for one, inside, true in zip(each, found, self.regions.true(mask), strict=True):
            one.add(inside, true, ignore=IGNORE)
        return each

    def _parted(
        self, found: Mask, probability: Probability, depth: Depth | None
    ) -> Iterator[tuple[float, NDArray[np.int32]]]:
        """The objects that are found at each threshold; of a border class at the one in use."""
        if depth is None:
            yield self.threshold, without_small(instances_from_classes(found), self.smallest)
            return
        middles = markers(depth)
        for threshold in self.tried:
            objects = grown(middles, probability[0] > threshold, depth)
            yield threshold, without_small(objects, self.smallest)

    def merge(self, other: Evaluation) -> None:
        """Adds another share of the images: as if they had been added here."""
        if (self.table.values, self.threshold) != (other.table.values, other.threshold):
            raise InputError("cannot merge scores of different classes or thresholds")
        self.confusion.merge(other.confusion)
        for mine, theirs in zip(self.by_region, other.by_region, strict=True):
            mine.merge(theirs)
        self.entropy += other.entropy
        self.calibration.merge(other.calibration)
        self.fitted += other.fitted
        self.above += other.above
        if self.isbi and other.isbi:
            self.isbi.merge(other.isbi)
        for threshold, overlaps in other.at_each.items():
            self.at_each[threshold] = overlaps + self.at_each.get(threshold, Overlaps())
        self.images = sorted(self.images + other.images, key=lambda image: image.index)

    def scores(self, threshold: float | None = None) -> dict[str, float]:
        """Cross-entropy ("loss"), accuracy, mean Dice and IoU, `Calibration.scores`; of cells the
        ISBI scores; of objects those of `Overlaps.scores`.

        Args:
            threshold: instead of that in use: 0.01, 0.02, ..., 0.99, and where there are ISBI
                scores or objects one of those tried. The cross-entropy has none.
        """
        pixels, confusion = int(self.confusion.counts.sum()), self.confusion
        if threshold is None or not self.has_threshold:
            threshold = self.threshold
        elif threshold != self.threshold:
            confusion = self._confusion_at(_GRID.index(threshold))
        found = {"loss": self.entropy / max(pixels, 1), **_figures(confusion, self.by_region)}
        found |= self.calibration.scores()
        if self.isbi and self.isbi.slices:
            found |= self.isbi.at(threshold)
        if self.at_each:
            found |= self.at_each[
                threshold if threshold in self.at_each else self.threshold
            ].scores()
        return found

    def _confusion_at(self, k: int) -> ConfusionMatrix:
        """Of all pixels together, at the k-th threshold of the grid."""
        confusion = ConfusionMatrix(2)
        below, above = self.above[:, : k + 1].sum(1), self.above[:, k + 1 :].sum(1)
        confusion.counts = np.stack([below, above], axis=1)
        return confusion

    def challenge(self) -> dict[str, float]:
        """The ISBI scores, each at its own best threshold on these very images.

        The threshold in use is among those that were tried: no score is better than its best.
        """
        tried = self.isbi and self.isbi.slices and len(self.isbi.thresholds) > 1
        return self.isbi.result() if self.isbi and tried else {}

    def best_threshold(self, score: Literal["dice", "v_rand", "ap"] = "dice") -> float:
        """The threshold with the highest mean Dice, of all pixels together, mean V_Rand, or average
        precision of objects.

        Of equal ones that next to 0.5. It belongs in the model's `info["threshold"]`, where these
        are images that the model did not see. 0.5 where nothing can be chosen: the masks have one
        of the two classes only, or there are more, of which the most probable one is taken.

        Args:
            score: dice chooses among 0.01, 0.02, ..., 0.99; the others among the `thresholds`.
        """
        if not self.has_threshold or not self.confusion.occurs.all():
            return 0.5
        if score == "ap":
            ap = [self.at_each[threshold].scores()["ap"] for threshold in self.tried]
            return _nearest_best(self.tried, np.array(ap))
        if score == "v_rand":
            if not self.isbi:
                raise ValueError("V_Rand is of cells: evaluate with cells")
            return _nearest_best(self.isbi.thresholds, self.isbi.curves()["v_rand"])
        dice = [self._confusion_at(k).mean_dice for k in range(len(_GRID))]
        return _nearest_best(_GRID, np.array(dice))

    def missing(self) -> list[str]:
        """The names of the classes that no mask has; none before an image is added."""
        occurs, any_pixel = self._occurs(), self.confusion.occurs.any()
        names = zip(self.kinds, occurs, strict=True)
        return [name for name, there in names if not there] if any_pixel else []

    def _occurs(self) -> NDArray[np.bool_]:
        """Whether masks have each class or region."""
        if self.regions:
            return np.array([one.occurs[1] for one in self.by_region])
        return self.confusion.occurs

    def never_predicted(self) -> list[str]:
        """The names of classes that occur in masks but were predicted for no pixel."""
        predicted = self.confusion.counts.sum(0)
        if self.regions:
            predicted = np.array([one.counts[:, 1].sum() for one in self.by_region])
        never = self._occurs() & (predicted == 0)
        return [name for name, so in zip(self.kinds, never, strict=True) if so]

    @property
    def ranked_by(self) -> str:
        """The score that images are ranked by: mean Dice, of objects average precision."""
        return "ap" if self.objects else "dice"

    def worst_first(self) -> list[ImageScores]:
        """The images by rising score; one in which there is nothing to score comes last."""
        key = self.ranked_by
        return sorted(self.images, key=lambda image: (_known(image.scores[key]), image.index))

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class, or region: its name, Dice, IoU, precision, recall, and share of the true
        pixels.

        Dice, IoU and recall are NaN of a class that no mask has.
        """
        if self.regions:
            each = zip(self.kinds, self.by_region, strict=True)
            return [{"class": name, **_columns(one)[1]} for name, one in each]
        each_class = zip(self.kinds, _columns(self.confusion), strict=True)
        return [{"class": name, **columns} for name, columns in each_class]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, the worst image first; undefined scores are None."""
        found = {
            "images": len(self.images),
            **({"threshold": self.threshold} if self.has_threshold else {}),
            "scores": self.scores(),
            "challenge": self.challenge(),
            **({"precision": self.objects.precision()} if self.objects else {}),
            "classes": self.per_class(),
            "reliability": self.calibration.bins(),
            "calibrated_on": self.fitted,
            "confusion": self.confusion.counts.tolist(),
            "per_image": [{"name": i.name, **i.scores} for i in self.worst_first()],
        }
        return {key: _jsonable(value) for key, value in found.items()}

    def lines(self, worst: int = 10) -> list[str]:
        """A printable table: classes, ISBI scores, and the worst images."""
        found, best = self.scores(), self.challenge()
        width = max(6, *(len(name) for name in self.kinds))
        row = f"{{:>{width}}}" + "{:>11}" * 5
        count, pixels = len(self.images), self.confusion.counts.sum()
        lines = [
            f"{counted(count, 'image')}, {counted(int(pixels), 'pixel')}"
            + (f", threshold {self.threshold:g}" if self.has_threshold else ""),
            "",
            row.format(
                "region" if self.regions else "class", "Dice", "IoU", "precision", "recall", "share"
            ),
        ]
        for one in self.per_class():
            keys = ("dice", "iou", "precision", "recall", "share")
            lines.append(row.format(one["class"], *(_shown(one[key]) for key in keys)))
        lines.append(row.format("mean", f"{found['dice']:.4f}", f"{found['iou']:.4f}", "", "", ""))
        of = " of the label map" if self.regions else ""
        lines.append(f"accuracy{of} {found['accuracy']:.4f}, cross-entropy {found['loss']:.4f}")
        if "ece" in found:
            judged = (
                f"of {class_names(self.table)[1]}" if self.has_threshold else "of the top class"
            )
            lines.append(
                f"probabilities {judged}: calibration error {found['ece']:.4f} (15 bins), Brier "
                f"score {found['brier']:.4f}"
            )
        if self.fitted:
            lines.append(
                f"the temperature was fitted on {counted(self.fitted, 'image')} of these, left "
                "out of the calibration figures"
            )
        if missing := self.missing():
            lines.append(f"no mask has {', '.join(missing)}: left out of the means")
        if never := self.never_predicted():
            lines.append(f"no pixel was predicted as {' or '.join(never)}")
        if self.objects:
            lines += ["", *_object_lines(found)]
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
        if self.isbi:
            lines += [
                f"of the cells, {class_names(self.table)[self.isbi.cells]}. V_Rand and V_Info are "
                "F-scores after the borders are thinned, averaged over the images.",
                "Rand error: 1 - F-score of the pairs of pixels in one cell; pixel error: 1 - "
                "F-score of the cell pixels, not the share of wrong pixels.",
            ]
            if best:
                count = len(self.isbi.thresholds)
                lines.append(
                    f"best: each at its best of {count} thresholds, chosen on these images"
                )
        shown = [key for key in LISTED if key in found]
        lines += ["", "".join(f"{key:>10}" for key in shown) + "  worst images"]
        for image in self.worst_first()[:worst]:
            figures = "".join(f"{_shown(image.scores[key]):>10}" for key in shown)
            lines.append(f"{figures}  {image.name}")
        return lines


def evaluate(
    predict: Predictor,
    data: SegmentationData,
    indices: Sequence[int],
    *,
    threshold: float = 0.5,
    thresholds: Sequence[float] = THRESHOLDS,
    cells: int | None = None,
    warping: bool = False,
) -> Evaluation:
    """Predicts images of the data and scores them against their masks.

    Each model normalises the images as it was trained; the masks are read with the data's class
    table, which must be the models'. With two classes ignored pixels count as membrane, in mask
    and prediction alike, where the ISBI scores look at connected parts.

    Args:
        indices: of the images, such as `data.val`; of several processes, each gives its share and
            merges what the others found.
        threshold, thresholds, cells, warping: as for `Evaluation`.

    Raises:
        InputError: no image.
    """
    if not indices:
        raise InputError("there is no image to score")
    found = Evaluation(
        data.table,
        threshold,
        thresholds=() if data.instances else thresholds,
        cells=cells,
        warping=warping,
        smallest=smallest_object(predict.models) if data.instances else 0,
        regions=data.regions,
    )
    known = fitted_on(predict.models)
    for i in tqdm(indices, unit="image", desc="scoring", leave=False, disable=None):
        image = data.pairs[i].read_image()
        probability, depth = predict.found(RasterSource(image, data.nodata(i)))
        objects = data.objects(i) if data.instances else None
        fitted = bool(known) and fingerprint(image) in known
        name, mask = data.pairs[i].name, data.load(i)[1]
        found.add(i, name, probability, mask, objects, depth, fitted=fitted)
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
    p = full(probability)
    true = np.take_along_axis(p, np.where(valid, mask, 0)[None].astype(np.int64), axis=0)[0]
    return -float(np.log(np.maximum(true[valid], 1e-7), dtype=np.float64).sum())


def _entropy_of_regions(probability: Probability, true: NDArray[np.uint8]) -> float:
    """Binary cross-entropy in nats, its mean over the regions (R, H, W), summed over the pixels."""
    p = np.where(true == 1, probability, 1 - probability)[true != IGNORE]
    return -float(np.log(np.maximum(p, 1e-7), dtype=np.float64).sum()) / len(true)


def _columns(confusion: ConfusionMatrix) -> list[dict[str, float]]:
    """Scores of each class."""
    counts, right = confusion.counts, confusion.counts.diagonal()
    with np.errstate(invalid="ignore"):
        columns = {
            "dice": _of_true(confusion, "dice"),
            "iou": _of_true(confusion, "iou"),
            "precision": right / counts.sum(0),
            "recall": right / counts.sum(1),
            "share": counts.sum(1) / counts.sum(),
        }
    return [{key: float(v[i]) for key, v in columns.items()} for i in range(confusion.classes)]


def _figures(
    confusion: ConfusionMatrix, by_region: Sequence[ConfusionMatrix] = ()
) -> dict[str, float]:
    """Mean Dice and IoU, of regions those of the ones that masks have; and accuracy."""
    if by_region:
        dice, iou = (
            mean_known(_of_true(one, score)[1] for one in by_region) for score in ("dice", "iou")
        )
        return {"dice": dice, "iou": iou, "accuracy": confusion.accuracy}
    return {
        "dice": confusion.mean_dice,
        "iou": confusion.mean_iou,
        "accuracy": confusion.accuracy,
    }


def _as_isbi(probability: Probability, mask: Mask, cells: int) -> tuple[Probability, Mask]:
    """Probability and label of class 1 (H, W); ignored pixels are membrane in both."""
    ignored = mask == IGNORE
    # The weights of overlapping tiles add up to 1 but for rounding.
    found = np.where(ignored, 1 - cells, np.clip(probability[-1], 0, 1))
    return found.astype(probability.dtype), np.where(ignored, 1 - cells, mask)


def _of_true(confusion: ConfusionMatrix, score: Literal["dice", "iou"]) -> NDArray[np.float64]:
    """The score of each class (K,); NaN of those that the truth does not have."""
    return np.where(confusion.occurs, getattr(confusion, score), np.nan)


def _object_lines(found: dict[str, float]) -> list[str]:
    """Scores of objects as a table."""
    rows = (
        ("AP 0.5", "ap50", "at IoU 0.5: TP / (TP + FP + FN)"),
        ("AP 0.75", "ap75", "at IoU 0.75"),
        ("mean AP", "ap", "at IoU 0.5, 0.55, ..., 0.95"),
        ("PQ", "pq", f"SQ {_shown(found['sq'])} x RQ {_shown(found['rq'])}"),
        ("AJI", "aji", "aggregated Jaccard index"),
    )
    return [
        f"{found['objects']:.0f} objects, {found['found']:.0f} found; the two counts differ by "
        f"{found['count_error']:.1f} per image on average",
        *(f"{name:10}{_shown(found[key]):>8}  {what}" for name, key, what in rows),
    ]


def _shown(score: float) -> str:
    return "-" if math.isnan(score) else f"{score:.4f}"


def _known(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _jsonable(value: Any) -> Any:
    """`value` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
