"""A trained model that is called: the masks of the command, every layout of images, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from segmentation import Segmenter, load
from segmentation.data.classes import ClassTable
from segmentation.data.instances import INSTANCE_NAMES, OBJECT_NAMES
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor
from segmentation.segmenter import load_models
from unet import InputError, UNetConfig
from unet.files.images import read_image, read_mask, write_image
from unet_diffusion import predict_seg

GREY = {"mean": [128.0], "std": [40.0], "dtype": "uint8"}
COLOURS = [[0, 0, 0], [0, 128, 0], [255, 0, 0]]
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
BLOCKS = np.kron(RNG.integers(0, 256, (5, 7), dtype=np.uint8), np.ones((8, 8), np.uint8))


def table(values: list[Any], names: tuple[str, ...] = ()) -> dict[str, Any]:
    shares = [1 / len(values)] * len(values)
    return {"values": values, "shares": shares, "ignore_value": None, "ignored_share": 0} | {
        "names": names
    }


def saved(
    folder: Path,
    values: list[Any],
    normalisation: dict[str, Any] = GREY,
    names: tuple[str, ...] = (),
    seed: int = 0,
    objects: bool = False,
    slices: int = 1,
) -> str:
    torch.manual_seed(seed)
    config = UNetConfig(in_channels=len(normalisation["mean"]), channels=4, multipliers=(1, 2))
    info = {"classes": table(values, names), "normalisation": normalisation, "threshold": 0.47}
    info |= {"objects": "depth"} if objects else {}
    info |= {"slices": slices} if slices > 1 else {}
    model = SegmentationUNet(config, 2 if objects else 1 if len(values) == 2 else len(values), info)
    with torch.no_grad():  # so that a random network finds every class
        weight, bias = model.head.conv.weight, model.head.conv.bias
        torch.nn.init.normal_(weight, std=3)
        x = torch.randn(1, config.in_channels, 40, 56)
        if objects:  # half of the pixels of these blocks are objects
            x = (torch.from_numpy(BLOCKS).float() - 128)[None, None] / 40
        means = model.trunk.eval()(x).mean((0, 2, 3))
        bias.copy_(-weight[..., 0, 0] @ means)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "cells", [0, 255])


@pytest.fixture(scope="module")
def model(folder: str) -> Segmenter:
    return load(folder, device="cpu")


def of_type(folder: Path, dtype: str, channels: int = 1, mean: float = 128.0) -> Segmenter:
    normalisation = {"mean": [mean] * channels, "std": [40.0] * channels, "dtype": dtype}
    return load(saved(folder, [0, 1], normalisation), device="cpu")


# -- what the command writes


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 255], ()),
        ([7, 300], ()),
        ([0, 1], OBJECT_NAMES),
        ([0, 1, 2], INSTANCE_NAMES),
        (COLOURS, ()),
    ],
    ids=["two", "16 bits", "depth", "border", "colours"],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"tta": True, "tile": 32, "overlap": 8, "min_size": 3, "threshold": 0.5}],
    ids=["plain", "set"],
)
def test_a_call_gives_what_the_command_writes(
    tmp_path: Path, values: list[Any], names: tuple[str, ...], settings: dict[str, Any]
) -> None:
    kind: dict[str, Any] = {"names": names, "objects": names == OBJECT_NAMES}
    folders = [saved(tmp_path / f"m{i}", values, seed=i, **kind) for i in range(2)]
    write_image(tmp_path / "x.png", BLOCKS)
    labels = values is not COLOURS
    predict_seg.main(
        predict_seg.PredictOptions(
            model=tuple(folders),
            input=tmp_path / "x.png",
            out=tmp_path / "out",
            labels=labels,
            device="cpu",
            **settings,
        )
    )
    found = load(*folders, device="cpu", **settings)
    mask, written = found(BLOCKS), read_mask(tmp_path / "out/x_mask.png")
    assert mask.dtype == written.dtype
    assert np.array_equal(mask, written)
    assert len(np.unique(mask)) > 1
    probability = found.probability(BLOCKS)
    largest = probability if len(values) == 2 else probability.max(axis=-1)
    written = read_image(tmp_path / "out/x_probability.png")[..., 0]
    assert np.array_equal(np.round(largest * 65535).astype(np.uint16), written)
    if labels:
        numbers = found.labels(BLOCKS)
        assert numbers.dtype == np.int32
        assert np.array_equal(numbers, read_image(tmp_path / "out/x_labels.tif")[..., 0])


def test_probabilities_of_several_classes_come_last_and_add_up(tmp_path: Path) -> None:
    found = load(saved(tmp_path, COLOURS), device="cpu")
    probability = found.probability(IMAGE)
    assert probability.shape == (40, 56, 3)
    assert probability.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    colours = np.array(found.classes, np.uint8)
    assert np.array_equal(found(IMAGE), colours[probability.argmax(axis=-1)])
    assert found.classes == ((0, 0, 0), (0, 128, 0), (255, 0, 0))
    with pytest.raises(InputError, match="the second of two classes, but the model has 3 classes"):
        found.labels(IMAGE)


def test_what_a_model_says_of_itself(model: Segmenter, tmp_path: Path) -> None:
    assert (model.channels, model.dtype, model.classes, model.names) == (1, "uint8", (0, 255), ())
    assert repr(model) == "Segmenter(1 model, channels=1, dtype='uint8', classes=(0, 255))"
    cells = load(saved(tmp_path, [0, 1, 2], names=INSTANCE_NAMES), device="cpu")
    assert cells.instances
    assert cells.names == INSTANCE_NAMES
    assert not model.instances


def test_seams_of_tiles_part_no_instance(tmp_path: Path) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (19, 12)).astype(np.uint8)
    image = np.kron(blocks, np.ones((8, 8), np.uint8))[:150, :90]
    folder = saved(tmp_path, [0, 1], names=OBJECT_NAMES, objects=True)
    whole, tiled = load(folder, device="cpu"), load(folder, device="cpu", tile=64, overlap=32)
    assert whole.labels(image).max() > 5
    assert np.array_equal(tiled.labels(image), whole.labels(image))


def test_models_that_know_objects_otherwise_are_refused(tmp_path: Path) -> None:
    new = saved(tmp_path / "new", [0, 1], names=OBJECT_NAMES, objects=True)
    plain = saved(tmp_path / "plain", [0, 1], names=OBJECT_NAMES)
    assert load(new, device="cpu").instances
    assert not load(plain, device="cpu").instances
    with pytest.raises(InputError, match="average models for the same classes"):
        load(new, plain, device="cpu")
    model = SegmentationUNet.from_pretrained(new)
    with pytest.raises(InputError, match="encodes objects as 'stars'"):
        SegmentationUNet(model.config, 2, model.info | {"objects": "stars"})
    with pytest.raises(InputError, match="has 2 channels, a logit and the depth, not 1"):
        SegmentationUNet(model.config, 1, model.info)


def test_the_smallest_instance_is_that_of_training(tmp_path: Path) -> None:
    folder = saved(tmp_path, [0, 1, 2], names=INSTANCE_NAMES)
    every = load(folder, device="cpu")
    sizes = np.bincount(every.labels(IMAGE).ravel())[1:]
    least = int(np.median(sizes)) + 1
    model = SegmentationUNet.from_pretrained(folder)
    model.info["smallest_object"] = least
    model.save_pretrained(folder)
    found = load(folder, device="cpu")
    assert (every.min_size, found.min_size) == (0, least)
    left = np.bincount(found.labels(IMAGE).ravel())[1:]
    assert sorted(left) == sorted(sizes[sizes >= least])
    assert np.array_equal(found(IMAGE), every(IMAGE))
    assert np.array_equal(load(folder, device="cpu", min_size=0).labels(IMAGE), every.labels(IMAGE))
    model.info["smallest_object"] = "many"
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="the smallest_object 'many'"):
        load(folder, device="cpu")


# -- layouts and files


def test_every_layout_of_a_grey_image(model: Segmenter) -> None:
    mask = model(IMAGE)
    assert mask.shape == (40, 56)
    assert set(np.unique(mask)) <= {0, 255}
    for single in (IMAGE[..., None], torch.from_numpy(IMAGE), np.asfortranarray(IMAGE)):
        assert np.array_equal(model(single), mask)
    for batch in (np.stack([IMAGE, IMAGE[::-1]]), torch.from_numpy(np.stack([IMAGE, 255 - IMAGE]))):
        for given in (batch, batch[..., None]):
            found = model(given)
            assert found.shape == (2, 40, 56)
            assert np.array_equal(found[0], mask)
    assert model(IMAGE[None]).shape == (1, 40, 56)
    assert model.labels(np.stack([IMAGE] * 2)).shape == (2, 40, 56)
    assert model.probability(np.stack([IMAGE] * 2)).shape == (2, 40, 56)
    assert model(IMAGE[:1, :1]).shape == (1, 1)


def test_colour_images(tmp_path: Path) -> None:
    model = of_type(tmp_path / "rgb", "uint8", channels=3)
    image = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    mask = model(image)
    assert mask.shape == (24, 32)
    assert model(image[:, :3]).shape == (24, 3)
    assert np.array_equal(model(np.stack([image] * 2))[1], mask)
    write_image(tmp_path / "grey.png", image[..., 0])  # as among the training images
    assert np.array_equal(model(tmp_path / "grey.png"), model(np.stack([image[..., 0]] * 3, -1)))


def test_files_and_stacks(model: Segmenter, tmp_path: Path) -> None:
    mask = model(IMAGE)
    write_image(tmp_path / "x.png", IMAGE)
    tifffile.imwrite(tmp_path / "x.tif", np.stack([IMAGE, IMAGE]), photometric="minisblack")
    assert np.array_equal(model(tmp_path / "x.png"), mask)
    assert np.array_equal(model(str(tmp_path / "x.png")), mask)
    assert np.array_equal(model(tmp_path / "x.tif"), np.stack([mask, mask]))
    write_image(tmp_path / "rgb.png", np.stack([IMAGE] * 3, axis=-1))
    with pytest.raises(InputError, match=r"rgb.png' has 3 channels of uint8, but the training"):
        model(tmp_path / "rgb.png")
    write_image(tmp_path / "deep.png", IMAGE.astype(np.uint16))
    with pytest.raises(InputError, match=r"has 1 channel of uint16, .*: give it in uint8"):
        model(tmp_path / "deep.png")
    write_image(tmp_path / "both.png", np.stack([IMAGE] * 3, axis=-1).astype(np.uint16))
    with pytest.raises(InputError, match=r"with --channels, and give it in uint8"):
        model(tmp_path / "both.png")
    with pytest.raises(InputError, match="is a folder: give one of its images"):
        model(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        model(tmp_path / "none.png")


# -- types


def test_whole_numbers_that_name_no_range_are_converted(tmp_path: Path, model: Segmenter) -> None:
    mask = model(IMAGE)
    for dtype in (np.int64, np.int16, np.uint32):
        assert np.array_equal(model(IMAGE.astype(dtype)), mask)
    deep = of_type(tmp_path / "16", "uint16")
    assert np.array_equal(deep(IMAGE.astype(">u2")), deep(IMAGE.astype(np.uint16)))
    floats = of_type(tmp_path / "32", "float32")
    wanted = floats(IMAGE.astype(np.float32))
    for dtype in (np.float64, np.float16, np.int32, ">f4"):
        assert np.array_equal(floats(IMAGE.astype(dtype)), wanted)
    tensor = torch.from_numpy(IMAGE).bfloat16().requires_grad_()
    assert np.array_equal(floats(tensor), floats(tensor.detach().float().numpy()))


REFUSED: list[tuple[str, int, Any, str]] = [
    ("uint8", 1, IMAGE / 255.0, r"float64 from 0 to 1, .* uint8: give \(image \* 255\)\.round\(\)"),
    ("uint8", 1, IMAGE * 1.0, r"give image\.round\(\)\.astype\(np\.uint8\) if 255 is white"),
    ("uint8", 1, IMAGE - 300.0, "scale it to values from 0 to 255"),
    ("uint8", 1, np.full((4, 4), np.nan), "replace what is NaN or infinite"),
    ("uint8", 1, IMAGE > 9, r"holds bool, but .* uint8: give image.astype\(np.uint8\) \* white"),
    ("uint8", 1, IMAGE.astype(np.uint16), r"uint16 from 0 to 255, .* image.astype\(np.uint8\) if"),
    ("uint8", 1, IMAGE.astype(np.int64) - 1, "int64 from -1 to 254, .* scale it to values"),
    ("uint8", 1, IMAGE.astype(np.int64) + 1, "int64 from 1 to 256, .* scale it to values"),
    ("uint8", 1, IMAGE.astype(complex), "complex128"),
    ("uint8", 1, IMAGE.astype(object), "object"),
    ("uint16", 1, IMAGE, r"holds uint8 .* uint16: give image.astype\(np.uint16\) \* 257"),
    ("float32", 1, IMAGE, r"give image.astype\(np.float32\) if they had these values, else scale"),
    ("float32", 1, np.full((4, 4), np.inf, np.float32), "NaN, infinite or too large"),
    ("float32", 1, np.full((4, 4), 1e300), "NaN, infinite or too large"),
    ("uint8", 1, IMAGE[:0], r"\(0, 56\), so it holds no pixel"),
    ("uint8", 1, IMAGE[0], r"shape \(56,\) does not fit .* has the shape \(H, W\)"),
    ("uint8", 1, IMAGE[None, None, None], "does not fit a model for grey"),
    ("uint8", 1, np.stack([IMAGE] * 3, -1), r"image\[\.\.\., 0\], or image\[\.\.\., None\] if it"),
    ("uint8", 1, np.stack([IMAGE] * 3, -1)[None], r"give one channel, such as image\[\.\.\., 0\]$"),
    ("uint8", 1, IMAGE[None, None], r"come last, so give np\.moveaxis\(image, -3, -1\)"),
    ("uint8", 3, IMAGE, r"for RGB images \(3 channels\): give np\.stack\(\[image\] \* 3"),
    ("uint8", 3, np.stack([IMAGE] * 3), r"np\.moveaxis\(image, -3, -1\)"),
    ("uint8", 3, np.stack([IMAGE] * 4, -1), r"image\[\.\.\., :3\]"),
    ("uint8", 3, np.stack([IMAGE] * 5), r"has the shape \(H, W, 3\) or a batch"),
    ("uint8", 1, [[1, 2], [3, 4]], "not list: convert it with np.asarray"),
    ("uint8", 1, None, "not NoneType"),
    ("uint8", 1, torch.empty(4, 4, device="meta"), "has no values that an array can hold"),
]


@pytest.mark.parametrize(("dtype", "channels", "image", "told"), REFUSED, ids=range(len(REFUSED)))
def test_an_image_that_does_not_fit_is_one_sentence(
    tmp_path: Path, dtype: str, channels: int, image: Any, told: str
) -> None:
    model = of_type(tmp_path, dtype, channels)
    for call in (model, model.probability, model.labels):
        with pytest.raises(ValueError, match=told):
            call(image)


# -- loading


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tile": 0}, "tile=0 must be at least 1"),
        ({"precision": "fp8"}, "^precision 'fp8' is unknown: choose from auto, fp32, bf16, fp16"),
        ({"overlap": -1}, "overlap=-1 must be at least 0"),
        ({"min_size": -1}, "min_size=-1 must be at least 0"),
        ({"threshold": 1.5}, "threshold=1.5 must be from 0 to 1"),
        ({"device": "cuda:99"}, "^device cuda:99 cannot be used here"),
        ({"tile": 8, "overlap": 8}, "choose a larger tile or a smaller overlap"),
    ],
)
def test_settings_out_of_range(folder: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(folder, **settings)


def test_a_model_of_your_own_needs_a_normalisation() -> None:
    model = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 1)
    segmenter = Segmenter(Predictor([model]), ClassTable.from_dict(table([0, 255])), 0.5)
    with pytest.raises(InputError, match=r"no 'normalisation', .* Normalisation\.to_dict gives"):
        segmenter(np.zeros((8, 8), np.uint8))


def test_no_model_and_models_that_do_not_go_together(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="load needs a model folder"):
        load()
    with pytest.raises(InputError, match="is no folder: give a model folder"):
        load(tmp_path / "none")
    deep = saved(tmp_path / "16", [0, 255], {**GREY, "dtype": "uint16"})
    with pytest.raises(InputError, match=r"takes images of uint16, but .* of uint8: average"):
        load_models([folder, deep])


@pytest.mark.parametrize("package", ["unet", "segmentation", "diffusion"])
def test_torch_is_not_loaded_before_it_is_used(package: str) -> None:
    code = f"import sys, {package}; assert 'torch' not in sys.modules; dir({package})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        __import__(package).no_such  # noqa: B018
