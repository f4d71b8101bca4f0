from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised, PredictionName
from diffusion.process.samplers import (
    Moment,
    SamplerName,
    count_evaluations,
    ddim_step,
    ddpm_step,
    dpmpp_2m_sde_step,
    dpmpp_2m_step,
    euler_step,
    finish,
    sample,
)
from diffusion.process.schedule import CLEAN, NoiseSchedule, posterior
from tests.diffusion.exact import GaussianDenoiser, Wavy, wavy_denoiser
from unet.errors import InputError

LINEAR = NoiseSchedule()
COSINE = NoiseSchedule(kind="cosine")
SD = NoiseSchedule(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
THEIR_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
THEIR_LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
THEIR_NAME = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
PREDICTIONS: list[PredictionName] = ["eps", "x0", "v"]
SHAPE = (3, 6, 6)
SEEDS = [3, 4]
STEPS = 20

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def spacings(*names: str) -> Any:
    return pytest.mark.parametrize("spacing", names)


# ----------------------------------------------------------------------------------------------
# Against diffusers, whole trajectories


def their_run(
    scheduler: Any, net: Callable[..., Tensor], x: Tensor, **step: Callable[[], Any]
) -> list[Tensor]:
    """The trajectory of a diffusers scheduler whose timesteps are set.

    Schedulers that count sigmas have x in units of its signal: it is brought to our units.
    """
    trajectory = []
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        output = net(scheduler.scale_model_input(x, t), t)
        options = {name: value() for name, value in step.items()}
        x = scheduler.step(output, t, x, **options).prev_sample
        scaled = not isinstance(scheduler.init_noise_sigma, float)
        sigma = scheduler.sigmas[i + 1] if scaled else 0.0
        trajectory.append(x / (sigma**2 + 1) ** 0.5)
    return trajectory


def our_run(
    net: Wavy, x: Tensor, timesteps: Sequence[float], sampler: SamplerName, **options: Any
) -> list[Tensor]:
    denoiser = Denoiser(net, net.schedule, net.prediction)
    return [step.x for step in sample(denoiser, x, timesteps, sampler, **options)]


def source(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, NoiseSource]:
    noise = NoiseSource(SEEDS)
    return noise.draw(shape), noise


def generators() -> list[torch.Generator]:
    """Generators of the seeds from which x has been drawn already."""
    noise = NoiseSource(SEEDS)
    noise.draw(SHAPE)
    return noise.generators


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y, atol=1e-4, rtol=1e-4)


