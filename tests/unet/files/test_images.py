from __future__ import annotations

import io
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unet.errors import InputError
from unet.files.folders import mask_files
from unet.files.images import (
    image_info,
    images_below,
    list_images,
    natural_key,
    read_image,
    read_mask,
    write_image,
)
from unet.files.pages import MAX_PIXELS, ImageInfo, Reading, missing

Array = NDArray[Any]


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def pillow(array: Array, kind: str, mode: str | None = None, **options: Any) -> bytes:
    picture = Image.fromarray(array)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def palette(colours: Array, indices: Array, kind: str) -> bytes:
    picture = Image.fromarray(indices)
    picture.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def tiff(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DEFLATE = {"compression": "zlib"}


def open_files() -> list[str]:
    """What this process has open, where the system can tell."""
    handles = Path("/proc/self/fd")
    return (
        [os.readlink(link) for link in handles.iterdir() if link.is_symlink()]
        if handles.exists()
        else []
    )


def stored(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- folders


def test_a_folder_of_folders_of_images_names_the_first_with_some(tmp_path: Path) -> None:
    for place in ("day10", "day2/a", "day1", ".hidden"):
        (tmp_path / place).mkdir(parents=True)
    write_image(tmp_path / ".hidden" / "x.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"no image in this folder \([^)]*\)$"):
        list_images(tmp_path)
    (tmp_path / "RoiSet.zip").touch()
    with pytest.raises(InputError, match=r"but files of other kinds, such as RoiSet\.zip$"):
        list_images(tmp_path)
    for place in ("day10", "day2/a"):
        write_image(tmp_path / place / "x.PNG", np.zeros((4, 4), np.uint8))
    first = re.escape(repr(str(tmp_path / "day2" / "a")))
    with pytest.raises(InputError, match=f"in this folder .*, but in {first}: name one"):
        list_images(tmp_path)


def test_masks_beside_their_images_are_told_by_their_names() -> None:
    masks = ("a_mask.png", "b_GT.tif", "c label.png", "mask1.png", "labels_2.png")
    images = ("a.jpg", "b_raw.tif", "c.png", "Image1.png", "img_2.png")
    others = ("mask.png", "d_mask.png", "damask.png", "dam.png", "masked.png", "image_mask_of.png")
    files = [Path("x", name) for name in (*masks, *images, *others)]
    assert mask_files([*files, Path("d.png")]) == [Path("x", name) for name in masks]


def test_files_are_listed_in_natural_order_without_hidden_ones(tmp_path: Path) -> None:
    names = ["0.png", "1.PNG", "2.tif", "10.npy", "a 1.jpeg", "a 2.bmp", "a 10.gif", "ä\n.webp"]
    for name in [*reversed(names), ".hidden.png", "notes.txt", "._0.png"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == names


@pytest.mark.parametrize("name", ["x.png", "x.nii.gz", "x.h5", "x.zarr"])
@pytest.mark.parametrize("target", ["nothing.here", None])
def test_a_link_to_nothing_is_listed_and_named_when_it_is_read(
    tmp_path: Path, name: str, target: str | None
) -> None:
    (tmp_path / name).symlink_to(target or name)
    for listing in (list_images, images_below):
        assert listing(tmp_path) == [tmp_path / name]
    for read in (image_info, read_image, read_mask):
        with pytest.raises(InputError, match=f"{name}': a link to '{target or name}', which does"):
            read(tmp_path / name)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_sort_as_numbers(numbers: list[int]) -> None:
    names = [f"slice{n}.png" for n in numbers]
    assert sorted(names, key=natural_key) == [f"slice{n}.png" for n in sorted(numbers)]
    assert natural_key("9" * 5000) < natural_key("1" + "0" * 5000)


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, lambda p: p.symlink_to(p)])
def test_no_such_folder_and_an_empty_one_are_named(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "my\nfolder"
    make(folder)
    with pytest.raises(InputError, match=r"my\\nfolder': no (such folder|image)") as error:
        list_images(folder)
    assert "\n" not in str(error.value)


# -- what goes in comes out

RGB, GREY, WIDE = noise(7, 5, 3), noise(7, 5), noise(7, 5, dtype="uint16")
STACK = noise(4, 7, 5)
COLOURS = np.array([[9, 8, 7], [200, 0, 0], [0, 1, 255]], np.uint8)
GREYS = np.array([[255] * 3, [0] * 3, [128] * 3], np.uint8)
INDICES = GREY % 3
READABLE: dict[str, tuple[bytes, Array]] = {
    "grey png": (pillow(GREY, "PNG"), GREY),
    "rgb png": (pillow(RGB, "PNG"), RGB),
    "rgba png": (pillow(noise(7, 5, 4), "PNG"), noise(7, 5, 4)[..., :3]),
    "grey+alpha png": (pillow(noise(7, 5, 2), "PNG"), noise(7, 5, 2)[..., 0]),
    "16-bit png": (pillow(WIDE, "PNG"), WIDE),
    "1-bit png": (pillow(GREY > 99, "PNG"), (GREY > 99) * np.uint8(255)),
    "palette png": (palette(COLOURS, INDICES, "PNG"), COLOURS[INDICES]),
    "bmp": (pillow(RGB, "BMP"), RGB),
    "grey gif": (pillow(GREY, "GIF"), GREY),
    "lossless webp": (pillow(RGB, "WEBP", lossless=True), RGB),
    "grey tiff": (tiff(GREY), GREY),
    "big-endian tiff": (tiff(WIDE, byteorder=">"), WIDE),
    "1-bit tiff": (tiff(GREY > 99, photometric="minisblack"), (GREY > 99) * np.uint8(255)),
    "float tiff": (tiff(noise(7, 5, dtype="float32")), noise(7, 5, dtype="float32")),
    "double tiff": (tiff(GREY / 7), (GREY / 7).astype(np.float32)),
    "signed tiff": (tiff(GREY.astype(np.int16) - 99), GREY.astype(np.float32) - 99),
    "rgb tiff": (tiff(RGB, photometric="rgb"), RGB),
    "rgba tiff": (tiff(noise(7, 5, 4), photometric="rgb"), noise(7, 5, 4)[..., :3]),
    "planar tiff": (tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB),
    "lzw tiff": (tiff(WIDE, compression="lzw", predictor=True, rowsperstrip=2), WIDE),
    "tiled tiff": (tiff(GREY, compression="zlib", tile=(16, 16)), GREY),
    "bigtiff": (tiff(GREY, bigtiff=True, compression="zstd"), GREY),
    "one-page stack": (tiff(STACK[:1]), STACK[0]),
    "npy": (npy(WIDE), WIDE),
    "big-endian npy": (npy(WIDE.astype(">u2")), WIDE),
    "bool npy": (npy(GREY > 99), (GREY > 99) * np.uint8(255)),
    "double npy": (npy(GREY / 7), (GREY / 7).astype(np.float32)),
    "rgb npy": (npy(np.asfortranarray(RGB)), RGB),
    "rgba npy": (npy(noise(7, 5, 4)), noise(7, 5, 4)[..., :3]),
}
for kind, samples in (("rgb", 3), ("rgba", 4), ("grey+alpha", 2)):
    array = noise(7, 5, samples, dtype="uint16")
    wanted = array[..., :3] if samples > 2 else array[..., :1]
    READABLE[f"16-bit {kind} png"] = imagecodecs.png_encode(array), wanted


@pytest.mark.parametrize("kind", READABLE)
def test_every_kind_is_read_as_its_header_says(tmp_path: Path, kind: str) -> None:
    data, wanted = READABLE[kind]
    path = stored(tmp_path, "no suffix is needed", data)
    image, info = read_image(path), image_info(path)
    np.testing.assert_array_equal(image, wanted.reshape(7, 5, -1), strict=True)
    assert image.flags.c_contiguous
    assert image.dtype.isnative
    assert info == ImageInfo(
        height=7,
        width=5,
        channels=image.shape[2],
        dtype=image.dtype.name,
        has_alpha="rgba" in kind or "+alpha" in kind,
        lossy="webp" in kind,
        palette=info.palette,
        axes=info.axes,
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_read_as_pillow_reads_it(tmp_path: Path, mode: str) -> None:
    path = stored(tmp_path, "x.jpg", pillow(RGB, "JPEG", mode))
    wanted = Image.open(path).convert("L" if mode == "L" else "RGB")
    np.testing.assert_array_equal(read_image(path), np.asarray(wanted).reshape(7, 5, -1))
    assert image_info(path).lossy


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_orientation_tag_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(RGB)
    path = tmp_path / f"x.{kind.lower()}"
    picture.save(path, kind, **({"exif": exif} if kind == "PNG" else {"tiffinfo": exif}))
    picture.getexif()[274] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(read_image(path), wanted)
    info = image_info(path)
    assert (info.height, info.width) == wanted.shape[:2]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (tiff(STACK, photometric="minisblack"), STACK),
        (tiff(STACK, photometric="minisblack", compression="lzw"), STACK),
        (tiff(STACK, imagej=True, metadata={"axes": "ZYX"}), STACK),
        (tiff(STACK, imagej=True, metadata={"axes": "TYX"}, truncate=True), STACK),
        (tiff(STACK, ome=True, metadata={"axes": "ZYX"}, compression="zlib"), STACK),
        (tiff(noise(4, 7, 5, 3), photometric="rgb"), noise(4, 7, 5, 3)),
        (npy(STACK), STACK),
        (npy(noise(4, 7, 5, 3)), noise(4, 7, 5, 3)),
    ],
)
def test_a_stack_is_read_page_by_page(tmp_path: Path, data: bytes, wanted: Array) -> None:
    path = stored(tmp_path, "stack", data)
    assert image_info(path).pages == 4
    pages = [read_image(path, page) for page in range(4)]
    np.testing.assert_array_equal(np.stack(pages), wanted.reshape(4, 7, 5, -1))
    with pytest.raises(InputError, match="it has no page 4"):
        read_image(path, 4)
    with pytest.raises(InputError, match="say which page"):
        read_image(path)


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.float32]),
        st.sampled_from([(1, 1), (3, 4), (4, 3), (2, 5, 1), (4, 4, 3), (3, 1, 3), (4, 5, 4)]),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_written_images_are_read_back(array: Array) -> None:
    with tempfile.TemporaryDirectory() as folder:
        suffixes = (".tif", ".TIFF") if array.dtype == np.float32 else (".png", ".tif")
        for suffix in suffixes:
            path = Path(folder) / f"ä b\n{suffix}"
            write_image(path, array)
            wanted = array.reshape(*array.shape[:2], -1)
            np.testing.assert_array_equal(read_image(path, alpha=True), wanted, strict=True)
        assert len(os.listdir(folder)) == 2


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("x.png", noise(7, 5, dtype="float32")),
        ("x.jpg", GREY),
        ("x", GREY),
        ("x.png", GREY.astype(np.int32)),
        ("x.png", noise(7, 5, 2)),
        ("x.tif", STACK[None]),
        ("x.tif", GREY[0]),
        ("x.png", GREY[:0]),
        ("x.tif", GREY / 7),
    ],
)
def test_what_does_not_fit_a_format_is_not_written(tmp_path: Path, name: str, array: Array) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / name, array)
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    write_image(path, GREY)

    def full(*_: Any) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr(imagecodecs, "png_encode", full)
    with pytest.raises(OSError, match="no space"):
        write_image(path, GREY + 1)
    assert os.listdir(tmp_path) == ["x.png"]
    np.testing.assert_array_equal(read_image(path)[..., 0], GREY)


