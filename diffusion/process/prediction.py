"""What the network is given, what it predicts, and how image and noise follow from it.

A network that sees x_t = signal x_0 + sigma eps may predict eps, x_0 or v = signal eps - sigma x_0.
Each gives both others; they differ in how much errors at different noise levels count. Flow
matching and EDM show the network the same x in other units and have outputs of their own: at equal
noise per signal, sigma / signal, all of them are changes of variables of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.process.schedule import NoiseSchedule
from unet.errors import InputError

PredictionName = Literal["eps", "x0", "v", "flow", "edm"]

SIGMA_DATA = 0.5  # EDM, table 1: the standard deviation of images in [-1, 1]


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

    def __call__(
        self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
    ) -> Denoised:
        """x (B, C, H, W) at timesteps t (B,), or at one for all.

        Args:
            to: a timestep below t, to which DDIM's step with what is returned leads, of a network
                that has learnt such jumps; None: x0 is what is expected of the image.
        """
        ...


def _unchanged(value: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Prediction:
    """The formulas of one kind of prediction; `signal` and `sigma` are the rates at t.

    Images are (B, C, H, W), and rates (B, 1, 1, 1) or (1, 1, 1, 1), if nothing else is said.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x0, eps, signal, sigma) to the output that the network is trained for."""

    to_x0_eps: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(output, x_t, signal, sigma) to (x0, eps)."""

    min_snr_divisor: Callable[[Tensor], Tensor]
    """SNR to the factor between the squared error of x0 and that of the output."""

    scaled_input: Callable[[Tensor, Tensor, Tensor], Tensor] = _unchanged
    """(x_t, signal, sigma) to the network's input image: c_in x in EDM."""

    noise_input: Callable[[Tensor, Tensor, Tensor], Tensor] = _unchanged
    """(t, signal, sigma), all (B,), to the network's timestep argument: c_noise in EDM."""

    def inputs(self, x: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's arguments (B, C, H, W) and (B,) for x (B, C, H, W) at timesteps t (B,)."""
        rates = (rate.flatten().expand(len(t)) for rate in (signal, sigma))
        return self.scaled_input(x, signal, sigma), self.noise_input(t, *rates)


def _deviation(signal: Tensor, sigma: Tensor) -> Tensor:
    """The standard deviation of x, where that of the images is SIGMA_DATA."""
    return torch.hypot(SIGMA_DATA * signal, sigma)


def _edm_x0_eps(output: Tensor, x: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = c_skip x + c_out F, and the eps with which it makes up x."""
    deviation = _deviation(signal, sigma)
    unit = x / deviation**2  # E[x0 | x] and E[eps | x] of Gaussian images are multiples of it
    return (
        signal * SIGMA_DATA**2 * unit + SIGMA_DATA * sigma / deviation * output,
        sigma * unit - SIGMA_DATA * signal / deviation * output,
    )


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
    # Flow matching (arXiv 2210.02747, eq. 22 and 23 with their time reversed): the velocity of the
    # straight path (1 - s) x0 + s eps, which is x / (signal + sigma) with s its share of noise.
    "flow": Prediction(
        target=lambda x0, eps, signal, sigma: eps - x0,
        to_x0_eps=lambda output, x, signal, sigma: (
            (x - sigma * output) / (signal + sigma),
            (x + signal * output) / (signal + sigma),
        ),
        min_snr_divisor=lambda snr: (1 + snr.sqrt()) ** 2,
        scaled_input=lambda x, signal, sigma: x / (signal + sigma),
    ),
    # EDM (arXiv 2206.00364), eq. 7 and table 1, whose sigma is sigma / signal here, and whose image
    # in noise is x / signal; multiplied out, as no signal may be left.
    "edm": Prediction(
        target=lambda x0, eps, signal, sigma: (
            (sigma * x0 - signal * SIGMA_DATA**2 * eps) / (SIGMA_DATA * _deviation(signal, sigma))
        ),
        to_x0_eps=_edm_x0_eps,
        min_snr_divisor=lambda snr: snr + SIGMA_DATA**-2,
        scaled_input=lambda x, signal, sigma: x / _deviation(signal, sigma),  # c_in
        noise_input=lambda t, signal, sigma: (sigma / signal).log() / 4,  # c_noise
    ),
}


def get_prediction(name: PredictionName, schedule: NoiseSchedule) -> Prediction:
    """The formulas of a kind of prediction under a schedule.

    Raises:
        InputError: an unknown name; eps where the last timestep has no signal: there the network
            sees nothing but the noise, and x0 does not follow (arXiv 2305.08891, sec. 3.1); edm,
            which tells it the logarithm of noise per signal.
    """
    if name not in tuple(PREDICTIONS):  # a damaged file may give what cannot be looked up
        raise InputError(f"prediction {name!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    if name in ("eps", "edm") and schedule.ends_in_noise:
        where = "flow" if schedule.kind == "flow" else "zero_snr"
        raise InputError(
            f"{name}-prediction is undefined at a timestep without signal: choose v- or "
            f"x0-prediction with {where}, or a schedule without it"
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
