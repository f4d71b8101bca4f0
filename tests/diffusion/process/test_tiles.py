"""Images in overlapping tiles: nothing changes where a pixel knows itself, and nothing jumps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Denoiser
from diffusion.process.guidance import Guided
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised, DenoiserLike
from diffusion.process.samplers import finish, sample
from diffusion.process.schedule import NoiseSchedule
from diffusion.process.tiles import Tiled, starts, tile_weights
from tests.diffusion.exact import GaussianDenoiser, wavy_denoiser
from unet.errors import InputError

SCHEDULE = NoiseSchedule(steps=100)
SIZE = (8, 12)


def run(denoiser: DenoiserLike, shape: tuple[int, int], **conditioning: Tensor) -> Tensor:
    source = NoiseSource([3, 4])
    x = source.draw((2, *shape))
    steps = SCHEDULE.timesteps(5, "trailing")
    return finish(sample(denoiser, x, steps, "ddpm", noise=source, conditioning=conditioning))


def joined(x: Tensor, t: Tensor, picture: Tensor, classes: Tensor) -> Tensor:
    """A network that sees its pixel, the condition there and the class."""
    return 0.3 * x + picture + classes.view(-1, 1, 1, 1) / 9


@pytest.mark.parametrize("shape", [SIZE, (8, 13), (21, 12), (31, 40)])
@pytest.mark.parametrize("together", [1, 7, 64])
def test_tiles_of_a_pointwise_denoiser_are_the_whole(shape: tuple[int, int], together: int) -> None:
    """Of the exact one, of a network with every quirk, and of a guided one with a condition."""
    exact, wavy = GaussianDenoiser(SCHEDULE), wavy_denoiser(SCHEDULE, "v")
    for denoiser in (exact, wavy):
        assert_close(run(Tiled(denoiser, SIZE, together), shape), run(denoiser, shape))
    conditioned = Denoiser(joined, SCHEDULE, "v")
    given: dict[str, Any] = {"picture": torch.rand(2, 2, *shape), "classes": torch.arange(2)}
    none = {"classes": torch.tensor([2])}
    small, large = (none | {"picture": torch.zeros(1, 2, *size)} for size in (SIZE, shape))
    tiled = Tiled(Guided(conditioned, 2.0, small), SIZE, together)
    assert_close(run(tiled, shape, **given), run(Guided(conditioned, 2.0, large), shape, **given))


def test_one_tile_is_the_denoiser_itself() -> None:
    """To the bit, of one that looks at the whole image."""

    class Whole(GaussianDenoiser):
        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            x0, eps, _ = super().__call__(x, t)
            return Denoised(x0 - x.mean(dim=(2, 3), keepdim=True), eps, x0)

    whole = Whole(SCHEDULE)
    assert torch.equal(run(Tiled(whole, SIZE), SIZE), run(whole, SIZE))
    x = torch.randn(2, 1, 20, 20)
    tiled = Tiled(whole, SIZE)(x, 50.0)
    assert tiled.mix is not None
    times = Tiled(whole, SIZE)(x, torch.tensor([50, 50]))
    assert_close(times, tiled)
    # x = signal x0 + sigma eps holds of tiles put together where it holds of each.
    signal, sigma = SCHEDULE.rates(50.0, x)
    exact = Tiled(GaussianDenoiser(SCHEDULE), SIZE)(x, 50.0)
    assert_close(signal * exact.x0 + sigma * exact.eps, x)
    with pytest.raises(InputError, match="8 x 9 is smaller than a tile of 8 x 12"):
        Tiled(whole, SIZE)(torch.randn(1, 1, 8, 9), 50.0)


@given(st.integers(1, 70), st.integers(0, 200))
def test_tiles_cover_a_side_and_share_half(tile: int, more: int) -> None:
    found = starts(tile + more, tile)
    assert found[0] == 0
    assert found[-1] == more
    assert all(0 < b - a <= tile - tile // 2 for a, b in pairwise(found))


def test_weights_leave_no_seam() -> None:
    """What neighbours say differs by 1: put together it goes from one to the other smoothly."""

    class Tile(GaussianDenoiser):
        seen = 0

        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            Tile.seen += 1
            return Denoised(torch.full_like(x, Tile.seen), x)

    x0 = Tiled(Tile(SCHEDULE), (16, 16))(torch.zeros(1, 1, 16, 40), 50.0).x0[0, 0, 0]
    assert_close(x0[[0, -1]], torch.tensor([1.0, float(Tile.seen)]), atol=0.1, rtol=0)
    assert (x0.diff() >= -1e-5).all()
    assert x0.diff().max() < 0.25
    assert (tile_weights((5, 1)) > 0).all()
