"""The variance of the reverse moves, and the variational bound on the likelihood (DDPM, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import reduce
from torch import Tensor

from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import DenoiserLike
from diffusion.process.schedule import Posterior
from unet.errors import InputError

Variance = Literal["fixed-small", "fixed-large", "learned"]


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
    q = clipped(denoiser.schedule.chain(timesteps))
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
            moves.append(transition_bits(q_i, x, x0, predicted, spread))
        else:
            name: Variance = "learned" if variance == "learned" else "fixed-small"
            spread = torch.as_tensor(model_variance(name, q_i, mix)).to(x)
            moves.append(decoder_bits(x0, predicted, spread))
    stacked = torch.stack(moves)
    return Bound(prior + stacked.sum(0), prior, stacked)


def clipped(q: Posterior) -> Posterior:
    """The posterior's variance of the last move, 0, replaced by that of the move before it."""
    spare = q.variance[-2:-1] if len(q.variance) > 1 else q.beta
    return q._replace(variance=torch.cat([q.variance[:-1], spare]))


def transition_bits(
    q: Posterior, x: Tensor, x0: Tensor, predicted: Tensor, variance: Tensor
) -> Tensor:
    """KL of q(x_s | x_t, x_0) to N(q's mean for the predicted x0, variance), bits/dim (B,)."""
    q_variance = torch.as_tensor(q.variance).to(x)
    difference = q.x0_factor * (x0 - predicted)
    ratio = q_variance / variance
    nats = 0.5 * (ratio - 1 - ratio.log() + difference**2 / variance)
    return reduce(nats.expand_as(x), "b ... -> b", "mean") / math.log(2)


def decoder_bits(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
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
