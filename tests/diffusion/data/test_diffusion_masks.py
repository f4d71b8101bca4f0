"""Masks as what is made: codes and back, folders of several annotators, a model that keeps it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import load
from diffusion.data.images import DiffusionData
from diffusion.data.masks import MaskCoding
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.training import train
from unet import InputError
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet_diffusion import predict_seg, sample_ddpm
from unet_diffusion.sampled import MaskSampler


def write(folder: Path, values: tuple[int, ...] = (0, 255), count: int = 8, side: int = 16) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (side, side)).astype(np.uint8)
        write_image(folder / f"images/{i}.png", image)
        for a in (1, 2):
            mask = np.array(values, np.uint8)[(image.astype(int) * len(values) + 20 * a) // 300]
            write_image(folder / f"masks/{a}/{i}.png", mask)


@pytest.mark.parametrize("coding", ["bits", "one-hot"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_codes_become_the_values_again_through_noise(coding, count):
    values = tuple(range(7, 7 + 3 * count, 3))
    masks = MaskCoding(values=values, coding=coding)
    assert masks.channels == (count if coding == "one-hot" else (count - 1).bit_length())
    assert len({tuple(code) for code in masks.codes.tolist()}) == count
    indices = np.random.default_rng(0).integers(0, count, (9, 5))
    noisy = (
        masks.codes[indices] * 0.6 + 255 * 0.2 + np.random.default_rng(1).normal(0, 9, (9, 5, 1))
    )
    decoded = masks.decode(noisy.round().astype(np.uint8))
    assert np.array_equal(decoded[..., 0], np.array(values)[indices])
    assert np.array_equal(masks.nearest(noisy.astype(np.uint8)), masks.codes[indices])
    assert MaskCoding.from_dict(masks.to_dict()) == masks
    with pytest.raises(InputError, match="target is damaged"):
        MaskCoding.from_dict({**masks.to_dict(), "values": [3, 1]})


def test_data_of_masks_are_their_codes_and_annotators_of_an_image_are_on_one_side(tmp_path):
    write(tmp_path, (0, 3, 9))
    data = DiffusionData(
        tmp_path / "masks", condition=str(tmp_path / "images"), masks="bits", size=8, val=2
    )
    assert data.channels == 2
    x, _ = data.batch(data.train)
    assert set(x.unique().tolist()) == {-1.0, 1.0}  # also once they are resized
    sides = [{Path(data.name(i)).stem for i in part} for part in (data.train, data.val)]
    assert len(data.val) == 4
    assert not sides[0] & sides[1]
    assert set(np.unique(data.images(data.train))) == {0, 128, 255}
    assert "masks of the values 0, 3, 9, as bits" in data.describe()


def test_what_is_no_mask_is_told(tmp_path):
    write(tmp_path)
    options = {"out": tmp_path / "run", "data": str(tmp_path / "images"), "target": "mask"}
    with pytest.raises(InputError, match="give the folder of these as --condition"):
        DiffusionOptions(**options)
    with pytest.raises(InputError, match=r"hold 1.. values up to 255, where masks have up to 32"):
        train(DiffusionOptions(**options, condition=str(tmp_path / "images")))


def test_a_model_of_masks_makes_masks_of_images(tmp_path, capsys, short_runs):
    write(tmp_path, count=4, side=8)
    options = DiffusionOptions(
        out=tmp_path / "run",
        data=str(tmp_path / "masks"),
        condition=str(tmp_path / "images"),
        target="mask",
        width=8,
        steps=2,
        evaluations=1,
        batch_size=4,
        timesteps=3,  # as many steps have the samples of predict-seg
        val=1,
        device="cpu",
    )
    train(options)
    model = tmp_path / "run/model"
    torch.manual_seed(0)
    made = load(model, device="cpu")(3, pictures=tmp_path / "images/0.png", steps=3)
    assert made.shape == (3, 8, 8, 1)
    assert set(np.unique(made)) <= {0, 255}
    assert "unet-predict-seg" in (model / "README.md").read_text()
    argv = ["--model", model, "--condition", tmp_path / "images", "--out", tmp_path / "made"]
    argv += ["--steps", "2", "--each", "2"]
    assert run_script(sample_ddpm.main, sample_ddpm.SampleOptions, list(map(str, argv))) == 0
    assert set(np.unique(read_image(tmp_path / "made/images/3_1.png"))) <= {0, 255}

    def predict(*flags: object) -> int:
        argv = ["--model", model, "--input", tmp_path / "images", "--out", tmp_path / "p", *flags]
        return run_script(predict_seg.main, predict_seg.PredictOptions, list(map(str, argv)))

    assert predict() == 2
    assert "such as --samples 16" in capsys.readouterr().err
    assert predict("--samples", 3, "--tta") == 2
    assert predict("--samples", 3, "--keep-samples") == 0
    samples = np.stack([read_image(tmp_path / f"p/3_sample_{i}.png")[..., 0] for i in range(3)])
    probability = read_image(tmp_path / "p/3_probability.png")[..., 0] / 65535
    np.testing.assert_allclose(probability, (samples == 255).mean(axis=0), atol=1e-4)
    mask = read_image(tmp_path / "p/3_mask.png")[..., 0]
    assert np.array_equal(mask == 255, probability > 0.5)
    unsure = read_image(tmp_path / "p/3_entropy.png")[..., 0] > 0
    assert np.array_equal(unsure, (samples != samples[0]).any(axis=0))
    sampler = MaskSampler(model, 3, SamplingOptions(device="cpu"))
    assert np.array_equal(sampler(tmp_path / "images/3.png") * 255, samples)
    large = tmp_path / "large.png"
    write_image(large, read_image(tmp_path / "images/3.png").repeat(2, 0).repeat(2, 1))
    assert sampler(large).shape == (3, 16, 16)
    write_image(large, np.zeros((8, 10), np.uint8))
    with pytest.raises(InputError, match="cut it to these proportions"):
        sampler(large)
