"""Images of 16 bits and of floats keep their precision, from the file to the network and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import load
from diffusion.data.conditions import ImageKind, find_condition
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import PixelType, ValueRange, as_levels, as_tensor, resized
from diffusion.data.sources import HowToRead
from diffusion.decisions import decide
from diffusion.generator import ImageGenerator
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.sampling import ImageSampler
from diffusion.training import load_data, load_prior, make_model
from segmentation.data.pairs import find_pairs
from unet.errors import InputError
from unet.files.images import image_info, read_image, write_image
from unet.files.pages import Array, Reading
from unet.training.cli import run_script
from unet_diffusion import eval_ddpm, sample_ddpm, train_ddpm

pytestmark = pytest.mark.usefixtures("short_runs")

TINY = ("--width", 8, "--batch-size", 4, "--timesteps", 3, "--evaluations", 1, "--steps", 1)
TYPES = ("uint16", "float32")


def run(module: Any, kind: Any, *arguments: object) -> int:
    return run_script(module.main, kind, list(map(str, arguments)))


def images(dtype: str, *shape: int) -> Array:
    """Smooth images (N, H, W, C), each channel of values of its own: 12-bit ones, or floats."""
    rng = np.random.default_rng(0)
    found = rng.random(shape).cumsum(1).cumsum(2)
    found *= 0.4 ** np.arange(shape[-1]) / found.max(axis=(0, 1, 2))
    return np.rint(found * 4095).astype(dtype) if dtype == "uint16" else found.astype(dtype) * 30


def folder(path: Path, pictures: Array) -> Path:
    for i, picture in enumerate(pictures):
        write_image(path / f"{i}.tif", picture)
    return path


def untrained(data: Path, **more: Any) -> DiffusionUNet:
    """A network of random weights, with all that training would save of these images."""
    given: dict[str, Any] = {"width": 8, "timesteps": 3, "device": "cpu", "steps": 1}
    options = DiffusionOptions(data=str(data), out=data.parent / "run", **given, **more)
    return make_model(decide(options, load_data(options))).eval()


def index_of(data: DiffusionData, number: int) -> int:
    every = [*data.train, *data.val]
    return next(i for i in every if Path(data.name(i)).stem == str(number))


@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_every_16_bit_value_comes_back(white: int) -> None:
    values = np.arange(white + 1, dtype=np.uint16)[None, :, None]
    known = ValueRange(0, white)
    x = as_tensor(as_levels(values, 1, known, fine=True))
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    kind = PixelType("uint16", known)
    assert np.array_equal(kind.stored(kind.levels(x[None]))[0], values)
    assert kind.stored(kind.levels(3 * x[None])).max() == white  # clamped


def test_floats_come_back_within_their_precision() -> None:
    values = np.random.default_rng(0).normal(100, 700, (40, 50, 3)).astype(np.float32)
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    known = ValueRange(tuple(low.tolist()), tuple(high.tolist()))
    kind = PixelType("float32", known)
    x = as_tensor(as_levels(values, 3, known, fine=True))
    assert torch.equal(x.amin((1, 2)), -torch.ones(3))
    back = kind.stored(kind.levels(x[None]))[0]
    assert back.dtype == np.float32
    assert (np.abs(back - values) / (high - low)).max() < 2 * np.finfo(np.float32).eps


def test_fine_images_are_resized_as_bytes_are() -> None:
    """But for rounding; within black and white, beyond which Lanczos leads at edges."""
    waves = 128 + 90 * np.sin(np.indices((40, 52)).sum(0)[..., None] / (2, 3, 5))
    smooth = waves.astype(np.uint8)
    coarse, fine = (resized(as_levels(smooth, 3, fine=f), (16, 16)) for f in (False, True))
    assert (coarse.dtype, fine.dtype) == (np.uint8, np.float32)
    assert np.abs(coarse.astype(np.float32) - fine).max() < 1.5
    edges = resized(as_levels(np.uint8(255) * (smooth > 128), 3, fine=True), (16, 16))
    assert (edges.min(), edges.max()) == (0, 255)
    greys = [as_levels(smooth, 1, fine=f).astype(np.float32) for f in (False, True)]
    assert np.abs(greys[0] - greys[1]).max() < 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("archive", [False, True])
def test_a_data_set_gives_what_is_in_the_files(tmp_path: Path, dtype: str, archive: bool) -> None:
    pictures = images(dtype, 6, 8, 12, 2)
    if archive:
        np.savez(tmp_path / "a.npz", images=pictures)
    source = tmp_path / "a.npz" if archive else folder(tmp_path / "images", pictures)
    reading = Reading(axes="NYXC") if archive else Reading()
    data = DiffusionData(source, how=HowToRead(reading=reading))
    assert data.dtype == dtype
    told = data.describe()
    assert "converted" not in told
    assert f"images are made as {dtype}" in told
    every = [*data.train, *data.val]
    numbers = [int(re.findall(r"\d+", data.name(i))[-1]) for i in every]
    x = data.batch(every)[0]
    info = {"dtype": dtype, "ranges": {dtype: data.ranges[dtype].each(2)}}
    kind = PixelType.of(json.loads(json.dumps(info)))
    back = kind.stored(kind.levels(x))
    atol = 0 if dtype == "uint16" else 1e-5
    assert np.allclose(back, pictures[numbers], rtol=0, atol=atol)
    # Each channel fills the range, though the second has 0.4 of the values of the first.
    assert (x.amax((0, 2, 3)) - x.amin((0, 2, 3)) > 1.5).all()
    assert data.images(data.val).dtype == np.uint8


def test_colours_have_one_range_and_mixed_sets_8_bits(tmp_path: Path) -> None:
    pictures = images("uint16", 6, 8, 12, 3)
    data = DiffusionData(folder(tmp_path, pictures))
    assert data.ranges["uint16"] == ValueRange(0, 4095)
    whole = data.batch([index_of(data, 2)])[0]
    write_image(tmp_path / "9.png", np.zeros((8, 12, 3), np.uint8))
    mixed = DiffusionData(tmp_path)
    assert mixed.dtype == DiffusionData(tmp_path, fine=False).dtype == "uint8"
    assert "RGB uint16, RGB uint8, all converted to RGB uint8" in mixed.describe()
    levels = (mixed.batch([index_of(mixed, 2)])[0] + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert torch.allclose(levels, (whole + 1) * 127.5, atol=0.51)


@pytest.mark.parametrize(("dtype", "channels"), [("uint16", 5), ("float32", 1)])
def test_what_is_made_is_of_the_kind_of_what_was_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, channels: int
) -> None:
    """Trained, gone on with, sampled, and read again as data of the same kind."""
    pictures = images(dtype, 8, 12, 16, channels)
    data = folder(tmp_path / "data", pictures)
    out = ("--out", tmp_path / "run")
    assert run(train_ddpm, DiffusionOptions, "--data", data, *TINY, *out) == 0
    assert run(train_ddpm, DiffusionOptions, *out, "--resume", "--steps", 2) == 0
    model = load(tmp_path / "run/model", device="cpu")
    assert (model.dtype, model.channels) == (dtype, channels)
    assert f"pixels, {model.model.pixels}," in (tmp_path / "run/model/README.md").read_text()
    made = model(3, steps=2, seed=1)
    assert (made.dtype, made.shape) == (dtype, (3, 12, 16, channels))
    low, high = model.model.pixels.values.each(channels)
    for c in range(channels):
        assert low[c] <= made[..., c].min() < made[..., c].max() <= high[c]
    found = (made - np.array(low)) / (np.array(high) - low) * 255
    assert np.abs(found - found.round()).max() > 0.3  # none of 256 levels
    argv = ("--model", tmp_path / "run/model", "--out", tmp_path / "made", "--count", 3)
    given = ("--steps", 2, "--seed", 1, "--npz")
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *argv, *given) == 0
    files = sorted((tmp_path / "made/images").iterdir())
    assert [image_info(file).dtype for file in files] == [dtype] * 3
    assert np.array_equal(np.stack([read_image(file) for file in files]), made)
    assert np.array_equal(np.load(tmp_path / "made/samples.npz")["images"], made)
    assert image_info(tmp_path / "made/grid.png").dtype == "uint8"
    assert DiffusionData(tmp_path / "made/images").dtype == dtype
    assert DiffusionData(tmp_path / "made/images").channels == channels
    capsys.readouterr()
    judged = ("--model", tmp_path / "run/model", "--data", data, "--count", 4, "--steps", 2)
    assert run(eval_ddpm, eval_ddpm.EvalOptions, *judged) == 0
    assert run(eval_ddpm, eval_ddpm.EvalOptions, *judged, "--bits", 1) == 2
    assert "--bits is for models of 8-bit images" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_given_icon_is_resized_as_those_of_training_were(tmp_path: Path, dtype: str) -> None:
    """Colours below transparent pixels are not seen."""
    icons = np.zeros((4, 24, 24, 4), dtype)
    icons[:, 5:19, 7:16] = np.iinfo(dtype).max * np.array([1.0, 0.2, 0, 1])
    data = folder(tmp_path / "data", icons)
    sampler = ImageSampler(untrained(data, colour="rgba", size=15), SamplingOptions())
    seen = DiffusionData(data, size=15, channels=4)
    given = sample_ddpm.picture(data / "2.tif", sampler)
    assert torch.equal(given, seen.batch([index_of(seen, 2)])[0])
    four = ImageSampler(untrained(data, size=15), SamplingOptions())  # such as of a satellite
    seen = DiffusionData(data, size=15, how=HowToRead())
    given = sample_ddpm.picture(data / "2.tif", four)
    assert torch.equal(given, seen.batch([index_of(seen, 2)])[0])


@pytest.mark.parametrize("dtype", TYPES)
def test_images_are_edited_in_their_own_values(tmp_path: Path, dtype: str) -> None:
    """An image file is to sampling what it was to training; what is not made anew is kept."""
    pictures = images(dtype, 6, 8, 12, 2)
    data = folder(tmp_path / "data", pictures)
    model = untrained(data)
    model.save_pretrained(tmp_path / "model")
    kept = sample_ddpm.picture(data / "2.tif", ImageSampler(model, SamplingOptions()))
    seen = DiffusionData(data)
    assert torch.equal(kept, seen.batch([index_of(seen, 2)])[0])
    write_image(tmp_path / "mask.png", np.uint8(255) * (np.indices((8, 12))[1] >= 6))
    argv = ("--model", tmp_path / "model", "--out", tmp_path / "made", "--count", 1, "--steps", 2)
    part = ("--inpaint", data / "2.tif", "--mask", tmp_path / "mask.png")
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *argv, *part) == 0
    anew = read_image(tmp_path / "made/images/00000.tif").astype(np.float64)
    error = np.abs(anew - pictures[2])
    assert error[:, :6].max() <= (0 if dtype == "uint16" else 1e-5)
    assert (error[:, 6:] > 0).mean() > 0.9


@pytest.mark.parametrize("dtype", TYPES)
def test_conditions_keep_their_precision(tmp_path: Path, dtype: str) -> None:
    """A picture of a folder beside 8-bit images, and a recipe: given as they were in training."""
    pictures = images(dtype, 6, 8, 12, 1)
    fine = folder(tmp_path / "fine", pictures)
    for i in range(6):
        write_image(tmp_path / f"bytes/{i}.png", np.full((8, 12), i * 9, np.uint8))
    data = DiffusionData(tmp_path / "bytes", condition=str(fine))
    condition = data.condition
    assert condition is not None
    assert condition.fine
    assert data.dtype == "uint8"
    asked = data.conditions([index_of(data, 3)])[0].picture
    assert asked is not None
    back = condition.low + (asked[0].numpy() + 1) / 2 * (condition.high - condition.low)
    assert np.allclose(back, pictures[3, ..., 0], atol=0.01 if dtype == "uint16" else 1e-4)
    assert torch.equal(asked, condition.given(fine / "3.tif", ImageKind(size=None, channels=1)))
    assert torch.equal(
        data.batch([index_of(data, 3)])[0], torch.full((1, 1, 8, 12), 27 / 127.5 - 1)
    )
    of_itself = DiffusionData(fine, condition="noise:0.1")
    ranges = of_itself.ranges
    recipe = find_condition("noise:0.1", 1)
    kind = ImageKind(size=None, channels=1, ranges=ranges, fine=True)
    shown = recipe.given(fine / "3.tif", kind)
    assert torch.equal(shown, of_itself.batch([index_of(of_itself, 3)])[0][0])


@pytest.mark.parametrize("dtype", TYPES)
def test_images_with_masks_keep_their_precision(tmp_path: Path, dtype: str) -> None:
    pictures = images(dtype, 6, 12, 12, 1)
    data = folder(tmp_path / "data", pictures)
    for i in range(6):
        write_image(tmp_path / f"masks/{i}.png", (np.indices((12, 12))[0] > i) * np.uint8(7))
    model = untrained(data, joint=tmp_path / "masks")
    model.save_pretrained(tmp_path / "model")
    made = ImageGenerator(model)(2, steps=2, seed=1)
    assert (made.dtype, made.shape) == (dtype, (2, 12, 12, 2))
    argv = ("--model", tmp_path / "model", "--out", tmp_path / "made", "--count", 2)
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *argv, "--steps", 2, "--seed", 1) == 0
    for pair, both in zip(find_pairs(tmp_path / "made"), made, strict=True):
        assert pair.info.dtype == dtype
        assert np.array_equal(pair.read_image(), both[..., :1])
        assert np.array_equal(pair.read_mask(), both[..., 1])


def test_models_that_do_not_name_a_type_make_bytes() -> None:
    ranges = {"ranges": {"uint16": [0, 4095]}}
    assert PixelType.of({}) == PixelType.of(ranges) == PixelType()
    assert PixelType.of({**ranges, "joint": {}}) == PixelType("uint16", ValueRange(0, 4095))
    with pytest.raises(InputError, match=r"must name the type of its images in info\.dtype"):
        PixelType.of({"dtype": "int4"})
    with pytest.raises(InputError, match="known of 2 channels, not of 3"):
        as_levels(np.zeros((4, 4, 3), np.uint16), 3, ValueRange((0, 0), (9, 9)))
    with pytest.raises(InputError, match="ranges of values are damaged"):
        PixelType.of({"ranges": {"uint16": [[0, 0], [9]]}})


def test_a_lesser_model_of_other_values_is_refused(tmp_path: Path) -> None:
    model = untrained(folder(tmp_path / "data", images("uint16", 6, 8, 12, 1)))
    generator = ImageGenerator(model)
    model.save_pretrained(tmp_path / "model")
    assert generator(guide=str(tmp_path / "model"), guidance=2.0, steps=2).dtype == np.uint16
    model.info["ranges"] = {"uint16": [0, 1023]}
    with pytest.raises(InputError, match="differ in the type and values of its images"):
        generator(guide=str(tmp_path / "model"), guidance=2.0, steps=2)


def test_a_prior_is_of_the_type_and_in_the_values_of_the_images(tmp_path: Path) -> None:
    pictures = images("uint16", 6, 8, 12, 1)
    kinds = {"data": pictures, "darker": pictures // 16, "bytes": (pictures // 16).astype(np.uint8)}
    for name, these in kinds.items():
        for file in list(folder(tmp_path / name, these).iterdir()):
            file.with_suffix(".txt").write_text("a wave")
    given: dict[str, Any] = {"captions": True, "text_encoder": tmp_path, "init": "x"}
    data, prior = (tmp_path / name for name in ("data", "darker"))
    options = DiffusionOptions(data=str(data), prior=str(prior), **given)
    found = load_prior(options, load_data(options))
    assert isinstance(found, DiffusionData)
    assert found.ranges["uint16"] == ValueRange(0, 4095)
    options = DiffusionOptions(data=str(data), prior=str(tmp_path / "bytes"), **given)
    with pytest.raises(InputError, match=r"has images of uint8, and --data .* of uint16"):
        load_prior(options, load_data(options))
