"""How mask values stand for classes: what is found out, and what is refused with the evidence."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.masks import are_instances
from segmentation.data.pairs import find_pairs, pairs_from_arrays
from unet.errors import InputError
from unet.files.images import image_info, read_image, read_mask, write_image
from unet.files.mask_values import MaskCleaning, Survey

Array = NDArray[Any]
COLOURS = [(0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200)]


def blobs(seed: int, values: Sequence[int] = (0, 255), side: int = 64) -> Array:
    """Discs of the values but the first on the first."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (side, side), values[0])
    draw = ImageDraw.Draw(picture)
    for i in range(8):
        x, y, r = rng.integers(8, side - 8), rng.integers(8, side - 8), rng.integers(4, 9)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=values[1 + i % (len(values) - 1)])
    return np.asarray(picture)


def with_void(mask: Array, width: int = 2) -> Array:
    """255 around each object, as Pascal VOC has it."""
    from scipy import ndimage

    grown = ndimage.grey_dilation(mask, (2 * width + 1,) * 2)
    shrunk = ndimage.grey_erosion(mask, (2 * width + 1,) * 2)
    return np.where(grown != shrunk, 255, mask).astype(np.uint8)


def data_of(masks: Sequence[Array], **options: Any) -> SegmentationData:
    images = np.zeros((len(masks), *masks[0].shape[:2]), np.uint8)
    return SegmentationData(pairs_from_arrays(images, np.stack(masks)), **options)


def folder_of(path: Path, masks: Sequence[Array], palettes: Sequence[Any] = ()) -> Path:
    for i, mask in enumerate(masks):
        write_image(path / "images" / f"{i}.png", np.full(mask.shape[:2], 9, np.uint8))
        picture = Image.fromarray(mask)
        if palettes:
            picture.putpalette(np.array(palettes[i % len(palettes)], np.uint8).tobytes())
        (path / "masks").mkdir(exist_ok=True)
        picture.save(path / "masks" / f"{i}.png")
    return path


# -- what contradicts itself


def test_two_encodings_of_one_class_are_refused_and_united() -> None:
    masks = [blobs(i, (0, 1) if i % 2 else (0, 255)) for i in range(4)]
    with pytest.raises(InputError, match=r"0 and 1, such as 1 \(2 of 4 .* --threshold-masks"):
        data_of(masks)
    united = Survey.of((str(i), MaskCleaning(threshold=True)(m)) for i, m in enumerate(masks))
    assert dict(united.pixels) == dict(Survey.of([("", blobs(i)) for i in range(4)]).pixels)


@pytest.mark.parametrize("colour", [False, True])
def test_a_survey_counts_pixels_and_those_among_their_like(colour: bool) -> None:
    mask = np.zeros((6, 7), np.uint8)
    mask[1:4, 1:4] = 200  # whose middle is inside
    mask[5, 6] = 9  # none of which is
    found = Survey.of([("0", np.stack([mask] * 3, axis=2) if colour else mask)])
    black, stray, white = [(v,) * 3 if colour else v for v in (0, 9, 200)]
    assert dict(found.pixels) == {black: 32, stray: 1, white: 9}
    assert dict(found.inside) == {black: 18, stray: 0, white: 1}


@pytest.mark.parametrize("others", [(0, 85, 170), (0, 127, 255), (0, 128, 255)])
def test_two_scales_of_the_same_classes_are_refused(others: tuple[int, ...]) -> None:
    masks = [blobs(i, (0, 1, 2) if i % 2 else others) for i in range(4)]
    with pytest.raises(
        InputError, match=r"some masks hold 1, 2, such as 1, others .* the same cla"
    ):
        data_of(masks)
    for values in ((0, 1, 2), others):
        data_of([blobs(i, values) for i in range(4)])


def test_probabilities_are_masks_where_a_threshold_is_asked_for(tmp_path: Path) -> None:
    path, mask = tmp_path / "a.tif", blobs(0)
    write_image(path, np.where(mask > 0, 0.9, 0.2).astype(np.float32))
    with pytest.raises(InputError, match=r"whole numbers, .* --threshold-masks makes two classes"):
        read_mask(path)
    np.testing.assert_array_equal(MaskCleaning(threshold=True)(read_mask(path, lossy=True)), mask)


