"""Learning from images without labels: by a diffusion model of them, and by labels of our own.

A diffusion model of the images starts a segmentation of the labelled ones, the teacher. That labels
the others (pseudo-labels), and a second segmentation starts where the first one did and learns from
both kinds of labels (self-training; Noisy Student, arXiv 1911.04252). Each part is an ordinary run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.options import DiffusionOptions
from diffusion.training import train as learn_to_draw
from segmentation.data.pairs import Pair, kind
from segmentation.decisions import BATCH, Part, decide, part_of_budget
from segmentation.options import SegmentationOptions
from segmentation.segmenter import load
from segmentation.training import load_data
from segmentation.training import train as learn_to_label
from unet import PRESETS
from unet.errors import InputError
from unet.files.images import image_info, list_images, read_image, read_mask, write_image
from unet.files.pages import Reading
from unet.training.config_file import save_config
from unet.training.run import RunFolder, is_main_process
from unet.training.task import Processes
from unet.weights.folder import make_repository
from unet.words import counted
from unet_diffusion.starting import segmentation_start

NETWORK = "shared"  # where none is named: one that takes a timestep
ENOUGH = 2**23  # pixels of unlabelled images with labels of our own: 32 images of 512 x 512


def train_with_unlabelled(options: SegmentationOptions) -> dict[str, float]:
    """Trains in RUN/pretraining, RUN/teacher and RUN, or goes on in whichever part was left.

    With --init that model is the start, and the diffusion model is left out.

    Returns:
        The best held-out figures.

    Raises:
        InputError: images that do not go with the labelled ones, before anything is trained.
    """
    assert options.unlabelled is not None
    files = list_images(options.unlabelled)
    crop = check(options, options.unlabelled, files)
    main = is_main_process()
    folder = RunFolder(options.out)
    with folder.locked(resume=options.resume) if main else nullcontext():
        if main and options.push_to_hub is not None:  # which the last part does
            make_repository(options.push_to_hub)
        if main and not (options.out / "config.yaml").exists():
            save_config(replace(options, resume=False), options.out / "config.yaml")
        init = options.init or str(options.out / "pretraining/model")
        if options.init is None and not (options.out / "pretraining/report.png").exists():
            _say("Without labels: a diffusion model of the images")
            learn_to_draw(first_part(options, options.out / "pretraining", crop))
        start = segmentation_start(init)
        teacher = options.out / "teacher"
        if not (teacher / "report.png").exists():
            _say("With labels: a segmentation that starts from it, to label the other images")
            learn_to_label(teacher_part(options, init), start)
        pairs = own_labels(options, teacher, files)
    _say("With both: a segmentation that starts from it again, and learns from its labels, too")
    return learn_to_label(replace(options, resume=True), start, also=pairs)


def _say(part: str) -> None:
    if is_main_process():
        print(part, flush=True)


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
        options,
        out=run,
        unlabelled=None,
        push_to_hub=None,
        init=init,
        resume=(run / "config.yaml").exists(),
        **_budget(options, "teacher"),
    )


def _budget(options: SegmentationOptions, part: Part) -> dict[str, Any]:
    amount, unit = part_of_budget(options, part)
    budget: dict[str, Any] = dict.fromkeys(("steps", "epochs", "max_minutes"))
    return budget | {"max_minutes" if unit == "minutes" else unit: amount}


def own_labels(options: SegmentationOptions, teacher: Path, files: Sequence[Path]) -> list[Pair]:
    """The unlabelled images, or as many of them as are enough, with masks by the teacher.

    The masks are kept in RUN/teacher/labels and are not made twice. Every process makes a part of
    them.
    """
    reading, folder = options.reading, teacher / "labels"
    infos = ((file, reading.of(image_info(file, reading))) for file in files)
    slices = [(f, page if i.pages > 1 else None, i) for f, i in infos for page in range(i.pages)]
    count = max(1, ENOUGH // max(1, sum(i.height * i.width for *_, i in slices) // len(slices)))
    chosen = np.linspace(0, len(slices) - 1, min(count, len(slices))).round().astype(int)
    masked = [(*slices[i], folder / f"{i}.tif") for i in chosen]
    processes = Processes.started(options.device)
    missing = [slice_ for slice_ in masked if not slice_[-1].exists()]
    if missing:
        begun = time.monotonic()
        segmenter = load(teacher / "model", device=options.device, tta=True)
        for file, page, _, mask in processes.share(missing):
            image = read_image(file, page, reading)
            if segmenter.instances:
                write_image(mask, segmenter.labels(image).astype(np.uint16))
            else:
                write_image(mask, segmenter(image))
        processes.wait()
        minutes = (time.monotonic() - begun) / 60
        _say(f"labelled {counted(len(missing), 'image')} in {minutes:.1f} minutes: {folder}")
    return [
        Pair(
            name=f"unlabelled {mask.stem}",
            image=file,
            page=page,
            mask=read_mask(mask),
            info=info,
            reading=reading,
        )
        for file, page, info, mask in masked
    ]


def check(options: SegmentationOptions, unlabelled: Path, files: list[Path]) -> int:
    """The side of the crops, of images that go with the labelled ones.

    Raises:
        InputError: other channels or another depth; too small for a crop; a network without a
            timestep.
    """
    start = segmentation_start(options.init)
    alone = replace(options, unlabelled=None)
    if start is None:
        alone = replace(alone, network=_drawing_network(options))
    data = load_data(alone, start)
    crop = min(decide(alone, data, start).crop)
    wanted = data.pairs[0].info
    for file in files:
        info = options.reading.of(image_info(file, options.reading))
        if (info.channels, info.dtype) != (wanted.channels, wanted.dtype):
            raise InputError(
                f"{kind(info)} in the unlabelled {str(file)!r}, but {kind(wanted)} in the labelled "
                f"image {data.pairs[0].name}: save all images alike"
            )
        if min(info.height, info.width) < crop:
            raise InputError(
                f"the unlabelled {str(file)!r} has {info.height} x {info.width} pixels, too few "
                f"for a crop of {crop}: leave it out, or give a smaller --crop"
            )
    _tell_held_out([data.pairs[i] for i in data.val], files, options.reading)
    return crop


def _drawing_network(options: SegmentationOptions) -> str:
    """The preset of the network in both lives.

    Raises:
        InputError: it takes no timestep.
    """
    name = options.network or NETWORK
    config = PRESETS[name].config if name in PRESETS else None
    if config is None or config.block != "res" or config.context_channels is not None:
        fits = [n for n, p in PRESETS.items() if p.config.block == "res"]
        raise InputError(
            f"--unlabelled needs a network that takes a timestep, and --network {name} does not: "
            f"choose one of {', '.join(fits)}"
        )
    return name


def _tell_held_out(val: Sequence[Pair], files: Sequence[Path], reading: Reading) -> None:
    """Says which held-out images are among the unlabelled ones: it is allowed, but to be known."""
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
