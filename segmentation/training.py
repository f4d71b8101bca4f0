"""Training a segmentation: the task for `fit`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from segmentation.data.annotators import annotated_stack
from segmentation.data.classes import class_names
from segmentation.data.dataset import SegmentationData
from segmentation.data.download import isbi2012_folder
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import Pair, alike, find_pairs, kind, pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.data.regions import parse_regions
from segmentation.data.samples import CropSamples
from segmentation.data.slices import with_neighbours
from segmentation.data.splits import split_pairs
from segmentation.data.stains import CHANNELS, NAMES, stained_stack
from segmentation.decisions import SegmentationPlan, check_options, decide, own_start
from segmentation.judging.evaluation import COARSE, OBJECTS, Evaluation, evaluate
from segmentation.judging.report import write_report
from segmentation.losses import DepthLoss, deeply_supervised
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.pictures import (
    augmented,
    class_colours,
    class_legend,
    error_legend,
    errors,
    grey_or_rgb,
)
from segmentation.predict import Predictor, TensorSource, classes
from unet.device import pick_device
from unet.errors import InputError
from unet.files.images import OURS, files_below, is_image_file, predictions
from unet.files.pages import AS_STORED, ImageInfo, Reading
from unet.files.pictures import panel
from unet.files.volumes import is_volume
from unet.training.fit import fit
from unet.training.resuming import resumed
from unet.training.run import RunFolder, check_first, is_main_process, run_folder, upload
from unet.training.task import Batch, Processes, Task
from unet.weights.folder import read_config
from unet.weights.start import Start, take_over
from unet.words import left_out

PHANTOM_SLICES, STAINED_SLICES, PHANTOM_SIZE = 30, 20, (256, 256)
FIGURES = ("loss", "accuracy", "dice", "iou", "v_rand", "v_info", "ap50", "ap", "pq")
"""Of an evaluation, those of them that its masks give."""
PICTURED = 4  # held-out images in the pictures of a run


def train(
    options: SegmentationOptions, start: Start | None = None, *, also: Sequence[Pair] = ()
) -> dict[str, float]:
    """Reads the data, says what was found, trains, and returns the best held-out figures.

    Args:
        start: what --init names, where that is no segmentation.
        also: pairs that are trained on as those of --synthetic.

    Raises:
        InputError: a mistake in the options or the data, before anything is trained.
    """
    check_first(options)
    options = resumed(options)
    start = start or own_start(options)
    check_options(options, start)
    data = load_data(options, start, also)
    plan = decide(options, data, start)
    model = make_model(plan)
    say_left_out(options, data.pairs)
    if is_main_process():
        if any(data.pairs[i].window for i in data.val):
            print(
                "only one image has labels, so a strip of it is held out: its parts count as "
                "images from here on"
            )
        print("\n".join([data.describe(), *plan.lines()]), flush=True)
    samples = CropSamples(
        data,
        plan.augmentation,
        plan.crop,
        plan.target,
        border=plan.border,
        cells=plan.cells,
        share=options.synthetic_share,
        seed=plan.fit.seed,
    )
    task = SegmentationTask(plan, data)
    with run_folder(plan.fit):
        figures = fit(
            Task(
                model=model,
                samples=samples,
                options=plan.options,
                decisions=plan.decisions,
                loss=task.loss,
                evaluate=task.evaluate if data.val else None,
                score=task.score,
                held_out=task.held_out,
                first_pictures=lambda: {"augmented": augmented(samples)},
                pictures=task.pictures,
            ),
            plan.fit,
        )
        if is_main_process():
            figures = _finish(plan, data, figures)
    return figures


def _finish(
    plan: SegmentationPlan, data: SegmentationData, figures: Mapping[str, float]
) -> dict[str, float]:
    """Draws report.png, and saves the figures of the kept weights on all held-out images with them.

    These are at the threshold of the evaluation that the weights were kept for.
    """
    folder = plan.fit.out / "model"
    model = SegmentationUNet.from_pretrained(folder).to(pick_device(plan.fit.device))
    model.info["threshold"] = figures.get("threshold", 0.5)
    for key in ("temperature", "calibration"):  # of a run that goes on: fitted to other weights
        model.info.pop(key, None)
    found = evaluate(
        Predictor([model]),
        data,
        data.val or data.train,
        threshold=model.info["threshold"],
        thresholds=(),
        cells=plan.info.get("cells"),
    )
    figures = {**figures, **{k: v for k, v in found.scores().items() if k in figures}}
    if len(plan.scored) < len(data.val):
        shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
        print(f"kept weights: held out, all {len(data.val)} images: {shown}")
    about = model.info.setdefault("training", {})
    about["figures"] = {k: v for k, v in figures.items() if math.isfinite(v)}
    model.save_pretrained(folder)
    if never := found.never_predicted():
        which = "held-out" if data.val else "training"
        what = f"in the {which} images no pixel was predicted as {' or '.join(never)}"
        print(f"note: {what}: train for longer{also_balanced(never, plan.options, data)}")
    print(f"report: {write_report(plan.fit.out, found, data)}")
    upload(SegmentationUNet, plan.fit)
    return figures


def also_balanced(
    never: Sequence[str], options: SegmentationOptions, data: SegmentationData
) -> str:
    """The advice to weight classes, if rare ones were never predicted and nothing weights them."""
    if options.balance or options.class_weights or data.regions:
        return ""
    names = class_names(data.table)
    rare = any(names[k] in never for k in data.table.rare)
    return ", or with --balance, which gives rare classes more weight" if rare else ""


def load_data(
    options: SegmentationOptions, start: Start | None = None, also: Sequence[Pair] = ()
) -> SegmentationData:
    """The training and held-out images that the options name, scaled as a start wants them."""
    pairs = with_neighbours(find_data(options), options.slices)
    train, val = split_pairs(
        pairs,
        options.val,
        options.fold,
        options.val_names or None,
        ignore_value=options.ignore_value,
    )
    start = start or own_start(options)
    known = Normalisation.from_dict(start.info.get("normalisation", {})) if start else None
    info = train[0].info
    return SegmentationData(
        train,
        val,
        synthetic=[*find_synthetic(options, info), *also],
        ignore_value=options.ignore_value,
        instances=options.instances,
        names=options.class_names,
        regions=parse_regions(options.regions),
        normalisation=known and known.for_images(info.channels, info.dtype),
        left_out=len({pair.source for pair in pairs} - {pair.source for pair in [*train, *val]}),
    )


def find_synthetic(options: SegmentationOptions, wanted: ImageInfo) -> list[Pair]:
    """The generated images and masks of --synthetic.

    Args:
        wanted: of the real images.

    Raises:
        InputError: none there; other channels or another depth than the real images.
    """
    if options.synthetic is None:
        return []
    pairs = find_pairs(options.synthetic, reading=options.reading, cleaning=options.cleaning)
    info = pairs[0].info
    if (info.channels, info.dtype) != (wanted.channels, wanted.dtype):
        raise InputError(
            f"--synthetic {options.synthetic} holds images of {kind(info)}, but the real ones are "
            f"{kind(wanted)}: save them in the same way"
        )
    return pairs


def find_data(options: SegmentationOptions) -> list[Pair]:
    """All images and masks that the options name, before the split."""
    said: dict[str, Any] = {"reading": options.reading, "cleaning": options.cleaning}
    if options.images is not None:
        return _with_val(find_pairs(images=options.images, masks=options.masks, **said), options)
    if options.data == "stains":
        return stained_pairs(STAINED_SLICES, options.seed, options.reading)
    if options.data == "phantom":
        return pairs_from_arrays(*phantom_stack(PHANTOM_SLICES, PHANTOM_SIZE, options.seed))
    if options.data == "annotators":
        return annotated_pairs(PHANTOM_SLICES, options.seed)
    published = options.data == "isbi2012" and not Path("isbi2012").is_dir()
    folder = isbi2012_folder() if published else Path(options.data)
    return _with_val(find_pairs(folder, **said), options)


def say_left_out(options: SegmentationOptions, pairs: Sequence[Pair]) -> None:
    """Prints, once for all processes, which files of this project are left out of the folders that
    are read.
    """
    data = Path(options.data) if options.images is None else options.images
    more = (options.masks, options.synthetic, options.val_data)
    folders = [data, *(folder for folder in more if folder is not None)]
    if is_main_process():
        used = {file for pair in pairs for file in pair.files}
        ours: list[Path] = []
        found = [file for f in folders if not is_volume(f) for file in files_below(f, ours)]
        predicted = predictions([file for file in found if is_image_file(file)]) - used
        if said := left_out({"file of predictions": sorted(predicted), OURS: sorted(set(ours))}):
            print(said, file=sys.stderr, flush=True)


def annotated_pairs(count: int, seed: int, size: tuple[int, int] = PHANTOM_SIZE) -> list[Pair]:
    """Generated images, each with the masks of all annotators; see `segmentation.data.annotators`.

    A crop has one random annotator, as each mask is a pair of its own.
    """
    images, masks = annotated_stack(count, size, seed)
    return [
        replace(pair, name=f"{pair.name}_{a + 1}", mask=mask)
        for pair, of in zip(pairs_from_arrays(images, masks[:, 0]), masks, strict=True)
        for a, mask in enumerate(of)
    ]


def stained_pairs(count: int, seed: int, reading: Reading = AS_STORED) -> list[Pair]:
    """Generated images of two stains, or of the chosen one; see `segmentation.data.stains`."""
    images, classes = stained_stack(count, PHANTOM_SIZE, seed)
    info = ImageInfo(
        height=PHANTOM_SIZE[0], width=PHANTOM_SIZE[1], channels=2, dtype="uint16", names=CHANNELS
    )
    chosen = reading.chosen(info)
    images = images if chosen is None else images[..., chosen]
    return pairs_from_arrays(images, classes, channels=reading.of(info).names, classes=NAMES)


def _with_val(pairs: list[Pair], options: SegmentationOptions) -> list[Pair]:
    """The images of --data with those of --val-data, which are held out."""
    if options.val_data is None:
        return pairs
    held_out = find_pairs(options.val_data, reading=options.reading, cleaning=options.cleaning)
    taken = {pair.name for pair in pairs}
    renamed = (f"val_{pair.name}" if pair.name in taken else pair.name for pair in held_out)
    return alike(
        [
            *(replace(pair, part="train") for pair in pairs),
            *(
                replace(pair, part="val", name=name)
                for pair, name in zip(held_out, renamed, strict=True)
            ),
        ]
    )


def make_model(plan: SegmentationPlan) -> SegmentationUNet:
    """The network of a plan, with random weights or those that it starts from.

    Raises:
        InputError: a run of an earlier version that cannot go on; a start of another shape.
    """
    run, folder = RunFolder(plan.fit.out), plan.fit.out / "model"
    goes_on = plan.fit.resume and run.state.exists()
    known = read_config(folder)["info"] if goes_on and folder.exists() else plan.info
    if known.get("objects") != plan.info.get("objects"):
        raise InputError(
            f"the run in {plan.fit.out} learns a border between objects, as earlier versions did, "
            f"and cannot be resumed: give another --out, with --init {folder} from its weights"
        )
    info = plan.info
    if goes_on and not (known.get("refined") if folder.exists() else _refines(run)):
        # Of an earlier version, or of a network without patches.
        info = {key: value for key, value in info.items() if key != "refined"}
    torch.manual_seed(plan.fit.seed)
    model = SegmentationUNet(plan.network, plan.outputs, info)
    if plan.start and not goes_on:
        same = all(plan.start.info.get(k) == model.info.get(k) for k in ("objects", "regions"))
        found = take_over(
            model, plan.start, own=() if same else ("head.conv", "coarse_heads", "refine")
        )
        if is_main_process():
            print(f"started with {found}")
    return model


def _refines(run: RunFolder) -> bool:
    """Whether the network of a saved state refines its logits."""
    return "refine.weight" in (run.load_state() or {}).get("model", {})


class SegmentationTask:
    """Loss, held-out figures and pictures of a segmentation."""

    def __init__(self, plan: SegmentationPlan, data: SegmentationData) -> None:
        self.data, self.loss_function, self.best_by = data, plan.loss, plan.best_by
        self.scored, self.cells = plan.scored, plan.info.get("cells")
        self.smallest = plan.info.get("smallest_object", 0)
        self.depth_loss = DepthLoss(plan.loss)
        self.held_out = "held out"
        if len(plan.scored) < len(data.val):
            self.held_out = f"held out, {len(plan.scored)} of {len(data.val)} images"
        self.deep = bool(plan.info.get("deep_supervision"))
        self.score = "loss" if self.best_by == "loss" else f"-{self.best_by}"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Callable[..., Tensor] = self.loss_function
        targets = [batch["mask"], batch.get("weight")]
        if "depth" in batch:
            loss, targets = self.depth_loss, [*targets, batch["depth"]]
        if self.deep:
            return deeply_supervised(loss, model(batch["image"], deep=True), *targets)
        return loss(model(batch["image"]), *targets)

    def evaluate(self, model: SegmentationUNet, processes: Processes) -> Mapping[str, float]:
        """Figures over the pixels of held-out images: cross-entropy, accuracy, mean Dice and IoU;
        where masks number objects the average precision and the panoptic quality of these.

        Of two classes they are at the threshold that is saved with the weights, which is given with
        them: the best one for the mean Dice, of objects for the average precision, with --best-by
        v_rand for V_Rand; then V_Rand and V_Info at that threshold are among the figures. Scored as
        it will be predicted, in float32.
        """
        isbi, objects = self.best_by == "v_rand", self.data.instances
        part, whole = (
            Evaluation(
                self.data.table,
                regions=self.data.regions,
                thresholds=COARSE if isbi else OBJECTS if objects else (),
                cells=self.cells if isbi else None,
                smallest=self.smallest,
            )
            for _ in range(2)
        )
        predict = Predictor([model])
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            for i in processes.share(self.scored):
                image, mask = self.data.load(i)
                probability, depth = predict.found(TensorSource(torch.tensor(image)))
                numbers = self.data.objects(i) if objects else None
                part.add(i, self.data.pairs[i].name, probability, mask, numbers, depth)
        for other in processes.gather(part):
            whole.merge(other)
        threshold = whole.best_threshold("v_rand" if isbi else "ap" if objects else "dice")
        model.info["threshold"] = threshold
        scores = whole.scores(threshold)
        figures = {k: scores[k] for k in FIGURES if k in scores}
        return figures | ({"threshold": threshold} if whole.has_threshold else {})

    def pictures(self, model: SegmentationUNet) -> Mapping[str, Image.Image]:
        """Held-out or else training images: image, mask, probability of the last class, errors."""
        rows, predict, regions = [], Predictor([model]), self.data.regions
        table = regions.table if regions else self.data.table
        count = len(table.values)
        for i in (self.data.val or self.data.train)[:PICTURED]:
            image, mask = self.data.load(i)
            probability = predict(TensorSource(torch.tensor(image)))
            found = classes(probability, model.info["threshold"], regions)
            mask = regions.true_map(mask) if regions else mask
            grey = grey_or_rgb(self.data.pairs[i].read_shown(), self.data.nodata(i))
            shown = grey_or_rgb((probability[-1] * 255).astype(np.uint8)[..., None])
            rows.append(
                [
                    grey,
                    class_colours(mask, count),
                    shown,
                    errors(grey, found, mask, count),
                ]
            )
        last = regions.names[-1] if regions else class_names(table)[-1]
        titles = ("image", "mask", f"probability of {last}", "errors")
        legend = [*class_legend(table), *error_legend(table)]
        picture = panel(rows, titles=titles, legend=legend)
        return {"held-out" if self.data.val else "training": picture}
