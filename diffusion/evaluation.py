"""Samples judged: distances between features, classes, memorisation, bits per dimension."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

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
from diffusion.options import SamplingOptions
from diffusion.prediction import bits_per_dim
from diffusion.report import MOST_BYTES, MOST_COMPARED, spread
from diffusion.sampling import Images, ImageSampler, Wanted
from diffusion.schedule import CLEAN, NoiseSchedule, NoiseSource
from unet.errors import InputError

MOST_REAL = 10_000  # images that features are taken of
PART = 500  # of them at a time


class Judge:
    """The real images and what is known of their features, to compare samples with.

    Args:
        data: real images.
        extractor: None: only memorisation is judged.
        names: of the classes that will be asked for.

    Raises:
        InputError: a classifier of other classes.
    """

    def __init__(
        self, data: DiffusionData, extractor: FeatureExtractor | None, names: Sequence[str] = ()
    ) -> None:
        self.data, self.extractor, self.names = data, extractor, names
        if isinstance(extractor, ClassifierFeatures) and set(names) - set(extractor.classes):
            raise InputError(
                f"{extractor.name} knows {', '.join(extractor.classes)}, but the model makes "
                f"{', '.join(names)}: give a classifier of the same classes"
            )
        everything = [*data.train, *data.val]
        rng = np.random.default_rng(0)
        self.real = [everything[i] for i in rng.permutation(len(everything))[:MOST_REAL]]
        if extractor is not None:
            parts = (self.real[i : i + PART] for i in range(0, len(self.real), PART))
            self.features = np.concatenate([extractor(data.images(part)) for part in parts])
            self.moments = moments(self.features)
        size = 2 * data.channels * data.size[0] * data.size[1]  # with its mirror image
        self.held_out = data.images(data.val)
        chosen = spread(data.train, max(1, min(MOST_COMPARED, MOST_BYTES // size)))
        self.training = with_mirror_images(data.images(chosen))

    def __call__(self, samples: Images, wanted: Wanted) -> dict[str, Any]:
        """Figures of samples uint8 (N, H, W, C), of which these classes or texts were asked for."""
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
        if isinstance(self.extractor, ClassifierFeatures) and self.names:
            found |= self._accuracy(self.extractor, samples, np.array(wanted))
        if self.data.crops:
            notes.append("copies are looked for among crops at fixed places, not at all places")
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
        self, classifier: ClassifierFeatures, samples: Images, wanted: np.ndarray
    ) -> dict[str, float]:
        """Shares of the samples that the classifier takes for the class asked for."""
        index = np.array([classifier.classes.index(name) for name in self.names])
        right = classifier.classify(samples) == index[wanted]
        shares = {self.names[c]: float(right[wanted == c].mean()) for c in np.unique(wanted)}
        worst = min(shares, key=shares.__getitem__)
        return {"class accuracy": float(right.mean()), f"of class {worst}": shares[worst]}


def with_mirror_images(images: Images) -> Images:
    """(N, H, W, C) and behind them the same, mirrored left to right."""
    return np.concatenate([images, images[:, :, ::-1]])


def wanted_like(data: DiffusionData, sampler: ImageSampler, count: int) -> Wanted:
    """What `count` samples are asked for: captions or classes as the real images have them.

    Classes come in the shares of the real images, mixed evenly; in equal ones where the model's are
    not those of the data.
    """
    if data.captioned:
        captioned = [*data.val, *spread(data.train, count)]
        return data.conditions([captioned[i % len(captioned)] for i in range(count)])
    if not sampler.classes:
        return [None] * count
    shares = np.full(len(sampler.classes), 1 / len(sampler.classes))
    if data.labels is not None and list(data.classes) == sampler.classes:
        labels = data.labels[[*data.train, *data.val]]
        shares = np.bincount(labels, minlength=len(shares)) / len(labels)
    given, wanted = np.zeros(len(shares)), []
    for i in range(1, count + 1):
        wanted.append(int((i * shares - given).argmax()))
        given[wanted[-1]] += 1
    return wanted


def held_out_bits(
    model: DiffusionUNet, data: DiffusionData, count: int, seed: int, batch_size: int
) -> dict[str, Any]:
    """The variational bound in bits per dimension, mean over `count` held-out images.

    All noise levels are gone through; the variance is the learned one where there is one, else
    fixed-large (DDPM, sec. 3.2).
    """
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    # The image is clipped, as in the code of DDPM (clip_denoised).
    denoiser = Clipped(Denoiser(model, schedule, model.info["prediction"]))
    indices = data.val[:count]
    device = next(model.parameters()).device
    learned = model.out_channels > data.channels
    variance: Any = "learned" if learned else "fixed-large"
    totals = []
    levels = range(schedule.steps - 1, CLEAN, -1)
    for start in tqdm(range(0, len(indices), batch_size), "bits per dimension", disable=None):
        part = indices[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        bound = bits_per_dim(
            denoiser,
            data.batch(part)[0].to(device),
            levels,
            NoiseSource(seeds),
            variance=variance,
            **model.conditioning(data.conditions(part)),
        )
        totals += bound.total.tolist()
    return {
        "images": len(indices),
        "noise levels": schedule.steps,
        "variance": variance,
        "bits per dimension": round(float(np.mean(totals)), 4),
    }


def timed_samples(sampler: ImageSampler, wanted: Wanted) -> tuple[Images, float]:
    """Samples as wanted, and the seconds that they took; under a progress bar."""
    plan, size = sampler.from_noise(), sampler.options.batch_size
    start = time.perf_counter()
    with tqdm(total=plan.steps * -(-len(wanted) // size), unit="step", disable=None) as bar:
        images = list(sampler.batches(len(wanted), wanted, on_step=lambda step: bar.update()))
    return np.concatenate(images), time.perf_counter() - start


# ----------------------------------------------------------------------------------------------
# Figures for people


def settings(options: SamplingOptions) -> dict[str, Any]:
    """The settings of a way of sampling as JSON values."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingOptions)}
    interval = [None if math.isinf(x) else x for x in values["guidance_interval"]]
    return {**values, "guidance_interval": interval}


def lines(row: dict[str, Any]) -> list[str]:
    """A row, as `eval_ddpm.py` makes them: the settings that matter or are unusual, the figures."""
    usual, given = settings(SamplingOptions()), row["settings"]
    always = ("sampler", "steps", "seed")
    named = {k: given[k] for k in always} | {"evaluations": row["evaluations"]}
    named |= {k: v for k, v in given.items() if k not in named and v != usual[k]}
    first = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in named.items())
    counts = ", ".join(f"{k} {row[k]}" for k in ("samples", "real") if k in row)
    hidden = ("settings", "evaluations", "samples", "real", "notes")
    figures = [f"  {k}: {v:.4f}" for k, v in row.items() if k not in hidden]
    return [f"{first}; {counts}", *figures, *(f"  note: {note}" for note in row["notes"])]


def comparison(rows: Sequence[dict[str, Any]], distance: str | None) -> list[str]:
    """A table of several rows: evaluations, seconds, class accuracy, and the figure `distance`."""
    found = ["", f"{'':16}{'evaluations':>12}{'seconds':>10}{'distance':>10}{'ratio':>8}  classes"]
    for row in rows:
        way = f"{row['settings']['sampler']}:{row['settings']['steps']}"
        line = f"{way:16}{row['evaluations']:>12}{row['seconds']:>10.1f}"
        if distance:
            line += f"{row[distance]:>10.4f}{row[distance] / rows[0][distance]:>8.3f}"
        if "class accuracy" in row:
            line += f"  {100 * row['class accuracy']:.2f} %"
        found.append(line)
    return found
