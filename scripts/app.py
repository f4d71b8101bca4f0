"""The command unet-app from a clone: python scripts/app.py --help."""

import sys

from unet_diffusion.app import command

if __name__ == "__main__":
    sys.exit(command())
