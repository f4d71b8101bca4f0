"""`Denoiser`: network, schedule and kind of prediction as one function, x_t to x0 and eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusion.process.prediction import (
    Denoised,
    DenoiserLike,
    PredictionName,
    get_prediction,
    split_output,
)
from diffusion.process.schedule import CLEAN, NoiseSchedule
from unet.errors import InputError
from unet.words import counted

Clip = Literal["static", "dynamic"]

_PERCENTILE = 0.995  # of |x0|, for dynamic thresholding


@dataclass(frozen=True)
class Denoiser:
    """What samplers see of a network.

    Called as denoiser(x, t, **conditioning) with x (B, C, H, W), t (B,) or one timestep for all,
    and the conditioning that the network takes: for `DiffusionUNet`, `classes`, `context`, `mask`.
    Tensors of conditioning with a single row serve all images. A network of jumps is also given
    `to`, the timesteps that these lead to, which are those of DDIM's step with what is returned.
    The network may compute in half precision; everything around it is float32 (or float64, if x
    is).

    Raises:
        InputError: eps- or edm-prediction under a schedule that ends without signal.
    """

    model: Callable[..., Tensor]
    """Called as model(x, t, **conditioning) with t (B,); see `split_output` for what it returns."""

    schedule: NoiseSchedule
    prediction: PredictionName

    def __post_init__(self) -> None:
        get_prediction(self.prediction, self.schedule)

    def __call__(
        self, x: Tensor, t: Tensor | float, to: Tensor | float | None = None, **conditioning: Any
    ) -> Denoised:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        given = _for_each(t, x)
        rule = get_prediction(self.prediction, self.schedule)
        rates = self.schedule.rates(t, x)
        if to is not None:
            conditioning["jump"] = given - _for_each(to, x)
        output = self.model(*rule.inputs(x, given, *rates), **for_batch(conditioning, len(x)))
        output, mix = split_output(output, x)
        x0, eps = rule.to_x0_eps(output, x, *rates)
        return Denoised(x0, eps, mix)


def _for_each(t: Tensor | float, x: Tensor) -> Tensor:
    """A timestep for each image (B,); filled, not copied: a GPU would wait for the copy."""
    if isinstance(t, Tensor):
        return t.expand(len(x))
    return torch.full((len(x),), t, device=x.device)


def for_batch(conditioning: dict[str, Any], batch: int) -> dict[str, Any]:
    """The conditioning with its one-row tensors repeated for a batch.

    Raises:
        InputError: no tensor, or one of neither one row nor as many as there are images.
    """
    rows: dict[str, Any] = {}
    for name, value in conditioning.items():
        if value is None:
            rows[name] = None
            continue
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise InputError(
                f"{name} is {value!r:.80}: give a tensor of one row per image, or one for all"
            )
        if len(value) not in (1, batch):
            raise InputError(
                f"{name} has {counted(len(value), 'row')} for {counted(batch, 'image')}: give one "
                "row per image, or one for all"
            )
        rows[name] = value.expand(batch, *value.shape[1:])
    return rows


class Clipped:
    """A denoiser whose x0 stays within [-1, 1]; for pixels, not for latents.

    Put it around guidance, not inside: `Clipped(Guided(...), "dynamic")`, as in Imagen. The eps
    follows the clipped x0, as in the code of DDPM and of Improved DDPM.

    Args:
        how: "static" clamps x0 (DDPM). "dynamic" divides it by the 99.5th percentile of its
            absolute values, image by image, where that is above 1, and clamps it (Imagen, arXiv
            2205.11487, sec. 2.3).
    """

    def __init__(self, denoiser: DenoiserLike, how: Clip = "static") -> None:
        if how not in get_args(Clip):
            raise InputError(f"clip {how!r} is unknown; choose one of {', '.join(get_args(Clip))}")
        self.denoiser, self.how = denoiser, how
        self.schedule, self.prediction = denoiser.schedule, denoiser.prediction

    def __call__(
        self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
    ) -> Denoised:
        found = self.denoiser(x, t, to=to, **conditioning)
        if to is not None and to != CLEAN:  # x0 is the end of a line then, and no image yet
            return found
        x0, eps, mix = found
        scale = torch.ones(1, 1, 1, 1).to(x0)
        if self.how == "dynamic":
            scale = _percentile(x0.abs().flatten(1)).clamp(min=1).view(-1, 1, 1, 1)
        clipped = (x0 / scale).clamp(-1, 1)
        signal, sigma = self.schedule.rates(t, x0)
        return Denoised(clipped, eps + signal / sigma * (x0 - clipped), mix)


def _percentile(values: Tensor) -> Tensor:
    """That of each row, (B, N) to (B,), as `torch.quantile`, which takes no 2^24 values or more."""
    n = values.shape[1]
    place = _PERCENTILE * (n - 1)
    largest = values.topk(n - int(place), dim=1).values  # the one below that place is the last
    return torch.lerp(largest[:, -1], largest[:, -2:][:, 0], place % 1)
