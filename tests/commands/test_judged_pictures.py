"""unet-eval-ddpm of models that make images from pictures: what is judged, by which images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data.conditions import find_condition
from diffusion.data.images import DiffusionData
from diffusion.judging.classifier import ClassifierUNet, classifier_config
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler, load_for_sampling
from segmentation.model import SegmentationUNet
from unet import InputError, UNetConfig
from unet.files.images import write_image
from unet.training.cli import run_script
from unet.training.config_file import keep_config
from unet_diffusion import eval_ddpm
from unet_diffusion.faithfulness import MaskReader, faithfulness

SIDE = 16
RNG = np.random.default_rng(0)


def judge(*arguments: object) -> int:
    few = ("--steps", 2, "--device", "cpu")
    return run_script(eval_ddpm.main, eval_ddpm.EvalOptions, list(map(str, (*arguments, *few))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks that a run has, others in folders that it has not, and its models."""
    path = tmp_path_factory.mktemp("judged")
    for part, count in (("own", 12), ("other", 6)):
        for i in range(count):
            image = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
            name = f"{i}" if part == "own" else f"day {i % 2}/{i // 2}"
            write_image(path / part / f"image/{name}.png", image)
            write_image(path / part / f"mask/{name}.png", np.uint8(image > 99) * np.uint8(7))
    for said in ("lowres:4", "hole", str(path / "own/mask")):
        condition = find_condition(said, 1)
        config = UNetConfig(
            in_channels=1 + condition.channels,
            channels=8,
            multipliers=(1, 2),
            block="res",
            norm="group",
            groups=4,
            time=True,
        )
        info = {
            "schedule": NoiseSchedule(kind="cosine", steps=20).to_dict(),
            "prediction": "v",
            "size": [SIDE, SIDE],
            "condition": condition.to_dict(),
        }
        torch.manual_seed(0)
        run = path / condition.kind
        DiffusionUNet(config, 1, info).save_pretrained(run / "model")
        options = DiffusionOptions(out=run, data=str(path / "own/image"), condition=said, val=4)
        keep_config(options, run, [])
    reader(path, [0, 7])
    return path


def classifier(path: Path) -> Path:
    """A network whose features are compared."""
    info = {"classes": ["a", "b"], "size": [SIDE, SIDE]}
    network = ClassifierUNet(classifier_config((SIDE, SIDE), 1, 2), 2, info)
    network.save_pretrained(path / "classifier")
    return path / "classifier"


def reader(path: Path, values: list[int], dtype: str = "uint8", ignored: int | None = None) -> Path:
    table = {"values": values, "shares": [1 / len(values)] * len(values)}
    top = 255 if dtype == "uint8" else 4095
    normalisation = {"mean": [0.5 * top], "std": [0.24 * top], "dtype": dtype}
    info = {
        "classes": {**table, "ignore_value": ignored, "ignored_share": 0, "names": ()},
        "normalisation": normalisation,
        "threshold": 0.5,
        "cells": 0,
    }
    torch.manual_seed(1)
    outputs = 1 if len(values) == 2 else len(values)
    model = SegmentationUNet(
        UNetConfig(in_channels=1, channels=4, multipliers=(1, 2)), outputs, info
    )
    torch.nn.init.normal_(model.head.conv.weight, std=3)
    name = f"reader-{len(values)}" + ("" if dtype == "uint8" else f"-{dtype}")
    model.save_pretrained(path / name)
    return path / name


