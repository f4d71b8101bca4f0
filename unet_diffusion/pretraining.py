"""Learning from images without labels: by a diffusion model of them, and by pseudo-labels.

A diffusion model of the images starts a segmentation of the labelled ones, the teacher. The teacher
labels the other images (pseudo-labels), and a second segmentation starts from the same weights as
the first and learns from both kinds of labels (self-training; Noisy Student, arXiv 1911.04252).
Each part is an ordinary run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.options import DiffusionOptions
from diffusion.training import train as learn_to_draw
from segmentation.data.inputs import find_inputs
from segmentation.data.pairs import Pair, kind
from segmentation.decisions import (
    BATCH,
    Part,
    check_options,
    decide,
    part_of_budget,
    share_of_budget,
)
from segmentation.options import SegmentationOptions
from segmentation.segmenter import RasterSource, load
from segmentation.training import load_data
from segmentation.training import train as learn_to_label
from unet import PRESETS
from unet.errors import InputError
from unet.files.images import image_info, read_image, read_mask, write_image
from unet.files.mask_values import Value
from unet.files.pages import ImageInfo, Reading, missing
from unet.training.config_file import save_config
from unet.training.run import RunFolder, check_first, is_main_process
from unet.training.task import Processes
from unet.weights.folder import make_repository
from unet.words import counted
from unet_diffusion.starting import segmentation_start

NETWORK = "shared"  # where none is named: one that takes a timestep
ENOUGH = 2**23  # pixels of unlabelled images that get pseudo-labels: 32 images of 512 x 512


def train_with_unlabelled(options: SegmentationOptions) -> dict[str, float]:
    """Trains in RUN/pretraining, RUN/teacher and RUN, or resumes the part that was interrupted.
    With --init that model is the start, and no diffusion model is trained.

    Returns:
        The best held-out figures.

    Raises:
        InputError: images that do not go with the labelled ones, before anything is trained.
    """
    assert options.unlabelled is not None
    check_first(options)
    unlabelled = check(options, find_unlabelled(options.unlabelled))
    main = is_main_process()
    folder = RunFolder(options.out)
    with folder.locked(resume=options.resume) if main else nullcontext():
        if main and options.push_to_hub is not None:  # which the last part does
            make_repository(options.push_to_hub)
        if main and not (options.out / "config.yaml").exists():
            save_config(replace(options, resume=False), options.out / "config.yaml")
        init = options.init or str(options.out / "pretraining/model")
        if options.init is None and not (options.out / "pretraining/report.png").exists():
            _say(options, "pretraining", "a diffusion model learns from the images, without labels")
            learn_to_draw(first_part(options, options.out / "pretraining", unlabelled.crop))
        start = segmentation_start(init)
        teacher = options.out / "teacher"
        if not (teacher / "report.png").exists():
            _say(
                options,
                "teacher",
                "a segmentation learns from the labels, to label the rest",
            )
            learn_to_label(teacher_part(options, init), start)
        pairs = own_labels(options, teacher, unlabelled)
    _say(options, "student", "a segmentation learns from these labels as well")
    return learn_to_label(replace(options, resume=True), start, also=pairs)


def _say(options: SegmentationOptions, part: Part, what: str) -> None:
    if is_main_process():
        print(f"{share_of_budget(options, part):.0%} of the budget: {what}", flush=True)


def first_part(options: SegmentationOptions, run: Path, crop: int) -> DiffusionOptions:
    """The diffusion run: the segmentation's network, crops, batch and device; its share of time."""
    return DiffusionOptions(
        out=run,
        data=str(options.unlabelled),
        axes=options.axes,
        channels=options.channels,
        nodata=options.nodata,
        crops=True,
        size=crop,
        network=options.network or NETWORK,
        width=options.width,
        noise="cosine",  # what is labelled has next to no noise, which flow seldom trains on
        batch_size=options.batch_size or BATCH,
        accumulate=options.accumulate,
        device=options.device,
        workers=options.workers,
        precision=options.precision,
        compile=options.compile,
        seed=options.seed,
        resume=(run / "config.yaml").exists(),
        **_budget(options, "pretraining"),
    )


