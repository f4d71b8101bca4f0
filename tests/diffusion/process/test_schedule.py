from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from diffusion.process.noise import SEEDS, NoiseSource
from diffusion.process.schedule import (
    CLEAN,
    MOST_STEPS,
    Kind,
    Level,
    NoiseSchedule,
    Spacing,
    posterior,
)
from unet.errors import InputError

KINDS: list[tuple[Any, str]] = [
    ("linear", "linear"),
    ("scaled-linear", "scaled_linear"),
    ("cosine", "squaredcos_cap_v2"),
    ("sigmoid", "sigmoid"),
]
ZERO_SNR = NoiseSchedule(kind="scaled-linear", zero_snr=True)


# ----------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_tables_are_those_of_diffusers(kind: Any, theirs: str) -> None:
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    ours, other = NoiseSchedule(kind=kind, **ends), DDPMScheduler(beta_schedule=theirs, **ends)
    assert_close(ours.betas.float(), other.betas, atol=1e-6, rtol=0)
    assert_close(ours.alpha_bar.float(), other.alphas_cumprod, atol=1e-6, rtol=0)
    # Zero terminal SNR by their function in float64: in float32, as they call it, it errs by 4e-6.
    zero = NoiseSchedule(kind=kind, **ends, zero_snr=True)
    rescaled = rescale_zero_terminal_snr(ours.betas)
    assert_close(zero.betas, rescaled, atol=1e-6, rtol=0)
    assert_close(zero.alpha_bar, (1 - rescaled).cumprod(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "_"), KINDS)
@pytest.mark.parametrize("steps", [2, 10, 100, 1000, 4000])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_any_number_of_timesteps_is_a_schedule(
    kind: Any, _: str, steps: int, zero_snr: bool
) -> None:
    s = NoiseSchedule(kind=kind, steps=steps, zero_snr=zero_snr)
    assert s.alpha_bar.shape == s.betas.shape == s.signal.shape == s.noise.shape == (steps,)
    assert s.alpha_bar.dtype == torch.float64
    assert (s.alpha_bar.diff() < 0).all()
    assert s.alpha_bar[0] < 1
    assert (s.alpha_bar[-1] == 0) == zero_snr
    assert_close((1 - s.betas).cumprod(0), s.alpha_bar, rtol=1e-9, atol=1e-12)
    assert_close(s.signal**2 + s.noise**2, torch.ones_like(s.alpha_bar))


def test_fewer_timesteps_end_at_the_same_noise() -> None:
    for kind in ("linear", "scaled-linear", "sigmoid"):
        ends = [NoiseSchedule(kind=kind, steps=n).level(n - 1) for n in (100, 1000, 4000)]
        assert max(e.half_log_snr for e in ends) - min(e.half_log_snr for e in ends) < 0.5


def test_zero_snr_keeps_the_first_level_and_takes_all_signal_of_the_last() -> None:
    plain = NoiseSchedule(kind="scaled-linear")
    assert ZERO_SNR.signal[0] == pytest.approx(plain.signal[0].item(), abs=1e-15)
    assert ZERO_SNR.level(999) == (0.0, 1.0)
    assert ZERO_SNR.level(999).sigma == math.inf
    assert ZERO_SNR.level(999).half_log_snr == -math.inf


# ----------------------------------------------------------------------------------------------
# Levels


def test_rates_broadcast_to_images_in_full_precision() -> None:
    s = NoiseSchedule()
    x = torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 500, 999])
    for like, dtype in ((x, x.dtype), (x.double(), torch.float64), (x.bfloat16(), torch.float32)):
        signal, noise = s.rates(t, like)
        assert signal.dtype == noise.dtype == dtype
        assert_close(signal, s.signal[t].to(dtype).view(3, 1, 1, 1))
        assert_close(noise, s.noise[t].to(dtype).view(3, 1, 1, 1))
    assert_close(s.rates(500, x), tuple(r[1:2] for r in s.rates(t, x)))
    assert s.rates(CLEAN, x) == (1, 0)