# -- masks


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (pillow(GREY, "PNG"), GREY),
        (pillow(GREY > 99, "PNG"), (GREY > 99) * np.uint8(255)),
        (pillow(WIDE, "PNG"), WIDE),
        (pillow(RGB, "PNG"), RGB),
        (pillow(noise(7, 5, 4), "PNG"), noise(7, 5, 4)[..., :3]),
        (palette(COLOURS, INDICES, "PNG"), INDICES),
        (palette(GREYS, INDICES, "PNG"), INDICES),
        (palette(COLOURS, INDICES, "GIF"), INDICES),
        (pillow(GREY, "BMP"), GREY),
        (tiff(GREY.astype(np.float32)), GREY.astype(np.int64)),
        (tiff(GREY.astype(np.int16) - 99), GREY.astype(np.int16) - 99),
        (npy(WIDE.astype(np.int64) * 9), WIDE.astype(np.int64) * 9),
    ],
)
def test_mask_values_are_unchanged(tmp_path: Path, data: bytes, wanted: Array) -> None:
    np.testing.assert_array_equal(read_mask(stored(tmp_path, "m", data)), wanted, strict=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pillow(GREY, "JPEG"), "JPEG and WebP change values"),
        (pillow(RGB, "WEBP"), "JPEG and WebP change values"),
        (npy(GREY / 7), "whole numbers"),
        (npy(np.where(GREY > 9, np.nan, 0)), "whole numbers"),
        (npy(np.where(GREY > 9, np.inf, 0)), "whole numbers"),
        (npy(GREY * 1e20), "whole numbers"),
    ],
)
def test_files_that_cannot_be_masks(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"'.*m': .*{reason}"):
        read_mask(stored(tmp_path, "m", data))


