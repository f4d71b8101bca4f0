"""Image files in and out: what both tasks need, and no more.

Reads PNG, JPEG, BMP, GIF and WebP (Pillow), TIFF (tifffile), NPY, the slices of volumes
(`unet.files.volumes`), and pictures in shards (`unet.files.shards`); writes PNG and TIFF. The kind
is told by a file's first bytes, of a volume by its name. Whatever is wrong with a file, the error
is an InputError that names it. Nothing in a file is run, and more than MAX_PIXELS are refused
before one is decoded.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from unet.errors import InputError, not_there
from unet.files.pages import (
    ALL,
    AS_STORED,
    MAX_PAGES,
    MAX_PIXELS,
    SUFFIXES,
    Array,
    GetPage,
    ImageInfo,
    Page,
    Reading,
    Stored,
    as_read,
    colour_table,
    guessed_axes,
    image_dtype,
    naming,
    upright,
)
from unet.files.shards import is_member, read_member
from unet.files.tiff import open_tiff
from unet.files.volumes import is_volume, is_volume_file, open_volume
from unet.files.writing import replacing

Colour: TypeAlias = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
SAMPLES = "unet-samples.txt"  # marks a folder of images that a model made
OURS = "folder of runs, evaluations or samples"
_MARKS = (("metrics.jsonl", "config.yaml"), ("scores.json", "scores.csv"), (SAMPLES,))
PREDICTED = re.compile(
    r"_(mask|probability|overlay|labels|entropy|disagreement|sample_[0-9]+)$"
)  # the ends of names
_ORIENTATION = 274  # the tag of EXIF
_ARCHIVES = (b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")  # how they begin


def white(dtype: str) -> int:
    """The largest value of an image of that type; floats go from 0 to 1."""
    return int(np.iinfo(dtype).max) if np.issubdtype(np.dtype(dtype), np.integer) else 1


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder in natural order: 0.png, 1.png, 2.png, 10.png; or its volumes.

    Volumes are listed where there is no other image. Hidden files, subfolders and files with other
    suffixes than SUFFIXES are passed over.

    Raises:
        InputError: no such folder, or no image in it.
    """
    try:
        if not folder.is_dir():
            said = "it is a file: give a folder" if folder.exists() else not_there(folder, "folder")
            raise InputError(f"{str(folder)!r}: {said}")
        shown = [path for path in folder.iterdir() if not path.name.startswith(".")]
        files = [path for path in shown if is_image_file(path)]
        files = files or [path for path in shown if is_volume_file(path)]
    except OSError as error:
        raise InputError(f"{str(folder)!r}: cannot be read ({error.strerror})") from error
    if not files:
        raise no_images(folder)
    return sorted(files, key=lambda path: natural_key(path.name))


def no_images(folder: Path) -> InputError:
    """The message for a folder that has no images, or none where they are looked for."""
    said = f"{str(folder)!r}: no image in this folder ({', '.join(SUFFIXES)})"
    ours: list[Path] = []
    files = files_below(folder, ours)
    shown = sorted(path for path in folder.glob("*") if path.is_dir() and path.name[0] != ".")
    if series := [path.name for path in shown if is_volume(path) and not is_volume_file(path)]:
        return InputError(
            f"{str(folder)!r}: {series[0]} in it is a DICOM series: name one such folder by "
            "itself, or make a NIfTI file of each (dcm2niix -z y -f %f -o OUT FOLDER)"
        )
    if deeper := next((path.parent for path in files if is_image_file(path)), None):
        return InputError(f"{said}, but in {str(deeper)!r}: name one such folder at a time")
    if volume := next((path for path in files if is_volume_file(path)), None):
        return InputError(f"{said}, but the volume {str(volume)!r}: name it by itself")
    if ours:
        said += f", but in a {OURS}, {str(min(ours))!r}: name one by itself if it is meant"
    elif files:
        said += f", but files of other kinds, such as {files[0].name}"
    return InputError(said)


