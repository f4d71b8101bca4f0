"""The command unet-export from a clone: python scripts/export.py --help."""

import sys

from unet_diffusion.export import command

if __name__ == "__main__":
    sys.exit(command())
