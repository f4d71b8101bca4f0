"""`Tiled`: a denoiser of one size for images of any larger size, in overlapping tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffusion.process.denoiser import for_batch
from diffusion.process.prediction import Denoised, DenoiserLike
from unet.errors import InputError

SHARED = 2  # neighbouring tiles share at least 1 / 2 of their side
Place: TypeAlias = tuple[EllipsisType, slice, slice]  # of a tile in an image (..., H, W)


class Tiled:
    """Predictions for a larger image, combined from those of overlapping tiles.

    At each noise level every tile of the one noisy image is denoised for itself, and what the tiles
    say of a pixel is averaged (MultiDiffusion, arXiv 2302.08113, eq. 5), by weights that fall to
    next to nothing at the edge of a tile. So all tiles see the same noise and each other's image.

    Put it around guidance, which steers away from a condition of the size of a tile, and inside of
    `Clipped`. An image of one tile goes through as it is.

    Args:
        denoiser: of images of a tile's size.
        size: height and width of a tile.
        together: tiles that are denoised at a time, at most, but at least one of each image.
    """

    def __init__(self, denoiser: DenoiserLike, size: tuple[int, int], together: int = 1) -> None:
        self.denoiser, self.size, self.together = denoiser, size, together
        self.schedule, self.prediction = denoiser.schedule, denoiser.prediction

    def __call__(
        self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
    ) -> Denoised:
        """x (B, C, H, W) of at least a tile's size; conditioning (B, K, H, W) is cut as x is.

        Raises:
            InputError: an image smaller than a tile.
        """
        height, width = x.shape[-2:]
        if (height, width) == self.size:
            return self.denoiser(x, t, to=to, **conditioning)
        if height < self.size[0] or width < self.size[1]:
            raise InputError(
                f"an image of {height} x {width} is smaller than a tile of {self.size[0]} x "
                f"{self.size[1]}: pad it to that size"
            )
        batch = len(x)
        given = {k: v for k, v in for_batch(conditioning, batch).items() if v is not None}
        places = tile_places((height, width), self.size)
        window = tile_weights(self.size).to(x)
        weights = x.new_zeros(height, width)
        for place in places:
            weights[place] += window
        sums: list[Tensor] = []
        many = max(1, self.together // batch)
        for part in (places[i : i + many] for i in range(0, len(places), many)):
            known = self._predicted(part, x, t, to, given)
            sums = sums or [y.new_zeros(batch, y.shape[1], height, width) for y in known]
            for total, tiles in zip(sums, known, strict=True):
                for place, tile in zip(part, tiles.split(batch), strict=True):
                    total[place] += tile * window
        return Denoised(*(total / weights for total in sums))

    def _predicted(
        self,
        places: Sequence[Place],
        x: Tensor,
        t: Tensor | float,
        to: float | None,
        given: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The predictions that there are, (places * B, C, h, w), of the tiles at these places."""
        times = torch.cat([t.expand(len(x))] * len(places)) if isinstance(t, Tensor) else t
        cut = {
            name: torch.cat([v[place] if v.dim() == x.dim() else v for place in places])
            for name, v in given.items()
        }
        found = self.denoiser(torch.cat([x[place] for place in places]), times, to=to, **cut)
        return [y for y in found if y is not None]


def tile_places(image: tuple[int, int], tile: tuple[int, int]) -> list[Place]:
    """Where the tiles of an image (..., H, W) lie, row by row."""
    rows, columns = (starts(n, m) for n, m in zip(image, tile, strict=True))
    return [
        (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
        for top in rows
        for left in columns
    ]


def starts(n: int, tile: int) -> list[int]:
    """The first pixels of the tiles along a side of n pixels, as even as whole pixels can be."""
    count = 1 + math.ceil((n - tile) / (tile - tile // SHARED))
    return [round(i * (n - tile) / max(1, count - 1)) for i in range(count)]


def tile_weights(size: tuple[int, int]) -> Tensor:
    """(H, W): sin^2 along each side, above 0, as smooth as half of a tile allows."""
    along = [torch.sin(math.pi * (torch.arange(n) + 0.5) / n) ** 2 for n in size]
    return along[0][:, None] * along[1]
