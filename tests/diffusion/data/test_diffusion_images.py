from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from einops import rearrange
from PIL import Image

from diffusion.data import whole as module
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import fitted, to_uint8, to_unit
from diffusion.data.ranges import RangeFinder
from diffusion.data.shapes import example, example_caption, held_out, parse
from diffusion.data.sources import HowToRead
from diffusion.output import SampleFolder
from unet.errors import InputError
from unet.files.images import images_below, laid_over, list_images, write_image
from unet.files.pages import Reading
from unet.training.batches import BatchKeys, make_batches
from unet.training.task import Processes

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 12, 16, 3), np.uint8)


def save(folder: Path, count: int = 40, names: str = "{}.png", images: Any = COLOUR) -> Path:
    for i in range(count):
        write_image(folder / names.format(i), images[i])
    return folder


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


def captioned(folder: Path, count: int = 40) -> Path:
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(count)]
    save(folder, count)
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def everything(data: DiffusionData) -> list[int]:
    return sorted([*data.train, *data.val])


# -- scaling


def test_all_bytes_come_back_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8)
    unit = to_unit(values)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(to_uint8(unit), values)
    nearest = to_uint8(unit + (torch.rand(unit.shape) - 0.5) * 0.99 / 127.5)
    assert torch.equal(nearest, values)


def test_what_lies_outside_is_clipped() -> None:
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 255, 255, 255]


# -- resizing


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 255  # finer than any pixel of the result
    small = fitted(stripes, (32, 32), 1)
    assert abs(small).max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (300, 301), (20, 8), (1, 5)])
def test_the_centre_is_kept_in_proportion(height: int, width: int) -> None:
    """A linear ramp stays one, with its middle in the middle, whatever is cut off."""
    rows, columns = np.indices((height, width))
    ramp = 128 + (columns - (width - 1) / 2) * 60 / width + (rows - (height - 1) / 2) * 60 / height
    found = to_uint8(fitted(np.rint(ramp).astype(np.uint8)[..., None], (16, 16), 1)).double()
    assert found.mean().item() == pytest.approx(128, abs=1)
    side = min(height, width)
    scale = side / 16
    for axis, whole in ((2, width), (1, height)):
        if side >= 16:
            steps = found.diff(dim=axis).mean().item()
            assert steps == pytest.approx(scale * 60 / whole, rel=0.1, abs=0.05)


def test_a_target_need_not_be_square() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
    assert fitted(pixels, (3, 8), 3).shape == (3, 3, 8)
    assert torch.equal(fitted(pixels, (6, 8), 1), to_unit(torch.from_numpy(pixels[None, ..., 0])))


@pytest.mark.parametrize(
    ("dtype", "values"), [("uint16", [0, 257 * 100, 65535]), ("float32", [0.0, 100 / 255, 1.0])]
)
def test_deep_images_are_scaled_by_the_range_of_their_type(dtype: str, values: list[Any]) -> None:
    pixels = np.array(values, dtype).reshape(1, 3, 1)
    assert to_uint8(fitted(pixels, (1, 3), 1)).flatten().tolist() == [0, 100, 255]


def test_floats_beyond_their_range_are_refused(tmp_path: Path) -> None:
    image = np.linspace(0, 400, 64, dtype=np.float32).reshape(8, 8)
    save(tmp_path, 3, "{}.tif", [image / 400, image, image / 400])
    with pytest.raises(InputError, match=r"up to 1, those of '.*1\.tif' up to 400"):
        DiffusionData(tmp_path)


# -- folders


def test_a_folder_is_read_in_natural_order_with_its_subfolders(tmp_path: Path) -> None:
    save(tmp_path)
    write_image(tmp_path / "more" / "deep" / "a.png", COLOUR[0])
    write_image(tmp_path / ".hidden" / "a.png", COLOUR[0])
    (tmp_path / "notes.txt").write_text("no image")
    write_image(tmp_path / "run/samples/0.png", COLOUR[0])
    for name in ("metrics.jsonl", "config.yaml"):  # of a run, whose samples are not learnt from
        (tmp_path / "run" / name).touch()
    data = DiffusionData(tmp_path)
    names = [Path(data.name(i)).relative_to(tmp_path).as_posix() for i in everything(data)]
    assert sorted(names) == sorted([*(f"{i}.png" for i in range(40)), "more/deep/a.png"])
    assert [n for n in names if "/" not in n] == [f"{i}.png" for i in range(40)]
    assert (data.size, data.channels, data.classes, data.labels) == ((12, 16), 3, (), None)
    first = data.images([i for i in range(41) if Path(data.name(i)).name == "7.png"])
    np.testing.assert_array_equal(first[0], COLOUR[7])


def test_images_and_batches_are_the_same_pixels(tmp_path: Path) -> None:
    data = DiffusionData(save(tmp_path))
    x, labels = data.batch(data.val)
    assert x.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert not labels.any()
    np.testing.assert_array_equal(
        rearrange(to_uint8(x).numpy(), "b c h w -> b h w c"), data.images(data.val)
    )


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("10", "9", "cat")):
        save(tmp_path / name, 10 + i)
    data = DiffusionData(tmp_path, classes=True)
    assert data.classes == ("9", "10", "cat")
    assert data.labels is not None
    for i in everything(data):
        folder = Path(data.name(i)).parent.name
        assert data.classes[data.labels[i]] == folder
    assert data.batch(data.val)[1].tolist() == [data.labels[i] for i in data.val]
    assert "\n3 classes: 9 (11), 10 (10), cat (12)\n25 images to train on" in data.describe()
    assert not data.flips
    assert "3 classes, not used: 9 (11)" in DiffusionData(tmp_path).describe()
    few = DiffusionData(tmp_path, classes=True, val=32)  # of 33
    assert few.labels is not None
    (name,) = (few.classes[few.labels[i]] for i in few.train)
    others = ", ".join(f"{k} ({n})" for k, n in (("9", 11), ("10", 10), ("cat", 12)) if k != name)
    assert f"\nnot learnt, as all of its images are held out: {others}; add" in few.describe()