# -- axes, channels and what is shown

CHANNELS = noise(2, 7, 5, dtype="uint16")


def imagej(axes: str, array: Array = CHANNELS, **options: Any) -> bytes:
    return tiff(array, imagej=True, metadata={"axes": axes, **options})


@pytest.mark.parametrize(
    ("data", "axes"),
    [
        (imagej("CYX"), None),
        (tiff(CHANNELS, ome=True, metadata={"axes": "CYX"}), None),
        (tiff(CHANNELS, ome=True, metadata={"axes": "CYX"}, compression="zlib"), None),
        (tiff(CHANNELS, photometric="minisblack", metadata={"axes": "CYX"}), None),
        (tiff(np.moveaxis(CHANNELS, 0, -1), photometric="minisblack", planarconfig="contig"), None),
        (tiff(CHANNELS, photometric="minisblack", planarconfig="separate", metadata=None), None),
        (tiff(CHANNELS, photometric="minisblack", metadata=None), "CYX"),
        (tiff(CHANNELS, photometric="minisblack"), "CYX"),
        (npy(CHANNELS), "CYX"),
        (npy(np.moveaxis(CHANNELS, 0, -1)), "YXC"),
    ],
)
def test_channels_come_last_however_they_are_stored(
    tmp_path: Path, data: bytes, axes: str | None
) -> None:
    path, reading = stored(tmp_path, "x", data), Reading(axes=axes)
    info, image = image_info(path, reading), read_image(path, None, reading)
    assert (info.channels, info.pages, info.dtype) == (2, 1, "uint16")
    np.testing.assert_array_equal(image, np.moveaxis(CHANNELS, 0, -1), strict=True)


