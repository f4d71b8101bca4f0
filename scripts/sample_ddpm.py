"""Make images with a trained diffusion model: sample_ddpm.py --model RUN/model --out DIR."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffusion.options import SamplingOptions
from unet.errors import InputError
from unet.training.cli import run_script

IN_GIF = 16  # images, at most

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.sampling import Images, ImageSampler, Plan


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingOptions):
    """Make images from noise, or from other images."""

    model: str
    """Model folder, such as RUN/model."""

    out: Path
    """Folder to make: grid.png, and images/ with one PNG an image."""

    count: int = 64
    """Number of images."""

    first: int = 0
    """Number of the first one: --count 10 --first 20 makes images 20 to 29 of the seed."""

    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes of the images, by name and in turn; none given: every class in turn, where the model
    knows classes."""

    npz: bool = False
    """Write samples.npz as well: images (N, H, W, C) and, where asked for, labels."""

    gif: bool = False
    """Write appearing.gif as well: the first images as they come out of the noise."""

    init: Path | None = None
    """Make variants of this image instead (SDEdit): noise is added to it and taken away."""

    strength: float = 0.6
    """With --init: how much of it is made anew, from 0 to 1."""

    inpaint: Path | None = None
    """Make a part of this image anew (RePaint); with --mask."""

    mask: Path | None = None
    """With --inpaint: a picture that is white where the image is to be made anew."""

    interpolate: tuple[Path, Path] | None = None
    """Make images between these two, both among them."""

    overwrite: bool = False
    """Replace what an earlier run wrote to --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise InputError(f"--count {self.count} must be at least 1")
        if self.first < 0:
            raise InputError(f"--first {self.first} must be 0 or more")
        if sum(x is not None for x in (self.init, self.inpaint, self.interpolate)) > 1:
            raise InputError("--init, --inpaint and --interpolate each say what to make: give one")
        if (self.inpaint is None) != (self.mask is None):
            raise InputError("--inpaint needs --mask, which says what to make anew: give both")
        if self.interpolate and self.count < 2:
            raise InputError(f"--count {self.count}: between two images there are at least 2")
        if self.interpolate and self.first:
            raise InputError("--first has no place with --interpolate, whose images have an order")
        if not 0 < self.strength <= 1:
            raise InputError(f"--strength {self.strength} must be above 0 and at most 1")
        if self.gif and (self.init or self.inpaint or self.interpolate):
            raise InputError("--gif shows images that come out of noise alone: leave it out")


def main(options: SampleOptions) -> None:
    import numpy as np

    from diffusion.model import DiffusionUNet
    from diffusion.output import SampleFolder
    from diffusion.sampling import ImageSampler
    from unet.device import pick_device

    folder = SampleFolder(options.out, overwrite=options.overwrite)
    model = DiffusionUNet.from_pretrained(options.model).to(pick_device(options.device))
    sampler = ImageSampler(model, options)
    chosen = [sampler.class_index(c) for c in options.class_] or range(len(sampler.classes))
    numbers = range(options.first, options.first + options.count)
    classes = [chosen[i % len(chosen)] for i in numbers] if chosen else None
    if options.interpolate:  # all of one class, or of none
        classes = [chosen[0]] * options.count if options.class_ else None
    plan = chosen_plan(options, sampler, classes)
    folder.begin()
    every = []
    for images in made(options, sampler, plan, classes):
        folder.add(images, options.first)
        every += [images] if options.npz else []
    if options.npz:
        folder.write_npz(np.concatenate(every), classes)
    if options.gif:
        shown = classes[:IN_GIF] if classes else [None] * min(options.count, IN_GIF)
        folder.write_gif(sampler.appearing(len(shown), shown, first=options.first))
    print(f"images: {folder.write_grid()}")


def chosen_plan(options: SampleOptions, sampler: ImageSampler, classes: list[int] | None) -> Plan:
    """What the options ask for: from noise, or from images."""
    if options.init:
        return sampler.variants(picture(options.init, sampler), options.strength)
    if options.inpaint and options.mask:
        mask = picture(options.mask, sampler).mean(dim=1, keepdim=True) > 0
        if not mask.any():
            raise InputError(
                f"the mask '{options.mask}' is white nowhere, so nothing would be made anew: paint "
                "the part to be made anew white (255)"
            )
        return sampler.inpainted(picture(options.inpaint, sampler), mask)
    if options.interpolate:
        first, last = (picture(path, sampler) for path in options.interpolate)
        return sampler.between(first, last, options.count, classes[0] if classes else None)
    return sampler.from_noise()


def made(
    options: SampleOptions, sampler: ImageSampler, plan: Plan, classes: list[int] | None
) -> Iterator[Images]:
    """The images batch by batch, under a progress bar with the time left."""
    from tqdm import tqdm

    doubled = ", each for twice the images (guidance)" if options.guidance != 1 else ""
    before = f", after {plan.once} for the two" if plan.once else ""
    print(
        f"{options.count} images of {sampler.height} x {sampler.width} by {options.sampler}: "
        f"{plan.evaluations} evaluations of the network an image{doubled}{before}"
    )
    total = plan.steps * -(-options.count // options.batch_size)
    with tqdm(total=total, unit="step", disable=None) as bar:
        yield from sampler.batches(
            options.count,
            classes,
            first=options.first,
            plan=plan,
            on_step=lambda step: bar.update(),
        )


def picture(path: Path, sampler: ImageSampler) -> Tensor:
    """An image file as the model takes it, (1, C, H, W) in [-1, 1]: resized and cropped."""
    from diffusion.data import fitted
    from unet.images import read_image

    size = (sampler.height, sampler.width)
    return fitted(read_image(path), size, sampler.channels)[None].to(sampler.device)


if __name__ == "__main__":
    sys.exit(run_script(main, SampleOptions, description=__doc__))