def walk(root: Path, ours: list[Path] | None = None) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, each with the names of its files, in no order.

    Hidden ones are passed over, what archives add (`__MACOSX`), and below `root` the folders of
    this project's runs, evaluations and samples. Links are followed, to each folder once. A Zarr
    store counts as a file.

    Args:
        ours: a list to which such folders of this project are added.
    """
    seen: set[str] = set()  # folders, to which links may lead back
    for folder, subfolders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        is_ours = Path(folder) != root and any(map(set(names).issuperset, _MARKS))
        if is_ours and ours is not None:
            ours.append(Path(folder))
        if place in seen or is_ours:
            subfolders.clear()
            continue
        seen.add(place)
        shown = sorted(name for name in subfolders if not name.startswith((".", "__")))
        stores = [name for name in shown if name.lower().endswith(".zarr")]
        subfolders[:] = [name for name in shown if name not in stores]
        yield folder, stores + [name for name in names if not name.startswith(".")]


def files_below(folder: Path, ours: list[Path] | None = None) -> list[Path]:
    """The files that `walk` finds, in natural order of the paths."""
    found = []
    for place, names in walk(folder, ours):
        above = [natural_key(part) for part in Path(place).parts]
        found += [([*above, natural_key(name)], Path(place, name)) for name in names]
    return [path for _, path in sorted(found)]


def images_below(folder: Path) -> list[Path]:
    """Image files of a folder and of those below it, in natural order of the paths; or its volumes.

    What `walk` skips is left out.

    Raises:
        InputError: no such folder, or no image in it.
    """
    every = files_below(folder)
    files = [path for path in every if is_image_file(path)]
    return files or [path for path in every if is_volume_file(path)] or list_images(folder)


def predictions(files: Sequence[Path]) -> set[Path]:
    """Those of the files that a prediction wrote: NAME_mask, NAME_probability, and what else is
    called NAME_... beside them; legend.png beside or above these.
    """
    stems: defaultdict[Path, set[str]] = defaultdict(set)
    for file in files:
        stems[file.parent].add(file.stem)
    predicted = {
        place: {stem.removesuffix("_mask") for stem in of if stem.endswith("_mask")}
        & {stem.removesuffix("_probability") for stem in of if stem.endswith("_probability")}
        for place, of in stems.items()
    }

    def of_prediction(file: Path) -> bool:
        names, beside = predicted[file.parent], stems[file.parent]
        cuts = (m.start() for m in re.finditer("_", file.stem) if file.stem[: m.start()] in names)
        return any(file.stem[:cut] not in beside or PREDICTED.match(file.stem, cut) for cut in cuts)

    made = {file for file in files if predicted[file.parent] and of_prediction(file)}
    above = {place for file in made for place in file.parents}
    return made | {file for file in files if file.name == "legend.png" and file.parent in above}


def is_image_file(path: Path) -> bool:
    """Whether a file has the name of an image; so has a link to nothing, which cannot be read."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that compares runs of digits as numbers, however long: "a2" < "a10"."""
    parts = re.split(r"0*([0-9]+)", name)  # text, digits, text, ...
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], name


def image_info(path: Path, reading: Reading = AS_STORED) -> ImageInfo:
    """Size, channels, depth and pages of a file, from its headers; no pixel is decoded.

    A size above MAX_PIXELS is reported, not refused: `read_image` refuses it.

    Args:
        reading: how to read the file, beyond what it says itself.

    Raises:
        InputError: not an image, no such channel, or a stack whose pages differ, or too many.
    """
    with _open(path, reading) as get_page:
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
        info = replace(first, pages=pages)
        if reading.rgb and reading.axes is None and first.channels == 1:
            check_slices(path, info)
        return reading.of(info)


def check_slices(path: Path, info: ImageInfo) -> None:
    """Refuses 3 or 4 pages of which nothing is said, where they may be the channels of an image."""
    unsaid = info.axes.startswith("I") or (info.axes == "ZYX" and path.suffix.lower() == ".npy")
    if info.pages in (3, 4) and unsaid:
        raise InputError(
            f"it has {info.pages} pages: channels or slices? Give --axes CYX or --axes ZYX"
        )


