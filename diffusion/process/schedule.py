"""`NoiseSchedule`: how much signal and how much noise an image has at each timestep.

    q(x_t | x_0) = N(signal_t x_0, noise_t^2 I)                              DDPM, eq. 4

with signal_t = sqrt(alpha_bar_t) and noise_t = sqrt(1 - alpha_bar_t). Timesteps are counted from 0,
as networks are told them: timestep t is step t + 1 of the paper (arXiv 2006.11239), T - 1 is the
noisiest, and CLEAN = -1 is the image without noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unet.errors import InputError

Kind = Literal["linear", "scaled-linear", "cosine", "sigmoid", "flow", "edm"]
Spacing = Literal["trailing", "leading", "linspace", "karras", "logsnr"]

CLEAN = -1
MOST_STEPS = 100_000
_LARGEST_BETA = 0.999  # Improved DDPM, sec. 3.2
_RHO = 7.0  # EDM, sec. 3: more, shorter steps at low noise
_SPACED = (40.0, 0.02)  # sigmas between which logsnr spaces its steps: docs/experiments.md
_FEWEST_SPACED = 4  # steps, of which two or more lie between the noisiest level and the cleanest
_EDM_SIGMAS = 0.002, 80.0  # EDM, table 1


class Level(NamedTuple):
    """A noise level: two numbers, or two tensors of one shape. signal^2 + noise^2 = 1."""

    signal: Any
    noise: Any

    @property
    def sigma(self) -> float:
        """Noise per signal, EDM's sigma (arXiv 2206.00364); inf where no signal is left."""
        return self.noise / self.signal if self.signal else math.inf

    @property
    def flow_time(self) -> Any:
        """s of the straight path (1 - s) x0 + s eps that has this much noise per signal."""
        return self.noise / (self.signal + self.noise)

    @property
    def half_log_snr(self) -> float:
        """log(signal / noise), lambda in DPM-Solver (arXiv 2206.00927)."""
        return -math.log(self.sigma) if self.noise else math.inf


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(x0_factor x_0 + x_factor x_t, variance I), for s less noisy than t.

    Numbers, or tensors of one shape.
    """

    x0_factor: Any
    x_factor: Any
    variance: Any
    beta: Any  # 1 - alpha_bar_t / alpha_bar_s: the variance of q(x_t | x_s)


def posterior(at: Level, to: Level) -> Posterior:
    """From level `at` to the less noisy `to`: DDPM, eq. 6 and 7, for any two levels.

    Sampling with fewer levels ("respacing") is nothing else than choosing a subsequence of them.
    """
    kept = at.signal / to.signal
    beta = 1 - kept**2
    return Posterior(
        x0_factor=to.signal * beta / at.noise**2,
        x_factor=kept * to.noise**2 / at.noise**2,
        variance=beta * to.noise**2 / at.noise**2,
        beta=beta,
    )


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise of T timesteps. Equal settings are the same schedule; saved with the model.

    Raises:
        InputError: a setting out of range.
    """

    kind: Kind = "linear"
    """linear: DDPM's betas; scaled-linear: Stable Diffusion's, whose square roots are linear;
    cosine: Improved DDPM's (arXiv 2102.09672, eq. 17); sigmoid: betas along a sigmoid, as in the
    code of GeoDiff (arXiv 2203.02923); flow: the straight path (1 - s) x0 + s eps of flow matching
    (arXiv 2210.02747) with s = (t + 1) / T, of the same noise per signal; edm: sigma^(1/7) from
    0.002 to 80 in equal strides (arXiv 2206.00364, eq. 5).

    x has variance 1 for data of variance 1 in all of them: on the straight path, and in EDM's
    units, it is scaled, which `Prediction.scaled_input` undoes for the network."""

    steps: int = 1000
    """Timesteps T."""

    beta_start: float = 1e-4
    """First beta for T = 1000, of the kinds that are made of betas; scaled by 1000 / T, so that any
    number of timesteps ends at about the same noise."""

    beta_end: float = 0.02
    """Last beta for T = 1000, likewise."""

    zero_snr: bool = False
    """No signal at all at the last timestep (arXiv 2305.08891, alg. 1)."""

    @property
    def said(self) -> str:
        """In words: "flow, 1000 levels", with what else is not as usual."""
        usual = NoiseSchedule(kind=self.kind, steps=self.steps)
        parts = [self.kind, f"{self.steps} levels"]
        if (self.beta_start, self.beta_end) != (usual.beta_start, usual.beta_end):
            parts.append(f"betas from {self.beta_start:g} to {self.beta_end:g}")
        if self.zero_snr:
            parts.append("no signal at the last")
        return ", ".join(parts)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise InputError(f"noise schedule {self.kind!r} is unknown; choose one of {kinds}")
        if type(self.steps) is not int or not 2 <= self.steps <= MOST_STEPS:
            raise InputError(
                f"a noise schedule needs a whole number of steps from 2 to {MOST_STEPS}, "
                f"not {self.steps!r}"
            )
        betas = (self.beta_start, self.beta_end)
        if not all(isinstance(b, (int, float)) for b in betas) or not 0 < betas[0] <= betas[1] < 1:
            raise InputError(
                f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, not {betas}"
            )
        if not isinstance(self.zero_snr, bool):
            raise InputError(f"zero_snr must be true or false, not {self.zero_snr!r}")
        if self.zero_snr and self.kind == "flow":
            raise InputError(
                "zero_snr is for schedules that end with some signal, and flow ends without: leave "
                "it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that `to_dict` described."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(settings, Mapping) or (set(settings) - set(known)):
            raise InputError(
                f"{settings!r} is no noise schedule, which holds nothing but {', '.join(known)}"
            )
        return cls(**settings)

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal at all is left at the last timestep."""
        return self.zero_snr or self.kind == "flow"

    # ------------------------------------------------------------------------------------------
    # Tables, (T,) float64

    @cached_property
    def betas(self) -> Tensor:
        """Variance of q(x_t | x_{t-1})."""
        return torch.from_numpy(1 - np.append(self._alpha_bar[0], _ratios(self._alpha_bar)))

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Share of the signal in the variance: the product of 1 - beta up to t."""
        return torch.from_numpy(self._alpha_bar)

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(alpha_bar)."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noise(self) -> Tensor:
        """sqrt(1 - alpha_bar)."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def _alpha_bar(self) -> np.ndarray:
        if self.kind == "flow":
            return np.asarray(self._straight(np.arange(self.steps)).signal ** 2)
        if self.kind == "cosine":
            along = np.arange(self.steps + 1) / self.steps
            betas = 1 - _ratios(np.cos((along + 0.008) / 1.008 * np.pi / 2) ** 2)
        elif self.kind == "edm":
            smallest, largest = (sigma ** (1 / _RHO) for sigma in _EDM_SIGMAS)
            sigmas = np.linspace(smallest, largest, self.steps) ** _RHO
            betas = 1 - _ratios(np.append(1.0, 1 / (1 + sigmas**2)))
        elif self.kind == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.steps)
        elif self.kind == "scaled-linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2
        else:
            rise = 1 / (1 + np.exp(-np.linspace(-6, 6, self.steps)))
            betas = self.beta_start + rise * (self.beta_end - self.beta_start)
        if self.kind not in ("cosine", "edm"):
            betas = betas * (1000 / self.steps)
        if self.kind != "edm":  # whose last level is far from no signal
            betas = np.minimum(betas, _LARGEST_BETA)
        alpha_bar = np.cumprod(1 - betas)
        if self.zero_snr:
            signal = np.sqrt(alpha_bar)
            signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
            alpha_bar = signal**2
        return alpha_bar

    def _straight(self, t: Any) -> Level:
        """1 - s and s of the straight path at timesteps, scaled to a level."""
        signal, noise = (self.steps - 1 - t) / self.steps, (t + 1) / self.steps
        size = (signal**2 + noise**2) ** 0.5
        return Level(signal / size, noise / size)

    # ------------------------------------------------------------------------------------------
    # Levels

    def levels(self, t: Tensor, dtype: torch.dtype = torch.float64) -> Level:
        """The noise levels of timesteps, two tensors of the shape of t, on its device.

        Args:
            t: whole or fractional timesteps from 0 to T - 1, or CLEAN. In between, log(sigma) is
                interpolated linearly, so that every sigma has its timestep (see `timestep`); of
                flow, the formula holds.

        Raises:
            InputError: a timestep beyond these; on a GPU it is PyTorch that fails, later.
        """
        low = t.floor().long()
        known = _table(self, t.device, dtype)
        try:
            exact = Level(*F.embedding(low - CLEAN, known).unbind(-1))
        except IndexError as error:
            raise InputError(
                f"a timestep is beyond this noise schedule, whose {self.steps} are 0 to "
                f"{self.steps - 1}; {CLEAN} is the image without noise"
            ) from error
        if not t.is_floating_point():
            return exact
        if self.kind == "flow":
            between = self._straight(t.to(dtype))
        else:
            start = low.clamp(0, self.steps - 2)
            log_sigma = (known[1:, 1] / known[1:, 0]).log()
            share = t.to(dtype) - start
            sigma = (log_sigma[start] + share * (log_sigma[start + 1] - log_sigma[start])).exp()
            between = Level((1 + sigma**2) ** -0.5, (1 + sigma**-2) ** -0.5)
        return Level(*(torch.where(t == low, *pair) for pair in zip(exact, between, strict=True)))

    def level(self, t: float) -> Level:
        """The noise level of one timestep, as two floats."""
        signal, noise = self.levels(torch.tensor(t, dtype=torch.float64))
        return Level(signal.item(), noise.item())

    def rates(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) at timesteps t (B,) or one for all, to multiply images (B, C, H, W) with.

        They are (B, 1, 1, 1) or (1, 1, 1, 1), on the device and in the dtype of `like` (B, C, H,
        W), but never in half precision.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1, *(1,) * (like.ndim - 1))
        if isinstance(t, Tensor):
            level = self.levels(t.to(like.device), dtype)
            return level.signal.view(shape), level.noise.view(shape)
        signal, noise = self.level(t)
        one = (1,) * like.ndim
        return like.new_full(one, signal, dtype=dtype), like.new_full(one, noise, dtype=dtype)

    def q_sample(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """x_t of images x0 (B, C, H, W) and standard normal noise of that shape: DDPM, eq. 4."""
        signal, sigma = self.rates(t, x0)
        return signal * x0 + sigma * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of timesteps, float32 of t's shape."""
        level = self.levels(t, torch.float32)
        return (level.signal / level.noise) ** 2

    def timestep(self, sigma: float) -> float:
        """The fractional timestep whose level has this sigma, or the nearest that there is."""
        t = self.timesteps_at(np.log(sigma))
        return round(float(t), 9)  # so that the sigma of a whole timestep leads back to it

    def timesteps_at(self, log_sigma: Any) -> NDArray[np.float64]:
        """The fractional timesteps of these log(sigma), or the nearest that there are."""
        if self.kind == "flow":
            s = scipy.special.expit(log_sigma)  # as sigma = s / (1 - s)
            return np.clip(s * self.steps - 1, 0, self.steps - 1)
        with np.errstate(divide="ignore"):  # of no signal
            known = np.log(self.noise.numpy() / self.signal.numpy())
        return np.asarray(np.interp(log_sigma, known, np.arange(self.steps)))

    def chain(self, timesteps: Sequence[float]) -> Posterior:
        """The posteriors of a run's moves, from each timestep to the next and at last to CLEAN.

        Args:
            timesteps: n of them, descending.

        Returns:
            A posterior of float64 tensors (n,).
        """
        t = torch.tensor([*timesteps, CLEAN], dtype=torch.float64)
        signal, noise = self.levels(t)
        return posterior(Level(signal[:-1], noise[:-1]), Level(signal[1:], noise[1:]))

    # ------------------------------------------------------------------------------------------
    # Respacing

    def timesteps(
        self, n: int, spacing: Spacing = "trailing", *, offset: int = 0, shift: float = 1.0
    ) -> list[float]:
        """The n timesteps at which a sampling run asks the network, descending.

        Args:
            n: from 1 to T.
            spacing: "trailing" (from T - 1 in equal strides), "leading" (multiples of T // n, so
                that it starts below T - 1) and "linspace" (from T - 1 to 0) are those of arXiv
                2305.08891, table 2, and whole numbers; "karras" spaces sigma^(1/7) evenly between
                the largest and the smallest sigma (EDM, eq. 5), at fractional timesteps; "logsnr"
                goes from T - 1 to sigma 40 and spaces log(sigma) evenly down to 0.02, as far as
                there are such (DPM-Solver, arXiv 2206.00927, sec. 3.4, between other ends), but is
                "trailing" below 4 steps, of which its two ends would leave next to none in between.
            offset: added to "leading"; Stable Diffusion's `steps_offset` is 1.
            shift: above 1, more of the steps are at high noise: u = (t + 1) / T becomes
                shift u / (1 + (shift - 1) u), at fractional timesteps; of flow, every sigma is
                multiplied by it (arXiv 2403.03206, eq. 23).

        Raises:
            InputError: more steps than timesteps, an unknown spacing, "karras" where the largest
                sigma is infinite (zero_snr, flow), an offset beyond the schedule, a shift below 1,
                or one of "karras".
        """
        if not 1 <= n <= self.steps:
            raise InputError(
                f"{n} sampling steps are asked for, but this model's noise schedule has "
                f"{self.steps} timesteps: choose from 1 to {self.steps}"
            )
        if spacing not in get_args(Spacing):
            spacings = ", ".join(get_args(Spacing))
            raise InputError(f"timestep spacing {spacing!r} is unknown; choose one of {spacings}")
        if offset and spacing != "leading":
            raise InputError(f"an offset ({offset}) is for leading timesteps, not {spacing} ones")
        by_sigma = spacing in ("karras", "logsnr")
        if not 1 <= shift < math.inf or (shift > 1 and by_sigma):
            raise InputError(
                f"shift {shift} must be a number of 1 or more, and 1 with karras and logsnr "
                "spacing, which say themselves how the steps are spread"
            )
        if spacing == "karras":
            return self._karras(n)
        if spacing == "logsnr" and n >= _FEWEST_SPACED:
            return self._logsnr(n)
        if spacing in ("trailing", "logsnr"):
            t = np.round(np.arange(self.steps, 0, -self.steps / n)[:n]) - 1
        elif spacing == "leading":
            t = np.arange(n)[::-1] * (self.steps // n) + offset
            if not 0 <= t[-1] <= t[0] < self.steps:
                raise InputError(
                    f"offset {offset} moves the leading timesteps of {n} steps to {t[0]} ... "
                    f"{t[-1]}, but they must stay within 0 and {self.steps - 1}"
                )
        else:
            t = np.round(np.linspace(0, self.steps - 1, max(n, 2)))[::-1][:n]
        if shift > 1:
            u = (t + 1) / self.steps
            return (self.steps * shift * u / (1 + (shift - 1) * u) - 1).tolist()
        return t.astype(int).tolist()

    def _logsnr(self, n: int) -> list[float]:
        noisiest, cleanest = (self.level(t).sigma for t in (self.steps - 1, 0))
        above = [float(self.steps - 1)] if noisiest > _SPACED[0] else []
        start = min(noisiest, _SPACED[0])
        end = max(cleanest, start * _SPACED[1] / _SPACED[0])
        return [*above, *(self.timestep(s) for s in np.geomspace(start, end, n - len(above)))]

    def _karras(self, n: int) -> list[float]:
        if self.ends_in_noise:
            why = "flow" if self.kind == "flow" else "zero_snr"
            raise InputError(
                f"karras spacing needs a finite largest sigma, but with {why} the last timestep "
                "has no signal: choose trailing spacing"
            )
        largest, smallest = (self.level(t).sigma ** (1 / _RHO) for t in (self.steps - 1, 0))
        sigmas = np.linspace(largest, smallest, n) ** _RHO
        return [self.timestep(sigma) for sigma in sigmas]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _table(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signal and noise of a clean image and then of every timestep, (1 + T, 2).

    Kept, as copying it to a GPU waits for it.
    """
    levels = schedule.signal, schedule.noise
    if schedule.kind == "flow":  # more exact than by the variance
        levels = schedule._straight(torch.arange(schedule.steps, dtype=torch.float64))
    clean = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return torch.cat([clean, torch.stack(levels, 1)]).to(device, dtype)


def _ratios(values: np.ndarray) -> np.ndarray:
    """Each value by the one before it, so one fewer."""
    return values[1:] / values[:-1]
