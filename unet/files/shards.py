"""Image sets in a few large files: WebDataset's tars, and Parquet or Arrow files of `datasets`.

A member is named like a file below its shard, `x.tar/000012.png`, `x.parquet/12.image`, and so is
read at any place, by any process, wherever an image file is (`unet.files.images`). Of each shard
an index is made at first use, once in a process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from unet.errors import InputError, with_extras
from unet.files.folders import mask_folders
from unet.files.pages import SUFFIXES

ENDINGS = (".tar", ".parquet", ".arrow")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_MASKS = ("mask", "masks", "seg", "segmentation", "label", "labels", "annotation", "target", "gt")
_CLASSES = ("cls", "label", "class", "labels", "category", "fine_label")
_CAPTIONS = ("txt", "text", "caption", "captions", "prompt")
_TEXT_BYTES = 2**16


class Shard(Protocol):
    """A file of samples, each with a key and named parts."""

    def samples(self) -> Iterator[tuple[str, tuple[str, ...]]]: ...

    def holds_picture(self, part: str) -> bool: ...

    def read(self, key: str, part: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Field:
    """What a sample has beside its pictures: a part, or a key of a part in JSON."""

    part: str
    key: str = ""

    def of(self, image: str) -> str:
        """What is said of an image, as text.

        Raises:
            InputError: the part or key is missing, or is no text or number.
        """
        return self._texts(image, several=False)[0]

    def all_of(self, image: str) -> tuple[str, ...]:
        """The same, of a list each entry.

        Raises:
            InputError: as `of`; an empty list.
        """
        return self._texts(image, several=True)

    def _texts(self, image: str, *, several: bool) -> tuple[str, ...]:
        where = beside(image, self.part)
        try:
            value = _read(Path(where))
            if isinstance(value, bytes):
                if len(value) > _TEXT_BYTES:
                    raise InputError(f"it has more than {_TEXT_BYTES:,} bytes")
                value = value.decode("utf-8-sig")
            if self.key:
                value = json.loads(value)[self.key]
            values = value if several and isinstance(value, list) and value else [value]
            for one in values:
                if isinstance(one, bool) or not isinstance(one, str | int):
                    raise TypeError(f"{one!r} is no text or whole number")
            return tuple(" ".join(str(one).split()) for one in values)
        except InputError as error:
            raise InputError(f"{where!r}: {error}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            key = f" with a {self.key!r}" if self.key else ""
            raise InputError(f"{where!r} cannot be read as text{key} ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """The samples of all shards, in their order.

    Attributes:
        images, masks: the member of each sample; no masks where none were asked for.
        parts: "train" or "val", where the names of the shards say it.
        label, caption: the field of the class and of the caption, if the first sample has it.
        left: folders of masks, whose samples are left out.
    """

    images: list[str]
    masks: list[str]
    parts: list[str]
    label: Field | None
    caption: Field | None
    left: list[str]


def find_shards(data: Path) -> list[Path]:
    """The shards that a path names: a file, `x-{000..012}.tar`, or a folder of nothing else.

    Of what `save_to_disk` wrote they are those of its state.json. Empty where it names none.

    Raises:
        InputError: one of a pattern is missing.
    """
    if data.name.lower().endswith((*ENDINGS, *_COMPRESSED)) and not os.path.isdir(data):
        files = [data] if os.path.isfile(data) else [Path(name) for name in _expanded(str(data))]
        if gone := [str(file) for file in files if not os.path.isfile(file)]:
            raise InputError(f"there is no shard {gone[0]!r}, one of the {len(files)} of '{data}'")
        return files
    try:
        shown = sorted(path for path in data.iterdir() if not path.name.startswith("."))
    except (OSError, ValueError):  # of an impossible name
        return []
    if (data / "state.json").is_file():
        try:
            said = json.loads((data / "state.json").read_text(encoding="utf-8"))
            return [data / Path(one["filename"]).name for one in said["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
    if (data / "dataset_dict.json").is_file():
        return [file for path in shown if path.is_dir() for file in find_shards(path)]
    files = [path for path in shown if path.name.lower().endswith((*ENDINGS, *_COMPRESSED))]
    below = [path for path in shown if path.is_dir()]
    if [path.name for path in below] == ["data"] and not files:  # as data sets lie on the Hub
        return [] if any(p.name.lower().endswith(SUFFIXES) for p in shown) else find_shards(*below)
    if any(p.is_dir() or p.name.lower().endswith(SUFFIXES) for p in shown):
        return []
    # Beside each tar img2dataset writes a table of what is in it.
    tars = {path.stem for path in files if path.suffix.lower() == ".tar"}
    return [p for p in files if p.suffix.lower() != ".parquet" or p.stem not in tars]


def read_shards(files: Sequence[Path], *, masks: bool, caption_key: str | None = None) -> Sharded:
    """The samples of the shards. Files that are named test are left out, if others are named train.

    Args:
        masks: every sample has a mask, too; else shards for validation are left out as well, and
            what lies in folders of masks beside images, as where a data folder was packed.

    Raises:
        InputError: a shard that cannot be read, a sample without an image or mask, or with several.
    """
    named = [_part_of(file) for file in files]
    if "train" in named:
        kept = ("train", "val", "") if masks else ("train", "")
        files, named = zip(  # type: ignore[assignment]
            *((f, n) for f, n in zip(files, named, strict=True) if n in kept), strict=True
        )
    else:
        named = [""] * len(files)
    images: list[str] = []
    targets: list[str] = []
    parts: list[str] = []
    left: list[str] = []
    first: tuple[str, Shard, tuple[str, ...]] | None = None
    for file, part in zip(files, named, strict=True):
        try:
            shard = _opened(file)
            chosen: dict[tuple[str, ...], tuple[str, str]] = {}
            count = len(images)
            samples = list(shard.samples())
            folders = {key.rpartition("/")[0] for key, _ in samples}
            of_masks = [folder.as_posix() for folder in mask_folders(map(Path, folders), Path())]
            if of_masks and masks:
                raise InputError(
                    f"the masks in it lie in a folder of their own, {of_masks[0]}, but a sample "
                    "needs its image and its mask under one name: unpack it, and name the folder "
                    "that comes out of it"
                )
            left += [f"{file}/{folder}" for folder in of_masks]
            for key, found in samples:
                if any(key.startswith(f"{folder}/") for folder in of_masks):
                    continue
                if found not in chosen:
                    chosen[found] = _pictures(shard, key, found, masks)
                images.append(f"{file}/{key}.{chosen[found][0]}")
                if masks:
                    targets.append(f"{file}/{key}.{chosen[found][1]}")
                first = first or (images[0], shard, found)
            if len(images) == count:
                raise InputError("it holds no sample")
        except InputError as error:
            raise InputError(f"{str(file)!r}: {error}") from error.__cause__
        parts += [part] * (len(images) - count)
    assert first is not None
    captions = (caption_key,) if caption_key else _CAPTIONS
    return Sharded(
        images=images,
        masks=targets,
        parts=parts,
        label=_field(*first, _CLASSES),
        caption=_field(*first, captions),
        left=left,
    )


def is_member(path: Path) -> bool:
    """Whether a path goes on behind the name of a shard."""
    return _split(path) is not None


def read_member(path: Path) -> bytes:
    """The bytes of a picture in a shard.

    Raises:
        InputError: no such member, or cut off.
    """
    data = _read(path)
    if not isinstance(data, bytes):
        raise InputError("it holds no picture")
    return data


def beside(image: str, part: str) -> str:
    """The member of another part of the same sample."""
    folder, _, name = image.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}.{part}"


def key_of(image: str) -> tuple[str, str]:
    """The shard of a member, and the key of its sample."""
    found = _split(Path(image))
    assert found is not None
    folder, slash, name = found[1].rpartition("/")
    return found[0].name, f"{folder}{slash}{name.partition('.')[0]}"


def _read(path: Path) -> Any:
    found = _split(path)
    assert found is not None
    folder, slash, name = found[1].rpartition("/")
    stem, _, part = name.partition(".")
    return _opened(found[0]).read(f"{folder}{slash}{stem}", part)


def _split(path: Path) -> tuple[Path, str] | None:
    for at, name in enumerate(path.parts[:-1], start=1):
        if name.lower().endswith(ENDINGS) and os.path.isfile(file := Path(*path.parts[:at])):
            return file, "/".join(path.parts[at:])
    return None


def _opened(path: Path) -> Shard:
    state = path.stat()
    return _indexed(path, state.st_size, state.st_mtime_ns)


@cache
def _indexed(path: Path, size: int, changed: int) -> Shard:
    if path.suffix.lower() in (".parquet", ".arrow"):
        with with_extras():
            from unet.files.tables import Table
        return Table(path)
    from unet.files.tars import Tar

    return Tar(path)


def _pictures(shard: Shard, key: str, parts: Sequence[str], masks: bool) -> tuple[str, str]:
    """The parts of a sample that are its image and its mask."""
    held = [part for part in parts if shard.holds_picture(part)]
    targets = [part for part in held if _is_mask(part)]
    images = [part for part in held if part not in targets]
    # Beside pictures arrays are most often features of them.
    images = [part for part in images if not part.lower().endswith("npy")] or images
    chosen = []
    for what, found, wanted in (("image", images, True), ("mask", targets, masks)):
        named = [part for part in found if part.partition(".")[0].lower() == what]
        found = named or found
        chosen += found[:1]
        if wanted and len(found) != 1:
            several = f"{len(found)} that could be the {what}" if found else f"no {what}"
            like = "image.png, a column image" if what == "image" else "mask.png, a column mask"
            raise InputError(
                f"sample {key!r} has {several} among {', '.join(parts)}: name one as in {like}"
            )
    return chosen[0], chosen[1] if masks else ""


def _is_mask(part: str) -> bool:
    return any(word in _MASKS for word in re.split(r"[._]", part.lower()))


def _field(
    image: str, shard: Shard, parts: Sequence[str], names: Sequence[str | None]
) -> Field | None:
    """What the first sample has of these names, itself or in JSON."""
    for name in names:
        for part in parts:
            if part.lower() == name and not shard.holds_picture(part):
                return Field(part=part)
    if "json" in parts:
        try:
            said = json.loads(_read(Path(beside(image, "json"))))
        except (ValueError, TypeError, RecursionError):
            return None
        found = [name for name in names if name and isinstance(said, dict) and name in said]
        return Field(part="json", key=found[0]) if found else None
    return None


def _part_of(file: Path) -> str:
    """What the name of a shard, or of the folder that `save_to_disk` made, says it is for."""
    saved = file.suffix.lower() == ".arrow"
    for word in re.split(r"[^a-z]+", (file.parent.name if saved else file.name).lower()):
        if word in _PARTS or word in ("test", "testing"):
            return _PARTS.get(word, "test")
    return ""


def _expanded(pattern: str) -> list[str]:
    """x-{000..002}.tar is three names, x-{a,b}.tar two, as in a shell."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    if listed is not None:
        middle = listed.split(",")
    else:
        if int(last) < int(first) or int(last) - int(first) >= 10**6:
            raise InputError(f"'{pattern}': give {{first..last}} with first <= last")
        middle = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    start, end = pattern[: found.start()], pattern[found.end() :]
    return list(chain.from_iterable(_expanded(start + one + end) for one in middle))
