"""Train a classifier that judges generated images: unet-train-classifier --data DIR --out RUN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffusion.options import CHANNELS
from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.options import FitOptions


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(FitOptions):
    """Train a classifier of whole images."""

    data: str
    """An .npz with `images` and `labels`, or a folder with a subfolder of images for each class."""

    batch_size: int = 128
    """Images an optimizer step, over all processes and accumulated parts together."""

    lr: float = 3e-3
    """Highest learning rate."""

    weight_decay: float = 0.01
    """Weight decay."""

    size: int | None = None
    """Side in pixels to which the images are resized and cropped; none given: as they are."""

    colour: Literal["grey", "rgb"] | None = None
    """Read all images as grey or as RGB; none given: as they are, RGB if any is."""

    skip_bad: bool = False
    """Leave out images that cannot be read, naming them, instead of stopping."""

    width: int = 32
    """Channels of the finest level."""

    shift: int = 2
    """Shift each image by up to that many pixels either way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise InputError(f"--size {self.size} must be at least 1 pixel")
        if self.width < 1:
            raise InputError(f"--width {self.width} must be at least 1")
        if self.shift < 0:
            raise InputError(f"--shift {self.shift} must be 0 or more")


def main(options: ClassifierOptions) -> None:
    # torch takes seconds to import: not before parsing
    from diffusion.data.images import DiffusionData
    from diffusion.judging.classifier import train
    from unet.training.resuming import resumed
    from unet.training.run import check_first

    check_first(options)
    options = resumed(options)
    data = DiffusionData(
        options.data,
        size=options.size,
        channels=CHANNELS[options.colour] if options.colour else None,
        flips=False,
        skip_bad=options.skip_bad,
        classes=True,
        fine=False,  # as what eval-ddpm shows it
    )
    train(data, options, width=options.width, shift=options.shift)
    judged, judge = ("--model", "RUN/model", "--data", options.data), options.out / "model"
    say_next("eval-ddpm", *judged, "--classifier", judge)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, ClassifierOptions, argv, description=__doc__)