def test_q_sample_is_the_formula_of_ddpm() -> None:
    s = NoiseSchedule(kind="cosine", steps=100)
    x0, noise = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    t = torch.tensor([7, 93])
    theirs = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2").add_noise(x0, noise, t)
    assert_close(s.q_sample(x0, t, noise), theirs, atol=1e-6, rtol=1e-6)
    assert_close(s.q_sample(x0, CLEAN, noise), x0)
    assert_close(s.snr(t), ((s.signal / s.noise) ** 2)[t].float())


@pytest.mark.parametrize(("kind", "_"), KINDS)
def test_one_jump_has_the_distribution_of_many_small_steps(kind: Any, _: str) -> None:
    """Small steps are x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z: DDPM, eq. 2."""
    s = NoiseSchedule(kind=kind, steps=50)
    x = jump = torch.full((1, 1, 300, 300), 0.7)
    factor, variance = 1.0, 0.0
    g = torch.Generator().manual_seed(0)
    for t in range(50):
        beta = s.betas[t].item()
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape, generator=g)
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        assert s.level(t) == pytest.approx((factor, math.sqrt(variance)), abs=1e-12)
        if t in (0, 9, 49):
            once = s.q_sample(jump, t, torch.randn(x.shape, generator=g))
            assert abs(x.mean() - once.mean()) < 0.02
            assert abs(x.std() / once.std() - 1) < 0.02


@given(t=st.floats(0, 999), low=st.integers(0, 998))
def test_fractional_timesteps_lie_between_whole_ones(t: float, low: int) -> None:
    s = NoiseSchedule()
    level = s.level(t)
    assert level.signal**2 + level.noise**2 == pytest.approx(1)
    between = [s.level(math.floor(t)).noise, level.noise, s.level(math.ceil(t)).noise]
    assert between == pytest.approx(sorted(between))
    assert s.timestep(level.sigma) == pytest.approx(t, abs=1e-6)
    middle = s.level(low + 0.5).sigma
    assert middle == pytest.approx(math.sqrt(s.level(low).sigma * s.level(low + 1).sigma))
    tensor = s.levels(torch.tensor([t, low, CLEAN], dtype=torch.float64))
    wanted = [level, s.level(low), Level(1, 0)]
    assert_close(torch.stack(list(tensor), 1), torch.tensor(wanted, dtype=torch.float64))


def test_fractions_before_a_timestep_without_signal_are_numbers() -> None:
    level = ZERO_SNR.levels(torch.tensor([997.5, 998.0, 998.5, 999.0]))
    assert (level.noise.diff() >= 0).all()
    assert level.signal[0] > level.signal[1] > 0
    assert level.noise[-1] == 1


@pytest.mark.parametrize("kind", get_args(Kind))
def test_timesteps_beyond_the_schedule_are_refused(kind: Any) -> None:
    s = NoiseSchedule(kind=kind, steps=100)
    signal, noise = s.levels(torch.tensor([CLEAN, 0, 99]))
    assert_close(signal, torch.tensor([1.0, *s.signal[[0, 99]]]).double())
    assert_close(noise, torch.tensor([0.0, *s.noise[[0, 99]]]).double())
    for t in (100, 100.0, -2, -1.5, math.nan):
        for wrong in (torch.tensor([5, t]), torch.tensor(t)):
            with pytest.raises(InputError, match=r"beyond this noise schedule, .* 0 to 99"):
                s.levels(wrong)


# ----------------------------------------------------------------------------------------------
# Posterior


@pytest.mark.parametrize(("high", "low"), [(1, 0), (999, 998), (700, 20), (999, 0), (33.25, 7.5)])
def test_posterior_is_the_product_of_the_two_gaussians(high: float, low: float) -> None:
    """Bayes: q(x_s | x_t, x_0) is q(x_t | x_s) q(x_s | x_0), normalised."""
    s = NoiseSchedule()
    at, to = s.level(high), s.level(low)
    kept = at.signal / to.signal
    beta = at.noise**2 - (kept * to.noise) ** 2  # Var(x_t | x_s), from Var(x_t | x_0)
    precision = 1 / to.noise**2 + kept**2 / beta
    q = posterior(at, to)
    assert q.beta == pytest.approx(beta)
    assert q.variance == pytest.approx(1 / precision)
    assert q.x0_factor == pytest.approx(to.signal / to.noise**2 / precision)
    assert q.x_factor == pytest.approx(kept / beta / precision)


