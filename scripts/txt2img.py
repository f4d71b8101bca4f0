"""The command unet-txt2img from a clone: python scripts/txt2img.py --help."""

import sys

from unet_diffusion.txt2img import command

if __name__ == "__main__":
    sys.exit(command())
