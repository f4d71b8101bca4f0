"""The command unet-describe from a clone: python scripts/describe.py --help."""

import sys

from unet_diffusion.describe import command

if __name__ == "__main__":
    sys.exit(command())