@every_prediction
@spacings("leading", "trailing", "linspace")
def test_ddpm_is_that_of_diffusers(prediction: PredictionName, spacing: Any) -> None:
    """Configured: fixed_small, no clipping, one generator an image."""
    net, (x, noise) = Wavy(LINEAR, prediction), source()
    scheduler = DDPMScheduler(
        **THEIR_LINEAR,
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    if scheduler.previous_timestep(scheduler.timesteps[0]) != scheduler.timesteps[1]:
        pytest.skip("older versions of diffusers do not step from one of these times to the next")
    g = generators()
    ours = our_run(net, x, LINEAR.timesteps(STEPS, spacing), "ddpm", noise=noise)
    assert_same(ours, their_run(scheduler, net, x, generator=lambda: g))


@pytest.mark.parametrize("variance", ["fixed-large", "learned"])
def test_ddpm_variances_are_those_of_diffusers(variance: Any) -> None:
    """Configured: leading, since diffusers adds noise in a last step from t > 0 (trailing).

    Its learned_range is Improved DDPM's; the network's second half is its variance.
    """

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([Wavy(LINEAR, "eps")(x, t), torch.cos(5 * x + t.view(-1, 1, 1, 1))], 1)

    x, noise = source()
    theirs_name = {"fixed-large": "fixed_large", "learned": "learned_range"}[variance]
    scheduler = DDPMScheduler(**THEIR_LINEAR, variance_type=theirs_name, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    g = generators()
    one = lambda x, t: net(x, t) if variance == "learned" else net(x, t)[:, :3]  # noqa: E731
    theirs = their_run(scheduler, one, x, generator=lambda: g)
    denoiser = Denoiser(net, LINEAR, "eps")
    timesteps = LINEAR.timesteps(STEPS, "leading")
    run = sample(denoiser, x, timesteps, "ddpm", noise=noise, variance=variance)
    assert_same([step.x for step in run], theirs)


@every_prediction
@spacings("leading", "trailing")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(prediction: PredictionName, spacing: Any, eta: float) -> None:
    """Configured: no clipping; 20 divides 1000, so that its t - 1000 // 20 is the next timestep."""
    net, (x, noise) = Wavy(LINEAR, prediction), source()
    scheduler = DDIMScheduler(
        **THEIR_LINEAR,
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    g = generators() if eta else None
    theirs = their_run(scheduler, net, x, generator=lambda: g, eta=lambda: eta)
    assert_same(
        our_run(net, x, LINEAR.timesteps(STEPS, spacing), "ddim", noise=noise, eta=eta), theirs
    )


@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_over_any_subsequence_is_that_of_diffusers(
    prediction: PredictionName, eta: float
) -> None:
    """Linspace: diffusers steps to t - 1000 // 20, which is not where its next step starts.

    So its 20 levels are given to it as a schedule of their own, and t to the network.
    """
    net, (x, noise) = Wavy(LINEAR, prediction), source()
    timesteps = LINEAR.timesteps(STEPS, "linspace")
    betas = LINEAR.chain(timesteps).beta.flip(0).numpy()
    scheduler = DDIMScheduler(
        STEPS, trained_betas=betas, prediction_type=THEIR_NAME[prediction], clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    g = generators() if eta else None
    told = lambda x, i: net(x, torch.tensor(timesteps[STEPS - 1 - i]))  # noqa: E731
    theirs = their_run(scheduler, told, x, generator=lambda: g, eta=lambda: eta)
    assert_same(our_run(net, x, timesteps, "ddim", noise=noise, eta=eta), theirs)


@every_prediction
def test_clipping_is_that_of_diffusers(prediction: PredictionName) -> None:
    """Configured: DDIM with use_clipped_model_output, since our eps follows the clipped x0."""
    net, (x, _) = Wavy(LINEAR, prediction), source()
    scheduler = DDIMScheduler(
        **THEIR_LINEAR, prediction_type=THEIR_NAME[prediction], clip_sample=True
    )
    scheduler.set_timesteps(STEPS)
    theirs = their_run(scheduler, net, x, use_clipped_model_output=lambda: True)
    denoiser = Clipped(Denoiser(net, LINEAR, prediction))
    run = list(sample(denoiser, x, LINEAR.timesteps(STEPS, "leading")))
    assert_same([step.x for step in run], theirs)
    assert max(step.x0.abs().max() for step in run) == 1


SIGMA_SCHEDULERS = {"euler": EulerDiscreteScheduler, "heun": HeunDiscreteScheduler}


@every_prediction
@spacings("leading", "trailing", "linspace", "karras")
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_euler_and_heun_are_those_of_diffusers(
    sampler: Any, prediction: PredictionName, spacing: Any
) -> None:
    """Its linspace timesteps are not rounded here, so ours are given as fractions.

    Its first x has the noise of the first level alone, unless leading; ours is told so.
    """
    net, (x, _) = Wavy(LINEAR, prediction), source()
    scheduler = SIGMA_SCHEDULERS[sampler](
        **THEIR_LINEAR,
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing="linspace" if spacing == "karras" else spacing,
        use_karras_sigmas=spacing == "karras",
    )
    scheduler.set_timesteps(STEPS)
    theirs = their_run(scheduler, net, x)
    if sampler == "heun":  # two of its steps are one of ours, except for the last
        theirs = [*theirs[1:-1:2], theirs[-1]]
    timesteps = LINEAR.timesteps(STEPS, spacing)
    if spacing == "linspace":
        timesteps = np.linspace(999, 0, STEPS).tolist()
    if spacing != "leading":
        x = LINEAR.level(timesteps[0]).noise * x
    assert_same(our_run(net, x, timesteps, sampler), theirs)


def dpm_timesteps(schedule: NoiseSchedule, n: int, spacing: Any, offset: int = 0) -> list[float]:
    """Those of DPMSolverMultistepScheduler: the last of n + 1 is where the run would end."""
    if spacing in ("trailing", "karras"):
        return schedule.timesteps(n, spacing)
    return [t + offset for t in schedule.timesteps(n + 1, spacing)[:-1]]


@every_prediction
@spacings("leading", "trailing", "linspace", "karras")
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "dpmpp-2m-sde"])
@pytest.mark.parametrize("steps", [8, STEPS])
def test_dpm_solver_is_that_of_diffusers(
    sampler: Any, prediction: PredictionName, spacing: Any, steps: int
) -> None:
    """Configured: order 2, midpoint, final sigma zero (so that the last step is of order 1).

    With Karras sigmas it rounds the timesteps that it tells the network, so ours rounds, too.
    """
    rounding = spacing == "karras"
    net, (x, noise) = Wavy(LINEAR, prediction), source()
    scheduler = DPMSolverMultistepScheduler(
        **THEIR_LINEAR,
        algorithm_type="sde-dpmsolver++" if sampler == "dpmpp-2m-sde" else "dpmsolver++",
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing="linspace" if rounding else spacing,
        use_karras_sigmas=rounding,
    )
    scheduler.set_timesteps(steps)
    g = generators()
    theirs = their_run(scheduler, net, x, generator=lambda: g)
    model = (lambda x, t: net(x, t.round())) if rounding else net
    denoiser = Denoiser(model, LINEAR, prediction)
    run = sample(denoiser, x, dpm_timesteps(LINEAR, steps, spacing), sampler, noise=noise)
    assert_same([step.x for step in run], theirs)


def test_dpm_solver_that_ends_at_the_least_noise_is_that_of_diffusers() -> None:
    """Configured: final sigma sigma_min, 20 steps, so that all steps but the first are of order 2.

    This is algorithm 2 of the paper, which stops short of the clean image.
    """
    net, (x, _) = Wavy(LINEAR, "eps"), source()
    scheduler = DPMSolverMultistepScheduler(**THEIR_LINEAR, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(STEPS)
    theirs = their_run(scheduler, net, x)
    ours = our_run(net, x, dpm_timesteps(LINEAR, STEPS, "linspace"), "dpmpp-2m", end=0)
    assert_same(ours, theirs)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m"])
def test_stable_diffusions_scheduler_configs_can_be_said(
    sampler: Any, prediction: PredictionName
) -> None:
    """Leading, steps_offset 1, set_alpha_to_one False, 25 steps: its pipelines' folders say so."""
    net, (x, _) = Wavy(SD, prediction), source()
    config: dict[str, Any] = {
        **THEIR_SD,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "prediction_type": THEIR_NAME[prediction],
    }
    timesteps, end = SD.timesteps(25, "leading", offset=1), CLEAN
    if sampler == "ddim":
        scheduler: Any = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
        end = 0
    elif sampler == "euler":
        scheduler = EulerDiscreteScheduler(**config)
    else:
        scheduler = DPMSolverMultistepScheduler(**config)
        timesteps = dpm_timesteps(SD, 25, "leading", offset=1)
    scheduler.set_timesteps(25)
    assert timesteps == scheduler.timesteps.tolist()
    assert_same(our_run(net, x, timesteps, sampler, end=end), their_run(scheduler, net, x))


def test_ddim_from_no_signal_is_that_of_diffusers() -> None:
    """Zero terminal SNR, trailing, v: the recipe of arXiv 2305.08891."""
    schedule = replace(SD, zero_snr=True)
    net, (x, _) = Wavy(schedule, "v"), source()
    scheduler = DDIMScheduler(
        **THEIR_SD,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    assert_same(our_run(net, x, schedule.timesteps(STEPS), "ddim"), their_run(scheduler, net, x))


# ----------------------------------------------------------------------------------------------
# Laws of the steps


def moment(high: float = 700, low: float = 550, *, first: bool = False) -> Moment:
    g = torch.Generator().manual_seed(0)
    x, x0, before, z = torch.randn(4, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    at, to = LINEAR.level(high), LINEAR.level(low)
    now = Denoised(x0, (x - at.signal * x0) / at.noise)
    last = None if first else (LINEAR.level(min(high + 140, 999)), before)
    return Moment(x, now, at, to, last, lambda: z, lambda x: now)


@pytest.mark.parametrize(("high", "low"), [(700, 550), (999, 998), (1, 0), (30, CLEAN)])
def test_ddim_with_eta_1_is_ddpm(high: float, low: float) -> None:
    m = moment(high, low)
    assert_close(ddim_step(m, eta=1.0), ddpm_step(m, variance="fixed-small"))


def test_whole_ddim_runs_with_eta_1_are_ddpm_runs() -> None:
    denoiser, timesteps = wavy_denoiser(COSINE, "v"), COSINE.timesteps(STEPS)
    (x, noise), (_, again) = source(), source()
    ddim = finish(sample(denoiser, x, timesteps, "ddim", noise=noise, eta=1.0))
    assert_close(
        ddim, finish(sample(denoiser, x, timesteps, "ddpm", noise=again)), atol=1e-5, rtol=1e-5
    )


def test_euler_follows_the_slope_in_units_of_the_signal() -> None:
    """EDM, alg. 1: x + (sigma' - sigma) (x - x0) / sigma."""
    m = moment()
    x = m.x / m.at.signal
    x = x + (m.to.sigma - m.at.sigma) * (x - m.now.x0) / m.at.sigma
    assert_close(euler_step(m), m.to.signal * x)


def test_dpm_solver_without_a_past_is_ddim_and_ddpm() -> None:
    m = moment(first=True)
    assert_close(dpmpp_2m_step(m), ddim_step(m))
    assert_close(dpmpp_2m_sde_step(m), ddpm_step(m))


def test_dpm_solver_is_the_formula_of_its_paper() -> None:
    """DPM-Solver++, alg. 2, with its own symbols."""
    m = moment()
    assert m.before is not None
    level, x0_before = m.before
    lambdas = [math.log(y.signal / y.noise) for y in (level, m.at, m.to)]
    h_before, h = np.diff(lambdas)
    r = h_before / h
    d = (1 + 1 / (2 * r)) * m.now.x0 - 1 / (2 * r) * x0_before
    wanted = m.to.noise / m.at.noise * m.x - m.to.signal * (math.exp(-h) - 1) * d
    assert_close(dpmpp_2m_step(m), wanted)


# ----------------------------------------------------------------------------------------------
# Laws of whole runs

ODE: list[tuple[SamplerName, float]] = [
    ("ddim", 1),
    ("euler", 1),
    ("heun", 2),
    ("flow-heun", 2),
    ("dpmpp-2m", 2),
]
SDE: list[tuple[SamplerName, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "fixed-large"}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("dpmpp-2m-sde", {}),
]


@pytest.mark.parametrize(("sampler", "order"), ODE)
def test_ode_samplers_converge_to_the_exact_solution_at_their_order(
    sampler: SamplerName, order: float
) -> None:
    """Of Gaussian data the flow is linear: it maps (x - signal m) / std_t to itself."""
    denoiser = GaussianDenoiser(COSINE)
    high, low = COSINE.level(900), COSINE.level(20)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)
    spread = [math.hypot(y.signal * denoiser.std, y.noise) for y in (high, low)]
    exact = low.signal * denoiser.mean + spread[1] / spread[0] * (x - high.signal * denoiser.mean)
    errors = []
    for n in (40, 80, 160):
        lambdas = np.linspace(high.sigma**0.25, low.sigma**0.25, n + 1) ** 4
        timesteps = [COSINE.timestep(sigma) for sigma in lambdas[:-1]]
        end = finish(sample(denoiser, x, timesteps, sampler, end=20))
        errors.append((end - exact).abs().max().item())
    assert errors[2] < (1e-2 if order == 1 else 1e-3)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("sampler", "options"), [*((name, {}) for name, _ in ODE), *SDE])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, replace(SD, zero_snr=True)])
def test_an_exact_denoiser_of_a_gaussian_returns_its_mean_and_variance(
    sampler: SamplerName, options: Any, schedule: NoiseSchedule
) -> None:
    denoiser = GaussianDenoiser(schedule, mean=0.3, std=0.5)
    noise = NoiseSource([0])
    x = noise.draw((1, 200, 200))
    run = sample(denoiser, x, schedule.timesteps(200), sampler, noise=noise, **options)
    x = finish(run)
    # First order in the size of the steps, in the variance too: to 5 % at 200 steps.
    tolerance = 0.05 if sampler == "ddpm" or options else 0.02
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, rel=tolerance)
    normal = ((x - x.mean()) / x.std()).flatten()
    assert normal.pow(4).mean().item() == pytest.approx(3, abs=0.15)


