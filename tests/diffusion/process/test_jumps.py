"""Jumps along a teacher's ways: exact ones are what the loss asks for, and what sampling takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffusion.process.denoiser import Denoiser
from diffusion.process.levels import TEACHER_SHARE, jumps
from diffusion.process.loss import jump_loss
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised, PredictionName, get_prediction
from diffusion.process.samplers import count_evaluations, finish, sample
from diffusion.process.schedule import CLEAN, NoiseSchedule
from tests.diffusion.exact import GaussianDenoiser

COSINE, FLOW, LINEAR = (NoiseSchedule(kind=kind) for kind in ("cosine", "flow", "linear"))
KINDS: list[tuple[NoiseSchedule, PredictionName]] = [
    (COSINE, "v"),
    (FLOW, "flow"),
    (LINEAR, "eps"),
    (NoiseSchedule(kind="edm"), "edm"),
    (COSINE, "x0"),
]


@dataclass(frozen=True)
class ExactJumps:
    """A "network" of exact jumps in data that are all N(mean, std^2), by any kind of prediction.

    The way of x keeps its distance to the mean in standard deviations; where std is 0, it is the
    straight line to the one image that there is.
    """

    schedule: NoiseSchedule
    prediction: PredictionName
    mean: float = 0.3
    std: float = 0.5
    off: float = 0.0  # added to what it puts out

    def __call__(self, seen: Tensor, told: Tensor, jump: Tensor | None = None) -> Tensor:
        rule = get_prediction(self.prediction, self.schedule)
        t = told if self.prediction != "edm" else self._timestep(told)
        signal, sigma = self.schedule.rates(t, seen)
        x = seen / rule.scaled_input(torch.ones_like(seen), signal, sigma)
        at = torch.zeros_like(t) if jump is None else jump.to(x)
        to = (t - at).clamp(min=CLEAN)  # not below it by rounding
        end_signal, end_sigma = self.schedule.rates(to, seen)
        before, after = (
            torch.sqrt((s * self.std) ** 2 + n**2)
            for s, n in ((signal, sigma), (end_signal, end_sigma))
        )
        end = end_signal * self.mean + after / before * (x - signal * self.mean)
        turn = signal * end_sigma - sigma * end_signal
        here = GaussianDenoiser(self.schedule, self.mean, self.std)(x, t)
        jumped = (at != 0).view(-1, 1, 1, 1)
        x0 = torch.where(jumped, (end_sigma * x - sigma * end) / turn, here.x0)
        eps = torch.where(jumped, (signal * end - end_signal * x) / turn, here.eps)
        return rule.target(x0, eps, signal, sigma) + self.off

    def _timestep(self, told: Tensor) -> Tensor:
        return torch.from_numpy(self.schedule.timesteps_at(4 * told.numpy()))


def drawn(schedule: NoiseSchedule, n: int = 64, std: float = 0.5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(1, schedule.steps - 1, n).long()
    near, to = jumps(schedule, t, torch.rand(n, generator=g))
    x0, noise = (torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return 0.3 + std * x0, t, near, to, noise


@pytest.mark.parametrize(("schedule", "prediction"), KINDS)
def test_the_loss_asks_for_exact_jumps(schedule: NoiseSchedule, prediction: PredictionName) -> None:
    """For data of one point, where every way is straight, to the last digit; for a Gaussian as
    nearly as the teacher's first part of the way is straight; and a network that is off is not."""
    losses = []
    for std, off in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.1)):
        network = ExactJumps(schedule, prediction, std=std, off=off)
        teacher = GaussianDenoiser(schedule, std=std, prediction=prediction)
        losses.append(jump_loss(network, teacher, *drawn(schedule, std=std)))
    assert losses[0].max() < 1e-6
    assert losses[1].mean() < 0.3 * losses[2].mean()


def test_the_target_is_the_mean_velocity_of_meanflow() -> None:
    """Its identity (eq. 6), u = v - (s - r) du/ds along the way, by a numerical derivative."""
    g = torch.Generator().manual_seed(0)
    network = ExactJumps(FLOW, "flow")
    z = torch.randn(1, 1, 4, 4, generator=g, dtype=torch.float64)
    s, r, h = 0.7, 0.2, 1e-5

    def u(z: Tensor, s: float, r: float) -> Tensor:
        t, to = (torch.tensor([1000 * q - 1], dtype=torch.float64) for q in (s, r))
        return network(z, t, t - to)

    v = u(z, s, s)
    slope = (u(z + h * v, s + h, r) - u(z - h * v, s - h, r)) / (2 * h)
    assert_close(u(z, s, r), v - (s - r) * slope, rtol=1e-4, atol=1e-4)
    # And the first of the way with the rest of it is the whole, as of any displacement.
    first = (s - r) * TEACHER_SHARE
    on = z - first * u(z, s, s - first)
    whole = first * u(z, s, s - first) + (s - first - r) * u(on, s - first, r)
    assert_close((s - r) * u(z, s, r), whole)


@pytest.mark.parametrize("schedule", [COSINE, FLOW, NoiseSchedule(kind="edm", steps=50)])
def test_half_of_the_jumps_stay_and_half_of_the_others_lead_to_the_image(
    schedule: NoiseSchedule,
) -> None:
    t = torch.arange(schedule.steps).repeat_interleave(2000 // schedule.steps)
    u = torch.rand(len(t), generator=torch.Generator().manual_seed(0))
    near, to = jumps(schedule, t, u)
    stays = to == t
    assert stays[u < 0.5].all()
    assert near[stays].equal(t[stays].float())
    assert (to[(u >= 0.5) & (u < 0.75)] == CLEAN).all()
    further = u > 0.75
    assert ((to[further] >= CLEAN) & (to[further] < t[further])).all()
    assert ((near <= t) & (near >= 0)).all()
    angle = [torch.atan2(*reversed(schedule.levels(q.double()))) for q in (t, near, to)]
    inside = further & (to >= 0) & (near > 0)
    part = ((angle[0] - angle[1]) / (angle[0] - angle[2]))[inside]
    assert_close(part, torch.full_like(part, TEACHER_SHARE), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_exact_jumps_sample_a_gaussian_in_any_number_of_evaluations(n: int) -> None:
    exact = Denoiser(ExactJumps(COSINE, "v"), COSINE, "v")
    noise = NoiseSource([0])
    x = noise.draw((1, 200, 200))
    timesteps = COSINE.timesteps(n)
    made = finish(sample(exact, x, timesteps, "jump", noise=noise))
    assert made.mean().item() == pytest.approx(0.3, abs=0.02)
    assert made.std().item() == pytest.approx(0.5, abs=0.02)
    assert count_evaluations("jump", timesteps, COSINE) == n
    # What the same many steps of a denoiser without jumps do not reach.
    plain = finish(sample(exact, x, timesteps, "ddim"))
    assert abs(plain.std().item() - 0.5) > 0.05 or n > 2


def test_no_jump_is_the_plain_denoiser() -> None:
    network = ExactJumps(COSINE, "v")
    denoiser = Denoiser(network, COSINE, "v")
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    plain: Any = denoiser(x, 500)
    same: Denoised = denoiser(x, 500, 500)
    assert_close(same.x0, plain.x0)
    assert_close(same.eps, plain.eps)
