from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.normalisation import Moments, Normalisation
from segmentation.data.pairs import Pair, find_pairs, pairs_from_arrays
from segmentation.data.splits import split_pairs
from unet.errors import InputError
from unet.files.images import read_image, write_image
from unet.files.mask_values import MAX_CLASSES
from unet.files.pages import Reading

Array = NDArray[Any]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 6, 8), np.uint8)
MASKS = (IMAGES > 100) * np.uint8(255)


def save_set(folder: Path, images: str, masks: str, suffix: str = "", image_end: str = "") -> None:
    for i, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True)):
        write_image(folder / images / f"cell {i + 8}{image_end}.png", image)
        write_image(folder / masks / f"cell {i + 8}{suffix}.tif", mask)


def in_memory(count: int) -> list[Pair]:
    return pairs_from_arrays(np.zeros((count, 2, 3), np.uint8), np.zeros((count, 2, 3), np.uint8))


def names(pairs: list[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


def table_of(values: list[Any], ignore: Any = None) -> ClassTable:
    return ClassTable.of([np.array(values)[None]], ignore)


# -- pairs


@pytest.mark.parametrize(
    ("images", "masks", "suffix", "image_end"),
    [
        ("image", "label", "", ""),
        ("images", "masks", "_mask", ""),
        ("imgs", "masks", "_seg", ""),
        ("Images", "Labels", "_label", ""),
        ("imagesTr", "labelsTr", "", "_0000"),
        ("", "", "_mask", ""),
    ],
)
def test_pairs_are_found_in_the_known_layouts(
    tmp_path: Path, images: str, masks: str, suffix: str, image_end: str
) -> None:
    save_set(tmp_path, images, masks, suffix, image_end)
    pairs = find_pairs(tmp_path)
    assert names(pairs) == [f"cell {i}" for i in range(8, 13)]
    for pair, image, mask in zip(pairs, IMAGES, MASKS, strict=True):
        np.testing.assert_array_equal(pair.read_image(), image[..., None])
        np.testing.assert_array_equal(pair.read_mask(), mask)


def test_folders_and_files_can_be_named(tmp_path: Path) -> None:
    save_set(tmp_path, "a", "b", "_seg")
    assert len(find_pairs(images=tmp_path / "a", masks=tmp_path / "b")) == 5
    one = find_pairs(images=tmp_path / "a/cell 8.png", masks=tmp_path / "b/cell 9_seg.tif")
    assert names(one) == ["cell 8"]
    with pytest.raises(InputError, match="both an image folder and a mask folder"):
        find_pairs(tmp_path, images=tmp_path / "a")


def test_stacks_give_a_pair_for_each_slice(tmp_path: Path) -> None:
    images, masks = np.tile(IMAGES, (3, 1, 1)), np.tile(MASKS, (3, 1, 1))
    tifffile.imwrite(tmp_path / "train-volume.tif", images)
    tifffile.imwrite(tmp_path / "train-labels.tif", masks)
    pairs = find_pairs(tmp_path)
    assert names(pairs) == [f"train-volume_{i:02d}" for i in range(15)]
    np.testing.assert_array_equal([pair.read_image()[..., 0] for pair in pairs], images)
    np.testing.assert_array_equal([pair.read_mask() for pair in pairs], masks)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    shutil.move(tmp_path / "train-volume.tif", tmp_path / "images/a.tif")
    shutil.move(tmp_path / "train-labels.tif", tmp_path / "masks/a.tif")
    assert names(find_pairs(tmp_path))[-1] == "a_14"


def test_grey_images_among_rgb_ones_are_rgb(tmp_path: Path) -> None:
    save_set(tmp_path, "image", "label")
    rgb = np.stack([IMAGES[1], MASKS[2], IMAGES[3]], 2)
    write_image(tmp_path / "image/cell 9.png", rgb)
    pairs = find_pairs(tmp_path)
    wanted = [np.stack([image] * 3, 2) for image in IMAGES]
    wanted[1] = rgb
    np.testing.assert_array_equal([pair.read_image() for pair in pairs], wanted)
    data = SegmentationData(pairs)
    assert data.channels == 3
    assert "4 grey images among them, as RGB" in data.describe()


def replace(path: str, array: Array) -> Callable[[Path], None]:
    return lambda folder: write_image(folder / path, array)


def remove(*paths: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / path).unlink() for path in paths] and None


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, 60)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shutil.rmtree, r"no such folder"),
        (lambda f: shutil.rmtree(f / "image"), r"needs one folder of images .* but has label;"),
        (lambda f: shutil.copytree(f / "image", f / "imgs"), r"but has image, imgs, label; name"),
        (rename("image", "pictures"), r"needs one folder of images"),
        (lambda f: [shutil.rmtree(f / x) for x in ("image", "label")], r"no image in this folder"),
        (remove(*[f"image/cell {i}.png" for i in range(8, 13)]), r"image'.*no image"),
        (remove("label/cell 9.tif"), r"1 image without mask: cell 9\.png; a mask is named"),
        (
            remove("image/cell 9.png", "image/cell 10.png"),
            r"2 masks without .*cell 9\.tif, cell 10",
        ),
        (replace("label/cell 8_mask.tif", MASKS[0]), r"1 mask without image: cell 8_mask\.tif"),
        (replace("image/cell 8.tif", IMAGES[0]), r"2 images of .* are named 'cell 8'"),
        (
            replace("label/cell 9.tif", MASKS[0, 1:]),
            r"6 x 8 in .*cell 9\.png', but 5 x 8 in .*9\.tif",
        ),
        (
            replace("image/cell 9.png", np.stack([IMAGES[1]] * 3, 2).astype(np.uint16)),
            r"RGB uint16 in .*cell 9\.png', but RGB uint8 in .*cell 8\.png'",
        ),
        (replace("image/cell 9.png", IMAGES[1].astype(np.uint16)), r"grey uint16 in .*cell 9"),
        (cut("image/cell 9.png"), r"cell 9\.png': not an image, or a damaged one"),
        (cut("label/cell 9.tif"), r"cell 9\.tif': "),
        (lambda f: (f / "image/cell 12.png").write_bytes(b""), r"cell 12\.png': .*empty"),
        (
            lambda f: Image.fromarray(MASKS[1]).save(f / "label/cell 9.tif", "JPEG"),
            r"cell 9\.tif': JPEG and WebP change values",
        ),
    ],
)
def test_a_bad_folder_is_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = tmp_path / "my\ndata"
    save_set(folder, "image", "label")
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as error:
        SegmentationData(find_pairs(folder))
    assert "\n" not in str(error.value)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    save_set(tmp_path, "image", "label")
    write_image(tmp_path / "image/cell 8.tif", IMAGES[0])
    write_image(tmp_path / "label/cell 8_mask.tif", MASKS[0])
    with pytest.raises(InputError, match=r"2 images of .* are named 'cell 8'"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (IMAGES, MASKS[1:]),
        (IMAGES, MASKS[:, 1:]),
        (IMAGES[0], MASKS[0]),
        (IMAGES / 7, MASKS),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: Array, masks: Array) -> None:
    with pytest.raises(InputError, match="do not fit"):
        pairs_from_arrays(images, masks)


