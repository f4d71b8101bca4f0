"""train_ddpm.py for images that are taken to be too many for memory, so that files stay in use."""

import runpy
import sys
from pathlib import Path

from diffusion.data import whole as data

data.CACHE_BYTES = 0
sys.argv[0] = str(Path(__file__).parents[2] / "scripts" / "train_ddpm.py")
runpy.run_path(sys.argv[0], run_name="__main__")
