"""Pixels of any depth, colour and size as those of one data set, and to [-1, 1] and back.

Whatever the type of an image, its values become levels from 0, black, to 255, white, which are -1
and 1 to a network. Those of 8-bit images are bytes; those of finer ones are float32, and so keep
every value of 16 bits, and floats to their own precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet.errors import InputError
from unet.files.pages import Array, missing

Pixels: TypeAlias = NDArray[np.uint8 | np.float32]  # (H, W, C), levels from 0 to 255


def to_unit(pixels: Tensor) -> Tensor:
    """Levels of any shape to float32 in [-1, 1]; `to_uint8` gives the same bytes back."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape in [-1, 1] to the nearest uint8; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_bytes(x: Tensor) -> NDArray[np.uint8]:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C); what lies outside is clamped."""
    return rearrange(to_uint8(x), "b c h w -> b h w c").cpu().numpy()


def as_bytes(levels: Pixels) -> NDArray[np.uint8]:
    """Levels of any shape as the nearest bytes."""
    whole = levels if levels.dtype == np.uint8 else np.rint(levels)
    return whole.astype(np.uint8, copy=False)


@dataclass(frozen=True)
class ValueRange:
    """The values that become black and white, for all channels or for each of them; values beyond
    are clipped.
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    @classmethod
    def of_channels(cls, ranges: Sequence[ValueRange]) -> ValueRange:
        """One range for all channels, from one range or those of each channel."""
        if len(ranges) == 1:
            return ranges[0]
        sides = [found.each(1) for found in ranges]
        return cls(tuple(low for (low,), _ in sides), tuple(high for _, (high,) in sides))

    def each(self, channels: int) -> tuple[list[float], list[float]]:
        """The lowest and the highest value of each of so many channels.

        Raises:
            InputError: it is that of another number of channels.
        """
        if np.size(self.low) not in (1, channels):
            raise InputError(
                f"black and white are known of {np.size(self.low)} channels, not of {channels}: "
                "give images of as many channels as all others have (--channels)"
            )
        low, high = (np.broadcast_to(side, channels).tolist() for side in (self.low, self.high))
        return low, high

    def to_levels(self, pixels: Array, *, fine: bool = False) -> Pixels:
        """Pixels (..., C) of any type to levels; the nearest whole ones if not `fine`."""
        low, high = map(np.array, self.each(pixels.shape[-1]))
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
        levels = np.clip(scaled, 0, 255)
        return levels.astype(np.float32) if fine else np.rint(levels).astype(np.uint8)

    def from_levels(self, levels: Pixels, dtype: str) -> Array:
        """Values of a type from levels (..., C): the inverse of `to_levels`."""
        low, high = map(np.array, self.each(levels.shape[-1]))
        values = low + levels.astype(np.float64) * ((high - low) / 255)
        return (values if dtype == "float32" else np.rint(values)).astype(dtype)

    def __str__(self) -> str:
        sides = zip(*self.each(np.size(self.low)), strict=True)
        return ", ".join(f"{low:g} to {high:g}" for low, high in sides)


# What a type says by itself; `diffusion.data.ranges` says it better.
WHOLE = {"uint8": ValueRange(0, 255), "uint16": ValueRange(0, 65535), "float32": ValueRange(0, 1)}


def known_ranges(info: Mapping[str, Any]) -> dict[str, ValueRange]:
    """The ranges of the training images of each type, as a model's `info` has them.

    Raises:
        InputError: they are damaged.
    """
    found: Any = info.get("ranges", {})
    try:
        pairs = {str(kind): (_side(low), _side(high)) for kind, (low, high) in found.items()}
        for kind, (low, high) in pairs.items():
            sides = np.array([low, high])
            if kind not in WHOLE or not (np.isfinite(sides).all() and (sides[0] < sides[1]).all()):
                raise ValueError("no range")
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model's ranges of values are damaged: {found!r:.200}") from error
    return {kind: ValueRange(*pair) for kind, pair in pairs.items()}


@dataclass(frozen=True)
class PixelType:
    """The type of the images that a model was trained on and makes, and their black and white."""

    dtype: str = "uint8"
    values: ValueRange = WHOLE["uint8"]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> PixelType:
        """The type of a model, from its `info`; uint8 for models that do not give it.

        Raises:
            InputError: it is damaged.
        """
        ranges = known_ranges(info)
        # Images with masks had a type of their own from the first.
        usual = next(iter(ranges), "uint8") if "joint" in info else "uint8"
        dtype = info.get("dtype", usual)
        if dtype not in WHOLE:
            raise InputError(
                f"the model's config.json must name the type of its images in info.dtype, one of "
                f"{', '.join(WHOLE)}, not {dtype!r:.200}"
            )
        return cls(dtype, ranges.get(dtype, WHOLE[dtype]))

    @property
    def fine(self) -> bool:
        """Whether there is more between black and white than 256 levels."""
        return self.dtype != "uint8"

    def levels(self, x: Tensor) -> Pixels:
        """Images (B, C, H, W) in [-1, 1] as levels (B, H, W, C); what lies outside is clamped."""
        if not self.fine:
            return to_bytes(x)
        levels = ((x.float() + 1) * 127.5).clamp(0, 255)
        return rearrange(levels, "b c h w -> b h w c").cpu().numpy()

    def stored(self, levels: Pixels) -> Array:
        """Levels (..., C) as values of the type."""
        return self.values.from_levels(levels, self.dtype) if self.fine else levels

    def shown(self, images: Array) -> NDArray[np.uint8]:
        """Values of the type as bytes, for people and for what judges pictures."""
        return as_bytes(self.values.to_levels(images)) if self.fine else images

    def __str__(self) -> str:
        return f"{self.dtype} ({self.values})" if self.fine else self.dtype


def _side(saved: Any) -> float | tuple[float, ...]:
    return tuple(map(float, saved)) if isinstance(saved, list | tuple) else float(saved)


def fitted(
    pixels: Array,
    size: tuple[int, int],
    channels: int,
    values: ValueRange | None = None,
    nodata: float | None = None,
    *,
    fine: bool = False,
    alpha: bool = False,
) -> Tensor:
    """One image (H, W, C) of any depth as (channels, *size) in [-1, 1], resized and cropped.

    Args:
        values: the range of the training images, where these had the same type; None: the type's.
        nodata: see `as_levels`.
        fine: whether these had more than 8 bits.
        alpha: see `resized`.

    Raises:
        InputError: float pixels outside [0, 1] where no range is known; other channels.
    """
    levels = as_levels(pixels, channels, values, nodata, fine=fine)
    return as_tensor(resized(levels, size, alpha=alpha))


def as_levels(
    pixels: Array,
    channels: int,
    values: ValueRange | None = None,
    nodata: float | None = None,
    *,
    fine: bool = False,
) -> Pixels:
    """An image (H, W, C) of any depth and colour as levels with these channels, bytes if not
    `fine`.

    Pixels where nothing was measured get the mean of the others.

    Raises:
        InputError: float pixels outside [0, 1] where no range is given; channels that are neither
            grey nor RGB and others than these.
    """
    dtype, have = pixels.dtype.name, pixels.shape[2]
    check_channels(have, channels)
    if values is None and dtype == "float32":
        low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
        if low < 0 or high > 1:
            raise InputError(
                f"its values go from {low:g} to {high:g}: save it with 8 or 16 bits, or scale "
                "floats to 0 ... 1"
            )
    unknown = missing(pixels, nodata)
    if unknown.any():
        mean = pixels[~unknown].mean(axis=0) if not unknown.all() else 0
        pixels = np.where(unknown[..., None], mean, pixels).astype(pixels.dtype)
    if fine or dtype != "uint8":
        pixels = (values or WHOLE[dtype]).to_levels(pixels, fine=fine)
    if have == channels:
        return pixels
    if have == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if have == 3 and channels == 1:
        if fine:
            return pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    colours = pixels if have == 3 else np.repeat(pixels, 3, axis=2)
    opaque = np.full(pixels.shape[:2], 255, pixels.dtype)  # nothing is transparent
    return np.dstack([colours, opaque])


def check_channels(have: int, channels: int) -> None:
    """Raises an InputError where `as_levels` makes no image of so many channels."""
    if have != channels and (have, channels) not in ((1, 3), (3, 1), (1, 4), (3, 4)):
        raise InputError(
            f"its {have} channels are not {channels}: choose as many in all images with --channels"
        )


def resized(pixels: Pixels, size: tuple[int, int], *, alpha: bool = False) -> Pixels:
    """The largest part at the centre with the proportions of `size`, resized to it (Lanczos).

    Args:
        alpha: the last channel is alpha, by which colours are weighted, so that those of
            transparent pixels do not mix into the others.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    scale = min(height / size[0], width / size[1])
    top, left = (height - scale * size[0]) / 2, (width - scale * size[1]) / 2
    box = (left, top, width - left, height - top)

    def smaller(plane: Pixels) -> Pixels:
        # Huge images are first reduced by whole pixels to three times the size: as good, faster.
        picture = Image.fromarray(plane)
        found = picture.resize(size[::-1], Image.Resampling.LANCZOS, box, reducing_gap=3.0)
        return np.asarray(found)

    def each(planes: Pixels) -> Pixels:
        return np.stack([smaller(planes[..., c]) for c in range(planes.shape[2])], axis=-1)

    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return smaller(pixels)
    # Beyond 0 and 255 Lanczos leads at edges, where it does not round.
    found = each(pixels).clip(0, 255)
    if alpha:
        cover = pixels[..., -1:].astype(np.float32) / 255
        weighted = each(np.concatenate([pixels[..., :-1] * cover, cover], axis=-1))
        share = weighted[..., -1:]
        colours = (weighted[..., :-1] / np.maximum(share, 1e-6)).clip(0, 255)
        colours = colours.round() if pixels.dtype == np.uint8 else colours
        found[..., :-1] = np.where(share > 1 / 255, colours, found[..., :-1])
    return found


def as_tensor(pixels: Pixels) -> Tensor:
    """Pixels (H, W, C) as an image (C, H, W) in [-1, 1]."""
    return to_unit(torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy()))