def test_each_fixed_variance_is_exact_for_the_data_that_it_is_made_for() -> None:
    """DDPM, sec. 3.2: large for x0 ~ N(0, I), small for a single point, in any number of steps."""
    for std, variance in ((1.0, "fixed-large"), (1e-6, "fixed-small")):
        denoiser = GaussianDenoiser(LINEAR, mean=0.0, std=std)
        noise = NoiseSource([0])
        x = noise.draw((1, 300, 300))
        options = {"variance": variance, "noise": noise}
        for step in sample(denoiser, x, LINEAR.timesteps(5), "ddpm", **options):
            level = LINEAR.level(step.t)
            right = math.hypot(level.signal * std, level.noise)
            if step.t != CLEAN:
                assert step.x.std().item() == pytest.approx(right, rel=0.01)


def test_ddpm_with_the_exact_variance_is_exact_in_five_steps() -> None:
    """Of Gaussian data p(x_s | x_t) is Gaussian, and its variance between the two fixed ones."""
    timesteps = LINEAR.timesteps(5)
    following = dict(pairwise([*timesteps, CLEAN]))

    class ExactVariance(GaussianDenoiser):
        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            at, to = LINEAR.level(float(t)), LINEAR.level(following[float(t)])
            q = posterior(at, to)
            spread = (self.std * at.noise / math.hypot(at.signal * self.std, at.noise)) ** 2
            exact = q.variance + q.x0_factor**2 * spread  # spread: of x0 given x_t
            mix = (
                math.log(exact / q.variance) / math.log(q.beta / q.variance) if q.variance else 0.0
            )
            assert 0 <= mix <= 1
            return super().__call__(x, t)._replace(mix=torch.full_like(x, mix))

    noise = NoiseSource([0])
    denoiser = ExactVariance(LINEAR)
    x = noise.draw((1, 300, 300))
    for step in sample(denoiser, x, timesteps, "ddpm", noise=noise, variance="learned"):
        if step.t != CLEAN:  # whose step adds no noise
            level = LINEAR.level(step.t)
            right = math.hypot(level.signal * denoiser.std, level.noise)
            assert step.x.std().item() == pytest.approx(right, rel=0.01)
            assert step.x.mean().item() == pytest.approx(level.signal * denoiser.mean, abs=0.01)


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_denoiser_of_a_single_image_is_believed(sampler: SamplerName, n: int) -> None:
    image = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    class Knows:
        schedule, prediction = LINEAR, "x0"

        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            signal, sigma = LINEAR.rates(t, x)
            return Denoised(image, (x - signal * image) / sigma)

    noise = NoiseSource([0])
    knows: Any = Knows()
    run = sample(knows, noise.draw((3, 4, 4)), LINEAR.timesteps(n), sampler, noise=noise)
    assert_close(finish(run), image)


