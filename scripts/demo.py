"""The command unet-demo from a clone: python scripts/demo.py --help."""

import sys

from unet_diffusion.demo import command

if __name__ == "__main__":
    sys.exit(command())
