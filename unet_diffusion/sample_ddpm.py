"""Make images with a trained diffusion model: unet-sample-ddpm --model RUN/model --out DIR."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffusion.options import DiffusionOptions, SamplingOptions
from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config
from unet.training.options import check_paths
from unet.words import counted, listed

STRENGTH = 0.6  # of variants of an image, where none is asked for
SHOWN = 16  # images in the GIF and of whose attention there are pictures, at most

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.data.conditions import Picture
    from diffusion.output import SampleFolder
    from diffusion.plans import Plan, Wanted
    from diffusion.sampling import Images, ImageSampler
    from segmentation.data.inputs import Inputs
    from unet.training.task import Processes


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingOptions):
    """Make images from noise, or from other images."""

    model: str
    """Model folder, such as RUN/model."""

    out: Path
    """Folder to make: grid.png, and images/ with a file for each image: PNG, or TIFF for more than
    8 bits or for channels other than grey or colour. For a model that was trained with --joint,
    image/ and label/, which train-seg reads."""

    lora: tuple[str, ...] = ()
    """LoRA files, or the model folders of LoRA runs, to change the model by: FILE, or FILE:0.5 for
    half of it."""

    merged: Path | None = None
    """With --lora: model folder to write, of the model with the LoRAs merged into its weights."""

    count: int = 64
    """Number of images; with --condition there are --each of them for each picture instead."""

    condition: Path | None = None
    """A picture or mask, or a folder of them, in it and below it, from which images are made by a
    model that was trained with --condition. The files get the names of the pictures, in the same
    folders."""

    each: int = 1
    """With --condition: images made from each picture."""

    first: int = 0
    """Number of the first one: --count 10 --first 20 makes images 20 to 29 of the seed."""

    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes of the images, by name, taken in turn; none given: every class in turn, if the model
    knows classes, but any class with --condition."""

    prompt: tuple[str, ...] = ()
    """Texts that the images are to show, taken in turn, for a model that was trained with captions.
    """

    attention: bool = False
    """With --prompt: write attention/ as well: where the network looks for each word of the prompt,
    in the first images."""

    attention_steps: tuple[int, int] | None = None
    """With --attention: only the steps from the first of these up to before the second, from 0;
    none given: all."""

    npz: bool = False
    """Write samples.npz as well: images (N, H, W, C) and, where asked for, labels."""

    gif: bool = False
    """Write appearing.gif as well: the first images as they come out of the noise."""

    init: Path | None = None
    """Make variants of this image instead (SDEdit): noise is added to it and taken away."""

    strength: float | None = None
    """With --init: how much of it is made anew, above 0 and at most 1; none given: 0.6."""

    inpaint: Path | None = None
    """Make a part of this image anew (RePaint); with --mask."""

    mask: Path | None = None
    """With --inpaint: a picture that is white where the image is to be made anew."""

    interpolate: tuple[Path, Path] | None = None
    """Make images between these two, these included."""

    overwrite: bool = False
    """Replace what an earlier run wrote to --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merged and not self.lora:
            raise InputError(f"--merged {self.merged} has nothing to merge: give --lora")
        if self.count < 1:
            raise InputError(f"--count {self.count} must be at least 1")
        if self.condition is None and self.each != 1:
            raise InputError(f"--each {self.each} goes with --condition")
        if self.each < 1:
            raise InputError(f"--each {self.each} must be at least 1")
        if self.condition is not None and (self.interpolate or self.first):
            raise InputError(
                "--condition says which images are made: leave out --interpolate and --first"
            )
        if self.first < 0:
            raise InputError(f"--first {self.first} must be 0 or more")
        if sum(x is not None for x in (self.init, self.inpaint, self.interpolate)) > 1:
            raise InputError("--init, --inpaint and --interpolate each say what to make: give one")
        if (self.inpaint is None) != (self.mask is None):
            raise InputError("--inpaint needs --mask, which says what to make anew: give both")
        if self.interpolate and self.count < 2:
            raise InputError(f"--count {self.count}: between two images there are at least 2")
        if self.interpolate and self.first:
            raise InputError("--first does not go with --interpolate, whose images have an order")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"--strength {self.strength} must be above 0 and at most 1")
        if self.strength is not None and not self.init:
            raise InputError(
                f"--strength {self.strength} says how much of an image is made anew: give that "
                "image with --init"
            )
        if self.class_ and self.prompt:
            raise InputError("--class and --prompt each say what an image shows: give one")
        if self.attention and not self.prompt:
            raise InputError("--attention shows where each word goes: give a --prompt")
        if self.attention_steps is not None:
            first, end = self.attention_steps
            if not (self.attention and 0 <= first < end <= (self.steps or end)):
                raise InputError(
                    f"--attention-steps {first} {end}: give --attention, and 0 <= first < end <= "
                    f"--steps {self.steps}"
                )
        if (self.gif or self.attention) and (self.init or self.inpaint or self.interpolate):
            raise InputError(
                "--gif and --attention show images that come out of noise alone: leave them out"
            )


def main(options: SampleOptions) -> None:
    from diffusion.output import SampleFolder
    from diffusion.sampling import ImageSampler, load_for_sampling
    from unet.training.task import Processes

    check_paths(options, made=("out", "merged"))
    if options.merged and options.merged.exists() and not options.overwrite:
        raise InputError(f"--merged {options.merged} is there already: give --overwrite")
    processes = Processes.started(options.device)
    folder = SampleFolder(options.out, overwrite=options.overwrite)
    model = load_for_sampling(options.model, options.device, options.lora)
    if model.masks and (options.init or options.inpaint or options.interpolate):
        raise InputError(
            "--init, --inpaint and --interpolate are for models of images alone, and this one "
            "makes masks: leave them out"
        )
    sampler = ImageSampler(model, options)
    options = replace(options, steps=sampler.options.steps)  # checked again, now with a number
    names = None
    if options.condition is not None:
        wanted, names = given_conditions(options, sampler)
        check_sizes(options, sampler, wanted)
        options = replace(options, count=len(wanted), condition=None, each=1)
    else:
        wanted = chosen_conditions(options, sampler)
    for remark in (r for text in options.prompt for r in sampler.text.remarks(text)):
        print(f"note: {remark}", file=sys.stderr)
    plan = chosen_plan(options, sampler, wanted)
    folder.begin(
        processes,
        sampler.channels,
        names,
        masks=sampler.mask_channels,
        palette=model.masks.palette if model.masks else None,
        dtype=model.pixels.dtype,
    )
    parts = sampler.parts(sampler.sizes(wanted), processes)
    for part, images in zip(parts, made(options, sampler, plan, wanted, processes), strict=True):
        folder.add(images, options.first + part.start)
    processes.wait()
    if processes.main:
        write_pictures(options, sampler, wanted, folder)
        if options.merged:
            model.save_pretrained(options.merged)
            print(f"model with its LoRA: {options.merged}")
        if model.joint:
            say_next("train-seg", "--data", "real_data", "--synthetic", options.out)
        elif model.masks and not model.condition:
            drawn = options.out / "images"
            say_next("sample-ddpm", "--model", "from-masks/model", "--condition", drawn)
        elif not model.masks:
            say_next("eval-ddpm", "--model", options.model, "--data", trained_on(options.model))


def trained_on(model: str) -> str:
    """The data that a model's run was trained on, or a word in its place if they are not known."""
    with contextlib.suppress(InputError):
        run = load_config(DiffusionOptions, Path(model).parent / "config.yaml")
        return str(run.get("data", "real_images"))
    return "real_images"


