"""Image files in and out: what both tasks need, and no more.

Reads PNG, JPEG, BMP, GIF and WebP (Pillow), TIFF (tifffile) and NPY; writes PNG and TIFF. The kind
is told by a file's first bytes. Whatever is wrong with a file, the error is an InputError that
names it. Nothing in a file is run, and more than MAX_PIXELS are refused before one is decoded.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import imagecodecs
import numpy as np
import tifffile
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from unet.errors import InputError, said
from unet.files.writing import replacing

Array: TypeAlias = NDArray[Any]

MAX_PIXELS = 2**27  # of one page: 11,585 x 11,585; 0.4 GB as 8-bit RGB, in a TIFF at most 1 GB
MAX_PAGES = 2**21  # of a stack; it has fewer
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy")

# None, CCITT, LZW, Deflate, PackBits, LZMA, Zstandard: decoded into a buffer of the declared size,
# so that a small file cannot unpack to a large one. JPEG would bring a size of its own.
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000)
_TIFF_GREY, _TIFF_RGB = (0, 1, 3), 2  # white is zero, black is zero, colour map
_ORIENTATION = 274  # the tag of EXIF and of TIFF
# Its values, and what turns the stored rows (H, W, C) upright.
_UPRIGHT: dict[int, Callable[[Array], Array]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: rearrange(a, "h w c -> w h c"),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: rearrange(a[::-1, ::-1], "h w c -> w h c"),
    8: lambda a: np.rot90(a),
}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it forgives


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a file's header says of the array that `read_image` returns for each of its pages."""

    height: int  # upright, after the orientation tag
    width: int
    channels: int  # 1 (grey) or 3 (RGB)
    dtype: str  # "uint8", "uint16" or "float32"
    pages: int = 1  # of a TIFF or NPY stack
    has_alpha: bool = False  # the file has an alpha channel, which is not read
    lossy: bool = False  # JPEG and WebP change values


