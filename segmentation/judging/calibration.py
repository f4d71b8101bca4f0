"""Whether probabilities are calibrated: calibration error, Brier score, and the temperature.

Of two classes the probability of the second one is judged, against whether a pixel is of it; of
more that of the most probable class, against whether it is the right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, logsumexp

from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor, Probability, temperature
from segmentation.segmenter import RasterSource
from unet.errors import InputError
from unet.files.pages import Array

BINS = 15
MOST_PIXELS = 2**20  # that a temperature is fitted on
_RANGE = (0.05, 20.0)  # of temperatures
_LEAST = 1e-7  # probability, about what float32 can tell from 0 beside 1


class Calibration:
    """Probabilities of pixels in BINS bins of equal width, summed over images.

    Attributes:
        counts, predicted, observed: (BINS,) pixels, and the sums of their probabilities and of what
            came true.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts, self.predicted, self.observed = np.zeros((3, BINS))
        self.squares = 0.0

    def add(self, probability: Probability, mask: NDArray[np.uint8]) -> None:
        """Counts an image: probabilities (K, H, W) and its class indices (H, W)."""
        valid = mask != IGNORE
        p, true = full(probability)[:, valid].astype(np.float64), mask[valid]
        if self.classes == 2:
            judged, right = p[1], true == 1
            self.squares += float(((judged - right) ** 2).sum())
        else:
            judged, right = p.max(axis=0), p.argmax(axis=0) == true
            of_true = np.take_along_axis(p, true[None].astype(np.int64), axis=0)[0]
            self.squares += float(((p**2).sum(axis=0) - 2 * of_true + 1).sum())
        bins = np.clip((judged * BINS).astype(int), 0, BINS - 1)
        for total, values in (
            (self.counts, None),
            (self.predicted, judged),
            (self.observed, right),
        ):
            total += np.bincount(bins, values, minlength=BINS)

    def merge(self, other: Calibration) -> None:
        """Adds another share of the images."""
        self.counts = self.counts + other.counts
        self.predicted = self.predicted + other.predicted
        self.observed = self.observed + other.observed
        self.squares += other.squares

    def scores(self) -> dict[str, float]:
        """Expected calibration error and Brier score; nothing where no pixel was counted.

        The error is the mean over the pixels of |mean probability - share that came true| of their
        bin (arXiv 1706.04599, eq. 3). The Brier score is the mean square of the difference to 0 or
        1: of two classes that of the second one's probability, of more the sum over the classes.
        """
        pixels = self.counts.sum()
        if not pixels:
            return {}
        error = np.abs(self.predicted - self.observed).sum() / pixels
        return {"ece": float(error), "brier": self.squares / float(pixels)}

    def bins(self) -> list[dict[str, float]]:
        """Of each bin that has pixels: how many, mean probability, and share that came true."""
        return [
            {"pixels": float(n), "predicted": float(p / n), "observed": float(o / n)}
            for n, p, o in zip(self.counts, self.predicted, self.observed, strict=True)
            if n
        ]


def full(probability: Probability) -> Probability:
    """Probabilities (K, H, W) with K of at least 2: a single one is that of class 1."""
    if len(probability) > 1:
        return probability
    return np.concatenate([1 - probability, probability])


def fit_temperature(probability: NDArray[np.float64], true: NDArray[np.uint8]) -> float:
    """The temperature T that makes softmax(log p / T) most likely (arXiv 1706.04599, eq. 9).

    Args:
        probability: (K, N).
        true: (N,), the class of each.
    """
    logs = np.log(np.maximum(probability, _LEAST))
    of_true = np.take_along_axis(logs, true[None].astype(np.int64), axis=0)[0]

    def unlikely(beta: float) -> float:  # convex in 1 / T
        return float((logsumexp(beta * logs, axis=0) - beta * of_true).mean())

    bounds = (1 / _RANGE[1], 1 / _RANGE[0])
    return float(1 / minimize_scalar(unlikely, bounds=bounds, method="bounded").x)


def calibrate(model: SegmentationUNet, data: SegmentationData, indices: Sequence[int]) -> None:
    """Fits the model's temperature on images of the data, and enters it into its `info`.

    Between two classes the threshold becomes the probability that it is now, so that masks stay.

    Args:
        indices: of images that the model was not trained on.

    Raises:
        InputError: they have no pixel that counts.
    """
    former = temperature(model)
    model.info["temperature"] = 1.0
    predict, chosen, true = Predictor([model]), [], []
    most = max(1, MOST_PIXELS // len(indices))
    for i in indices:
        pair, mask = data.pairs[i], data.load(i)[1]
        p = full(predict(RasterSource(pair.read_image(), data.nodata(i))))
        places = np.flatnonzero(mask != IGNORE)
        places = places[:: -(-len(places) // most) or 1]
        chosen.append(p.reshape(len(p), -1)[:, places])
        true.append(mask.ravel()[places])
    labels = np.concatenate(true)
    if not labels.size:
        raise InputError("no pixel of these images has a label: a temperature needs some")
    found = fit_temperature(np.concatenate(chosen, axis=1).astype(np.float64), labels)
    model.info["temperature"] = found
    if len(data.table.values) == 2:
        threshold = logit(model.info["threshold"]) * former / found
        model.info["threshold"] = float(expit(threshold))
    model.info["calibration"] = {
        "images": sorted({fingerprint(data.pairs[i].read_image()) for i in indices}),
        "names": [data.pairs[i].name for i in indices][:100],
    }


def fitted_on(models: Sequence[SegmentationUNet]) -> set[str]:
    """The fingerprints of the images that the temperature of some model was fitted on.

    Raises:
        InputError: a damaged model.
    """
    found: set[str] = set()
    for model in models:
        said: Any = model.info.get("calibration", {})
        images = said.get("images", []) if isinstance(said, dict) else None
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise InputError("a model's calibration in its config.json lists no images")
        found.update(images)
    return found


def fingerprint(image: Array) -> str:
    """What tells an image (H, W, C) from others, whatever its file is called."""
    found = hashlib.sha256(f"{image.shape} {image.dtype}".encode())
    found.update(np.ascontiguousarray(image).tobytes())
    return found.hexdigest()[:16]
