"""Flow matching and EDM: changes of variables of what there was, and other libraries' steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Denoiser
from diffusion.process.levels import TrainingLevels, coupled
from diffusion.process.loss import diffusion_loss, loss_weight
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import PREDICTIONS, SIGMA_DATA, PredictionName, get_prediction
from diffusion.process.samplers import SamplerName, count_evaluations, finish, sample
from diffusion.process.schedule import CLEAN, NoiseSchedule
from tests.diffusion.exact import GaussianDenoiser, wavy_denoiser
from unet.errors import InputError

FLOW, EDM = NoiseSchedule(kind="flow"), NoiseSchedule(kind="edm")
COSINE = NoiseSchedule(kind="cosine")


def noise(n: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=g, dtype=torch.float64)


def velocity(x: Tensor, s: Tensor) -> Tensor:
    """A "network" of flow matching, of x on the straight path and its s."""
    return torch.sin(2 * x + s) - 0.5 * x


def flow_network(x: Tensor, t: Tensor) -> Tensor:
    return velocity(x, (t.to(x).view(-1, 1, 1, 1) + 1) / 1000)


# ----------------------------------------------------------------------------------------------
# Flow matching


@pytest.mark.parametrize("n", [1, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_and_ddim_on_the_straight_path_are_flow_matching_of_diffusers(
    n: int, shift: float
) -> None:
    """Its own spacing ends at s = 1 / T before the last step; ours is given the same times."""
    x = noise()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    theirs, now = [], x
    for t in scheduler.timesteps:
        now = scheduler.step(velocity(now, t.double() / 1000), t, now).prev_sample
        theirs.append(now)
    times = (1000 * scheduler.sigmas.double()[:-1] - 1).tolist()
    assert FLOW.timesteps(n, shift=shift) == pytest.approx(times, abs=0.5)  # of whole ones, shifted
    for sampler in ("euler", "ddim"):
        run = sample(Denoiser(flow_network, FLOW, "flow"), x, times, sampler)
        for step, their_x in zip(run, theirs, strict=True):
            level = FLOW.level(step.t)
            ours = step.x / (level.signal + level.noise)
            assert_close(ours, their_x.double(), atol=1e-4, rtol=1e-4)


def test_flow_heun_is_that_of_diffusers() -> None:
    x, n = noise(), 20
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(n)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(velocity(theirs, t.double() / 1000), t, theirs).prev_sample
    times = (1000 * scheduler.sigmas.double()[[0, *range(1, 2 * n - 2, 2)]] - 1).tolist()
    denoiser = Denoiser(flow_network, FLOW, "flow")
    assert_close(
        finish(sample(denoiser, x, times, "flow-heun")), theirs.double(), atol=1e-4, rtol=1e-4
    )
    assert count_evaluations("flow-heun", times, FLOW) == 2 * n - 1


def test_the_straight_path_is_that_of_the_paper_at_every_fraction() -> None:
    for t in (0, 12.25, 500, 998.75, 999):
        level, s = FLOW.level(t), (t + 1) / 1000
        assert level.signal * (level.signal + level.noise) ** -1 == pytest.approx(1 - s)
        assert level.flow_time == pytest.approx(s)
        assert level.signal**2 + level.noise**2 == pytest.approx(1)
    assert FLOW.level(CLEAN) == (1, 0)
    assert FLOW.level(999) == (0, 1)
    assert FLOW.timestep(FLOW.level(12.25).sigma) == pytest.approx(12.25)
    assert_close(FLOW.levels(torch.arange(1000)).signal, FLOW.signal)


def test_a_shift_multiplies_every_sigma_of_the_straight_path() -> None:
    plain, shifted = FLOW.timesteps(20), FLOW.timesteps(20, shift=3)
    assert shifted[0] == plain[0] == 999
    for before, after in zip(plain[1:], shifted[1:], strict=True):
        assert FLOW.level(after).sigma == pytest.approx(3 * FLOW.level(before).sigma)
    t = COSINE.timesteps(1000, shift=5)
    assert t == sorted(t, reverse=True)
    assert 0 <= t[-1] <= t[0] == 999
    for given in ({"shift": 0.5}, {"spacing": "karras", "shift": 2.0}):
        with pytest.raises(InputError, match="1 or more, and 1 with karras and logsnr"):
            EDM.timesteps(5, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "name"), [(FLOW, "flow"), (EDM, "edm"), (COSINE, "edm"), (FLOW, "v")]
)
def test_a_network_of_v_on_cosine_is_one_of_another_kind_and_back(
    schedule: NoiseSchedule, name: PredictionName
) -> None:
    """By the map of time at equal sigma, the units of x, and the outputs: the same trajectories."""

    def changed(
        network: Any, old: tuple[NoiseSchedule, PredictionName], new: tuple[Any, Any]
    ) -> Any:
        (schedule, name), (other, other_name) = old, new
        rule = PREDICTIONS[other_name]

        def made(x: Tensor, told: Tensor) -> Tensor:
            t = told.double()
            if other_name == "edm":
                t = torch.from_numpy(other.timesteps_at(4 * t.numpy()))
            rates = other.rates(t, x)
            x = x / rule.scaled_input(torch.ones(1), *rates)
            sigma = (rates[1] / rates[0]).flatten()
            before = torch.from_numpy(schedule.timesteps_at(sigma.log().numpy()))
            x0, eps, _ = Denoiser(network, schedule, name)(x, before)
            return rule.target(x0, eps, *rates)

        return made

    v = wavy_denoiser(COSINE, "v")
    as_other = changed(v.model, (COSINE, "v"), (schedule, name))
    again = changed(as_other, (schedule, name), (COSINE, "v"))
    high = min(COSINE.level(998).sigma, schedule.level(998).sigma)
    sigmas = np.geomspace(high, 0.02, 12)
    x, times = noise(), [COSINE.timestep(sigma) for sigma in sigmas]
    there = Denoiser(as_other, schedule, name)
    assert_close(Denoiser(again, COSINE, "v")(x, times[4]), v(x, times[4]), atol=1e-6, rtol=1e-6)
    samplers: list[SamplerName] = ["euler", "heun", "flow-heun", "dpmpp-2m", "ddpm"]
    for sampler in samplers:
        one = sample(v, x, times, sampler, noise=NoiseSource([0, 1]))
        other_times = [schedule.timestep(sigma) for sigma in sigmas]
        other = sample(there, x, other_times, sampler, noise=NoiseSource([0, 1]))
        for a, b in zip(one, other, strict=True):
            assert_close(a.x, b.x, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------
# EDM


def edm_denoiser(network: Any, x: Tensor, sigma: float) -> Tensor:
    """EDM, eq. 7 with table 1, written with its own symbols."""
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / math.sqrt(total)
    c_in, c_noise = 1 / math.sqrt(total), math.log(sigma) / 4
    found: Tensor = c_skip * x + c_out * network(c_in * x, torch.tensor([c_noise]))
    return found


def edm_network(x: Tensor, c_noise: Tensor) -> Tensor:
    return torch.sin(3 * x + c_noise.to(x).view(-1, 1, 1, 1)) - 0.3 * x


@pytest.mark.parametrize("t", [0, 300.5, 999])
def test_preconditioning_is_that_of_the_paper(t: float) -> None:
    level, x = EDM.level(t), noise()
    x0, eps, _ = Denoiser(edm_network, EDM, "edm")(x, t)
    assert_close(x0, edm_denoiser(edm_network, x / level.signal, level.sigma))
    assert_close(level.signal * x0 + level.noise * eps, x)


def test_noise_levels_are_karras_steps() -> None:
    sigmas = (EDM.noise / EDM.signal).numpy()
    assert sigmas[[0, -1]] == pytest.approx([0.002, 80])
    assert np.diff(sigmas ** (1 / 7)) == pytest.approx((80 ** (1 / 7) - 0.002 ** (1 / 7)) / 999)
    few = [EDM.level(t).sigma for t in EDM.timesteps(18, "karras")]
    wanted = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert few == pytest.approx(wanted)


def test_with_images_of_variance_1_edm_is_v(monkeypatch: Any) -> None:
    """Up to the sign: arXiv 2206.00364, appendix C, with sigma_data 1."""
    monkeypatch.setattr("diffusion.process.prediction.SIGMA_DATA", 1.0)
    x, output = noise(), noise(seed=1)
    rates = COSINE.rates(400, x)
    assert_close(PREDICTIONS["edm"].scaled_input(x, *rates), x)
    pairs = zip(
        PREDICTIONS["edm"].to_x0_eps(-output, x, *rates),
        PREDICTIONS["v"].to_x0_eps(output, x, *rates),
        strict=True,
    )
    for ours, v in pairs:
        assert_close(ours, v)


def test_the_plain_loss_is_that_of_the_paper() -> None:
    """EDM, eq. 8: lambda = (sigma^2 + sd^2) / (sigma sd)^2 of the denoiser's error."""
    x0, eps, t = 0.5 * noise(3), noise(3, seed=1), torch.tensor([10, 500, 990])
    found = diffusion_loss(edm_network, EDM, "edm", x0, t, eps)
    for i, level in enumerate(EDM.level(int(step)) for step in t):
        x = x0[i : i + 1] + level.sigma * eps[i : i + 1]
        error = (edm_denoiser(edm_network, x, level.sigma) - x0[i : i + 1]).square().mean()
        weight = (level.sigma**2 + SIGMA_DATA**2) / (level.sigma * SIGMA_DATA) ** 2
        assert found[i].item() == pytest.approx(weight * error.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(PREDICTIONS))