def write_pictures(
    options: SampleOptions, sampler: ImageSampler, wanted: Wanted, folder: SampleFolder
) -> None:
    """What shows all images together, and those of the first of them."""
    from diffusion.data.conditions import Asked

    numbers = range(options.first, options.first + options.count)
    if options.npz:
        shown = [Asked.of(w).shown for w in wanted] if sampler.classes else []
        labels = [int(kind) for kind in shown if kind is not None]
        folder.write_npz(numbers, labels or None)
    first = wanted[:SHOWN]
    if options.gif:
        frames = sampler.appearing(len(first), first, first=options.first)
        folder.write_gif([sampler.shown(frame) for frame in frames])
    if options.attention:
        images, maps = sampler.attending(first, options.attention_steps, first=options.first)
        words = [sampler.text.words(str(Asked.of(w).shown)) for w in first]
        folder.write_attention(sampler.shown(images), words, maps, options.first)
    print(f"images: {folder.write_grid(numbers, sampler.shown)}")


def given_conditions(options: SampleOptions, sampler: ImageSampler) -> tuple[Wanted, list[str]]:
    """The pictures of --condition, each as often as it is asked for, with the class or prompt of
    each in turn, and the names of the files.

    Pixels are read when they are needed, and those of the first CHECKED files now as well: a bad
    file stops the command before anything of an earlier run is replaced.
    """
    from diffusion.data.whole import CHECKED

    condition = sampler.model.condition
    found = find_conditions(options, masks=condition is not None and condition.kind == "mask")
    pictures: list[Picture] = []
    names: list[str] = []
    made: dict[str, Path] = {}  # from which file each is
    for file in found.files:
        name = (found.place(file) / file.stem).as_posix()
        if name in made:
            raise InputError(
                f"{made[name]} and {file} would both be written to {name!r}: rename one"
            )
        made[name] = file
        picture = sampler.made_from(file, resize=bool(options.init or options.inpaint))
        if len(made) <= CHECKED:
            picture.read()
        for i in range(options.each):
            pictures.append(picture)
            names.append(f"{name}_{i}" if options.each > 1 else name)
    numbers = range(len(names))
    return sampler.wanted(numbers, options.class_, options.prompt, pictures), names


