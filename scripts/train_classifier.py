"""The command unet-train-classifier from a clone: python scripts/train_classifier.py --help."""

import sys

from unet_diffusion.train_classifier import command

if __name__ == "__main__":
    sys.exit(command())
