"""The reverse process: one pure step for each sampler, and one loop over them that yields.

A step takes x from one noise level to a less noisy one, and sees a `Moment` alone. Since that holds
noise levels and no timesteps, a step is right for any subsequence of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.process.likelihood import Variance, model_variance
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised, DenoiserLike
from diffusion.process.schedule import CLEAN, Level, NoiseSchedule, posterior
from unet.errors import InputError

_FARTHEST = 200  # sigma from which Heun's step is corrected; the linear schedule ends at 157

SamplerName = Literal[
    "ddpm", "ddim", "euler", "heun", "flow-heun", "dpmpp-2m", "dpmpp-2m-sde", "jump"
]


@dataclass(frozen=True)
class Moment:
    """What a sampler's step may look at."""

    x: Tensor
    """(B, C, H, W), at level `at`."""

    now: Denoised
    """The denoiser's output for x."""

    at: Level
    """The level of x."""

    to: Level
    """The less noisy level that the step leads to."""

    before: tuple[Level, Tensor] | None
    """Level and predicted x0 of the step before, unless this is the first."""

    noise: Callable[[], Tensor]
    """Draws standard normal noise like x."""

    denoise: Callable[[Tensor], Denoised]
    """The denoiser at level `to`."""


# ----------------------------------------------------------------------------------------------
# Steps: a moment to x at level `to`


def ddpm_step(m: Moment, *, variance: Variance = "fixed-small") -> Tensor:
    """Draws from p(x_s | x_t): DDPM (arXiv 2006.11239), eq. 7 and alg. 2.

    The last step adds no noise.
    """
    q = posterior(m.at, m.to)
    mean = q.x0_factor * m.now.x0 + q.x_factor * m.x
    if m.to.noise == 0:
        return mean
    return mean + model_variance(variance, q, m.now.mix) ** 0.5 * m.noise()


def ddim_step(m: Moment, *, eta: float = 0.0) -> Tensor:
    """DDIM (arXiv 2010.02502), eq. 12 with the sigma of eq. 16.

    eta 0 is deterministic, eta 1 is DDPM with the variance "fixed-small".
    """
    variance = eta**2 * posterior(m.at, m.to).variance
    direction = math.sqrt(max(0.0, m.to.noise**2 - variance))  # not below 0 by rounding
    x = m.to.signal * m.now.x0 + direction * m.now.eps
    return x + math.sqrt(variance) * m.noise() if variance else x


def euler_step(m: Moment) -> Tensor:
    """Euler's step of the probability flow ODE dx/dsigma = eps, for x in units of its signal.

    EDM (arXiv 2206.00364), alg. 1 without its correction. In the units of DDPM it is the
    deterministic DDIM (arXiv 2010.02502, eq. 13 and 14), in which no level is infinitely far; on
    the straight path of flow matching, where ds is multiplied by eps - x0, it is the same step.
    """
    return ddim_step(m)


def heun_step(m: Moment) -> Tensor:
    """Heun's step of the same ODE: EDM (arXiv 2206.00364), alg. 1.

    Two evaluations of the network, but one in the last step, and in a step from next to no signal,
    as the cosine schedule begins with: over such a distance in sigma, the correction multiplies the
    errors of the network by thousands.
    """
    x = euler_step(m)
    if not _corrected(m.at, m.to):
        return x
    correction = (m.denoise(x).eps - m.now.eps) / 2
    return x + m.to.signal * (m.to.sigma - m.at.sigma) * correction


def _corrected(at: Level, to: Level) -> bool:
    return to.noise > 0 and at.sigma < _FARTHEST


def flow_heun_step(m: Moment) -> Tensor:
    """Heun's step of dx/ds = eps - x0, for x on the straight path of flow matching.

    Such an x is (1 - s) x0 + s eps, our x over signal + noise. No level is infinitely far in s, so
    steps from pure noise are corrected as well: all but the last one.
    """
    x = euler_step(m)
    if m.to.noise == 0:
        return x
    ahead = m.denoise(x)
    difference = (ahead.eps - ahead.x0) - (m.now.eps - m.now.x0)
    half = (m.to.flow_time - m.at.flow_time) / 2
    return x + (m.to.signal + m.to.noise) * half * difference


