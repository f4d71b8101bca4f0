"""Images out of a model folder: the same for any batch size, what is asked for, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data.pixels import to_bytes
from diffusion.generator import ImageGenerator
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler, image_seeds, load_for_sampling
from unet import PRESETS, InputError
from unet.config import UNetConfig

SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpmpp-2m", "dpmpp-2m-sde")


def config(**values: Any) -> UNetConfig:
    small = {"in_channels": 1, "channels": 8, "head_channels": None, "groups": 4}
    return replace(PRESETS["diffusion"].config, **{**small, **values})


def model(
    classes: tuple[str, ...] = (), learn_variance: bool = False, **info: Any
) -> DiffusionUNet:
    torch.manual_seed(0)
    schedule = NoiseSchedule(kind="cosine", steps=50)
    facts = {"schedule": schedule.to_dict(), "prediction": "v", "size": [8, 12], "classes": classes}
    network = config(classes=len(classes) + 1 if classes else 0)
    made = DiffusionUNet(network, 2 if learn_variance else 1, {**facts, **info})
    for parameter in made.parameters():  # the head starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def sampler(network: DiffusionUNet, **options: Any) -> ImageSampler:
    return ImageSampler(network, SamplingOptions(**{"steps": 5, **options}))


def test_a_model_in_training_keeps_its_layout_when_it_is_sampled() -> None:
    """Fused AdamW pairs weights and means by their place in memory."""
    network = model()
    before = {name: p.stride() for name, p in network.named_parameters()}
    sampler(network)(2, {})
    assert {name: p.stride() for name, p in network.named_parameters()} == before


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_number_alone(name: Any) -> None:
    network = model(("a", "b"))
    classes = [i % 2 for i in range(7)]
    together = sampler(network, sampler=name)(7, classes)
    assert together.shape == (7, 8, 12, 1)
    assert together.dtype == np.uint8
    apart = sampler(network, sampler=name, batch_size=2)(7, classes)
    assert np.abs(together.astype(int) - apart).max() <= 1  # of rounding in the network
    alone = next(sampler(network, sampler=name).batches(1, classes[4:5], first=4))
    assert np.abs(together[4].astype(int) - alone[0]).max() <= 1
    assert (sampler(network, sampler=name, seed=1)(7, classes) != together).mean() > 0.5


def test_half_precision_is_asked_for_and_gives_nearly_the_same_images() -> None:
    network = model()
    exact = sampler(network, precision="fp32")(3).astype(int)
    assert (sampler(network)(3) == exact).all()  # on a CPU
    rounded = sampler(network, precision="bf16")(3)
    assert 0 < np.abs(rounded - exact).mean() < 4
    seen = []
    network.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        list(sampler(network, precision=precision).batches(1))
        assert set(seen) == {dtype}
        seen.clear()


def test_seeds_do_not_meet() -> None:
    seeds = [s for seed in range(3) for s in image_seeds(seed, 5)]
    assert len(set(seeds)) == 15
    assert image_seeds(2, 3, first=4) == image_seeds(2, 7)[4:]


def test_every_byte_survives_the_way_through_the_model_s_range() -> None:
    every = torch.arange(256).view(1, 1, 16, 16)
    assert (to_bytes(every / 127.5 - 1)[0, ..., 0] == every[0, 0].numpy()).all()
    assert to_bytes(torch.tensor([[[[-9.0, 9.0]]]])).flatten().tolist() == [0, 255]


def test_classes_and_guidance_change_the_images() -> None:
    network = model(("a", "b"))
    plain = sampler(network)
    a, b, anything = plain(3, [0] * 3), plain(3, [1] * 3), plain(3)
    assert (a != b).any()
    assert (a != anything).any()
    assert (sampler(network, guidance=3.0)(3, [0] * 3) != a).any()
    assert (sampler(network, guidance=0.0)(3, [0] * 3) == anything).mean() > 0.99
    assert plain.class_index("b") == 1


def test_an_image_can_be_varied_inpainted_and_joined_with_another() -> None:
    made = sampler(model(), steps=10)
    image = torch.linspace(-1, 1, 96).view(1, 1, 8, 12)
    near, far = (next(made.batches(2, plan=made.plans.variants(image, s))) for s in (0.1, 1.0))
    distances = [np.abs(found.astype(int) - to_bytes(image)).mean() for found in (near, far)]
    assert distances[0] < distances[1]
    mask = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    mask[..., 6:] = True
    anew = next(made.batches(2, plan=made.plans.inpainted(image, mask)))
    assert (anew[:, :, :6] == to_bytes(image)[:, :, :6]).all()
    assert (anew[0, :, 6:] != anew[1, :, 6:]).any()
    plan = made.plans.between(image, -image, 5, None)
    joined = next(made.batches(5, plan=plan))
    assert joined.shape == (5, 8, 12, 1)
    apart = sampler(model(), steps=10, batch_size=2)
    parts = list(apart.batches(5, plan=apart.plans.between(image, -image, 5, None)))
    assert np.abs(joined.astype(int) - np.concatenate(parts)).max() <= 1


def test_evaluations_are_counted_and_steps_reported() -> None:
    network, calls = model(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    for name in ("dpmpp-2m", "heun"):
        made, steps = sampler(network, sampler=name, batch_size=2), []
        calls.clear()
        list(made.batches(4, on_step=steps.append))
        plan = made.plans.from_noise()
        assert (len(calls), len(steps)) == (2 * plan.evaluations, 2 * plan.steps)
    image = torch.zeros(1, 1, 8, 12)
    for plan in (
        made.plans.variants(image, 0.6),
        made.plans.inpainted(image, image),
        made.plans.between(image, image, 2, None),
    ):
        calls.clear()
        steps = []
        list(made.batches(2, plan=plan, on_step=steps.append))
        assert (len(calls), len(steps)) == (plan.evaluations + plan.once, plan.steps)


def test_a_sample_appears_out_of_noise() -> None:
    made = sampler(model())
    frames = list(made.appearing(2))
    assert len(frames) == 6
    assert (frames[-1] == made(2)).all()
    assert frames[0].std() > 60  # noise, of which a third is clamped


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        ({}, {"steps": 51}, "51 sampling steps are asked for.*50"),
        ({}, {"guidance": 2.0}, "--guidance 2.0 needs a model that knows classes"),
        ({}, {"sampler": "ddpm", "variance": "learned"}, "--learn-variance"),
        ({"prediction": "score"}, {}, "prediction 'score' is unknown"),
        ({"schedule": {"kind": "odd"}}, {}, "noise schedule 'odd' is unknown"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    network: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        sampler(model(**network), **options)


def test_what_a_model_does_not_know_is_said() -> None:
    with pytest.raises(InputError, match=r"class 'x' is none of the model's, which knows a, b"):
        sampler(model(("a", "b"))).class_index("x")
    with pytest.raises(InputError, match="was trained without"):
        sampler(model()).class_index("x")
    network = model()
    del network.info["size"]
    with pytest.raises(InputError, match=r"in info\.size, not None"):
        sampler(network)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"eta": 0.5}, "--eta 0.5 is for --sampler ddim"),
        ({"variance": "fixed-large"}, "is for --sampler ddpm"),
    ],
)
def test_mistaken_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        SamplingOptions(**options)


def test_a_guide_is_read_once_for_all_calls_that_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, read = model(("a", "b")), []
    names = [str(tmp_path / name) for name in ("lesser", "other")]
    for name in names:
        network.save_pretrained(name)

    def counting(folder: str, device: str) -> DiffusionUNet:
        read.append(folder)
        return load_for_sampling(folder, device)

    monkeypatch.setattr("diffusion.sampling.load_for_sampling", counting)
    generator = ImageGenerator(network)
    for guide in (names[0], names[0], names[1]):
        generator(1, steps=2, guidance=2.0, guide=guide)
    assert read == names
    generator(1, steps=2)
    assert read == names


def test_a_smaller_model_guides_and_one_of_other_data_is_refused(tmp_path: Path) -> None:
    network = model(("a", "b"))
    plain = sampler(network)(2, [0, 1])
    network.save_pretrained(tmp_path / "itself")
    itself = sampler(network, guidance=3.0, guide=str(tmp_path / "itself"))(2, [0, 1])
    assert np.abs(itself.astype(int) - plain).max() <= 1
    torch.manual_seed(1)
    lesser = DiffusionUNet(replace(network.config, channels=4), 1, network.info)
    lesser.save_pretrained(tmp_path / "lesser")
    away = sampler(network, guidance=3.0, guide=str(tmp_path / "lesser"))(2, [0, 1])
    assert (away != plain).any()
    model(("a", "c")).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="differ in the classes"):
        sampler(network, guidance=3.0, guide=str(tmp_path / "other"))
    model(schedule=NoiseSchedule(steps=7).to_dict()).save_pretrained(tmp_path / "noise")
    with pytest.raises(InputError, match="other noise levels"):
        sampler(model(), guidance=3.0, guide=str(tmp_path / "noise"))
    with pytest.raises(InputError, match="does nothing without --guidance"):
        SamplingOptions(guide="lesser")