def test_colours_are_not_taken_for_greys(tmp_path: Path) -> None:
    mask = np.array(COLOURS, np.uint8)[blobs(0, (0, 1, 2, 3))]
    for cleaning in (MaskCleaning(values=(0, 255)), MaskCleaning(threshold=True)):
        with pytest.raises(InputError, match="its classes are colours"):
            cleaning(mask)
    black_or_red = np.array(COLOURS[:2], np.uint8)[blobs(0, (0, 1))]
    np.testing.assert_array_equal(MaskCleaning(values=(0, 87))(black_or_red), blobs(0, (0, 87)))
    soft = np.asarray(Image.fromarray(mask).resize((60, 60)).resize((64, 64)))
    with pytest.raises(InputError, match="save them anew as PNG with the true colours"):
        Survey.of([("0", soft)]).check()


def test_floats_of_two_ranges_are_refused() -> None:
    images = np.stack([np.full((8, 8), v, np.float32) for v in (0.2, 1, 200)])
    masks = np.stack([np.eye(8, dtype=np.uint8)] * 3)
    with pytest.raises(InputError, match="some images go up to 1, those of others up to 200"):
        SegmentationData(pairs_from_arrays(images, masks))
    known = SegmentationData(pairs_from_arrays(images[:2], masks[:2])).normalisation
    with pytest.raises(InputError, match=r"go up to 200, .* training images are from 0 to 1"):
        known(images[2][..., None])
    images[1, 0, 0] = 3  # a hot pixel
    SegmentationData(pairs_from_arrays(images[:2], masks[:2]))


def test_a_class_that_never_meets_another_one_is_no_contradiction() -> None:
    masks = [blobs(i, (0, 1 + i % 2)) for i in range(4)]
    assert data_of(masks).table.values == (0, 1, 2)


@pytest.mark.parametrize("quality", [50, 75, 90, 95])
def test_the_noise_of_jpeg_is_refused_with_its_values_and_mended(quality: int) -> None:
    masks, noisy = [blobs(i) for i in range(3)], []
    for mask in masks:
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "JPEG", quality=quality)
        noisy.append(np.asarray(Image.open(buffer)))
    with pytest.raises(InputError, match=r"around 0, 255\? --mask-values 0 255 gives each"):
        data_of(noisy)
    for cleaning in (MaskCleaning(values=(0, 255)), MaskCleaning(threshold=True)):
        wrong = [(cleaning(n) != m).mean() for n, m in zip(noisy, masks, strict=True)]
        assert max(wrong) < 0.03


@pytest.mark.parametrize("levels", [4, 8, 200])
def test_soft_edges_are_refused_at_any_number_of_values(levels: int) -> None:
    masks = []
    for i in range(3):
        soft = np.asarray(
            Image.fromarray(blobs(i, side=256)).resize((64, 64), Image.Resampling.BOX)
        )
        masks.append((np.rint(soft / 255 * levels) * (255 / levels)).astype(np.uint8))
    with pytest.raises(InputError, match="soft edges"):
        data_of(masks)


def test_a_stray_value_of_one_mask_is_named() -> None:
    masks = [blobs(i, (0, 1, 2)).copy() for i in range(4)]
    masks[2][10, 10] = 7
    with pytest.raises(InputError, match=r"the value 7 is in one mask only, 2, in 1 pixels"):
        data_of(masks)


def test_lines_and_scribbles_are_classes() -> None:
    mask = np.full((64, 64), 9, np.uint8)
    for value, row in ((0, 5), (1, 20), (2, 40), (3, 50)):
        mask[row, 4:50] = value
    assert data_of([mask, mask.T], ignore_value=9).table.values == (0, 1, 2, 3)


@given(st.lists(st.integers(-3, 255), min_size=2, max_size=5, unique=True), st.integers(0, 99))
def test_each_pixel_takes_the_nearest_of_the_named_values(values: list[int], seed: int) -> None:
    mask = np.random.default_rng(seed).integers(-9, 256, (8, 8))
    found = MaskCleaning(values=tuple(values))(mask)
    distance = abs(mask[..., None] - np.array(values)).min(axis=-1)
    np.testing.assert_array_equal(abs(found.astype(int) - mask), distance)


def test_a_jpeg_mask_is_read_where_its_values_are_named(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", np.zeros((64, 64), np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(blobs(i)).save(tmp_path / "masks" / f"{i}.jpg")
    with pytest.raises(InputError, match="--mask-values 0 255"):
        SegmentationData(find_pairs(tmp_path))
    data = SegmentationData(find_pairs(tmp_path, cleaning=MaskCleaning(values=(0, 255))))
    assert data.table.values == (0, 255)


# -- void, palettes and names


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 3)])
def test_255_around_objects_is_void(values: tuple[int, ...]) -> None:
    data = data_of([with_void(blobs(i, values)) for i in range(3)])
    assert (data.table.values, data.table.ignore_value) == (values, 255)
    assert "255 marks the edges of objects" in data.describe()