def white(dtype: str) -> int:
    """The largest value of an image of that type; floats go from 0 to 1."""
    return int(np.iinfo(dtype).max) if np.issubdtype(np.dtype(dtype), np.integer) else 1


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder in natural order: 0.png, 1.png, 2.png, 10.png.

    Hidden files, subfolders and files with other suffixes than SUFFIXES are passed over.

    Raises:
        InputError: no such folder, or no image in it.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r}: no such folder")
        shown = (path for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]
    except OSError as error:
        raise InputError(f"{str(folder)!r}: cannot be read ({error.strerror})") from error
    if not files:
        raise InputError(f"{str(folder)!r}: no image in this folder ({', '.join(SUFFIXES)})")
    return sorted(files, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that compares runs of digits as numbers, however long: "a2" < "a10"."""
    parts = re.split(r"0*([0-9]+)", name)  # text, digits, text, ...
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], name


def image_info(path: Path) -> ImageInfo:
    """Size, channels, depth and pages of a file, from its headers; no pixel is decoded.

    A size above MAX_PIXELS is reported, not refused: `read_image` refuses it.

    Raises:
        InputError: not an image, or a stack whose pages differ, or too many.
    """
    with _open(path) as get_page:
        first = get_page(0).info
        pages = first.pages
        while first.pages == 1 and pages < MAX_PAGES:
            try:
                if get_page(pages).info != first:
                    raise InputError(f"page {pages} differs from page 0 in size, channels or depth")
            except IndexError:
                break
            pages += 1
        if pages >= MAX_PAGES:
            raise InputError(f"it has {MAX_PAGES:,} pages or more; save it as several stacks")
        return replace(first, pages=pages)


def read_image(path: Path, page: int | None = None) -> Array:
    """Pixels of an image file: palette looked up, alpha dropped, turned upright.

    A colour map in a TIFF only says how to display; its values are read. NPY: (H, W), (H, W, C) or
    a stack (N, H, W), (N, H, W, C); a last axis of 1, 3 or 4 is taken as channels.

    Args:
        page: 0-based page of a stack; None for a file that holds one image.

    Returns:
        (H, W, C), C = 1 or 3: uint8 or uint16 as stored, 1-bit as uint8 0 and 255, any other
        integer or float type as float32.

    Raises:
        InputError: not an image, damaged, larger than MAX_PIXELS, no such page, not finite.
    """
    with _read(path, page) as (array, info):
        with np.errstate(over="ignore"):
            array = array.astype(info.dtype, copy=False)
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise InputError("it holds NaN, infinite or too large values; replace them")
        return array


def read_mask(path: Path, page: int | None = None) -> Array:
    """Values of a mask file, unchanged: the number that stands for a class, or its colour.

    A palette is treated as colours, unless all of its colours are grey: then as grey values. 1-bit
    masks are 0 and 255. Whole numbers stored as float are accepted.

    Args:
        page: 0-based page of a stack; None for a file that holds one mask.

    Returns:
        (H, W) for grey or (H, W, 3) for colours, in an integer dtype.

    Raises:
        InputError: as `read_image`; a JPEG or WebP file; values that are not whole numbers.
    """
    with _read(path, page, lossless=True) as (array, info):
        if array.dtype.kind == "f":
            if not (np.isfinite(array) & (array == np.round(array)) & (abs(array) < 2**31)).all():
                raise InputError("a mask must hold whole numbers, one for each class")
            array = array.astype(np.int64)
        return array[:, :, 0] if info.channels == 1 else array


def write_image(path: Path, array: Array) -> None:
    """Writes (H, W), (H, W, 1) or (H, W, 3) as PNG (uint8, uint16) or TIFF (these and float32).

    The suffix of the path decides. The file appears whole or not at all.

    Raises:
        InputError: a suffix, shape or dtype that does not go together.
        OSError: the folder cannot be written.
    """
    suffix = path.suffix.lower()
    png, tiff = suffix == ".png", suffix in (".tif", ".tiff")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or array.shape[2:] == (3,)
    typed = array.dtype.name in ("uint8", "uint16") or (tiff and array.dtype == np.float32)
    if not ((png or tiff) and shaped and typed and array.size):
        raise InputError(
            f"{str(path)!r}: cannot write {array.dtype} {array.shape} here; write uint8 or uint16 "
            "(H, W) or (H, W, 3) to .png, or float32 to .tif"
        )
    array = np.ascontiguousarray(array)
    with replacing(path) as temporary:
        if png:
            temporary.write_bytes(imagecodecs.png_encode(array))
        else:
            tifffile.imwrite(temporary, array, photometric=("minisblack", "rgb")[array.ndim - 2])


@dataclass(frozen=True)
class _Page:
    info: ImageInfo
    decode: Callable[[], Array]  # (H, W) or (H, W, C or more) in native byte order
    orientation: int = 1

    def read(self) -> Array:
        """Upright pixels (H, W, C) without alpha; 1-bit as 0 and 255."""
        height, width = self.info.height, self.info.width
        if height * width > MAX_PIXELS:
            raise InputError(f"{height} x {width} is over {MAX_PIXELS:,} pixels; cut it into tiles")
        array = self.decode()
        array = (array if array.ndim == 3 else array[..., None])[..., : self.info.channels]
        array = np.ascontiguousarray(_UPRIGHT.get(self.orientation, np.asarray)(array))
        if array.shape != (height, width, self.info.channels) or not array.size:
            raise InputError(f"its pixels {array.shape} do not fill the size in its header")
        return np.where(array, np.uint8(255), np.uint8(0)) if array.dtype == np.bool_ else array


_GetPage: TypeAlias = Callable[[int], _Page]  # IndexError past the last page


@contextmanager
def _read(
    path: Path, page: int | None, lossless: bool = False
) -> Iterator[tuple[Array, ImageInfo]]:
    with _open(path) as get_page:
        try:
            found = get_page(page or 0)
        except IndexError as error:
            raise InputError(f"it has no page {page or 0}") from error
        if page is None:
            with suppress(IndexError):
                get_page(1)
                raise InputError("it is a stack of several pages; say which page to read")
        if lossless and found.info.lossy:
            raise InputError("JPEG and WebP change values, so it cannot be a mask; save it as PNG")
        yield found.read(), found.info


@contextmanager
def _open(path: Path) -> Iterator[_GetPage]:
    """The pages of any image file; all that a damaged file makes a decoder raise is InputError."""
    try:
        if not path.is_file():
            raise InputError("no such file")
        with path.open("rb") as file:
            start = file.read(26)
        if not start:
            raise InputError("the file is empty (0 bytes)")
        if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            reader = _open_tiff(path)
        elif start.startswith(b"\x93NUMPY"):
            reader = _open_npy(path)
        else:
            reader = _open_pillow(path, start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file is read whole or refused
            with reader as get_page:
                yield get_page
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error.__cause__
    except Exception as error:  # decoders raise what a wrong byte leads them to, from any class
        reason = said(error)
        raise InputError(f"{str(path)!r}: not an image, or a damaged one ({reason})") from error


@contextmanager
def _open_pillow(path: Path, start: bytes) -> Iterator[_GetPage]:
    try:
        picture = Image.open(path, formats=("PNG", "JPEG", "BMP", "GIF", "WEBP"))
    except UnidentifiedImageError as error:
        raise InputError(f"not an image that can be read ({', '.join(SUFFIXES)})") from error
    except Image.DecompressionBombError as error:  # Pillow's own bound, above MAX_PIXELS
        raise InputError(f"more than {MAX_PIXELS:,} pixels; cut it into tiles") from error
    with picture:
        if getattr(picture, "is_animated", False):
            raise InputError("an animation; save its frames as files or as a TIFF stack")
        mode = picture.mode
        # Pillow cuts 16-bit colour to 8 bits. IHDR: bit depth at byte 24, colour type at 25.
        deep = picture.format == "PNG" and start[24] == 16 and start[25] in (2, 4, 6)
        grey = start[25] == 4 if deep else mode.startswith(("1", "L", "I"))
        if mode.startswith("P"):
            palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
            grey = bool((palette == palette[:, :1]).all())

        def decode() -> Array:
            if deep:
                return np.asarray(imagecodecs.png_decode(path.read_bytes()))
            as_stored = grey and not mode.startswith("P")
            array = np.asarray(picture if as_stored else picture.convert("RGB"))
            return array.astype(np.uint16) if mode.startswith("I") else array

        # Without the test Pillow decodes a PNG to look for EXIF data behind its pixels.
        turn = picture.getexif().get(_ORIENTATION, 1) if "exif" in picture.info else 1
        height, width = picture.size[:: 1 if 5 <= turn <= 8 else -1]
        info = ImageInfo(
            height=height,
            width=width,
            channels=1 if grey else 3,
            dtype="uint16" if deep or mode.startswith("I") else "uint8",
            has_alpha=mode.endswith("A") or "transparency" in picture.info,
            lossy=picture.format in ("JPEG", "WEBP"),
        )
        yield [_Page(info, decode, turn)].__getitem__


@contextmanager
def _open_tiff(path: Path) -> Iterator[_GetPage]:
    with tifffile.TiffFile(path, _multifile=False) as tif:
        seen: dict[int, int] = {}

        def get_page(index: int) -> _Page:
            try:
                page = tif.pages[index]
            except IndexError:
                tif.filehandle.seek(tif.pages.next_page_offset or 0)
                linked = any(tif.filehandle.read(tif.tiff.offsetsize))
                if linked or index < (tif.imagej_metadata or {}).get("images", 0):
                    raise InputError(f"page {index} is missing from the stack") from None
                raise
            if seen.setdefault(page.offset, index) != index:
                raise InputError(f"page {index} leads back to page {seen[page.offset]}")
            return _tiff_page(page)

        yield get_page


def _tiff_page(page: Any) -> _Page:
    stored = page.imagelength, page.imagewidth
    if page.axes not in ("YX", "YXS", "SYX") or not all(isinstance(n, int) for n in stored):
        raise InputError(f"its axes are {page.axes} of {stored}; grey or RGB pages can be read")
    if page.compression not in _TIFF_COMPRESSIONS:
        raise InputError(f"TIFF compression {page.compression!r}; save it with LZW or Deflate")
    samples = page.samplesperpixel
    rgb, grey = page.photometric == _TIFF_RGB, page.photometric in _TIFF_GREY
    alpha = (rgb and samples == 4) or (grey and samples == 2 and 0 not in page.extrasamples)
    if samples - alpha != (3 if rgb else 1) or not (rgb or grey):
        raise InputError(f"{samples} channels of kind {page.photometric!r}; save it as grey or RGB")

    def decode() -> Array:
        if max(page.nbytes // 8, page.tilewidth * page.tilelength * page.tiledepth) > MAX_PIXELS:
            raise InputError(f"its tiles, or its values of 8 bytes, are over {MAX_PIXELS:,}")
        segments = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(start + size > page.parent.filehandle.size for start, size in segments):
            raise InputError("the file is truncated")
        array = page.asarray(maxworkers=1)
        return rearrange(array, "s h w -> h w s") if page.axes == "SYX" else array

    turn = page.tags.valueof(_ORIENTATION, 1)
    height, width = stored[:: -1 if 5 <= turn <= 8 else 1]
    info = ImageInfo(
        height=height,
        width=width,
        channels=samples - alpha,
        dtype=_image_dtype(page.dtype),
        has_alpha=alpha,
    )
    return _Page(info, decode, turn)


@contextmanager
def _open_npy(path: Path) -> Iterator[_GetPage]:
    # A memory map never unpickles, and refuses a shape that the file is too short for.
    array = np.lib.format.open_memmap(path, mode="r")
    samples = array.shape[-1] if array.ndim > 2 and array.shape[-1] in (1, 3, 4) else 0
    axes = array.ndim - bool(samples)
    if axes not in (2, 3) or not array.size:
        raise InputError(f"its shape {array.shape} is not (H, W), (H, W, C) or (N, H, W[, C])")
    pages = array if axes == 3 else array[None]
    info = ImageInfo(
        height=pages.shape[1],
        width=pages.shape[2],
        channels=min(samples, 3) or 1,
        dtype=_image_dtype(array.dtype),
        pages=len(pages),
        has_alpha=samples == 4,
    )

    def get_page(index: int) -> _Page:
        page = pages[index]
        return _Page(info, lambda: np.array(page, page.dtype.newbyteorder("=")))

    yield get_page


def _image_dtype(stored: np.dtype[Any] | None) -> str:
    if stored is None or stored.kind not in "biuf":
        raise InputError(f"pixels of type {stored}; 8 or 16 bits or float can be read")
    return {"bool": "uint8", "uint8": "uint8", "uint16": "uint16"}.get(stored.name, "float32")
