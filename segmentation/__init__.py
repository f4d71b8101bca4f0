"""Segmentation of images with the U-Net: data, training, metrics, prediction.

`load` gives a trained model to call: `mask = load("runs/mine/model")(image)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segmentation.segmenter import Segmenter, load

__all__ = ["Segmenter", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which a command line's --help need not wait for.
    if name in __all__:
        from segmentation import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