HYPER = noise(2, 3, 2, 7, 5)  # T, Z, C


@pytest.mark.parametrize(
    "data",
    [
        tiff(HYPER, imagej=True, metadata={"axes": "TZCYX"}),
        tiff(HYPER, imagej=True, metadata={"axes": "TZCYX"}, truncate=True),
        tiff(HYPER, ome=True, metadata={"axes": "TZCYX"}),
        tiff(np.moveaxis(HYPER, 2, 0), ome=True, metadata={"axes": "CTZYX"}),
        tiff(HYPER, ome=True, metadata={"axes": "TZCYX"}, compression="zlib", tile=(16, 16)),
        tiff(HYPER, photometric="minisblack", metadata={"axes": "TZCYX"}),
    ],
)
def test_a_hyperstack_has_a_slice_for_each_time_and_depth(tmp_path: Path, data: bytes) -> None:
    path = stored(tmp_path, "x", data)
    info = image_info(path)
    assert (info.pages, info.channels) == (6, 2)
    wanted = np.moveaxis(HYPER, 2, -1).reshape(6, 7, 5, 2)
    np.testing.assert_array_equal([read_image(path, i) for i in range(6)], wanted)
    one = Reading(channels=("1",))
    assert image_info(path, one).channels == 1
    np.testing.assert_array_equal(read_image(path, 5, one), wanted[5, :, :, 1:])
    with pytest.raises(InputError, match="no channel '2'"):
        image_info(path, Reading(channels=("2",)))


