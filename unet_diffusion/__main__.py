"""python -m unet_diffusion is the command unet."""

import sys

from unet_diffusion.main import main

if __name__ == "__main__":
    sys.exit(main())
