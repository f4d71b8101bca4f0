from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, RePaintScheduler
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Denoiser
from diffusion.process.editing import inpaint, invert, repaint_timesteps, sdedit, slerp
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised, PredictionName
from diffusion.process.samplers import count_evaluations, finish, sample
from diffusion.process.schedule import CLEAN, NoiseSchedule
from tests.diffusion.exact import GaussianDenoiser, Wavy, wavy_denoiser
from unet.errors import InputError

S = NoiseSchedule()
COSINE = NoiseSchedule(kind="cosine")


def image(seed: int = 0, n: int = 2) -> Tensor:
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------------
# SDEdit


@pytest.mark.parametrize(("strength", "steps"), [(0.05, 1), (0.6, 12), (0.58, 11), (1.0, 20)])
def test_sdedit_is_the_end_of_a_run_from_the_noised_image(strength: float, steps: int) -> None:
    denoiser, timesteps, x0 = wavy_denoiser(S, "eps"), S.timesteps(20), image()
    run = list(sdedit(denoiser, x0, timesteps, strength, noise=NoiseSource([1, 2])))
    assert len(run) == steps
    taken = timesteps[-steps:]
    x = S.q_sample(x0, taken[0], NoiseSource([1, 2]).draw((3, 6, 6)))
    assert_close(run[-1].x, finish(sample(denoiser, x, taken)), rtol=0, atol=0)


def test_the_strength_says_how_much_of_the_image_is_left() -> None:
    denoiser = GaussianDenoiser(COSINE, mean=0.0, std=0.5)
    x0 = 0.5 * NoiseSource([5]).draw((1, 60, 60))
    left = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        noise = NoiseSource([6])
        run = sdedit(denoiser, x0, COSINE.timesteps(50), strength, noise=noise, sampler="ddpm")
        x = finish(run)
        assert x.std().item() == pytest.approx(0.5, rel=0.1)
        left.append(torch.corrcoef(torch.stack([x.flatten(), x0.flatten()]))[0, 1].item())
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.9
    assert abs(left[-1]) < 0.05


@pytest.mark.parametrize(
    ("strength", "says"),
    [(0.0, "above 0"), (1.2, "at most 1"), (math.nan, "nan"), (0.04, "not a single one.*0.05")],
)
def test_wrong_strengths_are_refused(strength: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sdedit(
            wavy_denoiser(S, "eps"), image(), S.timesteps(20), strength, noise=NoiseSource([1, 2])
        )


# ----------------------------------------------------------------------------------------------
# RePaint


@pytest.mark.parametrize(("jump", "repeats"), [(10, 10), (5, 2), (1, 3), (10, 1), (60, 4)])
@pytest.mark.parametrize("n", [20, 50])
def test_the_walk_is_that_of_repaint(n: int, jump: int, repeats: int) -> None:
    """Diffusers goes up in single steps, of which ours keeps the last: the leap is the same."""
    scheduler = RePaintScheduler()
    scheduler.set_timesteps(n, jump_length=jump, jump_n_sample=repeats)
    theirs = scheduler.timesteps.tolist()
    rising = [b > a for a, b in pairwise([math.inf, *theirs])]
    kept = [
        t
        for t, up, more in zip(theirs, rising, [*rising[1:], False], strict=True)
        if not (up and more)
    ]
    ours = repaint_timesteps(S.timesteps(n, "leading"), jump, repeats)
    assert ours == kept
    down = sum(b < a for a, b in pairwise([*theirs, CLEAN]))
    assert count_evaluations("ddpm", ours, COSINE) == down


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m"])
def test_known_pixels_are_exact_and_the_others_are_new(sampler: Any) -> None:
    x0 = image()
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 2:4], mask[1, :, :, 5] = 1, 1
    run = inpaint(
        wavy_denoiser(COSINE, "v"),
        x0,
        mask,
        COSINE.timesteps(10),
        noise=NoiseSource([1, 2]),
        jump=2,
        repeats=2,
        sampler=sampler,
    )
    steps = list(run)
    x, anew = steps[-1].x, mask.bool().expand_as(x0)
    assert x[~anew].equal(x0[~anew])
    assert not x[anew].isclose(x0[anew]).any()
    assert len(steps) == count_evaluations(
        "ddpm", repaint_timesteps(COSINE.timesteps(10), 2, 2), COSINE
    )
    for step in steps[:-1]:  # with the noise of the level
        signal, sigma = COSINE.level(step.t)
        noise = (step.x - signal * x0)[~anew] / sigma
        assert noise.std().item() == pytest.approx(1, abs=0.25)


