"""Decides how a segmentation is trained: once, from the options and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from segmentation.data.augment import Augmentation
from segmentation.data.dataset import SegmentationData
from segmentation.data.instances import CELL, smallest_counted
from segmentation.data.regions import parse_regions
from segmentation.data.samples import image_shape
from segmentation.data.slices import told_stacks
from segmentation.data.weights import find_cells
from segmentation.losses import Loss, RegionLoss, make_loss
from segmentation.model import DEPTH, DEPTH_CHANNELS, SegmentationUNet
from segmentation.options import BestBy, SegmentationOptions
from unet import PRESETS, UNetConfig
from unet.errors import InputError
from unet.geometry import input_size, output_size
from unet.symmetries import Flips, find_symmetries
from unet.training.plan import (
    AS_ASKED,
    Budget,
    Decision,
    FitPlan,
    RunPlan,
    choose_optimizer,
    filled,
    given_budget,
    plan_fit,
    remembered,
    told,
    told_budget,
)
from unet.weights.crossing import plain
from unet.weights.start import Start, read_start
from unet.words import counted

Part = Literal["pretraining", "teacher", "student"]
PARTS: dict[Part, float] = {"pretraining": 1 / 2, "teacher": 1 / 6, "student": 1 / 3}
"""Of the budget, with --unlabelled; without the first, the others share it: docs/experiments.md."""
NETWORK = "segmentation"  # where none is named
BATCH = 4  # crops a step
CROP = 256  # usual side of a training crop
ROTATIONS: dict[Flips, float] = {True: 180.0, "mirror": 15.0, False: 0.0}
JUDGED = 6  # training masks that decide which class are cells, and whether membranes part them
SCORED = 2**19  # pixels of the held-out images at an evaluation, for each minute of the budget
MEMBRANE_WEIGHT = 10.0  # w0 of 2015


@dataclass(frozen=True, kw_only=True)
class SegmentationPlan(RunPlan):
    """Everything that the training of a segmentation needs apart from its data.

    Attributes:
        options: the command line with each choice filled in, which repeats the run.
        crop, target: height and width of a training crop, and of its part that is labelled.
        border: w0 and sigma of the border weights (arXiv 1505.04597, eq. 2); None: no weights.
        cells: the class of the cells between which these are.
        best_by: the figure that the kept weights are best for.
        scored: the held-out images that are scored during training.
    """

    options: SegmentationOptions
    crop: tuple[int, int]
    target: tuple[int, int]
    augmentation: Augmentation
    border: tuple[float, float] | None
    cells: int
    loss: Loss
    best_by: BestBy
    scored: tuple[int, ...]


def decide(
    options: SegmentationOptions, data: SegmentationData, start: Start | None = None
) -> SegmentationPlan:
    """The plan of a run with these options on these data.

    Args:
        start: what --init names, if it is given.

    Raises:
        InputError: options that do not fit each other or the data.
    """
    start = start or own_start(options)
    count = len(data.table.values)
    outputs = DEPTH_CHANNELS if data.instances else 1 if count == 2 else count
    outputs = len(data.regions.names) if data.regions else outputs
    network, why = chosen_network(options, data.channels, start)
    info = model_info(options, data, network)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SegmentationUNet(network, outputs, info).parameters())
    fit, optimizer = chosen_fit(options, start)
    crop, whole = chosen_crop(options, data, network, fit)
    augmentation, told_augmentation = chosen_augmentation(options, data, crop)
    info["symmetries"] = list(augmentation.symmetries)
    judgement = chosen_judgement(options, data)
    best_by, border = judgement.best_by, judgement.border
    if count == 2:
        info["cells"] = judgement.cells if judgement.isbi else None
    if data.instances:
        info["smallest_object"] = smallest_counted(data.objects(i) for i in data.train)
    scored, part = chosen_part(data, fit)
    loss, balance = chosen_loss(options, data, 1 if data.instances else outputs)
    decisions = (
        Decision("network", f"{parameters / 1e6:.2f} M parameters", why),
        *_slices(data),
        *_regions(data),
        Decision("crops", f"{crop[0]} x {crop[1]}, {fit.batch_size} per step", whole),
        *_rare(data),
        told_augmentation,
        told_normalisation(data, start),
        optimizer,
        told_part(options) if options.unlabelled else told_budget(options),
        *_synthetic(options, data),
        *judgement.decisions,
        *_smallest(info),
        *part,
        *balance,
    )
    decisions = remembered(decisions, fit)
    found = data.describe(names=False).splitlines()
    info["training"] = {"data": found, "run": told(decisions)}
    return SegmentationPlan(
        options=filled(
            options,
            fit,
            network=options.network or (None if start else NETWORK),
            flips=augmentation.flips,
            rotation=augmentation.rotation,
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
        augmentation=augmentation,
        border=border,
        cells=judgement.cells,
        loss=loss,
        best_by=best_by,
        scored=scored,
        start=start.for_channels(data.channels) if start else None,
    )


def model_info(
    options: SegmentationOptions, data: SegmentationData, network: UNetConfig
) -> dict[str, Any]:
    """The entries of a model's `info` on its classes, its images and its outputs."""
    info: dict[str, Any] = {
        "classes": data.table.to_dict(),
        "normalisation": data.normalisation.to_dict(),
        "threshold": 0.5,
    }
    if data.regions:
        info["regions"] = [[name, list(values)] for name, values in data.regions.values.items()]
    if data.slices > 1:
        info["slices"] = data.slices
    first = data.pairs[0]
    if names := (first.around or [first])[0].info.names:
        info["channel_names"] = list(names)
    if reading := options.reading.to_dict():
        info["reading"] = reading
    if data.instances:
        info["objects"] = DEPTH
    if network.patch > 1:
        info["refined"] = True
    if options.deep_supervision:
        info["deep_supervision"] = True
    return info


