"""How many sampling steps a model needs, judged by the contrast of its images.

A long step goes to the mean of the possible images. Plain images gain by that, as it removes what
is unlikely; textures lose their grain, and pale images their colours. After little training long
steps leave noise instead.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.model import DiffusionUNet
from diffusion.plans import Wanted
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import STEPS, Images, ImageSampler

FEWER = 8  # steps that are tried beside the usual ones
ALIKE = 0.85  # least ratio of the powers of both at each wavelength, whichever is the smaller
_EDGES = (-1, 1 / 16, 1 / 8, 1 / 4, 1)  # of the bands, in waves a pixel


def needs_deciding(model: DiffusionUNet) -> bool:
    """Whether the steps of such a model are decided: only for flow matching of pixels, with or
    without classes, as others were not measured."""
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    others = {"few_steps", "condition", "text", "text_encoder", "autoencoder", "joint", "target"}
    return schedule.kind == "flow" and schedule.steps >= STEPS and not others & model.info.keys()


def note_steps(sampler: ImageSampler, wanted: Wanted) -> tuple[str, Images]:
    """Notes in the model's `info` that FEWER steps are its default, if what these make has the
    contrast of what STEPS make from the same noise.

    Args:
        sampler: of the model; whatever its steps are.
        wanted: see `ImageSampler`; so many images are made.

    Returns:
        What was found, for people, and the images in the steps that are its default.
    """
    made: dict[int, Images] = {}
    for steps in (FEWER, STEPS):
        way = sampler.with_options(replace(sampler.options, steps=steps))
        made[steps] = way(len(wanted), wanted)
    share = likeness(made[FEWER], made[STEPS])
    sampler.model.info.pop("steps", None)  # of weights before these
    steps = STEPS if share < ALIKE else FEWER
    if steps == FEWER:
        sampler.model.info["steps"] = FEWER
    said = (
        f"samples are made in {steps} steps by default: at the wavelength where the images of "
        f"{FEWER} and {STEPS} steps differ most, the smaller power is {share:.0%} of the larger one"
    )
    return said, made[steps]


def likeness(images: NDArray[Any], others: NDArray[Any]) -> float:
    """How much the power of images (N, H, W, C) is like that of others: the smaller as a share of
    the larger, the least over wavelengths (above 16 pixels, 8 to 16, 4 to 8, below 4) and channels.
    """
    ours, theirs = band_powers(images), band_powers(others)
    # Where there is nothing in a band or channel, nothing is lost.
    floor = 1e-4 * max(ours.max(), theirs.max()) or 1.0
    ratio = (ours + floor) / (theirs + floor)
    return float(np.minimum(ratio, 1 / ratio).min())


def band_powers(images: NDArray[Any]) -> NDArray[np.float64]:
    """The mean power (bands, C) of images (N, H, W, C) under a Hann window, without their means."""
    height, width = images.shape[1:3]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    pixels = images.astype(np.float64)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(pixels * window[..., None], axes=(1, 2))) ** 2
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    bands = [(waves > low) & (waves <= high) for low, high in pairwise(_EDGES)]
    return np.stack([power[:, band].mean(axis=(0, 1)) for band in bands if band.any()])
