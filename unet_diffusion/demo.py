"""Both lives of a U-Net on generated images, and how they meet: about four minutes.

It labels membranes and draws shapes, and the network that has learnt to draw shapes then learns to
label them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from diffusion.options import DiffusionOptions
from segmentation.options import RECIPES, SegmentationOptions
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config

UNSEEN_SEED, UNSEEN_SLICES = 1_000, 4
SEGMENTATION_SHARE = 0.3  # of the minutes; drawing takes longer to learn
STAINS_SHARE = 0.12  # of these minutes are added for cells of two stains
MEETING_SHARE = 0.12  # of these minutes are added for each of the two segmentations of shapes
MEETING_SEED = 10_000  # of shapes that the diffusion model was not trained on
SIDE, SHEET, LABELLED = 32, 8, 4  # pixels of a picture, pictures along a sheet, and labelled ones
IGNORED = 255
IMAGES = 16  # a step: in so short a time small steps teach more than few large ones


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo."""

    out: Path = Path("runs")
    """Folder in which the demo makes one of its own."""

    minutes: float = 2.5
    """Minutes of training of a segmentation and a diffusion model together; the other parts of the
    demo take about a third more."""

    seed: int = 0
    """Seed of the images and of the training."""


def main(options: DemoOptions) -> None:
    run = options.out / time.strftime("demo-%Y%m%d-%H%M%S")
    segment(options, run / "segmentation")
    stain(options, run / "stains")
    draw(options, run / "diffusion")
    meet(options, run / "diffusion/model", run / "meeting")
    print()
    say_next("sample-ddpm", "--model", run / "diffusion/model", "--out", "samples")
    say_next("train-seg", "--data", "your_images", "--out", "runs/mine", "--max-minutes", 10)


def segment(options: DemoOptions, run: Path) -> None:
    """A segmentation of membranes: trained, and judged on images that it has not seen."""
    from segmentation.data.inputs import find_inputs
    from segmentation.data.phantom import phantom_stack
    from segmentation.judging.isbi import IsbiMetrics
    from segmentation.output import FilePredictor, predict_files
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from segmentation.training import train
    from unet.files.images import read_image, write_image

    print("Training a segmentation on generated membrane images:", flush=True)
    minutes, seed = SEGMENTATION_SHARE * options.minutes, options.seed
    recipe = load_config(SegmentationOptions, RECIPES / "quick.yaml")
    train(SegmentationOptions(out=run, max_minutes=minutes, seed=seed, **recipe))

    images, labels = phantom_stack(UNSEEN_SLICES, (384, 384), seed=UNSEEN_SEED + options.seed)
    for i, image in enumerate(images):
        write_image(run / "unseen" / f"{i}.png", image)
    print("\nPredicting images that the model has not seen:", flush=True)
    models, table, threshold = load_models([str(run / "model")])
    predictor = FilePredictor(Predictor(models), table, threshold)
    predict_files(predictor, find_inputs(run / "unseen"), run / "predictions")

    metrics = IsbiMetrics()
    for i, label in enumerate(labels):
        probability = read_image(run / "predictions" / f"{i}_probability.png")[..., 0]
        metrics.add(probability / 65535, label, str(i))
    found = metrics.result()
    print(
        f"\nScores on them: V_Rand {found['v_rand']:.3f}, V_Info {found['v_info']:.3f}, "
        f"pixel error {found['pixel_error']:.3f} (1, 1 and 0 are perfect)\n\nPictures:\n"
        f"  {run / 'samples'}: held-out images during training, with mask, probability, errors\n"
        f"  {run / 'predictions'}: masks, probabilities and overlays of the unseen images"
    )


def stain(options: DemoOptions, run: Path) -> None:
    """A segmentation of images of two channels: nuclei and cytoplasm, each with a stain."""
    from segmentation.judging.evaluation import evaluate
    from segmentation.judging.labelled import labelled_data
    from segmentation.pictures import class_colours, class_legend, grey_or_rgb
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from segmentation.training import stained_pairs, train
    from unet.files.pictures import panel

    print("\nTraining a segmentation on generated cells of two stains:", flush=True)
    minutes, seed = STAINS_SHARE * options.minutes, options.seed
    train(SegmentationOptions(out=run, data="stains", max_minutes=minutes, seed=seed, crop=128))
    models, table, _ = load_models([str(run / "model")])
    unseen = stained_pairs(2, UNSEEN_SEED + seed)
    data = labelled_data(models, unseen, table)
    found = evaluate(Predictor(models), data, data.val)
    count, rows = len(table.values), []
    for i, one in enumerate(found.images):
        image = unseen[i].read_image()
        stains = [grey_or_rgb(image[..., c : c + 1]) for c in range(image.shape[2])]
        masks = [class_colours(mask, count) for mask in (data.load(i)[1], one.prediction)]
        rows.append([*stains, grey_or_rgb(image), *masks])
    titles = (*unseen[0].info.names, "both", "true classes", "found")
    panel(rows, 256, titles=titles, legend=class_legend(table)).save(run / "two-stains.png")
    print(
        f"\nMean Dice of ground, cytoplasm and nucleus on unseen cells: "
        f"{found.scores()['dice']:.3f}\n  {run / 'two-stains.png'}: both stains, and what is found"
    )


