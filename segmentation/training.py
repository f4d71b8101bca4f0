"""Training a segmentation: the task that `fit` is handed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from segmentation.data.augment import Augmentation
from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.download import isbi2012_folder
from segmentation.data.pairs import Pair, find_pairs, pairs_from_arrays, split_pairs
from segmentation.data.phantom import phantom_stack
from segmentation.data.samples import CropSamples, image_shape
from segmentation.data.weights import are_parted_by_membranes
from segmentation.judging.evaluation import COARSE, Evaluation, evaluate
from segmentation.judging.report import write_report
from segmentation.losses import deeply_supervised, make_loss
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.pictures import augmented, class_colours, errors, grey_or_rgb
from segmentation.predict import Predictor, TensorSource, classes
from unet import PRESETS, UNetConfig
from unet.device import pick_device
from unet.errors import InputError
from unet.files.pictures import panel
from unet.geometry import input_size, output_size
from unet.training.fit import fit
from unet.training.run import is_main_process, run_folder
from unet.training.task import Batch, Processes, Task
from unet.weights.folder import load_strictly, read_config, read_weights

PHANTOM_SLICES, PHANTOM_SIZE = 30, (256, 256)
CROP = 256  # usual side of a training crop
JUDGED = 10  # training masks that decide whether membranes part the cells
PICTURED = 4  # held-out images in the pictures of a run


def train(options: SegmentationOptions) -> dict[str, float]:
    """Reads the data, says what was found, trains, and returns the best held-out figures.

    Raises:
        InputError: a mistake in the options or the data, before anything is trained.
    """
    data = load_data(options)
    options = adapted(options.chosen(), data)
    model = make_model(options, data)
    size, target = _crop(options, data, model.config)
    if is_main_process():
        print(f"{data.describe()}\n{_describe_model(model, size, options)}", flush=True)
    augmentation = Augmentation(
        **{name: getattr(options, name) for name in Augmentation.__dataclass_fields__}
    )
    border = (options.border_weight, options.border_sigma) if options.border_weight else None
    samples = CropSamples(data, augmentation, size, target, border=border, seed=options.seed)
    task = SegmentationTask(options, data, model)
    with run_folder(options):
        figures = fit(
            Task(
                model=model,
                samples=samples,
                loss=task.loss,
                evaluate=task.evaluate,
                score=task.score,
                first_pictures=lambda: {"augmented": augmented(samples)},
                pictures=task.pictures,
            ),
            options,
        )
        if is_main_process():
            _finish(options, data, figures)
    return figures


def _finish(
    options: SegmentationOptions, data: SegmentationData, figures: Mapping[str, float]
) -> None:
    """Saves the best threshold on the held-out images with the weights, and draws report.png."""
    model = SegmentationUNet.from_pretrained(options.out / "model").to(pick_device(options.device))
    threshold = figures.get("threshold", 0.5)
    if model.info["threshold"] != threshold:
        model.info["threshold"] = threshold
        model.save_pretrained(options.out / "model")
    found = evaluate(Predictor([model]), data, data.val, threshold=threshold, thresholds=())
    print(f"report: {write_report(options.out, found, data)}")


def adapted(options: SegmentationOptions, data: SegmentationData) -> SegmentationOptions:
    """The options with those that were not given filled in by what the masks show."""
    if options.border_weight is not None and options.best_by is not None:
        return options
    membranes = len(data.table.values) == 2 and are_parted_by_membranes(
        data.load(i)[1] for i in data.train[:JUDGED]
    )
    found: dict[str, Any] = {
        "border_weight": 10.0 if membranes else 0.0,
        "best_by": "v_rand" if membranes else "loss",
    }
    found = {name: v for name, v in found.items() if getattr(options, name) is None}
    if membranes and is_main_process():
        flags = " and ".join(f"--{k.replace('_', '-')} {v}" for k, v in found.items())
        print(f"thin membranes part the cells of class 1: {flags}", flush=True)
    return replace(options, **found)


def load_data(options: SegmentationOptions) -> SegmentationData:
    """The training and held-out images that the options name."""
    train, val = split_pairs(
        find_data(options), options.val, options.fold, options.val_names or None
    )
    return SegmentationData(
        train, val, ignore_value=options.ignore_value, instances=options.instances
    )


def find_data(options: SegmentationOptions) -> list[Pair]:
    """All images and masks that the options name, before the split."""
    if options.images is not None:
        return find_pairs(images=options.images, masks=options.masks)
    if options.data == "phantom":
        return pairs_from_arrays(*phantom_stack(PHANTOM_SLICES, PHANTOM_SIZE, options.seed))
    published = options.data == "isbi2012" and not Path("isbi2012").is_dir()
    return find_pairs(isbi2012_folder() if published else Path(options.data))


def make_model(options: SegmentationOptions, data: SegmentationData) -> SegmentationUNet:
    """The network that the options name, for these images and classes, with random weights."""
    torch.manual_seed(options.seed)
    if options.network not in PRESETS:
        raise InputError(
            f"--network {options.network!r} is no preset: choose from {', '.join(PRESETS)}"
        )
    config = replace(PRESETS[options.network].config, in_channels=data.channels)
    if options.width:
        config = replace(config, channels=options.width)
    if config.time or config.context_channels:
        raise InputError(
            f"--network {options.network} is a diffusion network, which needs a timestep: choose "
            f"from {', '.join(n for n, p in PRESETS.items() if not p.config.time)}"
        )
    count = len(data.table.values)
    info: dict[str, Any] = {
        "classes": data.table.to_dict(),
        "normalisation": data.normalisation.to_dict(),
        "threshold": 0.5,
    }
    if options.deep_supervision:
        info["deep_supervision"] = True
    model = SegmentationUNet(config, 1 if count == 2 else count, info)
    if options.init:
        _initialise(model, options.init)
    return model


def _describe_model(
    model: SegmentationUNet, size: tuple[int, int], options: SegmentationOptions
) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"network {options.network}: {parameters / 1e6:.2f} M parameters, crops of {size[0]} x "
        f"{size[1]}, optimizer {options.optimizer} at {options.lr:g}"
    )


def _initialise(model: SegmentationUNet, path: str) -> None:
    """Starts from a model of either task: its trunk, and its head where that fits, too."""
    read_config(Path(path))
    state = read_weights(Path(path))
    own = model.state_dict()
    head = {k: v for k, v in own.items() if not k.startswith("trunk.")}
    head |= {k: v for k, v in state.items() if k in head and v.shape == head[k].shape}
    trunk = {k: v for k, v in state.items() if k.startswith("trunk.")}
    load_strictly(model, {**trunk, **head}, path)


def _crop(
    options: SegmentationOptions, data: SegmentationData, config: UNetConfig
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the training crops, and of the part of them that is labelled."""
    shapes = {image_shape(data, i) for i in data.train}
    if options.crop:
        size = (options.crop, options.crop)
    elif options.crop is None:
        largest = (max(s[axis] for s in shapes) for axis in (0, 1))
        usual = (min(CROP, -(-n // config.stride) * config.stride) for n in largest)
        h, w = (input_size(config, n) for n in usual)
        size = (h, w)
    elif len(shapes) > 1:
        raise InputError(
            f"--crop 0 takes whole images, but the training images have {len(shapes)} sizes: give "
            "the side of a crop"
        )
    else:
        size = shapes.pop()
    part = options.batch_size // options.accumulate
    if config.norm == "batch" and part * math.prod(-(-n // config.stride) for n in size) < 2:
        raise InputError(
            f"crops of {size[0]} x {size[1]} are a single pixel at the coarsest level, and batch "
            "norm needs two to compare: give a larger --crop or --batch-size"
        )
    return size, (output_size(config, size[0]), output_size(config, size[1]))


class SegmentationTask:
    """Loss, held-out figures and pictures of a segmentation."""

    def __init__(
        self, options: SegmentationOptions, data: SegmentationData, model: SegmentationUNet
    ) -> None:
        self.data = data
        self.count = len(data.table.values)
        if options.best_by == "v_rand" and self.count != 2:
            raise InputError(
                f"--best-by v_rand compares cells that membranes part, two classes, but the masks "
                f"have {self.count}: take loss or dice"
            )
        self.best_by = options.best_by or "loss"
        self.score = "loss" if self.best_by == "loss" else f"-{self.best_by}"
        self.deep = options.deep_supervision
        if not any((data.load(i)[1] != IGNORE).any() for i in data.val):
            raise InputError(
                "every pixel of the held-out masks is ignored: hold out other images, with --val, "
                "--fold or --val-names"
            )
        weights: Sequence[float] | None = options.class_weights or None
        if options.balance:
            weights = [1 / (self.count * share) for share in data.table.shares]
        self.loss_function = make_loss(
            options.loss,
            model.out_channels,
            class_weights=weights,
            label_smoothing=options.label_smoothing,
            gamma=options.focal_gamma,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch["mask"], batch.get("weight")
        if self.deep:
            return deeply_supervised(self.loss_function, model(batch["image"], deep=True), *targets)
        return self.loss_function(model(batch["image"]), *targets)

    def evaluate(self, model: SegmentationUNet, processes: Processes) -> Mapping[str, float]:
        """Figures over all held-out pixels: cross-entropy, accuracy, mean Dice and IoU.

        With --best-by v_rand also V_Rand and V_Info, each at its best threshold. Of two classes
        also the threshold to use: the best one for V_Rand, else for the mean Dice.
        """
        isbi = self.best_by == "v_rand"
        part, whole = (
            Evaluation(self.data.table, thresholds=COARSE if isbi else (), isbi=isbi) for _ in "12"
        )
        predict = Predictor([model])
        for i in processes.share(self.data.val):
            image, mask = self.data.load(i)
            probability = predict(TensorSource(torch.tensor(image)))
            part.add(i, self.data.pairs[i].name, probability, mask)
        for other in processes.gather(part):
            whole.merge(other)
        scores, best = whole.scores(), whole.challenge()
        figures = {k: scores[k] for k in ("loss", "accuracy", "dice", "iou")}
        figures |= {k: best[k] for k in ("v_rand", "v_info") if k in best}
        if self.count == 2:
            figures["threshold"] = whole.best_threshold("v_rand" if isbi else "dice")
        return figures

    def pictures(self, model: SegmentationUNet) -> Mapping[str, Image.Image]:
        """Held-out images: image, mask, probability of the last class, errors."""
        rows, predict = [], Predictor([model])
        for i in self.data.val[:PICTURED]:
            image, mask = self.data.load(i)
            probability = predict(TensorSource(torch.tensor(image)))
            found = classes(probability)
            grey = grey_or_rgb(self.data.pairs[i].read_image())
            shown = grey_or_rgb((probability[-1] * 255).astype(np.uint8)[..., None])
            rows.append([grey, class_colours(mask, self.count), shown, errors(grey, found, mask)])
        return {"held-out": panel(rows)}