# -- splits


def test_the_last_fifth_is_held_out() -> None:
    train, val = split_pairs(in_memory(30))
    assert names(val) == [str(i) for i in range(24, 30)]
    assert names(train) == [str(i) for i in range(24)]
    assert names(split_pairs(in_memory(30), fold="5/5")[1]) == names(val)
    assert names(split_pairs(in_memory(30), val_names=["24-29"])[1]) == names(val)


@given(st.integers(2, 40), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_share_leaves_pairs_on_both_sides(count: int, share: float) -> None:
    pairs = in_memory(count)
    train, val = split_pairs(pairs, share)
    assert train
    assert val
    assert train + val == pairs
    assert abs(len(val) - share * count) <= 1


@given(st.integers(2, 40), st.data())
def test_folds_are_contiguous_and_hold_each_pair_out_once(count: int, data: st.DataObject) -> None:
    pairs, n = in_memory(count), data.draw(st.integers(2, count))
    held_out = []
    for k in range(1, n + 1):
        train, val = split_pairs(pairs, fold=f"{k}/{n}")
        assert sorted(names(train + val)) == sorted(names(pairs))
        assert count // n <= len(val) <= -(-count // n)
        held_out += val
    assert held_out == pairs


def test_names_go_before_positions() -> None:
    pairs = [
        Pair(name=name, image=IMAGES[0], mask=MASKS[0], info=in_memory(1)[0].info)
        for name in ("1", "2", "3", "4", "2-3", "x")
    ]
    for entries, wanted in (
        (["2"], ["2"]),
        (["2", "x"], ["2", "x"]),
        (["3-4"], ["3", "4"]),
        (["2-3"], ["2-3"]),
        (["0"], ["1"]),
        (["5"], ["x"]),
        (["0-1"], ["1"]),
        (["x", "x", "1-2"], ["1", "2", "x"]),
    ):
        train, val = split_pairs(pairs, val_names=entries)
        assert names(val) == wanted
        assert len(train) == len(pairs) - len(val)


@pytest.mark.parametrize(
    ("count", "options", "sentence"),
    [
        (1, {}, "too few to hold out a strip of them of at least 16 pixels"),
        (0, {}, "no image has a label"),
        (5, {"val": -0.1}, "validation share -0.1"),
        (5, {"val": 1.0}, "validation share 1.0"),
        (5, {"val": float("nan")}, "validation share nan"),
        (5, {"fold": "0/5"}, "fold '0/5' of 5 images: give k/n"),
        (5, {"fold": "6/5"}, "fold '6/5'"),
        (5, {"fold": "1/6"}, "k <= n <= 5"),
        (5, {"fold": "1/1"}, "fold '1/1'"),
        (5, {"fold": "two"}, "fold 'two'"),
        (5, {"fold": "1/5", "val_names": ["1"]}, "not both"),
        (5, {"val_names": []}, "0 of 5 images for validation"),
        (5, {"val_names": ["0-4"]}, "5 of 5 images for validation"),
        (5, {"val_names": ["3-2"]}, "0 of 5"),
        (5, {"val_names": ["5"]}, "validation image '5': neither a name nor one of 5"),
        (5, {"val_names": ["1-9"]}, "validation image '9'"),
        (5, {"val_names": ["cell"]}, "validation image 'cell'"),
    ],
)
def test_a_bad_split_is_one_sentence(count: int, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        split_pairs(in_memory(count) if count else [], **options)


def sparse(*corners: tuple[int, int] | None, side: int = 200, seen: int = 128) -> list[Pair]:
    """Images with masks of 0 and 255 in one corner and 7, no label, elsewhere; None: all of it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(corners), side, side), np.uint8)
    masks = np.full(images.shape, 7, np.uint8)
    for mask, corner in zip(masks, corners, strict=True):
        if corner is not None:
            window = tuple(slice(c, c + seen) for c in corner)
            mask[window] = rng.integers(0, 2, (seen, seen)) * 255
    return pairs_from_arrays(images, masks)


def test_images_without_a_label_are_left_out() -> None:
    pairs = sparse(None, (0, 0), None, (72, 0), (0, 72))
    train, val = split_pairs(pairs, ignore_value=7)
    assert (names(train), names(val)) == (["1", "3"], ["4"])
    assert split_pairs(pairs, 0, ignore_value=7) == ([pairs[1], pairs[3], pairs[4]], [])
    with pytest.raises(InputError, match="no image has a label"):
        split_pairs(sparse(None), ignore_value=7)


@pytest.mark.parametrize("corner", [(0, 0), (72, 10)])
def test_one_image_is_cut_into_strips_that_share_no_pixel(corner: tuple[int, int]) -> None:
    (pair,) = sparse(corner)
    train, (val,) = split_pairs([pair], 0.25, ignore_value=7)
    shares = [(part.read_mask() != 7).sum() / 128**2 for part in (*train, val)]
    assert shares == pytest.approx([0.75, 0.25])
    assert not any(part.meets(val) for part in train)
    assert sum(part.info.height * part.info.width for part in (*train, val)) == 200 * 200
    assert val.read_image().shape == (val.info.height, val.info.width, 1)
    held_out = [split_pairs([pair], fold=f"{k}/4", ignore_value=7)[1][0] for k in range(1, 5)]
    assert sum(part.info.height for part in held_out) == 200
    assert len(split_pairs([pair], fold="2/4", ignore_value=7)[0]) == 2


# -- classes

GREY_MASKS = hnp.arrays(
    st.sampled_from([np.uint8, np.uint16, np.int64, np.bool_]), (3, 4), elements=st.integers(0, 1)
) | hnp.arrays(np.int64, (3, 4), elements=st.sampled_from([-7, 0, 1, 128, 255, 999, 65535]))
COLOUR_MASKS = hnp.arrays(np.uint8, (3, 4, 3), elements=st.sampled_from([0, 7, 255])) | hnp.arrays(
    np.uint16, (3, 4, 3), elements=st.sampled_from([0, 65535])
)


@given(st.one_of(GREY_MASKS, COLOUR_MASKS), st.data())
def test_masks_survive_encoding_json_and_decoding(mask: Array, data: st.DataObject) -> None:
    values = [tuple(v) for v in mask.reshape(-1, 3).tolist()] if mask.ndim == 3 else None
    values = sorted(set(values or mask.astype(int).ravel().tolist()))
    ignore = data.draw(st.sampled_from([None, *values]))
    kept = [value for value in values if value != ignore]
    if not 2 <= len(kept) <= MAX_CLASSES:
        with pytest.raises(InputError, match=r"distinct values|have the value"):
            ClassTable.of([mask], ignore)
        return
    table = ClassTable.of([mask], ignore)
    assert table.values == tuple(kept)
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    indices = table.encode(mask)
    np.testing.assert_array_equal(table.decode(indices), mask)
    for i, share in enumerate(table.shares):
        assert share == pytest.approx((indices == i).sum() / (indices != IGNORE).sum())
    assert table.ignored_share == pytest.approx((indices == IGNORE).mean())


@pytest.mark.parametrize(
    ("values", "indices"),
    [
        ([0, 1, 1], [0, 1, 1]),
        ([255, 0, 0], [1, 0, 0]),
        ([0, 255, 128], [0, 2, 1]),
        ([[0, 0, 255], [9, 0, 0], [0, 1, 0]], [0, 2, 1]),
    ],
)
def test_classes_follow_the_order_of_the_values(values: list[Any], indices: list[int]) -> None:
    assert table_of(values).encode(np.array(values)[None]).tolist() == [indices]


def test_the_table_is_of_the_whole_set() -> None:
    table = ClassTable.of([np.zeros((2, 2), np.uint8), np.full((2, 6), 9, np.uint8)])
    assert table.values == (0, 9)
    assert table.shares == (0.25, 0.75)


def test_grey_masks_among_colours_are_grey_colours() -> None:
    grey, colour = np.array([[0, 255]], np.uint8), np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8)
    table = ClassTable.of([grey, colour], ignore_value=255)
    assert table.values == ((0, 0, 0), (255, 0, 0))
    assert table.ignore_value == (255, 255, 255)
    assert table.encode(grey).tolist() == [[0, IGNORE]]
    assert table.encode(colour).tolist() == [[0, 1]]


def test_the_table_is_printed_with_shares() -> None:
    assert table_of([0, 0, 0, 255, 7], ignore=7).lines() == [
        "value   0 -> class 0   75.00%",
        "value 255 -> class 1   25.00%",
        "value   7 -> ignored   20.00%",
    ]


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.arange(40), "40 distinct values .0, 1, 2, .*39., more than 32: if they number objects"),
        (np.repeat(np.arange(40), [900, *[9] * 20, *[7] * 19]), "they number objects"),
        (np.arange(10**5), "distinct values"),
        (RNG.integers(0, 256, (5000, 3)), "distinct values"),
        (np.full(9, 255), "all mask pixels have the value 255"),
        (np.full((9, 3), 255), r"all mask pixels have the value \(255, 255, 255\)"),
    ],
)
def test_masks_that_hold_no_classes_are_explained(mask: Array, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ClassTable.of([mask[None]])


def test_the_ignored_value_must_occur() -> None:
    with pytest.raises(InputError, match="ignore value 7 is in no mask: the masks hold 0, 255"):
        table_of([0, 255], ignore=7)
    with pytest.raises(InputError, match="all mask pixels have the value 0"):
        table_of([0, 255], ignore=255)


@pytest.mark.parametrize(
    ("values", "mask", "sentence"),
    [
        ([0, 255], [0, 1, 255, 9, 9], "m.png: unexpected values 1, 9 in 3 pixels; .* 0, 255"),
        ([0, 255], [256, -1], "unexpected values -1, 256"),
        ([0, 255], [[0, 0, 255]], r"unexpected values \(0, 0, 255\) in 1 pixel;"),
        ([[0, 0, 0], [9, 9, 9]], [0, 9, 5], r"unexpected values \(5, 5, 5\)"),
    ],
)
def test_unexpected_values_name_file_value_and_table(
    values: list[Any], mask: list[Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        table_of(values).encode(np.array(mask)[None], "m.png")


def test_indices_without_a_class_cannot_be_decoded() -> None:
    for indices in ([[2]], [[IGNORE]]):
        with pytest.raises(ValueError, match="2 classes"):
            table_of([0, 1]).decode(np.array(indices))


GOOD = {"values": [0, 255], "shares": [0.5, 0.5], "ignore_value": None, "ignored_share": 0.0}


@pytest.mark.parametrize(
    "damage",
    [
        {"values": [255, 0]},
        {"values": [0, 0]},
        {"values": [0]},
        {"values": [0, 0.5]},
        {"values": [0, "x"]},
        {"values": "01"},
        {"values": [0, [1, 2, 3]]},
        {"values": [[0, 0], [1, 2]]},
        {"values": [[0, 0, float("inf")], [1, 2, 3]]},
        {"values": [False, True]},
        {"values": [0, 2**70]},
        {"values": list(range(99)), "shares": [0.01] * 99},
        {"values": None},
        {"shares": [1.0]},
        {"shares": [0.5, 10**400]},
        {"ignore_value": [1, 2, 3]},
        {"ignored_share": None},
    ],
)
def test_a_damaged_table_is_refused(damage: dict[str, Any]) -> None:
    assert ClassTable.from_dict(GOOD).values == (0, 255)
    with pytest.raises(InputError, match="class table is damaged"):
        ClassTable.from_dict(GOOD | damage)
    with pytest.raises(InputError, match="class table is damaged"):
        ClassTable.from_dict({key: GOOD[key] for key in GOOD if key not in damage})


# -- normalisation


@given(
    hnp.arrays(np.float32, (4, 3, 5, 3), elements=st.floats(-1e3, 1e3, width=32)),
    st.sampled_from([0.0, 1e6]),
)
def test_streamed_statistics_are_those_of_all_pixels(images: Array, offset: float) -> None:
    images[0, 0, 0, 0] = -1  # images of 0 to 1 beside others of more are refused
    images = (images + np.float32(offset)).astype(np.float32)
    found = Normalisation.of([images[0], images[1:3].reshape(6, 5, 3), images[3]])
    everything = images.reshape(-1, 3).astype(np.float64)
    std = everything.std(0)
    np.testing.assert_allclose(found.mean, everything.mean(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found.std, np.where(std > 1e-9, std, found.std), rtol=1e-9)


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    images = RNG.integers(0, 65536, (4, 20, 30, 3), np.uint16)
    normalisation = Normalisation.of(images)
    assert Normalisation.from_dict(json.loads(json.dumps(normalisation.to_dict()))) == normalisation
    scaled = np.stack([normalisation(image) for image in images])
    assert scaled.dtype == np.float32
    assert scaled.shape == (4, 3, 20, 30)
    assert scaled.flags.c_contiguous
    np.testing.assert_allclose(scaled.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 2, 3)), 1, atol=1e-5)


def test_a_constant_channel_becomes_zero() -> None:
    image = np.full((4, 5, 1), 200, np.uint8)
    assert Normalisation.of([image])(image).tolist() == np.zeros((1, 4, 5)).tolist()


@pytest.mark.parametrize("image", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 1), np.uint16)])
def test_an_image_of_another_kind_is_refused(image: Array) -> None:
    with pytest.raises(InputError, match="training images have 1 of uint8; convert it"):
        Normalisation((1.0,), (2.0,), "uint8")(image)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"mean": [0.0], "std": [0.0], "dtype": "uint8"},
        {"mean": [0.0], "std": [-1.0], "dtype": "uint8"},
        {"mean": [float("nan")], "std": [1.0], "dtype": "uint8"},
        {"mean": [], "std": [], "dtype": "uint8"},
        {"mean": [0.0], "std": [1.0, 1.0, 1.0], "dtype": "uint8"},
        {"mean": [10**400], "std": [1.0], "dtype": "uint8"},
        {"mean": [0.0], "std": [1.0], "dtype": "object"},
        {"mean": 0.0, "std": [1.0], "dtype": "uint8"},
        [],
    ],
)
def test_a_damaged_normalisation_is_refused(saved: Any) -> None:
    with pytest.raises(InputError, match="normalisation is damaged"):
        Normalisation.from_dict(saved)


# -- the whole


@pytest.mark.parametrize("source", ["files", "stacks", "arrays", "lists", "tensors"])
def test_files_stacks_and_arrays_load_alike(tmp_path: Path, source: str) -> None:
    if source == "arrays":
        pairs = pairs_from_arrays(IMAGES, MASKS)
    elif source == "lists":
        pairs = pairs_from_arrays(list(IMAGES), list(MASKS))
    elif source == "tensors":
        pairs = pairs_from_arrays(torch.from_numpy(IMAGES), torch.from_numpy(MASKS))
    elif source == "files":
        save_set(tmp_path, "images", "masks")
        pairs = find_pairs(tmp_path)
    else:
        tifffile.imwrite(tmp_path / "a.tif", IMAGES)
        np.save(tmp_path / "b.npy", MASKS)
        pairs = find_pairs(images=tmp_path / "a.tif", masks=tmp_path / "b.npy")
    train, val = split_pairs(pairs, 0.4)
    data = SegmentationData(train, val)
    assert (data.channels, data.dtype) == (1, "uint8")
    assert (data.train, data.val) == (range(3), range(3, 5))
    assert data.normalisation == Normalisation.of(IMAGES[:3, :, :, None])
    for i in range(5):
        image, mask = data.load(i)
        np.testing.assert_array_equal(image, data.normalisation(IMAGES[i, :, :, None]))
        np.testing.assert_array_equal(mask, MASKS[i] > 0)
        assert (image.dtype, mask.dtype) == (np.float32, np.uint8)
        assert not image.flags.writeable
        assert not mask.flags.writeable


def test_statistics_do_not_see_the_validation_images() -> None:
    others = np.concatenate([IMAGES[:3], 255 - IMAGES[3:]])
    for images in (IMAGES, others):
        train, val = split_pairs(pairs_from_arrays(images, MASKS), 0.4)
        assert SegmentationData(train, val).normalisation == Normalisation.of(IMAGES[:3, ..., None])


def test_a_trained_table_and_normalisation_are_kept() -> None:
    pairs = pairs_from_arrays(IMAGES, MASKS)
    table, normalisation = table_of([0, 255, 255, 255]), Normalisation((9.0,), (3.0,), "uint8")
    data = SegmentationData([], pairs, table=table, normalisation=normalisation)
    assert data.table is table
    assert data.load(0)[0][0, 0, 0] == np.float32((IMAGES[0, 0, 0] - 9.0) / 3.0)
    with pytest.raises(InputError, match="0: unexpected values 255 in"):
        SegmentationData([], pairs, table=table_of([0, 1]), normalisation=normalisation)
    coloured = pairs_from_arrays(np.stack([IMAGES] * 3, -1), MASKS)
    with pytest.raises(InputError, match="3 channels"):
        SegmentationData([], coloured, table=table, normalisation=normalisation)


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    save_set(tmp_path, "images", "masks")
    one = IMAGES[0].size * 5  # float32 and uint8
    data = SegmentationData(find_pairs(tmp_path), cache_bytes=2 * one + 1)
    expected = [data.load(i) for i in range(5)]
    kept = [data.load(i)[0] is expected[i][0] for i in range(5)]
    assert kept == [True, True, False, False, False]
    for i, (image, mask) in enumerate(expected):
        np.testing.assert_array_equal(data.load(i)[0], image)
        np.testing.assert_array_equal(data.load(i)[1], mask)


@pytest.mark.parametrize(
    ("holes", "reads"),
    [("none", (2, 2, 1)), ("ignored", (2, 2, 1)), ("declared", (3, 3, 2)), ("found", (2, 3, 1))],
)
def test_an_image_that_stays_in_memory_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: str, reads: tuple[int, ...]
) -> None:
    """Others are decoded to measure them if they train, to scale them, for the values of masks
    where a value is declared to be no data, and anew where pixels that count have a found one."""
    images, masks = RNG.integers(1, 200, (3, 6, 8), np.uint8), (IMAGES[:3] > 100) * np.uint8(1)
    if holes != "none":
        masks[[0, 2], :2] = 9
    if holes in ("declared", "found"):
        images[[0, 2], :2] = 255
        images[1, 3, 3] = 255
    for i in range(3):
        write_image(tmp_path / f"images/{i}.png", images[i])
        write_image(tmp_path / f"masks/{i}.png", masks[i])
    pairs = find_pairs(tmp_path, reading=Reading(nodata=255 if holes == "declared" else None))
    said = {"ignore_value": 9 if holes in ("ignored", "found") else None}
    decoded: Counter[str] = Counter()

    def read(path: Path, *args: Any) -> Array:
        decoded[path.stem] += 1
        return read_image(path, *args)

    monkeypatch.setattr("segmentation.data.pairs.read_image", read)
    kept = SegmentationData(pairs[:2], pairs[2:], **said)
    assert decoded == {"0": 1, "1": 1, "2": 1}
    decoded.clear()
    streamed = SegmentationData(pairs[:2], pairs[2:], cache_bytes=0, **said)
    assert tuple(decoded[str(i)] for i in range(3)) == reads
    assert kept.describe() == streamed.describe()
    counts = np.ones((2, 6, 8), bool)
    if holes != "none":
        counts = (masks[:2] != 9) & ((images[:2] != 255) | (holes == "ignored"))
    nodata = 255 if holes in ("declared", "found") else None
    known = counts & ((images[:2] != 255) | (nodata is None))
    moments = map(Moments.of, images[:2, ..., None], known)
    expected = Normalisation.joined(moments, nodata)
    assert kept.normalisation == streamed.normalisation == expected


def test_the_summary_says_what_was_found(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 5), (9, 3), (8, 6)]):
        (tmp_path / "images").mkdir(exist_ok=True)
        rgba = RNG.integers(0, 256, (*size, 4), np.uint8)
        Image.fromarray(rgba).save(tmp_path / f"images/{i}.png")
        write_image(tmp_path / f"masks/{i}.png", np.eye(*size, dtype=np.uint8))
    data = SegmentationData(*split_pairs(find_pairs(tmp_path)))
    assert data.describe().splitlines() == [
        "3 images of 4 x 5 to 8 x 6, RGB uint8",
        "value 0 -> class 0   86.32%",
        "value 1 -> class 1   13.68%",
        "alpha channel dropped in 3 images",
        f"values from {data.normalisation.low:g} to {data.normalisation.high:g}",
        "training: 2 images (0, 1)",
        "validation: 1 image (2)",
    ]


@pytest.mark.skipif("ISBI2012_DIR" not in os.environ, reason="ISBI2012_DIR is not set")
def test_isbi_2012_is_found_whole(tmp_path: Path) -> None:
    pairs = find_pairs(Path(os.environ["ISBI2012_DIR"]))
    assert names(pairs) == [str(i) for i in range(30)]
    train, val = split_pairs(pairs)
    data = SegmentationData(train, val)
    assert names(val) == [str(i) for i in range(24, 30)]
    assert {data.load(i)[0].shape for i in range(30)} == {(1, 512, 512)}
    assert (data.channels, data.dtype) == (1, "uint8")
    assert data.table.values == (0, 255)
    assert data.table.shares == pytest.approx((0.2196312, 0.7803688), abs=1e-7)

    images = np.stack([pair.read_image()[..., 0] for pair in pairs])
    tifffile.imwrite(tmp_path / "train-volume.tif", images, imagej=True)
    masks = np.stack([pair.read_mask() for pair in pairs])
    tifffile.imwrite(tmp_path / "train-labels.tif", masks, imagej=True)
    stacks = SegmentationData(*split_pairs(find_pairs(tmp_path)))
    assert stacks.table == data.table
    assert stacks.normalisation == data.normalisation