@pytest.mark.parametrize("also", ["one.png", None])
def test_there_are_no_classes_unless_all_images_lie_in_two_or_more(
    tmp_path: Path, also: str | None
) -> None:
    save(tmp_path / "only")
    if also:
        save(tmp_path / "other")
        write_image(tmp_path / also, COLOUR[0])
    data = DiffusionData(tmp_path)
    assert data.classes == ()
    if also:
        assert "of these in folders below: only (40), other (40)\n" in data.describe()
    with pytest.raises(InputError, match="has no classes: put the images"):
        DiffusionData(tmp_path, classes=True)


def test_captions_are_those_of_the_metadata(tmp_path: Path) -> None:
    data = DiffusionData(captioned(tmp_path), captions=True)
    samples = data.samples(0)
    for i in range(len(samples)):
        assert samples[0, i]["caption"] == f"picture {Path(samples.name(i)).stem}"
    assert "captions, such as 'picture" in data.describe()
    plain = DiffusionData(tmp_path)
    assert "caption" not in plain.samples(0)[0, 0]
    assert "captions, not used" in plain.describe()


def test_metadata_of_subfolders_names_files_beside_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        captioned(tmp_path / name, 5)
    data = DiffusionData(tmp_path, captions=True, classes=True)
    assert {data.captions(i)[0] for i in everything(data)} == {f"picture {i}" for i in range(5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "line 2 of"),
        ('{"file_name": "1.png"}', "line 2 of"),
        ("[]", "line 2 of"),
        ('{"file_name": "1.png", "text": 3}', "line 2 of"),
        ("", r"1 of \d images has no line in metadata\.jsonl: '.*1\.png' needs"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    save(tmp_path, 2)
    line = b'{"file_name": "0.png", "text": "a"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(line + (text.encode() if str(text) == text else text))
    with pytest.raises(InputError, match=message):
        DiffusionData(tmp_path, captions=True)


# -- sizes, colours, damage


def test_pictures_of_formats_that_are_not_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 5)
    for name in ("IMG_1.HEIC", "b.avif", "notes.md"):
        (tmp_path / name).touch()
    assert len(everything(DiffusionData(tmp_path))) == 5
    told = f"left out: 2 pictures of a format that is not read, such as {tmp_path / 'IMG_1.HEIC'}; "
    assert told + "save these as PNG or JPEG" in capsys.readouterr().err


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    save(tmp_path)
    write_image(tmp_path / "wide.png", np.zeros((12, 17, 3), np.uint8))
    with pytest.raises(InputError, match=r"12 x 16 \('.*0\.png'\) and 12 x 17 \('.*wide\.png'\): "):
        DiffusionData(tmp_path)
    data = DiffusionData(tmp_path, size=8)
    assert data.images(everything(data)).shape == (41, 8, 8, 3)
    assert "12 x 16 to 12 x 17, resized to 8 x 8 and cropped at the centre" in data.describe()


def test_grey_among_colours_becomes_rgb_unless_grey_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, 20)
    save(tmp_path, 20, "grey {}.png", COLOUR[..., 0])
    data = DiffusionData(tmp_path)
    assert data.channels == 3
    [i] = [i for i in everything(data) if data.name(i).endswith("grey 3.png")]
    np.testing.assert_array_equal(data.images([i])[0], np.repeat(COLOUR[3, ..., :1], 3, axis=2))
    assert "all converted to RGB uint8" in data.describe()
    assert DiffusionData(tmp_path, channels=1).batch([0, 39])[0].shape == (2, 1, 12, 16)


def test_depth_and_alpha_are_told(tmp_path: Path) -> None:
    save(tmp_path, 2, "{}.png", (COLOUR[..., 0].astype(np.uint16)) * 257)
    rgba = np.concatenate([COLOUR[0], COLOUR[0][..., :1]], axis=2)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "alpha.png")
    text = DiffusionData(tmp_path).describe()
    assert "RGB uint8, grey uint16, all converted to RGB uint8\n" in text
    assert "transparent pixels are put over the colour 255 255 255" in text