def test_min_snr_divides_by_the_ratio_of_the_errors(name: PredictionName) -> None:
    """An error of 1 in the output is one of 1 / sqrt(divisor) in x0, in every prediction."""
    x, rule = noise(), PREDICTIONS[name]
    rates, snr = COSINE.rates(300, x), COSINE.snr(torch.tensor([300]))
    off = rule.to_x0_eps(torch.ones_like(x), x, *rates)[0]
    off = off - rule.to_x0_eps(torch.zeros_like(x), x, *rates)[0]
    squared = off.square().mean().item()
    divisor = snr.clamp(max=5) / loss_weight("min-snr", rule, snr)
    assert squared == pytest.approx(1 / divisor.item(), rel=1e-5)


class Fixed(NoiseSource):
    """The same draws in float64, also for the oracle."""

    def like(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:]).to(x)


@pytest.mark.parametrize("given", [(0.0, 0.0, math.inf, 1.0), (30.0, 0.05, 50.0, 1.007)])
def test_stochastic_heun_is_algorithm_2_of_the_paper(given: Any) -> None:
    churn, lowest, highest, s_noise = given
    exact, n, start = GaussianDenoiser(EDM), 18, noise()

    def denoised(x: Tensor, sigma: float) -> Tensor:
        """Of pixels that are N(0.3, 0.5^2), in EDM's units."""
        return 0.3 + 0.25 / (0.25 + sigma**2) * (x - 0.3)

    sigmas = [*(EDM.level(t).sigma for t in EDM.timesteps(n, "karras")), 0.0]
    source, x = Fixed([4, 5]), start / EDM.level(999).signal
    for sigma, goal in pairwise(sigmas):
        gamma = min(churn / n, math.sqrt(2) - 1) if lowest <= sigma <= highest else 0.0
        hat = sigma * (1 + gamma)
        if gamma:
            x = x + math.sqrt(hat**2 - sigma**2) * s_noise * source.like(x)
        d = (x - denoised(x, hat)) / hat
        ahead = x + (goal - hat) * d
        if goal:
            d = (d + (ahead - denoised(ahead, goal)) / goal) / 2
            ahead = x + (goal - hat) * d
        x = ahead
    options = {"churn": churn, "churn_interval": (lowest, highest), "churn_noise": s_noise}
    run = sample(exact, start, EDM.timesteps(n, "karras"), "heun", noise=Fixed([4, 5]), **options)
    assert_close(finish(run), x, atol=1e-6, rtol=1e-6)