@pytest.mark.parametrize("sampler", [name for name, _ in ODE])
def test_small_errors_of_a_network_stay_small_from_the_end_of_the_cosine_schedule(
    sampler: SamplerName,
) -> None:
    """There sigma is 20,000, and a step of a sampler spans most of it."""

    class Erring(GaussianDenoiser):
        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            exact, at = super().__call__(x, t), COSINE.level(float(t))
            x0 = exact.x0 + 0.05 * torch.sin(20 * x + float(t))
            return Denoised(x0, (x - at.signal * x0) / at.noise, None)

    x, _ = source()
    ends = [
        finish(sample(denoiser, x.double(), COSINE.timesteps(10), sampler))
        for denoiser in (GaussianDenoiser(COSINE), Erring(COSINE))
    ]
    assert (ends[1] - ends[0]).abs().max() < 0.2


# ----------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_image_7_is_the_same_in_any_batch(sampler: SamplerName) -> None:
    denoiser, timesteps = wavy_denoiser(LINEAR, "eps"), LINEAR.timesteps(6)
    images = {}
    for seeds in (range(10), [7], [9, 7, 2]):
        noise = NoiseSource(seeds)
        x = finish(sample(denoiser, noise.draw(SHAPE), timesteps, sampler, noise=noise))
        images[len(x)] = x[list(seeds).index(7)]
    assert_close(images[1], images[10], atol=1e-6, rtol=1e-6)
    assert_close(images[1], images[3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, replace(SD, zero_snr=True)])