def test_a_damaged_file_is_named_or_left_out_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(save(tmp_path) / "7.png")
    (tmp_path / "8.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"8\.png.*--skip-bad"):  # by its header, first
        DiffusionData(tmp_path)
    (tmp_path / "8.png").unlink()
    (tmp_path / "8.png").symlink_to("gone.png")
    with pytest.raises(InputError, match=r"8\.png': a link to 'gone\.png', which.*--skip-bad"):
        DiffusionData(tmp_path)
    (tmp_path / "8.png").unlink()
    with pytest.raises(InputError, match=r"7\.png.*--skip-bad"):
        DiffusionData(tmp_path)
    (tmp_path / "8.png").symlink_to("gone.png")
    data = DiffusionData(tmp_path, skip_bad=True)
    assert len(everything(data)) == 38
    assert not any(Path(data.name(i)).name in ("7.png", "8.png") for i in everything(data))
    data.images(everything(data))
    said = capsys.readouterr().err
    assert said.count("left out") == 2
    assert said.count("7.png") == said.count("8.png") == 1
    assert data.describe().startswith("38 images")


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of 3 images can be read"):
        DiffusionData(tmp_path, skip_bad=True)
    save(tmp_path, 3)
    for i in range(3):
        damage(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match="leave none to train on"):
        DiffusionData(tmp_path, skip_bad=True)


@pytest.fixture
def few_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 40 files is a large one."""
    monkeypatch.setattr(module, "CHECKED", 4)


@pytest.mark.usefixtures("few_checked")
def test_a_large_folder_is_not_opened_before_it_is_used(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    for i in (0, 13, 26, 39):
        write_image(tmp_path / f"{i}.png", COLOUR[i])
    data = DiffusionData(tmp_path, flips=False)  # else some are, to see whether to mirror them
    assert everything(data) == list(range(40))
    save(tmp_path)
    np.testing.assert_array_equal(data.images(range(40)), COLOUR)


@pytest.mark.usefixtures("few_checked")
def test_bad_files_of_a_large_folder_are_named_or_replaced_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(save(tmp_path) / "7.png")
    with pytest.raises(InputError, match=r"7\.png"):
        DiffusionData(tmp_path).images(range(40))
    data = DiffusionData(tmp_path, skip_bad=True, val=3)
    for _ in range(2):
        used = [data.load(i)[0] for i in range(40)]
    changed = [i for i in range(40) if used[i] != i]
    assert changed == [7]
    assert (used[7] in data.val) == (7 in data.val)
    assert capsys.readouterr().err.count("left out") == 1


@pytest.mark.usefixtures("few_checked")
def test_other_sizes_in_a_large_folder_are_named_as_they_come(tmp_path: Path) -> None:
    write_image(save(tmp_path) / "7.png", np.zeros((5, 5, 3), np.uint8))
    data = DiffusionData(tmp_path)
    with pytest.raises(InputError, match=r"12 x 16 .* and 5 x 5 \('.*7\.png'\): give a size"):
        data.images(range(40))


@pytest.mark.parametrize("bound", [0, COLOUR.nbytes - 1, COLOUR.nbytes])
def test_memory_is_bounded_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", bound)
    data = DiffusionData(save(tmp_path))
    for _ in range(2):
        np.testing.assert_array_equal(data.images(range(40)), COLOUR)
    kept = sum(pixels.nbytes for pixels in data._whole._cache.values())
    assert kept == (COLOUR.nbytes if bound >= COLOUR.nbytes else 0)


# -- archives


@pytest.mark.parametrize("shape", [(12, 16), (12, 16, 1), (12, 16, 3), (12, 16, 4)])
def test_archives_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = RNG.integers(0, 256, (30, *shape), np.uint8)
    data = DiffusionData(archive(tmp_path, images=images))
    found = data.images(range(30))
    expected = images[..., None] if images.ndim == 3 else images
    if shape[2:] == (4,):
        expected = np.stack([laid_over(image, (255, 255, 255)) for image in images])
    np.testing.assert_array_equal(found, expected)
    assert ("transparent" in data.describe()) == (shape[2:] == (4,))
    assert data.flips  # noise, which has no left and right


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.arange(30) % 3 + 5, ("5", "6", "7")),
        (np.array(["b", "a", "c10"] * 10), ("a", "b", "c10")),
        (np.array([True, False] * 15), ("False", "True")),
    ],
)
def test_labels_become_classes(tmp_path: Path, labels: Any, names: tuple[str, ...]) -> None:
    data = DiffusionData(archive(tmp_path, images=COLOUR[:30], labels=labels), classes=True)
    assert data.classes == names
    assert data.labels is not None
    assert [names[i] for i in data.labels] == [str(label) for label in labels.tolist()]
    sample = data.samples(0)[0, 0]
    assert sample["label"] == data.labels[data.train[0]]
    assert sample["label"].dtype == torch.int64


@pytest.mark.parametrize("names", ["{}_images {}_labels", "x_{} y_{}"])
def test_archives_of_others_give_the_images_that_they_train_on(tmp_path: Path, names: str) -> None:
    """Those of MedMNIST, whose labels are (N, 1), and of Keras."""
    arrays = {}
    for k, part in enumerate(("test", "train")):
        images, labels = (name.format(part) for name in names.split())
        arrays |= {images: COLOUR[k : 30 + k], labels: np.arange(30)[:, None] % (3 + k)}
    data = DiffusionData(archive(tmp_path, **arrays), classes=True)
    assert data.classes == ("0", "1", "2", "3")
    np.testing.assert_array_equal(data.images(range(30)), COLOUR[1:31])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": COLOUR, "y": COLOUR}, r"set\.npz' holds x, y, but no array `images`: save"),
        ({"images": COLOUR.astype(np.complex64)}, r"set\.npz.* pixels of type complex64"),
        (
            {"images": rearrange(COLOUR, "b h w c -> b c h w")},
            r"set\.npz.* shape \(40, 3, 12, 16\) is not .*; name its axes",
        ),
        ({"images": COLOUR[:0]}, r"set\.npz.* shape \(0, 12, 16, 3\) is not"),
        ({"images": COLOUR, "labels": np.zeros(39, int)}, r"labels int64 \(39,\) for 40 images"),
        ({"images": COLOUR, "labels": np.zeros(40)}, "labels float64"),
        ({"images": np.array([{}, {}], object)}, "cannot be read as an .npz"),
        ({"images": COLOUR, "labels": np.array([{}] * 40, object)}, "cannot be read as an .npz"),
    ],
)
def test_bad_archives_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiffusionData(archive(tmp_path, **arrays))


@pytest.mark.parametrize("axes", [None, "ZCYX"])
@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i8", "<f8"])
def test_an_archive_has_pixels_of_any_type_and_order(
    tmp_path: Path, dtype: str, axes: str | None
) -> None:
    images = rearrange(COLOUR, "b h w c -> b c h w") if axes else COLOUR
    how = HowToRead(reading=Reading(axes=axes))
    data = DiffusionData(archive(tmp_path, images=images.astype(dtype)), how=how)
    np.testing.assert_array_equal(data.images(everything(data)), COLOUR)


def test_parts_of_a_split_are_no_classes_and_links_are_followed(tmp_path: Path) -> None:
    for part in ("Train", "val"):
        for name in ("cat", "train"):
            save(tmp_path / "data" / part / name, 5)
    (tmp_path / "data/Train/bird").symlink_to(save(tmp_path / "birds", 5))
    (tmp_path / "birds/back").symlink_to(tmp_path / "data/Train")
    data = DiffusionData(tmp_path / "data")
    assert (data.classes, len(data.source.names)) == (("bird", "cat", "train"), 25)


def test_what_this_project_wrote_among_the_images_is_left_out_which_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of it that is named itself is read."""
    for i, image in enumerate(COLOUR):
        write_image(tmp_path / f"{'ab'[i % 2]}/{i}.png", image)
    classes = DiffusionData(tmp_path).classes
    folder = SampleFolder(tmp_path / "made")
    folder.begin(Processes())
    folder.add(COLOUR[:8], 0)
    folder.write_grid(range(8))
    write_image(tmp_path / "run/samples/1.png", COLOUR[0])
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).touch()
    for name in ("a/0_mask", "a/0_probability", "a/0_overlay", "legend"):
        write_image(tmp_path / f"{name}.png", COLOUR[0])
    assert capsys.readouterr().err == ""
    data = DiffusionData(tmp_path)
    assert (data.classes, len(everything(data))) == (classes, len(COLOUR))
    assert capsys.readouterr().err == (
        f"left out: 4 files of predictions, such as {tmp_path / 'a/0_mask.png'}, and 2 folders of "
        f"runs, evaluations or samples, such as {tmp_path / 'made'}; name one by itself if it is "
        "meant\n"
    )
    assert len(everything(DiffusionData(tmp_path / "made/images"))) == 8
    assert len(DiffusionData(tmp_path / "made", size=8).source.names) == 9
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "legend.png").unlink()
    for read in (DiffusionData, list_images, images_below):
        with pytest.raises(
            InputError, match=r"no image in this folder .*, but in a folder of r.*made"
        ):
            read(tmp_path)


