"""The layouts that people have: which file is an image, and which is its mask."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.dataset import SegmentationData
from segmentation.data.pairs import Pair, find_pairs
from segmentation.data.splits import split_pairs
from unet.errors import InputError
from unet.files.images import write_image
from unet.files.pages import Reading

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 24, 20), np.uint8)
MASKS = np.zeros((4, 24, 20), np.uint8)
MASKS[:, 4:12, 3:15] = 255


def save(folder: Path, names: Sequence[str], arrays: NDArray[Any]) -> None:
    for name, array in zip(names, arrays, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            Image.fromarray(array).save(path, quality=95)
        else:
            write_image(path, array)


def check(pairs: Sequence[Pair], lossy: bool = False) -> None:
    """Each image has its own mask, in natural order."""
    assert len(pairs) == 4
    for pair, image, mask in zip(pairs, IMAGES, MASKS, strict=True):
        if not lossy:
            np.testing.assert_array_equal(pair.read_image()[..., 0], image)
        np.testing.assert_array_equal(pair.read_mask(), mask)


@pytest.fixture(autouse=True)
def different_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that belongs to another image is noticed."""
    masks = MASKS.copy()
    for i in range(4):
        masks[i, 0, i] = 255
    monkeypatch.setattr(f"{__name__}.MASKS", masks)


ENDINGS = {  # how masks of a0, a1, ... are named in a folder of their own
    "same": "a{}.png",
    "_masks": "a{}_masks.png",
    "_segmentation": "a{}_segmentation.png",
    "-GT": "a{}-GT.png",
    ".seg": "a{}.seg.png",
    "prefix": "mask_a{}.png",
    "labelled in words": "a{}_cell_borders.png",
}


WHOLE = {  # where the images and masks of a folder lie
    "files beside folders": ("images/{}.png", "masks/{}.png"),
    "patients": ("images/p{}/scan.png", "masks/p{}/scan.png"),
    "patients with endings": ("images/p{}/scan.png", "masks/p{}/scan_mask.png"),
    "unpacked": ("data set/images/{}.png", "data set/masks/{}.png"),
    "MMSegmentation": ("img_dir/train/{}.png", "ann_dir/train/{}.png"),
    "numbers": ("images/image{}.png", "masks/mask{}.png"),
    "numbers side by side": ("image{}.png", "mask{}.png"),
    "words side by side": ("img_{}.png", "label_{}.png"),
    "both ends": ("images/im_{}_raw.png", "masks/gt_{}_seg.png"),
    "composed and decomposed": ("images/\u00e4{}.png", "masks/a\u0308{}.png"),
    "Cityscapes": ("leftImg8bit/a_{}_leftImg8bit.png", "gtFine/a_{}_gtFine_labelIds.png"),
}
PASSED_OVER = {  # what lies beside them
    "files beside folders": ("images/.hidden/0.png", "masks/a/._0.png"),
    "patients": (
        *("images/.ipynb_checkpoints/0.png", "__MACOSX/0.png", "images/out/legend.png"),
        *(
            f"images/out/p{i}/scan_{k}.png"
            for i in (0, 1)
            for k in ("mask", "probability", "overlay")
        ),
    ),
    "unpacked": ("__MACOSX/images/0.png",),
    "Cityscapes": tuple(f"gtFine/a_{i}_gtFine_{k}.png" for i in range(4) for k in ("color", "x")),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_folders_as_people_have_them(tmp_path: Path, kind: str) -> None:
    for i in range(4):
        beside = "sub/" if kind == "files beside folders" and i > 1 else ""
        for pattern, arrays in zip(WHOLE[kind], (IMAGES, MASKS), strict=True):
            save(tmp_path, [pattern.replace("{}.", f"{beside}{{}}.").format(i)], arrays[i : i + 1])
    save(tmp_path, PASSED_OVER.get(kind, ()), MASKS[[0] * len(PASSED_OVER.get(kind, ()))])
    check(find_pairs(tmp_path))


@pytest.mark.parametrize("kind", ENDINGS)
def test_an_ending_that_all_masks_share_is_the_ending(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "images", [f"a{i}.png" for i in range(4)], IMAGES)
    save(tmp_path / "masks", [ENDINGS[kind].format(i) for i in range(4)], MASKS)
    check(find_pairs(tmp_path))


@pytest.mark.parametrize(
    ("gone", "twins", "told"),
    [
        ("masks/p2", (), r"like that of its image: there is no mask in '.*masks/p2'"),
        ("images/p2", (), r"like that of its image: there is no image in '.*images/p2'"),
        ("masks/p2/scan.png", ("masks/p2/other.png",), r"1 image without mask: scan\.png"),
        (
            "",
            ("masks/p2/scan.tif",),
            r"scan\.png' and '.*/scan\.tif' could both be the mask of",
        ),
    ],
)
def test_a_partner_that_is_missing_or_double_is_named(
    tmp_path: Path, gone: str, twins: tuple[str, ...], told: str
) -> None:
    for i in range(4):
        for folder, arrays in (("images", IMAGES), ("masks", MASKS)):
            save(tmp_path, [f"{folder}/p{i}/scan.png"], arrays[i : i + 1])
    if gone:
        (tmp_path / gone).rename(tmp_path / "gone")
    save(tmp_path, twins, MASKS[: len(twins)])
    with pytest.raises(InputError, match=told):
        find_pairs(tmp_path)


@pytest.mark.parametrize("ending", ["_mask", "_masks", "_segmentation", "-GT", "_anything at all"])
def test_images_and_masks_lie_side_by_side(tmp_path: Path, ending: str) -> None:
    save(tmp_path, [f"a{i}.png" for i in range(4)], IMAGES)
    save(tmp_path, [f"a{i}{ending}.png" for i in range(4)], MASKS)
    check(find_pairs(tmp_path))
    (tmp_path / f"a2{ending}.png").unlink()
    with pytest.raises(InputError, match=r"1 images? without mask: a2\.png"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("image{}", "mask{}"),
        ("IMG_{}", "Label_{}"),
        ("a{} raw", "a{} mask"),
        ("img{}_raw", "img{}_gt"),
    ],
)
def test_words_tell_images_from_masks_side_by_side(tmp_path: Path, image: str, mask: str) -> None:
    save(tmp_path, [f"{image.format(i)}.png" for i in range(4)], IMAGES)
    save(tmp_path, [f"{mask.format(i)}.png" for i in range(4)], MASKS)
    check(find_pairs(tmp_path))
    (tmp_path / f"{mask.format(2)}.png").unlink()
    with pytest.raises(InputError, match=rf"1 image without mask: {image.format(2)}\.png"):
        find_pairs(tmp_path)


