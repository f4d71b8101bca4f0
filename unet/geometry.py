"""Sizes of what goes into a `UNet` and of what comes out, and how far a pixel looks."""

from __future__ import annotations

import itertools
import math

from unet.config import UNetConfig
from unet.errors import InputError


def output_size(config: UNetConfig, n: int) -> int:
    """Height (or width) that comes out for height (or width) n: n itself with same padding.

    Raises:
        InputError: valid convolutions cannot make anything of n; names the nearest sizes.
    """
    if config.padding == "same":
        return n
    if (size := _valid_size(config, n)) is not None:
        return size
    step = 2 ** (config.levels - 1)
    near = [m for m in range(n - step, n) if _valid_size(config, m) is not None][-1:]
    above = (m for m in range(max(n, 0) + 1, n + 10_000_000) if _valid_size(config, m) is not None)
    near.append(next(above))
    raise InputError(
        f"valid convolutions reach no output from size {n}: the nearest sizes that work are "
        f"{' and '.join(map(str, near))}, then in steps of {step}"
    )


def input_size(config: UNetConfig, n: int) -> int:
    """The smallest height (or width) from which at least n comes out; n with same padding."""
    if config.padding == "same":
        return n
    return next(size for size in itertools.count(n) if (_valid_size(config, size) or 0) >= n)


def receptive_radius(config: UNetConfig) -> float:
    """Pixels around an output pixel beyond which the input does not change it (an upper bound).

    Infinite where a layer looks at the whole map: attention, group and instance normalisation.
    """
    if config.attention_levels or config.middle_attention or config.norm in ("group", "instance"):
        return math.inf
    radius = 0
    for level in range(config.levels):
        pixel = config.patch * 2**level  # size of this level's pixels in those of the input
        bottom = level == config.levels - 1
        by_block = config.skips == "block"
        inner = 2 if by_block else config.blocks  # in the middle
        encoder = config.blocks if by_block or not bottom else 0
        decoder = config.blocks + by_block if by_block or not bottom else 0
        convolutions = 2 * (encoder + decoder + (inner if bottom else 0))
        resampling = 0 if bottom else 4  # at most one for down, and one and a half coarse ones up
        radius += pixel * (convolutions + resampling)
    stem = config.block == "res" or config.skips == "block" or config.patch > 1
    return radius + config.patch * (2 if stem else 1)


def _valid_size(config: UNetConfig, n: int) -> int | None:
    loss, levels = 4 * config.blocks, config.levels - 1
    for _ in range(levels):
        n -= loss
        if n < 2 or n % 2:
            return None
        n //= 2
    n -= loss
    for _ in range(levels):
        if n < 1:
            return None
        n = 2 * n - loss
    return n if n > 0 else None
