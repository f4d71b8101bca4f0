"""What the training of a segmentation will be: decided once, from the options and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from segmentation.data.augment import Augmentation
from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.normalisation import Normalisation
from segmentation.data.samples import image_shape
from segmentation.data.weights import are_parted_by_membranes
from segmentation.losses import Loss, make_loss
from segmentation.model import SegmentationUNet
from segmentation.options import BestBy, SegmentationOptions
from unet import PRESETS, UNetConfig
from unet.errors import InputError
from unet.geometry import input_size, output_size
from unet.training.plan import (
    AS_ASKED,
    Decision,
    FitPlan,
    RunPlan,
    choose_optimizer,
    filled,
    plan_fit,
    told,
    told_budget,
)
from unet.weights.crossing import plain
from unet.weights.start import Start, read_start
from unet.words import counted

NETWORK = "segmentation"  # where none is named
BATCH = 4  # crops a step
CROP = 256  # usual side of a training crop
JUDGED = 10  # training masks that decide whether membranes part the cells
MEMBRANE_WEIGHT = 10.0  # w0 of 2015


@dataclass(frozen=True, kw_only=True)
class SegmentationPlan(RunPlan):
    """All that the training of a segmentation reads beside its data.

    Attributes:
        options: the command line with each choice filled in, which repeats the run.
        crop, target: height and width of a training crop, and of its part that is labelled.
        border: w0 and sigma of the border weights (arXiv 1505.04597, eq. 2); None: no weights.
        best_by: the figure that the kept weights are best for.
    """

    options: SegmentationOptions
    crop: tuple[int, int]
    target: tuple[int, int]
    augmentation: Augmentation
    border: tuple[float, float] | None
    loss: Loss
    best_by: BestBy


def decide(
    options: SegmentationOptions, data: SegmentationData, start: Start | None = None
) -> SegmentationPlan:
    """What the run of these options on these data will be.

    Args:
        start: what --init names, if it is given.

    Raises:
        InputError: options that do not fit each other or the data.
    """
    start = start or own_start(options)
    count = len(data.table.values)
    outputs = 1 if count == 2 else count
    network, why = chosen_network(options, data.channels, start)
    info: dict[str, Any] = {
        "classes": data.table.to_dict(),
        "normalisation": data.normalisation.to_dict(),
        "threshold": 0.5,
    }
    names = data.pairs[0].info.names
    info |= {"channel_names": list(names)} if names else {}
    info |= {"reading": said} if (said := options.reading.to_dict()) else {}
    if options.deep_supervision:
        info["deep_supervision"] = True
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SegmentationUNet(network, outputs, info).parameters())
    fit, optimizer = chosen_fit(options, start)
    crop, whole = chosen_crop(options, data, network, fit)
    border, best_by, judged = chosen_judgement(options, data)
    decisions = (
        Decision("network", f"{parameters / 1e6:.2f} M parameters", why),
        Decision("crops", f"{crop[0]} x {crop[1]}, {fit.batch_size} a step", whole),
        normalisation(
            data.normalisation,
            "as of the start" if start else f"of {counted(len(data.train), 'image')}",
        ),
        optimizer,
        told_budget(options),
        *judged,
    )
    found = data.describe(names=False).splitlines()
    info["training"] = {"data": found, "run": told(decisions)}
    return SegmentationPlan(
        options=filled(
            options,
            fit,
            network=options.network or (None if start else NETWORK),
            border_weight=border[0] if border else 0.0,
            best_by=best_by,
        ),
        decisions=decisions,
        fit=fit,
        network=network,
        outputs=outputs,
        info=info,
        crop=crop,
        target=(output_size(network, crop[0]), output_size(network, crop[1])),
        augmentation=Augmentation(
            **{name: getattr(options, name) for name in Augmentation.__dataclass_fields__}
        ),
        border=border,
        loss=chosen_loss(options, data, outputs),
        best_by=best_by,
        start=start.for_channels(data.channels) if start else None,
    )


def own_start(options: SegmentationOptions) -> Start | None:
    """The segmentation that --init names, if it is given.

    Raises:
        InputError: the model of another task.
    """
    if options.init is None:
        return None
    start = read_start(options.init)
    if start.config.embedding_channels or start.config.context_channels is not None:
        raise InputError(
            f"--init {options.init} is a diffusion model, which needs a timestep: unet-train-seg "
            "makes a start of it, in Python unet_diffusion.starting.segmentation_start"
        )
    return start


def chosen_network(
    options: SegmentationOptions, channels: int, start: Start | None
) -> tuple[UNetConfig, str]:
    """The network that the options name, or that of the start, for images of so many channels."""
    if start and options.network is None:
        config, why = start.config, "as of the start"
    else:
        name = options.network or NETWORK
        if name not in PRESETS:
            raise InputError(f"--network {name!r} is no preset: choose from {', '.join(PRESETS)}")
        config = PRESETS[name].config
        why = f"{name}, {AS_ASKED if options.network else 'the default'}"
    if config.context_channels is not None:
        raise InputError(
            f"--network {options.network} is a diffusion network that reads text: choose from "
            f"{', '.join(n for n, p in PRESETS.items() if p.config.context_channels is None)}"
        )
    config = replace(plain(config), in_channels=channels)
    if options.width:
        config, why = replace(config, channels=options.width), f"{why}, {options.width} channels"
    return config, why


def chosen_fit(
    options: SegmentationOptions, start: Start | None = None
) -> tuple[FitPlan, Decision]:
    """Optimizer and rate where none is named.

    What a diffusion model starts has everything to learn about labels: there adamw's steps are as
    much too small as for random weights (docs/experiments.md).
    """
    goes_on = start is not None and "classes" in start.info
    optimizer, why = choose_optimizer(
        options, {"muon's steps would move the weights of a segmentation far": goes_on}
    )
    if optimizer == "muon" and start is not None and not options.optimizer:
        why = "as for random weights: it has everything to learn about labels"
    lr, momentum = (0.08, 0.8) if optimizer == "muon" else (2e-3, 0.9)
    fit = plan_fit(options, batch_size=BATCH, optimizer=optimizer, lr=lr, momentum=momentum)
    return fit, Decision("optimizer", f"{optimizer} at {fit.lr:g}", why)


def chosen_crop(
    options: SegmentationOptions, data: SegmentationData, config: UNetConfig, fit: FitPlan
) -> tuple[tuple[int, int], str]:
    """Height and width of the training crops, and why."""
    shapes = {image_shape(data, i) for i in data.train}
    if options.crop:
        size, why = (options.crop, options.crop), AS_ASKED
    elif options.crop is None:
        largest = [max(s[axis] for s in shapes) for axis in (0, 1)]
        usual = (min(CROP, -(-n // config.stride) * config.stride) for n in largest)
        h, w = (input_size(config, n) for n in usual)
        size, why = (h, w), "the usual side" if min(largest) >= CROP else "as large as the images"
    elif len(shapes) > 1:
        raise InputError(
            f"--crop 0 takes whole images, but the training images have {len(shapes)} sizes: give "
            "the side of a crop"
        )
    else:
        size, why = shapes.pop(), f"whole images, {AS_ASKED}"
    part = fit.batch_size // fit.accumulate
    if config.norm == "batch" and part * math.prod(-(-n // config.stride) for n in size) < 2:
        raise InputError(
            f"crops of {size[0]} x {size[1]} are a single pixel at the coarsest level, and batch "
            "norm needs two to compare: give a larger --crop or --batch-size"
        )
    return size, why


def chosen_judgement(
    options: SegmentationOptions, data: SegmentationData
) -> tuple[tuple[float, float] | None, BestBy, list[Decision]]:
    """Border weights and the figure that weights are kept by, where the masks have to say."""
    count = len(data.table.values)
    if data.val and not any((data.load(i)[1] != IGNORE).any() for i in data.val):
        raise InputError(
            "every pixel of the held-out masks is ignored: hold out other images, with --val, "
            "--fold or --val-names"
        )
    if options.best_by == "v_rand" and count != 2:
        raise InputError(
            f"--best-by v_rand compares cells that membranes part, two classes, but the masks "
            f"have {count}: take loss or dice"
        )
    asked = options.border_weight is not None and options.best_by is not None
    membranes = not asked and (
        count == 2 and are_parted_by_membranes(data.load(i)[1] for i in list(data.train)[:JUDGED])
    )
    masks = f"{'' if membranes else 'no '}thin membranes part the cells of class 1"
    w0 = MEMBRANE_WEIGHT if membranes else 0.0
    w0 = w0 if options.border_weight is None else options.border_weight
    best_by: BestBy = options.best_by or ("v_rand" if membranes else "loss")
    kept = Decision("kept weights", f"best by {best_by}", AS_ASKED if options.best_by else masks)
    if not data.val:
        kept = Decision("kept weights", "the last ones", "nothing is held out")
    judged = [
        kept,
        Decision("border weight", f"{w0:g}", masks if options.border_weight is None else AS_ASKED),
    ]
    return (w0, options.border_sigma) if w0 else None, best_by, judged


def chosen_loss(options: SegmentationOptions, data: SegmentationData, outputs: int) -> Loss:
    """The loss that the options name, with its weights of the classes."""
    weights = options.class_weights or None
    if options.balance:
        weights = tuple(1 / (len(data.table.shares) * share) for share in data.table.shares)
    return make_loss(
        options.loss,
        outputs,
        class_weights=weights,
        label_smoothing=options.label_smoothing,
        gamma=options.focal_gamma,
    )


def normalisation(found: Normalisation, why: str) -> Decision:
    """The statistics that the images are scaled by."""
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (found.mean, found.std))
    return Decision("normalisation", f"mean {mean}, deviation {std}", why)