def read_image(
    path: Path,
    page: int | None = None,
    reading: Reading = AS_STORED,
    *,
    alpha: bool = False,
    background: Colour | None = None,
) -> Array:
    """Pixels of an image file: palette looked up, turned upright, white as viewers show it.

    TIFF: by the axes that the file names (`unet.files.tiff`). NPY: (H, W), (H, W, C) or a stack
    (N, H, W), (N, H, W, C); a last axis of 1, 3 or 4 is taken as channels, and one of up to WIDEST
    beside longer ones.

    Args:
        page: 0-based slice of a stack; None for a file that holds one image.
        reading: how to read the file, beyond what it says itself.
        alpha: read the alpha channel, too, as the last one, where there is one.
        background: the colour under transparent pixels: red, green and blue from 0 to 255; None:
            alpha is dropped, and they keep the colour that is stored.

    Returns:
        (H, W, C): uint8 or uint16 as stored, 1-bit as uint8 0 and 255, any other integer or float
        type as float32.

    Raises:
        InputError: not an image, damaged, larger than MAX_PIXELS, no such page or channel; NaN
            although it is not declared to be no data; infinite values.
    """
    with _read(path, page, reading) as found:
        return read_page(found, reading, alpha=alpha, background=background)


def read_page(
    page: Page, reading: Reading, *, alpha: bool = False, background: Colour | None = None
) -> Array:
    """The pixels of a page, as `read_image` gives them."""
    over = background is not None and page.info.has_alpha
    array = page.read(alpha=alpha or over)
    if over and background is not None:
        array = laid_over(array, background)
    if (chosen := reading.chosen(page.info)) is not None:
        array = np.ascontiguousarray(array[..., chosen])
    return as_read(array, reading.of(page.info))


def laid_over(image: Array, background: Colour) -> Array:
    """An image whose last channel is alpha (H, W, C + 1), over a colour: (H, W, C)."""
    colours, alpha = image[..., :-1].astype(np.float64), image[..., -1:]
    largest = white(image.dtype.name)
    ground = np.array(background, np.float64) * (largest / 255)
    if colours.shape[2] != 3:
        ground = np.array([ground.mean()])
    found = ground + (colours - ground) * (alpha / largest)
    whole = image.dtype.kind in "iu"
    return (np.rint(found) if whole else found).astype(image.dtype)


def map_image(
    path: Path, page: int | None = None, reading: Reading = AS_STORED
) -> Array | Blocks | None:
    """What `read_image` gives of any size, as a map of the file (H, W, C); None: not possible.

    Chosen channels must follow each other at equal steps. Of a volume it is `Blocks`.
    """
    with _read(path, page, reading) as found:
        if found.rectangle is not None:
            return Blocks(path, page, reading, reading.of(found.info))
        if found.mapped is None:
            return None
        array = found.mapped()[..., : found.info.channels]
        chosen = reading.chosen(found.info)
        if chosen is None:
            return array
        step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
        if step <= 0 or chosen != list(range(chosen[0], chosen[-1] + 1, step)):
            return None
        return array[..., chosen[0] : chosen[-1] + 1 : step]


@dataclass(frozen=True)
class Blocks:
    """A slice (H, W, C) of a volume, of which `blocks[rows, columns]` is read on demand.

    Attributes:
        path, page, reading: as `read_image` takes them.
        info: describes what is read.
    """

    path: Path
    page: int | None
    reading: Reading
    info: ImageInfo

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.info.height, self.info.width, self.info.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.info.dtype)

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Array:
        rows, columns = key if isinstance(key, tuple) else (key, ALL)
        with _read(self.path, self.page, self.reading) as found:
            assert found.rectangle is not None
            array = found.rectangle(rows, columns)
            if (chosen := self.reading.chosen(found.info)) is not None:
                array = array[..., chosen]
            return as_read(np.ascontiguousarray(array), self.info)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:, :].astype(dtype or self.dtype, copy=False)


