"""Parquet and Arrow files of samples, one per row, mapped from the disk by Hugging Face `datasets`.

A Parquet file is converted once, into the cache of that library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from unet.errors import InputError, said


class Table:
    """The rows of a file.

    Raises:
        InputError: damaged, or without rows.
    """

    def __init__(self, path: Path) -> None:
        shown = datasets.utils.is_progress_bar_enabled()
        datasets.utils.disable_progress_bars()
        try:
            if path.suffix.lower() == ".parquet":
                found = datasets.Dataset.from_parquet(str(path))
            else:
                found = datasets.Dataset.from_file(str(path))
        except Exception as error:  # of pyarrow, or the builder's own around it
            reason = said(error.__cause__ or error)
            raise InputError(f"not a Parquet or Arrow file, or a damaged one ({reason})") from error
        finally:
            if shown:
                datasets.utils.enable_progress_bars()
        self._data, self._features = found.data, found.features

    def samples(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The number of each row, and the names of the columns."""
        columns = tuple(self._data.column_names)
        for row in range(self._data.num_rows):
            yield str(row), columns

    def holds_picture(self, part: str) -> bool:
        kind = self._data.schema.field(part).type
        if pyarrow.types.is_struct(kind):
            return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    def read(self, key: str, part: str) -> Any:
        """A value: of a picture its bytes, of a class its name."""
        if part not in self._data.column_names:
            raise InputError("the file has no such column")
        value = self._data.column(part)[int(key)].as_py()
        if isinstance(value, dict) and "bytes" in value:
            if value["bytes"] is None:
                raise InputError(f"it names the file {value.get('path')!r} instead of holding it")
            return value["bytes"]
        feature = self._features[part]
        known = isinstance(feature, datasets.ClassLabel) and value is not None and value >= 0
        return feature.int2str(value) if known else value
