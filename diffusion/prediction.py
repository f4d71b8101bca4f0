"""What the network predicts, what it is trained on, and what its predictions are worth in bits.

A network that sees x_t = signal x_0 + sigma eps may predict eps, x_0 or v = signal eps - sigma x_0.
Each gives both others; they differ in how much errors at different noise levels count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from einops import reduce
from torch import Tensor

from diffusion.schedule import CLEAN, NoiseSchedule, NoiseSource, Posterior
from unet.errors import InputError

PredictionName = Literal["eps", "x0", "v"]
Weighting = Literal["plain", "min-snr"]
Variance = Literal["fixed-small", "fixed-large", "learned"]

_BOUND_WEIGHT = 0.001  # lambda in Improved DDPM, eq. 16


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
        model: called as model(x_t, t, **conditioning).
        x0: (B, C, H, W) images in [-1, 1], which are k / 127.5 - 1 where the variance is learned.
        t: (B,) timesteps, whole numbers.
        noise: (B, C, H, W), standard normal.
        weighting: see `loss_weight`.
    """
    rule = get_prediction(prediction, schedule)
    signal, sigma = schedule.rates(t, x0)
    x = signal * x0 + sigma * noise
    output, mix = split_output(model(x, t, **conditioning), x)
    error = (output - rule.target(x0, noise, signal, sigma)) ** 2
    loss = loss_weight(weighting, rule, schedule.snr(t)) * reduce(error, "b ... -> b", "mean")
    if mix is None:
        return loss
    predicted, _ = rule.to_x0_eps(output.detach(), x, signal, sigma)
    q = _clipped(schedule.chain(range(schedule.steps - 1, CLEAN, -1)))
    index = schedule.steps - 1 - t.to("cpu")
    q = Posterior(*(factor[index].to(x).view(signal.shape) for factor in q))
    bits = _transition_bits(q, x, x0, predicted, model_variance("learned", q, mix))
    # Elsewhere eps gives an x0 far off, and no number times 0 would be the gradient.
    mean = torch.where((t == 0).view(signal.shape), predicted, x0)
    bits = torch.where(t == 0, _decoder_bits(x0, mean, model_variance("learned", q, mix)), bits)
    return loss + _BOUND_WEIGHT * schedule.steps * bits


def loss_weight(name: Weighting, rule: Prediction, snr: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight of each image's squared error, of the shape of its SNR.

    "plain" is 1. "min-snr" (arXiv 2303.09556) is min(SNR, gamma) for an error of x0, which is
    divided by SNR for eps and by SNR + 1 for v; a timestep without signal has weight 0.
    """
    if name == "plain":
        return torch.ones_like(snr)
    if name != "min-snr":
        raise InputError(
            f"loss weighting {name!r} is unknown; choose one of {', '.join(get_args(Weighting))}"
        )
    return snr.clamp(max=gamma) / rule.min_snr_divisor(snr)


# ----------------------------------------------------------------------------------------------
# The variational bound


def model_variance(name: Variance, q: Posterior, mix: Tensor | None) -> Any:
    """The variance of p(x_s | x_t): a number, or a tensor of the shape of the mix.

    "fixed-small" is the posterior's, "fixed-large" is beta (both DDPM, sec. 3.2); "learned" is
    exp(mix log(beta) + (1 - mix) log(posterior's)) (Improved DDPM, eq. 15).

    Raises:
        InputError: an unknown name, or "learned" of a network that did not learn it.
    """
    if name == "fixed-small":
        return q.variance
    if name == "fixed-large":
        return q.beta
    if name != "learned":
        raise InputError(
            f"variance {name!r} is unknown; choose one of {', '.join(get_args(Variance))}"
        )
    if mix is None:
        raise InputError(
            "this network has not learned the variance: choose fixed-small or fixed-large"
        )
    return q.beta**mix * q.variance ** (1 - mix)


class Bound(NamedTuple):
    """The variational bound on -log2 p(x_0) in bits per dimension, and its parts: DDPM, eq. 5."""

    total: Tensor  # (B,)
    prior: Tensor  # (B,), L_T
    moves: Tensor  # (n, B), from noise to image; the last is L_0


@torch.no_grad()
def bits_per_dim(
    denoiser: DenoiserLike,
    x0: Tensor,
    timesteps: Sequence[float],
    noise: NoiseSource,
    *,
    variance: Variance = "fixed-large",
    **conditioning: Any,
) -> Bound:
    """How many bits a value of an image costs at most, when coded by the model: DDPM, eq. 5.

    Args:
        x0: (B, C, H, W) images k / 127.5 - 1 for bytes k.
        timesteps: all T of them, descending, for the bound as papers quote it; fewer give the
            (higher) bound of the sampler that takes those, at fewer network evaluations.
        noise: where x_t is drawn from.
        variance: of the moves; in the last one, the fixed ones are as DDPM's code has them.
    """
    q = _clipped(denoiser.schedule.chain(timesteps))
    signal, sigma = denoiser.schedule.level(timesteps[0])
    per_value = 0.5 * ((signal * x0) ** 2 + sigma**2 - 1 - 2 * math.log(sigma))  # KL to N(0, I)
    prior = reduce(per_value, "b ... -> b", "mean") / math.log(2)
    moves = []
    for i, t in enumerate(timesteps):
        x = denoiser.schedule.q_sample(x0, t, noise.like(x0))
        predicted, _, mix = denoiser(x, t, **conditioning)
        q_i = Posterior(*(factor[i].item() for factor in q))
        if i < len(timesteps) - 1:
            spread = torch.as_tensor(model_variance(variance, q_i, mix)).to(x)
            moves.append(_transition_bits(q_i, x, x0, predicted, spread))
        else:
            name: Variance = "learned" if variance == "learned" else "fixed-small"
            spread = torch.as_tensor(model_variance(name, q_i, mix)).to(x)
            moves.append(_decoder_bits(x0, predicted, spread))
    stacked = torch.stack(moves)
    return Bound(prior + stacked.sum(0), prior, stacked)


def _clipped(q: Posterior) -> Posterior:
    """The posterior's variance of the last move, 0, replaced by that of the move before it."""
    spare = q.variance[-2:-1] if len(q.variance) > 1 else q.beta
    return q._replace(variance=torch.cat([q.variance[:-1], spare]))


def _transition_bits(
    q: Posterior, x: Tensor, x0: Tensor, predicted: Tensor, variance: Tensor
) -> Tensor:
    """KL of q(x_s | x_t, x_0) to N(q's mean for the predicted x0, variance), bits/dim (B,)."""
    q_variance = torch.as_tensor(q.variance).to(x)
    difference = q.x0_factor * (x0 - predicted)
    ratio = q_variance / variance
    nats = 0.5 * (ratio - 1 - ratio.log() + difference**2 / variance)
    return reduce(nats.expand_as(x), "b ... -> b", "mean") / math.log(2)


def _decoder_bits(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log2 of the Gaussian's mass in the bin of each byte, bits/dim (B,): DDPM, eq. 13."""
    std = variance**0.5
    upper = torch.where(x0 > 0.999, math.inf, (x0 - mean + 1 / 255) / std)
    lower = torch.where(x0 < -0.999, -math.inf, (x0 - mean - 1 / 255) / std)
    # By symmetry in the lower tail, where differences of the distribution function are exact.
    flip = lower + upper > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    nats = -(log_upper + torch.log1p(-(log_lower - log_upper).exp()))
    return reduce(nats, "b ... -> b", "mean") / math.log(2)