def test_the_table_counts_the_evaluations(
    sampler: SamplerName, n: int, schedule: NoiseSchedule
) -> None:
    calls: list[float] = []

    class Counting(GaussianDenoiser):
        def __call__(
            self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
        ) -> Denoised:
            calls.append(float(t))
            assert to == (CLEAN if sampler == "jump" else None)
            assert conditioning == {"classes": 5}
            return super().__call__(x, t)

    x, noise = source()
    timesteps = schedule.timesteps(n)
    run = list(
        sample(Counting(schedule), x, timesteps, sampler, noise=noise, conditioning={"classes": 5})
    )
    assert len(calls) == count_evaluations(sampler, timesteps, schedule)
    assert [step.index for step in run] == list(range(n))
    assert [step.t for step in run] == [*timesteps[1:], CLEAN]
    assert calls[0] == timesteps[0]


def test_jumps_back_up_cost_no_evaluation_and_steps_that_stay_do() -> None:
    x, noise = source()
    timesteps = [500, 300, 400, 400, 200]
    run = list(sample(GaussianDenoiser(LINEAR), x, timesteps, noise=noise))
    assert [step.t for step in run] == [300, 400, 200, CLEAN]
    assert count_evaluations("ddim", timesteps, LINEAR) == len(run)
    assert count_evaluations("heun", [500, 300, 400, 200], LINEAR) == 5  # the last step has one


