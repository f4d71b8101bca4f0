"""Train a U-Net that labels every pixel of an image: train_seg.py --data DIR --out RUN."""

from __future__ import annotations

import sys

from segmentation.options import RECIPES, SegmentationOptions
from unet.training.cli import run_script


def main(options: SegmentationOptions) -> None:
    from segmentation.training import train  # torch takes seconds to import: not before parsing

    train(options)


if __name__ == "__main__":
    sys.exit(run_script(main, SegmentationOptions, description=__doc__, recipes=RECIPES))
