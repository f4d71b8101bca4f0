"""What the network predicts: the noise, the image or v, and the way from each to the others.

A network that sees x_t = signal x_0 + sigma eps may predict eps, x_0 or v = signal eps - sigma x_0.
Each gives both others; they differ in how much errors at different noise levels count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.process.schedule import NoiseSchedule
from unet.errors import InputError

PredictionName = Literal["eps", "x0", "v"]


class Denoised(NamedTuple):
    """What a denoiser makes of x_t, such that x_t = signal x0 + sigma eps."""

    x0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W)
    mix: Tensor | None = None  # (B, C, H, W) of a learned variance: 0 smallest, 1 largest


class DenoiserLike(Protocol):
    """What samplers, guidance and editing ask of a denoiser."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def prediction(self) -> PredictionName: ...

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
        """x (B, C, H, W) at timesteps t (B,), or at one for all."""
        ...


@dataclass(frozen=True)
class Prediction:
    """The formulas of one kind of prediction; `signal` and `sigma` are the rates at t."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x0, eps, signal, sigma) to what the network shall put out."""

    to_x0_eps: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(output, x_t, signal, sigma) to (x0, eps)."""

    min_snr_divisor: Callable[[Tensor], Tensor]
    """SNR to the factor between the squared error of x0 and that of the output."""


PREDICTIONS: dict[PredictionName, Prediction] = {
    "eps": Prediction(  # DDPM, eq. 14 and 15
        target=lambda x0, eps, signal, sigma: eps,
        to_x0_eps=lambda output, x, signal, sigma: ((x - sigma * output) / signal, output),
        min_snr_divisor=lambda snr: snr,
    ),
    "x0": Prediction(
        target=lambda x0, eps, signal, sigma: x0,
        to_x0_eps=lambda output, x, signal, sigma: (output, (x - signal * output) / sigma),
        min_snr_divisor=torch.ones_like,
    ),
    "v": Prediction(  # Salimans & Ho 2022 (arXiv 2202.00512), sec. 4 and appendix D
        target=lambda x0, eps, signal, sigma: signal * eps - sigma * x0,
        to_x0_eps=lambda output, x, signal, sigma: (
            signal * x - sigma * output,
            sigma * x + signal * output,
        ),
        min_snr_divisor=lambda snr: snr + 1,
    ),
}


def get_prediction(name: PredictionName, schedule: NoiseSchedule) -> Prediction:
    """The formulas of a kind of prediction under a schedule.

    Raises:
        InputError: an unknown name; eps where the last timestep has no signal: there the network
            sees nothing but the noise, and x0 does not follow (arXiv 2305.08891, sec. 3.1).
    """
    if name not in tuple(PREDICTIONS):  # a damaged file may give what cannot be looked up
        raise InputError(f"prediction {name!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    if name == "eps" and schedule.zero_snr:
        raise InputError(
            "eps-prediction is undefined at a timestep without signal: choose v- or x0-prediction "
            "with zero_snr, or a schedule without it"
        )
    return PREDICTIONS[name]


def split_output(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output for x (B, C, H, W), in x's precision: the prediction, and the mix or None.

    Networks that learn the variance put out 2 C channels. Their second half runs from -1 to 1; the
    mix is v in eq. 15 of Improved DDPM, from 0 to 1.
    """
    output = output.to(x.dtype)
    if output.shape == x.shape:
        return output, None
    channels = x.shape[1]
    if output.shape != (len(x), 2 * channels, *x.shape[2:]):
        raise InputError(
            f"the network makes {tuple(output.shape)} of images {tuple(x.shape)}; it must keep "
            "their shape, or double the channels where it learns the variance"
        )
    prediction, mix = output.split(channels, dim=1)
    return prediction, (mix + 1) / 2


# ----------------------------------------------------------------------------------------------
# Training


# ----------------------------------------------------------------------------------------------
# The variational bound
