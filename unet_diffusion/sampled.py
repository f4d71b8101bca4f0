"""Masks that a diffusion model samples of an image, as predictions: mean, probability, entropy."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler, load_for_sampling
from segmentation.data.classes import ClassTable
from segmentation.data.inputs import Inputs
from segmentation.output import Slice, as_16_bit, check_free, find_slices
from segmentation.pictures import grey_or_rgb, overlay, overlay_legend
from segmentation.predict import Probability, classes
from segmentation.uncertainty import entropy_map
from unet.errors import InputError
from unet.files.images import image_info, read_image, write_image
from unet.files.pages import Reading
from unet.files.pictures import key

Samples = NDArray[np.uint8]  # class indices (S, H, W)


class MaskSampler:
    """A diffusion model of masks, to be called with an image file: `samples = sampler("a.png")`.

    Args:
        model: a model folder, or a repository on the Hugging Face Hub, of `train-ddpm --target
            mask`.
        count: samples of each image.
        options: how they are made, with the same noise for each image; in as many steps as the
            model has noise levels, at most.

    Raises:
        InputError: no such model; in calls, a file that does not fit it.
    """

    def __init__(self, model: str | Path, count: int, options: SamplingOptions) -> None:
        network = load_for_sampling(model, options.device)
        if network.masks is None or network.condition is None or network.joint:
            raise InputError(
                f"{model} makes no masks from images: samples are drawn by a model of train-ddpm "
                "--target mask --condition"
            )
        self.masks, self.count = network.masks, count
        most = NoiseSchedule.from_dict(network.info["schedule"]).steps
        steps = options.steps and min(options.steps, most)
        self.sampler = ImageSampler(network, replace(options, steps=steps))
        values, palette = self.masks.values, self.masks.palette
        shares = (1 / len(values),) * len(values)
        self.table = ClassTable(values=values, shares=shares, palette=palette)

    def __call__(self, file: str | Path) -> Samples:
        """Class indices (S, H, W) of `table`, of the size of the image.

        An image of another size than the model's goes in overlapping tiles; where the model was
        trained on resized images it is resized, and its masks back.
        """
        file = Path(file)
        if self.sampler.model.any_size:
            return self._sampled(file)
        info = image_info(file)
        height, width = info.height, info.width
        rows, columns = self.sampler.height, self.sampler.width
        if height * columns != width * rows:
            raise InputError(
                f"{str(file)!r} is {height} x {width}, but the model makes masks of {rows} x "
                f"{columns}: cut it to these proportions"
            )
        indices = self._sampled(file)
        down, across = (np.arange(n) * m // n for n, m in ((height, rows), (width, columns)))
        return indices[:, down[:, None], across]

    def _sampled(self, file: Path) -> Samples:
        wanted = [self.sampler.made_from(file).read()] * self.count
        return self.masks.classes(self.sampler(self.count, wanted))

    def probability(self, samples: Samples) -> Probability:
        """The share of the samples (K, H, W) of each class; of two (1, H, W), the second's."""
        count = len(self.table.values)
        kinds = [1] if count == 2 else range(count)
        return np.stack([(samples == k).mean(axis=0, dtype=np.float32) for k in kinds])


def predict_samples(
    sampler: MaskSampler,
    inputs: Inputs,
    out: Path,
    *,
    threshold: float = 0.5,
    keep: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Samples masks of each image, and writes their joint result into a tree of the folders that
    the images lie in.

    Of an image NAME: NAME_mask.png, the most probable class or the second of two above the
    threshold; NAME_probability.png and NAME_entropy.png, 16-bit; NAME_overlay.png; legend.png.

    Args:
        keep: also write the samples, NAME_sample_0.png, ...

    Returns:
        What went wrong with the images that failed, a sentence each.

    Raises:
        InputError: a stack, two images of one name, or files in the way, before anything
            is predicted.
    """
    slices, failed = find_slices(inputs)
    digits = len(str(sampler.count - 1))
    kind = sampler.table.suffix
    names = [f"mask.{kind}", "probability.png", "entropy.png", "overlay.png"]
    names += [f"sample_{i:0{digits}d}.{kind}" for i in range(sampler.count)] * keep
    if stack := next((image.path for image in slices if image.page is not None), None):
        raise InputError(f"{str(stack)!r} is a stack: give --samples images of one page")
    writes = [(image, [out / f"{image.name}_{name}" for name in names]) for image in slices]
    check_free(writes, overwrite=overwrite)
    for image, files in tqdm(writes, unit="image", disable=None):
        try:
            _write(sampler, image, files, threshold)
        except InputError as error:
            failed.append(str(error))
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    if len(failed) < len(slices):
        write_image(out / "legend.png", np.asarray(key(overlay_legend(sampler.table), 480)))
    return failed


def _write(sampler: MaskSampler, image: Slice, files: list[Path], threshold: float) -> None:
    samples, table = sampler(image.path), sampler.table
    probability = sampler.probability(samples)
    decided = classes(probability, threshold)
    mask, probable, unsure, picture, *kept = files
    write_image(mask, table.decode(decided), palette=table.palette)
    write_image(probable, as_16_bit(probability))
    write_image(unsure, as_16_bit(entropy_map(probability)[None]))
    reading = Reading(nodata=sampler.sampler.reading.nodata)
    seen = grey_or_rgb(read_image(image.path, reading=reading), reading.of(image.info).nodata)
    write_image(picture, overlay(seen, decided, table))
    for file, sample in zip(kept, samples, strict=False):
        write_image(file, table.decode(sample), palette=table.palette)