def find_conditions(options: SampleOptions, *, masks: bool) -> Inputs:
    """The files of --condition, in it and below it.

    Args:
        masks: the model makes images from masks.

    Raises:
        InputError: no image, or a volume; images beside masks, where these are meant; an --out that
            holds conditions, whose places its files could take.
    """
    from segmentation.data.inputs import find_inputs
    from unet.files.volumes import is_volume
    from unet.training.run import is_main_process

    path, out = options.condition, options.out.resolve()
    assert path is not None
    if path.is_dir() and is_volume(path):
        raise InputError(
            f"--condition {path} is a volume: save its slices as images, such as PNG files"
        )
    found = find_inputs(path)
    if masks and (beside := [*found.mask_folders, *found.mask_files]):
        raise InputError(
            f"--condition {path} holds images beside masks, such as those of "
            f"{beside[0]}: name a folder of masks alone"
        )
    for folder in dict.fromkeys(file.parent for file in found.files):
        if folder.resolve().is_relative_to(out):
            raise InputError(
                f"--out {options.out} holds conditions, in {folder}, that samples could be written "
                "over: give another folder"
            )
    if is_main_process():
        if found.remark:
            print(found.remark, file=sys.stderr)
        tops = (place.parts[0] for place in map(found.place, found.files) if place.parts)
        if below := Counter(tops):
            print(f"in folders below {path}: {listed(below)}")
    return found


def check_sizes(options: SampleOptions, sampler: ImageSampler, wanted: Wanted) -> None:
    """Raises an InputError for what cannot be written of images of these sizes."""
    sizes, trained = sampler.sizes(wanted), (sampler.height, sampler.width)
    if options.attention and (other := next((s for s in sizes if s != trained), None)):
        raise InputError(
            f"--attention is of images of {trained[0]} x {trained[1]}, as in training, and one "
            f"would be {other[0]} x {other[1]}: leave it out"
        )
    if len(set(sizes)) > 1 and (options.npz or options.gif):
        raise InputError(
            f"the images would be of {len(set(sizes))} sizes, such as {sizes[0][0]} x "
            f"{sizes[0][1]}, and --npz and --gif are of one: leave them out"
        )


def chosen_conditions(options: SampleOptions, sampler: ImageSampler) -> Wanted:
    """The class or prompt of each image; None: any."""
    numbers: Sequence[int] = range(options.first, options.first + options.count)
    if options.interpolate:  # all of one kind, or of any
        if not (options.class_ or options.prompt):
            return [None] * options.count
        numbers = [0] * options.count
    return sampler.wanted(numbers, options.class_, options.prompt)


def chosen_plan(options: SampleOptions, sampler: ImageSampler, wanted: Wanted) -> Plan:
    """The plan of the options: from noise, or from images."""
    from unet.files.images import image_info

    if options.init:
        return sampler.plans.variants(picture(options.init, sampler), options.strength or STRENGTH)
    if options.inpaint and options.mask:
        image, drawn = (image_info(path) for path in (options.inpaint, options.mask))
        if image.height * drawn.width != image.width * drawn.height:
            raise InputError(
                f"the image is {image.height} x {image.width} and the mask '{options.mask}' "
                f"{drawn.height} x {drawn.width}: give a mask of the same proportions"
            )
        mask = white(options.mask, sampler)
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
    by, sizes = sampler.options.sampler, sampler.sizes(wanted)
    first, last = min(sizes), max(sizes)
    size = f"{first[0]} x {first[1]}" + (f" to {last[0]} x {last[1]}" if first != last else "")
    tile = f"{sampler.height} x {sampler.width}"
    tiled = any(h > sampler.height or w > sampler.width for h, w in sizes)
    each = "per tile" if tiled else "per image"
    size += f", in overlapping tiles of {tile}," if tiled else ""
    said = (
        f"{counted(options.count, 'image')} of {size} with {by}: "
        f"{counted(plan.evaluations, 'evaluation')} of the network {each}"
        f"{doubled}{before}{shared}"
    )
    if processes.main:
        print(said)
    total = plan.steps * len(sampler.parts(sizes, processes))
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
    from diffusion.data.pixels import fitted, known_ranges
    from diffusion.data.sources import HowToRead
    from unet.files.images import image_info
    from unet.files.pages import naming

    reading = sampler.reading
    pixels = HowToRead(reading=reading, background=sampler.background).image(path)
    with naming(path):
        found = fitted(
            pixels,
            (sampler.height, sampler.width),
            sampler.channels,
            known_ranges(sampler.model.info).get(pixels.dtype.name),
            image_info(path, reading).nodata,
            fine=sampler.pixels.fine,
            alpha=sampler.background is None,
        )
    return found[None].to(sampler.device)


def white(path: Path, sampler: ImageSampler) -> Tensor:
    """Where a picture is white, (1, 1, H, W), whatever the images are: resized and cropped as they
    are. What is transparent is not white: nothing was painted there.
    """
    from diffusion.data.pixels import fitted
    from diffusion.data.sources import HowToRead
    from unet.files.pages import naming

    pixels = HowToRead(background=(0, 0, 0)).image(path)
    with naming(path):
        found = fitted(pixels, (sampler.height, sampler.width), 1)
    return (found[None] > 0).to(sampler.device)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, SampleOptions, argv, description=__doc__)
