"""Volumes: trained from and predicted like their slices, in parts, shared, interrupted, gone on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data.images import DiffusionData
from segmentation import output, volumes
from segmentation.data.dataset import SegmentationData
from segmentation.data.inputs import find_inputs
from segmentation.data.pairs import find_pairs
from segmentation.data.phantom import phantom_stack
from segmentation.model import SegmentationUNet
from segmentation.output import FilePredictor, find_slices, predict_files
from segmentation.predict import Predictor
from segmentation.segmenter import load, load_models
from segmentation.volumes import predict_volume
from tests.forks import SCRIPTS, run_forked
from unet import InputError, UNetConfig
from unet.files import rasters
from unet.files.images import image_info, read_image, write_image
from unet.training.task import Processes

zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")

INFO = {
    "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None, "ignored_share": 0},
    "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
    "threshold": 0.5,
}
IMAGES, MASKS = phantom_stack(7, (40, 48))
WRITTEN = ("x_mask.zarr", "x_probability.zarr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model"
    SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2), patch=2), 1, INFO).save_pretrained(
        path
    )
    return str(path)


def predictor(folder: str, **more: Any) -> FilePredictor:
    models, table, threshold = load_models([folder], "cpu")
    tiles = {name: more.pop(name) for name in ("tile", "overlap") if name in more}
    return FilePredictor(
        Predictor(models, **tiles), table, more.pop("threshold", threshold), **more
    )


def save(path: Path, array: Any, axes: str, chunks: tuple[int, ...], version: int = 3) -> None:
    """OME-Zarr whose pixels are 0.25 micrometers wide, and whose first one is at 3."""
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    made = group.create_array("0", shape=array.shape, dtype=array.dtype, chunks=chunks)
    made[...] = array
    kinds = {"t": "time", "c": "channel"}
    names = [{"name": a, "type": kinds.get(a, "space")} for a in axes.lower()]
    names = [{**n, "unit": "micrometer"} if n["type"] == "space" else n for n in names]
    scale = [{"type": "scale", "scale": [1.0 if a in "TC" else 0.25 for a in axes]}]
    scale.append({"type": "translation", "translation": [3.0 if a == "X" else 0.0 for a in axes]})
    scales = {"axes": names, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    if version == 2:
        group.attrs["multiscales"] = [{"version": "0.4", **scales}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [scales]}


def pngs(folder: Path, images: Any = IMAGES) -> Path:
    for i, image in enumerate(images):
        write_image(folder / f"{i}.png", image)
    return folder


def levels(out: Path) -> list[Any]:
    return [zarr.open_array(str(out / name), path="0", mode="r")[...] for name in WRITTEN]


def expected(folder: str, tmp_path: Path, images: Any = IMAGES) -> list[Any]:
    """The masks and probabilities of the slices as files."""
    assert (
        predict_files(
            predictor(folder), find_inputs(pngs(tmp_path / "png", images)), tmp_path / "as"
        )
        == []
    )
    kinds = ("mask", "probability")
    read = [
        [read_image(tmp_path / f"as/{i}_{k}.png")[..., 0] for i in range(len(images))]
        for k in kinds
    ]
    return [np.stack(each) for each in read]


# -- reading


def test_training_from_zarr_is_training_from_pngs(tmp_path):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (3, 16, 16))
    save(tmp_path / "y.zarr", MASKS, "ZYX", (2, 40, 48), 2)
    pngs(tmp_path / "images")
    pngs(tmp_path / "masks", MASKS)
    ways = (("x.zarr", "y.zarr"), ("images", "masks"), ("x.zarr", "masks"))
    data = [SegmentationData(find_pairs(images=tmp_path / a, masks=tmp_path / b)) for a, b in ways]
    for other in data[1:]:
        assert other.normalisation == data[0].normalisation
        assert other.table.values == data[0].table.values
        for i in range(len(IMAGES)):
            for ours, theirs in zip(data[0].load(i), other.load(i), strict=True):
                assert ours.dtype == theirs.dtype
                assert np.array_equal(ours, theirs)
    with pytest.raises(InputError, match="with --images and --masks"):
        find_pairs(tmp_path / "x.zarr")


def test_a_diffusion_model_sees_the_slices(tmp_path):
    save(tmp_path / "x.zarr", np.tile(IMAGES, (3, 1, 1)), "ZYX", (3, 16, 16))
    pngs(tmp_path / "images", np.tile(IMAGES, (3, 1, 1)))
    ours, theirs = (DiffusionData(tmp_path / name, size=32) for name in ("x.zarr", "images"))
    assert np.array_equal(ours.train, theirs.train)
    assert np.array_equal(ours.images(ours.train), theirs.images(theirs.train))


def test_a_segmenter_takes_the_slices_as_a_batch(folder, tmp_path):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (3, 16, 16))
    assert np.array_equal(load(folder)(tmp_path / "x.zarr"), load(folder)(IMAGES))
    slices, failed = find_slices(find_inputs(tmp_path / "x.zarr"))
    assert [s.name for s in slices] == [f"x_{i}" for i in range(7)]
    assert failed == []


# -- writing


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("slab", [volumes.SLAB_BYTES, 20_000, 1])
def test_a_volume_is_predicted_like_its_slices(folder, tmp_path, monkeypatch, version, slab):
    wanted = expected(folder, tmp_path)
    monkeypatch.setattr(volumes, "SLAB_BYTES", slab)
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (4, 16, 20), version)
    out = tmp_path / "out"
    assert predict_volume(predictor(folder), tmp_path / "x.zarr", out) == []
    for found, right in zip(levels(out), wanted, strict=True):
        assert np.array_equal(found, right)
    assert {path.name for path in out.iterdir()} == set(WRITTEN)
    made = zarr.open_array(str(out / WRITTEN[0]), path="0", mode="r")
    assert made.metadata.zarr_format == version
    assert made.chunks == ({1: 1, 20_000: 2}.get(slab, 4), 16, 20)
    described = zarr.open_group(str(out / WRITTEN[1]), mode="r").attrs.asdict()
    scales = described.get("ome", described)["multiscales"][0]
    assert [(a["name"], a["unit"]) for a in scales["axes"]] == [(a, "micrometer") for a in "zyx"]
    steps = scales["datasets"][0]["coordinateTransformations"]
    assert [next(iter(step.values())) for step in steps] == ["scale", "translation"]
    assert steps[0]["scale"] == [0.25] * 3
    assert steps[1]["translation"] == [0, 0, 3]
    assert image_info(out / WRITTEN[0]).axes == "ZYX"


def test_times_channels_and_turned_axes_stay_in_place(folder, tmp_path):
    images = IMAGES[:6]
    wanted = expected(folder, tmp_path, images)[0].reshape(2, 3, 40, 48)
    array = np.stack([255 - images, images], axis=1).reshape(2, 3, 2, 40, 48)  # TZCYX
    save(tmp_path / "x.zarr", array.transpose(1, 0, 4, 2, 3), "ZTXCY", (2, 1, 16, 2, 16))
    reading = output.Reading(channels=("1",))
    assert predict_volume(predictor(folder, reading=reading), tmp_path / "x.zarr", tmp_path) == []
    assert np.array_equal(levels(tmp_path)[0], wanted.transpose(1, 0, 3, 2))  # ZTXY


def test_masks_of_other_volumes_are_zarr_in_their_geometry(folder, tmp_path):
    h5py = pytest.importorskip("h5py", reason="pip install 'unet-diffusion[hdf5]'")
    nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
    wanted = expected(folder, tmp_path)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["raw"], file["other"] = IMAGES, MASKS
    image = nibabel.Nifti1Image(IMAGES.T, np.diag([0.5, 0.25, 3.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "y.nii.gz")
    for source, name in (("x.h5:/raw", "x_raw"), ("y.nii.gz", "y")):
        assert predict_volume(predictor(folder), tmp_path / source, tmp_path) == []
        for kind, right in zip(("mask", "probability"), wanted, strict=True):
            found = zarr.open_array(str(tmp_path / f"{name}_{kind}.zarr"), path="0", mode="r")
            assert np.array_equal(found[...], right)
    scales = zarr.open_group(str(tmp_path / "y_mask.zarr"), mode="r").attrs["ome"]["multiscales"][0]
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == [3.0, 0.25, 0.5]
    assert {axis["unit"] for axis in scales["axes"]} == {"millimeter"}


def test_shards_are_kept_where_they_fit(folder, tmp_path, monkeypatch):
    wanted = expected(folder, tmp_path)
    usual = volumes.SLAB_BYTES, volumes.AT_ONCE
    for name, most, shards in (
        ("a", usual, (4, 40, 48)),
        ("b", (20_000, usual[1]), None),
        ("c", (usual[0], 100), None),  # a shard would be in memory as a whole
    ):
        made = zarr.create_array(
            str(tmp_path / "x.zarr"),
            shape=IMAGES.shape,
            dtype="u1",
            chunks=(2, 20, 24),
            shards=(4, 40, 48),
            overwrite=True,
        )
        made[...] = IMAGES
        monkeypatch.setattr(volumes, "SLAB_BYTES", most[0])
        monkeypatch.setattr(volumes, "AT_ONCE", most[1])
        assert predict_volume(predictor(folder), tmp_path / "x.zarr", tmp_path / name) == []
        assert zarr.open_array(str(tmp_path / name / WRITTEN[0]), path="0").shards == shards
        for found, right in zip(levels(tmp_path / name), wanted, strict=True):
            assert np.array_equal(found, right)


def test_large_slices_are_predicted_in_bands(folder, tmp_path, monkeypatch):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (4, 16, 20))
    once, bands = (predictor(folder, tile=16, overlap=4) for _ in range(2))
    predict_volume(once, tmp_path / "x.zarr", tmp_path / "once")
    monkeypatch.setattr(volumes, "AT_ONCE", 100)
    monkeypatch.setattr(rasters, "IN_MEMORY", 100)
    predict_volume(bands, tmp_path / "x.zarr", tmp_path / "bands")
    for found, right in zip(levels(tmp_path / "bands"), levels(tmp_path / "once"), strict=True):
        assert np.array_equal(found, right)
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            predict_volume(bands, tmp_path / "x.zarr", out)
    (out / WRITTEN[0] / "0/c/2/1").mkdir(parents=True)
    (out / WRITTEN[0] / "0/c/2/1/1").write_bytes(b"a chunk that was begun")
    predict_volume(bands, tmp_path / "x.zarr", out)
    for found, right in zip(levels(out), levels(tmp_path / "once"), strict=True):
        assert np.array_equal(found, right)
    small = predictor(folder, min_size=3)
    with pytest.raises(InputError, match="leave out --min-size"):
        predict_volume(small, tmp_path / "x.zarr", tmp_path / "small")


def test_where_a_slice_holds_no_data_is_the_same_in_bands(tmp_path, monkeypatch):
    """Of neighbouring slices that are taken together the one in the middle says it."""
    info = {
        **INFO,
        "classes": {**INFO["classes"], "ignore_value": 7},
        "normalisation": {"mean": [128.0] * 3, "std": [40.0] * 3, "dtype": "uint8"},
        "slices": 3,
    }
    network = UNetConfig(in_channels=3, channels=2, multipliers=(1, 2), patch=2)
    SegmentationUNet(network, 1, info).save_pretrained(tmp_path / "model")
    images = np.maximum(IMAGES, 1)
    for i, image in enumerate(images):
        image[4 * i : 4 * i + 5, 20:30] = 0
    save(tmp_path / "x.zarr", images, "ZYX", (1, 16, 20))
    for name, most in (("once", volumes.AT_ONCE), ("bands", 100)):
        monkeypatch.setattr(volumes, "AT_ONCE", most)
        reading = output.Reading(nodata=0)
        made = predictor(str(tmp_path / "model"), tile=16, overlap=4, reading=reading)
        assert predict_volume(made, tmp_path / "x.zarr", tmp_path / name) == []
    once, bands = (levels(tmp_path / name) for name in ("once", "bands"))
    assert np.array_equal(once[0] == 7, images == 0)
    for found, right in zip(bands, once, strict=True):
        assert np.array_equal(found, right)


def stop_after(monkeypatch: pytest.MonkeyPatch, slabs: int) -> list[int]:
    """Lets predictions end, as by a signal, behind that many slabs; gives the pages of each."""
    run, seen = volumes._Work.run, []

    def counted(self: Any, slab: Any) -> None:
        if len(seen) == slabs:
            raise KeyboardInterrupt
        run(self, slab)
        seen.append(slab.pages[0])

    monkeypatch.setattr(volumes._Work, "run", counted)
    return seen


def test_an_interrupted_prediction_goes_on(folder, tmp_path, monkeypatch, capsys):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (2, 16, 20))
    source, out = tmp_path / "x.zarr", tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            predict_volume(predictor(folder), source, out)
    for key, given in (("threshold", {"threshold": 0.6}), ("uncertainty", {"uncertainty": True})):
        with pytest.raises(InputError, match=f"started with another {key}"):
            predict_volume(predictor(folder, **given), source, out)
    SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2), patch=2), 1, INFO).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(InputError, match="started with another model"):
        predict_volume(predictor(str(tmp_path / "other")), source, out)
    assert "2 of 4 slabs are done: the same command continues" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 9)
        patch.setattr(volumes, "TOLD_EVERY", 0)
        assert predict_volume(predictor(folder), source, out) == []
    assert seen == [4, 6]
    said = [line for line in capsys.readouterr().out.splitlines() if "slab" in line]
    assert said[:2] == [
        "continuing: 2 of 4 slabs are done already",
        "3 of 4 slabs are done, 1 minute left",
    ]
    for found, right in zip(levels(out), expected(folder, tmp_path), strict=True):
        assert np.array_equal(found, right)
    with pytest.raises(InputError, match="exists already"):
        predict_volume(predictor(folder), source, out)
    assert predict_volume(predictor(folder), source, out, overwrite=True) == []


def test_what_an_earlier_prediction_had_and_this_one_has_not_is_another_plan(tmp_path):
    file = tmp_path / "x_progress"
    volumes.Progress(file, {"model": "a", "uncertainty": ["entropy"]}, 3).begin()
    assert volumes.Progress(file, {"model": "a", "uncertainty": ["entropy"]}, 3).differs() == ""
    assert volumes.Progress(file, {"model": "a"}, 3).differs() == "uncertainty"


def test_only_what_decides_the_result_makes_it_another_model(folder, tmp_path):
    """A field that a later version adds to the config, as by default, ends nothing begun before."""

    def fingerprint(change: Any = lambda model: None, where: str = folder) -> str:
        models, _, _ = load_models([where], "cpu")
        change(models[0])
        return volumes._fingerprint(Predictor(models))

    def with_config(**values: Any) -> Any:
        later = make_dataclass(
            "Later", [("novel", int, 0)], bases=(UNetConfig,), frozen=True, kw_only=True
        )
        return lambda m: setattr(m, "config", later(**{**vars(m.config), **values}))

    def with_info(**values: Any) -> Any:
        return lambda model: model.info.update(values)

    whole = fingerprint()
    earlier = shutil.copytree(folder, tmp_path / "earlier")
    saved = json.loads((earlier / "config.json").read_text())
    for name in ("init", "jumps", "decoder", "norm_eps"):
        del saved["unet"][name]  # as by a version that knew no such field
    (earlier / "config.json").write_text(json.dumps(saved))
    assert fingerprint(where=str(earlier)) == whole
    told = ({"threshold": 0.7}, {"training": {"figures": {}}}, {"calibration": {}}, {"cells": 1})
    for same in (with_config(), *(with_info(**each) for each in told)):
        assert fingerprint(same) == whole
    normalisation = {**INFO["normalisation"], "std": [41.0]}
    for other in (
        with_config(novel=1),
        with_info(normalisation=normalisation),
        with_info(temperature=2.0),
        lambda model: model.head.conv.bias.data.add_(1e-3),
    ):
        assert fingerprint(other) != whole


@pytest.mark.slow
def test_a_killed_prediction_goes_on_to_the_same_voxels(folder, tmp_path):
    save(tmp_path / "x.zarr", np.tile(IMAGES, (20, 1, 1)), "ZYX", (2, 16, 20))
    command = [
        sys.executable,
        str(SCRIPTS / "predict_seg.py"),
        "--model",
        folder,
        "--device",
        "cpu",
    ]
    command += ["--input", str(tmp_path / "x.zarr"), "--out", str(tmp_path / "out")]
    record = tmp_path / "out/x_progress"
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if record.exists() and record.read_text().rpartition("\n")[2].count("1") >= 20:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "0" in record.read_text().rpartition("\n")[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing: " in done.stdout
    assert predict_volume(predictor(folder), tmp_path / "x.zarr", tmp_path / "whole") == []
    for found, right in zip(levels(tmp_path / "out"), levels(tmp_path / "whole"), strict=True):
        assert np.array_equal(found, right)


def test_an_interrupted_one_is_begun_anew_where_that_is_asked_for(folder, tmp_path, monkeypatch):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (2, 16, 20))
    source, out = tmp_path / "x.zarr", tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            predict_volume(predictor(folder, threshold=0.0), source, out)
    assert predict_volume(predictor(folder), source, out, overwrite=True) == []
    assert np.array_equal(levels(out)[0], expected(folder, tmp_path)[0])


def test_a_slab_that_cannot_be_read_is_left_for_another_run(folder, tmp_path, capsys):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (2, 40, 48))
    chunk = tmp_path / "x.zarr/0/c/1/0/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-40])
    source, out = tmp_path / "x.zarr", tmp_path / "out"
    (message,) = predict_volume(predictor(folder), source, out)
    assert message.startswith("slices from 2 on: ")
    assert "x.zarr" in message
    chunk.write_bytes(whole)
    assert predict_volume(predictor(folder), source, out) == []
    assert "continuing: 3 of 4 slabs" in capsys.readouterr().out
    assert np.array_equal(levels(out)[0], expected(folder, tmp_path)[0])


def test_a_damaged_record_and_labels_are_refused(folder, tmp_path):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (2, 16, 20))
    (tmp_path / "x_progress").write_text("nothing")
    with pytest.raises(InputError, match="is damaged: remove it"):
        predict_volume(predictor(folder), tmp_path / "x.zarr", tmp_path)
    with pytest.raises(InputError, match="numbers the parts of a slice"):
        predict_volume(predictor(folder, labels=True), tmp_path / "x.zarr", tmp_path)


def test_processes_share_the_slabs_of_a_volume(folder, tmp_path):
    save(tmp_path / "x.zarr", IMAGES, "ZYX", (2, 16, 20))
    arguments = ("--model", folder, "--input", tmp_path / "x.zarr", "--device", "cpu")
    done = run_forked(
        SCRIPTS / "predict_seg.py", *arguments, "--out", tmp_path / "two", processes=2
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 4 slabs predicted" in done.stdout
    for found, right in zip(levels(tmp_path / "two"), expected(folder, tmp_path), strict=True):
        assert np.array_equal(found, right)
    assert (
        run_forked(SCRIPTS / "predict_seg.py", *arguments, "--out", tmp_path / "two").returncode
        == 2
    )


def test_shares_are_all_slabs_once():
    for count in (1, 2, 3, 5):
        shares = [Processes(rank, count).share(range(7)) for rank in range(count)]
        assert sorted(i for share in shares for i in share) == list(range(7))


_BOUNDED = """
import resource, sys
from pathlib import Path
from segmentation.output import FilePredictor
from segmentation.predict import Predictor
from segmentation.segmenter import load_models
from segmentation.volumes import predict_volume
import zarr
model, source, out = sys.argv[1:]
models, table, threshold = load_models([model], "cpu")
predictor = FilePredictor(Predictor(models, tile=256, overlap=32), table, threshold)
predict_volume(predictor, Path(source, "warm.zarr"), Path(out))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert predict_volume(predictor, Path(source, "x.zarr"), Path(out)) == []
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_volume(folder, tmp_path):
    for name, slices in (("warm", 2), ("x", 200)):
        made = zarr.create_array(
            str(tmp_path / f"{name}.zarr"),
            shape=(slices, 512, 512),
            dtype="u1",
            chunks=(2, 256, 256),
        )
        made[:2] = np.stack([np.tile(image, (13, 11))[:512, :512] for image in IMAGES[:2]])
    command = [sys.executable, "-c", _BOUNDED, folder, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.rpartition("grown by")[2])
    assert grown < 40, grown  # MiB, of 50 of images and 150 of results
    assert json.loads((tmp_path / "out/x_mask.zarr/0/zarr.json").read_text())["shape"][0] == 200
