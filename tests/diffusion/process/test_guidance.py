from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.testing import assert_close

from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.guidance import Guided, doubled
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import PREDICTIONS, Denoised, PredictionName
from diffusion.process.samplers import finish, sample
from diffusion.process.schedule import NoiseSchedule
from tests.diffusion.exact import GaussianDenoiser, Wavy, wavy_denoiser
from unet.config import UNetConfig
from unet.errors import InputError

S = NoiseSchedule()
T = torch.tensor([100, 500, 900])
CLASSES, NULL = torch.tensor([0, 1, 2]), torch.tensor([3])
every_prediction = pytest.mark.parametrize("name", ["eps", "x0", "v"])


def images() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Counting(GaussianDenoiser):
    """Remembers the sizes of its batches, for a list of the test."""

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: Any) -> Denoised:
        SIZES.append(len(x))
        return super().__call__(x, t, **conditioning)


SIZES: list[int] = []


@pytest.fixture(autouse=True)
def _no_sizes() -> None:
    SIZES.clear()


@every_prediction
@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
def test_guidance_extrapolates_the_networks_output(name: PredictionName, scale: float) -> None:
    """arXiv 2207.12598, eq. 6, on eps; and the same on any other output, for it is linear in x."""
    x, net = images(), Wavy(S, name)
    guided = Guided(Denoiser(net, S, name), scale, {"classes": NULL})
    x0, eps, _ = guided(x, T, classes=CLASSES)
    conditional = net(x, T, classes=CLASSES)
    null = net(x, T, classes=NULL.expand(3))
    output = null + scale * (conditional - null)
    wanted = PREDICTIONS[name].to_x0_eps(output, x, *S.rates(T, x))
    assert_close((x0, eps), wanted, atol=1e-4, rtol=1e-4)


def test_a_lesser_denoiser_leads_away_like_the_null_conditioning() -> None:
    """arXiv 2406.02507, eq. 3: of two Gaussians of one spread, the mean moves that many times as
    far from the lesser one's; a guide that is the model itself changes nothing."""
    x = images()
    good, lesser = (GaussianDenoiser(S, mean=mean, std=0.1) for mean in (0.4, 0.3))
    found = Guided(good, 3.0, lesser)(x, T)
    assert_close(found.x0, GaussianDenoiser(S, mean=0.6, std=0.1)(x, T).x0, atol=1e-5, rtol=1e-5)
    assert_close(Guided(good, 3.0, good)(x, T), good(x, T), atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match=r"noise levels \(linear, 10 levels\) than .* guides \("):
        Guided(good, 3.0, GaussianDenoiser(NoiseSchedule(steps=10), mean=0.0, std=0.1))


def test_scale_1_is_the_plain_denoiser_at_its_cost() -> None:
    denoiser, x = Counting(S), images()
    guided = Guided(denoiser, 1.0, {"classes": NULL}, rescale=0.7)
    assert_close(guided(x, T, classes=CLASSES), denoiser(x, T, classes=CLASSES), rtol=0, atol=0)
    assert SIZES == [3, 3]
    Guided(denoiser, 2.0, {"classes": NULL})(x, T, classes=CLASSES)
    assert SIZES == [3, 3, 6]


def test_guided_samples_go_away_from_the_null_class() -> None:
    """With equal spreads, guidance by s moves the mean s times as far from the null mean."""
    denoiser = GaussianDenoiser(S, mean=0.0, std=0.1)
    for scale in (1.0, 2.0):
        guided = Guided(denoiser, scale, {"classes": torch.tensor([0.5])})
        noise = NoiseSource(range(2))
        run = sample(
            guided,
            noise.draw((1, 50, 50)),
            S.timesteps(30),
            "dpmpp-2m",
            conditioning={"classes": torch.tensor([1.0])},
        )
        assert finish(run).mean().item() == pytest.approx(0.5 + scale * 0.5, abs=0.02)


@every_prediction
def test_rescale_is_that_of_diffusers(name: PredictionName) -> None:
    """Its rescale_noise_cfg works on the network's output, whatever that is."""
    x, net, rates = images(), Wavy(S, name), S.rates(T, images())
    guided = Guided(Denoiser(net, S, name), 4.0, {"classes": NULL}, rescale=0.7)
    x0, eps, _ = guided(x, T, classes=CLASSES)
    conditional, null = net(x, T, classes=CLASSES), net(x, T, classes=NULL.expand(3))
    output = rescale_noise_cfg(null + 4 * (conditional - null), conditional, guidance_rescale=0.7)
    assert_close((x0, eps), PREDICTIONS[name].to_x0_eps(output, x, *rates), atol=1e-3, rtol=1e-4)
    full = Guided(Denoiser(net, S, name), 4.0, {"classes": NULL}, rescale=1.0)
    again = PREDICTIONS[name].target(*full(x, T, classes=CLASSES)[:2], *rates)
    assert_close(again.std((1, 2, 3)), conditional.std((1, 2, 3)), atol=1e-4, rtol=1e-3)


