"""Captions of image files, in the usual formats.

A table names files relative to its folder, as in Hugging Face's imagefolder: `metadata.jsonl` (one
JSON object per line) or `metadata.csv`, or the same called `captions`, as in Flickr8k and COCO. Or
a text file lies beside each image, such as `a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`. A
byte-order mark, Windows' backslashes, and semicolons, tabs or bars between columns are understood.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from unet.errors import InputError
from unet.files.writing import read_any_json
from unet.words import counted

_TABLES = re.compile(r"(metadata|captions)\.(jsonl|csv)|captions\.(tsv|json)|captions_.+\.json")
_IF_HEADED = ("captions.txt", "results.csv")  # Flickr8k's and Flickr30k's, and names of much else
_FILE_KEYS = ("file_name", "file", "image", "filename", "image_name")
_TEXT_KEYS = ("text", "caption", "prompt", "captions", "comment")
_DELIMITERS = ",;\t|"
_ENDINGS = (".txt", ".caption")  # of caption files
_TEXT_BYTES = 2**16  # of one caption file, and of the header of a table
_JSON_BYTES = 2**29  # of a table
_LIKE = '{"file_name": "0.png", "text": "a red circle"}'

Captions = tuple[str, ...]  # of one image


def is_table(path: Path) -> bool:
    """Whether a file is a table of captions, by its name; of some names by its first line."""
    name = path.name.lower()
    if name not in _IF_HEADED:
        return _TABLES.fullmatch(name) is not None
    try:
        with path.open("rb") as file:
            header = file.readline(_TEXT_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    columns = {column.strip().strip('"') for column in header.split(_delimiter(header))}
    return all(columns.intersection(keys) for keys in (_FILE_KEYS, _TEXT_KEYS))


def tables_above(folder: Path) -> list[Path]:
    """Tables beside a folder of images, and those in `annotations` beside it; of several only the
    ones that are named after the folder, as are those of COCO.
    """
    above = Path(os.path.normpath(folder / ".."))
    found = []
    for place in (above, above / "annotations"):
        with suppress(OSError):  # not there, or not to be listed
            found += [path for path in sorted(place.iterdir()) if is_table(path)]
    name = Path(os.path.abspath(folder)).name
    return [path for path in found if name in path.stem.partition("_")[2]] or found


def text_file(image: str, texts: Mapping[str, str]) -> str | None:
    """The caption file of an image, of files by `text_key`; None: it has none."""
    beside = (f"{start}{ending}" for start in (_stem(image), image) for ending in _ENDINGS)
    return next((texts[path] for path in beside if path in texts), None)


def text_key(path: str) -> str | None:
    """The path with its ending in small letters, if it may be a caption file."""
    stem, ending = os.path.splitext(path)
    return stem + ending.lower() if ending.lower() in _ENDINGS else None


def read_captions(
    files: Sequence[str], tables: Sequence[Path], texts: Mapping[str, str], key: str | None
) -> tuple[list[Captions], str]:
    """The captions of each file, of a table or else of the text file beside it; and a note on
    images with several or an empty one, and on captions of files that are not among these.

    Args:
        texts: caption files by `text_key`.
        key: of the captions in the tables; None: the first of text, caption, prompt, captions and
            comment that is there.

    Raises:
        InputError: files without a caption, a table or text that cannot be read.
    """
    known: dict[str, dict[str, None]] = defaultdict(dict)  # of each file, in order
    named: dict[str, str] = {}  # files as the tables name them
    places = _Places(files if tables else ())
    for table in tables:
        folder = os.path.normpath(table.parent)
        for where, entry in _rows(table, key):
            name, found = _entry(entry, key, where)
            file = places.meant(folder, name)
            known[file].update(dict.fromkeys(found))
            named[file] = name
    captions: list[Captions] = []
    lacking = []
    for file in files:
        path = os.path.normpath(file)
        named.pop(path, None)
        if path in known:
            captions.append(tuple(filter(str.strip, known[path])) or ("",))
        elif text := text_file(file, texts):
            captions.append((_text(text),))
        else:
            lacking.append(file)
    others = next(iter(named.values()), "")
    if lacking:
        raise InputError(_no_caption(lacking, len(files), tables, others))
    if not any(map(any, captions)):
        raise InputError(f"all captions are empty, such as that of '{files[0]}'")
    note = ""
    if (most := max(map(len, captions))) > 1:
        note += f"; up to {most} of an image, which take turns"
    empty = [file for file, found in zip(files, captions, strict=True) if found == ("",)]
    if empty:
        note += f"; {counted(len(empty), 'image')} with an empty one, such as '{empty[0]}'"
    if named:
        what = counted(len(named), "image")
        note += f"; {what} with captions not among these, such as {others!r}"
    return captions, note


def _no_caption(lacking: Sequence[str], count: int, tables: Sequence[Path], others: str) -> str:
    """The message for images without a caption; `others` is a file that a table names instead."""
    beside = f"a file '{_stem(lacking[0])}{_ENDINGS[0]}' with its caption"
    if tables:
        what, needed = f"line in {tables[0].name}", f"one, or {beside}"
    else:
        what, needed = "caption file", beside
    have = "has" if len(lacking) == 1 else "have"
    said = f"{len(lacking):,} of {counted(count, 'image')} {have} no {what}"
    if others:
        said += f", which names files that are not there, such as {others!r}"
    return f"{said}: '{lacking[0]}' needs {needed}"


def _rows(table: Path, key: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table, and where each stands."""
    if table.suffix.lower() == ".json":
        yield from _json_rows(table, key)
        return
    try:
        content = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{table}' cannot be read as UTF-8 text") from error
    if table.suffix.lower() == ".jsonl":
        for number, line in enumerate(content.split("\n"), start=1):  # not at U+2028
            if line.strip():
                where = f"line {number} of '{table}'"
                yield where, _object(line, f"{where} must be an object such as {_LIKE}")
        return
    delimiter = _delimiter(content.partition("\n")[0])
    try:
        rows = csv.DictReader(
            io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        for row in rows:
            where = f"line {rows.line_num} of '{table}'"
            if any(row.pop(None, ())):
                raise InputError(
                    f"{where} has more columns than the {len(row)} of the header: put captions "
                    f"that hold a {delimiter!r} in double quotes"
                )
            yield where, {name.strip(): value for name, value in row.items()}
    except csv.Error as error:
        raise InputError(f"'{table}' cannot be read as CSV: {error}") from error


def _json_rows(table: Path, key: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of a list of objects, of COCO's `images` and `annotations`, or of captions by file name."""
    held = read_any_json(table, _JSON_BYTES)
    try:
        if isinstance(held, dict) and "annotations" in held:
            files = {image["id"]: image["file_name"] for image in held["images"]}
            held = [{**one, "file_name": files[one["image_id"]]} for one in held["annotations"]]
        elif isinstance(held, dict):
            held = [{"file_name": name, key or _TEXT_KEYS[0]: text} for name, text in held.items()]
        rows = [dict(row) for row in held]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"'{table}' must hold a list of objects such as {_LIKE}, an object of captions by file "
            "name, or `images` and `annotations` as COCO's do"
        ) from error
    yield from ((f"entry {i} of '{table}'", row) for i, row in enumerate(rows, start=1))


def _object(line: str, message: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(message) from error
    if not isinstance(entry, dict):
        raise InputError(message)
    return entry


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _entry(entry: Mapping[str, Any], key: str | None, where: str) -> tuple[str, list[str]]:
    """File name and captions of a row."""
    name = next((entry[k] for k in _FILE_KEYS if k in entry), None)
    chosen = (key,) if key else _TEXT_KEYS
    text = next((entry[k] for k in chosen if k in entry), None)
    several: list[Any] = text if isinstance(text, list) and text else [text]
    if isinstance(name, str) and all(isinstance(one, str) for one in several):
        return name, [" ".join(one.split()) for one in several]
    if isinstance(name, str) and text is not None:
        raise InputError(f"{where}: the caption of {name} must be text, not {str(text)[:60]}")
    keys = ", ".join(map(str, entry))
    lacking = _FILE_KEYS[0] if not isinstance(name, str) else " or ".join(chosen)
    raise InputError(
        f"{where} must be like {_LIKE}: it has {keys or 'nothing'}, but no {lacking}; "
        "--caption-key names that of the captions"
    )


class _Places:
    """Which of the files a table means."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = set(map(os.path.normpath, files))
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for file in self.files:
            self.by_name[os.path.basename(file)].append(file)
        self.meant, self._apart = cache(self._meant), cache(self._is_apart)

    def _meant(self, folder: str, name: str) -> str:
        """The path of the image that a table in this folder calls `name`.

        Backslashes separate folders, and leading folders that are not below the table's own are
        cut, as of train/0.png in train/metadata.jsonl. A name alone may also be that of one image
        in a folder below; or of any, where the table lies apart from all.
        """
        parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
        for cut in range(len(parts)):
            path = os.path.normpath(os.path.join(folder, *parts[cut:]))
            if path in self.files:
                return path
        found = self.by_name.get(name, [])
        below = [file for file in found if _is_below(file, folder)]
        if len(below) == 1:
            return below[0]
        if len(found) == 1 and self._apart(folder):
            return found[0]
        return os.path.normpath(os.path.join(folder, *parts))

    def _is_apart(self, folder: str) -> bool:
        return not any(_is_below(file, folder) for file in self.files)


def _is_below(file: str, folder: str) -> bool:
    return folder == "." or file.startswith(os.path.join(folder, ""))


def _text(path: str) -> str:
    """The caption in a text file."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(_TEXT_BYTES + 1)
        if len(data) > _TEXT_BYTES:
            raise InputError(f"{path!r} has more than {_TEXT_BYTES:,} bytes: no caption")
        return " ".join(data.decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path!r} cannot be read as UTF-8 text") from error


def _stem(image: str) -> str:
    return os.path.splitext(image)[0]