def test_channels_have_the_names_that_ome_gives_them(tmp_path: Path) -> None:
    names = ["DAPI & co", "GFP"]
    described = {"axes": "CYX", "Channel": {"Name": names}}
    path = stored(tmp_path, "x", tiff(CHANNELS, ome=True, metadata=described))
    assert image_info(path).names == tuple(names)
    chosen = Reading(channels=("GFP", "0"))
    assert image_info(path, chosen).names == ("GFP", "DAPI & co")
    np.testing.assert_array_equal(
        read_image(path, None, chosen), np.moveaxis(CHANNELS, 0, -1)[..., ::-1]
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool"])
def test_white_is_zero_is_read_as_it_is_shown(tmp_path: Path, dtype: str) -> None:
    array = GREY > 99 if dtype == "bool" else noise(7, 5, dtype=dtype)
    black, white = (
        stored(tmp_path, kind, tiff(a, photometric=kind))
        for kind, a in (("minisblack", array), ("miniswhite", ~array))
    )
    np.testing.assert_array_equal(read_image(white), read_image(black), strict=True)
    np.testing.assert_array_equal(read_mask(white), read_mask(black), strict=True)


def test_a_palette_tiff_is_shown_in_its_colours_and_is_a_mask_of_indices(tmp_path: Path) -> None:
    table = np.zeros((3, 256), np.uint16)
    table[:, :3] = COLOURS.T.astype(np.uint16) * 257
    path = stored(tmp_path, "x", tiff(INDICES, photometric="palette", colormap=table))
    np.testing.assert_array_equal(read_image(path), COLOURS[INDICES])
    np.testing.assert_array_equal(read_mask(path), INDICES)
    np.testing.assert_array_equal(read_mask(path, colours=True), COLOURS[INDICES])


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000", "lzw", "zstd", "packbits", "deflate"])
def test_compressions_of_slides_and_scanners_are_read(tmp_path: Path, kind: str) -> None:
    y, x = np.mgrid[:64, :48]
    image = np.stack([y * 3, x * 4, y + x], axis=-1).astype(np.uint8)
    path = stored(tmp_path, "x", tiff(image, photometric="rgb", compression=kind, tile=(32, 32)))
    found = read_image(path)
    assert abs(found.astype(int) - image).mean() < 8
    assert image_info(path).lossy == (kind == "jpeg")


def test_of_a_pyramid_the_full_level_is_read(tmp_path: Path) -> None:
    image, path = noise(64, 64), tmp_path / "x.tif"
    with tifffile.TiffWriter(path) as out:
        out.write(image, tile=(16, 16), subifds=1)
        out.write(image[::2, ::2], tile=(16, 16), subfiletype=1)
    assert image_info(path).pages == 1
    np.testing.assert_array_equal(read_image(path)[..., 0], image)
    with tifffile.TiffWriter(path) as out:  # as a GeoTIFF with overviews
        out.write(image, tile=(16, 16), metadata=None)
        out.write(image[::2, ::2], tile=(16, 16), subfiletype=1, metadata=None)
    assert image_info(path).pages == 1
    np.testing.assert_array_equal(read_image(path)[..., 0], image)


def test_no_data_is_what_a_file_declares_or_what_is_said(tmp_path: Path) -> None:
    image = noise(7, 5, dtype="float32")
    image[:2] = -9999
    path = stored(tmp_path, "x", tiff(image, extratags=[(42113, "s", 0, "-9999", True)]))
    assert image_info(path).nodata == -9999
    assert image_info(path, Reading(nodata=3.0)).nodata == 3
    np.testing.assert_array_equal(missing(read_image(path), -9999), image == -9999)
    image[:2] = np.nan
    path = stored(tmp_path, "x", tiff(image, extratags=[(42113, "s", 0, "nan", True)]))
    found = read_image(path)
    np.testing.assert_array_equal(missing(found, image_info(path).nodata), np.isnan(image))
    plain = stored(tmp_path, "y", tiff(image))
    with pytest.raises(InputError, match="NaN"):
        read_image(plain)
    np.testing.assert_array_equal(read_image(plain, None, Reading(nodata=math.nan)), found)
    path = stored(tmp_path, "x", tiff(GREY, extratags=[(42113, "s", 0, "-9999", True)]))
    assert not missing(read_image(path), image_info(path).nodata).any()  # no uint8 is that
    path = stored(tmp_path, "x", tiff(GREY, extratags=[(42113, "s", 0, "none", True)]))
    with pytest.raises(InputError, match="no data is 'none', which is no number"):
        image_info(path)
    assert image_info(path, Reading(nodata=3.0)).nodata == 3


def test_alpha_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    image = noise(7, 5, 4)
    table = palette(COLOURS, INDICES, "PNG")
    for data in (
        pillow(image, "PNG"),
        tiff(image, photometric="rgb"),
        npy(image),
        imagecodecs.png_encode(image),
    ):
        np.testing.assert_array_equal(read_image(stored(tmp_path, "x", data), alpha=True), image)
    assert read_image(stored(tmp_path, "x", table), alpha=True).shape == (7, 5, 3)
    only = np.dstack([np.full((7, 5, 3), 9, np.uint8), (GREY > 99) * np.uint8(255)])
    with pytest.raises(InputError, match="alpha channel differs: the mask is in there"):
        read_mask(stored(tmp_path, "x", pillow(only, "PNG")))


def test_of_a_described_stack_the_pages_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = noise(40, 7, 5)
    path = stored(tmp_path, "x", tiff(stack, ome=True, metadata={"axes": "ZYX"}, **DEFLATE))
    os.utime(path, (1, 1))  # a file that changed just now is parsed each time
    read_image(path, 3)
    assert not any(Path(link).name == "x" for link in open_files())
    with monkeypatch.context() as patch:
        patch.setattr(tifffile, "TiffFile", None)
        found = [read_image(path, page)[..., 0] for page in range(40)]
        with pytest.raises(InputError, match="it has no page 40"):
            read_image(path, 40)
    np.testing.assert_array_equal(found, stack)
    read_image(path, 3)
    path.write_bytes(tiff(stack[:2] + 1, photometric="minisblack", **DEFLATE))
    os.utime(path, (2, 2))
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], stack[1] + 1)


