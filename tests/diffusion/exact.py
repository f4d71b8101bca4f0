"""Denoisers without a network: an exact one, and one with every quirk that a network may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.process.denoiser import Denoiser
from diffusion.process.prediction import PREDICTIONS, Denoised, PredictionName
from diffusion.process.schedule import NoiseSchedule


@dataclass(frozen=True)
class GaussianDenoiser:
    """The exact denoiser of pixels that are all N(mean, std^2), or N(mean + classes, std^2)."""

    schedule: NoiseSchedule
    mean: float = 0.3
    std: float = 0.5
    prediction: PredictionName = "x0"

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
        signal, sigma = self.schedule.rates(t, x)
        mean = self.mean + conditioning.get("classes", torch.zeros(1)).to(x).view(-1, 1, 1, 1)
        gain = signal * self.std**2 / (signal**2 * self.std**2 + sigma**2)
        x0 = mean + gain * (x - signal * mean)
        return Denoised(x0, (x - signal * x0) / sigma)


@dataclass(frozen=True)
class Wavy:
    """A "network": about a Gaussian's denoiser, bent by x and by t, in any kind of prediction."""

    schedule: NoiseSchedule
    prediction: PredictionName

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        at = t.clamp(0, self.schedule.steps - 1)  # edm's argument is no timestep
        x0, eps, _ = GaussianDenoiser(self.schedule)(x, at)
        signal, sigma = self.schedule.rates(at, x)
        output = PREDICTIONS[self.prediction].target(x0, eps, signal, sigma)
        for value in conditioning.values():
            output = output + 0.3 * value.to(x).view(-1, 1, 1, 1)
        return output + 0.1 * torch.sin(3 * x + t.to(x).view(-1, 1, 1, 1) / 150)


def wavy_denoiser(schedule: NoiseSchedule, prediction: PredictionName) -> Denoiser:
    return Denoiser(Wavy(schedule, prediction), schedule, prediction)