def teacher_part(options: SegmentationOptions, init: str) -> SegmentationOptions:
    """The first segmentation: the options of the second one, without the unlabelled images."""
    run = options.out / "teacher"
    return replace(
        _without_unlabelled(options),
        out=run,
        push_to_hub=None,
        init=init,
        resume=(run / "config.yaml").exists(),
        **_budget(options, "teacher"),
    )


def _budget(options: SegmentationOptions, part: Part) -> dict[str, Any]:
    amount, unit = part_of_budget(options, part)
    budget: dict[str, Any] = dict.fromkeys(("steps", "epochs", "max_minutes"))
    return budget | {"max_minutes" if unit == "minutes" else unit: amount}


class Slice(NamedTuple):
    """An unlabelled image: one of a file, or a page of it."""

    name: str  # the path from the folder of all, and the page
    file: Path
    page: int | None
    info: ImageInfo  # of the file


class Unlabelled(NamedTuple):
    """Facts about the unlabelled images, for the parts of a training.

    Attributes:
        chosen: those that get pseudo-labels.
        crop: side of the crops of the diffusion model.
        ignored: the value of pixels without a label in the masks of the labelled images.
    """

    chosen: list[Slice]
    crop: int
    ignored: Value | None


def find_unlabelled(folder: Path) -> Sequence[Path]:
    """The images of a folder and of those below it, all of which the diffusion model learns from.

    Raises:
        InputError: no image, or also masks or predictions.
    """
    found = find_inputs(folder)
    if found.left:
        raise InputError(
            f"--unlabelled {folder} holds masks or predictions as well, such as {found.left[0]}: "
            "name a folder of images alone"
        )
    return found.files