def test_masks_beside_images_are_not_learnt_to_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "train/image", 9)
    save(tmp_path / "val/image", 9)
    save(tmp_path / "train/label/a", 9)
    data = DiffusionData(tmp_path)
    assert (data.classes, len(everything(data))) == ((), 18)
    assert f"1 folder of masks, such as {tmp_path / 'train/label'}" in capsys.readouterr().err
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "train", "train")
    assert len(everything(DiffusionData(tmp_path / "x.tar"))) == 9
    assert f"left out: 1 folder of masks, such as {tmp_path / 'x.tar'}/t" in capsys.readouterr().err
    assert len(everything(DiffusionData(tmp_path / "train/label"))) == 9
    for i, image in enumerate(COLOUR[:4]):
        write_image(tmp_path / f"side/{i}.png", image)
        write_image(tmp_path / f"side/{i}_mask.png", image)
    capsys.readouterr()
    assert len(everything(DiffusionData(tmp_path / "side"))) == 4
    first = tmp_path / "side/0_mask.png"
    assert f"left out: 4 files of masks, such as {first}; name" in capsys.readouterr().err


@pytest.mark.parametrize("axes", [None, "CYX", "ZYX"])
def test_three_pages_of_each_file_are_a_question(tmp_path: Path, axes: str | None) -> None:
    for i, image in enumerate(COLOUR):
        np.save(tmp_path / f"{i}.npy", rearrange(image, "h w c -> c h w"))
    how = HowToRead(reading=Reading(axes=axes))
    if axes is None:
        with pytest.raises(InputError, match=r"0\.npy': it has 3 pages: channels or slices\? Give"):
            DiffusionData(tmp_path, how=how)
    else:
        found = DiffusionData(tmp_path, how=how)
        assert (len(found.source.names), found.channels) == ((40, 3) if axes == "CYX" else (120, 1))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x80\x04N."])
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz' cannot be read as an \.npz"):
        DiffusionData(tmp_path / "a.npz")


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path, images=COLOUR)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        DiffusionData(path)


