"""How many steps a model is sampled in by default: laws of the power that is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from diffusion.judging import steps
from diffusion.judging.steps import FEWER, band_powers, likeness, needs_deciding, note_steps
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import STEPS, ImageSampler, with_defaults
from unet import InputError, UNetConfig

RNG = np.random.default_rng(0)


def model(**info: Any) -> DiffusionUNet:
    config = UNetConfig(
        in_channels=1, channels=4, multipliers=(1,), block="res", norm="group", groups=2, time=True
    )
    schedule = NoiseSchedule(kind="flow", steps=info.pop("timesteps", 100)).to_dict()
    known = {"schedule": schedule, "prediction": "flow", "size": [8, 8], "classes": []}
    return DiffusionUNet(config, 1, known | info)


@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 40, 17, 3), (2, 8, 8, 2), (1, 1, 1, 1)])
def test_power_follows_the_contrast_whatever_the_greys_are(shape: tuple[int, ...]) -> None:
    images = RNG.normal(size=shape)
    images -= images.mean(axis=(1, 2), keepdims=True)
    assert likeness(images, images) == 1
    assert likeness(0.5 * images + 9, images) == pytest.approx(
        0.25 if images.any() else 1, rel=0.01
    )
    back = likeness(images, 0.5 * images + 9)  # as where noise is left
    assert back == pytest.approx(likeness(0.5 * images, images))


def test_a_loss_at_one_wavelength_or_in_one_channel_is_seen() -> None:
    images = RNG.normal(size=(4, 64, 64, 3))
    blurred = gaussian_filter(images, (0, 1, 1, 0))
    powers = band_powers(blurred) / band_powers(images)
    assert (np.diff(powers, axis=0) < 0).all()  # grain goes first
    assert powers[0].min() > 0.8
    assert likeness(blurred, images) == pytest.approx(powers.min(), rel=0.02)
    pale = images * (1, 1, 0.8)
    assert likeness(pale, images) == pytest.approx(0.64, rel=0.01)
    images[..., 2] = 5  # where nothing is, nothing is lost
    assert likeness(images + 1e-9 * RNG.normal(size=images.shape), images) == pytest.approx(1)


@pytest.mark.parametrize(("kept", "found"), [(0.5, STEPS), (0.99, FEWER)])
def test_fewer_steps_are_taken_where_they_keep_the_contrast(
    kept: float, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of fewer steps are compared with those of the usual ones, from the same noise."""
    compared = []

    def share(images: Any, others: Any) -> float:
        compared.extend([images, others])
        return kept

    monkeypatch.setattr(steps, "likeness", share)
    sampler = ImageSampler(model(steps=FEWER), SamplingOptions(seed=3))  # as of earlier weights
    said, made = note_steps(sampler, [None] * 2)
    assert f"in {found} steps by default" in said
    np.testing.assert_array_equal(made, compared[0 if found == FEWER else 1])
    assert with_defaults(SamplingOptions(), sampler.model).steps == found
    fewer = ImageSampler(sampler.model, SamplingOptions(seed=3, steps=FEWER))
    np.testing.assert_array_equal(compared[0], fewer(2))
    usual = ImageSampler(sampler.model, SamplingOptions(seed=3, steps=STEPS))
    np.testing.assert_array_equal(compared[1], usual(2))


def test_what_was_found_is_the_default_of_the_usual_sampler_alone() -> None:
    found = model(steps=FEWER)
    assert with_defaults(SamplingOptions(), found).steps == FEWER
    assert with_defaults(SamplingOptions(sampler="ddim"), found).steps == STEPS
    assert with_defaults(SamplingOptions(steps=5), found).steps == 5
    assert with_defaults(SamplingOptions(), model()).steps == STEPS
    assert with_defaults(SamplingOptions(), model(few_steps=1.0, steps=FEWER)).steps == 4
    for damaged in ("8", 0, True):
        with pytest.raises(InputError, match="the model's steps"):
            with_defaults(SamplingOptions(), model(steps=damaged))


def test_it_is_decided_where_it_was_measured() -> None:
    assert needs_deciding(model())
    assert not needs_deciding(model(timesteps=10))
    for key in ("condition", "text", "autoencoder", "joint", "target", "few_steps"):
        decided = model()
        decided.info[key] = {}
        assert not needs_deciding(decided)
    cosine = model()
    schedule = replace(NoiseSchedule.from_dict(cosine.info["schedule"]), kind="cosine")
    cosine.info["schedule"] = schedule.to_dict()
    assert not needs_deciding(cosine)
