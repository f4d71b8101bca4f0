"""What samples are asked for and how they are judged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data.images import DiffusionData
from diffusion.data.shapes import caption, draw, held_out, parse
from diffusion.judging import evaluation
from diffusion.judging.captions import agreement, judge_captions, scenes_to_ask, word_attention
from diffusion.judging.evaluation import (
    Judge,
    check_bits,
    comparison,
    held_out_bits,
    lines,
    timed_samples,
    to_json,
    wanted_like,
    with_mirror_images,
)
from diffusion.judging.features import ClassifierFeatures
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler
from diffusion.text import WordEncoder
from unet import InputError
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
    mixed = ImageSampler(small_model(classes=["2", "x", "0"]), SamplingOptions())
    assert np.bincount(wanted_like(data, mixed, 60)).tolist() == [10, 0, 50]


@pytest.mark.parametrize("count", [1, 40, 113])
def test_shares_of_classes_are_rounded_by_largest_remainder(tmp_path: Path, count: int) -> None:
    numbers = RNG.integers(1, 40, 12)
    labels = np.repeat(np.arange(12), numbers)
    data = DiffusionData(noise_set(tmp_path, labels, len(labels)), classes=True)
    sampler = ImageSampler(small_model(classes=list(data.classes)), SamplingOptions())
    names = np.array(data.classes)[wanted_like(data, sampler, count)]
    found = np.array([(names == str(c)).sum() for c in range(12)])
    exact = count * numbers / numbers.sum()
    up = exact - np.floor(exact)
    assert np.isin(found - np.floor(exact), (0, 1)).all()
    assert found.sum() == count
    assert up[found > exact].min(initial=1) >= up[found <= exact].max(initial=0)


class Brightness(ClassifierFeatures):
    """Takes the mean of an image for its feature, and dark images for class a, others for b."""

    def __init__(self, classes: tuple[str, ...] = ("b", "a")) -> None:
        self.name, self._classes, self.most = "brightness", classes, 0

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.most = max(self.most, len(images))
        return images.reshape(len(images), -1)[:, :2].astype(np.float32)

    def classify(self, images: np.ndarray) -> np.ndarray:
        return (images.mean(axis=(1, 2, 3)) < 128).astype(np.int64)


def halves(path: Path) -> DiffusionData:
    images = RNG.integers(0, 100, (40, 8, 8), np.uint8)
    images[20:] += 150
    np.savez(path / "set.npz", images=images, labels=np.repeat([0, 1], 20))
    return DiffusionData(path / "set.npz", classes=True)


def test_accuracy_is_that_of_the_class_asked_for_and_of_the_worst(tmp_path: Path) -> None:
    judge = Judge(halves(tmp_path), Brightness(), ["a", "b"])
    images = RNG.integers(0, 100, (20, 8, 8, 1), np.uint8)
    images[10:] += 150
    wanted = [0] * 11 + [1] * 9  # a, whose class of the classifier is its second one
    found = judge(images, wanted)
    assert found["class accuracy"] == 0.95
    assert found["worst class"] == "a"
    assert found["accuracy of the worst class"] == 10 / 11
    # "0" and "1" are in the file.
    assert any("only the real images have class" in note for note in found["notes"])
    with pytest.raises(InputError, match="brightness knows b, a, but the model makes a, c"):
        Judge(judge.data, Brightness(), ["a", "c"])


def test_memory_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, whole = halves(tmp_path), Brightness()
    before = Judge(data, whole)
    monkeypatch.setattr(evaluation, "MOST_BYTES", 6 * 64)
    parts = Brightness()
    after = Judge(data, parts)
    np.testing.assert_array_equal(after.features, before.features)
    assert (whole.most, parts.most) == (40, 6)
    assert (len(before.training), before.notes) == (2 * len(data.train), [])
    assert len(after.training) == 6
    assert len(after.held_out) == 3
    assert after.notes == [
        f"copies are looked for among 3 of the {len(data.train)} training images"
    ]


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
    assert found[0]["variance"] == "fixed-large"
    assert held_out_bits(model, data, 2, 2**32 - 1, 2)["bits per dimension"] > 0  # the last seed


def test_a_model_of_latents_has_no_bits() -> None:
    autoencoder: Any = SimpleNamespace(image_channels=3, factor=8)
    with pytest.raises(InputError, match="--bits is for models of pixels"):
        check_bits(ImageSampler(small_model(), SamplingOptions(), autoencoder))
    check_bits(ImageSampler(small_model(), SamplingOptions()))


def test_progress_bars_end_at_their_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **given: Any) -> None:
            self.total, self.done = given["total"], 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self) -> None:
            self.done += 1

    data = DiffusionData(noise_set(tmp_path))
    monkeypatch.setattr(evaluation, "tqdm", Bar)
    images, seconds = timed_samples(
        ImageSampler(small_model(), SamplingOptions(steps=3, batch_size=2)), [None] * 5
    )
    held_out_bits(small_model(), data, 5, 0, 2)
    assert (len(images), seconds > 0) == (5, True)
    assert [(bar.done, bar.total) for bar in bars] == [(9, 9), (60, 60)]


# -- figures for people and for programs


def row(distance: float = 2.0, **changed: Any) -> dict[str, Any]:
    given = dataclasses.asdict(SamplingOptions(**{"steps": 20, **changed}))
    figures = {"D": distance, "class accuracy": 0.98125, "worst class": "7"}
    figures |= {"accuracy of the worst class": 0.95, "seconds": 1.5}
    return {"settings": given, "evaluations": 20, "samples": 8, **figures, "notes": ["rough"]}


def test_a_row_names_the_settings_that_differ_from_the_usual() -> None:
    first, *figures = lines(row(sampler="ddim", eta=0.5, guidance=2.0, spacing="leading"))
    assert first == (
        "sampler ddim, steps 20, seed 0, evaluations 20, spacing leading, eta 0.5, guidance 2.0; "
        "samples 8"
    )
    assert figures == [
        "  D: 2.0000",
        "  seconds: 1.5000",
        "  class accuracy: 98.12 %, worst class: 7 95.00 %",
        "  note: rough",
    ]
    assert (
        lines(row(sampler="dpmpp-2m-sde"))[0]
        == "sampler dpmpp-2m-sde, steps 20, seed 0, evaluations 20; samples 8"
    )


def test_rows_are_compared_with_the_first() -> None:
    table = comparison([row(2.0, sampler="dpmpp-2m-sde"), row(3.0, sampler="ddim", steps=5)], "D")
    assert [line.split() for line in table[2:]] == [
        ["dpmpp-2m-sde:20", "20", "1.5", "2.0000", "1.000", "98.12", "%"],
        ["ddim:5", "20", "1.5", "3.0000", "1.500", "98.12", "%"],
    ]
    assert "nan" in comparison([row(0.0)], "D")[2]
    assert "distance" not in "".join(comparison([row()], None))


def test_json_has_neither_infinity_nor_nan() -> None:
    found = {"rows": [{**row(guidance=2.0), "x": math.nan}], "y": 0.1}
    back = json.loads(to_json(found), parse_constant=lambda name: pytest.fail(name))
    assert back["rows"][0]["settings"]["guidance_interval"] == [0.0, None]
    assert (back["rows"][0]["x"], back["y"]) == (None, 0.1)


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
