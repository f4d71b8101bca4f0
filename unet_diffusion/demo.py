"""Both lives of a U-Net on generated images, in about three minutes: it labels, and it draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion.options import DiffusionOptions
from segmentation.options import RECIPES, SegmentationOptions
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config

UNSEEN_SEED, UNSEEN_SLICES = 1_000, 4
SEGMENTATION_SHARE = 0.3  # of the minutes; drawing takes longer to learn
IMAGES = 16  # a step: in so short a time small steps teach more than few large ones


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo."""

    out: Path = Path("runs")
    """Folder in which the demo makes one of its own."""

    minutes: float = 2.5
    """Minutes of training, for both together."""

    seed: int = 0
    """Seed of the images and of the training."""


def main(options: DemoOptions) -> None:
    run = options.out / time.strftime("demo-%Y%m%d-%H%M%S")
    segment(options, run / "segmentation")
    draw(options, run / "diffusion")
    print()
    say_next("sample-ddpm", "--model", run / "diffusion/model", "--out", "samples")
    say_next("train-seg", "--data", "your_images", "--out", "runs/mine", "--max-minutes", 10)


def segment(options: DemoOptions, run: Path) -> None:
    """A segmentation of membranes: trained, and judged on images that it has not seen."""
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
    predict_files(predictor, run / "unseen", run / "predictions")

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


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, DemoOptions, argv, description=__doc__)
