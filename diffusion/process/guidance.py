"""Guidance: a denoiser's prediction, extrapolated away from that of a weaker one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.process.denoiser import for_batch
from diffusion.process.prediction import Denoised, DenoiserLike, get_prediction
from unet.errors import InputError


class Guided:
    """A denoiser with classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6).

        eps = eps_null + scale (eps_conditional - eps_null)

    and x0 likewise; `scale` is 1 + w of the paper. Both come from one batch of twice the size; at
    scale 1 there is nothing to add, and a single evaluation is all it costs.

    With another denoiser instead of the null conditioning it is autoguidance (Karras et al., arXiv
    2406.02507, eq. 3): both get the same conditioning, or none, and the other one is a smaller
    network, or was trained for less time, and errs in the same places.

    Args:
        denoiser: what to guide.
        scale: 1 is no guidance; 0 gives only what is steered away from.
        away: what to steer away from: a denoiser of the same schedule, or conditioning in tensors
            of one row or as many as there are images: {"classes": torch.tensor([config.classes -
            1])} for a network whose last class stands for none; {"context": ..., "mask": ...} of
            the empty or the negative prompt for text.
        rescale: phi, how far the guided output's standard deviation is brought back to that of
            the conditional output, image by image (arXiv 2305.08891, sec. 3.4).
        interval: guide only where lowest < sigma <= highest, sigma being noise per signal
            (arXiv 2404.07724, eq. 5).

    Raises:
        InputError: a scale below 0, a rescale outside [0, 1], an empty interval; denoisers of two
            schedules.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float,
        away: Mapping[str, Tensor] | DenoiserLike,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        if not 0 <= scale < math.inf:
            raise InputError(f"guidance scale {scale} must be a number of 0 or more")
        if not 0 <= rescale <= 1:
            raise InputError(f"guidance rescale {rescale} must be from 0 to 1")
        if not interval[0] < interval[1]:
            raise InputError(f"guidance interval {interval} is empty: give lowest < highest sigma")
        if not isinstance(away, Mapping) and away.schedule != denoiser.schedule:
            raise InputError(
                f"the guide was trained with other noise levels ({away.schedule.said}) than the "
                f"model that it guides ({denoiser.schedule.said}): choose one of the same schedule"
            )
        self.denoiser, self.scale, self.away = denoiser, scale, away
        self.rescale, self.interval = rescale, interval
        self.schedule, self.prediction = denoiser.schedule, denoiser.prediction

    def __call__(
        self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
    ) -> Denoised:
        scale = self._scale(t)
        if self.scale == 1 or (not isinstance(scale, Tensor) and scale == 1):
            return self.denoiser(x, t, to=to, **conditioning)
        (x0, eps, mix), unwanted = self._both(x, t, to, conditioning)
        if isinstance(scale, Tensor):
            scale = scale.to(x0).view(-1, 1, 1, 1)
        guided_x0 = unwanted.x0 + scale * (x0 - unwanted.x0)
        guided_eps = unwanted.eps + scale * (eps - unwanted.eps)
        if self.rescale:
            rates = self.schedule.rates(t, x0)
            rule = get_prediction(self.prediction, self.schedule)
            conditional = rule.target(x0, eps, *rates)
            guided = rule.target(guided_x0, guided_eps, *rates)
            ratio = _std(conditional) / _std(guided)
            # Outside the interval both are the same, and the ratio is 1.
            guided = guided * (self.rescale * ratio + 1 - self.rescale)
            guided_x0, guided_eps = rule.to_x0_eps(guided, x.to(x0), *rates)
        return Denoised(guided_x0, guided_eps, mix)

    def _both(
        self, x: Tensor, t: Tensor | float, to: float | None, conditioning: dict[str, Any]
    ) -> tuple[Denoised, Denoised]:
        """The conditional prediction, and the one to steer away from."""
        if not isinstance(self.away, Mapping):
            unwanted = self.away(x, t, to=to, **conditioning)
            return self.denoiser(x, t, to=to, **conditioning), unwanted
        batch = len(x)
        times = torch.cat([t.expand(batch)] * 2) if isinstance(t, Tensor) else t
        both = doubled(for_batch(conditioning, batch), for_batch(dict(self.away), batch))
        x0, eps, mix = self.denoiser(torch.cat([x, x]), times, to=to, **both)
        first = None if mix is None else mix[:batch]
        return Denoised(x0[:batch], eps[:batch], first), Denoised(x0[batch:], eps[batch:], None)

    def _scale(self, t: Tensor | float) -> Tensor | float:
        """The scale at one timestep, or at each of (B,): 1 outside the interval."""
        lowest, highest = self.interval
        if not isinstance(t, Tensor):  # known on the host, which waits for no GPU
            return self.scale if lowest < self.schedule.level(t).sigma <= highest else 1.0
        signal, noise = self.schedule.levels(t)
        sigma = noise / signal
        return torch.where((lowest < sigma) & (sigma <= highest), self.scale, 1.0)


def _std(y: Tensor) -> Tensor:
    return y.std(dim=(1, 2, 3), keepdim=True)


def doubled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The conditioning of one batch behind that of another.

    Contexts (B, L, D) of different lengths are padded to the longer one, and masked there.

    Raises:
        InputError: one has a kind of conditioning that the other lacks.
    """
    first, second = (_without_none(y) for y in (first, second))
    names = set(first) ^ set(second)
    if names - {"mask"}:
        raise InputError(
            f"only one of conditioning and null conditioning has {', '.join(sorted(names))}: "
            "guidance needs both"
        )
    if "context" in first:
        lengths = {y["context"].shape[1] for y in (first, second)}
        if len(lengths) > 1 or "mask" in {*first, *second}:
            first, second = (_padded(y, max(lengths)) for y in (first, second))
    return {name: torch.cat([first[name], second[name]]) for name in first}


def _without_none(conditioning: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in conditioning.items() if value is not None}


def _padded(conditioning: dict[str, Any], length: int) -> dict[str, Any]:
    """The conditioning with a mask, and with a context of `length` tokens."""
    context = conditioning["context"]
    mask = conditioning.get("mask")
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    more = length - context.shape[1]
    return conditioning | {
        "context": F.pad(context, (0, 0, 0, more)),
        "mask": F.pad(mask, (0, more)),
    }