def read_mask(
    path: Path, page: int | None = None, *, colours: bool = False, lossy: bool = False
) -> Array:
    """Values of a mask file, unchanged: the number that stands for a class, or its colour.

    A palette file holds numbers, the indices; `image_info` has its colours. 1-bit masks are 0 and
    255. Whole numbers stored as float are accepted.

    Args:
        page: 0-based slice of a stack; None for a file that holds one mask.
        colours: look the palette up: as grey values if all of its colours are grey.
        lossy: also read JPEG and WebP files, whose values have changed a little, and floats, which
            stay such.

    Returns:
        (H, W) for grey or (H, W, 3) for colours, in an integer dtype.

    Raises:
        InputError: as `read_image`; a JPEG or WebP file; values that are not whole numbers; more
            channels; nothing but an alpha channel.
    """
    with _read(path, page, AS_STORED) as found:
        info = found.info
        if info.lossy and not lossy:
            raise InputError(
                "JPEG and WebP change values, so its values are not those of the classes; name the "
                "true values, such as --mask-values 0 255, and each pixel takes the nearest"
            )
        if info.palette is not None and not colours:
            return found.read(indices=True)[..., 0]
        array = found.read(alpha=info.has_alpha)
        if info.has_alpha:
            array, cover = array[..., :-1], array[..., -1]
            if (array == array[0, 0]).all() and (cover != cover[0, 0]).any():
                raise InputError(
                    f"all of its pixels have the colour {array[0, 0].tolist()}, and its alpha "
                    "channel differs: the mask is in there; save that channel as the mask"
                )
        if info.channels not in (1, 3):
            raise InputError(f"it has {info.channels} channels, but a mask has 1, or 3 for colours")
        if array.dtype.kind == "f":
            known = np.isfinite(array) & (abs(array) < 2**31)
            if not (known & ((array == np.round(array)) | lossy)).all():
                raise InputError(
                    "a mask must hold whole numbers, one for each class; of probabilities "
                    "--threshold-masks makes two classes"
                )
            array = array if lossy else array.astype(np.int64)
        return array[:, :, 0] if info.channels == 1 else np.ascontiguousarray(array)


def write_image(path: Path, array: Array, palette: bytes | None = None) -> None:
    """Writes (H, W) or (H, W, C) as PNG (uint8, uint16; C = 1, 3 or 4) or TIFF (and other whole
    numbers of up to 32 bits, and float32).

    The fourth channel of a PNG is alpha; in a TIFF all but three channels are as good as any other.

    The suffix of the path decides. The file appears whole or not at all.

    Args:
        palette: red, green and blue of each value in turn: uint8 (H, W) are written as indices.

    Raises:
        InputError: a suffix, shape and dtype that do not go together.
        OSError: the folder cannot be written.
    """
    suffix = path.suffix.lower()
    png, tiff = suffix == ".png", suffix in (".tif", ".tiff")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and (tiff or array.shape[2] in (3, 4)))
    whole = array.dtype.kind in "iu" and array.dtype.itemsize <= 4
    typed = array.dtype.name in ("uint8", "uint16") or (
        tiff and (whole or array.dtype == np.float32)
    )
    if not ((png or tiff) and shaped and typed and array.size):
        raise InputError(
            f"{str(path)!r}: cannot write {array.dtype} {array.shape} here; write uint8 or uint16 "
            "(H, W) or (H, W, 3) to .png, or float32 to .tif"
        )
    array = np.ascontiguousarray(array)
    with replacing(path) as temporary:
        if png and palette is not None and array.dtype == np.uint8 and array.ndim == 2:
            picture = Image.fromarray(array)
            picture.putpalette(palette)
            picture.save(temporary, "PNG")
        elif png:
            temporary.write_bytes(imagecodecs.png_encode(array))
        else:
            kind = "rgb" if array.shape[2:] == (3,) else "minisblack"
            layout: dict[str, Any] = {"planarconfig": "contig"} if array.ndim == 3 else {}
            tifffile.imwrite(temporary, array, **tiff_colours(palette, array.dtype, kind), **layout)


def tiff_colours(palette: bytes | None, dtype: np.dtype[Any], kind: str) -> dict[str, Any]:
    """What `tifffile` is told of the colours of an image: a palette's, or a kind."""
    if palette is None or dtype != np.uint8:
        return {"photometric": kind}
    table = np.zeros((3, 256), np.uint16)
    colours = np.frombuffer(palette, np.uint8).reshape(-1, 3).astype(np.uint16) * 257
    table[:, : len(colours)] = colours.T
    return {"photometric": "palette", "colormap": table}


@contextmanager
def _read(path: Path, page: int | None, reading: Reading) -> Iterator[Page]:
    with _open(path, reading) as get_page:
        try:
            found = get_page(page or 0)
        except IndexError as error:
            raise InputError(f"it has no page {page or 0}") from error
        if page is None:
            with suppress(IndexError):
                get_page(1)
                raise InputError("it is a stack of several pages; say which page to read")
        yield found


