"""Random choices of a training step: timesteps, ends of jumps, and which image gets which noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion.process.schedule import CLEAN, NoiseSchedule

_TO_IMAGE, _NO_JUMP = 0.25, 0.5  # shares of the jumps to the image, and of those of length 0
TEACHER_SHARE = 1 / 8  # of a jump's way; the rest is the network's own jump from there


@dataclass(frozen=True)
class TrainingLevels:
    """The timesteps that are trained on, from numbers that are uniform in [0, 1).

    Args:
        shift: above 1, noisy levels are likelier (arXiv 2403.03206, eq. 23): u becomes
            shift u / (1 + (shift - 1) u), or sigma, where it is drawn, shift times as large.
        log_sigma: mean and standard deviation of log(sigma), which then is normal, as in EDM (arXiv
            2206.00364, table 1); as sigma = s / (1 - s) on the straight path, that is the
            logit-normal s of arXiv 2403.03206, sec. 3.1. None: all timesteps are equally likely.
    """

    schedule: NoiseSchedule
    shift: float = 1.0
    log_sigma: tuple[float, float] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """Whole timesteps (B,) of u (B,) on the CPU: the quantiles of their distribution."""
        steps = self.schedule.steps
        if self.log_sigma is None:
            u = self.shift * u / (1 + (self.shift - 1) * u)
            return (u * steps).long().clamp(max=steps - 1)
        mean, std = self.log_sigma
        log_sigma = mean + math.log(self.shift) + std * torch.special.ndtri(u.double())
        t = self.schedule.timesteps_at(log_sigma.numpy())
        return torch.from_numpy(t).round().long()


def jumps(schedule: NoiseSchedule, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Jumps down from timesteps t (B,): a timestep a little on the way, and the one at the end.

    Half of the jumps have length 0, so that the network goes on learning single noise levels. A
    quarter leads to the image, and a quarter to levels in between, uniform in the angle whose sine
    and cosine are the rates of noise and signal.

    Args:
        u: (B,) uniform in [0, 1), which chooses the kind of jump and its end.

    Returns:
        float32 (B,) each. Both are t where the jump has length 0.
    """
    level = schedule.levels(t)
    start = torch.atan2(level.noise, level.signal)
    share = ((u.double() - _NO_JUMP - _TO_IMAGE) / (1 - _NO_JUMP - _TO_IMAGE)).clamp(min=0)
    end = torch.where(u < _NO_JUMP, start, share * start)
    near, to = (
        _timesteps(schedule, angle) for angle in (start + TEACHER_SHARE * (end - start), end)
    )
    lowest = math.atan(schedule.level(0).sigma)
    to = torch.where(end < lowest, float(CLEAN), to)
    return torch.where(u < _NO_JUMP, t, near).float(), torch.where(u < _NO_JUMP, t, to).float()


def _timesteps(schedule: NoiseSchedule, angle: Tensor) -> Tensor:
    with np.errstate(divide="ignore"):  # of no noise
        return torch.from_numpy(schedule.timesteps_at(np.log(np.tan(angle.numpy()))))


def coupled(noise: Tensor, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Pairs noise with images by minibatch optimal transport (arXiv 2302.00482, sec. 3.2.3).

    Of all one-to-one pairings it takes the one of the least sum of squared distances.

    Args:
        noise, images: (B, C, H, W), on the CPU.
        labels: (B,) classes. Noise is exchanged within a class only: sampling draws it whatever the
            class, so the noise that each class is trained on must stay standard normal.

    Returns:
        The noise (B, C, H, W), reordered so that noise i belongs to image i.
    """
    groups = torch.zeros(len(images)) if labels is None else labels
    order = np.arange(len(images))
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        cost = torch.cdist(images[rows].flatten(1).double(), noise[rows].flatten(1).double()) ** 2
        order[rows.numpy()] = rows.numpy()[linear_sum_assignment(cost.numpy())[1]]
    return noise[torch.from_numpy(order)]