def dpmpp_2m_step(m: Moment) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095), alg. 2: DDIM towards an extrapolated x0."""
    ratio = m.to.noise / m.at.noise
    return ratio * m.x + (m.to.signal - ratio * m.at.signal) * _extrapolated_x0(m)


def dpmpp_2m_sde_step(m: Moment) -> Tensor:
    """The SDE form of DPM-Solver++(2M) (arXiv 2211.01095): DDPM towards an extrapolated x0."""
    return ddpm_step(replace(m, now=m.now._replace(x0=_extrapolated_x0(m))))


def _extrapolated_x0(m: Moment) -> Tensor:
    """x0 in the middle of the step, on the line through this and the last x0 over log(SNR) / 2.

    The plain x0 in the first step, and in one to the clean image, which is infinitely far.
    """
    if m.before is None or m.to.noise == 0:
        return m.now.x0
    level, x0 = m.before
    last = m.at.half_log_snr - level.half_log_snr  # h_{i-1}
    step = m.to.half_log_snr - m.at.half_log_snr  # h_i
    return m.now.x0 + (step / (2 * last)) * (m.now.x0 - x0)


def jump_step(m: Moment) -> Tensor:
    """To the image at once, and back to level `to` with fresh noise: arXiv 2303.01469, alg. 1.

    The denoiser was asked for a jump to the image, whose x0 is a sample and no mean of many.
    """
    x = m.to.signal * m.now.x0
    return x + m.to.noise * m.noise() if m.to.noise else x


# ----------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Churn:
    """Noise that is added before each step: EDM (arXiv 2206.00364), alg. 2."""

    churn: float = 0.0
    """S_churn: sigma is multiplied by 1 + churn / n, at most by sqrt(2), as far as the schedule's
    noisiest level; 0: not at all."""

    churn_interval: tuple[float, float] = (0.0, math.inf)
    """S_min and S_max, the sigmas between which this is done."""

    churn_noise: float = 1.0
    """S_noise, the standard deviation of this noise, and of no other in a run."""

    def __post_init__(self) -> None:
        if not 0 <= self.churn < math.inf or not 0 < self.churn_noise < math.inf:
            raise InputError(
                f"churn {self.churn} must be 0 or more, and churn_noise {self.churn_noise} above 0"
            )
        if not self.churn_interval[0] < self.churn_interval[1]:
            raise InputError(
                f"churn_interval {self.churn_interval} is empty: give lowest < highest sigma"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Churn:
        """What a sampler's options say of it."""
        return cls(**{name: options[name] for name in CHURN if name in options})

    def moves(
        self, schedule: NoiseSchedule, times: Sequence[float]
    ) -> list[tuple[float, float, float]]:
        """From and to which timestep a run goes, with the moves up of churn before its steps down;
        and the standard deviation of the noise that a move up adds, which is 1 but for churn.
        """
        downs = sum(t > to for t, to in pairwise(times))
        factor = 1 + min(self.churn / downs, math.sqrt(2) - 1)
        lowest, highest = self.churn_interval
        moves = []
        for t, to in pairwise(times):
            sigma = schedule.level(t).sigma
            if to < t and factor > 1 and lowest <= sigma <= highest:
                noisier = schedule.timestep(factor * sigma)
                if noisier > t:
                    moves.append((t, noisier, self.churn_noise))
                    t = noisier
            moves.append((t, to, 1.0))
        return moves


CHURN = tuple(field.name for field in fields(Churn))


@dataclass(frozen=True)
class Sampler:
    """A step function, and what it costs."""

    step: Callable[..., Tensor]
    evaluations: Callable[[Level, Level], int]
    """Evaluations of the network in a step from one noise level to another."""

    draws_noise: Callable[[Mapping[str, Any]], bool]
    """Whether the run is random beyond its start, by the options."""

    churns: bool = False
    """Whether it has the options of `Churn`."""

    jumps: bool = False
    """Whether the denoiser is asked for a jump to the image."""


def _one(at: Level, to: Level) -> int:
    return 1


def _if_churned(options: Mapping[str, Any]) -> bool:
    return options.get("churn", 0.0) > 0


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler(ddpm_step, _one, lambda options: True),
    "ddim": Sampler(ddim_step, _one, lambda options: options.get("eta", 0.0) > 0),
    "euler": Sampler(euler_step, _one, _if_churned, churns=True),
    "heun": Sampler(heun_step, lambda at, to: 1 + _corrected(at, to), _if_churned, churns=True),
    "flow-heun": Sampler(
        flow_heun_step, lambda at, to: 1 + (to.noise > 0), _if_churned, churns=True
    ),
    "dpmpp-2m": Sampler(dpmpp_2m_step, _one, lambda options: False),
    "dpmpp-2m-sde": Sampler(dpmpp_2m_sde_step, _one, lambda options: True),
    "jump": Sampler(jump_step, _one, lambda options: True, jumps=True),
}


