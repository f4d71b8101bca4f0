"""How near images come to the ones that they were made to restore."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from diffusion.data.conditions import find_condition
from diffusion.data.images import DiffusionData
from diffusion.judging.evaluation import table
from diffusion.judging.restoration import Pairs, candidates, psnr, restoration, ssim
from unet.files.images import write_image

RNG = np.random.default_rng(0)
SAMPLER: Any = SimpleNamespace(classes=["1", "0"], class_index=["1", "0"].index)


def test_psnr_and_ssim_of_what_is_known() -> None:
    truth = RNG.integers(40, 200, (3, 16, 18, 3), np.uint8)
    for offset in (1, 7, 40):
        expected = [20 * math.log10(255 / offset)] * 3
        np.testing.assert_allclose(psnr(truth + np.uint8(offset), truth), expected)
    assert psnr(truth, truth).tolist() == [math.inf] * 3  # and no warning
    np.testing.assert_allclose(ssim(truth, truth), 1)
    assert (ssim(truth[:, ::-1], truth) < 0.5).all()
    assert np.isnan(ssim(truth[:, :10], truth[:, :10])).all()


def data_of(folder: Path, said: str, images: np.ndarray, **more: Any) -> DiffusionData:
    np.savez(folder / "set.npz", images=images, labels=np.arange(len(images)) % 2)
    return DiffusionData(folder / "set.npz", condition=find_condition(said, 1), **more)


@pytest.mark.parametrize("amount", [0.02, 0.1])
def test_the_floor_of_noise_is_its_standard_deviation(tmp_path: Path, amount: float) -> None:
    data = data_of(tmp_path, f"noise:{amount}", np.full((20, 32, 32), 128, np.uint8))
    pairs = Pairs.of(data, data.val, 12, SAMPLER)
    found = restoration(candidates(pairs.truth[None], pairs), pairs)
    assert found["the noisy image"]["PSNR"] == pytest.approx(-20 * math.log10(amount), abs=0.2)
    assert found["one sample"] == {"PSNR": math.inf, "SSIM": pytest.approx(1)}
    assert "inf" in "".join(table("restoration", found))


def test_pictures_are_taken_in_turn_with_their_images_and_classes(tmp_path: Path) -> None:
    data = data_of(tmp_path, "lowres:4", RNG.integers(0, 256, (8, 16, 16), np.uint8), val=3)
    pairs = Pairs.of(data, data.val, 7, SAMPLER)
    assert pairs.chosen == [*data.val, *data.val, data.val[0]]
    assert np.array_equal(pairs.truth, data.images(pairs.chosen))
    for index, wanted in zip(pairs.chosen, pairs.wanted, strict=True):
        asked = data.conditions([index])[0]
        assert wanted.read().equal(asked.read())
        assert wanted.picture.shape == (1, 16, 16)
        assert SAMPLER.classes[wanted.shown] == str(asked.shown)  # of the model, by its name


def test_bicubic_enlargement_is_the_floor_and_the_mean_is_judged_as_a_picture(
    tmp_path: Path,
) -> None:
    flat = np.repeat(RNG.integers(50, 200, 8), 256).reshape(8, 16, 16).astype(np.uint8)
    data = data_of(tmp_path, "lowres:4", flat, val=4)
    pairs = Pairs.of(data, data.val, 4, SAMPLER)
    off = np.stack([pairs.truth + np.uint8(9), pairs.truth - np.uint8(9)])
    found = restoration(candidates(off, pairs), pairs, lambda images: float(len(images)))
    rows = ["bicubic enlargement", "one sample", "mean of 2 samples", "the true images"]
    assert list(found) == rows
    assert found[rows[0]]["PSNR"] > 45
    assert found[rows[1]]["PSNR"] == pytest.approx(20 * math.log10(255 / 9))
    assert found[rows[2]]["PSNR"] == found[rows[3]]["PSNR"] == math.inf
    assert [row["Fréchet distance"] for row in found.values()] == [4] * 4


def test_of_a_hole_the_hole_alone_is_judged(tmp_path: Path) -> None:
    data = data_of(tmp_path, "hole", RNG.integers(20, 230, (8, 32, 32), np.uint8), val=4)
    pairs = Pairs.of(data, data.val, 4, SAMPLER)
    assert pairs.hole is not None
    assert pairs.floor is not None
    outside = ~pairs.hole
    assert np.array_equal(pairs.floor[outside], pairs.truth[outside])
    assert (pairs.floor[pairs.hole] == 128).all()
    off = pairs.truth + np.uint8(9)
    filled = np.where(pairs.hole[..., None], off, pairs.truth)  # with all around as it is
    found = restoration({"all": off, "hole": filled}, pairs)
    assert found["hole"]["PSNR"] == found["all"]["PSNR"] == pytest.approx(20 * math.log10(255 / 9))
    assert psnr(filled, pairs.truth).mean() > found["hole"]["PSNR"] + 1
    maps = [
        structural_similarity(
            *(images[i, ..., 0] for images in (pairs.truth, filled)),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        for i in range(4)
    ]
    expected = np.mean([local[hole].mean() for local, hole in zip(maps, pairs.hole, strict=True)])
    assert found["hole"]["SSIM"] == pytest.approx(expected)


def test_what_is_no_image_has_no_floor(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, 16, 16), np.uint8)
    for i, image in enumerate(images):
        write_image(tmp_path / f"image/{i}.png", image)
        write_image(tmp_path / f"mask/{i}.png", np.uint8(image > 99))
        write_image(tmp_path / f"picture/{i}.tif", image)
    for said, floor in (("mask", None), ("picture", images)):
        condition = find_condition(str(tmp_path / said), 1)
        data = DiffusionData(
            tmp_path / "image", condition=condition, pictures=tmp_path / said, val=2
        )
        pairs = Pairs.of(data, data.val, 2, SAMPLER)
        if floor is None:
            assert pairs.floor is None
            assert list(restoration(candidates(pairs.truth[None], pairs), pairs)) == ["one sample"]
        else:
            assert np.array_equal(pairs.floor, pairs.truth)
