"""Editing with the one sampling loop: from an image, around a mask, and back to the noise.

Images are (B, C, H, W), in [-1, 1]. The functions that make images return runs, as `sample` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import DenoiserLike
from diffusion.process.samplers import SamplerName, Step, sample
from diffusion.process.schedule import CLEAN
from unet.errors import InputError
from unet.words import counted

ITERATIONS = 3  # of DDIM's inversion at each step


def sdedit(
    denoiser: DenoiserLike,
    image: Tensor,
    timesteps: Sequence[float],
    strength: float,
    *,
    noise: NoiseSource,
    sampler: SamplerName = "ddim",
    **options: Any,
) -> Iterator[Step]:
    """Image to image: adds noise, and takes it away again (SDEdit, arXiv 2108.01073).

    Args:
        timesteps: of a whole run, of which the last `strength * n` are taken.
        strength: above 0 and at most 1: how much of the run, and so how much of the image, is made
            anew.
        noise: for the start, and for samplers that draw some on the way.
        options: see `sample`.

    Raises:
        InputError: a strength out of range, or too small for a single step.
    """
    taken = sdedit_timesteps(timesteps, strength)
    x = denoiser.schedule.q_sample(image, taken[0], noise.like(image))
    return sample(denoiser, x, taken, sampler, noise=noise, **options)


def sdedit_timesteps(timesteps: Sequence[float], strength: float) -> Sequence[float]:
    """The last `strength * n` of a run's timesteps; see `sdedit`."""
    if not 0 < strength <= 1:
        raise InputError(f"strength {strength} must be above 0 and at most 1")
    count = int(strength * len(timesteps))
    if count == 0:
        least = math.ceil(1000 / len(timesteps)) / 1000
        raise InputError(
            f"strength {strength} of {counted(len(timesteps), 'step')} is not a single one: "
            f"choose a strength of {least:g} or more, or more steps"
        )
    return timesteps[len(timesteps) - count :]


def inpaint(
    denoiser: DenoiserLike,
    image: Tensor,
    mask: Tensor,
    timesteps: Sequence[float],
    *,
    noise: NoiseSource,
    jump: int = 10,
    repeats: int = 10,
    sampler: SamplerName = "ddpm",
    **options: Any,
) -> Iterator[Step]:
    """Makes the masked part of an image anew, to fit the rest (RePaint, arXiv 2201.09865, alg. 1).

    After each step the known pixels are put back, with the noise of that level; in the end they
    are exactly those of the image.

    Args:
        mask: (B or 1, 1, H, W), 1 or True where pixels are to be made anew, else 0.
        timesteps, jump, repeats: see `repaint_timesteps`, which says how many steps it will be.
        options: see `sample`.
    """
    if mask.shape[0] not in (1, len(image)) or mask.shape[1:] != (1, *image.shape[2:]):
        raise InputError(
            f"the mask is {tuple(mask.shape)}, but images {tuple(image.shape)} need one of "
            f"{(1, 1, *image.shape[2:])}"
        )
    anew = mask.to(image.device).bool()

    def put_back(x: Tensor, t: float) -> Tensor:
        known = image if t == CLEAN else denoiser.schedule.q_sample(image, t, noise.like(image))
        return torch.where(anew, x, known)

    path = repaint_timesteps(timesteps, jump, repeats)
    x = noise.like(image)
    return sample(denoiser, x, path, sampler, noise=noise, constrain=put_back, **options)


def repaint_timesteps(timesteps: Sequence[float], jump: int, repeats: int) -> list[float]:
    """RePaint's way down, which jumps back up to let the new pixels settle with the known ones.

    Args:
        timesteps: descending.
        jump: how many timesteps to go back up after as many steps (the paper's j).
        repeats: how often each stretch is walked (the paper's r); 1: no jumps.

    Returns:
        The timesteps in the order of the walk (RePaint, fig. 9); for its number of network
        evaluations see `count_evaluations`.
    """
    if jump < 1 or repeats < 1:
        raise InputError(f"jump {jump} and repeats {repeats} must both be 1 or more")
    rising = list(reversed(timesteps))
    left = dict.fromkeys(range(0, len(rising) - jump, jump), repeats - 1)
    path, level = [], len(rising) - 1
    while level >= 0:
        path.append(rising[level])
        if left.get(level, 0) > 0:
            left[level] -= 1
            level += jump
        else:
            level -= 1
    return path


def invert(
    denoiser: DenoiserLike,
    image: Tensor,
    timesteps: Sequence[float],
    *,
    iterations: int = ITERATIONS,
    conditioning: Mapping[str, Any] | None = None,
) -> Iterator[Step]:
    """DDIM backwards: the noise from which `sample(..., timesteps, "ddim")` makes the image.

    Each step solves DDIM's step (arXiv 2010.02502, eq. 12) for the noisier x, in which eps is of
    that very x: by fixed-point iteration (arXiv 2309.04907). One iteration takes eps of the cleaner
    x instead, which is the usual "DDIM inversion"; more of them come back to the image exactly.

    Args:
        timesteps: those of the run down, so descending; the first is where this one ends.
        iterations: evaluations of the network in each step.

    Raises:
        InputError: a first timestep without signal, from which there is no way back.
    """
    if iterations < 1:
        raise InputError(f"inversion needs at least 1 iteration per step, not {iterations}")
    if denoiser.schedule.level(timesteps[0]).signal == 0:
        raise InputError(
            f"timestep {timesteps[0]} has no signal, so no image comes back from it: leave it out "
            "of the inversion"
        )
    return _invert(denoiser, image, [*timesteps, CLEAN][::-1], iterations, conditioning or {})


@torch.no_grad()
def _invert(
    denoiser: DenoiserLike,
    x: Tensor,
    times: Sequence[float],
    iterations: int,
    conditioning: Mapping[str, Any],
) -> Iterator[Step]:
    for index, t in enumerate(times[1:]):
        at, to = denoiser.schedule.level(times[index]), denoiser.schedule.level(t)
        noisier = x
        for _ in range(iterations):
            eps = denoiser(noisier, t, **conditioning).eps
            x0 = (x - at.noise * eps) / at.signal
            noisier = to.signal * x0 + to.noise * eps
        x = noisier
        yield Step(index, t, x, x0)


def slerp(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation, which keeps the length of noise: DDIM, eq. 67.

    Args:
        first, last: (1, C, H, W), each taken as one vector.
        share: (N, 1, 1, 1) from 0, the first, to 1, the last.
    """
    cosine = torch.cosine_similarity(first.flatten(), last.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:  # the arc is a straight line
        return torch.lerp(first, last, share)
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / angle.sin()