def get_sampler(name: SamplerName, options: Mapping[str, Any]) -> Sampler:
    """The sampler of a name, its step with the options filled in.

    Raises:
        InputError: an unknown sampler, an option that it does not have or that is out of range.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    _, *known = inspect.signature(sampler.step).parameters
    known += CHURN * sampler.churns
    for option, value in options.items():
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"sampler {name!r} has no option {option} (given {value}); {has}")
    if not 0 <= options.get("eta", 0.0) <= 1:
        raise InputError(f"eta must be from 0 (DDIM) to 1 (DDPM), not {options['eta']}")
    Churn.of(options)  # which checks it
    return replace(sampler, step=partial(sampler.step, **_of_step(options)))


def _of_step(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in CHURN}


def count_evaluations(
    name: SamplerName, timesteps: Sequence[float], schedule: NoiseSchedule, **options: Any
) -> int:
    """Evaluations of the network in a run to the clean image, jumps back up not counted."""
    evaluations = get_sampler(name, options).evaluations
    return sum(
        evaluations(schedule.level(t), schedule.level(to))
        for t, to, _ in Churn.of(options).moves(schedule, [*timesteps, CLEAN])
        if t >= to
    )


# ----------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Step:
    """What a run yields after each step."""

    index: int
    """From 0."""

    t: float
    """The timestep that the step went to; CLEAN after the last."""

    x: Tensor
    """(B, C, H, W), at that timestep."""

    x0: Tensor
    """(B, C, H, W), the denoiser's image before the step."""


def sample(
    denoiser: DenoiserLike,
    x: Tensor,
    timesteps: Sequence[float],
    sampler: SamplerName = "ddim",
    *,
    noise: NoiseSource | None = None,
    conditioning: Mapping[str, Any] | None = None,
    end: float = CLEAN,
    constrain: Callable[[Tensor, float], Tensor] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Takes x from the first timestep down to the end, and yields after each step.

    Args:
        x: (B, C, H, W) at the first timestep: noise, if it is the noisiest; or an image with noise,
            since a run may start anywhere.
        timesteps: such as `schedule.timesteps(50)`. Where they rise, x is noised again without the
            network (RePaint's jumps).
        noise: the source of the noise within the run, for samplers that draw some. Not a second
            source of the seeds that x was drawn from: that would repeat the same noise.
        conditioning: passed on to the denoiser.
        end: the level that the last step goes to. 0 is Stable Diffusion's `set_alpha_to_one=False`
            and `final_sigmas_type="sigma_min"`, which stop at the noise of timestep 0.
        constrain: takes x and its timestep after each step, and returns what to go on with.
        options: of the sampler: `eta` of "ddim", `variance` of "ddpm", the fields of `Churn` of
            "euler", "heun" and "flow-heun".

    Raises:
        InputError: before the first step: an unknown sampler or option, timesteps beyond the
            schedule, a sampler that draws noise without a source of it.
    """
    chosen = get_sampler(sampler, options)
    times = [*timesteps, end]
    last = denoiser.schedule.steps - 1
    for t in timesteps if end == CLEAN else times:
        if not 0 <= t <= last:
            raise InputError(f"timestep {t} is beyond the noise schedule, which has 0 to {last}")
    if len(times) < 2 or end >= times[-2]:
        raise InputError(f"a run needs timesteps above its end {end}, not {list(timesteps)}")
    if noise is None and (chosen.draws_noise(options) or sorted(times, reverse=True) != times):
        raise InputError(f"sampler {sampler!r} draws noise: give it a source, NoiseSource(seeds)")
    if noise is not None:
        noise.check(x)
    moves = Churn.of(options).moves(denoiser.schedule, times)
    given = dict(conditioning or {})
    if chosen.jumps:
        given["to"] = CLEAN
    return _run(denoiser, x, moves, chosen.step, noise, given, constrain)


@torch.no_grad()
def _run(
    denoiser: DenoiserLike,
    x: Tensor,
    moves: Iterable[tuple[float, float, float]],
    step: Callable[[Moment], Tensor],
    noise: NoiseSource | None,
    conditioning: dict[str, Any],
    constrain: Callable[[Tensor, float], Tensor] | None,
) -> Iterator[Step]:
    def draw() -> Tensor:
        assert noise is not None  # `sample` has seen to it
        return noise.like(x)

    index, before = 0, None
    for t, goal, deviation in moves:
        at, to = denoiser.schedule.level(t), denoiser.schedule.level(goal)
        if goal > t:
            kept = to.signal / at.signal
            added = deviation * math.sqrt(to.noise**2 - (kept * at.noise) ** 2)
            x, before = kept * x + added * draw(), None
            continue
        now = denoiser(x, t, **conditioning)
        ahead = partial(denoiser, t=goal, **conditioning)
        x = step(Moment(x, now, at, to, before, draw, ahead))
        if constrain is not None:
            x = constrain(x, goal)
        before = (at, now.x0)
        yield Step(index, goal, x, now.x0)
        index += 1


def finish(run: Iterable[Step]) -> Tensor:
    """The x (B, C, H, W) that a run ends with."""
    for step in run:
        x = step.x
    return x