def test_outside_the_interval_there_is_no_guidance_and_no_cost() -> None:
    """arXiv 2404.07724: lowest < sigma <= highest, image by image."""
    denoiser, x = Counting(S), images()
    null = {"classes": NULL}
    sigmas = [S.level(t).sigma for t in T.tolist()]
    guided = Guided(denoiser, 3.0, null, interval=(sigmas[0], sigmas[1]))
    full = Guided(denoiser, 3.0, null)(x, T, classes=CLASSES)
    plain = denoiser(x, T, classes=CLASSES)
    mixed = guided(x, T, classes=CLASSES)
    for part, of_full, of_plain in zip(mixed[:2], full[:2], plain[:2], strict=True):
        assert_close(part[1], of_full[1])
        assert_close(part[[0, 2]], of_plain[[0, 2]])
    SIZES.clear()
    list(sample(guided, x, [900, 500, 100], conditioning={"classes": CLASSES}))
    assert SIZES == [3, 6, 3]
    rescaled = Guided(denoiser, 3.0, null, rescale=1.0, interval=(sigmas[0], sigmas[1]))
    assert_close(rescaled(x, T, classes=CLASSES).x0[[0, 2]], plain.x0[[0, 2]], atol=1e-5, rtol=1e-5)


def test_clipping_comes_after_guidance() -> None:
    guided = Guided(GaussianDenoiser(S), 9.0, {"classes": NULL})
    x = images()
    assert guided(x, T, classes=CLASSES).x0.abs().max() > 1.5
    clipped = Clipped(guided)(x, T, classes=CLASSES).x0
    assert_close(clipped, guided(x, T, classes=CLASSES).x0.clamp(-1, 1))


def test_the_learned_variance_is_the_conditional_one() -> None:
    def net(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([x, classes.to(x).view(-1, 1, 1, 1).expand_as(x)], 1)

    mix = Guided(Denoiser(net, S, "eps"), 3.0, {"classes": NULL})(images(), T, classes=CLASSES).mix
    assert mix is not None
    assert_close(mix[:, 0, 0, 0], (CLASSES + 1) / 2)


# ----------------------------------------------------------------------------------------------
# Text


def text_network() -> Callable[..., Tensor]:
    config = UNetConfig(
        in_channels=2,
        channels=8,
        multipliers=(1, 2),
        block="res",
        skips="block",
        norm="group",
        groups=4,
        time=True,
        attention_levels=(1,),
        attention="transformer",
        context_channels=6,
        heads=2,
        zero_init=False,
    )
    torch.manual_seed(0)
    return DiffusionUNet(config, 2).eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("null_length", [2, 5, 7])
def test_prompts_of_different_lengths_do_not_disturb_each_other(
    masked: bool, null_length: int
) -> None:
    """One batch of both is what two batches of their own are."""
    denoiser, x = Denoiser(text_network(), S, "eps"), images()
    g = torch.Generator().manual_seed(1)
    prompt: dict[str, Tensor] = {"context": torch.randn(3, 5, 6, generator=g)}
    null = {"context": torch.randn(1, null_length, 6, generator=g)}
    if masked:
        prompt["mask"] = torch.arange(5) < torch.tensor([[5], [2], [3]])
    with torch.no_grad():
        guided = Guided(denoiser, 3.0, null)(x, T, **prompt)
        conditional, plain = denoiser(x, T, **prompt), denoiser(x, T, **null)
    assert not conditional.eps.allclose(plain.eps)
    assert_close(guided.eps, plain.eps + 3 * (conditional.eps - plain.eps), atol=1e-4, rtol=1e-4)


def test_equal_lengths_without_masks_get_none() -> None:
    context = torch.randn(2, 5, 6)
    both = doubled({"context": context, "mask": None}, {"context": -context})
    assert set(both) == {"context"}
    assert both["context"].equal(torch.cat([context, -context]))


# ----------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": -1.0}, "scale -1.0 must be"),
        ({"scale": math.nan}, "scale nan"),
        ({"scale": math.inf}, "scale inf"),
        ({"rescale": 1.5}, "rescale 1.5 must be from 0 to 1"),
        ({"interval": (2.0, 2.0)}, "empty"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Guided(GaussianDenoiser(S), **({"scale": 2.0, "away": {}} | arguments))


def test_a_null_conditioning_of_another_kind_is_refused() -> None:
    guided = Guided(wavy_denoiser(S, "eps"), 2.0, {"classes": NULL})
    with pytest.raises(InputError, match=r"only one of conditioning and null.*has classes"):
        guided(images(), T)
    with pytest.raises(InputError, match="has classes, context"):
        guided(images(), T, context=torch.randn(3, 5, 6))
