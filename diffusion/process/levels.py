"""Which noise levels are trained on, where jumps lead, and which noise goes with which image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion.process.schedule import CLEAN, NoiseSchedule

_AT_ONCE, _NOWHERE = 0.25, 0.5  # shares of jumps to the image, and of those that lead nowhere
FIRST = 1 / 8  # the part of a jump that the teacher leads


@dataclass(frozen=True)
class TrainingLevels:
    """The timesteps that are trained on, from numbers that are uniform in [0, 1).

    Args:
        shift: above 1, noisy levels are likelier (arXiv 2403.03206, eq. 23): u becomes
            shift u / (1 + (shift - 1) u), or sigma, where it is drawn, shift times as large.
        log_sigma: mean and standard deviation of log(sigma), which then is normal, as in EDM (arXiv
            2206.00364, table 1); as sigma = s / (1 - s) on the straight path, that is the
            logit-normal s of arXiv 2403.03206, sec. 3.1. None: all timesteps are as likely.
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

    Half of them stay where they are, so that the network goes on to know every single level; half
    of the others lead to the image, and the rest anywhere in between, by the angle whose sine and
    cosine are the rates of noise and signal.

    Args:
        u: (B,) uniform in [0, 1): which jump it is.
    """
    level = schedule.levels(t)
    start = torch.atan2(level.noise, level.signal)
    share = ((u.double() - _NOWHERE - _AT_ONCE) / (1 - _NOWHERE - _AT_ONCE)).clamp(min=0)
    end = torch.where(u < _NOWHERE, start, share * start)
    near, to = (_timesteps(schedule, angle) for angle in (start + FIRST * (end - start), end))
    lowest = math.atan(schedule.level(0).sigma)
    to = torch.where(end < lowest, float(CLEAN), to)
    return torch.where(u < _NOWHERE, t, near).float(), torch.where(u < _NOWHERE, t, to).float()


def _timesteps(schedule: NoiseSchedule, angle: Tensor) -> Tensor:
    with np.errstate(divide="ignore"):  # of no noise
        return torch.from_numpy(schedule.timesteps_at(np.log(np.tan(angle.numpy()))))


def coupled(noise: Tensor, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """The noise (B, C, H, W) in the order in which it is nearest to the images, of that shape.

    Minibatch optimal transport (arXiv 2302.00482, sec. 3.2.3): of all ways to give each image one
    of the noises, that of the least sum of squared distances. The images stay where they are, and
    with them all that is known of them.

    Args:
        labels: (B,) classes. Noise is exchanged among images of one class only: sampling draws it
            whatever the class, so what a class is trained on has to be as normal as all of it.
    """
    groups = torch.zeros(len(images)) if labels is None else labels
    order = np.arange(len(images))
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        cost = torch.cdist(images[rows].flatten(1).double(), noise[rows].flatten(1).double()) ** 2
        order[rows.numpy()] = rows.numpy()[linear_sum_assignment(cost.numpy())[1]]
    return noise[torch.from_numpy(order)]
