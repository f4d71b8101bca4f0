"""Make images with a trained diffusion model: sample_ddpm.py --model RUN/model --out DIR."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.options import SampleOptions
from unet.errors import InputError
from unet.training.cli import run_script

SHOWN = 16  # images in the GIF and of whose attention there are pictures, at most

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.output import SampleFolder
    from diffusion.plans import Plan, Wanted
    from diffusion.sampling import Images, ImageSampler
    from unet.training.task import Processes


def main(options: SampleOptions) -> None:
    from diffusion.output import SampleFolder
    from diffusion.sampling import ImageSampler, load_for_sampling
    from unet.training.task import Processes

    processes = Processes.started(options.device)
    folder = SampleFolder(options.out, overwrite=options.overwrite)
    model = load_for_sampling(options.model, options.device)
    sampler = ImageSampler(model, options)
    wanted = chosen_conditions(options, sampler)
    plan = chosen_plan(options, sampler, wanted)
    folder.begin(processes)
    parts = sampler.parts(options.count, processes)
    for part, images in zip(parts, made(options, sampler, plan, wanted, processes), strict=True):
        folder.add(images, options.first + part.start)
    processes.wait()
    if processes.main:
        write_pictures(options, sampler, wanted, folder)


def write_pictures(
    options: SampleOptions, sampler: ImageSampler, wanted: Wanted, folder: SampleFolder
) -> None:
    """What shows all images together, and those of the first of them."""
    numbers = range(options.first, options.first + options.count)
    if options.npz:
        labels = [int(w) for w in wanted if w is not None] if sampler.classes else []
        folder.write_npz(numbers, labels or None)
    shown = wanted[:SHOWN]
    if options.gif:
        folder.write_gif(sampler.appearing(len(shown), shown, first=options.first))
    if options.attention:
        images, maps = sampler.attending(shown, options.attention_steps, first=options.first)
        words = [sampler.text.words(str(text)) for text in shown]
        folder.write_attention(images, words, maps, options.first)
    print(f"images: {folder.write_grid(numbers)}")


def chosen_conditions(options: SampleOptions, sampler: ImageSampler) -> Wanted:
    """The class or prompt of each image; None: any."""
    chosen: Wanted = list(range(len(sampler.classes))) or [None]
    if options.class_:
        chosen = [sampler.class_index(name) for name in options.class_]
    if options.prompt:
        sampler.text.tokenize(options.prompt)  # which refuses what is too long
        for remark in (r for text in options.prompt for r in sampler.text.remarks(text)):
            print(f"note: {remark}", file=sys.stderr)
        chosen = options.prompt
    if options.interpolate:  # all of one kind, or of any
        return [chosen[0] if options.class_ or options.prompt else None] * options.count
    numbers = range(options.first, options.first + options.count)
    return [chosen[i % len(chosen)] for i in numbers]


def chosen_plan(options: SampleOptions, sampler: ImageSampler, wanted: Wanted) -> Plan:
    """What the options ask for: from noise, or from images."""
    from unet.files.images import image_info

    if options.init:
        return sampler.plans.variants(picture(options.init, sampler), options.strength)
    if options.inpaint and options.mask:
        image, drawn = (image_info(path) for path in (options.inpaint, options.mask))
        if image.height * drawn.width != image.width * drawn.height:
            raise InputError(
                f"the image is {image.height} x {image.width} and the mask '{options.mask}' "
                f"{drawn.height} x {drawn.width}: give a mask of the same proportions"
            )
        mask = picture(options.mask, sampler).mean(dim=1, keepdim=True) > 0
        if not mask.any():
            raise InputError(
                f"the mask '{options.mask}' is white nowhere, so nothing would be made anew: paint "
                "the part to be made anew white (255)"
            )
        return sampler.plans.inpainted(picture(options.inpaint, sampler), mask)
    if options.interpolate:
        first, last = (picture(path, sampler) for path in options.interpolate)
        return sampler.plans.between(first, last, options.count, wanted[0])
    return sampler.plans.from_noise()


def made(
    options: SampleOptions,
    sampler: ImageSampler,
    plan: Plan,
    wanted: Wanted,
    processes: Processes,
) -> Iterator[Images]:
    """This process's images batch by batch, under a progress bar with the time left."""
    from tqdm import tqdm

    doubled = ", each for twice the images (guidance)" if options.guidance != 1 else ""
    before = f", after {plan.once} for the two" if plan.once else ""
    shared = f", shared by {processes.count} processes" if processes.count > 1 else ""
    said = (
        f"{options.count} images of {sampler.height} x {sampler.width} by {options.sampler}: "
        f"{plan.evaluations} evaluations of the network an image{doubled}{before}{shared}"
    )
    if processes.main:
        print(said)
    total = plan.steps * len(sampler.parts(options.count, processes))
    with tqdm(total=total, unit="step", disable=None if processes.main else True) as bar:
        yield from sampler.batches(
            options.count,
            wanted,
            first=options.first,
            plan=plan,
            on_step=lambda step: bar.update(),
            processes=processes,
        )


def picture(path: Path, sampler: ImageSampler) -> Tensor:
    """An image file as the model takes it, (1, C, H, W) in [-1, 1]: resized and cropped."""
    from diffusion.data.pixels import fitted
    from unet.files.images import read_image

    size = (sampler.height, sampler.width)
    return fitted(read_image(path), size, sampler.channels)[None].to(sampler.device)


if __name__ == "__main__":
    sys.exit(run_script(main, SampleOptions, description=__doc__))
