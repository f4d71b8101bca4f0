"""Which noise levels are trained on, and which noise goes with which image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion.process.schedule import NoiseSchedule


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