def test_posterior_of_neighbours_is_that_of_ddpm() -> None:
    """DDPM, eq. 7, written with its own alphas and betas."""
    s = NoiseSchedule(steps=100)
    alpha_bar = s.alpha_bar.numpy()
    before, beta = np.append(1.0, alpha_bar[:-1]), s.betas.numpy()
    q = s.chain(range(99, CLEAN, -1))
    ours = [factor.flip(0).numpy() for factor in q]
    theirs = [
        np.sqrt(before) * beta / (1 - alpha_bar),
        np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar),
        (1 - before) / (1 - alpha_bar) * beta,
        beta,
    ]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)


def test_posterior_from_no_signal_forgets_x() -> None:
    q = posterior(ZERO_SNR.level(999), ZERO_SNR.level(500))
    level = ZERO_SNR.level(500)
    assert q == pytest.approx((level.signal, 0, level.noise**2, 1))


# ----------------------------------------------------------------------------------------------
# Timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [100, 1000])
def test_timesteps_are_those_of_diffusers(spacing: Any, steps: int) -> None:
    """At every n at which those of diffusers are n: their trailing ones are sometimes n + 1."""
    ours = NoiseSchedule(steps=steps)
    other = DDIMScheduler(steps, timestep_spacing=spacing)
    for n in range(2, steps + 1):
        other.set_timesteps(n)
        if len(other.timesteps) == n:
            assert ours.timesteps(n, spacing) == other.timesteps.tolist()


@given(steps=st.integers(2, 1200), data=st.data())
def test_timesteps_descend_within_the_schedule(steps: int, data: Any) -> None:
    s = NoiseSchedule(steps=steps)
    n = data.draw(st.integers(1, steps))
    for spacing in get_args(Spacing):
        t = s.timesteps(n, spacing)
        assert len(t) == n
        assert all(a > b for a, b in pairwise(t))
        assert 0 <= t[-1] <= t[0] <= steps - 1
        if spacing != "leading":
            assert t[0] == pytest.approx(steps - 1)
        if spacing != "karras" and (spacing != "logsnr" or n < 4):
            assert all(isinstance(value, int) for value in t)


def test_all_timesteps_are_all_timesteps() -> None:
    for spacing in ("leading", "trailing", "linspace"):
        assert NoiseSchedule(steps=37).timesteps(37, spacing) == list(range(36, -1, -1))


def test_an_offset_moves_leading_timesteps() -> None:
    assert NoiseSchedule().timesteps(4, "leading", offset=1) == [751, 501, 251, 1]


def test_karras_spacing_is_that_of_diffusers() -> None:
    """EulerDiscreteScheduler with linspace, whose largest and smallest sigma are the table's."""
    s = NoiseSchedule(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
    other = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=True,
        timestep_spacing="linspace",
    )
    other.set_timesteps(20)
    t = s.timesteps(20, "karras")
    assert_close(torch.tensor(t), other.timesteps, atol=1e-2, rtol=0)
    sigmas = torch.tensor([s.level(value).sigma for value in t])
    assert_close(sigmas, other.sigmas[:-1], atol=1e-6, rtol=1e-5)


def test_logsnr_spacing_is_even_in_log_sigma_below_the_noisiest_level() -> None:
    s = NoiseSchedule(kind="cosine")
    first, *rest = s.timesteps(12, "logsnr")
    assert first == 999
    sigmas = np.array([s.level(t).sigma for t in rest])
    assert sigmas[[0, -1]] == pytest.approx([40, 0.02], rel=1e-2)
    assert np.diff(np.log(sigmas)) == pytest.approx(np.log(0.02 / 40) / 10, rel=1e-2)


def test_logsnr_spacing_of_too_few_steps_for_both_its_ends_is_trailing() -> None:
    for kind in get_args(Kind):
        s = NoiseSchedule(kind=kind)
        assert all(s.timesteps(n, "logsnr") == s.timesteps(n, "trailing") for n in (1, 2, 3))
        assert s.timesteps(4, "logsnr") != s.timesteps(4, "trailing")


