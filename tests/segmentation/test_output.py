"""Predictions as files: small parts, labels, and images larger than memory."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from segmentation import output
from segmentation.data.classes import ClassTable
from segmentation.data.inputs import find_inputs, predictions
from segmentation.data.instances import INSTANCE_NAMES
from segmentation.data.phantom import phantom_stack
from segmentation.model import SegmentationUNet
from segmentation.output import FilePredictor, Slice, predict_files
from segmentation.pictures import instance_overlay, overlay_legend
from segmentation.predict import Predictor
from segmentation.segmenter import load_models, without_specks
from unet import InputError, UNetConfig
from unet.files.images import image_info, read_image, read_mask, write_image
from unet.files.rasters import open_raster, writing_bands
from unet_diffusion import predict_seg

INFO = {
    "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None, "ignored_share": 0},
    "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
    "threshold": 0.5,
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2), patch=2), 1, INFO).save_pretrained(
        tmp_path / "model"
    )
    return str(tmp_path / "model")


@given(arrays(np.uint8, (9, 9), elements=st.integers(0, 2)), st.integers(0, 12))
def test_no_speck_is_left_unless_it_was_next_to_another(found, size):
    cleaned = without_specks(found, size)
    assert set(np.unique(cleaned)) <= set(np.unique(found))
    large = np.zeros(found.shape, bool)
    for value in np.unique(found):
        parts, count = ndimage.label(found == value)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        large |= (parts > 0) & (sizes[parts] >= size)
    assert np.array_equal(cleaned[large], found[large])


def test_a_speck_becomes_what_surrounds_it():
    found = np.zeros((8, 8), np.uint8)
    found[4:] = 2
    found[1, 1] = found[6, 6] = 1
    found[2:4, 5:7] = 1
    cleaned = without_specks(found, 4)
    assert cleaned[1, 1] == 0
    assert cleaned[6, 6] == 2
    assert (cleaned[2:4, 5:7] == 1).all()


@pytest.mark.parametrize("at_once", [output.AT_ONCE, 100])
@pytest.mark.parametrize(
    ("values", "ignored", "suffix"),
    [((0, 1), -1, "tif"), ((-1, 0), None, "tif"), ((0, 70000), 255, "tif"), ((0, 999), 7, "png")],
)
def test_masks_of_all_values_are_written(
    folder, tmp_path, monkeypatch, values, ignored, suffix, at_once
):
    """Those of pixels without a label are often -1."""
    monkeypatch.setattr(output, "AT_ONCE", at_once)
    write_image(tmp_path / "x.png", phantom_stack(1, (48, 40))[0][0])
    models, plain, threshold = load_models([folder])
    table = ClassTable(values=values, shares=(0.5, 0.5), ignore_value=ignored)
    for name, known in (("plain", plain), ("out", table)):
        predictor = FilePredictor(Predictor(models), known, threshold)
        assert predict_files(predictor, find_inputs(tmp_path / "x.png"), tmp_path / name) == []
    large = at_once == 100
    mask = read_mask(tmp_path / f"out/x_mask.{'tif' if large else suffix}")
    found = read_mask(tmp_path / f"plain/x_mask.{'tif' if large else 'png'}") == 255
    assert np.array_equal(mask, np.array(values)[found.astype(int)])


def test_labels_number_the_parts_of_the_mask(folder, tmp_path):
    write_image(tmp_path / "x.png", phantom_stack(1, (48, 40))[0][0])
    models, table, threshold = load_models([folder])
    predictor = FilePredictor(Predictor(models), table, threshold, labels=True, min_size=4)
    assert predict_files(predictor, find_inputs(tmp_path / "x.png"), tmp_path / "out") == []
    labels = read_image(tmp_path / "out/x_labels.tif")[..., 0]
    mask = read_image(tmp_path / "out/x_mask.png")[..., 0]
    assert np.array_equal(labels > 0, mask == 255)
    assert labels.max() == ndimage.label(mask == 255)[1]


def test_a_legend_lies_beside_the_overlays(folder, tmp_path):
    for name in "ab":
        write_image(tmp_path / f"in/{name}.png", phantom_stack(1, (48, 40))[0][0])
    models, table, threshold = load_models([folder])
    predictor = FilePredictor(Predictor(models), table, threshold)
    out, legend = tmp_path / "out", tmp_path / "out/legend.png"
    write_image(legend, np.zeros((5, 6, 3), np.uint8))
    assert predict_files(predictor, find_inputs(tmp_path / "in"), out) == []
    assert image_info(legend).width == 6  # nothing is written over unless asked for
    assert predict_files(predictor, find_inputs(tmp_path / "in"), out, overwrite=True) == []
    colours = set(map(tuple, read_image(legend).reshape(-1, 3).tolist()))
    assert overlay_legend(table)[0][1] in colours
    assert read_image(out / "a_overlay.png").shape == (48, 40, 3)


def test_overlays_show_instances_where_there_are_some(folder, tmp_path):
    image = phantom_stack(1, (48, 40))[0][0]
    write_image(tmp_path / "x.png", image)
    models, table, threshold = load_models([folder])
    predictor = FilePredictor(Predictor(models), table, threshold, labels=True)
    assert predict_files(predictor, find_inputs(tmp_path / "x.png"), tmp_path / "out") == []
    labels = read_image(tmp_path / "out/x_labels.tif")[..., 0]
    shown = instance_overlay(np.repeat(image.reshape(48, 40, 1), 3, 2), labels)
    assert np.array_equal(read_image(tmp_path / "out/x_overlay.png"), shown)
    assert not (tmp_path / "out/legend.png").exists()  # the colours tell apart, and nothing else
    instances = ClassTable(values=(0, 1, 2), shares=(0.5, 0.3, 0.2), names=INSTANCE_NAMES)
    assert FilePredictor(Predictor(models), instances, 0.5).numbers


def test_an_image_in_bands_is_that_at_once(folder, tmp_path, monkeypatch):
    image = phantom_stack(1, (150, 130))[0][0]
    tifffile.imwrite(tmp_path / "x.tif", image)
    models, table, threshold = load_models([folder])
    predictor = FilePredictor(Predictor(models, tile=64, overlap=16), table, threshold)
    x = Slice(name="x", path=tmp_path / "x.tif", info=image_info(tmp_path / "x.tif"))
    predictor.run(x, tmp_path / "once")
    monkeypatch.setattr(output, "AT_ONCE", 100)
    monkeypatch.setattr(output, "PREVIEW", 50)
    predictor.run(x, tmp_path / "bands")
    for kind in ("mask", "probability"):
        once = read_image(tmp_path / "once" / f"x_{kind}.png")
        assert np.array_equal(read_image(tmp_path / "bands" / f"x_{kind}.tif"), once)
    assert read_image(tmp_path / "bands/x_overlay.png").shape == (50, 44, 3)
    with pytest.raises(InputError, match="leave out --min-size"):
        FilePredictor(Predictor(models), table, 0.5, min_size=5).run(x, tmp_path / "bands")


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["uint8", "uint16"]), st.booleans())
def test_bands_make_the_file_that_one_write_makes(tmp_path_factory, h, w, dtype, colour):
    path = tmp_path_factory.mktemp("bands") / "x.tif"
    array = np.random.default_rng(0).integers(0, 255, (h, w, 3) if colour else (h, w)).astype(dtype)
    with writing_bands(path, array.shape, dtype) as writer:
        for top in range(0, h, 7):
            writer.write(top, array[top : top + 7])
    found = read_image(path)
    assert np.array_equal(found if colour else found[..., 0], array)


def test_an_unfinished_file_does_not_appear(tmp_path):
    def write_half() -> None:
        with writing_bands(tmp_path / "x.tif", (10, 10), "uint8") as writer:
            writer.write(0, np.zeros((5, 10)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_mapped_and_a_compressed_one_refused(tmp_path, monkeypatch):
    from unet.files import rasters

    monkeypatch.setattr(rasters, "MAX_PIXELS", 100)
    array = np.arange(600, dtype=np.uint16).reshape(20, 30)
    tifffile.imwrite(tmp_path / "x.tif", array)
    np.save(tmp_path / "x.npy", array)
    tifffile.imwrite(tmp_path / "packed.tif", array, compression="zlib")
    for name in ("x.tif", "x.npy"):
        pixels = open_raster(tmp_path / name)
        assert isinstance(pixels, np.memmap)
        assert np.array_equal(pixels[3:5, 7:9, 0], array[3:5, 7:9])
    with pytest.raises(InputError, match="save it as an uncompressed TIFF or NPY"):
        open_raster(tmp_path / "packed.tif")


def test_files_are_written_while_the_next_image_is_predicted(folder, tmp_path, monkeypatch):
    """They are those that are written one after the other, and what goes wrong is told in order."""
    rng = np.random.default_rng(0)
    for i in range(12):
        write_image(tmp_path / f"in/{i:02d}.png", rng.integers(0, 255, (20, 20 + i), np.uint8))
    models, table, _ = load_models([folder])
    predictor, written = FilePredictor(Predictor(models), table, 0.5), []

    class Checked(FilePredictor):
        def predict(self, image, out):
            if image.name == "07":
                raise InputError("no such thing")
            write = super().predict(image, out)

            def checked():
                written.append(threading.current_thread() is threading.main_thread())
                if image.name in ("03", "09"):
                    raise InputError("nor this")
                write()

            return checked

    monkeypatch.setattr(output, "AT_ONCE", 2000)  # pixels: a few images wait, no more
    predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "all")
    failed = predict_files(
        Checked(Predictor(models), table, 0.5), find_inputs(tmp_path / "in"), tmp_path / "out"
    )
    assert [(f.split("/")[-1]) for f in failed] == [
        "03.png': nor this",
        "07.png': no such thing",
        "09.png': nor this",
    ]
    assert written == [False] * 11
    for file in (tmp_path / "all").iterdir():
        if file.name[:2] not in ("03", "07", "09"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 3 * 9 + 1  # the legend


def test_a_full_disk_ends_the_prediction_of_many_images(folder, tmp_path, monkeypatch):
    for i in range(6):
        write_image(tmp_path / f"in/{i}.png", np.full((20, 20), 9 * i, np.uint8))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(output, "write_image", full)
    models, table, _ = load_models([folder])
    with pytest.raises(OSError, match="no space left"):
        predict_files(
            FilePredictor(Predictor(models), table, 0.5),
            find_inputs(tmp_path / "in"),
            tmp_path / "o",
        )


def test_images_that_would_be_written_to_one_file_are_refused(folder, tmp_path):
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / "in" / name, np.zeros((20, 20), np.uint8))
    models, table, _ = load_models([folder])
    with pytest.raises(InputError, match=r"a\.png and .*a\.tif would both be written"):
        predict_files(
            FilePredictor(Predictor(models), table, 0.5),
            find_inputs(tmp_path / "in"),
            tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()


def test_a_tree_of_images_becomes_a_tree_of_masks(folder, tmp_path, capsys):
    """Each folder gives what it gives alone; a second run finds what the first one found."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for place in ("x", "p2/x", "p10/a/x", "p10/a/y", ".hidden/x", "__MACOSX/x", "p2/masks/x"):
        write_image(data / f"{place}.png", rng.integers(0, 256, (8, 8), np.uint8))
    (data / "p2" / "._x.png").write_bytes(b"AppleDouble")
    (data / "p2" / "loop").symlink_to(data)
    run, scores = data / "p10" / "run", data / "p10" / "scores"
    for ours, told in (
        (run, ("metrics.jsonl", "config.yaml")),
        (scores, ("scores.json", "scores.csv")),
    ):
        write_image(ours / "pictures" / "0.png", np.zeros((8, 8), np.uint8))
        for name in told:
            (ours / name).touch()
    names = ["x", "p2/x", "p10/a/x", "p10/a/y"]
    for out in (tmp_path / "out", data / "out", data / "p2" / "later", data, data / "p10"):
        for again in ([], ["--overwrite"]):
            argv = ["--model", folder, "--input", str(data), "--out", str(out), "--device", "cpu"]
            assert predict_seg.command([*argv, *again]) == 0
            said = capsys.readouterr()
            assert f"4 of 4 images predicted, in {out}" in said.out
            assert f"masks: {out / '**' / '*_mask.*'}, " in said.out
            assert f"1 folder of masks, such as {data / 'p2' / 'masks'}" in said.err
            for name in names:
                alone = tmp_path / "alone" / name
                if out == tmp_path / "out":
                    argv[3], argv[5] = str(data / f"{name}.png"), str(alone)
                    assert predict_seg.command([*argv, *again]) == 0
                one = alone / f"{alone.name}_mask.png"
                assert one.read_bytes() == (out / f"{name}_mask.png").read_bytes()
    argv[3], argv[5] = str(data / "out"), str(tmp_path / "none")
    assert predict_seg.command(argv) == 2
    assert "nothing but masks and predictions is in it" in capsys.readouterr().err
    argv[3] = str(data / "p2" / "masks")  # is predicted where it is meant
    assert predict_seg.command(argv) == 0


