"""Neighbouring slices as channels: the same from every kind of stack, by command and by call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segmentation import volumes
from segmentation.data.inputs import find_inputs
from segmentation.data.pairs import find_pairs
from segmentation.data.phantom import phantom_stack
from segmentation.data.slices import channel_names, near, near_page, with_neighbours
from segmentation.export.graph import exportable
from segmentation.options import SegmentationOptions
from segmentation.output import FilePredictor, find_slices, predict_files
from segmentation.predict import Predictor
from segmentation.segmenter import load, load_models
from segmentation.training import load_data, train
from segmentation.volumes import predict_volume
from tests.segmentation.test_seg_training import SMALL, run_predict, run_train
from unet import InputError
from unet.files.images import image_info, read_image, write_image
from unet.files.pages import ImageInfo, Reading
from unet_diffusion import eval_seg

IMAGES, MASKS = phantom_stack(6, (40, 48), seed=1)


def files(folder: Path, masks: bool = True) -> Path:
    for i, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True)):
        write_image(folder / "image" / f"s{i:02d}.png", image)
        if masks:
            write_image(folder / "label" / f"s{i:02d}.png", mask)
    return folder


def stacks(folder: Path) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "x.npy", IMAGES)
    np.save(folder / "y.npy", MASKS)
    return folder


def test_a_slice_has_its_neighbours_as_channels(tmp_path):
    expected = [np.stack([IMAGES[k] for k in near(i, 6, 5)], 2) for i in range(6)]
    folder, stack = files(tmp_path / "files"), stacks(tmp_path / "stack")
    for found in (
        find_pairs(folder),
        find_pairs(images=stack / "x.npy", masks=stack / "y.npy"),
        find_pairs(images=stack / "x.npy", masks=folder / "label"),
    ):
        pairs = with_neighbours(found, 5)
        assert [p.source for p in pairs] == [p.source for p in found]
        for i, pair in enumerate(pairs):
            assert (pair.read_image() == expected[i]).all()
            assert pair.info.channels == 5
            assert (pair.read_shown()[..., 0] == IMAGES[i]).all()
            assert (pair.read_mask() == MASKS[i]).all()
    assert channel_names((), 1, 3) == ("slice -1", "slice 0", "slice +1")
    assert channel_names(("a", "b"), 2, 3)[:3] == ("a slice -1", "b slice -1", "a slice 0")


def test_the_ends_of_each_series_are_ends(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 9), np.uint8))
    info = image_info(tmp_path / "x.npy", Reading(axes="TZYX"))
    assert (info.pages, info.series) == (6, 3)
    assert [near_page(i, info, 3) for i in (0, 2, 3, 5)] == [
        [0, 0, 1],
        [1, 2, 2],
        [3, 3, 4],
        [4, 5, 5],
    ]
    plain = ImageInfo(height=8, width=9, channels=1, dtype="uint8", pages=6)
    assert near_page(2, plain, 3) == [1, 2, 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    files(folder / "data")
    given: dict[str, Any] = {"width": 4, "crop": 32, "batch_size": 2, "evaluations": 1}
    train(
        SegmentationOptions(
            out=folder / "run", data=str(folder / "data"), slices=3, steps=2, **given
        )
    )
    return folder / "run"


def predictor(run: Path) -> FilePredictor:
    models, table, threshold = load_models([str(run / "model")], "cpu")
    return FilePredictor(Predictor(models), table, threshold)


def test_the_model_remembers_and_every_way_gives_the_same(run, tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    model = load(run / "model", device="cpu")
    assert (model.slices, model.channels) == (3, 1)
    expected = model(IMAGES)
    stack = stacks(tmp_path / "stack") / "x.npy"
    assert (model(stack) == expected).all()
    assert (model(IMAGES[..., None]) == expected).all()
    named = exportable(load_models([str(run / "model")], "cpu")[0][0]).metadata["channel_names"]
    assert json.loads(named) == ["slice -1", "slice 0", "slice +1"]

    folder = files(tmp_path / "new", masks=False) / "image"
    assert predict_files(predictor(run), find_inputs(folder), tmp_path / "files") == []
    assert predict_files(predictor(run), find_inputs(stack), tmp_path / "pages") == []
    for i in range(6):
        for name in (f"files/s{i:02d}_mask.png", f"pages/x_{i}_mask.png"):
            assert (read_image(tmp_path / name)[..., 0] == expected[i]).all()

    # Of a volume in slabs of two slices, and of one in bands.
    array = zarr.create_array(
        str(tmp_path / "v.zarr"), shape=(2, *IMAGES.shape), chunks=(1, 2, 40, 48), dtype="uint8"
    )
    array[...] = np.stack([IMAGES, IMAGES[::-1]])
    array.attrs["_ARRAY_DIMENSIONS"] = ["T", "Z", "Y", "X"]
    for out, most in (("slabs", volumes.AT_ONCE), ("bands", 100)):
        monkeypatch.setattr(volumes, "AT_ONCE", most)
        assert predict_volume(predictor(run), tmp_path / "v.zarr", tmp_path / out) == []
        found = zarr.open_array(str(tmp_path / out / "v_mask.zarr"), path="0", mode="r")[...]
        assert (found[0] == expected).all()
        assert (found[1] == model(IMAGES[::-1])).all()


def test_scores_and_more_training_follow_without_a_flag(run, tmp_path, capsys):
    argv = ["--model", str(run / "model"), "--out", str(tmp_path / "own")]
    assert eval_seg.command(argv) == 0
    own = json.loads((tmp_path / "own/scores.json").read_text())
    figures = json.loads((run / "model/config.json").read_text())["info"]["training"]["figures"]
    assert own["scores"]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    stack = stacks(tmp_path / "stack")
    given = ("--images", stack / "x.npy", "--masks", stack / "y.npy", "--out", tmp_path / "other")
    assert eval_seg.command([*argv[:2], *map(str, given)]) == 0
    assert run_train("--out", run, "--resume", "--steps", 3) == 0
    printed = capsys.readouterr().out
    assert "neighbours within 1 stack of 6 slices (image/s*)" in printed
    assert "3 as channels" in printed
    card = (run / "model/README.md").read_text()
    assert "from segmentation import load" in card
    assert 'mask = model("stack.tif")  # or an array (N, H, W) or (N, H, W, C)' in card
    assert "stacks, 3 neighbouring slices together, grey (1 channel)" in card


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--slices", 2), "--slices 2 must be an odd number"),
        (("--slices", 3), "these images are single ones"),
        (("--slices", 3, "--data", "gap"), "go from 0 to 5, without 3"),
        (("--slices", 3, "--data", "sizes"), "2 sizes, 40 x 48, 41 x 48"),
        (("--slices", 3, "--data", "named"), "a is a single image"),
    ],
)
def test_single_images_are_refused_in_one_sentence(given, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "gap")
    for part in ("image", "label"):
        (tmp_path / "gap" / part / "s03.png").unlink()
        for i, (name, h) in enumerate((("s0", 40), ("s1", 41), ("a", 40), ("b", 40))):
            write_image(
                tmp_path / ("named" if i > 1 else "sizes") / part / f"{name}.png",
                np.resize(MASKS[i], (h, 48)),
            )
    assert run_train(*given, "--out", tmp_path / "run", *SMALL) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_single_image_is_refused_in_predicting(run, tmp_path, capsys):
    write_image(tmp_path / "a.png", IMAGES[0])
    with pytest.raises(InputError, match="takes 3 neighbouring slices together"):
        load(run / "model", device="cpu")(IMAGES[0])
    assert run_predict("--model", run / "model", "--input", tmp_path, "--out", tmp_path / "o") == 2
    assert "a is a single image" in capsys.readouterr().err
    assert find_slices(find_inputs(tmp_path))[0][0].around == ()


def test_data_have_as_many_slices_as_are_asked_for(tmp_path):
    options = SegmentationOptions(out=tmp_path / "r", data=str(files(tmp_path / "d")), slices=3)
    data = load_data(options)
    assert (data.slices, data.channels, data.load(0)[0].shape) == (3, 3, (3, 40, 48))
