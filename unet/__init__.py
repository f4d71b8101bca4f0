"""One U-Net for segmentation and for diffusion: the network, and what every training run needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unet.config import UNetConfig
from unet.errors import InputError
from unet.presets import PRESETS, Preset

if TYPE_CHECKING:
    from unet.geometry import output_size
    from unet.model import UNet

__all__ = ["PRESETS", "InputError", "Preset", "UNet", "UNetConfig", "output_size"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which a command line's --help need not wait for.
    if name in ("UNet", "output_size"):
        from unet import geometry, model

        return getattr(model if name == "UNet" else geometry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