def draw(options: DemoOptions, run: Path) -> None:
    """A diffusion model of coloured shapes: trained, and shown drawing."""
    from diffusion.training import train

    print("\nTraining a diffusion model on generated pictures of shapes:", flush=True)
    minutes, seed = (1 - SEGMENTATION_SHARE) * options.minutes, options.seed
    train(DiffusionOptions(out=run, max_minutes=minutes, batch_size=IMAGES, seed=seed))
    print(
        "\nPictures:\n"
        f"  {run / 'samples/appearing.png'} (and .gif): pictures that come out of noise\n"
        f"  {run / 'samples/forward.png'}: how noise is added to one\n"
        f"  {run / 'report.png'}: samples, and the training images that are nearest to them"
    )


def meet(options: DemoOptions, model: Path, run: Path) -> None:
    """A segmentation of the same shapes from a few labels, started from the trunk of the diffusion
    model. For comparison, the same network from random weights, trained as long on the same labels;
    each with the optimizer that suits it.
    """
    from diffusion.data.shapes import SHAPES
    from segmentation.data.pairs import pairs_from_arrays
    from segmentation.judging.evaluation import evaluate
    from segmentation.judging.labelled import labelled_data
    from segmentation.pictures import class_colours, class_legend
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from segmentation.training import train
    from unet.files.images import write_image
    from unet.files.pictures import panel
    from unet.weights.start import at_random
    from unet_diffusion.starting import segmentation_start

    print(f"\nLabelling shapes from {LABELLED**2} labelled pictures of them:", flush=True)
    image, mask = shapes_sheet(options.seed)
    sparse = np.full_like(mask, IGNORED)
    sparse[: LABELLED * SIDE, : LABELLED * SIDE] = mask[: LABELLED * SIDE, : LABELLED * SIDE]
    write_image(run / "labelled/image/sheet.png", image)
    write_image(run / "labelled/label/sheet.png", sparse)
    unseen, truth = shapes_sheet(UNSEEN_SEED + options.seed)
    start = segmentation_start(str(model))
    assert start is not None
    pictures, scores = [unseen, class_colours(truth, 1 + len(SHAPES))], {}
    for name, weights in (("random", at_random(start, options.seed)), ("drawing", start)):
        train(
            SegmentationOptions(
                out=run / name,
                data=str(run / "labelled"),
                ignore_value=IGNORED,
                init=str(model) if weights is start else None,
                val=0,
                max_minutes=MEETING_SHARE * options.minutes,
                seed=options.seed,
                evaluations=0,
                crop=2 * SIDE,
                rotation=0,
                elastic=0,
            ),
            weights,
        )
        models, table, _ = load_models([str(run / name / "model")])
        data = labelled_data(models, pairs_from_arrays(unseen[None], truth[None]), table)
        found = evaluate(Predictor(models), data, data.val)
        scores[name] = found.scores()["dice"]
        pictures.append(class_colours(found.images[0].prediction, 1 + len(SHAPES)))
    titles = ("unseen", "true shapes", "from random weights", "from the diffusion model")
    legend = class_legend(replace(table, names=("ground", *SHAPES), ignore_value=None))
    panel([pictures], titles=titles, legend=legend).save(run / "meeting.png")
    print(
        f"\nMean Dice on unseen pictures: from random weights {scores['random']:.3f}, from the "
        f"diffusion model {scores['drawing']:.3f}\n  {run / 'meeting.png'}: pictures, their "
        "shapes, and what each of the two finds"
    )


def shapes_sheet(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A sheet of pictures of shapes, and a mask of its circles 1, squares 2 and triangles 3."""
    from diffusion.data.shapes import SHAPES, example

    images, masks = [], []
    for index in range(SHEET**2):
        scene, drawing = example(seed + MEETING_SEED, index)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for thing, own in zip(scene.things, drawing.masks, strict=True):
            mask[own] = 1 + SHAPES.index(thing.shape)
        images.append(drawing.picture)
        masks.append(mask)
    tiles = "(r c) h w ... -> (r h) (c w) ..."
    return rearrange(images, tiles, r=SHEET), rearrange(masks, tiles, r=SHEET)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, DemoOptions, argv, description=__doc__)
