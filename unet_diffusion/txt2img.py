"""Make pictures from a sentence: unet-txt2img --model PIPELINE --prompt "a red fox" --out DIR."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.stable.recipe import Recipe, TextSampler, merged, write_picture
from unet.errors import InputError, not_there
from unet.training.cli import run_script, say_next
from unet.training.options import Precision
from unet.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion.stable.pipeline import StableDiffusion
    from unet.files.images import Colour


@dataclass(frozen=True, kw_only=True)
class Txt2ImgOptions:
    """Make pictures from a sentence with Stable Diffusion."""

    out: Path
    """Folder to make: grid.png, and images/ with a PNG for each picture, which holds its settings.
    """

    model: str | None = None
    """Diffusers pipeline folder of Stable Diffusion 1, 2 or XL: unet/, vae/, text_encoder/,
    tokenizer/, scheduler/."""

    lora: tuple[str, ...] | None = None
    """LoRA files, or the model folders of LoRA runs, to change the model by: FILE, or FILE:0.5 for
    half of it."""

    merged: Path | None = None
    """With --lora: pipeline folder to write, of the model with the LoRAs merged into its weights.
    """

    prompt: str | None = None
    """What the pictures are to show."""

    negative: str | None = None
    """What guidance steers away from; none given: the empty prompt, or zeros where a pipeline of XL
    says so."""

    steps: int | None = None
    """Steps from noise to picture; none given: 25."""

    sampler: TextSampler | None = None
    """Sampler; none given: dpmpp-2m."""

    guidance: float | None = None
    """Scale of classifier-free guidance, 1 for none; none given: 7.5."""

    seed: int | None = None
    """Seed of the first picture, the next one's is one higher; none given: 0."""

    size: str | None = None
    """WIDTHxHEIGHT in pixels, such as 512x768, or one number for both; none given: what the model
    was trained for."""

    original_size: str | None = None
    """XL: WIDTHxHEIGHT of an image from which the picture is to look as if cropped; none given: its
    own size."""

    crop: str | None = None
    """XL: LEFTxTOP of that crop in pixels; none given: 0x0."""

    count: int | None = None
    """Number of pictures; none given: 4, and 1 with --from-png."""

    init: str | None = None
    """Make variants of this image (SDEdit): noise is added to it and taken away."""

    strength: float | None = None
    """With --init or --inpaint: how much of the image is made anew, above 0 and at most 1; none
    given: 0.8, and 1 inside a mask."""

    inpaint: str | None = None
    """Make a part of this image anew; with --mask."""

    mask: str | None = None
    """With --inpaint: a picture that is white where the image is to be made anew."""

    checkpoint: str | None = None
    """Take the U-Net from this single file (.safetensors or .ckpt) or index of shards
    (.index.json), the rest from --model."""

    precision: Precision | None = None
    """Numbers that the U-Net and the text model compute with; none given: auto, which is fp16 on
    CUDA and fp32 elsewhere."""

    from_png: Path | None = None
    """Repeat this picture: all that is not given here is taken from it."""

    low_memory: bool = False
    """One picture at a time, and large ones are decoded in tiles."""

    batch_size: int = 4
    """Pictures at a time."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    overwrite: bool = False
    """Replace what an earlier run wrote to --out."""

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")


def main(options: Txt2ImgOptions) -> None:
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe)}
    recipe = merged(given, options.from_png)
    if options.merged and not recipe.lora:
        raise InputError(f"--merged {options.merged} has nothing to merge: give --lora")
    if options.merged and options.merged.exists() and not options.overwrite:
        raise InputError(f"--merged {options.merged} is there already: give --overwrite")
    for flag, named in (("init", recipe.init), ("inpaint", recipe.inpaint), ("mask", recipe.mask)):
        if named is not None and not os.path.exists(named):
            raise InputError(f"--{flag} {named!r}: {not_there(named)}")
    count = options.count or (1 if options.from_png else 4)
    last = dataclasses.replace(recipe, seed=recipe.seed + count - 1).seed  # checks it

    from tqdm import tqdm

    from diffusion.output import SampleFolder
    from diffusion.stable.pipeline import StableDiffusion
    from unet.device import pick_device
    from unet.training.task import Processes

    processes = Processes.started(options.device)
    folder = SampleFolder(options.out, overwrite=options.overwrite)
    device = pick_device(options.device)
    model = StableDiffusion.from_pretrained(
        recipe.model,
        recipe.checkpoint,
        loras=recipe.lora or (),
        device=device,
        dtype=chosen_dtype(recipe, device),
    )
    if options.low_memory:
        model.save_memory()
    height, width = model.pixels(recipe)
    recipe = dataclasses.replace(recipe, size=f"{width}x{height}")
    image = picture(recipe.init or recipe.inpaint, model, recipe)
    mask = picture(recipe.mask, model, recipe, background=(0, 0, 0))  # not painted is not white
    mask = None if mask is None else (mask.mean(dim=1, keepdim=True) > 0).float()
    steps = len(model.timesteps(recipe, image=image is not None, mask=mask is not None)[0])
    if processes.main:
        for text, cut in model.cut_prompts(recipe).items():
            print(f"the {text} is longer than the text model takes: its end {cut!r} is left out")
        shared = f", shared by {processes.count} processes" if processes.count > 1 else ""
        said = f"{counted(count, 'picture')} of {width}x{height} with {recipe.sampler}, "
        said += f"{counted(steps, 'step')} each"
        print(said + shared)

    seeds, batch = range(recipe.seed, last + 1), 1 if options.low_memory else options.batch_size
    parts = [seeds[part.start : part.stop] for part in processes.batches(count, batch)]
    runs = (model.sample(recipe, part, image=image, mask=mask) for part in parts)
    first = list(itertools.islice(runs, 1))  # nothing can be wrong with the input any more
    folder.begin(processes)
    hidden = None if processes.main else True
    with tqdm(total=steps * len(parts), unit="step", disable=hidden) as bar:
        for part, run in zip(parts, itertools.chain(first, runs), strict=True):
            for step in run:
                x = step.x
                bar.update()
            for seed, pixels in zip(part, model.decode(x), strict=True):
                file = folder.files(seed - recipe.seed)[0]
                write_picture(file, pixels, dataclasses.replace(recipe, seed=seed))
    processes.wait()
    if processes.main:
        if options.merged:
            from diffusion.stable.export import write_merged

            write_merged(options.merged, Path(recipe.model), recipe.checkpoint, recipe.lora or ())
            print(f"pipeline with its LoRA: {options.merged}")
        print(f"pictures: {folder.write_grid(range(count))}")
        again = ("--from-png", folder.files(0)[0], "--steps", 2 * recipe.steps, "--out", "again")
        say_next("txt2img", *again)


def chosen_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    from unet.device import DTYPES

    auto = "fp16" if device.type == "cuda" else "fp32"
    return DTYPES[auto if recipe.precision == "auto" else recipe.precision]


def picture(
    file: str | None, model: StableDiffusion, recipe: Recipe, background: Colour = (255, 255, 255)
) -> Tensor | None:
    """An image file as the model takes it, (1, 3, H, W) in [-1, 1]: resized and cropped."""
    if file is None:
        return None
    from diffusion.data.pixels import fitted
    from unet.files.images import read_image

    image = read_image(Path(file), background=background)
    return fitted(image, model.pixels(recipe), 3)[None].to(model.device)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, Txt2ImgOptions, argv, description=__doc__)
