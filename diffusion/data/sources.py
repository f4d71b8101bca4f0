"""Where training images come from: files, archives and drawn shapes, each a numbered `Source`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.data.shapes import HELD_OUT, SIDE, example, example_caption
from unet.errors import InputError
from unet.files.images import SUFFIXES, Array, ImageInfo, image_info, natural_key, read_image
from unet.words import counted

DRAWN = 20_000  # pictures of shapes
_ARRAYS = ("images.npy", "labels.npy")  # of an .npz
ARCHIVE_BYTES = 2**32  # an .npz is unpacked into memory as a whole


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images of any depth, by number; what reads them can be sent to worker processes."""

    names: Sequence[str]  # for messages
    read: Callable[[int], Array]
    kind: ImageInfo | None = None  # of all images; None: each is a file with a header of its own
    files: Sequence[str] = ()
    classes: tuple[str, ...] = ()
    labels: NDArray[np.int64] | None = None
    captioned: bool = False
    caption: Callable[[int], str] = str
    note: str = ""

    def info(self, image: int) -> ImageInfo:
        return self.kind or image_info(Path(self.files[image]))


def open_source(data: str | Path, captions: bool, size: int | None, seed: int) -> Source:
    """The source that `data` names, as `DiffusionData` does.

    Raises:
        InputError: nothing there, a damaged archive, a bad metadata.jsonl.
    """
    path = Path(data)
    if str(data) == "shapes":
        return _drawn(size or SIDE, seed)
    if not os.path.exists(path):  # False for an impossible name, too
        raise InputError(f"'{data}': no such file or folder")
    return _archive(path) if path.suffix.lower() == ".npz" else _in_files(path, captions)


def _drawn(side: int, seed: int) -> Source:
    never = ", ".join(sorted(" ".join(pair) for pair in HELD_OUT))
    return Source(
        names=[f"shapes {i}" for i in range(DRAWN)],
        read=partial(_draw, seed, side),
        kind=ImageInfo(height=side, width=side, channels=3, dtype="uint8"),
        captioned=True,
        caption=partial(example_caption, seed),
        note=f"; left for evaluation: {never}",
    )


def _draw(seed: int, side: int, image: int) -> Array:
    return example(seed, image, side)[1].picture


def _archive(path: Path) -> Source:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            members = archive.zip.infolist()
            unpacked = sum(m.file_size for m in members if m.filename in _ARRAYS)
            if unpacked > ARCHIVE_BYTES:
                raise InputError(
                    f"'{path}' unpacks to {unpacked:,} bytes, more than {ARCHIVE_BYTES:,}: give a "
                    "folder of images or an .npy stack, which are read as they are needed"
                )
            images, labels = archive["images"], archive.get("labels")
            if not all(isinstance(a, np.ndarray | None) for a in (images, labels)):
                raise TypeError("a member that is no array")
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy raise what a wrong byte leads them to
        raise InputError(f"'{path}' cannot be read as an .npz with an array `images`") from error
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[3:] not in ((1,), (3,), (4,)) or not images.size:
        raise InputError(
            f"'{path}' has images {images.dtype} {images.shape}: give uint8 (N, H, W) or "
            "(N, H, W, C), C = 1 or 3"
        )
    count, height, width, channels = images.shape
    kind = ImageInfo(
        height=height,
        width=width,
        channels=min(channels, 3),
        dtype="uint8",
        has_alpha=channels == 4,
    )
    names = [f"{path} image {i}" for i in range(count)]
    source = Source(names=names, read=images[..., :3].__getitem__, kind=kind)
    if labels is None:
        return source
    if labels.shape != (count,) or labels.dtype.kind not in "biuU":
        raise InputError(
            f"'{path}' has labels {labels.dtype} {labels.shape} for {counted(count, 'image')}: "
            "give a whole number or a name for each"
        )
    return _classified(source, labels.tolist())


def _classified(source: Source, labels: list[Any]) -> Source:
    """The source with classes from labels of any kind, in natural order."""
    names = sorted(set(labels), key=lambda label: natural_key(str(label)))
    index = {name: i for i, name in enumerate(names)}
    numbers = np.array([index[label] for label in labels], np.int64)
    return replace(source, classes=tuple(map(str, names)), labels=numbers)


def _in_files(path: Path, captions: bool) -> Source:
    """An image or stack, or all of a folder with its subfolders, in natural order.

    Of a million files no more is kept than their names, as strings.
    """
    files, folders, tables = _walk(path) if path.is_dir() else ([str(path)], [""], [])
    stacks = {}  # file -> its pages, where it has several
    for file in files:
        if file.lower().endswith((".tif", ".tiff", ".npy")):
            with suppress(InputError):  # which is raised again where the image is read
                if (count := image_info(Path(file)).pages) > 1:
                    stacks[file] = count
    names, pages = files, None
    if stacks:
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
    source = Source(
        names=names,
        read=partial(_read_page, files, pages),
        files=files,
        captioned=bool(tables),
    )
    if captions and tables:
        table = _read_captions(tables)
        missing = next((file for file in files if file not in table), None)
        if missing:
            raise InputError(f"'{missing}' has no line in metadata.jsonl: add its caption")
        source = replace(source, caption=[table[file] for file in files].__getitem__)
    if "" in folders or len(set(folders)) < 2:
        return source
    return _classified(source, folders)


def _read_page(files: Sequence[str], pages: Sequence[int | None] | None, image: int) -> Array:
    return read_image(Path(files[image]), pages[image] if pages else None)


def _walk(root: Path) -> tuple[list[str], list[str], list[Path]]:
    """Images in natural order, in a folder and below, without hidden ones; the subfolder of each,
    "" for none; and every metadata.jsonl.
    """
    images: list[tuple[Any, str, str]] = []
    tables = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        parts = Path(folder).relative_to(root).parts
        inside = [natural_key(part) for part in parts]
        top, start = parts[0] if parts else "", "" if folder == "." else folder
        for name in names:
            if name == "metadata.jsonl":
                tables.append(Path(folder, name))
            elif name.lower().endswith(SUFFIXES) and not name.startswith("."):
                images.append(([*inside, natural_key(name)], os.path.join(start, name), top))
    if not images:
        raise InputError(f"'{root}': no image in this folder ({', '.join(SUFFIXES)})")
    images.sort()
    return [path for _, path, _ in images], [top for _, _, top in images], tables


def _read_captions(tables: Iterable[Path]) -> dict[str, str]:
    """The captions of the files that each metadata.jsonl names, relative to its folder."""
    captions = {}
    for table in tables:
        try:
            lines = table.read_text(encoding="utf-8").split("\n")  # not at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{table}' cannot be read as UTF-8 text") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError("no text")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"line {number} of '{table}' is none such as "
                    '{"file_name": "0.png", "text": "a red circle"}'
                ) from error
            captions[str(table.parent / name)] = text
    return captions