def check_options(options: SegmentationOptions, start: Start | None) -> None:
    """Raises the InputError of `decide` that the options alone call for, without the data."""
    chosen_network(options, 1, start)
    chosen_fit(options, start)
    parse_regions(options.regions)


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
            "converts it, and in Python unet_diffusion.starting.segmentation_start"
        )
    return start


def chosen_network(
    options: SegmentationOptions, channels: int, start: Start | None
) -> tuple[UNetConfig, str]:
    """The network that the options name, or that of the start, for images of so many channels."""
    if start and options.network is None:
        config, why = start.config, "that of the model in --init"
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

    A segmentation that starts from a diffusion model knows nothing of labels: adamw's steps are as
    much too small for it as for random weights (docs/experiments.md).
    """
    goes_on = start is not None and not start.crossed
    optimizer, why = choose_optimizer(
        options, {"muon's steps would move trained weights too far": goes_on}
    )
    if optimizer == "muon" and start is not None and not options.optimizer:
        why = "as from random weights: the start knows nothing of labels"
    lr, momentum = (0.08, 0.8) if optimizer == "muon" else (2e-3, 0.9)
    fit = plan_fit(options, batch_size=BATCH, optimizer=optimizer, lr=lr, momentum=momentum)
    if options.unlabelled is not None:
        fit = replace(fit, budget=part_of_budget(options, "student"))
    return fit, Decision("optimizer", f"{optimizer} at {fit.lr:g}", why)


def share_of_budget(options: SegmentationOptions, part: Part) -> float:
    """The share of its budget that a part of a training with --unlabelled gets."""
    return PARTS[part] / (1 if options.init is None else 1 - PARTS["pretraining"])


def part_of_budget(options: SegmentationOptions, part: Part) -> Budget:
    """What a part of a training with --unlabelled gets of its budget."""
    amount, unit = given_budget(options)
    amount *= share_of_budget(options, part)
    return Budget(max(1, round(amount)) if unit == "steps" else amount, unit)


def told_part(options: SegmentationOptions) -> Decision:
    """The budget that is left after the parts with the unlabelled images."""
    amount, unit = part_of_budget(options, "student")
    share = share_of_budget(options, "student")
    why = f"{share:.0%} of the budget; the earlier parts took the rest"
    return Decision("budget", counted(round(amount, 2), unit.removesuffix("s")), why)


def chosen_crop(
    options: SegmentationOptions, data: SegmentationData, config: UNetConfig, fit: FitPlan
) -> tuple[tuple[int, int], str]:
    """Height and width of the training crops, and why."""
    shapes = {image_shape(data, i) for i in data.train}
    made = {image_shape(data, i) for i in data.synthetic}
    if options.crop:
        size, why = (options.crop, options.crop), AS_ASKED
        small = min((min(shape) for shape in made), default=options.crop)
        if small < output_size(config, options.crop):
            raise InputError(
                f"--crop {options.crop} is larger than a synthetic image, {small} pixels a side: "
                "give a smaller crop, or larger images"
            )
    elif options.crop is None:
        largest = [max(s[axis] for s in shapes) for axis in (0, 1)]
        least = [min((s[axis] for s in made), default=CROP) for axis in (0, 1)]
        most = [min(pair) for pair in zip(largest, least, strict=True)]
        usual = (min(CROP, -(-n // config.stride) * config.stride) for n in most)
        h, w = (input_size(config, n) for n in usual)
        size, why = (h, w), "the default size" if min(most) >= CROP else "as large as the images"
        if min(least) < min(CROP, *largest):
            why = "as large as the smallest synthetic image"
    elif (sizes := len(shapes | made)) > 1:
        raise InputError(
            f"--crop 0 takes whole images, but the training images have {sizes} sizes: give the "
            "side of a crop"
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


def chosen_augmentation(
    options: SegmentationOptions, data: SegmentationData, crop: tuple[int, int]
) -> tuple[Augmentation, Decision]:
    """How crops are augmented; the symmetries are found from the images, unless the user gives
    them."""
    flips, why = options.flips, AS_ASKED
    if flips is None:
        flips, why = find_symmetries(lambda i: data.load(i)[0], data.train, crop)
    rotation = ROTATIONS[flips] if options.rotation is None else options.rotation
    given = {name: getattr(options, name) for name in Augmentation.__dataclass_fields__}
    augmentation = Augmentation(**{**given, "flips": flips, "rotation": rotation})
    told = {True: "flips, quarter turns", "mirror": "left-right flips", False: "no flips"}
    turned = f"+-{rotation:g} degrees" if rotation else "no rotation"
    return augmentation, Decision("augmentation", f"{told[flips]}, {turned}", why)


class Judgement(NamedTuple):
    """What follows from the masks for the weights of pixels and the figures."""

    border: tuple[float, float] | None  # w0 and sigma
    best_by: BestBy
    cells: int  # the class of the cells
    isbi: bool  # whether the scores of cells that membranes part say something
    decisions: list[Decision]


def chosen_judgement(options: SegmentationOptions, data: SegmentationData) -> Judgement:
    """Border weights and the figure that chooses the kept weights; found from the masks unless
    given."""
    count, missing = len(data.table.values), missing_classes(data)
    if options.best_by == "v_rand" and data.instances:
        raise InputError(
            "--best-by v_rand compares cells between membranes in masks of two classes, but these "
            "masks number objects: choose ap, loss or dice"
        )
    if options.best_by == "v_rand" and count != 2:
        raise InputError(
            "--best-by v_rand compares cells between membranes in masks of two classes, but these "
            f"masks have {count} classes: choose loss or dice"
        )
    if options.best_by == "ap" and not data.instances:
        raise InputError(
            "--best-by ap compares numbered objects, but these masks have classes: give "
            "--instances if they do number objects, or choose loss or dice"
        )
    cells, parted, masks = 1, False, f"the masks have {count} classes"
    if data.instances:
        masks = "the masks number objects"
    elif count == 2:
        spread = _spread(data.train, JUDGED)
        cells, parted = find_cells(data.load(i)[1] for i in spread)
        masks = f"{'' if parted else 'no '}thin membranes separate the cells"
        masks += f" of class {cells}" if parted else ""
    if options.best_by == "ap" and CELL in missing:
        raise InputError(
            "--best-by ap compares objects, but the held-out masks have none: hold out other "
            "images, with --val, --fold or --val-names"
        )
    if options.best_by == "v_rand" and cells in missing:
        raise InputError(
            f"--best-by v_rand compares cells, but the held-out masks have none (class {cells}): "
            "hold out other images, with --val, --fold or --val-names"
        )
    w0 = MEMBRANE_WEIGHT if parted else 0.0
    w0 = w0 if options.border_weight is None else options.border_weight
    by_shape: BestBy = "v_rand" if parted and cells not in missing else "loss"
    if data.instances and CELL not in missing:
        by_shape = "ap"
    best_by = options.best_by or by_shape
    kept = Decision("kept weights", f"best by {best_by}", AS_ASKED if options.best_by else masks)
    if not data.val:
        kept = Decision("kept weights", "the last ones", "nothing is held out")
    decisions = [
        kept,
        Decision("border weight", f"{w0:g}", masks if options.border_weight is None else AS_ASKED),
    ]
    if gone := absent(data, missing):
        names = ", ".join(gone)
        why = "no held-out mask has it: it is left out of the mean Dice and IoU"
        decisions.append(Decision("not scored", names, why))
    border = (w0, options.border_sigma) if w0 else None
    return Judgement(border, best_by, cells, parted or best_by == "v_rand", decisions)


def missing_classes(data: SegmentationData) -> list[int]:
    """The classes that no held-out mask has.

    Raises:
        InputError: the held-out masks have none at all.
    """
    missing = set(range(len(data.table.values)))
    for i in data.val:
        if not missing:
            break
        missing -= set(np.unique(data.load(i)[1]).tolist())
    if data.val and len(missing) == len(data.table.values):
        raise InputError(
            "every pixel of the held-out masks is ignored: hold out other images, with --val, "
            "--fold or --val-names"
        )
    return sorted(missing) if data.val else []


def absent(data: SegmentationData, missing: Sequence[int]) -> list[str]:
    """The names of these classes, or of the regions that have no others."""
    if not data.regions:
        return [_class_name(data, k) for k in missing]
    members = zip(data.regions.names, data.regions.members, strict=True)
    return [name for name, of in members if set(np.flatnonzero(of).tolist()) <= set(missing)]


def chosen_part(data: SegmentationData, fit: FitPlan) -> tuple[tuple[int, ...], list[Decision]]:
    """The held-out images that are scored during training, with a decision if these are not all.
    Otherwise a short run would have one or two points of a curve, or spend its minutes on scoring.
    """
    amount, unit = fit.budget
    count, pixels = len(data.val), sum(math.prod(image_shape(data, i)) for i in data.val)
    if unit != "minutes" or not count:
        return tuple(data.val), []
    part = int(SCORED * max(amount, 1) * count / pixels)
    if part >= count:
        return tuple(data.val), []
    scored = tuple(_spread(data.val, max(part, 1)))
    value = f"{len(scored)} of {count} held-out images"
    why = "as many as the time allows; at the end all of them, with the kept weights"
    return scored, [Decision("scored", value, why)]


def chosen_loss(
    options: SegmentationOptions, data: SegmentationData, outputs: int
) -> tuple[Loss, list[Decision]]:
    """The loss that the options name, with its class weights, and a decision if these are
    computed."""
    weights, balance = options.class_weights or None, []
    if options.balance:
        shares = data.table.shares
        present = sum(share > 0 for share in shares)
        weights = tuple(1 / (present * share) if share else 0.0 for share in shares)
        empty = [_class_name(data, k) for k, share in enumerate(shares) if not share]
        why = "the inverse of the class frequencies"
        why += f"; no pixel is {' or '.join(empty)}, which gets weight 0" if empty else ""
        balance = [Decision("class weights", ", ".join(f"{w:.3g}" for w in weights), why)]
    loss: Loss = make_loss(
        options.loss,
        1 if data.regions else outputs,
        class_weights=weights,
        label_smoothing=options.label_smoothing,
        gamma=options.focal_gamma,
    )
    return RegionLoss(loss, data.regions.members) if data.regions else loss, balance


def _slices(data: SegmentationData) -> list[Decision]:
    """The slices that are taken together, if there are several."""
    if data.slices == 1:
        return []
    return [Decision("slices", f"{data.slices} as channels", told_stacks(data.pairs))]


def _regions(data: SegmentationData) -> list[Decision]:
    """The regions that may overlap, if there are some."""
    if not data.regions:
        return []
    how = "one sigmoid each; a label map shows the later region, by its first value"
    return [Decision("regions", data.regions.lines(), how)]


def _smallest(info: Mapping[str, Any]) -> list[Decision]:
    """The size below which objects do not count, of a model that numbers objects."""
    if "smallest_object" not in info:
        return []
    value = counted(info["smallest_object"], "pixel")
    return [Decision("smallest object", value, "1 % of the training objects are smaller")]


def _rare(data: SegmentationData) -> list[Decision]:
    """The classes that crops are cut for, if any are rare."""
    if not data.rare:
        return []
    shares = [
        f"{_class_name(data, k)} ({data.table.shares[k]:.2g} of the pixels)" for k in data.rare
    ]
    told = f"a third of the crops contain {' or '.join(shares)}"
    return [Decision("rare classes", told, "few others would")]


def _synthetic(options: SegmentationOptions, data: SegmentationData) -> list[Decision]:
    """The share of synthetic and pseudo-labelled images in the training, if there are any."""
    if not data.synthetic:
        return []
    share, default = options.synthetic_share, SegmentationOptions.synthetic_share
    why = "the default" if share == default else AS_ASKED
    given = {"synthetic": options.synthetic, "predicted labels": options.unlabelled}
    told = f"{share:.3g} of the crops, never scored"
    return [Decision(" and ".join(name for name, data in given.items() if data), told, why)]


def _class_name(data: SegmentationData, k: int) -> str:
    return data.table.names[k] if data.table.names else f"class {k}"


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most that many of the indices, evenly spread."""
    count = min(count, len(indices))
    return [indices[(2 * k + 1) * len(indices) // (2 * count)] for k in range(count)]


def told_normalisation(data: SegmentationData, start: Start | None) -> Decision:
    """The statistics that the images are scaled by."""
    found = data.normalisation
    why = "that of the model in --init" if start else f"from {counted(len(data.train), 'image')}"
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (found.mean, found.std))
    return Decision("normalisation", f"mean {mean}, std {std}", why)