def test_threads_may_read_one_stack(tmp_path: Path) -> None:
    stack = noise(40, 7, 5)
    path = stored(tmp_path, "x", tiff(stack, photometric="minisblack", **DEFLATE))
    os.utime(path, (1, 1))
    with ThreadPoolExecutor(8) as pool:
        pages = [page % 40 for page in range(200)]
        found = list(pool.map(lambda page: read_image(path, page)[..., 0], pages))
    np.testing.assert_array_equal(found, stack[pages])


# -- bad files


def png(width: int, height: int, bits: int = 8, colour: int = 0) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bigtiff(*pages: dict[int, int], body: bytes = b"", then: int = 0) -> bytes:
    """Pages with these tags over an 8-bit grey page of 8 x 8; `then`: the last one's next page."""
    data, at = b"II+\0" + struct.pack("<HHQ", 8, 0, 16), 16
    for number, changed in enumerate(pages, 1):
        tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 8, 279: 64} | changed
        at += 8 + 20 * len(tags) + 8
        data += struct.pack("<Q", len(tags))
        data += b"".join(struct.pack("<HHQQ", tag, 16, 1, tags[tag]) for tag in sorted(tags))
        data += struct.pack("<Q", at if number < len(pages) else then)
    return data + body


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(64)


def packed(compression: int, data: bytes) -> bytes:
    """A TIFF of 8 x 8 pixels whose strip unpacks to far more."""
    tags = {259: compression, 273: 16 + 8 + 9 * 20 + 8, 279: len(data)}
    return bigtiff(tags, body=data)