def test_255_that_fills_objects_is_a_class() -> None:
    data = data_of([blobs(i, (0, 1, 255), side=128) for i in range(3)])
    assert (data.table.values, data.table.ignore_value) == ((0, 1, 255), None)


def test_masks_with_a_palette_are_indices_and_come_back_with_it(tmp_path: Path) -> None:
    palette = [*COLOURS, *[(0, 0, 0)] * 251, (224, 224, 192)]  # padded with black
    masks = [with_void(blobs(i, (0, 1, 2, 3))) for i in range(3)]
    data = SegmentationData(find_pairs(folder_of(tmp_path, masks, [palette])))
    assert (data.table.values, data.table.ignore_value) == ((0, 1, 2, 3), 255)
    assert ClassTable.from_dict(data.table.to_dict()) == data.table
    for name in ("x.png", "x.tif"):
        mask = data.table.decode(data.load(0)[1])
        write_image(tmp_path / name, mask, palette=data.table.palette)
        np.testing.assert_array_equal(read_mask(tmp_path / name), masks[0])
        stored = image_info(tmp_path / name).palette
        assert stored is not None
        assert np.frombuffer(stored, np.uint8).reshape(-1, 3)[255].tolist() == [224, 224, 192]


def test_palettes_that_are_cut_after_the_last_colour_of_their_mask_are_one(tmp_path: Path) -> None:
    masks = [blobs(i, values) for i, values in enumerate(((0, 1), (0, 1, 2, 3), (0, 2)))]
    cut = [COLOURS[: mask.max() + 1] for mask in masks]
    table = SegmentationData(find_pairs(folder_of(tmp_path, masks, cut))).table
    assert table.values == (0, 1, 2, 3)
    write_image(tmp_path / "x.png", masks[1], palette=table.palette)
    np.testing.assert_array_equal(read_mask(tmp_path / "x.png"), masks[1])
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.array(COLOURS)[masks[1]])


def test_palettes_in_another_order_make_colours_the_classes(tmp_path: Path) -> None:
    masks = [blobs(i, (0, 1, 2)) for i in range(2)]
    turned = [COLOURS[i] for i in (0, 2, 1)]
    data = SegmentationData(find_pairs(folder_of(tmp_path, masks, [COLOURS, turned])))
    assert set(data.table.values) == set(COLOURS[:3])
    np.testing.assert_array_equal(data.load(0)[1] == 1, masks[0] == 2)
    same = [COLOURS[i] for i in (0, 2, 2)]
    with pytest.raises(InputError, match="the indices 1 and 2 of its palette both have the colour"):
        find_pairs(folder_of(tmp_path, masks, [COLOURS, same]))


def test_a_colour_of_the_palette_is_ignored_by_name(tmp_path: Path) -> None:
    masks = [blobs(i, (0, 1, 2, 3)) for i in range(2)]
    pairs = find_pairs(folder_of(tmp_path, masks, [COLOURS]))
    data = SegmentationData(pairs, ignore_value=COLOURS[3])
    assert (data.table.values, data.table.ignore_value) == ((0, 1, 2), 3)
    with pytest.raises(InputError, match=r"\(1, 2, 3\): the palette .* none: give the index"):
        SegmentationData(pairs, ignore_value=(1, 2, 3))


@pytest.mark.parametrize(
    "text", ["ground\ncell\n", "0: ground\n255: cell\n", "\ufeffground\r\ncell\r\n"]
)
def test_classes_have_the_names_of_a_text_file(tmp_path: Path, text: str) -> None:
    (folder_of(tmp_path, [blobs(i) for i in range(2)]) / "classes.txt").write_text(
        text, encoding="utf-8"
    )
    table = SegmentationData(find_pairs(tmp_path)).table
    assert (table.values, table.names) == ((0, 255), ("ground", "cell"))


def test_names_that_do_not_fit_are_told() -> None:
    masks = [blobs(i, (0, 1, 2)) for i in range(2)]
    assert data_of(masks, names=("a", "b", "c")).table.names == ("a", "b", "c")
    with pytest.raises(
        InputError, match=r"2 classes have names \(a, b\), but the masks hold 0, 1, 2"
    ):
        data_of(masks, names=("a", "b"))


