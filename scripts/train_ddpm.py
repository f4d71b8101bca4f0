"""The command unet-train-ddpm from a clone: python scripts/train_ddpm.py --help."""

import sys

from unet_diffusion.train_ddpm import command

if __name__ == "__main__":
    sys.exit(command())
