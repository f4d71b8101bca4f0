"""The training losses: of noise prediction (DDPM, alg. 1), and of jumps (MeanFlow)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from einops import reduce
from torch import Tensor

from diffusion.process.denoiser import Denoiser
from diffusion.process.levels import TEACHER_SHARE
from diffusion.process.likelihood import clipped, decoder_bits, model_variance, transition_bits
from diffusion.process.prediction import (
    DenoiserLike,
    Prediction,
    PredictionName,
    get_prediction,
    split_output,
)
from diffusion.process.schedule import CLEAN, NoiseSchedule, Posterior
from unet.errors import InputError

Weighting = Literal["plain", "min-snr"]

_BOUND_WEIGHT = 0.001  # lambda in Improved DDPM, eq. 16
_STEADY = 0.1  # c in MeanFlow, eq. 22, whose p is 1


def diffusion_loss(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    prediction: PredictionName,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    weighting: Weighting = "plain",
    **conditioning: Any,
) -> Tensor:
    """The training loss of each image, (B,): DDPM, alg. 1.

    The mean squared error of the prediction; for a network that learns the variance, the hybrid
    loss L_simple + 0.001 L_vlb (Improved DDPM, eq. 16), of which L_vlb teaches the variance alone.

    Args:
        model: called as model(x_t, t, **conditioning), with both as the prediction has it.
        x0: (B, C, H, W) images in [-1, 1], which are k / 127.5 - 1 where the variance is learned.
        t: (B,) timesteps, whole numbers.
        noise: (B, C, H, W), standard normal.
        weighting: see `loss_weight`.
    """
    _check_shapes(x0, noise, t)
    rule = get_prediction(prediction, schedule)
    signal, sigma = schedule.rates(t, x0)
    x = signal * x0 + sigma * noise
    output, mix = split_output(model(*rule.inputs(x, t, signal, sigma), **conditioning), x)
    error = (output - rule.target(x0, noise, signal, sigma)) ** 2
    loss = loss_weight(weighting, rule, schedule.snr(t)) * reduce(error, "b ... -> b", "mean")
    if mix is None:
        return loss
    predicted, _ = rule.to_x0_eps(output.detach(), x, signal, sigma)
    q = Posterior(*(factor[t].view(signal.shape) for factor in _moves(schedule, x.device, x.dtype)))
    bits = transition_bits(q, x, x0, predicted, model_variance("learned", q, mix))
    # Elsewhere eps gives an x0 far off, and no number times 0 would be the gradient.
    mean = torch.where((t == 0).view(signal.shape), predicted, x0)
    bits = torch.where(t == 0, decoder_bits(x0, mean, model_variance("learned", q, mix)), bits)
    return loss + _BOUND_WEIGHT * schedule.steps * bits


def jump_loss(
    model: Callable[..., Tensor],
    teacher: DenoiserLike,
    x0: Tensor,
    t: Tensor,
    near: Tensor,
    to: Tensor,
    noise: Tensor,
    **conditioning: Any,
) -> Tensor:
    """The loss of each image, (B,), of a network that learns to jump along a teacher's
    trajectories.

    MeanFlow (arXiv 2505.13447) by a finite difference: a jump from t must end where the teacher's
    step to `near` and the network's own jump from there end. The straight line to that end has an
    x0 and an eps, and so a target in any kind of prediction; on the straight path of flow matching
    it is the average velocity of eq. 3. Where `to` is t, it is what the teacher says of t.

    Args:
        model: called as model(x_t, t, jump=..., **conditioning), jump being t - to.
        teacher: of the model's schedule and kind of prediction; guided, it teaches guided jumps.
        x0: (B, C, H, W) images in [-1, 1].
        t, near, to: (B,) timesteps, as `levels.jumps` gives them.
        noise: (B, C, H, W), standard normal.
    """
    _check_shapes(x0, noise, t, near, to)
    schedule = teacher.schedule
    rule = get_prediction(teacher.prediction, schedule)
    signal, sigma = schedule.rates(t, x0)
    x = signal * x0 + sigma * noise
    with torch.no_grad():
        clean, eps, _ = teacher(x, t, **conditioning)
        own = Denoiser(model, schedule, teacher.prediction)
        at = schedule.rates(near, x0)
        jumped = own(at[0] * clean + at[1] * eps, near, to=to, **conditioning)
        end_signal, end_sigma = schedule.rates(to, x0)
        end = end_signal * jumped.x0 + end_sigma * jumped.eps
        turn = signal * end_sigma - sigma * end_signal  # minus the sine of the angle between them
        jumps = (to < t).view(turn.shape)
        clean = torch.where(jumps, (end_sigma * x - sigma * end) / turn, clean)
        eps = torch.where(jumps, (signal * end - end_signal * x) / turn, eps)
        target = rule.target(clean, eps, signal, sigma)
    output, _ = split_output(
        model(*rule.inputs(x, t, signal, sigma), jump=t - to, **conditioning), x
    )
    error = reduce((output - target) ** 2, "b ... -> b", "mean")
    # A jump's target differs from the output by TEACHER_SHARE times what it does in eq. 11.
    error = error / torch.where(jumps.flatten(), TEACHER_SHARE, 1.0) ** 2
    return error / (error.detach() + _STEADY)  # eq. 22


def _check_shapes(x0: Tensor, noise: Tensor, *times: Tensor) -> None:
    """Lest they be broadcast: one noise for all images would be learnt as it is."""
    found = [tuple(getattr(t, "shape", ())) for t in times]
    if noise.shape != x0.shape or any(shape != (len(x0),) for shape in found):
        raise InputError(
            f"images {tuple(x0.shape)}, noise {tuple(noise.shape)} and timesteps "
            f"{', '.join(map(str, found))} do not fit together: give noise of the images' shape "
            f"and timesteps ({len(x0)},)"
        )


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _moves(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> Posterior:
    """The posteriors of the moves from every timestep to the one before it, (T,) each."""
    q = clipped(schedule.chain(range(schedule.steps - 1, CLEAN, -1)))
    return Posterior(*(factor.flip(0).to(device, dtype) for factor in q))


def loss_weight(name: Weighting, rule: Prediction, snr: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight of each image's squared error, of the shape of its SNR.

    "plain" is 1. "min-snr" (arXiv 2303.09556) is min(SNR, gamma) for an error of x0, which is
    divided by SNR for eps and by SNR + 1 for v; a timestep without signal has weight 0. "plain" is
    for edm the weight of its paper, 1 / c_out^2 for an error of x0.
    """
    if name == "plain":
        return torch.ones_like(snr)
    if name != "min-snr":
        raise InputError(
            f"loss weighting {name!r} is unknown; choose one of {', '.join(get_args(Weighting))}"
        )
    return snr.clamp(max=gamma) / rule.min_snr_divisor(snr)
