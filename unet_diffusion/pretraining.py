"""Learning from images without labels first: a diffusion model of them starts a segmentation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion.options import DiffusionOptions
from diffusion.training import train
from segmentation.data.pairs import Pair, kind
from segmentation.data.splits import split_pairs
from segmentation.decisions import BATCH, CROP, PRETRAINING
from segmentation.options import SegmentationOptions
from segmentation.training import find_data
from unet import PRESETS
from unet.errors import InputError
from unet.files.images import image_info, list_images, read_image
from unet.training.config_file import save_config
from unet.training.plan import given_budget
from unet.training.run import RunFolder, is_main_process
from unet.weights.crossing import plain
from unet.weights.start import Start
from unet_diffusion.starting import segmentation_start

NETWORK = "shared"  # where none is named: one that takes a timestep


def learn_unlabelled(options: SegmentationOptions) -> tuple[SegmentationOptions, Start]:
    """Trains a diffusion model of the unlabelled images in RUN/pretraining, or goes on with it.

    Returns:
        The options of the segmentation, which goes on in the same run, and what it starts from.

    Raises:
        InputError: images that do not go with the labelled ones, before anything is trained.
    """
    assert options.unlabelled is not None
    run = options.out / "pretraining"
    crop = check(options, options.unlabelled)
    folder = RunFolder(options.out)
    lock = folder.locked(resume=options.resume) if is_main_process() else nullcontext()
    with lock:
        if is_main_process() and not (options.out / "config.yaml").exists():
            save_config(replace(options, resume=False), options.out / "config.yaml")
        if not (run / "report.png").exists():
            if is_main_process():
                print("First part, without labels: a diffusion model of the images", flush=True)
            train(first_part(options, run, crop))
    start = segmentation_start(str(run / "model"))
    assert start is not None
    if is_main_process():
        print("Second part, with labels: the segmentation that starts from it", flush=True)
    return replace(options, resume=True), start


def first_part(options: SegmentationOptions, run: Path, crop: int) -> DiffusionOptions:
    """The diffusion run: the segmentation's network, crops, batch and device; its share of time."""
    amount, unit = given_budget(options)
    part = PRETRAINING * amount
    budget: dict[str, Any] = {
        "max_minutes" if unit == "minutes" else unit: max(1, round(part))
        if unit == "steps"
        else part,
    }
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
        **budget,
    )


def check(options: SegmentationOptions, unlabelled: Path) -> int:
    """The side of the crops, of images that go with the labelled ones.

    Raises:
        InputError: other channels or another depth; too small for a crop; a network without a
            timestep.
    """
    config = (
        PRESETS[options.network or NETWORK].config if options.network in (None, *PRESETS) else None
    )
    if config is None or config.block != "res" or config.context_channels is not None:
        fits = [n for n, p in PRESETS.items() if p.config.block == "res"]
        raise InputError(
            f"--unlabelled needs a network that takes a timestep, and --network {options.network} "
            f"does not: choose one of {', '.join(fits)}"
        )
    if options.init is not None:
        raise InputError(
            "--unlabelled makes the model to start from, and --init names one: give one of them"
        )
    pairs = find_data(options)
    wanted = pairs[0].info
    files = list_images(unlabelled)
    side = min(min(pair.info.height, pair.info.width) for pair in pairs)
    stride = plain(config).stride
    crop = options.crop or max(stride, min(CROP, side) // stride * stride)
    for file in files:
        info = options.reading.of(image_info(file, options.reading))
        if (info.channels, info.dtype) != (wanted.channels, wanted.dtype):
            raise InputError(
                f"{kind(info)} in the unlabelled {str(file)!r}, but {kind(wanted)} in the labelled "
                f"image {pairs[0].name}: save all images alike"
            )
        if min(info.height, info.width) < crop:
            raise InputError(
                f"the unlabelled {str(file)!r} has {info.height} x {info.width} pixels, too few "
                f"for a crop of {crop}: leave it out, or give a smaller --crop"
            )
    _tell_held_out(options, pairs, files)
    return crop


def _tell_held_out(options: SegmentationOptions, pairs: list[Pair], files: list[Path]) -> None:
    """Says which held-out images are among the unlabelled ones: it is allowed, but to be known."""
    _, val = split_pairs(
        pairs,
        options.val,
        options.fold,
        options.val_names or None,
        ignore_value=options.ignore_value,
    )
    reading = options.reading
    headers = {file: image_info(file, reading) for file in files}
    sizes = {(info.height, info.width) for info in headers.values()}
    whole = {p.source: p for p in pairs}
    held_out = [whole[p.source] for p in val]
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