ZEROS = bytes(10**7)
BAD: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", "empty"),
    "text": (b"this is not an image", "not an image that can be read"),
    "zip": (b"PK\x03\x04" + bytes(99), "an archive: unpack it"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "huge png": (png(10**5, 10**5), "pixels; cut it into tiles"),
    "huge 16-bit png": (png(10**5, 10**5, 16, 2), "pixels; cut it into tiles"),
    "large png": (png(12000, 12000), "12000 x 12000 is over 134,217,728 pixels"),
    "short png": (png(300, 300), "damaged"),
    "huge tiff": (bigtiff({256: 10**9, 257: 10**9}), "1000000000 x 1000000000 is over"),
    "huge tile": (bigtiff({322: 10**6, 323: 10**6, 324: 16, 325: 9}), "its tiles"),
    "strip beyond the end": (bigtiff({279: 10**12}), "truncated"),
    "deflate bomb": (packed(8, zlib.compress(ZEROS)), "damaged"),
    "zstd bomb": (packed(50000, imagecodecs.zstd_encode(ZEROS)), "damaged"),
    "jpeg in tiff": (packed(7, pillow(GREY, "JPEG")), "damaged"),
    "empty tiff": (b"II*\0" + bytes(20), "damaged|no page"),
    "ring of pages": (bigtiff(*[{}] * 120, then=16), "points back to page 0|several pages"),
    "lost page": (bigtiff({}, then=10**6), "page 1 is missing"),
    "cmyk tiff": (tiff(noise(7, 5, 4), photometric="separated"), "save it as grey or RGB"),
    "complex tiff": (tiff(GREY.astype(np.complex64)), "8 or 16 bits or float"),
    "pages of two sizes": (bigtiff({}, {256: 4}), "page 1 differs|several pages"),
    "animation": (
        pillow(GREY, "GIF", save_all=True, append_images=[Image.fromarray(GREY.T.copy())]),
        "animation",
    ),
    "pickle in npy": (npy_header((2, 2), "|O"), "damaged"),
    "huge npy": (npy_header((10**9, 10**9)), "damaged"),
    "larger npy": (npy_header((2**62, 2**62)), "damaged"),
    "negative npy": (npy_header((-2, 5)), "damaged"),
    "empty npy": (npy_header((10**15, 0, 5)), "its shape"),
    "1-d npy": (npy_header((9,)), "its shape"),
    "text npy": (npy_header((2, 2), "<U1"), "8 or 16 bits or float"),
    "nan": (npy(np.full((3, 3), np.nan)), "NaN"),
    "too large for float32": (npy(np.full((3, 3), 1e300)), "NaN, infinite or too large"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path: Path, kind: str) -> None:
    data, reason = BAD[kind]
    path = stored(tmp_path, "ü b\nc.png", data)
    for read in (read_image, lambda path: (image_info(path), read_image(path))):
        with pytest.raises(InputError, match=rf"ü b\\nc\.png': .*({reason})") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make", [lambda p: None, Path.mkdir, lambda p: p.symlink_to(p), lambda p: os.mkfifo(p)]
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.png")
    with pytest.raises(
        InputError, match=r"x\.png': (no such file|a link to|it is a folder: give one)"
    ):
        image_info(tmp_path / "x.png")


def test_the_bound_on_pixels_is_checked_before_decoding(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    assert side**2 <= MAX_PIXELS < (side + 1) ** 2
    path = stored(tmp_path, "x", bigtiff({256: side + 1, 257: side + 1}))
    assert image_info(path).height == side + 1
    with pytest.raises(InputError, match="is over"):
        read_image(path)
    path = stored(tmp_path, "x", bigtiff({256: side, 257: side, 279: 10**9}))
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


LARGER = {
    "png": pillow(noise(20, 30), "PNG"),
    "16-bit png": imagecodecs.png_encode(noise(20, 30, 3, dtype="uint16")),
    "jpeg": pillow(noise(20, 30, 3), "JPEG"),
    "bmp": pillow(noise(20, 30), "BMP"),
    "gif": pillow(noise(20, 30), "GIF"),
    "webp": pillow(noise(20, 30, 3), "WEBP"),
    "tiff": tiff(noise(20, 30)),
    "lzw": tiff(noise(20, 30, dtype="uint16"), compression="lzw", predictor=True),
    "tiled": tiff(noise(20, 30), compression="zlib", tile=(16, 16)),
    "stack": tiff(noise(3, 20, 30), photometric="minisblack"),
    "imagej": tiff(noise(3, 2, 20, 30), imagej=True, metadata={"axes": "ZCYX"}),
    "imagej in one page": tiff(
        noise(3, 2, 20, 30), imagej=True, metadata={"axes": "ZCYX"}, truncate=True
    ),
    "ome": tiff(noise(3, 2, 20, 30), ome=True, metadata={"axes": "ZCYX"}),
    "ome, packed": tiff(noise(3, 2, 20, 30), ome=True, metadata={"axes": "ZCYX"}, **DEFLATE),
    "shaped": tiff(noise(3, 2, 20, 30), photometric="minisblack", metadata={"axes": "ZCYX"}),
    "npy": npy(noise(3, 20, 30)),
}


def pages_of(path: Path) -> Array:
    info = image_info(path)
    pages = [read_image(path, page if info.pages > 1 else None) for page in range(info.pages)]
    return np.stack(pages)


@pytest.mark.parametrize("kind", LARGER)
def test_a_truncated_file_never_gives_another_image(tmp_path: Path, kind: str) -> None:
    data = LARGER[kind]
    whole = pages_of(stored(tmp_path, "x", data))
    refused = 0
    for length in {*range(0, len(data), 1 + len(data) // 40), *range(len(data) - 9, len(data))}:
        try:
            part = pages_of(stored(tmp_path, "x", data[:length]))
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(part, whole)
    assert refused > 30


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(LARGER)), st.data())
def test_a_mutated_file_is_read_or_refused(kind: str, draws: st.DataObject) -> None:
    data = bytearray(LARGER[kind])
    for _ in range(draws.draw(st.integers(1, 4))):
        at = draws.draw(st.integers(0, len(data) - 1) | st.integers(0, 60))
        data[at] = draws.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Path(folder), "x", bytes(data))
        try:
            info = image_info(path)
            image = read_image(path, 0)
        except InputError:
            return
        assert image.shape == (info.height, info.width, info.channels)
        assert image.dtype.name == info.dtype


def test_pages_that_may_be_the_channels_of_a_model_are_a_question(tmp_path: Path) -> None:
    stack = np.zeros((3, 8, 9), np.uint8)
    np.save(tmp_path / "a.npy", stack)
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata=None, photometric="minisblack")
    for path in (tmp_path / "a.npy", tmp_path / "a.tif"):
        with pytest.raises(InputError, match=r"a\..*: it has 3 pages: channels or slices\?"):
            image_info(path, Reading(rgb=True))
        assert image_info(path, Reading(rgb=True, axes="CYX")).channels == 3
        assert image_info(path, Reading(rgb=True, axes="ZYX")).pages == 3
