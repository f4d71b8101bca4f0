"""Where training images come from: files, archives and drawn shapes, each a numbered `Source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.data.captions import (
    Captions,
    is_table,
    read_captions,
    tables_above,
    text_file,
    text_key,
)
from diffusion.data.shapes import HELD_OUT, SIDE, example, example_caption
from unet.errors import InputError, not_there
from unet.files.folders import mask_files, mask_folders
from unet.files.images import (
    OURS,
    WHITE,
    Colour,
    array_pages,
    check_slices,
    image_info,
    natural_key,
    no_images,
    predictions,
    read_image,
    read_page,
    walk,
)
from unet.files.pages import AS_STORED, SUFFIXES, Array, ImageInfo, Reading, naming
from unet.files.shards import find_shards, read_shards
from unet.files.volumes import is_volume
from unet.words import counted, left_out

DRAWN = 20_000  # pictures of shapes
# Images and labels in an .npz, of these the first that is there: ours, those of MedMNIST and Keras.
_ARRAYS = (("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train"))
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")  # no classes
# Of pictures that are not read; cameras and phones mix some of them with JPEG.
_UNREAD = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm", ".pgm", ".tga", ".psd", ".svg"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
ARCHIVE_BYTES = 2**32  # an .npz is unpacked into memory as a whole


@dataclass(frozen=True, kw_only=True)
class HowToRead:
    """How image files are read, beyond what they say themselves.

    Attributes:
        reading: their axes, the chosen channels, and the value of no data.
        background: the colour under transparent pixels; None: alpha is a channel of its own.
        caption_key: of the captions in tables, JSON and shards.
    """

    reading: Reading = AS_STORED
    background: Colour | None = WHITE
    caption_key: str | None = None

    def image(self, path: Path, page: int | None = None) -> Array:
        """(H, W, C) as stored; with alpha as a channel for all images, grey ones as colours."""
        if self.background is not None:
            return read_image(path, page, self.reading, background=self.background)
        pixels = read_image(path, page, self.reading, alpha=True)
        if pixels.shape[2] == 2 and image_info(path, self.reading).has_alpha:
            return pixels[..., [0, 0, 0, 1]]
        return pixels


def saved_colour(saved: Any) -> Colour | None:
    """A colour from a model's JSON; None: it has none.

    Raises:
        ValueError: it is no colour.
    """
    match saved:
        case None:
            return None
        case [int(red), int(green), int(blue)] if all(0 <= part <= 255 for part in saved):
            return red, green, blue
    raise ValueError(f"{saved!r:.200} is no colour of three numbers from 0 to 255")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images of any depth, by number; what reads them can be sent to worker processes."""

    names: Sequence[str]  # for messages
    read: Callable[[int], Array]
    kind: ImageInfo | None = None  # of all images; None: each is a file with a header of its own
    files: Sequence[str] = ()
    root: Path | None = None  # the folder that the files are in or below
    below: Mapping[str, int] = field(default_factory=dict)  # images in folders, some beside these
    left: str = ""  # a note on files and folders that are left out
    how: HowToRead = field(default_factory=HowToRead)
    classes: tuple[str, ...] = ()
    labels: NDArray[np.int64] | None = None
    captioned: bool = False
    captions: Callable[[int], Captions] | None = None  # of an image, where they were asked for
    note: str = ""

    def info(self, image: int) -> ImageInfo:
        """What the header says; with alpha among the channels where it is one of them."""
        if self.kind:
            return self.kind
        info = replace(image_info(Path(self.files[image]), self.how.reading), palette=None)
        if self.how.background is None and info.has_alpha:
            return replace(info, channels=max(info.channels, 3) + 1, has_alpha=False)
        return info


def check_source(data: str | Path) -> None:
    """Raises an InputError where `data` names nothing that is there."""
    path = Path(data)
    # exists is False for an impossible name, too
    if str(data) != "shapes" and not (os.path.exists(path) or is_volume(path) or find_shards(path)):
        raise InputError(f"'{data}': {not_there(data)}")


def open_source(
    data: str | Path, captions: bool, size: int | None, seed: int, how: HowToRead | None = None
) -> Source:
    """The source that `data` names, as `DiffusionData` does.

    Raises:
        InputError: nothing there, a damaged archive, a bad metadata.jsonl.
    """
    path = Path(data)
    if str(data) == "shapes":
        return _drawn(size or SIDE, seed)
    if shards := find_shards(path):
        return _in_shards(shards, captions, how or HowToRead())
    check_source(data)
    how = how or HowToRead()
    if path.suffix.lower() == ".npz":
        return _archive(path, how)
    return _in_files(path, captions, how)