class Pair(GaussianDenoiser):
    """The exact denoiser of two pixels N(0, 1) that correlate by 0.9."""

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
        level = self.schedule.level(float(t))
        c = torch.tensor([[1, 0.9], [0.9, 1]])
        gain = (
            level.signal * c @ torch.linalg.inv(level.signal**2 * c + level.noise**2 * torch.eye(2))
        )
        x0 = x @ gain
        return Denoised(x0, (x - level.signal * x0) / level.noise)


def test_resampling_lets_new_pixels_fit_the_known_ones() -> None:
    """Given one of the pair, the other is 0.9 times it on average (RePaint, sec. 4.2)."""
    known = 1.5
    x0 = torch.full((800, 1, 1, 2), known)
    x0[..., 1] = -7  # not to be looked at
    mask = torch.tensor([False, True]).view(1, 1, 1, 2)
    misses = []
    for repeats in (1, 6):
        run = inpaint(
            Pair(COSINE),
            x0,
            mask,
            COSINE.timesteps(20),
            noise=NoiseSource(range(800)),
            jump=4,
            repeats=repeats,
        )
        misses.append(abs(finish(run)[..., 1].mean().item() - 0.9 * known))
    assert misses[1] < 0.15
    assert misses[0] > 2 * misses[1]


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 3, 6, 6), (3, 1, 6, 6), (6, 6)])
def test_masks_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"mask is .* need one of \(1, 1, 6, 6\)"):
        inpaint(
            wavy_denoiser(S, "eps"),
            image(),
            torch.ones(shape),
            S.timesteps(5),
            noise=NoiseSource([1, 2]),
        )


def test_walks_that_lead_nowhere_are_refused() -> None:
    for jump, repeats in ((0, 2), (2, 0)):
        with pytest.raises(InputError, match="must both be 1 or more"):
            repaint_timesteps([5, 3, 1], jump, repeats)


# ----------------------------------------------------------------------------------------------
# Inversion


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_one_iteration_is_the_inversion_of_diffusers(spacing: Any) -> None:
    """Configured: eps, no clipping. It asks the network at the next timestep, about this x."""
    net = Wavy(S, "eps")
    scheduler = DDIMInverseScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(20)
    x, theirs = image(), []
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
        theirs.append(x)
    denoiser = Denoiser(net, S, "eps")
    ours = list(invert(denoiser, image(), S.timesteps(20, spacing), iterations=1))
    assert [step.t for step in ours] == scheduler.timesteps.tolist()
    for step, x in zip(ours, theirs, strict=True):
        assert_close(step.x, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
@pytest.mark.parametrize("n", [5, 20])
def test_inversion_and_back_returns_the_image(name: PredictionName, n: int) -> None:
    denoiser, timesteps = wavy_denoiser(COSINE, name), COSINE.timesteps(n, "leading")
    x0 = image().double()
    conditioning = {"classes": torch.tensor([1.0])}
    errors = []
    for iterations in (1, 3, 50):
        run = invert(denoiser, x0, timesteps, iterations=iterations, conditioning=conditioning)
        x = finish(run)
        back = finish(sample(denoiser, x, timesteps, conditioning=conditioning))
        errors.append((back - x0).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_the_inverse_of_a_gaussian_image_is_standard_normal_noise() -> None:
    denoiser = GaussianDenoiser(COSINE, mean=0.3, std=0.5)
    x0 = 0.3 + 0.5 * NoiseSource([0]).draw((1, 100, 100))
    x = finish(invert(denoiser, x0, COSINE.timesteps(100)))
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.03)


def test_what_cannot_be_inverted_is_refused() -> None:
    schedule = NoiseSchedule(zero_snr=True)
    with pytest.raises(InputError, match="timestep 999 has no signal"):
        invert(wavy_denoiser(schedule, "v"), image(), schedule.timesteps(10))
    with pytest.raises(InputError, match="at least 1 iteration per step, not 0"):
        invert(wavy_denoiser(S, "v"), image(), [5], iterations=0)


# ----------------------------------------------------------------------------------------------
# Interpolation


def test_slerp_keeps_the_length_and_the_pace() -> None:
    g = torch.Generator().manual_seed(0)
    first, last = torch.randn(2, 1, 3, 8, 8, generator=g, dtype=torch.float64)
    last = last * (first.norm() / last.norm())
    share = torch.linspace(0, 1, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    x = slerp(first, last, share)
    assert_close(x.flatten(1).norm(dim=1), first.norm().expand(7))
    assert_close(x[:1], first)
    assert_close(x[-1:], last)
    steps = torch.stack([(a - b).norm() for a, b in pairwise(x)])
    assert_close(steps, steps[0].expand(6))
    assert_close(slerp(first, first, share), first.expand(7, -1, -1, -1))