def test_photographs_and_masks_of_one_name_lie_side_by_side(tmp_path: Path) -> None:
    save(tmp_path, [f"{i}.jpg" for i in range(4)], IMAGES)
    save(tmp_path, [f"{i}.png" for i in range(4)], MASKS)
    check(find_pairs(tmp_path), lossy=True)


def test_both_names_may_have_an_ending_as_in_cityscapes(tmp_path: Path) -> None:
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        for i in numbers:
            save(tmp_path, [f"leftImg8bit/{part}/bonn/b_{i}_leftImg8bit.png"], IMAGES[i : i + 1])
            save(tmp_path, [f"gtFine/{part}/bonn/b_{i}_gtFine_labelIds.png"], MASKS[i : i + 1])
    pairs = find_pairs(tmp_path)
    check(pairs)
    train, val = split_pairs(pairs)
    assert [len(train), len(val)] == [2, 2]
    assert all("val" in str(pair.image) for pair in val)


def test_train_and_val_folders_say_what_is_held_out(tmp_path: Path) -> None:
    for part, numbers in (("train", (0, 1, 2)), ("validation", (3,)), ("test", (0,))):
        save(tmp_path / part / "images", [f"{i}.png" for i in numbers], IMAGES[list(numbers)])
        save(tmp_path / part / "masks", [f"{i}.png" for i in numbers], MASKS[list(numbers)])
    train, val = split_pairs(find_pairs(tmp_path))
    assert ([p.name for p in train], [p.name for p in val]) == (["0", "1", "2"], ["3"])
    assert len(split_pairs(find_pairs(tmp_path), fold="1/2")[1]) == 2  # what is asked for wins


def test_the_lists_of_pascal_voc_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "JPEGImages", [f"{i}.jpg" for i in range(4)], IMAGES)
    save(tmp_path / "SegmentationClass", [f"{i}.png" for i in range(4)], MASKS)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n")
    (lists / "val.txt").write_text("3\n")
    save(tmp_path / "JPEGImages", ["unlabelled.jpg"], IMAGES[:1])
    (tmp_path / "Annotations").mkdir()  # of boxes
    train, val = split_pairs(find_pairs(tmp_path))
    assert ([p.name for p in train], [p.name for p in val]) == (["0", "2"], ["3"])
    (lists / "train.txt").write_text("5\n")
    (lists / "val.txt").write_text("")
    with pytest.raises(InputError, match="nothing of what ImageSets/Segmentation lists, such as 5"):
        find_pairs(tmp_path)


def test_two_folders_that_could_be_the_masks_are_a_question(tmp_path: Path) -> None:
    for folder, arrays in (("images", IMAGES), ("mask", MASKS), ("1st_manual", MASKS)):
        save(tmp_path / folder, [f"{i}.png" for i in range(4)], arrays)
    with pytest.raises(InputError, match=r"2 folders .* 1st_manual, mask: say which with --images"):
        find_pairs(tmp_path)
    check(find_pairs(images=tmp_path / "images", masks=tmp_path / "1st_manual"))


def test_two_endings_that_could_be_the_masks_are_a_question(tmp_path: Path) -> None:
    for ending in ("", "_mask", "_label"):
        save(tmp_path, [f"a{i}{ending}.png" for i in range(4)], MASKS)
    with pytest.raises(InputError, match="2 files beside each image that could be its mask"):
        find_pairs(tmp_path)


