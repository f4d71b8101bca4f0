"""The command unet-eval-ddpm from a clone: python scripts/eval_ddpm.py --help."""

import sys

from unet_diffusion.eval_ddpm import command

if __name__ == "__main__":
    sys.exit(command())
