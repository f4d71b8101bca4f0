"""`Normalisation`: the statistics that images are scaled by, saved with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from segmentation.data.classes import DTYPES
from unet.errors import InputError
from unet.files.images import Array, white
from unet.words import counted


@dataclass(frozen=True)
class Normalisation:
    """Per channel (x - mean) / std, on pixel values as stored; of the training images only."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # 1 where a channel is constant
    dtype: str  # of the images: values of another depth mean something else

    @classmethod
    def of(cls, images: Iterable[Array]) -> Normalisation:
        """Statistics of images (H, W, C), one at a time, in float64 (Chan et al. 1979)."""
        count, mean, squares = 0, np.zeros(1), np.zeros(1)  # squares: sum of (x - mean)^2
        dtype = ""
        for image in images:
            n, m = image.shape[0] * image.shape[1], image.mean((0, 1), dtype=np.float64)
            v, delta = image.var((0, 1), dtype=np.float64), m - mean
            mean = mean + delta * n / (count + n)
            squares = squares + v * n + delta**2 * (count * n / (count + n))
            count, dtype = count + n, image.dtype.name
        if not count:
            raise ValueError("statistics of no images")
        std = np.sqrt(squares / count)
        return cls(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()), dtype)

    def __call__(self, image: Array) -> NDArray[np.float32]:
        """(H, W, C) as stored -> float32 (C, H, W)."""
        if image.shape[2] != len(self.mean) or image.dtype != self.dtype:
            raise InputError(
                f"an image with {counted(image.shape[2], 'channel')} of {image.dtype}, where the "
                f"training images have {len(self.mean)} of {self.dtype}; convert it"
            )
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (image.astype(np.float32) - mean) / std
        return np.ascontiguousarray(rearrange(scaled, "h w c -> c h w"))

    def for_images(self, channels: int, dtype: str) -> Normalisation:
        """The same scaling of images of another depth, or of grey as colour and the reverse.

        A value is the same share of the largest one; floats go from 0 to 1.
        """
        factor = white(dtype) / white(self.dtype)
        mean, std = ([v * factor for v in values] for values in (self.mean, self.std))
        if channels != len(mean):
            mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
        return replace(self, mean=tuple(mean), std=tuple(std), dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Normalisation:
        """The statistics that `to_dict` gave, from JSON; InputError if they are none."""
        try:
            mean, std = (tuple(float(x) for x in saved[key]) for key in ("mean", "std"))
            known = saved["dtype"] in DTYPES and len(mean) in (1, 3)
            fits = len(mean) == len(std) and np.isfinite(mean + std).all() and min(std) > 0
            if not known or not fits:
                raise ValueError(f"mean {mean}, std {std} of {saved['dtype']!r}")
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"the model's normalisation is damaged: {error}") from error
        return cls(mean, std, saved["dtype"])