def test_small_images_are_judged_by_the_images_held_out(folder: Path, capsys: Any) -> None:
    model = ("--model", folder / "lowres/model", "--out", folder / "found.json")
    features = ("--classifier", classifier(folder), "--each", 3)
    assert judge(*model, "--data", folder / "own/image", "--count", 6, *features) == 0
    said = capsys.readouterr().out
    row = json.loads((folder / "found.json").read_text())["rows"][0]
    assert list(row["restoration"]) == [
        "bicubic enlargement",
        "one sample",
        "mean of 3 samples",
        "the true images",
    ]
    assert row["restoration"].pop("the true images")["PSNR"] is None  # infinite, which JSON lacks
    assert "inf" in said
    for figures in row["restoration"].values():
        assert all(f"{figure:.4f}" in said for figure in figures.values())
    distances = [value for name, value in row.items() if name.startswith("Fréchet")]
    assert distances == [row["restoration"]["one sample"]["Fréchet distance"]]
    psnrs = [figures["PSNR"] for figures in row["restoration"].values()]
    assert psnrs[2] > psnrs[1]
    assert row["samples"] == 6  # of which the four that are held out make one or two each
    assert "the samples are made from 4 pictures, in turn" in said
    assert "likely copies" in row
    assert "--condition pictures" in said
    # One sample of each is the first of three.
    assert judge(*model, "--data", folder / "own/image", "--count", 6) == 0
    alone = json.loads((folder / "found.json").read_text())["rows"][0]["restoration"]
    assert list(alone) == ["bicubic enlargement", "one sample"]
    assert alone["one sample"]["PSNR"] == pytest.approx(psnrs[1], abs=1e-3)
    capsys.readouterr()
    # Other images are all held out, and copies are looked for in what was trained on.
    config = folder / "lowres/config.yaml"
    config.write_text(config.read_text().replace("val: 4", "val: 8"))  # more than the six others
    assert judge(*model, "--data", folder / "other/image", "--count", 6) == 0
    assert "in turn" not in (said := capsys.readouterr().out)
    assert "likely copies" in said
    config.rename(config.with_suffix(".away"))
    assert judge(*model, "--data", folder / "other/image", "--count", 6) == 0
    config.with_suffix(".away").rename(config)
    assert "what the model was trained on is not here" in (said := capsys.readouterr().out)
    assert "likely copies" not in said
    # Where none was held out there is none to judge by but others.
    kept = config.read_text()
    config.write_text(kept.replace("val: 8", "val: 0"))
    assert judge(*model, "--data", folder / "own/image", "--count", 6) == 2
    assert "give others as --data" in capsys.readouterr().err
    assert judge(*model, "--data", folder / "other/image", "--count", 6) == 0
    assert "likely copies" in capsys.readouterr().out
    config.write_text(kept)


def test_of_images_with_a_hole_it_is_told_that_the_hole_is_judged(folder: Path, capsys: Any):
    given = ("--model", folder / "hole/model", "--data", folder / "own/image", "--count", 4)
    assert judge(*given, "--out", folder / "found.json") == 0
    row = json.loads((folder / "found.json").read_text())["rows"][0]
    assert list(row["restoration"]) == ["the image with a hole", "one sample"]
    assert "PSNR and SSIM are of the hole alone" in capsys.readouterr().out


def test_masks_are_read_in_what_was_made_from_them(folder: Path, capsys: Any) -> None:
    model = ("--model", folder / "mask/model", "--count", 4, "--segmenter", folder / "reader-2")
    for place, masks in (("own", ()), ("other", ("--condition", folder / "other/mask"))):
        out = ("--out", folder / "found.json")
        assert judge(*model, "--data", folder / place / "image", *masks, *out) == 0
        row = json.loads((folder / "found.json").read_text())["rows"][0]
        assert list(row["restoration"]) == ["one sample"]
        ours, ceiling, ratio = row["faithfulness"].values()
        assert set(ours) == {"Dice", "V_Rand"}
        said = capsys.readouterr().out
        for name, value in ratio.items():
            assert value == pytest.approx(ours[name] / ceiling[name])
            assert f"{value:.4f}" in said


