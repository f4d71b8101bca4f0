"""The command unet-train-seg from a clone: python scripts/train_seg.py --help."""

import sys

from unet_diffusion.train_seg import command

if __name__ == "__main__":
    sys.exit(command())
