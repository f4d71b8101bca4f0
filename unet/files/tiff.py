"""TIFF files of every kind that `tifffile` knows, as pages: by the axes that the file names.

Axes C and S are channels; Z, T and all others are slices. A file that says nothing of its pages, as
ISBI 2012's stacks, has slices. Of a pyramid the full level is read, of a slide its scan.
"""

from __future__ import annotations

import html
import logging
import math
import re
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from unet.errors import InputError
from unet.files.pages import (
    CHANNELS,
    MAX_PAGES,
    MAX_PIXELS,
    Array,
    GetPage,
    ImageInfo,
    Page,
    Reading,
    Stored,
    colour_table,
    image_dtype,
    upright,
)

# Formats whose own description `tifffile` reads; of slides only the first series is the scan.
_DESCRIBED = ("shaped", "lsm", "mmstack", "ome", "imagej", "ndtiff", "fluoview", "stk", "sis")
_SLIDES = ("svs", "scn", "qpi", "ndpi", "bif", "avs", "philips")

# None, CCITT, LZW, Deflate, PackBits, LZMA, Zstandard: decoded into a buffer of the declared size,
# so that a small file cannot unpack to a large one. The others say a size of their own, which is
# compared first.
_BUFFERED = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000)
_JPEG = (6, 7)
_JPEG_2000 = (33003, 33004, 33005, 34712)

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_DESCRIPTION, _ORIENTATION, _NODATA = 270, 274, 42113
_COMPOSITE = 7  # channels that ImageJ shows together, at most

_OME_SIZES = tuple(f"Size{axis}" for axis in "XYZCT")
_OME_COUNTS = ("PlaneCount", "NumPlanes", "FirstZ", "FirstC", "FirstT", "IFD", "SamplesPerPixel")

# Files whose pages are known already: parsing thousands of them for each page that is read would
# take longer than reading it. Nothing in here is open, and what is in use is not in here.
_KEPT_FILES = 8
_KEPT_PAGES = 2**14  # of a file
_SETTLED = 2 * 10**9  # ns since a change; until then another one could have the same time and size
_kept: dict[Any, tuple[Any, GetPage]] = {}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it forgives


@contextmanager
def open_tiff(path: Path | BytesIO, reading: Reading) -> Iterator[GetPage]:
    """The slices of a file; see `unet.files.pages`.

    Raises:
        InputError: damaged, or of a kind that cannot be read. Decoders raise more.
    """
    if isinstance(path, BytesIO):
        with tifffile.TiffFile(path) as tif:
            yield _pages(tif, reading)[0]
        return
    state = path.stat()
    key = (path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns, reading)
    if key in _kept and (found := _kept.pop(key, None)):  # another thread may be faster
        tif, get_page = found
        tif.filehandle.open()
        keep = True
    else:
        tif, get_page = tifffile.TiffFile(path, _multifile=False), None
        keep = time.time_ns() - state.st_mtime_ns > _SETTLED
    with tif:
        if get_page is None:
            get_page, pages = _pages(tif, reading)
            keep = keep and pages <= _KEPT_PAGES
        yield get_page
    if keep:
        _kept[key] = tif, get_page
        while len(_kept) > _KEPT_FILES:
            _kept.pop(next(iter(_kept), None), None)


def _pages(tif: Any, reading: Reading) -> tuple[GetPage, int]:
    """The slices of an open file, and how many pages were looked at."""
    first = tif.pages[0]
    _check_description(tif)
    if any(getattr(tif, f"is_{kind}", False) for kind in _SLIDES):
        return _slices(_series(tif, tif.series[0]), tif, reading), 1
    if any(getattr(tif, f"is_{kind}", False) for kind in _DESCRIBED):
        count = _check_chain(tif)
        if tif.is_ome:
            _check_ome(tif.ome_metadata or "", first)
        return _slices(_described(tif), tif, reading), count
    return _chain(tif, first, reading), 1


def _slices(stored: Stored, tif: Any, reading: Reading) -> GetPage:
    page = stored.key
    stored = stored.named(reading.axes)
    info = _info(page, stored, tif, reading)

    def get_page(index: int) -> Page:
        if not 0 <= index < stored.pages:
            raise IndexError(index)
        return _page(stored, info, index)

    return get_page