@pytest.mark.parametrize("values", [[0, 7], [0, 5, 7]])
def test_real_images_are_as_faithful_as_the_ceiling(folder: Path, values: list[int]) -> None:
    condition = find_condition(str(folder / "own/mask"), 1)
    images, masks = folder / "other/image", folder / "other/mask"
    data = DiffusionData(images, condition=condition, pictures=masks, val=2)
    sampler = ImageSampler(load_for_sampling(folder / "mask/model", "cpu"), SamplingOptions())
    read = MaskReader(reader(folder, values), sampler, "cpu")
    chosen = [*data.val, *data.train]
    real, asked = data.images(chosen), read.asked(data, chosen)
    assert np.array_equal(asked == 7, real[..., 0] > 99)
    found = faithfulness(read, real, real, asked)
    assert set(found["their ratio"].values()) == {1.0}
    assert ("V_Rand" in found["their ratio"]) == (len(values) == 2)
    perfect = read.segmenter(real[..., 0])
    assert read(real, perfect.astype(np.int64))["Dice"] == 1


def test_fine_images_are_read_in_their_values(folder: Path) -> None:
    """Of 16 bits and a range of their own as of bytes; a value that is ignored does not count."""
    model = load_for_sampling(folder / "mask/model", "cpu")
    coarse = MaskReader(reader(folder, [0, 7]), ImageSampler(model, SamplingOptions()), "cpu")
    model.info |= {"dtype": "uint16", "ranges": {"uint16": [0, 4095]}}
    sampler = ImageSampler(model, SamplingOptions())
    fine = MaskReader(reader(folder, [0, 7], "uint16"), sampler, "cpu")
    images = RNG.integers(0, 256, (3, SIDE, SIDE, 1), np.uint8)
    masks = np.where(images[..., 0] > 99, 7, 0)
    assert fine(images, masks)["Dice"] == pytest.approx(coarse(images, masks)["Dice"], abs=0.01)
    with pytest.raises(InputError, match=r"grey \(1 channel\) uint8, and .* uint16: give a segm"):
        MaskReader(reader(folder, [0, 7]), sampler, "cpu")
    ignoring = MaskReader(reader(folder, [0, 5], "uint16", ignored=7), sampler, "cpu")
    assert "Dice" in ignoring(images, masks)
    reader(folder, [0, 7])


@pytest.mark.parametrize(
    ("run", "more", "told"),
    [
        ("mask", (), "give the folder of those that go with"),
        ("mask", ("--condition", "own/mask"), "no condition for 1 image"),
        ("mask", ("--condition", "lone", "--segmenter", "reader-3"), "give a segmentation of such"),
        ("lowres", ("--condition", "own/mask"), "which is made from those of --data: leave it out"),
        ("lowres", ("--segmenter", "reader-2"), "reads masks, and images are made from the image"),
        ("lowres", ("--each", 0), "--each 0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    folder: Path, run: str, more: tuple[object, ...], told: str, capsys: Any
) -> None:
    reader(folder, [0, 5, 9])
    write_image(folder / "lone/99.png", np.zeros((SIDE, SIDE), np.uint8))
    for i in range(4):
        write_image(folder / f"lone/{i}.png", np.zeros((SIDE, SIDE), np.uint8))
    paths = [folder / m if isinstance(m, str) and m[0] != "-" else m for m in more]
    data = ("--data", folder / "lone", "--count", 4)
    assert judge("--model", folder / run / "model", *data, *paths) == 2
    assert told in capsys.readouterr().err


def test_a_model_of_noise_alone_has_no_pictures(folder: Path, capsys: Any) -> None:
    config = UNetConfig(in_channels=1, channels=8, multipliers=(1, 2), block="res", time=True)
    info = {"schedule": NoiseSchedule(kind="cosine", steps=20).to_dict(), "prediction": "v"}
    DiffusionUNet(config, 1, {**info, "size": [SIDE, SIDE]}).save_pretrained(folder / "plain")
    assert judge("--model", folder / "plain", "--data", folder / "own/image", "--each", 2) == 2
    assert "are for models that make images from pictures" in capsys.readouterr().err
