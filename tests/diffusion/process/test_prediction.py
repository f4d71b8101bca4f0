from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Denoiser
from diffusion.process.likelihood import bits_per_dim, model_variance
from diffusion.process.loss import diffusion_loss, loss_weight
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import (
    PREDICTIONS,
    Denoised,
    PredictionName,
    get_prediction,
    split_output,
)
from diffusion.process.schedule import NoiseSchedule, posterior
from tests.diffusion.exact import GaussianDenoiser, Wavy, wavy_denoiser
from unet.errors import InputError

S = NoiseSchedule(kind="cosine", steps=50)
NAMES: list[PredictionName] = list(PREDICTIONS)
UNKNOWN: Any = "other"
every_prediction = pytest.mark.parametrize("name", NAMES)


def pictures(n: int = 4, size: int = 6) -> Tensor:
    """Images of bytes, black and white among them, scaled to [-1, 1]."""
    g = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (n, 2, size, size), generator=g)
    values[:, :, 0], values[:, :, 1] = 0, 255
    return values.float() / 127.5 - 1


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x0 = pictures()
    return x0, torch.tensor([0, 1, 20, 49]), torch.randn(x0.shape, generator=g)


# ----------------------------------------------------------------------------------------------
# Parameterisations


@every_prediction
def test_the_target_leads_back_to_image_and_noise(name: PredictionName) -> None:
    x0, t, noise = (y.double() if y.is_floating_point() else y for y in batch())
    rule = get_prediction(name, S)
    signal, sigma = S.rates(t, x0)
    x = S.q_sample(x0, t, noise)
    again, eps = rule.to_x0_eps(rule.target(x0, noise, signal, sigma), x, signal, sigma)
    assert_close(again, x0)
    assert_close(eps, noise)


@every_prediction
def test_any_output_splits_x_into_image_and_noise(name: PredictionName) -> None:
    x, t, output = batch()
    signal, sigma = S.rates(t, x)
    x0, eps = PREDICTIONS[name].to_x0_eps(output, x, signal, sigma)
    assert_close(signal * x0 + sigma * eps, x, atol=1e-5, rtol=1e-5)
    assert_close(PREDICTIONS[name].target(x0, eps, signal, sigma), output, atol=1e-4, rtol=1e-4)


def test_v_is_the_velocity_along_the_circle_of_signal_and_noise() -> None:
    """Salimans & Ho, appendix D: v = d x_phi / d phi for x_phi = cos(phi) x0 + sin(phi) eps."""
    x0, eps, phi, d = torch.tensor([0.3]), torch.tensor([-1.2]), torch.tensor(0.7), 1e-3
    x = [torch.cos(phi + s) * x0 + torch.sin(phi + s) * eps for s in (-d, d)]
    velocity = (x[1] - x[0]) / (2 * d)
    assert_close(
        PREDICTIONS["v"].target(x0, eps, phi.cos(), phi.sin()), velocity, atol=1e-3, rtol=0
    )


def test_without_signal_only_eps_is_undefined() -> None:
    zero = NoiseSchedule(zero_snr=True)
    assert get_prediction("v", zero) is PREDICTIONS["v"]
    assert get_prediction("x0", zero) is PREDICTIONS["x0"]
    with pytest.raises(InputError, match=r"eps-prediction is undefined.*choose v"):
        get_prediction("eps", zero)
    with pytest.raises(InputError, match="'other' is unknown; choose one of eps, x0, v"):
        get_prediction(UNKNOWN, S)


# ----------------------------------------------------------------------------------------------
# Losses