def test_a_run_may_start_and_end_anywhere() -> None:
    """From the same x, the second half of a run is a run."""
    denoiser, timesteps = wavy_denoiser(LINEAR, "v"), LINEAR.timesteps(10)
    x, _ = source()
    whole = list(sample(denoiser, x, timesteps))
    half = list(sample(denoiser, x, timesteps[:5], end=timesteps[5]))
    assert_close(half[-1].x, whole[4].x, rtol=0, atol=0)
    rest = list(sample(denoiser, half[-1].x, timesteps[5:]))
    assert_close(rest[-1].x, whole[-1].x, rtol=0, atol=0)


def test_going_back_up_noises_x_as_the_forward_process_does() -> None:
    denoiser = GaussianDenoiser(COSINE)
    noise = NoiseSource([0])
    x = COSINE.q_sample(torch.zeros(1, 1, 300, 300), 300, noise.draw((1, 300, 300)))
    seen: list[Tensor] = []

    def remember(x: Tensor, t: float) -> Tensor:
        seen.append(x)
        return x

    run = sample(denoiser, x, [300, 200, 800], "ddim", noise=noise, constrain=remember)
    steps = list(run)
    assert [step.t for step in steps] == [200, CLEAN]
    low, high = COSINE.level(200), COSINE.level(800)
    kept = high.signal / low.signal
    spread = math.hypot(kept * seen[0].std().item(), math.sqrt(1 - kept**2))
    exact = GaussianDenoiser(COSINE)
    # The last step's x0 is affine in the noised x, so that its spread tells that of x.
    gain = high.signal * exact.std**2 / (high.signal**2 * exact.std**2 + high.noise**2)
    assert steps[1].x0.std().item() == pytest.approx(gain * spread, rel=0.01)


