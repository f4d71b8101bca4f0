"""`load` and `ImageGenerator`: a trained model, called to make images."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diffusion.export import exportable
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.sampling import Images, ImageSampler, load_for_sampling
from unet.errors import InputError, as_keywords
from unet.weights.formats import Format

Class: TypeAlias = "int | str | None"  # its index or its name; None: any
SETTINGS = tuple(field.name for field in fields(SamplingOptions))


def load(
    model: str | Path, *, lora: str | Sequence[str] = (), device: str = "auto"
) -> ImageGenerator:
    """A trained model to be called for images.

    Args:
        model: a model folder, such as "runs/photos/model", or a repository on the Hugging Face Hub,
            such as "someone/flowers".
        lora: a LoRA file or several, which are merged into its weights: "FILE", or "FILE:0.5".
        device: auto, or a torch device such as cpu, cuda or mps.

    Raises:
        InputError: no usable model, or a LoRA of another one.
    """
    with as_keywords("device", "lora"):
        return ImageGenerator(load_for_sampling(model, device, _several(lora)))


class ImageGenerator:
    """A trained diffusion model, to be called for images: `images = generator(16, seed=0)`.

    Args:
        model: as training saves it; put into evaluation mode.
    """

    def __init__(self, model: DiffusionUNet) -> None:
        self.model = model
        # Which says early what is wrong with the model, and reads the parts that it works with.
        self._sampler = ImageSampler(model, SamplingOptions(steps=1))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.model.size

    @property
    def channels(self) -> int:
        """Channels of the images, such as 1 (grey) or 3 (RGB)."""
        return self._sampler.channels

    @property
    def dtype(self) -> str:
        """The type of the images, that of those it was trained on: uint8, uint16 or float32."""
        return self.model.pixels.dtype

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; empty if it has none."""
        return tuple(self.model.classes)

    @property
    def reads_prompts(self) -> bool:
        """Whether it was trained with captions."""
        return self.model.text is not None

    def export(self, to: Format, out: str | Path) -> None:
        """Writes one evaluation of the network as a file for other programs.

        Args:
            to: onnx, torchscript, pt2 or openvino.
            out: the file, .onnx, .pt, .pt2 or .xml; an earlier one is replaced.

        Raises:
            InputError: another ending; a package that is not installed.
        """
        exportable(self.model).write(to, Path(out))

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"ImageGenerator({height} x {width}, channels={self.channels}, "
            f"classes={self.classes}, reads_prompts={self.reads_prompts})"
        )

    def __call__(
        self,
        count: int | None = None,
        *,
        seed: int = SamplingOptions.seed,
        first: int = 0,
        classes: Class | Sequence[Class] = None,
        prompts: str | Sequence[str] | None = None,
        pictures: str | Path | Sequence[str | Path] | None = None,
        negative: str = SamplingOptions.negative,
        guidance: float = SamplingOptions.guidance,
        steps: int | None = SamplingOptions.steps,
        sampler: str | None = SamplingOptions.sampler,
        batch_size: int = SamplingOptions.batch_size,
        **settings: Any,
    ) -> Images:
        """New images, the same as those of `unet sample-ddpm` with these settings.

        Args:
            count: how many; None: as many as there are classes, prompts or pictures (the larger
                number of two), else one.
            seed: image 7 of a seed is the same whatever the number of images and the batch size.
            first: number of the first image of the seed.
            classes: name or index of the class of all images, or one for each, or fewer to be taken
                in turn; a None among them: of any. None given: every class in turn, where the model
                knows classes, but of any with pictures.
            prompts: a text that all images are to show, or one for each, or fewer to be taken in
                turn.
            pictures: a file that all images are made from, or one for each, or fewer to be taken in
                turn, for a model that was trained with a condition. Images have the size of their
                pictures, in overlapping tiles if larger than in training (lowres: as many times
                larger); that of training, where images were resized to it.
            negative: with `guidance` and `prompts`: a text to steer away from.
            guidance: scale of guidance; 1: none.
            steps: from noise to image; None: those that the training found to be enough, 8 or 20,
                with another sampler 20, with jump 4.
            sampler: ddpm, ddim, euler, heun, flow-heun, dpmpp-2m, dpmpp-2m-sde or jump; None: jump
                for a model of few steps, dpmpp-2m for one of `--coupling ot`, else dpmpp-2m-sde.
            batch_size: images at a time.
            settings: the other fields of `SamplingOptions`: spacing, shift, eta, churn,
                churn_interval, churn_noise, variance, clip, guide (which is read at the first of
                the calls that name it), guidance_rescale, guidance_interval, precision.

        Returns:
            (N, H, W, C) in the type of the training images, uint8, uint16 or float32 (`dtype`); of
            a model of masks their values, uint8 (N, H, W, 1), or colours (N, H, W, 3); of one of
            images with masks (N, H, W, C + 1), or C + 3, the mask's value or colour last.

        Raises:
            InputError (a ValueError): a setting out of range, an unknown one, or one that the model
                was not trained for, such as a prompt without captions.

        Warns:
            UserWarning: a prompt with words that the model was trained without.
        """
        classes = _several(classes)
        prompts = _several(prompts)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts are texts, not {prompts!r:.200}")
        files = _several(pictures)
        if not all(isinstance(file, (str, Path)) for file in files):
            raise InputError(
                "pictures are paths of image files, not the pixels themselves: save these as files"
            )
        files = [Path(file) for file in files]
        given = max(len(classes) + len(prompts), len(files))
        count = _whole("count", given or 1 if count is None else count, 1)
        if given > count:
            raise InputError(
                f"{given} classes, prompts or pictures are given for {count} images: ask for as "
                "many, or leave count out"
            )
        settings |= {"negative": negative, "guidance": guidance, "sampler": sampler}
        settings["seed"] = _whole("seed", seed, 0)
        settings["steps"] = None if steps is None else _whole("steps", steps, 1)
        settings["batch_size"] = _whole("batch_size", batch_size, 1)
        if unknown := sorted(settings.keys() - set(SETTINGS) | settings.keys() & {"device"}):
            known = sorted({*SETTINGS} - {"device"})
            raise InputError(
                f"{unknown[0]!r} is no setting of a call: choose from count, first, classes, "
                f"prompts, pictures, {', '.join(known)}; the device is given to load"
            )
        first = _whole("first", first, 0)
        with as_keywords(*SETTINGS, "prompt"):
            chosen = self._sampler = self._sampler.with_options(SamplingOptions(**settings))
            numbers = range(first, first + count)
            pictured = [chosen.made_from(file) for file in files]
            if len({picture.shape for picture in pictured}) > 1:
                raise InputError("the pictures have different sizes: call for those of each size")
            wanted = chosen.wanted(numbers, classes, prompts, pictured)
        for remark in (r for text in dict.fromkeys(prompts) for r in chosen.text.remarks(text)):
            warnings.warn(remark, stacklevel=2)
        return np.concatenate(list(chosen.batches(count, wanted, first=first)))


def _several(given: Any) -> list[Any]:
    """A value or several as a list; None: an empty list."""
    if given is None:
        return []
    one = isinstance(given, (str, Path)) or not isinstance(given, Iterable)
    return [given] if one else list(given)


def _whole(name: str, value: object, least: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which is what it finds out
    except TypeError as error:
        raise InputError(f"{name}={value!r} must be a whole number") from error
    if number < least:
        raise InputError(f"{name}={number} must be at least {least}")
    return number
