"""Train a U-Net that labels every pixel of an image: unet-train-seg --data DIR --out RUN."""

from __future__ import annotations

from collections.abc import Sequence

from segmentation.options import RECIPES, SegmentationOptions
from unet.training.cli import run_script, say_next


def main(options: SegmentationOptions) -> None:
    from segmentation.training import train  # torch takes seconds to import: not before parsing
    from unet_diffusion.starting import segmentation_start

    if options.unlabelled is not None:
        # The diffusion trainer comes with it.
        from unet_diffusion.pretraining import train_with_unlabelled

        train_with_unlabelled(options)
    else:
        train(options, segmentation_start(options.init))
    model = options.out / "model"
    say_next("predict-seg", "--model", model, "--input", "new_images", "--out", "predictions")


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, SegmentationOptions, argv, description=__doc__, recipes=RECIPES)
