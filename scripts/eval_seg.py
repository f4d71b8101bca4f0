"""The command unet-eval-seg from a clone: python scripts/eval_seg.py --help."""

import sys

from unet_diffusion.eval_seg import command

if __name__ == "__main__":
    sys.exit(command())
