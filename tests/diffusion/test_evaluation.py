"""What samples are asked for and how they are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data import DiffusionData
from diffusion.evaluation import Judge, held_out_bits, wanted_like, with_mirror_images
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.sampling import ImageSampler
from diffusion.schedule import NoiseSchedule
from diffusion.shapes import caption, draw, held_out, parse
from diffusion.shapes_evaluation import agreement, judge_captions, scenes_to_ask, word_attention
from diffusion.text import WordEncoder
from unet.config import UNetConfig

RNG = np.random.default_rng(0)


def small_model(size: int = 8, channels: int = 1, **info: Any) -> DiffusionUNet:
    torch.manual_seed(0)
    text = info.get("text")
    config = UNetConfig(
        in_channels=channels,
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        block="res",
        norm="group",
        groups=4,
        time=True,
        attention_levels=(1,) if text else (),
        attention="transformer" if text else "self",
        context_channels=32 if text else None,
        heads=1,
        classes=len(info["classes"]) + 1 if "classes" in info else 0,
    )
    schedule = NoiseSchedule(kind="cosine", steps=20).to_dict()
    known = {"schedule": schedule, "prediction": "v", "size": [size, size], **info}
    return DiffusionUNet(config, channels, known).eval()


def noise_set(path: Path, labels: Any = None, count: int = 80) -> Path:
    images = RNG.integers(0, 256, (count, 8, 8), np.uint8)
    np.savez(path / "set.npz", images=images, **({} if labels is None else {"labels": labels}))
    return path / "set.npz"


@pytest.mark.parametrize("count", [10, 97])
def test_classes_are_asked_for_in_the_shares_of_the_real_images(tmp_path: Path, count: int) -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    data = DiffusionData(noise_set(tmp_path, labels), classes=True)
    sampler = ImageSampler(small_model(classes=["0", "1", "2"]), SamplingOptions())
    wanted = np.array(wanted_like(data, sampler, count))
    assert len(wanted) == count
    for n in (10, count):  # at every place of the run, within one image
        shares = np.bincount(wanted[:n].astype(int), minlength=3)
        assert np.abs(shares - n * np.array([50, 20, 10]) / 80).max() <= 1
    other = ImageSampler(small_model(classes=["x", "y"]), SamplingOptions())
    assert wanted_like(data, other, 6) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_of_training_images_are_found_mirrored_or_not(
    tmp_path: Path, mirrored: bool
) -> None:
    data = DiffusionData(noise_set(tmp_path))
    judge = Judge(data, None)
    copies = data.images(data.train[:6])
    copies = copies[:, :, ::-1] if mirrored else copies
    assert judge(copies, [None] * 6)["likely copies"] == 1
    fresh = RNG.integers(0, 256, (80, 8, 8, 1), np.uint8)
    assert judge(fresh, [None] * 80)["likely copies"] < 0.5


def test_mirror_images_are_behind_the_images() -> None:
    images = RNG.integers(0, 256, (3, 4, 5, 1), np.uint8)
    both = with_mirror_images(images)
    np.testing.assert_array_equal(both[:3], images)
    np.testing.assert_array_equal(both[3:, :, 0], images[:, :, -1])


def test_bits_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    data, model = DiffusionData(noise_set(tmp_path)), small_model()
    found = [held_out_bits(model, data, 5, 0, size) for size in (2, 5)]
    assert found[0]["bits per dimension"] == pytest.approx(found[1]["bits per dimension"], rel=1e-4)
    assert (found[0]["images"], found[0]["noise levels"]) == (5, 20)


# -- captions


def test_half_of_the_scenes_have_a_pair_that_training_never_shows() -> None:
    asked = scenes_to_ask(41, 3)
    assert (len(asked.seen), len(asked.unseen)) == (21, 20)
    assert not any(map(held_out, asked.seen))
    assert all(map(held_out, asked.unseen))
    assert [parse(text) for text in asked.captions] == [*asked.seen, *asked.unseen]
    assert asked == scenes_to_ask(41, 3) != scenes_to_ask(41, 4)


def test_pictures_of_scenes_agree_with_them_and_not_with_others() -> None:
    asked = scenes_to_ask(40, 0).seen
    pictures = np.stack([draw(scene, 32, RNG).picture for scene in asked])
    assert agreement(pictures, asked)["as captioned"] > 0.9
    assert agreement(pictures, asked[::-1])["as captioned"] < 0.3
    assert agreement(np.full_like(pictures, 240), asked)["colour"] == 0


def test_attention_that_is_the_same_everywhere_is_inside_things_by_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = scenes_to_ask(12, 0)
    words = WordEncoder.from_captions(asked.captions, width=32, depth=1)
    sampler = ImageSampler(small_model(32, 3, text=words.to_dict()), SamplingOptions(steps=2))
    pictures = np.stack([draw(scene, 32, RNG).picture for scene in (*asked.seen, *asked.unseen)])
    even = torch.full((6, 11, 32, 32), 1 / 11)
    monkeypatch.setattr(sampler, "attending", lambda *_: (pictures[:6], even))
    found = word_attention(sampler, asked.seen)
    assert found.inside == pytest.approx(found.chance)
    assert found.words > 0
    figures = judge_captions(sampler, pictures, asked)
    assert figures["seen pairs, as captioned"] > 0.8
    assert {k for k in figures if k.startswith("unseen")} == {
        f"unseen pairs, {k}" for k in ("as captioned", "colour", "shape", "size", "position")
    }


def test_captions_of_models_are_judged_whole() -> None:
    """Through the network: attention maps have the shape that the judge reads."""
    asked = scenes_to_ask(4, 0)
    words = WordEncoder.from_captions(asked.captions, width=32, depth=1)
    sampler = ImageSampler(small_model(32, 3, text=words.to_dict()), SamplingOptions(steps=2))
    images, maps = sampler.attending([caption(scene) for scene in asked.seen])
    assert (images.shape, maps.shape[0], maps.shape[2:]) == ((2, 32, 32, 3), 2, (32, 32))
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 32, 32))
    assert set(judge_captions(sampler, sampler(4, asked.captions), asked)) >= {
        "seen pairs, as captioned",
        "attention of words, inside",
    }