def _drawn(side: int, seed: int) -> Source:
    never = ", ".join(sorted(" ".join(pair) for pair in HELD_OUT))
    return Source(
        names=[f"shapes {i}" for i in range(DRAWN)],
        read=partial(_draw, seed, side),
        kind=ImageInfo(height=side, width=side, channels=3, dtype="uint8"),
        captioned=True,
        captions=partial(_drawn_captions, seed),
        note=f"; left for evaluation: {never}",
    )


def _drawn_captions(seed: int, image: int) -> Captions:
    return (example_caption(seed, image),)


def _draw(seed: int, side: int, image: int) -> Array:
    return example(seed, image, side)[1].picture


def _archive(path: Path, how: HowToRead) -> Source:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            used = next((pair for pair in _ARRAYS if pair[0] in archive), None)
            if used is None:
                held = ", ".join(archive.files[:8]) or "nothing"
                raise InputError(
                    f"'{path}' holds {held}, but no array `images`: save the images under this "
                    "name, and their classes, if any, as `labels`"
                )
            names = [f"{name}.npy" for name in used]
            unpacked = sum(m.file_size for m in archive.zip.infolist() if m.filename in names)
            if unpacked > ARCHIVE_BYTES:
                raise InputError(
                    f"'{path}' unpacks to {unpacked:,} bytes, more than {ARCHIVE_BYTES:,}: give a "
                    "folder of images or an .npy stack, which are read as they are needed"
                )
            images, labels = archive[used[0]], archive.get(used[1])
            if not all(isinstance(a, np.ndarray | None) for a in (images, labels)):
                raise TypeError("a member that is no array")
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy raise what a wrong byte leads them to
        raise InputError(f"'{path}' cannot be read as an .npz with an array `images`") from error
    if images.ndim == 3 and how.reading.axes is None:
        images = images[..., None]
    with naming(path):
        kind = array_pages(images, how.reading)(0).info
    count = kind.pages
    names = [f"{path} image {i}" for i in range(count)]
    read = partial(_read_row, images, how)
    if how.background is None and kind.has_alpha:
        kind = replace(kind, channels=kind.channels + 1, has_alpha=False)
    kind = how.reading.of(replace(kind, pages=1))
    source = Source(names=names, read=read, kind=kind)
    if labels is None:
        return source
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,) or labels.dtype.kind not in "biuU":
        raise InputError(
            f"'{path}' has labels {labels.dtype} {labels.shape} for {counted(count, 'image')}: "
            "give a whole number or a name for each"
        )
    try:
        return _classified(source, labels.tolist())
    except (SystemError, ValueError) as error:  # names of bytes that are no letters
        raise InputError(f"'{path}' has labels that cannot be read") from error


def _read_row(images: Array, how: HowToRead, image: int) -> Array:
    page = array_pages(images, how.reading)(image)
    return read_page(page, how.reading, alpha=how.background is None, background=how.background)


def _classified(source: Source, labels: list[Any]) -> Source:
    """The source with classes from labels of any kind, in natural order."""
    names = sorted(set(labels), key=lambda label: natural_key(str(label)))
    index = {name: i for i, name in enumerate(names)}
    numbers = np.array([index[label] for label in labels], np.int64)
    return replace(source, classes=tuple(map(str, names)), labels=numbers)