# -- crops


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages on which every pixel tells its page, row and column."""
    path = tmp_path_factory.mktemp("stack") / "stack.tif"
    page, row, column = np.indices((6, 50, 70))
    tifffile.imwrite(path, np.stack([page * 40, row, column], -1).astype(np.uint8))
    return path


def test_crops_are_cut_at_random_places_of_their_own_page(stack: Path) -> None:
    data = DiffusionData(stack, size=16, crops=True, val=2)
    assert len(data.train) == 4 * 3 * 4
    assert len(data.val) == 2 * 3 * 4
    samples = data.samples(0)
    pages, places, mirrored = [], set(), []
    for epoch in range(6):
        for i in range(len(samples)):
            crop = to_uint8(samples[epoch, i]["image"])
            page, rows, columns = crop.numpy().astype(int)
            assert np.ptp(page) == 0
            step = np.diff(columns, axis=1)
            assert (np.diff(rows, axis=0) == 1).all()
            assert (step == step[0, 0]).all()
            pages.append(page[0, 0] // 40)
            mirrored.append(step[0, 0] == -1)
            places.add((rows.min(), columns.min()))
    assert set(pages) == {0, 1, 2, 3}  # the last pages are held out
    assert 0.3 < np.mean(mirrored) < 0.7
    assert {r for r, _ in places} >= {0, 34}
    assert {c for _, c in places} >= {0, 54}


def test_held_out_crops_are_a_grid_that_stays(stack: Path) -> None:
    data = DiffusionData(stack, size=16, crops=True)
    crops = data.images(data.val)
    assert set(crops[..., 0].flatten().tolist()) == {200}
    corners = {(int(c[0, 0, 1]), int(c[0, 0, 2])) for c in crops}
    assert corners == {(r, c) for r in (0, 17, 34) for c in (0, 18, 36, 54)}
    np.testing.assert_array_equal(crops, data.images(data.val))
    assert "6 images of 50 x 70 for crops of 16 x 16" in data.describe()


def test_a_stack_without_crops_is_its_pages(stack: Path) -> None:
    data = DiffusionData(stack)
    assert data.size == (50, 70)
    assert data.name(3).endswith("stack.tif page 3")
    assert [int(image[0, 0, 0]) for image in data.images(range(6))] == [0, 40, 80, 120, 160, 200]


@pytest.mark.parametrize(("val", "rows"), [(0.02, 1), (0.5, 2), (8, 2)])
def test_a_single_micrograph_is_trained_on_above_what_is_held_out(
    tmp_path: Path, val: float, rows: int
) -> None:
    image = np.repeat(np.arange(66, dtype=np.uint8)[:, None], 70, axis=1)  # says its own row
    write_image(tmp_path / "one.png", image)
    data = DiffusionData(tmp_path, size=16, crops=True, val=val)
    assert len(data.val) == 4 * rows
    first = int(data.images(data.val).min())
    samples = data.samples(0)
    last = [int(to_uint8(samples[0, i]["image"]).max()) for i in range(len(samples))]
    last += [int(to_uint8(samples[1, i]["image"]).max()) for i in range(len(samples))]
    assert max(last) < first
    assert max(last) >= first - 8  # all the rest is used


def test_a_micrograph_too_small_to_hold_out_a_part_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", np.zeros((20, 70), np.uint8))
    with pytest.raises(InputError, match="a single image with 1 row of crops of which 1"):
        DiffusionData(tmp_path, size=16, crops=True)
    assert len(DiffusionData(tmp_path, size=16, crops=True, val=0).train) == 4


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_need_be_held_out(tmp_path: Path, count: int, crops: bool) -> None:
    rows = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, axis=1)  # says its own row
    for i in range(count):
        write_image(tmp_path / f"{i}.png", rows)
    data = DiffusionData(tmp_path, size=16 if crops else None, crops=crops, val=0)
    assert (sorted(data.train), list(data.val)) == (list(range(count * (16 if crops else 1))), [])
    samples = data.samples(0)
    shown = [to_uint8(samples[e, i]["image"]) for e in range(9) for i in range(len(samples))]
    assert max(int(image.max()) for image in shown) >= 60  # the lowest rows as well
    assert "none held out" in data.describe()


def test_crops_larger_than_an_image_are_refused(stack: Path) -> None:
    with pytest.raises(
        InputError, match=r"stack\.tif page 0' is 50 x 70, too small for crops of 64"
    ):
        DiffusionData(stack, crops=True)


def test_images_of_mixed_sizes_can_be_cropped(tmp_path: Path) -> None:
    for i in range(5):
        write_image(tmp_path / f"{i}.png", COLOUR[i, : 8 + i, : 9 + i])
    data = DiffusionData(tmp_path, size=8, crops=True)
    assert data.images(everything(data)).shape == (5, 8, 8, 3)
    assert data.samples(0)[0, 2]["image"].shape == (3, 8, 8)


# -- shapes


def test_shapes_need_no_files() -> None:
    data = DiffusionData("shapes", seed=3)
    assert (data.size, data.channels, data.classes, data.flips) == ((32, 32), 3, (), True)
    assert set(data.samples(0)[0, 0]) == {"image"}
    np.testing.assert_array_equal(data.images([7])[0], example(3, 7)[1].picture)
    data = DiffusionData("shapes", seed=3, captions=True, size=16)
    sample = data.samples(0)[0, 5]
    assert sample["image"].shape == (3, 16, 16)
    assert sample["caption"] == example_caption(3, data.train[5])
    assert not any(held_out(parse(data.captions(i)[0])) for i in range(200))
    assert "left for evaluation: green circle" in data.describe()


# -- splits and samples


@pytest.mark.parametrize(
    ("count", "val", "held_out_count"),
    [
        (60, 0.02, 15),
        (100, 0.02, 16),
        (2000, 0.02, 40),
        (2000, 0.25, 500),
        (6000, 0.5, 1000),
        (6000, 1500, 1500),
        (3, 0.02, 1),
        (40, 0.5, 20),
    ],
)
def test_held_out_images_are_a_seeded_choice(
    tmp_path: Path, count: int, val: float, held_out_count: int
) -> None:
    path = archive(tmp_path, images=np.zeros((count, 1, 1), np.uint8))
    data = DiffusionData(path, val=val)
    assert len(data.val) == held_out_count
    assert everything(data) == list(range(count))
    assert DiffusionData(path, val=val).val == data.val
    if count > 3:
        assert DiffusionData(path, val=val, seed=1).val != data.val
        assert data.val != sorted(data.val)  # so that its first ones are of all classes


@pytest.mark.parametrize("val", [-0.1, 1.5, 40, 100, 0.999, np.nan, np.inf])
def test_a_split_must_leave_both_sides(tmp_path: Path, val: float) -> None:
    path = archive(tmp_path, images=np.zeros((40, 2, 2), np.uint8))
    with pytest.raises(InputError, match=r"held out|give a share"):
        DiffusionData(path, val=val)


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    data = DiffusionData(save(tmp_path))
    assert data.flips
    samples = data.samples(1)
    seen = [[samples[epoch, i]["image"] for i in range(len(samples))] for epoch in range(8)]
    whole = data.images(data.train)
    for images in seen:
        for image, pixels in zip(images, whole, strict=True):
            plain = to_unit(torch.from_numpy(pixels).permute(2, 0, 1))
            assert image.dtype == torch.float32
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
    mirrored = np.array(
        [[not torch.equal(a, b) for a, b in zip(seen[0], s, strict=True)] for s in seen]
    )
    assert 0.3 < mirrored[1:].mean() < 0.7
    again, other = DiffusionData(tmp_path).samples(1), DiffusionData(tmp_path).samples(2)
    assert all(torch.equal(again[3, i]["image"], seen[3][i]) for i in range(len(again)))
    assert any(not torch.equal(other[3, i]["image"], seen[3][i]) for i in range(len(other)))
    assert samples.name(0) == data.name(data.train[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_collated(tmp_path: Path, workers: int) -> None:
    data = DiffusionData(captioned(tmp_path), captions=True)
    samples = data.samples(0)
    keys = BatchKeys(len(samples), 4, seed=0)
    batch = next(make_batches(samples, keys, workers, pin=False))
    assert batch["image"].shape == (4, 3, 12, 16)
    for i, text in zip(batch["index"].tolist(), batch["caption"], strict=True):
        assert text == f"picture {Path(samples.name(i)).stem}"


@pytest.mark.parametrize("kind", ["shapes", "archive", "folder"])
def test_data_can_be_sent_to_a_worker_process(tmp_path: Path, kind: str) -> None:
    captions = kind != "archive"
    paths = {"shapes": "shapes", "archive": archive(tmp_path, images=COLOUR)}
    path = paths.get(kind) or captioned(tmp_path / "folder")
    samples = DiffusionData(path, captions=captions).samples(0)
    sent = pickle.loads(pickle.dumps(samples))
    for key in ((0, 0), (2, 5)):
        assert torch.equal(sent[key]["image"], samples[key]["image"])
        assert sent[key].get("caption") == samples[key].get("caption")


@pytest.mark.parametrize(
    ("flips", "captions", "expected"),
    [(None, True, False), (True, False, True), (False, False, False)],
)
def test_flips_can_be_asked_for(
    tmp_path: Path, flips: bool | None, captions: bool, expected: bool
) -> None:
    data = DiffusionData(captioned(tmp_path), flips=flips, captions=captions)
    assert data.flips is expected


# -- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size 0"),
        ({"channels": 2}, "its 3 channels are not 2"),
        ({"classes": True}, "has no classes"),
        ({"captions": True}, "has no captions"),
        ({"captions": True, "flips": True}, "flips turn what"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        DiffusionData(save(tmp_path, 4), **arguments)


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    for name in ("nowhere", "n" * 5000, "nul\0"):
        with pytest.raises(InputError, match="no such file or folder"):
            DiffusionData(name)
    with pytest.raises(InputError, match="no image in this folder"):
        DiffusionData(tmp_path)


def test_a_single_image_is_too_few(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", COLOUR[0])
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(InputError, match="1 of 1 image held out leave none"):
            DiffusionData(path)


# -- real data


def test_digits(mnist: Path) -> None:
    data = DiffusionData(mnist / "mnist_train.npz", classes=True)
    assert data.classes == tuple("0123456789")
    assert (data.size, data.channels, data.flips) == ((28, 28), 1, False)
    assert (len(data.train), len(data.val)) == (59_000, 1_000)
    assert "10 classes: 0 (5,923), 1 (6,742)" in data.describe()


def test_micrographs(isbi2012: Path) -> None:
    data = DiffusionData(isbi2012 / "image", crops=True)
    assert (data.size, data.channels, data.flips) == ((64, 64), 1, True)
    assert (len(data.train), len(data.val)) == (29 * 64, 64)


# -- values, alpha and channels


@pytest.mark.parametrize(
    ("highest", "white"), [(255, 255), (1000, 1023), (4095, 4095), (4096, 8191), (65535, 65535)]
)
def test_the_bits_that_are_used_fill_the_range(tmp_path: Path, highest: int, white: int) -> None:
    images = (COLOUR[:8, ..., 0].astype(np.uint32) * highest // 255).astype(np.uint16)
    images[0, 0, :2] = 0, highest
    save(tmp_path, 8, "{}.tif", images)
    data = DiffusionData(tmp_path)
    assert f"values of uint16: 0 to {white} fill the range" in data.describe()
    wanted = np.rint(images * (255 / white)).astype(np.uint8)
    found = data.images([index_of(data, i) for i in range(8)])
    np.testing.assert_array_equal(found[..., 0], wanted)


def index_of(data: DiffusionData, number: int) -> int:
    count = len(data.train) + len(data.val)
    return next(i for i in range(count) if Path(data.name(i)).stem == str(number))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ((0.2, 0.9), 0, 1),
        ((-0.5, 1.0), -1, 1),
        ((0.0, 200.0), 0, 255),
        ((-1024.0, 3071.0), -1024, 3071),
        ((0.1, 7.25), 0.1, 7.25),
    ],
)
def test_floats_of_any_range_fill_it(
    tmp_path: Path, values: tuple[float, float], low: float, high: float
) -> None:
    image = np.linspace(*values, 192, dtype=np.float32).reshape(12, 16)
    image = np.rint(image) if values[1] > 100 else image
    save(tmp_path, 5, "{}.tif", [image] * 5)
    found = DiffusionData(tmp_path).ranges["float32"]
    assert (found.low, found.high) == (pytest.approx(low, rel=0.01), pytest.approx(high))


def test_a_few_hot_pixels_do_not_darken_the_rest() -> None:
    finder = RangeFinder("uint16")
    image = np.linspace(0, 900, 160_000).astype(np.uint16).reshape(400, 400, 1)
    image[0, 0] = 65535
    finder.add(image, "a")
    assert finder.found().high == 1023


def test_no_data_is_in_no_range_and_is_filled(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 192, dtype=np.float32).reshape(12, 16)
    image[:3] = -9999
    declared = [(42113, "s", 0, "-9999", True)]
    for i in range(4):
        tifffile.imwrite(tmp_path / f"{i}.tif", image, extratags=declared)
    data = DiffusionData(tmp_path)
    assert data.ranges["float32"].high == 1
    pixels = data.images([0])[0, ..., 0]
    assert abs(int(pixels[0, 0]) - pixels[3:].mean()) < 1
    np.testing.assert_array_equal(pixels[3:], np.rint(image[3:] * 255))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 20, 30)])
def test_transparent_pixels_show_the_background(
    tmp_path: Path, background: tuple[int, int, int]
) -> None:
    rgba = np.dstack([COLOUR[0], np.zeros((12, 16), np.uint8)])
    rgba[:6, :, 3] = 255
    for i in range(4):
        Image.fromarray(rgba, "RGBA").save(tmp_path / f"{i}.png")
    found = DiffusionData(tmp_path, how=HowToRead(background=background)).images([0])[0]
    np.testing.assert_array_equal(found[:6], COLOUR[0][:6])
    assert (found[6:] == background).all()
    Image.fromarray(rgba[..., 2:], "LA").save(tmp_path / "1.png")
    whole = DiffusionData(tmp_path, channels=4)
    np.testing.assert_array_equal(whole.images([0, 1]), [rgba, rgba[..., [2, 2, 2, 3]]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_of_transparent_pixels_do_not_mix_into_others(tmp_path: Path, dtype: Any) -> None:
    icon = np.zeros((24, 24, 4), dtype)
    icon[5:19, 7:16] = np.iinfo(dtype).max * np.array([1.0, 0.2, 0, 1])
    if dtype == np.uint8:
        Image.fromarray(icon, "RGBA").save(tmp_path / "icon.png")
    else:
        write_image(tmp_path / "icon.tif", icon)
    pixels = DiffusionData(tmp_path, size=15, channels=4, val=0).images([0])[0].astype(int)
    edge = (pixels[..., 3] > 10) & (pixels[..., 3] < 245)
    assert edge.any()
    assert np.abs(pixels[pixels[..., 3] > 10][:, :3] - [255, 51, 0]).max() <= 2


def test_channels_of_any_number_are_learnt_and_chosen(tmp_path: Path) -> None:
    stains = RNG.integers(0, 256, (5, 12, 16), np.uint8)
    for i in range(4):
        tifffile.imwrite(tmp_path / f"{i}.tif", stains, imagej=True, metadata={"axes": "CYX"})
    data = DiffusionData(tmp_path)
    assert data.channels == 5
    np.testing.assert_array_equal(data.images([0])[0], np.moveaxis(stains, 0, -1))
    two = DiffusionData(tmp_path, how=HowToRead(reading=Reading(channels=("3", "0"))))
    np.testing.assert_array_equal(two.images([0])[0], np.moveaxis(stains[[3, 0]], 0, -1))


# -- captions as people keep them

COCO_CAPTIONS = {
    "images": [{"id": 7, "file_name": "0.png"}, {"id": 9, "file_name": "1.png"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "c"},
        {"id": 2, "image_id": 7, "caption": "a, b"},
    ],
}


def test_captions_lie_in_text_files_beside_images(tmp_path: Path) -> None:
    save(tmp_path, 4, "{}.png", COLOUR)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbfa blob\r\n number " + str(i).encode())
    data = DiffusionData(tmp_path, captions=True)
    assert data.captions(index_of(data, 2))[0] == "a blob number 2"
    for name in ("0.caption", "0.png.txt", "0.TXT"):
        next(path for path in tmp_path.glob("0.*") if path.name != "0.png").rename(tmp_path / name)
        found = DiffusionData(tmp_path, captions=True)
        assert found.captions(index_of(found, 0))[0] == "a blob number 0"
    (tmp_path / "1.txt").write_text("")
    described = DiffusionData(tmp_path, captions=True).describe()
    assert f"; 1 image with an empty one, such as '{tmp_path / '1.png'}'" in described
    for name in ("2.txt", "3.txt"):
        (tmp_path / name).unlink()
    message = r"2 of 4 images have no caption file: '.*2\.png' needs a file '.*2\.txt'"
    with pytest.raises(InputError, match=message):
        DiffusionData(tmp_path, captions=True)


def test_captions_are_found_wherever_they_begin(tmp_path: Path) -> None:
    save(tmp_path, 200, "{:03}.png", COLOUR[:1].repeat(200, axis=0))
    for i in range(150, 200):
        (tmp_path / f"{i:03}.txt").write_text("a blob")
    with pytest.raises(InputError, match="150 of 200 images have no caption file"):
        DiffusionData(tmp_path, captions=True)


def test_captions_of_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    folder = captioned(tmp_path, 3)
    (folder / "1.png").unlink()
    described = DiffusionData(folder, captions=True).describe()
    assert "; 1 image with captions not among these, such as '1.png'" in described
    (folder / "2.png").rename(folder / "3.png")
    message = r"1 of 2 images has no line in metadata\.jsonl, which names .* such as '1\.png': "
    with pytest.raises(InputError, match=message):
        DiffusionData(folder, captions=True)


@pytest.mark.parametrize(
    "table",
    [
        ("metadata.csv", '\ufefffile_name,text\r\nsub/0.png,"a, b"\r\nsub/1.png,c\r\n'),
        (
            "metadata.csv",
            'image,prompt\nsub\\\\0.png,"a, b"\nsub\\\\1.png,c\n'.replace("\\\\", "\\"),
        ),
        ("metadata.csv", 'file_name,text\nsub/0.png,"a,\n b"\nsub/1.png,c\n'),
        ("metadata.csv", "file_name;text\nsub/0.png;a, b\nsub/1.png;c\n"),
        ("metadata.csv", "file_name\ttext\nsub/0.png\ta, b\nsub/1.png\tc\n"),
        (
            "metadata.jsonl",
            '{"file_name": "train/sub/0.png", "caption": "a, b"}\n'
            '{"file_name": "train/sub/1.png", "caption": "c"}\n',
        ),
        (
            "sub/metadata.jsonl",
            '\ufeff{"file_name": "sub/0.png", "text": "a, b"}\n'
            '{"file_name": "1.png", "text": "c"}\n',
        ),
        ("captions.txt", 'image,caption\n0.png, "a, b"\n1.png,c\n'),
        ("captions.txt", '"image","caption"\n"0.png","a, b"\n"1.png","c",\n'),
        ("results.csv", "image_name| comment_number| comment\n0.png| 0| a, b\n1.png| 0| c\n"),
        (
            "captions.json",
            '[{"image": "0.png", "caption": "a, b"}, {"image": "1.png", "text": "c"}]',
        ),
        ("captions.json", '{"sub/0.png": "a, b", "sub/1.png": ["c"]}'),
        ("annotations/captions_x.json", json.dumps(COCO_CAPTIONS)),
    ],
)
def test_tables_of_captions_are_read_as_they_are_meant(
    tmp_path: Path, table: tuple[str, str]
) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub", 2, "{}.png", COLOUR)
    (tmp_path / table[0]).parent.mkdir(exist_ok=True)
    (tmp_path / table[0]).write_text(table[1], encoding="utf-8")
    data = DiffusionData(tmp_path, captions=True)
    assert {data.captions(i) for i in range(2)} == {("a, b",), ("c",)}
    if not table[0].startswith("sub/"):  # a table beside the folder of images
        above = DiffusionData(tmp_path / "sub", captions=True)
        assert [above.captions(i) for i in range(2)] == [data.captions(i) for i in range(2)]


def test_of_tables_beside_a_folder_that_of_its_name_is_read(tmp_path: Path) -> None:
    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 2, "{}.png", COLOUR)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        table = tmp_path / f"annotations/captions_{name}.json"
        table.write_text(json.dumps({f"{i}.png": name for i in range(2)}))
    for name in ("train2017", "val2017"):
        data = DiffusionData(tmp_path / name, captions=True)
        assert {data.captions(i) for i in range(2)} == {(name,)}
    for name in ("metadata.csv", "captions.csv"):  # none of which is data's
        (tmp_path / name).write_text(f"image,text\n0.png,{name}\n1.png,{name}\n")
    (tmp_path / "val2017").rename(tmp_path / "data")
    data = DiffusionData(tmp_path / "data", captions=True)
    assert set(data.captions(0)) == {"metadata.csv", "captions.csv", "train2017", "val2017"}


def test_several_captions_of_an_image_take_turns(tmp_path: Path) -> None:
    save(tmp_path, 2, "{}.png", COLOUR)
    rows = [("0.png", "a"), ("0.png", "b"), ("0.png", "a"), ("0.png", " "), ("1.png", ["c", "d"])]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = DiffusionData(tmp_path, captions=True, val=0)
    assert [data.captions(index_of(data, i)) for i in range(2)] == [("a", "b"), ("c", "d")]
    assert "; up to 2 of an image, which take turns" in data.describe()
    samples = data.samples(0)
    for i in range(2):
        drawn = [samples[epoch, i]["caption"] for epoch in range(4)]
        assert set(drawn[:2]) == set(data.captions(data.train[i]))
        assert drawn[2:] == drawn[:2]


def test_tables_that_leave_something_open_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 1, "{}.png", COLOUR)
    table = tmp_path / "captions.csv"
    table.write_text("image,text\n0.png,c\n")
    with pytest.raises(
        InputError, match=r"2 of 2 images have no line in captions\.csv, which names"
    ):
        DiffusionData(tmp_path, captions=True)
    table.write_text("image,text\na/0.png,c, d\n")
    with pytest.raises(InputError, match=r"line 2 of .* has more columns than the 2 of the header"):
        DiffusionData(tmp_path, captions=True)
    table.write_text("image,text\na/0.png,c\nb/0.png,d\n")
    data = DiffusionData(tmp_path, captions=True)
    assert {data.captions(i) for i in range(2)} == {("c",), ("d",)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([["a", 1], "c"], r"line 1 of .*: the caption of 0\.png must be text, not \['a', 1\]"),
        ([[], "c"], r"line 1 of .*: the caption of 0\.png must be text, not \[\]"),
        (["", ""], r"all captions are empty, such as that of .*0\.png"),
    ],
)
def test_captions_that_cannot_be_meant_are_told(
    tmp_path: Path, texts: list[Any], message: str
) -> None:
    save(tmp_path, 2, "{}.png", COLOUR)
    rows = [{"file_name": f"{i % 2}.png", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=message):
        DiffusionData(tmp_path, captions=True)


def test_another_key_of_the_captions_is_named(tmp_path: Path) -> None:
    save(tmp_path, 2, "{}.png", COLOUR)
    lines = [json.dumps({"file_name": f"{i}.png", "de": "eins"}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="has file_name, de, but no text or caption or prompt"):
        DiffusionData(tmp_path, captions=True)
    data = DiffusionData(tmp_path, captions=True, how=HowToRead(caption_key="de"))
    assert data.captions(0)[0] == "eins"
