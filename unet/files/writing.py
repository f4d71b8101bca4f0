"""Files that are whole or not there: written under a temporary name, flushed, renamed.

And JSON files, read with a limit.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unet.errors import InputError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}  # of an OSError
JSON_BYTES = 2**24  # no config is larger


def file_trouble(error: OSError) -> str | None:
    """A sentence on the file or disk that an error is about; None: it is about neither."""
    if error.filename is None and error.errno not in DISK_FULL:
        return None
    text = error.strerror or str(error)
    if error.filename is not None:
        text = f"cannot use '{os.fsdecode(error.filename)}': {text}"
    if error.errno in DISK_FULL:
        text += "; free some space or choose a folder on another disk"
    return text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end it takes the place of `path`.

    A kill at any moment leaves the previous file whole. An error removes the temporary file. The
    temporary name is `.NAME.*.tmp`, so that what a kill leaves behind can be told and removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) so that a reader finds the old one or the new one, whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file, as `read_any_json`.

    Raises:
        InputError: as `read_any_json`; no object.
    """
    values = read_any_json(file, most)
    if not isinstance(values, dict):
        raise InputError(
            f"{file} cannot be read as JSON: it must hold one JSON object, not a "
            f"{type(values).__name__}"
        )
    return values


def read_any_json(file: Path, most: int = JSON_BYTES) -> Any:
    """What a JSON file in UTF-8 holds; only regular files are read, no devices.

    Args:
        most: bytes; an eighth as many values are read.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        with file.open("rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        if data.count(b",") + data.count(b"[") + data.count(b"{") > most // 8:
            raise ValueError(f"it has more than {most // 8:,} values")
        return json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
