"""The command unet-ema from a clone: python scripts/ema.py --help."""

import sys

from unet_diffusion.ema import command

if __name__ == "__main__":
    sys.exit(command())