# ----------------------------------------------------------------------------------------------
# Noise


def test_noise_of_an_image_depends_on_its_seed_alone() -> None:
    together, alone = NoiseSource([5, 6, 7]), NoiseSource([7])
    for _ in range(3):
        assert_close(together.draw((2, 4, 4))[2:], alone.draw((2, 4, 4)), rtol=0, atol=0)
    draws = NoiseSource(range(4)).draw((1, 200, 200)).flatten(1)
    assert_close(torch.corrcoef(draws), torch.eye(4), atol=0.02, rtol=0)
    assert not NoiseSource([1]).draw((3,)).equal(NoiseSource([2]).draw((3,)))
    assert_close(NoiseSource(np.arange(5, 8)).draw((9,)), NoiseSource([5, 6, 7]).draw((9,)))
    with pytest.raises(InputError, match=f"seed {2**32 + 1} must be from 0 to {2**32 - 1}"):
        NoiseSource([1, 2**32 + 1])


def test_noise_for_images_is_of_their_kind_and_number() -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert_close(NoiseSource([1, 2]).like(x), NoiseSource([1, 2]).draw((3, 4, 4)).double())
    with pytest.raises(InputError, match="1 seed for 2 images"):
        NoiseSource([1]).like(x)


# ----------------------------------------------------------------------------------------------
# Saving, and mistakes


@pytest.mark.parametrize(("kind", "_"), KINDS)
def test_a_schedule_survives_json(kind: Any, _: str) -> None:
    s = NoiseSchedule(kind=kind, steps=77, beta_start=1e-3, beta_end=0.5, zero_snr=True)
    again = NoiseSchedule.from_dict(json.loads(json.dumps(s.to_dict())))
    assert again == s
    assert again.alpha_bar.equal(s.alpha_bar)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "quadratic"}, "'quadratic' is unknown.*scaled-linear"),
        ({"steps": 1}, "from 2 to 100000, not 1"),
        ({"steps": "1000"}, "not '1000'"),
        ({"steps": 1e3}, "not 1000.0"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_start": 0.1}, r"\(0.1, 0.02\)"),
        ({"beta_end": math.nan}, "nan"),
        ({"beta_end": "0.02"}, "'0.02'"),
        ({"zero_snr": "yes"}, "not 'yes'"),
        ({"beta": 0.1}, "nothing but kind, steps"),
        (["linear"], "is no noise schedule"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        NoiseSchedule.from_dict(settings)


def test_the_limits_themselves_are_allowed() -> None:
    assert len(NoiseSchedule(steps=MOST_STEPS).betas) == MOST_STEPS
    assert_close(
        NoiseSchedule(beta_start=0.01, beta_end=0.01).betas, torch.full((1000,), 0.01).double()
    )
    assert len(NoiseSource([0, SEEDS - 1]).draw((1,))) == 2
    with pytest.raises(InputError, match=f"not {MOST_STEPS + 1}"):
        NoiseSchedule(steps=MOST_STEPS + 1)
    for seed in (-1, SEEDS):
        with pytest.raises(InputError, match=f"seed {seed} must be"):
            NoiseSource([seed])


def test_equal_settings_are_the_same_schedule_for_ever() -> None:
    s = NoiseSchedule(kind="cosine", steps=50)
    assert len({s, NoiseSchedule(kind="cosine", steps=50), NoiseSchedule(kind="cosine")}) == 2
    with pytest.raises(FrozenInstanceError):
        s.steps = 60  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):  # which of five numbers would be which?
        NoiseSchedule("cosine", 50)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 0}, "choose from 1 to 1000"),
        ({"n": 1001}, "1001 sampling steps.*1000 timesteps"),
        ({"n": 10, "spacing": "even"}, "'even' is unknown.*karras"),
        ({"n": 10, "offset": 1}, "for leading timesteps, not trailing"),
        ({"n": 1000, "spacing": "leading", "offset": 1}, "to 1000 ... 1"),
        ({"n": 10, "spacing": "leading", "offset": -1}, "... -1"),
        ({"n": 10, "spacing": "karras"}, "zero_snr"),
    ],
)
def test_wrong_timesteps_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ZERO_SNR.timesteps(**arguments)