def _in_files(path: Path, captions: bool, how: HowToRead) -> Source:
    """An image, stack or volume, or all of a folder with its subfolders, in natural order.

    Of a million files no more is kept than their names, as strings.
    """
    alone = is_volume(path) or not path.is_dir()
    found = _alone(str(path)) if alone else _walk(path)
    files, folders = found.files, found.folders
    stacks = {}  # file -> its pages, where it has several
    for file in files:
        if alone or file.lower().endswith((".tif", ".tiff", ".npy")):
            with suppress(InputError):  # which is raised again where the image is read
                if (count := image_info(Path(file), how.reading).pages) > 1:
                    stacks[file] = count
    names, pages = files, None
    if stacks:
        _check_slices(stacks, how)
        counts = [stacks.get(file, 1) for file in files]
        pages = [n for count in counts for n in (range(count) if count > 1 else [None])]
        files, folders = (
            [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            for values in (files, folders)
        )
        names = [
            file if page is None else f"{file} page {page}"
            for file, page in zip(files, pages, strict=True)
        ]
    tables, texts = found.tables, found.texts
    captioned = bool(tables or (texts and any(text_file(file, texts) for file in files)))
    if captions and not captioned and not alone:
        captioned = bool(tables := tables_above(path))
    source = Source(
        names=names,
        read=partial(_read_page, files, pages, how),
        files=files,
        root=path.parent if alone else path,
        left=found.left,
        how=how,
        captioned=captioned,
    )
    if captions and captioned:
        each, note = read_captions(files, tables, texts, how.caption_key)
        source = replace(source, captions=each.__getitem__, note=note)
    if "" in folders:
        return replace(source, below=Counter(filter(None, folders)))
    if len(set(folders)) < 2:
        return source
    return _classified(source, folders)


def _check_slices(stacks: Mapping[str, int], how: HowToRead) -> None:
    """Refuses files of 3 or 4 pages of which nothing is said: these may be the channels."""
    if how.reading.axes is not None or len(stacks) < 2:
        return
    for file in stacks:
        with naming(Path(file)):
            check_slices(Path(file), image_info(Path(file)))


def _in_shards(shards: Sequence[Path], captions: bool, how: HowToRead) -> Source:
    """The samples of shards; of a million no more is kept than their names, and places in tars."""
    found = read_shards(shards, masks=False, caption_key=how.caption_key)
    source = Source(
        names=found.images,
        read=partial(_read_page, found.images, None, how),
        files=found.images,
        left=left_out({"folder of masks": found.left}, "unpack it if one is meant"),
        how=how,
        captioned=found.caption is not None,
    )
    if captions and found.caption is not None:
        each = [found.caption.all_of(image) for image in found.images]
        source = replace(source, captions=each.__getitem__)
    if found.label is None:
        return source
    labels: list[Any] = [found.label.of(image) for image in found.images]
    with suppress(ValueError):  # numbers as those of an .npz, where all are
        labels = [int(label) for label in labels]
    return _classified(source, labels)


def _read_page(
    files: Sequence[str], pages: Sequence[int | None] | None, how: HowToRead, image: int
) -> Array:
    return how.image(Path(files[image]), pages[image] if pages else None)


@dataclass(frozen=True, kw_only=True)
class _Walked:
    """What is in a folder and below.

    Attributes:
        files: images in natural order.
        folders: the subfolder of each, "" for none or a part of a split such as train/.
        tables: every table of captions.
        texts: what may be caption files, by `text_key`.
        left: a note on what is left out.
    """

    files: list[str]
    folders: list[str]
    tables: list[Path] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    left: str = ""


def _alone(file: str) -> _Walked:
    texts = {}
    folder = os.path.dirname(file)
    with suppress(OSError):  # a folder that may not be listed
        beside = [os.path.join(folder, name) for name in os.listdir(folder or ".")]
        texts = {key: path for path in beside if (key := text_key(path))}
    return _Walked(files=[file], folders=[""], texts=texts)


def _walk(root: Path) -> _Walked:
    """What is in a folder and below, without hidden files, folders of masks and what this project
    wrote.
    """
    images: list[tuple[Any, str, tuple[str, ...]]] = []
    tables: list[Path] = []
    texts: dict[str, str] = {}
    ours: list[Path] = []
    unread: list[str] = []
    for folder, names in walk(root, ours):
        parts = Path(folder).relative_to(root).parts
        inside = [natural_key(part) for part in parts]
        start = "" if folder == "." else folder
        for name in names:
            path = os.path.join(start, name)
            if name.lower().endswith(SUFFIXES):
                images.append(([*inside, natural_key(name)], path, parts))
            elif is_table(Path(path)):
                tables.append(Path(path))
            elif key := text_key(path):
                texts[key] = path
            elif name.lower().endswith(_UNREAD):
                unread.append(path)
    predicted: set[str] = set()
    if any("_probability." in path for _, path, _ in images):
        predicted = set(map(str, predictions([Path(path) for _, path, _ in images])))
        images = [image for image in images if str(Path(image[1])) not in predicted]
    masks = mask_folders({Path(root, *parts) for _, _, parts in images}, root)
    if masks:
        below = [folder.relative_to(root).parts for folder in masks]
        images = [i for i in images if not any(i[2][: len(of)] == of for of in below)]
    beside = mask_files(Path(path) for _, path, _ in images)
    if beside:
        dropped = set(map(str, beside))
        images = [image for image in images if str(Path(image[1])) not in dropped]
    if predicted and not images:
        raise InputError(
            f"{str(root)!r}: nothing but predictions is in it: name the folder of the images"
        )
    if not images:
        raise no_images(root)
    images.sort()
    # Not of a class of that name: all images are in such folders, or none is in a split's.
    split = all(parts and parts[0].lower() in _SPLITS for _, _, parts in images)
    tops = ["".join(parts[split : split + 1]) for _, _, parts in images]
    notes = (
        left_out(
            {
                "folder of masks": masks,
                "file of masks": beside,
                "file of predictions": [*predicted],
                OURS: ours,
            }
        ),
        left_out({"picture of a format that is not read": unread}, "save these as PNG or JPEG"),
    )
    left = "\n".join(filter(None, notes))
    files = [path for _, path, _ in images]
    return _Walked(files=files, folders=tops, tables=tables, texts=texts, left=left)
