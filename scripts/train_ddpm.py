"""Train a diffusion model on a folder of images: train_ddpm.py --data DIR --out RUN."""

from __future__ import annotations

import sys

from diffusion.options import DiffusionOptions
from unet.training.cli import run_script


def main(options: DiffusionOptions) -> None:
    from diffusion.training import train  # torch takes seconds to import: not before parsing

    train(options)


if __name__ == "__main__":
    sys.exit(run_script(main, DiffusionOptions, description=__doc__))
