"""Judges samples: distances between features, classes, memorisation, bits per dimension."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from diffusion.data.images import DiffusionData
from diffusion.judging.copies import memorisation
from diffusion.judging.features import ClassifierFeatures, FeatureExtractor
from diffusion.judging.metrics import (
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
    sample_warnings,
)
from diffusion.judging.report import MOST_BYTES, MOST_COMPARED, spread
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.plans import Wanted
from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.likelihood import bits_per_dim
from diffusion.process.noise import SEEDS, NoiseSource
from diffusion.process.schedule import CLEAN, NoiseSchedule
from diffusion.sampling import Images, ImageSampler
from unet.errors import InputError
from unet.words import counted

MOST_REAL = 10_000  # images that features are taken of
PART = 500  # of them at a time, or fewer, of MOST_BYTES in all
TABLES = ("restoration", "faithfulness")  # of a row, by what their figures are of


class Judge:
    """The real images and what is known of their features, to compare samples with.

    Args:
        data: real images.
        extractor: None: only memorisation is judged.
        names: of the classes that will be asked for.
        trained: what the model was trained on, where copies are to be looked for; None: `data`.
        copies: whether they are looked for.

    Attributes:
        notes: remarks that apply to all figures.

    Raises:
        InputError: a classifier of other classes, or of images of another size.
    """

    def __init__(
        self,
        data: DiffusionData,
        extractor: FeatureExtractor | None,
        names: Sequence[str] = (),
        *,
        trained: DiffusionData | None = None,
        copies: bool = True,
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
        fit = max(1, MOST_BYTES // (data.channels * data.size[0] * data.size[1]))  # into memory
        if extractor is not None:
            size = min(PART, fit)
            parts = [self.real[i : i + size] for i in range(0, len(self.real), size)]
            bar = tqdm(parts, "features of the real images", disable=None)
            self.features = np.concatenate([extractor(data.images(part)) for part in bar])
            self.moments = moments(self.features)
        self.notes: list[str] = []
        self.copies = copies
        if copies:
            self._keep_seen(trained or data, data.val if trained is None else everything, fit)
        if names and (other := set(names) ^ set(data.classes)):
            self.notes.append(
                f"either only the samples or only the real images have class {min(other)!r}, "
                "which the distances measure, too"
            )

    def _keep_seen(self, trained: DiffusionData, unseen: Sequence[int], fit: int) -> None:
        """Keeps some images that were trained on, and some that were not."""
        most = max(1, min(MOST_COMPARED, fit // 2))  # with their mirror images
        chosen = spread(trained.train, most)
        self.training = with_mirror_images(trained.images(chosen))
        self.held_out = self.data.images(spread(unseen, most))
        if len(chosen) < len(trained.train):
            what = f"{len(chosen):,} of the {counted(len(trained.train), 'training image')}"
            self.notes.append(f"copies are looked for among {what}")
        if trained.crops:
            self.notes.append(
                "copies are looked for among crops at fixed places, not at all places"
            )

    def distance(self, images: Images) -> float:
        """The Fréchet distance of images uint8 (N, H, W, C) to the real ones."""
        assert self.extractor is not None
        return frechet_distance(self.moments, moments(self.extractor(images)))

    def __call__(self, samples: Images, wanted: Wanted) -> dict[str, Any]:
        """Figures of samples uint8 (N, H, W, C) for these classes or texts."""
        found: dict[str, Any] = {"samples": len(samples)}
        notes = [*self.notes]
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
            if len(features) != len(self.features):
                notes.append(f"precision and recall compare {counted(equal, 'image')} of each")
            notes += sample_warnings(equal, features.shape[1])
        if isinstance(self.extractor, ClassifierFeatures) and self.names:
            found |= self._accuracy(self.extractor, samples, np.array(wanted))
        if not self.copies:
            return {**found, "notes": notes}
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
    ) -> dict[str, Any]:
        """The share of the samples that the classifier assigns to the class asked for, and the
        smallest such share of a class."""
        index = np.array([classifier.classes.index(name) for name in self.names])
        right = classifier.classify(samples) == index[wanted]
        shares = {self.names[c]: float(right[wanted == c].mean()) for c in np.unique(wanted)}
        worst = min(shares, key=shares.__getitem__)
        return {
            "class accuracy": float(right.mean()),
            "worst class": worst,
            "accuracy of the worst class": shares[worst],
        }


def with_mirror_images(images: Images) -> Images:
    """(N, H, W, C) and behind them the same, mirrored left to right."""
    return np.concatenate([images, images[:, :, ::-1]])


def wanted_like(data: DiffusionData, sampler: ImageSampler, count: int) -> Wanted:
    """The captions or classes for `count` samples, distributed as in the real images.

    Classes come in the shares of the real images (by largest remainder), mixed evenly; in equal
    shares where the real images have none of the model's classes.
    """
    if data.captioned:
        captioned = [*data.val, *spread(data.train, count)]
        asked = data.conditions([captioned[i % len(captioned)] for i in range(count)])
        return [a.shown for a in asked]
    if not sampler.classes:
        return [None] * count
    labels = [] if data.labels is None else data.labels[[*data.train, *data.val]].tolist()
    real = Counter(data.classes[label] for label in labels)
    weights = np.array([real[name] for name in sampler.classes])
    if not weights.any():
        weights += 1
    exact = count * weights / weights.sum()
    numbers = np.floor(exact).astype(int)
    missing = count - int(numbers.sum())
    numbers[np.argsort(numbers - exact, kind="stable")[:missing]] += 1
    given, wanted = np.zeros(len(numbers)), []
    for i in range(1, count + 1):
        wanted.append(int((i * numbers / count - given).argmax()))
        given[wanted[-1]] += 1
    return wanted


def check_bits(sampler: ImageSampler) -> None:
    """Raises an InputError for a model that has no `held_out_bits`."""
    if sampler.autoencoder:
        raise InputError(
            "--bits is for models of pixels, and this one works in latents, which are not bytes: "
            "leave it out"
        )
    if sampler.pixels.fine:
        raise InputError(
            f"--bits is for models of 8-bit images, and this one makes {sampler.pixels}, which "
            "are not bytes: leave it out"
        )


def held_out_bits(
    model: DiffusionUNet, data: DiffusionData, count: int, seed: int, batch_size: int
) -> dict[str, Any]:
    """The variational bound in bits per dimension, mean over `count` held-out images.

    All noise levels are gone through; the variance is the learned one where there is one, else
    fixed-large (DDPM, sec. 3.2).
    """
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    indices = data.val[:count]
    device = next(model.parameters()).device
    learned = model.out_channels > model.image_channels
    variance: Any = "learned" if learned else "fixed-large"
    totals = []
    levels = range(schedule.steps - 1, CLEAN, -1)
    starts = range(0, len(indices), batch_size)
    with tqdm(total=len(starts) * len(levels), desc="bits per dimension", disable=None) as bar:

        def counted(*inputs: Any, **conditioning: Any) -> Tensor:
            bar.update()
            return model(*inputs, **conditioning)

        # The image is clipped, as in the code of DDPM (clip_denoised).
        denoiser = Clipped(Denoiser(counted, schedule, model.info["prediction"]))
        for start in starts:
            part = indices[start : start + batch_size]
            seeds = [(seed + start + i) % SEEDS for i in range(len(part))]
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
    """Samples as wanted, as bytes, and the seconds that they took; under a progress bar."""
    plan, size = sampler.plans.from_noise(), sampler.options.batch_size
    start = time.perf_counter()
    with tqdm(total=plan.steps * -(-len(wanted) // size), unit="step", disable=None) as bar:
        images = list(sampler.batches(len(wanted), wanted, on_step=lambda step: bar.update()))
    return sampler.shown(np.concatenate(images)), time.perf_counter() - start


# ----------------------------------------------------------------------------------------------
# Figures for people


def lines(row: dict[str, Any]) -> list[str]:
    """A row, as `eval_ddpm.py` makes them: the settings that matter or are unusual, the figures."""
    usual, given = dataclasses.asdict(SamplingOptions()), row["settings"]
    always = ("sampler", "steps", "seed")
    named = {k: given[k] for k in always} | {"evaluations": row["evaluations"]}
    named |= {k: v for k, v in given.items() if k not in named and v != usual[k]}
    found = [", ".join(f"{k.replace('_', ' ')} {v}" for k, v in named.items())]
    found[0] += "; " + ", ".join(f"{k} {row[k]}" for k in ("samples", "real") if k in row)
    hidden = ("settings", "evaluations", "samples", "real", "notes", *TABLES)
    accuracies = ("class accuracy", "worst class", "accuracy of the worst class")
    found += [f"  {k}: {v:.4f}" for k, v in row.items() if k not in (*hidden, *accuracies)]
    if accuracies[0] in row:
        share, worst, least = (row[k] for k in accuracies)
        found.append(f"  class accuracy: {percent(share)}, worst class: {worst} {percent(least)}")
    for title in TABLES:
        found += table(title, row[title]) if title in row else []
    return [*found, *(f"  note: {note}" for note in row["notes"])]


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Figures under a title, one line per row."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, [title, *rows]))
    lines = [f"  {title:{width}}" + "".join(f"{column:>18}" for column in columns)]
    for name, figures in rows.items():
        shown = ["-" if math.isnan(figures[c]) else f"{figures[c]:.4f}" for c in columns]
        lines.append(f"  {name:{width}}" + "".join(f"{figure:>18}" for figure in shown))
    return lines


def comparison(rows: Sequence[dict[str, Any]], distance: str | None) -> list[str]:
    """A table of several rows: evaluations, seconds, the figure `distance` where there is one and
    its ratio to the first row's, class accuracy."""
    head = f"{'':16}{'evaluations':>12}{'seconds':>10}"
    found = ["", head + (f"{'distance':>10}{'ratio':>8}  classes" if distance else "")]
    for row in rows:
        way = f"{row['settings']['sampler']}:{row['settings']['steps']}"
        line = f"{way:16}{row['evaluations']:>12}{row['seconds']:>10.1f}"
        if distance:
            first = rows[0][distance]
            ratio = row[distance] / first if first else math.nan
            line += f"{row[distance]:>10.4f}{ratio:>8.3f}"
        if "class accuracy" in row:
            line += f"  {percent(row['class accuracy'])}"
        found.append(line)
    return found


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def to_json(found: dict[str, Any]) -> str:
    """As JSON, which has no infinity and no NaN: null stands for them."""
    plain = json.loads(json.dumps(found), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2) + "\n"