def test_churn_keeps_the_distribution_and_costs_no_evaluation() -> None:
    source = NoiseSource([0])
    x, times = source.draw((1, 100, 100)), EDM.timesteps(40)
    run = list(sample(GaussianDenoiser(EDM), x, times, "heun", noise=source, churn=20.0))
    assert [step.index for step in run] == list(range(40))
    assert run[-1].x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert run[-1].x.std().item() == pytest.approx(0.5, rel=0.05)
    assert count_evaluations("heun", times, EDM, churn=20.0) == 79


@pytest.mark.parametrize("name", ["eps", "edm"])
def test_what_is_undefined_without_signal_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match=f"{name}-prediction is undefined.*with flow"):
        get_prediction(name, FLOW)
    with pytest.raises(InputError, match="flow ends without"):
        NoiseSchedule(kind="flow", zero_snr=True)
    with pytest.raises(InputError, match="with flow the last timestep has no signal"):
        FLOW.timesteps(5, "karras")


# ----------------------------------------------------------------------------------------------
# What is trained on


@pytest.mark.parametrize("schedule", [FLOW, EDM, COSINE])
def test_log_normal_levels_have_the_mean_and_deviation_asked_for(schedule: NoiseSchedule) -> None:
    u = (torch.arange(4000) + 0.5) / 4000
    t = TrainingLevels(schedule, shift=2.0, log_sigma=(-0.7, 0.8))(u)
    assert t.dtype == torch.long
    level = schedule.levels(t)
    log_sigma = (level.noise / level.signal).log()
    assert log_sigma.mean().item() == pytest.approx(-0.7 + math.log(2), abs=0.02)
    assert log_sigma.std().item() == pytest.approx(0.8, abs=0.02)
    ends = TrainingLevels(schedule, log_sigma=(0.0, 9.0))(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 999]


def test_coupling_is_the_nearest_of_all_assignments_within_a_class() -> None:
    """For numbers, the nearest is the one that keeps the order."""
    g = torch.Generator().manual_seed(0)
    images, drawn = (torch.randn(12, 1, 1, 1, generator=g) for _ in range(2))
    found = coupled(drawn, images)
    assert found.flatten()[images.flatten().argsort()].equal(drawn.flatten().sort().values)
    labels = torch.arange(12) % 3
    found = coupled(drawn, images, labels)
    for label in range(3):
        mine = labels == label
        assert found[mine].equal(coupled(drawn[mine], images[mine]))
        assert found[mine].flatten().sort().values.equal(drawn[mine].flatten().sort().values)
