"""The command unet-sample-ddpm from a clone: python scripts/sample_ddpm.py --help."""

import sys

from unet_diffusion.sample_ddpm import command

if __name__ == "__main__":
    sys.exit(command())
