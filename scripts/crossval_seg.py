"""The command unet-crossval-seg from a clone: python scripts/crossval_seg.py --help."""

import sys

from unet_diffusion.crossval_seg import command

if __name__ == "__main__":
    sys.exit(command())
