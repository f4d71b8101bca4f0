from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.prediction import PREDICTIONS, Denoised, PredictionName
from diffusion.process.schedule import NoiseSchedule
from tests.diffusion.exact import GaussianDenoiser, Wavy, wavy_denoiser
from unet.config import UNetConfig
from unet.errors import InputError

S = NoiseSchedule()
every_prediction = pytest.mark.parametrize("name", list(PREDICTIONS))


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@every_prediction
@pytest.mark.parametrize("t", [0, 700, 12.5, torch.tensor([5, 400, 999])])
def test_image_and_noise_make_up_x(name: PredictionName, t: Any) -> None:
    x = images()
    x0, eps, mix = wavy_denoiser(S, name)(x, t)
    signal, sigma = S.rates(t, x)
    assert_close(signal * x0 + sigma * eps, x, atol=1e-4, rtol=1e-4)
    assert mix is None


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_a_denoiser_of_the_true_prediction_is_exact(name: PredictionName) -> None:
    """The exact Gaussian denoiser's output, in any parameterisation, is believed."""
    exact = GaussianDenoiser(S)

    class Straight(Wavy):
        def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            return super().__call__(x, t) - 0.1 * torch.sin(3 * x + t.to(x).view(-1, 1, 1, 1) / 150)

    x, t = images().double(), torch.tensor([3, 500, 999])
    x0, eps, _ = Denoiser(Straight(S, name), S, name)(x, t)
    assert_close(x0, exact(x, t).x0)
    assert_close(eps, exact(x, t).eps)


@every_prediction
def test_one_timestep_serves_all_images(name: PredictionName) -> None:
    denoiser, x = wavy_denoiser(S, name), images()
    for t in (700, torch.tensor(700), torch.tensor([700])):
        assert_close(denoiser(x, t), denoiser(x, torch.full((3,), 700)), rtol=0, atol=0)


def test_timesteps_reach_the_network_as_they_are() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    for t in (7, 7.5):
        Denoiser(model, S, "eps")(images(), t)
    assert seen[0].equal(torch.tensor([7, 7, 7]))
    assert seen[1].equal(torch.tensor([7.5, 7.5, 7.5]))


def test_everything_around_a_network_of_half_precision_is_in_full() -> None:
    denoiser = Denoiser(lambda x, t: x.bfloat16(), S, "v")
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        x0, eps, _ = denoiser(x, 999)
    assert x0.dtype == eps.dtype == torch.float32
    signal, sigma = S.rates(999, x)
    assert_close(signal * x0 + sigma * eps, x, atol=1e-6, rtol=1e-6)
    assert denoiser(x.bfloat16(), 999).x0.dtype == torch.float32
    assert denoiser(x.double(), 999).x0.dtype == torch.float64


def test_one_row_of_conditioning_serves_all_images() -> None:
    denoiser, x = wavy_denoiser(S, "eps"), images()
    one = denoiser(x, 50, classes=torch.tensor([2]))
    assert_close(one, denoiser(x, 50, classes=torch.tensor([2, 2, 2])), rtol=0, atol=0)
    with pytest.raises(InputError, match="classes has 2 rows for 3 images"):
        denoiser(x, 50, classes=torch.tensor([2, 1]))
    given: Any
    for given in (2, [2, 1, 0], torch.tensor(2)):
        with pytest.raises(InputError, match=r"classes is .*: give a tensor of one row per image"):
            denoiser(x, 50, classes=given)


def test_a_unet_with_everything_is_denoised_by_name() -> None:
    config = UNetConfig(
        in_channels=2,
        channels=8,
        multipliers=(1, 2),
        block="res",
        skips="block",
        norm="group",
        groups=4,
        time=True,
        classes=4,
        attention_levels=(1,),
        attention="transformer",
        context_channels=6,
        heads=2,
    )
    torch.manual_seed(0)
    model = DiffusionUNet(config, 4).eval()
    x, context = images(), torch.randn(3, 5, 6)
    mask, classes = torch.arange(5) < torch.tensor([[5], [3], [1]]), torch.tensor([0, 1, 3])
    conditioning = {"context": context, "mask": mask, "classes": classes}
    with torch.no_grad():
        x0, eps, mix = Denoiser(model, S, "eps")(x, 10, **conditioning)
        output = model(x, torch.full((3,), 10), context, mask=mask, classes=classes)
    assert_close(eps, output[:, :2])
    assert mix is not None
    assert_close(mix, (output[:, 2:] + 1) / 2)
    signal, sigma = S.rates(10, x)
    assert_close(x0, (x - sigma * eps) / signal)


def test_eps_without_signal_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="undefined"):
        Denoiser(lambda x, t: x, NoiseSchedule(zero_snr=True), "eps")


# ----------------------------------------------------------------------------------------------
# Clipping


@pytest.mark.parametrize("how", ["static", "dynamic"])
@every_prediction
def test_clipped_images_and_their_noise_still_make_up_x(name: PredictionName, how: Any) -> None:
    x, t = 3 * images(), torch.tensor([100, 500, 999])
    x0, eps, _ = Clipped(wavy_denoiser(S, name), how)(x, t)
    assert x0.abs().max() <= 1
    signal, sigma = S.rates(t, x)
    assert_close(signal * x0 + sigma * eps, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_images_within_the_range_are_left_alone(how: Any) -> None:
    denoiser, x = GaussianDenoiser(S), 0.1 * images()
    assert_close(Clipped(denoiser, how)(x, 500), denoiser(x, 500), rtol=0, atol=0)


def test_dynamic_thresholding_is_that_of_imagen() -> None:
    """Image by image: s = the percentile of |x0|, at least 1; clamp to [-s, s], divide by s."""
    x0 = torch.linspace(-1, 1, 1001).view(1, 1, 7, 143).repeat(3, 1, 1, 1)
    x0[1] *= 4
    x0[2] *= 0.5

    class Fixed(GaussianDenoiser):
        def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
            return Denoised(x0, torch.zeros_like(x0), torch.ones_like(x0))

    clipped = Clipped(Fixed(S), "dynamic")(torch.zeros_like(x0), 500)
    s = np.quantile(x0[1].abs().numpy(), 0.995).item()
    single = Clipped(GaussianDenoiser(S), "dynamic")(torch.full((1, 1, 1, 1), 3.0), 500).x0
    assert single.abs() <= 1
    assert 3.9 < s < 4
    assert_close(clipped.x0[0], x0[0])
    assert_close(clipped.x0[1], x0[1].clamp(-s, s) / s, atol=1e-5, rtol=1e-5)
    assert_close(clipped.x0[2], x0[2])
    assert clipped.mix is not None
    unknown: Any = "hard"
    with pytest.raises(InputError, match="'hard' is unknown"):
        Clipped(Fixed(S), unknown)