@contextmanager
def _open(path: Path, reading: Reading) -> Iterator[GetPage]:
    """The pages of any image file; all that a damaged file makes a decoder raise is InputError."""
    with naming(path):
        if is_volume(path):
            with open_volume(path) as volume:
                yield volume.pages(reading)
            return
        source: Path | BytesIO = path
        if is_member(path):
            source = BytesIO(read_member(path))
        elif path.is_dir():
            raise InputError("it is a folder: give one of its images")
        elif not path.is_file():
            raise InputError("no such file")
        start = _start(source)
        if not start:
            raise InputError("the file is empty (0 bytes): copy it anew, or leave it out")
        if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            reader = open_tiff(source, reading)
        elif start.startswith(b"\x93NUMPY"):
            reader = _open_npy(source, reading)
        else:
            reader = _open_pillow(source, start)
        with reader as get_page:
            yield get_page


def _start(source: Path | BytesIO) -> bytes:
    if isinstance(source, BytesIO):
        return source.getvalue()[:26]
    with source.open("rb") as file:
        return file.read(26)


@contextmanager
def _open_pillow(source: Path | BytesIO, start: bytes) -> Iterator[GetPage]:
    try:
        picture = Image.open(source, formats=("PNG", "JPEG", "BMP", "GIF", "WEBP"))
    except UnidentifiedImageError as error:
        if start.startswith(_ARCHIVES):
            raise InputError("an archive: unpack it, and name what comes out of it") from error
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
        palette = None
        if mode.startswith("P"):
            palette = bytes(picture.getpalette("RGB") or ())
            grey = colour_table(palette).shape[1] == 1
        wide = mode.startswith("I")
        alpha = not wide and (mode.endswith("A") or "transparency" in picture.info)

        def decode() -> Array:
            if deep:
                return np.asarray(imagecodecs.png_decode(_content(source)))
            if alpha:
                colours = np.asarray(picture.convert("RGBA"))
                return colours[..., [0, 3]] if grey else colours
            as_stored = grey and palette is None
            array = np.asarray(picture if as_stored else picture.convert("RGB"))
            return array.astype(np.uint16) if wide else array

        def indices() -> Array:
            return np.asarray(picture if mode == "P" else picture.getchannel(0))

        # Without the test Pillow decodes a PNG to look for EXIF data behind its pixels.
        turn = picture.getexif().get(_ORIENTATION, 1) if "exif" in picture.info else 1
        height, width = upright(picture.size[::-1], turn)
        info = ImageInfo(
            height=height,
            width=width,
            channels=1 if grey else 3,
            dtype="uint16" if deep or wide else "uint8",
            has_alpha=alpha,
            lossy=picture.format in ("JPEG", "WEBP"),
            palette=palette,
        )
        yield [Page(info, decode, turn, indices if palette else None)].__getitem__


def _content(source: Path | BytesIO) -> bytes:
    return source.getvalue() if isinstance(source, BytesIO) else source.read_bytes()


@contextmanager
def _open_npy(source: Path | BytesIO, reading: Reading) -> Iterator[GetPage]:
    if isinstance(source, BytesIO):
        array = np.lib.format.read_array(source, allow_pickle=False)
    else:
        # A memory map never unpickles, and refuses a shape that the file is too short for.
        array = np.lib.format.open_memmap(source, mode="r")
    yield array_pages(array, reading)


def array_pages(array: Array, reading: Reading) -> GetPage:
    """The slices of an array: by the axes that are named, else by `guessed_axes`."""
    axes = guessed_axes(array.shape) if reading.axes is None else reading.axes
    alpha = reading.axes is None and axes[-1] == "C" and array.shape[-1] == 4
    if len(axes) != array.ndim:
        raise InputError(f"its shape {array.shape} does not have the axes {axes}")
    stored = Stored(axes, array.shape, 0, lambda _: array)
    info = ImageInfo(
        height=stored.size[0],
        width=stored.size[1],
        channels=stored.channels - alpha,
        dtype=image_dtype(array.dtype),
        pages=stored.pages,
        has_alpha=alpha,
        axes=stored.axes,
        series=stored.series,
    )

    def get_page(index: int) -> Page:
        if not 0 <= index < stored.pages:
            raise IndexError(index)
        return Page(info, lambda: stored.page(index), mapped=lambda: stored.page(index))

    return get_page