def _check_chain(tif: Any) -> int:
    """Refuses a file whose chain of pages is cut off, or leads back: it would seem shorter.

    Returns how many they are.
    """
    kind, file = tif.tiff, tif.filehandle
    file.seek(8 if kind.version == 43 else 4)
    seen: set[int] = set()
    while True:
        (offset,) = struct.unpack(kind.offsetformat, file.read(kind.offsetsize))
        if not offset:
            return len(seen)
        if offset in seen or len(seen) >= MAX_PAGES:
            raise InputError(
                f"page {len(seen)} points back to an earlier one, or there are {MAX_PAGES:,} or "
                "more"
            )
        if offset + kind.tagnosize > file.size:
            raise InputError(f"page {len(seen)} is missing from the stack")
        seen.add(offset)
        file.seek(offset)
        (tags,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
        file.seek(offset + kind.tagnosize + tags * kind.tagsize)


def _check_description(tif: Any) -> None:
    """Refuses a file that ends before its description: it would seem to have none."""
    kind, file = tif.tiff, tif.filehandle
    if kind.tagsize != 4 + 2 * kind.offsetsize:
        return  # of Hamamatsu's slides
    file.seek(tif.pages[0].offset)
    (tags,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
    for entry in range(min(tags, 4096)):
        file.seek(tif.pages[0].offset + kind.tagnosize + entry * kind.tagsize)
        data = file.read(kind.tagsize)
        code, _ = struct.unpack(kind.tagformat1, data[:4])
        size, at = struct.unpack(kind.offsetformat + kind.offsetformat[-1], data[4:])
        if code == _DESCRIPTION and size > kind.offsetsize and at + size > file.size:
            raise InputError("the file is truncated: its description lies behind its end")


def _check_ome(text: str, first: Any) -> None:
    """Refuses a description of more planes than any file has, for each of which room is made."""
    if "<!ENTITY" in text:
        raise InputError("its OME description declares entities, which no microscope writes")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return  # such a file is read without it
    for element in root.iter():
        said = dict(element.attrib)
        counts = [float(said[key]) for key in _OME_COUNTS if key in said]
        sizes = [float(said[key]) for key in _OME_SIZES if key in said]
        if {"Start", "End"} <= set(said):
            counts.append((float(said["End"]) - float(said["Start"])) / float(said.get("Step", 1)))
        if max([*counts, math.prod(sizes) / first.size], default=0) >= MAX_PAGES:
            raise InputError(f"its OME description has {MAX_PAGES:,} planes or more")


def _described(tif: Any) -> Stored:
    """The array of a file that describes it; images of one size become slices."""
    found = [s for s in tif.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
    each = [_series(tif, series) for series in found or tif.series]
    said = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    held = sum(one.channels * one.pages for one in each)
    if said > held:
        raise InputError(
            f"its description has {said:,} images, but it holds {held}: it is cut off, or was split"
        )
    if len({(one.axes, one.shape) for one in each}) > 1:
        kinds = ", ".join(f"{one.axes} {one.shape}" for one in each[:4])
        raise InputError(f"it holds {len(each)} images of different sizes ({kinds}); split it")
    if len(each) == 1:
        return each[0]
    # such as the positions of a stage
    return Stored(
        next(axis for axis in "PVRO" if axis not in each[0].axes) + each[0].axes,
        (len(each), *each[0].shape),
        each[0].leading + 1,
        lambda index: each[index[0]].read(index[1:]),
        each[0].key,
    )


def _series(tif: Any, series: Any) -> Stored:
    page, shape, axes = series.keyframe, tuple(map(int, series.shape)), series.axes
    if tif.is_imagej and "C" in axes and shape[axes.index("C")] > _COMPOSITE:
        # Written by a program that names the slices of every stack so.
        axes = axes.replace("C", next(letter for letter in "ZTP" if letter not in axes))
    if series.dtype != page.dtype:
        raise InputError(f"its description says {series.dtype}, its pages are {page.dtype}")
    at = series.dataoffset
    if at is not None and page.is_final:
        return Stored(axes, shape, 0, lambda _: _mapped(tif, series.dtype, at, shape), page)
    leading = len(shape) - len(page.shape)
    whole = leading >= 0 and shape[leading:] == tuple(page.shape)
    if whole and len(series.pages) == math.prod(shape[:leading]):
        pages = list(series.pages)
        return Stored(
            axes, shape, leading, lambda index: _decode(_flat(pages, index, shape), tif), page
        )
    if len(series.pages) == 1 and math.prod(shape) == math.prod(page.shape):
        return Stored(axes, shape, 0, lambda _: _decode(page, tif).reshape(shape), page)
    raise InputError(
        f"its description says {axes} {shape}, which its {len(series.pages)} pages of "
        f"{page.shape} do not match"
    )


def _flat(pages: list[Any], index: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    at = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
    if pages[at] is None:
        raise InputError(f"plane {at} is missing, or in another file")
    return pages[at]


def _chain(tif: Any, first: Any, reading: Reading) -> GetPage:
    """Pages of which the file says nothing, one after the other; read as far as they are asked for.

    Smaller copies and masks behind the first page, as in a GeoTIFF, are passed over.
    """
    seen: dict[int, int] = {}

    def plain(index: int) -> Any:
        try:
            page = tif.pages[index]
        except IndexError:
            tif.filehandle.seek(tif.pages.next_page_offset or 0)
            if any(tif.filehandle.read(tif.tiff.offsetsize)):
                raise InputError(f"page {index} is missing from the stack") from None
            raise
        if seen.setdefault(page.offset, index) != index:
            raise InputError(f"page {index} points back to page {seen[page.offset]}")
        if index and (page.is_reduced or page.is_mask):
            raise IndexError(index)
        return page

    if reading.axes and len(reading.axes) > len(first.axes):
        count = 1
        while count <= 2**12:
            try:
                if plain(count).hash != first.hash:
                    raise InputError(f"page {count} differs from page 0 in size, channels or depth")
            except IndexError:
                break
            count += 1
        stored = Stored(
            "I" + first.axes,
            (count, *first.shape),
            1,
            lambda index: _decode(plain(index[0]), tif),
            first,
        )
        return _slices(stored, tif, reading)

    def get_page(index: int) -> Page:
        page = plain(index)
        stored = Stored(page.axes, tuple(page.shape), 0, lambda _: _decode(page, tif), page)
        stored = stored.named(reading.axes)
        if stored.pages > 1:
            raise InputError(f"its axes are {page.axes} of {page.shape}; grey or RGB can be read")
        info = _info(page, stored, tif, reading)
        return _page(stored, replace(info, axes=f"I{info.axes}"), 0)

    return get_page


def _decode(page: Any, tif: Any) -> Array:
    """The pixels of one page as stored, in the order of its axes."""
    key = page.keyframe
    if max(key.nbytes // 8, key.tilewidth * key.tilelength * key.tiledepth) > MAX_PIXELS:
        raise InputError(f"its tiles, or its values of 8 bytes, are over {MAX_PIXELS:,}")
    file = page.parent.filehandle
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if any(start + size > file.size for start, size in segments):
        raise InputError("the file is truncated")
    if key.compression not in _BUFFERED:
        wide, high = key.tilewidth or key.imagewidth, key.tilelength or key.rowsperstrip
        for start, size in segments:
            file.seek(start)
            head = file.read(min(size, 2**16))
            _check_declared(head, key.compression, wide, high, key.samplesperpixel)
    if key.is_final and len(segments) > 0:
        return _mapped(tif, key.dtype, segments[0][0], key.shape)
    return np.asarray(page.asarray(maxworkers=1))


def _mapped(tif: Any, dtype: np.dtype[Any], start: int, shape: tuple[int, ...]) -> Array:
    if start + math.prod(shape) * dtype.itemsize > tif.filehandle.size:
        raise InputError("the file is truncated: it describes more than it holds")
    if not tif.filehandle.is_file:  # a member of a shard, in memory
        tif.filehandle.seek(start)
        stored = tif.filehandle.read(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(stored, dtype.newbyteorder(tif.byteorder)).reshape(shape)
    return np.memmap(tif.filehandle.path, dtype.newbyteorder(tif.byteorder), "r", start, shape)


def _check_declared(segment: bytes, compression: int, wide: int, high: int, samples: int) -> None:
    """Refuses a JPEG or JPEG 2000 tile that says that it is larger than its place in the page."""
    found, components = None, 0
    if compression in _JPEG:
        at = 2
        while segment[at : at + 1] == b"\xff":
            marker, length = segment[at + 1], int.from_bytes(segment[at + 2 : at + 4], "big")
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                *found, components = struct.unpack(">HHB", segment[at + 5 : at + 10])
                break
            at += 2 + length
    elif (at := segment.find(b"\xff\x4f\xff\x51")) >= 0:  # SIZ, where the codestream begins
        right, low, left, top = struct.unpack(">IIII", segment[at + 8 : at + 24])
        (components,) = struct.unpack(">H", segment[at + 40 : at + 42])
        found = [low - top, right - left]
    if found is None or found[0] > max(high, 1) or found[1] > wide or components > max(samples, 4):
        said = "unknown size" if found is None else f"{found[0]} x {found[1]} x {components}"
        raise InputError(f"a tile of {said}, but only {high} x {wide} x {samples} fit")


def _info(page: Any, stored: Stored, tif: Any, reading: Reading) -> ImageInfo:
    """What the pages are that `_page` gives."""
    if page.compression not in (*_BUFFERED, *_JPEG, *_JPEG_2000):
        raise InputError(f"TIFF compression {page.compression!r}; save it with LZW or Deflate")
    kind, samples = page.photometric, page.samplesperpixel
    if kind == _YCBCR and page.compression not in (*_JPEG, *_JPEG_2000):
        raise InputError("colours are stored as YCbCr; save it as RGB")
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR):
        raise InputError(f"{samples} channels of kind {kind!r}; save it as grey or RGB")
    colours = 3 if kind in (_RGB, _YCBCR) else 1
    extra = tuple(map(int, page.extrasamples))
    # An extra sample of kind 0 is a channel, such as infrared; 1 and 2 are alpha. Not named at
    # all, the fourth beside three colours is alpha, too.
    unnamed = colours == 3 and samples == 4 and not extra
    alpha = "S" in stored.axes and (unnamed or (bool(extra) and extra[-1] in (1, 2)))
    alpha = alpha and reading.axes is None and stored.channels > 1
    palette = _palette(page, tif)
    channels = stored.channels - alpha if palette is None else colour_table(palette).shape[1]
    turn = page.tags.valueof(_ORIENTATION, 1)
    height, width = upright(stored.size, turn)
    return ImageInfo(
        height=height,
        width=width,
        channels=channels,
        dtype="uint8" if palette is not None else image_dtype(page.dtype),
        pages=stored.pages,
        has_alpha=alpha,
        lossy=page.compression in _JPEG or page.compression == 33004,
        names=_names(tif, channels),
        nodata=_nodata(page, reading),
        palette=palette,
        axes=stored.axes,
        series=stored.series,
    )


def _nodata(page: Any, reading: Reading) -> float | None:
    """What GDAL's tag says, which may be a value that the pixels' type does not have."""
    text = str(page.tags.valueof(_NODATA, "")).strip("\0 ").replace(",", ".")
    if not text or reading.nodata is not None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"its value of no data is {text[:40]!r}, which is no number; name it with --nodata"
        ) from error


def _page(stored: Stored, info: ImageInfo, index: int) -> Page:
    page = stored.key

    def decode() -> Array:
        return stored.page(index)

    turn = page.tags.valueof(_ORIENTATION, 1)
    if info.palette is not None:
        colours = colour_table(info.palette)
        return Page(info, lambda: colours[decode()[..., 0]], turn, lambda: decode()[..., 0])
    if page.photometric == _WHITE_IS_ZERO:
        return Page(info, lambda: _inverted(decode(), page.bitspersample), turn)
    apart = any(axis in CHANNELS for axis in stored.axes[: stored.leading])
    as_it_is = page.is_final and page.dtype.name == info.dtype and turn == 1 and not apart
    return Page(info, decode, turn, mapped=decode if as_it_is else None)


def _inverted(array: Array, bits: int) -> Array:
    """As every viewer shows it: the largest value is black."""
    if array.dtype == np.bool_:
        return ~array
    if array.dtype.kind == "u":
        return np.asarray(2**bits - 1 - array, array.dtype)
    raise InputError(
        f"white is zero in {array.dtype}, whose largest value is not known; save it "
        "with black as zero"
    )


def _palette(page: Any, tif: Any) -> bytes | None:
    """The colours of a file of indices. ImageJ's colour table only says how to show grey values."""
    if page.photometric != _PALETTE or tif.is_imagej or page.bitspersample > 8:
        return None
    table = np.asarray(() if page.colormap is None else page.colormap)
    if table.size != 3 * 2**page.bitspersample:
        raise InputError(f"its palette has {table.size} values, not 3 x {2**page.bitspersample}")
    table = table.reshape(3, -1)
    table = table // 257 if table.max() > 255 else table
    return table.T.astype(np.uint8).tobytes()


def _names(tif: Any, channels: int) -> tuple[str, ...]:
    """The names of the channels, where OME or ImageJ says them."""
    found: list[str] = []
    if tif.is_ome:
        text = (tif.ome_metadata or "").split("</Pixels>", 1)[0]
        found = [
            html.unescape(name[1]) if (name := re.search(r'\bName="([^"]*)"', tag)) else ""
            for tag in re.findall(r"<(?:\w+:)?Channel\b[^>]*>", text)
        ]
    elif tif.is_imagej:
        labels = (tif.imagej_metadata or {}).get("Labels") or []
        found = [str(label) for label in labels]
    known = len(found) == channels and all(found) and len(set(found)) == channels
    return tuple(found) if known else ()