def test_masks_beside_their_images_are_left_out(tmp_path):
    for name in ("b.png", "b_gt.png", "x/a.png", "x/a_mask.png", "x/masks/c.png"):
        write_image(tmp_path / name, np.zeros((4, 4), np.uint8))
    found = find_inputs(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ["b.png", "x/a.png"]
    assert {file.name for file in found.left} == {"b_gt.png", "a_mask.png", "c.png"}
    assert found.remark.startswith(
        f"left out: 1 folder of masks, such as {tmp_path / 'x/masks'}, and 2 files of masks, such "
        f"as {tmp_path / 'b_gt.png'}; name"
    )


def test_an_image_named_like_a_file_of_another_one_s_prediction_is_predicted():
    names = ("a.png", "a_2.png", "a_mask.png", "a_probability.png", "a_nucleus.png", "legend.png")
    assert predictions([Path(name) for name in names]) == {
        *map(Path, ("a_mask.png", "a_probability.png", "legend.png"))
    }
    assert predictions([Path(name) for name in names[1:]]) == set(map(Path, names[1:]))
    assert predictions([Path("a.png"), Path("a_mask.png"), Path("legend.png")]) == set()


def test_models_for_other_classes_are_not_averaged(folder, tmp_path):
    info = {**INFO, "classes": {**INFO["classes"], "values": [0, 1]}}
    other = SegmentationUNet(UNetConfig(channels=2, multipliers=(1,)), 1, info)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="average models for the same classes"):
        load_models([folder, str(tmp_path / "other")])


@pytest.mark.slow  # two minutes: a quarter of a gigapixel
def test_a_quarter_of_a_gigapixel_in_less_than_two_gigabytes(folder, tmp_path):
    shape = (16384, 16384)
    with writing_bands(tmp_path / "big.tif", shape, "uint8") as writer:
        band = phantom_stack(1, (512, 512))[0][0]
        for top in range(0, shape[0], 512):
            writer.write(top, np.tile(band, (1, 32)))
    code = (
        "import resource, sys\n"
        "from unet.training.cli import run_script\n"
        "from unet_diffusion import predict_seg as p\n"
        "status = run_script(p.main, p.PredictOptions)\n"
        "print('KB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(status)\n"
    )
    arguments = ["--model", folder, "--input", tmp_path / "big.tif", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("KB ")[1]) / 2**20
    assert peak < 2.0, f"{peak:.2f} GiB"