def to_label(files: Sequence[Path], reading: Reading, folder: Path) -> list[Slice]:
    """The images of a folder that get pseudo-labels: all, or evenly spread ones with ENOUGH pixels
    in all.
    """
    slices = []
    for file in files:
        info, name = reading.of(image_info(file, reading)), file.relative_to(folder).as_posix()
        if info.pages == 1:
            slices.append(Slice(name, file, None, info))
            continue
        slices += [Slice(f"{name} page {i}", file, i, info) for i in range(info.pages)]
    pixels = sum(s.info.height * s.info.width for s in slices) // len(slices)
    count = min(max(1, ENOUGH // max(1, pixels)), len(slices))
    places = np.linspace(0, len(slices) - 1, count).round().astype(int)
    return [slices[i] for i in places]


def own_labels(options: SegmentationOptions, teacher: Path, unlabelled: Unlabelled) -> list[Pair]:
    """The images with masks predicted by the teacher, which are kept in RUN/teacher/labels and not
    made twice. Every process makes a part of them.
    """
    reading, folder, chosen = options.reading, teacher / "labels", unlabelled.chosen
    masks = [folder / f"{image.name}.tif" for image in chosen]
    processes = Processes.started(options.device)
    processes.wait()  # the main process saves the threshold with the teacher last of all
    begun, made = time.monotonic(), [mask for mask in masks if not mask.exists()]
    if made:
        segmenter = load(teacher / "model", device=options.device, tta=True)
        for image, mask in processes.share([*zip(chosen, masks, strict=True)]):
            if mask.exists():
                continue
            stored = read_image(image.file, image.page, reading)
            source = RasterSource(stored, image.info.nodata)
            if segmenter.instances:
                probability, depth = segmenter.predict.found(source)
                numbers = segmenter.numbered(segmenter.decided(probability, source), depth)
                write_image(mask, without_number(numbers, unlabelled.ignored))
            else:
                write_image(mask, segmenter.table.decode(segmenter.decided_in_bands(source)))
        processes.wait()
        if processes.main:
            minutes = (time.monotonic() - begun) / 60
            print(f"labelled {counted(len(made), 'image')} in {minutes:.1f} minutes: {folder}")
    return [
        Pair(
            name=f"unlabelled {image.name}",
            image=image.file,
            page=image.page,
            mask=read_mask(mask),
            info=image.info,
            reading=reading,
        )
        for image, mask in zip(chosen, masks, strict=True)
    ]


def without_number(numbers: NDArray[np.int32], ignored: Value | None) -> NDArray[np.uint16]:
    """Numbered objects (H, W), none of which has the value of pixels without a label."""
    greys = {ignored} if isinstance(ignored, int) else {*(ignored or ())}
    if len(greys) == 1 and 0 not in greys:
        numbers = numbers + (numbers >= greys.pop())
    return numbers.astype(np.uint16)


def _without_unlabelled(options: SegmentationOptions) -> SegmentationOptions:
    """The options of a segmentation that learns from the labelled images alone."""
    share = options.synthetic_share if options.synthetic else SegmentationOptions.synthetic_share
    return replace(options, unlabelled=None, synthetic_share=share)


def check(options: SegmentationOptions, files: Sequence[Path]) -> Unlabelled:
    """Checks that the unlabelled files fit the labelled images, and describes them.

    Raises:
        InputError: images that cannot be read, of other channels or another depth, too small for a
            crop, or of which nothing was measured; a network without a timestep.
    """
    start = segmentation_start(options.init)
    alone, reading = _without_unlabelled(options), options.reading
    if start is None:
        alone = replace(alone, network=_drawing_network(options))
    check_options(alone, start)
    data = load_data(alone, start)
    plan = decide(alone, data, start)
    wanted = data.pairs[0].info
    for file in files:
        info = reading.of(image_info(file, reading))
        size = info.height, info.width
        if (info.channels, info.dtype) != (wanted.channels, wanted.dtype):
            raise InputError(
                f"{kind(info)} in the unlabelled {str(file)!r}, but {kind(wanted)} in the labelled "
                f"image {data.pairs[0].name}: save all images alike"
            )
        if options.crop == 0 and size != (wanted.height, wanted.width):
            raise InputError(
                f"--crop 0 takes whole images, of {wanted.height} x {wanted.width} pixels, and the "
                f"unlabelled {str(file)!r} has {size[0]} x {size[1]}: give the side of a crop"
            )
        if options.crop != 0 and min(size) < min(plan.target):
            raise InputError(
                f"the unlabelled {str(file)!r} has {size[0]} x {size[1]} pixels, too few for a "
                f"crop of {min(plan.target)}: leave it out, or give a smaller --crop"
            )
    assert options.unlabelled is not None
    chosen = to_label(files, reading, options.unlabelled)
    for image in chosen:
        nodata = image.info.nodata if image.info.nodata is not None else data.normalisation.nodata
        if missing(read_image(image.file, image.page, reading), nodata).all():
            raise InputError(
                f"nothing was measured in {image.name} of the unlabelled images: leave it out"
            )
    _tell_held_out([data.pairs[i] for i in data.val], files, reading)
    return Unlabelled(chosen, min(plan.crop), data.ignore_value)


def _drawing_network(options: SegmentationOptions) -> str:
    """The preset of the network in both lives.

    Raises:
        InputError: it takes no timestep.
    """
    name = options.network or NETWORK
    configs = {n: p.config for n, p in PRESETS.items()}
    fits = [n for n, c in configs.items() if c.block == "res" and c.context_channels is None]
    if name not in fits:
        raise InputError(
            "--unlabelled needs a network that takes a timestep and no text, and --network "
            f"{name} is none: choose one of {', '.join(fits)}"
        )
    return name


def _tell_held_out(val: Sequence[Pair], files: Sequence[Path], reading: Reading) -> None:
    """Says which held-out images are among the unlabelled ones: this is allowed, but should be
    known."""
    held_out = [replace(pair, window=None) for pair in val]
    headers = {file: image_info(file, reading) for file in files}
    sizes = {(info.height, info.width) for info in headers.values()}
    alike = {
        hash(p.read_image().tobytes()): p.name
        for p in held_out
        if (p.info.height, p.info.width) in sizes
    }
    pages = ((f, page) for f in files if alike for page in range(headers[f].pages))
    found = {alike.get(hash(read_image(f, p, reading).tobytes())) for f, p in pages} - {None}
    if found and is_main_process():
        print(
            f"note: {len(found)} of the {len(val)} held-out images are among the unlabelled ones: "
            "their pixels, though not their labels, are learnt from"
        )
