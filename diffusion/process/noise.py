"""`NoiseSource`: standard normal noise that depends on each image's seed alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unet.errors import InputError
from unet.words import counted

SEEDS = 2**32  # that differ


class NoiseSource:
    """Standard normal noise with a generator of its own for each image.

    So image 7 of a run depends on its seed alone, whatever the batch size and the device.

    Args:
        seeds: one for each image of the batch, from 0 to 2^32 - 1: more bits do not count in
            torch's generator on the CPU.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = []
        for seed in map(operator.index, seeds):  # also NumPy's integers, but no fractions
            if not 0 <= seed < SEEDS:
                raise InputError(f"seed {seed} must be from 0 to {SEEDS - 1}")
            self.generators.append(torch.Generator().manual_seed(seed))

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise: (B, *shape), float32 on the CPU, where it is the same on every machine.

        Args:
            shape: of one image, (C, H, W).
        """
        found = torch.empty(len(self.generators), *shape)
        for row, generator in zip(found, self.generators, strict=True):
            row.normal_(generator=generator)
        return found

    def like(self, x: Tensor) -> Tensor:
        """The next noise for images x (B, C, H, W), on their device and in their dtype."""
        self.check(x)
        return self.draw(x.shape[1:]).to(x)

    def check(self, x: Tensor) -> None:
        """Raises an InputError unless there is one seed for each of the images x (B, C, H, W)."""
        if len(x) != len(self.generators):
            seeds, images = counted(len(self.generators), "seed"), counted(len(x), "image")
            raise InputError(f"{seeds} for {images}: give one per image")
