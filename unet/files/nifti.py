"""NIfTI files: the axes X, Y, Z and T turned to slices (T, Z) of rows (Y) and columns (X)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from unet.errors import InputError
from unet.files.pages import Array, Volume

_UNITS = {"mm": "millimeter", "meter": "meter", "micron": "micrometer", "sec": "second"}
_UNITS |= {"msec": "millisecond", "usec": "microsecond"}


@dataclass(frozen=True)
class _Turned:
    """An array on the disk with its axes in the opposite order."""

    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape[::-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        # Scaled values are floats, as the file's slope and intercept make them.
        scaled = (self.stored.slope, self.stored.inter) != (1, 0)
        return np.dtype(np.float32) if scaled else np.dtype(self.stored.dtype)

    def __getitem__(self, key: tuple[int | slice, ...]) -> Array:
        return np.asarray(self.stored[key[::-1]]).T.astype(self.dtype, copy=False)


@contextmanager
def open_nifti(path: Path) -> Iterator[Volume]:
    """The array of a .nii or .nii.gz file, with scl_slope and scl_inter applied.

    A compressed file is unpacked as far as the slice that is read, and on from there for the next.

    Raises:
        InputError: there is none; pixels that are structures, such as RGB.
    """
    if not path.is_file():
        raise InputError("no such file")
    state = path.stat()
    image = _opened(str(path), state.st_mtime_ns, state.st_size, os.getpid())
    if image.dataobj.dtype.kind not in "biuf":
        raise InputError(
            f"its pixels are {image.dataobj.dtype}: save each part as a file of its own"
        )
    count = len(image.shape)
    if not 2 <= count <= 4:
        raise InputError(f"it has {count} axes {image.shape}, but only X, Y, Z and T can be read")
    space, time = image.header.get_xyzt_units()
    units = ("" if time is None else _UNITS.get(time, ""), *(_UNITS.get(space or "", ""),) * 3)
    header, known = image.header, space in (None, "unknown", "mm") and count == 3
    placed = known and (int(header["sform_code"]) or int(header["qform_code"]))
    scale = tuple(abs(float(zoom)) or 1.0 for zoom in image.header.get_zooms()[::-1])
    yield Volume(
        array=_Turned(image.dataobj),
        axes="TZYX"[-count:],
        chunks=(1,) * (count - 2) + image.shape[1::-1],
        scale=scale,
        units=units[-count:],
        places=np.asarray(image.affine, np.float64)[:, [2, 1, 0, 3]] if placed else None,
    )


@lru_cache(maxsize=2)
def _opened(path: str, _changed: int, _size: int, _process: int) -> Any:
    """The file, kept open: a forked process, or another file of this name, opens its own."""
    return nibabel.Nifti1Image.from_filename(path, keep_file_open=True)
