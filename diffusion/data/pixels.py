"""Pixels of any depth, colour and size as those of one data set, and to [-1, 1] and back."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet.errors import InputError
from unet.files.pages import Array

Pixels: TypeAlias = NDArray[np.uint8]  # (H, W, C)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]; `to_uint8` gives the same bytes back."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape in [-1, 1] to the nearest uint8; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_bytes(x: Tensor) -> NDArray[np.uint8]:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C); what lies outside is clamped."""
    return rearrange(to_uint8(x), "b c h w -> b h w c").cpu().numpy()


def fitted(pixels: Array, size: tuple[int, int], channels: int) -> Tensor:
    """One image (H, W, C) of any depth as (channels, *size) in [-1, 1], resized and cropped.

    Raises:
        InputError: float pixels outside [0, 1].
    """
    return as_tensor(resized(as_uint8(pixels, channels), size))


def as_uint8(pixels: Array, channels: int) -> Pixels:
    """An image (H, W, C) of any depth and colour as uint8 with these channels."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            raise InputError(
                f"its values go from {low:g} to {high:g}: save it with 8 or 16 bits, or scale "
                "floats to 0 ... 1"
            )
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The largest part at the centre with the proportions of `size`, resized to it (Lanczos)."""
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    scale = min(height / size[0], width / size[1])
    top, left = (height - scale * size[0]) / 2, (width - scale * size[1]) / 2
    box = (left, top, width - left, height - top)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    # Huge images are first reduced by whole pixels to three times the size: as good, and faster.
    found = image.resize(size[::-1], Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(found).reshape(*size, -1)


def as_tensor(pixels: Pixels) -> Tensor:
    """Pixels (H, W, C) as an image (C, H, W) in [-1, 1]."""
    return to_unit(torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy()))