def test_going_back_up_is_the_formula_of_repaint() -> None:
    """arXiv 2201.09865, eq. 2, over more than one timestep: the same draw gives the same x."""

    class Recording:
        schedule = COSINE

        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            asked.append(x)
            return GaussianDenoiser(COSINE)(x, t)

    asked: list[Tensor] = []
    noise, again = NoiseSource([0]), NoiseSource([0])
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    low, high = next(sample(Recording(), x, [300, 200, 100], "ddim")).x, COSINE.level(800)
    list(sample(Recording(), x, [300, 200, 800], "ddim", noise=noise))
    kept = high.signal / COSINE.level(200).signal
    wanted = kept * low + math.sqrt(1 - kept**2) * again.like(x)
    assert_close(asked[-1], wanted, atol=1e-5, rtol=1e-5)


def test_the_noise_of_churn_scales_no_jump_back_up() -> None:
    x, _ = source()
    path = [900, 600, 300, 600, 300]

    def run(**options: Any) -> list[Tensor]:
        steps = sample(
            GaussianDenoiser(LINEAR), x, path, "heun", noise=NoiseSource([5, 6]), **options
        )
        return [step.x for step in steps]

    for same in ({"churn": 0.0}, {"churn": 20.0, "churn_interval": (1e6, 1e7)}):
        assert_same(run(churn_noise=2.0, **same), run())
    assert not torch.equal(run(churn=20.0, churn_noise=2.0)[0], run(churn=20.0)[0])


def test_steps_need_no_gradient_and_change_nothing() -> None:
    x, _ = source()
    before = x.clone().requires_grad_()
    step = next(sample(wavy_denoiser(LINEAR, "eps"), before, [500]))
    assert not step.x.requires_grad
    assert torch.is_grad_enabled()
    assert_close(before.detach(), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sampler": "plms"}, "'plms' is unknown.*dpmpp-2m-sde"),
        ({"sampler": "euler", "eta": 0.5}, "'euler' has no option eta .given 0.5.; it has churn"),
        ({"sampler": "dpmpp-2m", "eta": 0.5}, "no option eta .given 0.5.; it has none"),
        ({"sampler": "heun", "churn": -1}, "churn -1 must be 0 or more"),
        ({"sampler": "heun", "churn_interval": (2, 1)}, "is empty"),
        ({"sampler": "heun", "churn": 1, "noise": None}, "'heun' draws noise"),
        ({"sampler": "ddim", "variance": "learned"}, "no option variance.*it has eta"),
        ({"eta": 1.5}, "eta must be from 0.*not 1.5"),
        ({"eta": 0.5, "noise": None}, "'ddim' draws noise"),
        ({"sampler": "ddpm", "noise": None}, "'ddpm' draws noise"),
        ({"sampler": "dpmpp-2m-sde", "noise": None}, "draws noise"),
        ({"timesteps": [500, 300, 400], "noise": None}, "draws noise"),
        ({"timesteps": [1000, 500]}, "timestep 1000.*0 to 999"),
        ({"timesteps": [500, -1]}, "timestep -1"),
        ({"timesteps": []}, "needs timesteps"),
        ({"end": -0.5}, "timestep -0.5"),
        ({"noise": NoiseSource([1])}, "1 seed for 2 images"),
        ({"timesteps": [9, 5], "end": 5}, "above its end 5"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(arguments: dict[str, Any], says: str) -> None:
    x, noise = source()
    defaults = {"timesteps": [500, 200], "noise": noise}
    with pytest.raises(InputError, match=says):
        sample(GaussianDenoiser(LINEAR), x, **(defaults | arguments))


@pytest.mark.parametrize(
    ("variance", "says"), [("learned", "has not learned"), ("tiny", "'tiny' is unknown")]
)
def test_a_variance_that_the_network_lacks_is_refused(variance: str, says: str) -> None:
    x, noise = source()
    with pytest.raises(InputError, match=says):
        finish(sample(GaussianDenoiser(LINEAR), x, [9, 5], "ddpm", noise=noise, variance=variance))
