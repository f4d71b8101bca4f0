"""The command unet-predict-seg from a clone: python scripts/predict_seg.py --help."""

import sys

from unet_diffusion.predict_seg import command

if __name__ == "__main__":
    sys.exit(command())
