"""Captions of image files, in the usual formats.

`metadata.jsonl` (one JSON object per line) and `metadata.csv` name files relative to their folder,
as Hugging Face's imagefolder does; or a text file lies beside each image, such as `a.txt`,
`a.caption` or `a.jpg.txt` for `a.jpg`. A byte-order mark, Windows' backslashes, and semicolons or
tabs between columns are understood.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from unet.errors import InputError
from unet.words import counted

TABLES = ("metadata.jsonl", "metadata.csv")
_FILE_KEYS = ("file_name", "file", "image", "filename")
_TEXT_KEYS = ("text", "caption", "prompt")
_ENDINGS = (".txt", ".caption")  # of caption files
_LOOKED_AT = 100  # images that say whether there are any
_TEXT_BYTES = 2**16  # of one caption file


def has_text_files(files: Sequence[str]) -> bool:
    """Whether an image has a caption file beside it, of some that are evenly spread."""
    step = -(-len(files) // _LOOKED_AT)
    return any(os.path.isfile(_beside(file)) for file in files[::step])


def read_captions(
    files: Sequence[str], tables: Sequence[Path], key: str | None
) -> tuple[list[str], str]:
    """The caption of each file, of a table or else of the text file beside it; and a note on
    captions that are empty, and on those of files that are not among these.

    Args:
        key: of the captions in the tables; None: the first of text, caption and prompt that is
            there.

    Raises:
        InputError: files without a caption, a table or text that cannot be read.
    """
    known: dict[str, str] = {}
    named: dict[str, str] = {}  # files as the tables name them
    for table in tables:
        for number, entry in _rows(table):
            name, caption = _entry(entry, key, f"line {number} of '{table}'")
            file = _placed(table.parent, name)
            if known.setdefault(file, caption) != caption:
                raise InputError(
                    f"line {number} of '{table}' gives {name} another caption than an earlier one: "
                    "an image has one, so copy it for each of its captions, or leave one of them"
                )
            named[file] = name
    found: list[str] = []
    lacking = []
    for file in files:
        path = os.path.normpath(file)
        named.pop(path, None)
        text = known[path] if path in known else _text_beside(file)
        if text is None:
            lacking.append(file)
        else:
            found.append(text)
    others = next(iter(named.values()), "")
    if lacking:
        raise InputError(_no_caption(lacking, len(files), tables, others))
    if not any(found):
        raise InputError(f"all captions are empty, such as that of '{files[0]}'")
    empty = [file for file, text in zip(files, found, strict=True) if not text.strip()]
    note = ""
    if empty:
        note += f"; {counted(len(empty), 'image')} with an empty one, such as '{empty[0]}'"
    if named:
        of = "is of a file that is" if len(named) == 1 else "are of files that are"
        note += f"; {counted(len(named), 'caption')} {of} not among the images, such as {others!r}"
    return found, note


def _no_caption(lacking: Sequence[str], count: int, tables: Sequence[Path], others: str) -> str:
    """The message for images without a caption; `others` is a file that a table names instead."""
    beside = f"a file '{_beside(lacking[0])}' with its caption"
    if tables:
        what, needed = f"line in {tables[0].name}", f"one, or {beside}"
    else:
        what, needed = "caption file", beside
    have = "has" if len(lacking) == 1 else "have"
    said = f"{len(lacking):,} of {counted(count, 'image')} {have} no {what}"
    if others:
        said += f", which names files that are not there, such as {others!r}"
    return f"{said}: '{lacking[0]}' needs {needed}"


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        content = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{table}' cannot be read as UTF-8 text") from error
    if table.suffix == ".csv":
        header = content.partition("\n")[0]
        try:
            rows = csv.DictReader(
                io.StringIO(content, newline=""), delimiter=max(",;\t", key=header.count)
            )
            yield from ((rows.line_num, row) for row in rows)
        except csv.Error as error:
            raise InputError(f"'{table}' cannot be read as CSV: {error}") from error
        return
    for number, line in enumerate(content.split("\n"), start=1):  # not at U+2028
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError("no object")
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"line {number} of '{table}' must be an object such as "
                '{"file_name": "0.png", "text": "a red circle"}'
            ) from error
        yield number, entry


def _entry(entry: Mapping[str, Any], key: str | None, where: str) -> tuple[str, str]:
    """File name and caption of a row."""
    name = next((entry[k] for k in _FILE_KEYS if k in entry), None)
    chosen = (key,) if key else _TEXT_KEYS
    text = next((entry[k] for k in chosen if k in entry), None)
    if isinstance(name, str) and text is not None and not isinstance(text, str):
        raise InputError(f"{where}: the caption of {name} must be text, not {str(text)[:60]}")
    if not isinstance(name, str) or not isinstance(text, str):
        keys = ", ".join(map(str, entry))
        lacking = _FILE_KEYS[0] if not isinstance(name, str) else " or ".join(chosen)
        raise InputError(
            f"{where} must be like " + '{"file_name": "0.png", "text": "a red circle"}'
            f": it has {keys or 'nothing'}, but no {lacking}; --caption-key "
            "names that of the captions"
        )
    return name, text


def _placed(folder: Path, name: str) -> str:
    """The path that a table means: backslashes separate folders, and leading folders that are not
    below the table's own are cut."""
    parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
    direct = os.path.normpath(os.path.join(folder, *parts))
    if os.path.lexists(direct):
        return direct
    # A path from above, such as train/0.png in train/metadata.jsonl.
    for cut in range(1, len(parts)):
        candidate = os.path.normpath(os.path.join(folder, *parts[cut:]))
        if os.path.lexists(candidate):
            return candidate
    return direct


def _text_beside(file: str) -> str | None:
    """The caption in the text file beside an image; None: there is no such file."""
    path = _beside(file)
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as stream:
            data = stream.read(_TEXT_BYTES + 1)
        if len(data) > _TEXT_BYTES:
            raise InputError(f"{path!r} has more than {_TEXT_BYTES:,} bytes: no caption")
        return " ".join(data.decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path!r} cannot be read as UTF-8 text") from error


def _beside(file: str) -> str:
    """The caption file of an image; if there is none, the one that it should have."""
    stem = os.path.splitext(file)[0]
    found = [f"{start}{ending}" for start in (stem, file) for ending in _ENDINGS]
    return next((path for path in found if os.path.isfile(path)), found[0])
