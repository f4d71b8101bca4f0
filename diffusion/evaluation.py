"""Samples judged: distances between features, classes, memorisation, bits per dimension."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.data import DiffusionData
from diffusion.denoiser import Clipped, Denoiser
from diffusion.features import ClassifierFeatures, FeatureExtractor
from diffusion.metrics import (
    frechet_distance,
    kernel_distance,
    memorisation,
    moments,
    precision_recall,
    sample_warnings,
)
from diffusion.model import DiffusionUNet
from diffusion.prediction import bits_per_dim
from diffusion.report import MOST_BYTES, MOST_COMPARED, spread
from diffusion.sampling import Images, ImageSampler
from diffusion.schedule import CLEAN, NoiseSchedule, NoiseSource
from unet.errors import InputError

MOST_REAL = 10_000  # images that features are taken of


class Judge:
    """The real images and what is known of their features, to compare samples with.

    Args:
        data: real images.
        extractor: None: only memorisation is judged.
    """

    def __init__(self, data: DiffusionData, extractor: FeatureExtractor | None) -> None:
        self.data, self.extractor = data, extractor
        everything = [*data.train, *data.val]
        rng = np.random.default_rng(0)
        self.real = [everything[i] for i in rng.permutation(len(everything))[:MOST_REAL]]
        if extractor is not None:
            self.features = extractor(data.images(self.real))
            self.moments = moments(self.features)
        size = data.channels * data.size[0] * data.size[1]
        self.held_out = data.images(data.val)
        self.training = data.images(spread(data.train, min(MOST_COMPARED, MOST_BYTES // size)))

    def __call__(
        self, samples: Images, classes: Sequence[int] | None, names: Sequence[str]
    ) -> dict[str, Any]:
        """Figures of samples uint8 (N, H, W, C); `classes` are those asked for, of `names`."""
        found: dict[str, Any] = {"samples": len(samples)}
        notes: list[str] = []
        if self.extractor is not None:
            features = self.extractor(samples)
            found["real"] = len(self.real)
            found[self.extractor.frechet_name] = frechet_distance(self.moments, moments(features))
            kernel = kernel_distance(self.features, features)
            found[self.extractor.kernel_name] = kernel.mean
            found["its spread"] = kernel.std
            equal = min(len(features), len(self.features))
            precision, recall = precision_recall(self.features[:equal], features[:equal])
            found |= {"precision": precision, "recall": recall}
            notes += sample_warnings(len(self.real), len(samples), features.shape[1])
            if isinstance(self.extractor, ClassifierFeatures) and classes is not None:
                found["class accuracy"] = self._accuracy(self.extractor, samples, classes, names)
        try:
            near = memorisation(samples, self.held_out, self.training)
        except InputError as error:
            return {**found, "notes": [*notes, str(error)]}
        found |= {
            "distance to training images / held out": near.ratio,
            "likely copies": near.copies,
        }
        notes += [near.warning] if near.warning else []
        return {**found, "notes": notes}

    def _accuracy(
        self,
        classifier: ClassifierFeatures,
        samples: Images,
        classes: Sequence[int],
        names: Sequence[str],
    ) -> float:
        """Share of the samples that the classifier takes for the class asked for."""
        if set(names) - set(classifier.classes):
            raise InputError(
                f"{classifier.name} knows {', '.join(classifier.classes)}, but the model makes "
                f"{', '.join(names)}: give a classifier of the same classes"
            )
        asked = [classifier.classes.index(names[c]) for c in classes]
        return float(np.mean(classifier.classify(samples) == np.array(asked)))


def held_out_bits(model: DiffusionUNet, data: DiffusionData, count: int, seed: int) -> float:
    """The variational bound in bits per dimension, mean over `count` held-out images.

    All noise levels are gone through; the variance is the learned one where there is one, else
    fixed-large (DDPM, sec. 3.2).
    """
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    # The image is clipped, as in the code of DDPM (clip_denoised).
    denoiser = Clipped(Denoiser(model, schedule, model.info["prediction"]))
    x0, labels = data.batch(data.val[:count])
    device = next(model.parameters()).device
    given = {"classes": labels.to(device)} if model.config.classes else {}
    learned = model.out_channels > x0.shape[1]
    bound = bits_per_dim(
        denoiser,
        x0.to(device),
        range(schedule.steps - 1, CLEAN, -1),
        NoiseSource(range(seed, seed + len(x0))),
        variance="learned" if learned else "fixed-large",
        **given,
    )
    return float(bound.total.mean())


def timed_samples(sampler: ImageSampler, count: int) -> tuple[Images, list[int] | None, float]:
    """`count` samples, of every class in turn, their classes, and the seconds that they took."""
    known = len(sampler.classes)
    classes = [i % known for i in range(count)] if known else None
    start = time.perf_counter()
    images = sampler(count, classes)
    return images, classes, time.perf_counter() - start