def network(prediction: PredictionName) -> tuple[list[Tensor], Callable[..., Tensor]]:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        seen.append(x)
        return Wavy(S, prediction)(x, t, **conditioning)

    return seen, model


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_the_loss_is_the_mean_squared_error_of_each_image(name: PredictionName) -> None:
    x0, t, noise = batch()
    seen, model = network(name)
    loss = diffusion_loss(model, S, name, x0, t, noise, classes=torch.arange(4))
    x = S.q_sample(x0, t, noise)
    assert_close(seen[0], x)
    a = S.signal[t].view(4, 1, 1, 1).float()
    b = S.noise[t].view(4, 1, 1, 1).float()
    target = {"eps": noise, "x0": x0, "v": a * noise - b * x0}[name]
    output = Wavy(S, name)(x, t, classes=torch.arange(4))
    assert_close(loss, ((output - target) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("t", "noises"), [(torch.tensor(5), 4), (5, 4), (torch.tensor([5]), 4), (torch.arange(4), 1)]
)
def test_a_loss_broadcasts_neither_noise_nor_timesteps(t: Any, noises: int) -> None:
    x0, _, noise = batch()
    with pytest.raises(InputError, match=r"do not fit together: .* timesteps \(4,\)"):
        diffusion_loss(Wavy(S, "eps"), S, "eps", x0, t, noise[:noises])


@every_prediction
def test_a_perfect_network_has_no_loss(name: PredictionName) -> None:
    x0, t, noise = batch()
    target = PREDICTIONS[name].target(x0, noise, *S.rates(t, x0))
    loss = diffusion_loss(lambda x, t: target, S, name, x0, t, noise, weighting="min-snr")
    assert_close(loss, torch.zeros(4))


def test_min_snr_weighs_an_error_of_x0_alike_in_every_prediction() -> None:
    """arXiv 2303.09556: min(SNR, 5) times the squared error of x0, whatever is predicted."""
    x0, t, noise = (y.double() if y.is_floating_point() else y for y in batch())
    x, snr = S.q_sample(x0, t, noise), S.snr(t)
    guess = 0.8 * x0
    signal, sigma = S.rates(t, x0)
    eps = (x - signal * guess) / sigma
    for name in NAMES:
        output = PREDICTIONS[name].target(guess, eps, signal, sigma)
        model = partial(lambda output, x, t: output, output)
        loss = diffusion_loss(model, S, name, x0, t, noise, weighting="min-snr")
        error = ((guess - x0) ** 2).mean((1, 2, 3))
        assert_close(loss, snr.clamp(max=5) * error, rtol=1e-5, atol=0)


def test_loss_weights_are_those_of_the_paper() -> None:
    snr = torch.tensor([0.0, 0.5, 5.0, 100.0])
    weights = {name: loss_weight("min-snr", PREDICTIONS[name], snr) for name in NAMES}
    assert_close(weights["x0"], torch.tensor([0, 0.5, 5, 5]))
    assert_close(weights["eps"][1:], torch.tensor([1, 1, 0.05]))
    assert_close(weights["v"], torch.tensor([0, 0.5 / 1.5, 5 / 6, 5 / 101]))
    assert_close(loss_weight("plain", PREDICTIONS["v"], snr), torch.ones(4))
    with pytest.raises(InputError, match="'other' is unknown"):
        loss_weight(UNKNOWN, PREDICTIONS["v"], snr)


@every_prediction
def test_gradients_reach_the_network_in_half_precision(name: PredictionName) -> None:
    x0, t, noise = batch()
    weight = torch.ones((), requires_grad=True)
    loss = diffusion_loss(
        lambda x, t: (weight * x).bfloat16(), S, name, x0, t, noise, weighting="min-snr"
    )
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


# ----------------------------------------------------------------------------------------------
# The variational bound, checked with numpy and scipy


def kl_of_normals(mean1: Any, var1: Any, mean2: Any, var2: Any) -> Any:
    return 0.5 * (np.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def decoder_nats(x0: np.ndarray, mean: np.ndarray, std: Any) -> np.ndarray:
    """DDPM, eq. 13."""
    upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
    lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
    return -np.log(norm.cdf(upper, mean, std) - norm.cdf(lower, mean, std))


def move_bits(
    schedule: NoiseSchedule, t: int, to: int | None, x: Any, x0: Any, mean_x0: Any, log_var: Any
) -> Any:
    """One term of the bound, from DDPM's own alphas and betas."""
    alpha_bar = schedule.alpha_bar.numpy()
    ab_t, ab_s = alpha_bar[t], 1.0 if to is None else alpha_bar[to]
    if to is None:
        nats = decoder_nats(x0, mean_x0, np.exp(0.5 * log_var))
    else:
        beta = 1 - ab_t / ab_s
        of = lambda y: (  # noqa: E731
            np.sqrt(ab_s) * beta / (1 - ab_t) * y + np.sqrt(1 - beta) * (1 - ab_s) / (1 - ab_t) * x
        )
        true_var = beta * (1 - ab_s) / (1 - ab_t)
        nats = kl_of_normals(of(x0), true_var, of(mean_x0), np.exp(log_var))
    return nats.mean((1, 2, 3)) / np.log(2)


def small_and_large(
    schedule: NoiseSchedule, t: int, to: int | None, floor: float
) -> tuple[float, float]:
    alpha_bar = schedule.alpha_bar.numpy()
    ab_t, ab_s = alpha_bar[t], 1.0 if to is None else alpha_bar[to]
    beta = 1 - ab_t / ab_s
    return (floor if to is None else beta * (1 - ab_s) / (1 - ab_t)), beta


def half_noise_network(x: Tensor, t: Tensor) -> Tensor:
    """eps, and a variance between the two fixed ones."""
    return torch.cat([Wavy(S, "eps")(x, t), torch.sin(4 * x)], 1)


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
@pytest.mark.parametrize("timesteps", [list(range(49, -1, -1)), [49, 30, 11, 2]])
def test_bits_per_dim_is_the_bound_computed_otherwise(variance: Any, timesteps: list[int]) -> None:
    x0 = pictures(2)
    denoiser = Denoiser(half_noise_network, S, "eps")
    bound = bits_per_dim(denoiser, x0, timesteps, NoiseSource([0, 1]), variance=variance)

    noise, wanted = NoiseSource([0, 1]), []
    after: list[int | None] = [*timesteps[1:], None]
    floor, _ = small_and_large(S, timesteps[-2], timesteps[-1], math.nan)
    for t, to in zip(timesteps, after, strict=True):
        x = S.q_sample(x0, t, noise.draw(x0.shape[1:]))
        predicted, _, mix = denoiser(x, t)
        assert mix is not None
        small, large = small_and_large(S, t, to, floor)
        log_var: Any = np.log(large if variance == "fixed-large" and to is not None else small)
        if variance == "learned":
            m = mix.double().numpy()
            log_var = m * np.log(large) + (1 - m) * np.log(small)
        parts = (y.double().numpy() for y in (x, x0, predicted))
        wanted.append(move_bits(S, t, to, *parts, log_var))
    assert_close(bound.moves.double(), torch.tensor(np.stack(wanted)), rtol=1e-3, atol=1e-6)
    level = S.level(timesteps[0])
    prior = kl_of_normals(level.signal * x0.double().numpy(), level.noise**2, 0, 1)
    prior = prior.mean((1, 2, 3)) / np.log(2)
    assert_close(bound.prior.double(), torch.tensor(prior), rtol=1e-3, atol=1e-6)
    assert_close(bound.total, bound.prior + bound.moves.sum(0))


def test_the_bound_is_met_by_the_exact_model() -> None:
    """Bytes that are each near N(0.1, 0.2^2): the bound lies just above their entropy."""
    values = torch.arange(256) / 127.5 - 1
    mass = norm.cdf(values + 1 / 255, 0.1, 0.2) - norm.cdf(values - 1 / 255, 0.1, 0.2)
    g = torch.Generator().manual_seed(0)
    index = torch.multinomial(torch.from_numpy(mass), 2 * 64 * 64, replacement=True, generator=g)
    x0 = values[index].view(2, 1, 64, 64).float()
    entropy = -np.log2(mass[index.numpy()]).mean()
    s = NoiseSchedule(kind="cosine", steps=400)
    denoiser = GaussianDenoiser(s, mean=0.1, std=0.2)
    bound = bits_per_dim(
        denoiser, x0, range(399, -1, -1), NoiseSource([0, 1]), variance="fixed-large"
    )
    assert entropy - 0.02 < bound.total.mean() < entropy + 0.25
    coarse = bits_per_dim(denoiser, x0, range(399, -1, -40), NoiseSource([0, 1]))
    assert coarse.total.mean() > bound.total.mean() + 0.1


@every_prediction
def test_the_hybrid_loss_is_computed_otherwise(name: PredictionName) -> None:
    x0, t, noise = batch()

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([Wavy(S, name)(x, t), torch.sin(4 * x)], 1)

    loss = diffusion_loss(model, S, name, x0, t, noise)
    simple = diffusion_loss(Wavy(S, name), S, name, x0, t, noise)
    x = S.q_sample(x0, t, noise)
    predicted, _, mix = Denoiser(model, S, name)(x, t)
    assert mix is not None
    floor, _ = small_and_large(S, 1, 0, math.nan)
    for i, step in enumerate(t.tolist()):
        to = step - 1 if step else None
        small, large = small_and_large(S, step, to, floor)
        m = mix[i : i + 1].double().numpy()
        log_var = m * np.log(large) + (1 - m) * np.log(small)
        parts = (y[i : i + 1].double().numpy() for y in (x, x0, predicted))
        bits = move_bits(S, step, to, *parts, log_var).item()
        wanted = simple[i].item() + 0.001 * S.steps * bits
        assert loss[i].item() == pytest.approx(wanted, rel=1e-4)


def test_the_bound_teaches_the_variance_alone() -> None:
    """Improved DDPM, sec. 3.1: a stop-gradient on the mean."""
    x0, t, noise = batch()
    target = PREDICTIONS["eps"].target(x0, noise, *S.rates(t, x0))
    mean = (target + 0.1).requires_grad_()
    mix = torch.zeros_like(x0, requires_grad=True)
    loss = diffusion_loss(lambda x, t: torch.cat([mean, mix], 1), S, "eps", x0, t, noise)
    loss.sum().backward()
    assert mean.grad is not None
    assert mix.grad is not None
    assert_close(mean.grad, 2 * (mean - target).detach() / x0[0].numel())
    assert mix.grad.isfinite().all()
    assert (mix.grad != 0).float().mean() > 0.9


def test_learned_variance_runs_from_the_small_to_the_large_one() -> None:
    q = posterior(S.level(30), S.level(20))
    mix = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    learned = model_variance("learned", q, mix)
    wanted = [q.variance, math.sqrt(q.variance * q.beta), q.beta]
    assert_close(learned, torch.tensor(wanted, dtype=torch.float64))
    assert model_variance("fixed-small", q, None) == q.variance
    assert model_variance("fixed-large", q, mix) == q.beta


def test_outputs_split_into_prediction_and_mix() -> None:
    x = torch.zeros(2, 3, 4, 4)
    output = torch.randn(2, 6, 4, 4).bfloat16()
    prediction, mix = split_output(output, x)
    assert_close(prediction, output[:, :3].float())
    assert_close(mix, (output[:, 3:].float() + 1) / 2)
    assert split_output(output[:, :3], x)[1] is None
    with pytest.raises(InputError, match=r"makes \(2, 5, 4, 4\) of images \(2, 3, 4, 4\)"):
        split_output(output[:, :5], x)


def test_certain_and_hopeless_predictions_have_finite_bits() -> None:
    x0 = pictures(1)

    class Stubborn(GaussianDenoiser):
        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            return Denoised(torch.full_like(x, 3.0), torch.zeros_like(x))

    wrong = bits_per_dim(Stubborn(S), x0, range(49, -1, -1), NoiseSource([0]))
    assert wrong.total.isfinite().all()
    good = bits_per_dim(wavy_denoiser(S, "x0"), x0, range(49, -1, -1), NoiseSource([0]))
    assert (wrong.total > 100 * good.total).all()