def test_a_named_class_may_have_no_pixel() -> None:
    table = data_of([blobs(i, (0, 1)) for i in range(2)], names=("a", "b", "c")).table
    assert (table.values, table.shares[2]) == ((0, 1, 2), 0)


# -- objects, and what was not measured


def test_numbered_objects_are_told_from_classes() -> None:
    numbers = np.zeros((64, 64), np.uint16)
    for n in range(5):
        numbers[4 + 12 * n : 12 + 12 * n, 10:40] = n + 1
    more = np.where(numbers == 5, 9, numbers)
    assert are_instances([numbers, more])
    assert not are_instances([blobs(i, (0, 1, 2)) for i in range(4)])  # several parts a value
    assert not are_instances([numbers, numbers])  # the same values in each: organs?
    assert not are_instances([np.arange(64 * 64).reshape(64, 64)])  # noise


@pytest.mark.parametrize("declared", ["-9999", "nan"])
def test_what_was_not_measured_is_in_no_statistic_and_ignored(
    tmp_path: Path, declared: str
) -> None:
    image = np.random.default_rng(0).uniform(0, 1, (64, 64)).astype(np.float32)
    hole = np.zeros((64, 64), bool)
    hole[:20] = True
    tags = [(42113, "s", 0, declared, True)]
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        filled = np.where(hole, float(declared), image).astype(np.float32)
        tifffile.imwrite(tmp_path / "images" / f"{i}.tif", filled, extratags=tags)
        write_image(tmp_path / "masks" / f"{i}.png", np.where(hole, 255, blobs(i) // 255))
    data = SegmentationData(find_pairs(tmp_path))
    assert data.normalisation.mean[0] == pytest.approx(image[~hole].mean(), rel=1e-6)
    assert (data.table.values, data.table.ignore_value) == ((0, 1), 255)
    found, mask = data.load(0)
    assert (found[:, hole] == 0).all()
    assert (mask[hole] == IGNORE).all()
    assert (mask[~hole] != IGNORE).all()


@pytest.mark.parametrize(
    ("values", "marked"), [((0, 1, 2), 255), ((0, 255), 128), ((0, 128, 255), 1), ("objects", 255)]
)
def test_predictions_mark_what_was_not_measured_where_no_mask_does(
    tmp_path: Path, values: tuple[int, ...] | str, marked: int
) -> None:
    image = np.random.default_rng(0).integers(1, 9, (64, 64)).astype(np.int16)
    image[:20] = -9999
    tags = [(42113, "s", 0, "-9999", True)]
    for i in range(3):
        mask = blobs(i, tuple(range(9)) if isinstance(values, str) else values)
        (tmp_path / "images").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "images" / f"{i}.tif", image, extratags=tags)
        write_image(tmp_path / "masks" / f"{i}.png", mask)
    data = SegmentationData(find_pairs(tmp_path), instances=values == "objects")
    assert data.table.values == ((0, 1) if values == "objects" else values)
    assert data.table.decode(np.array([[0, IGNORE]], np.uint8)).tolist() == [[0, marked]]
    assert f"predicted masks have the value {marked} where nothing was" in data.describe()
    assert data.ignore_value is None
    assert np.array_equal(data.load(0)[1] == IGNORE, image == -9999)


@pytest.mark.parametrize(
    ("declared", "values", "ignored"),
    [("7", (0, 1), 7), ("200", (0, 1, 7), None), ("0", (0, 1, 7), None)],
)
def test_what_a_mask_declares_is_ignored_if_pixels_have_it(
    tmp_path: Path, declared: str, values: tuple[int, ...], ignored: int | None
) -> None:
    """0 is declared by programs that mean the background."""
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", np.zeros((64, 64), np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        tags = [(42113, "s", 0, declared, True)]
        tifffile.imwrite(tmp_path / "masks" / f"{i}.tif", blobs(i, (0, 1, 7)), extratags=tags)
    table = SegmentationData(find_pairs(tmp_path)).table
    assert (table.values, table.ignore_value) == (values, ignored)


def test_a_value_that_nobody_declared_is_recognised_where_all_of_it_is_ignored() -> None:
    images = np.random.default_rng(0).uniform(0, 1, (3, 64, 64)).astype(np.float32)
    images[:, :20] = -1e6
    masks = np.stack([blobs(i) // 255 for i in range(3)])
    masks[:, :20] = 9
    data = SegmentationData(pairs_from_arrays(images, masks), ignore_value=9)
    assert data.normalisation.nodata == -1e6
    assert abs(data.normalisation.mean[0] - 0.5) < 0.01
    assert "-1e+06 is taken for no data" in data.describe()