def test_a_folder_an_image_with_a_file_an_object(tmp_path: Path) -> None:
    parts = np.zeros((3, 24, 20), np.uint8)
    parts[0, 2:8, 2:8], parts[1, 7:14, 7:14], parts[2, 16:22, 3:12] = 255, 255, 255
    parts[2, 18, 5] = 0
    for i in range(4):
        save(tmp_path / f"id{i}", [f"images/id{i}.png"], IMAGES[i : i + 1])
        save(tmp_path / f"id{i}", [f"masks/m{k}.png" for k in range(3)], parts)
    pairs = find_pairs(tmp_path)
    numbers = pairs[0].read_mask()
    assert sorted(np.unique(numbers)) == [0, 1, 2, 3]
    assert (numbers[7, 7], numbers[2, 2]) == (2, 1)
    data = SegmentationData(pairs[:3], pairs[3:])
    assert data.table.names == ("background", "cell")
    assert "4 pixels belong to two objects (the later file has them), 4 objects have holes" in (
        data.describe()
    )


def test_nnunets_channels_and_names(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "imagesTr", [f"c{i}_0000.png", f"c{i}_0001.png"], IMAGES[[i, 3 - i]])
        save(tmp_path / "labelsTr", [f"c{i}.png"], MASKS[i : i + 1] // 255)
    said = {"channel_names": {"0": "DAPI", "1": "GFP"}, "labels": {"background": 0, "cell": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(said))
    pairs = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["c0", "c1", "c2", "c3"]
    np.testing.assert_array_equal(pairs[1].read_image(), np.stack(IMAGES[[1, 2]], axis=-1))
    data = SegmentationData(pairs)
    assert (data.channels, data.table.names) == (2, ("background", "cell"))
    assert "DAPI, GFP uint8" in data.describe()
    chosen = find_pairs(tmp_path, reading=Reading(channels=("GFP",)))
    np.testing.assert_array_equal(chosen[1].read_image()[..., 0], IMAGES[2])
    (tmp_path / "imagesTr" / "c2_0001.png").unlink()
    with pytest.raises(InputError, match="c2 has no channel 0001"):
        find_pairs(tmp_path)


def test_a_stack_lies_beside_a_folder_of_masks(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "volume.tif", IMAGES, photometric="minisblack")
    save(tmp_path / "masks", [f"{i}.png" for i in range(4)], MASKS)
    check(find_pairs(tmp_path))
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(InputError, match="has 4 pages, but there are 3 files"):
        find_pairs(tmp_path)


def test_cellposes_other_files_are_passed_over(tmp_path: Path) -> None:
    numbers = np.zeros((4, 24, 20), np.uint16)
    numbers[:, 2:8, 2:8], numbers[:, 12:20, 4:16] = 1, 2
    save(tmp_path, [f"a{i}.tif" for i in range(4)], IMAGES)
    save(tmp_path, [f"a{i}_masks.tif" for i in range(4)], numbers)
    for i in range(4):
        (tmp_path / f"a{i}_seg.npy").write_bytes(b"a pickle")
        write_image(tmp_path / f"a{i}_flows.tif", IMAGES[i])
    data = SegmentationData(find_pairs(tmp_path))
    assert data.instances
    assert data.table.names == ("background", "cell")


def plain(folder: Path) -> None:
    save(folder / "images", [f"{i}.png" for i in range(4)], IMAGES)
    save(folder / "masks", [f"{i}.png" for i in range(4)], MASKS)


def stacks(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, arrays in (("train-volume", IMAGES), ("train-labels", MASKS)):
        tifffile.imwrite(folder / f"{name}.tif", arrays, photometric="minisblack")


def inverted(folder: Path) -> None:
    for name, arrays in (("images", IMAGES), ("masks", MASKS)):
        (folder / name).mkdir(parents=True)
        for i, array in enumerate(arrays):
            tifffile.imwrite(folder / name / f"{i}.tif", 255 - array, photometric="miniswhite")


def arrays(folder: Path) -> None:
    for name, found in (("images", IMAGES), ("masks", MASKS)):
        (folder / name).mkdir(parents=True)
        for i, array in enumerate(found):
            np.save(folder / name / f"{i}.npy", array)


def side_by_side(folder: Path) -> None:
    save(folder, [f"{i}.tif" for i in range(4)], IMAGES)
    save(folder, [f"{i}_GT.png" for i in range(4)], MASKS)


def ome(folder: Path) -> None:
    for name, found in (("images", IMAGES), ("masks", MASKS)):
        (folder / name).mkdir(parents=True)
        for i, array in enumerate(found):
            tifffile.imwrite(
                folder / name / f"{i}.ome.tif",
                array[None],
                metadata={"axes": "CYX"},
                compression="zlib",
            )


@pytest.mark.parametrize("write", [stacks, inverted, arrays, side_by_side, ome])
def test_a_set_is_the_same_in_each_layout_and_format(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """What is trained on, image and class of each pixel, is bit by bit that of the plain set."""
    plain(tmp_path / "plain")
    write(tmp_path / "other")
    one, other = (SegmentationData(find_pairs(tmp_path / folder)) for folder in ("plain", "other"))
    assert one.table == other.table
    assert one.normalisation == other.normalisation
    for i in range(4):
        for a, b in zip(one.load(i), other.load(i), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
