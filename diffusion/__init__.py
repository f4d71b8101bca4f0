"""Diffusion: forward noising, noise prediction and the reverse loops, on the trunk of ``unet``.

`load` gives a trained model to call: `images = load("runs/photos/model")(16, seed=0)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.generator import ImageGenerator, load

__all__ = ["ImageGenerator", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which a command line's --help need not wait for.
    if name in __all__:
        from diffusion import generator

        return getattr(generator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
