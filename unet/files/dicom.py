"""Folders of a DICOM series: one file per slice, in the order of their positions along the
normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from unet.errors import InputError, said
from unet.files.pages import Array, Volume
from unet.files.volumes import is_dicom


@dataclass(frozen=True)
class _Slice:
    file: Path
    place: float  # mm along the normal, or the instance number
    slope: float
    intercept: float


@dataclass(frozen=True)
class _Series:
    """Slices (Z, Y, X) or colours (Z, Y, X, C), each decoded from its file when it is asked for."""

    slices: Sequence[_Slice]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, key: tuple[int | slice, ...]) -> Array:
        at, *rest = key
        if isinstance(at, int):
            return self._decoded(self.slices[at])[tuple(rest)]
        return np.stack([self._decoded(one)[tuple(rest)] for one in self.slices[at]])

    def _decoded(self, one: _Slice) -> Array:
        try:
            array = np.asarray(pydicom.dcmread(one.file).pixel_array)
        except Exception as error:  # of a decoder, or of the one that is missing
            raise InputError(
                f"the pixels of {one.file.name} cannot be decoded ({said(error)}): save the "
                "series uncompressed, or install the decoder that is named"
            ) from error
        if array.shape != self.shape[1:]:
            raise InputError(f"{one.file.name} holds pixels {array.shape}, not {self.shape[1:]}")
        if self.dtype == np.float32:
            return array.astype(np.float32) * np.float32(one.slope) + np.float32(one.intercept)
        return array


@contextmanager
def open_dicom(path: Path) -> Iterator[Volume]:
    """The slices of a folder that holds one series, with their slope and intercept applied.

    Raises:
        InputError: files of several series, or of other sizes; several images in a file.
    """
    yield _opened(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _opened(folder: Path, _changed: int) -> Volume:
    shown = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    heads = {p: pydicom.dcmread(p, stop_before_pixels=True) for p in shown if is_dicom(p)}
    heads = {p: head for p, head in heads.items() if "Rows" in head}  # DICOMDIR has no pixels
    if not heads:
        raise InputError("no file of it holds an image")
    series: dict[str, list[Path]] = {}
    for file, head in heads.items():
        series.setdefault(str(head.get("SeriesInstanceUID", "")), []).append(file)
    if len(series) > 1:
        each = ", ".join(f"{len(files)} with {files[0].name}" for files in series.values())
        raise InputError(
            f"which series is meant? Its files are of {len(series)} series ({each}): give each a "
            "folder of its own"
        )
    first = next(iter(heads.values()))
    for file, head in heads.items():
        if int(head.get("NumberOfFrames", 1) or 1) > 1:
            raise InputError(f"{file.name} holds several images: save each as a file of its own")
        if head.get("PhotometricInterpretation") == "MONOCHROME1":
            raise InputError(f"{file.name} has white as zero (MONOCHROME1): save it as MONOCHROME2")
        kinds = [_kind(one) for one in (head, first)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{file.name} is {kinds[0]}, but the first one is {kinds[1]}")
    slices = sorted((_slice(*item) for item in heads.items()), key=lambda s: (s.place, s.file.name))
    rows, columns, samples, dtype = _kind(first)
    plain = all((s.slope, s.intercept) == (1, 0) for s in slices)
    colours = (samples,) if samples > 1 else ()
    steps = np.diff([s.place for s in slices])
    spacing = [float(v) or 1.0 for v in first.get("PixelSpacing") or (1, 1)]
    step = float(np.median(steps)) if len(steps) and _placed(first) else 0.0
    return Volume(
        array=_Series(
            slices,
            (len(slices), rows, columns, *colours),
            np.dtype(dtype) if plain else np.dtype(np.float32),
        ),
        axes="ZYXC"[: 3 + len(colours)],
        chunks=(1, rows, columns, *colours),
        scale=(step or 1.0, *spacing, *(1.0 for _ in colours)),
        units=("millimeter",) * 3 + ("",) * len(colours),
        places=_places([heads[s.file] for s in slices], spacing),
    )


def _kind(head: Any) -> tuple[int, int, int, str]:
    """Rows, columns, channels, and the type of the stored values."""
    bits = int(head.get("BitsAllocated", 16))
    signed = "" if int(head.get("PixelRepresentation", 0)) else "u"
    dtype = "bool" if bits == 1 else f"{signed}int{bits}"
    return int(head.Rows), int(head.Columns), int(head.get("SamplesPerPixel", 1)), dtype


def _slice(file: Path, head: Any) -> _Slice:
    if _placed(head):
        row, column = np.reshape(np.array(head.ImageOrientationPatient, float), (2, 3))
        place = float(np.dot(np.cross(row, column), np.array(head.ImagePositionPatient, float)))
    else:
        place = float(head.get("InstanceNumber", 0) or 0)
    slope, intercept = (head.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    return _Slice(file, place, 1.0 if slope is None else float(slope), float(intercept or 0))


def _places(heads: Sequence[Any], spacing: Sequence[float]) -> NDArray[np.float64] | None:
    """See `Volume.places`; the patient's axes of DICOM run to the left, the back and the top.

    Args:
        heads: of the slices, in their order.
        spacing: between rows, and between columns.
    """
    if not all(map(_placed, heads)):
        return None
    right, down = np.reshape(np.array(heads[0].ImageOrientationPatient, float), (2, 3))
    first, last = (np.array(heads[i].ImagePositionPatient, float) for i in (0, -1))
    step = (last - first) / (len(heads) - 1) if len(heads) > 1 else np.cross(right, down)
    found = np.eye(4)
    found[:3] = np.stack([step, down * spacing[0], right * spacing[1], first], axis=1)
    found[:2] *= -1
    return found


def _placed(head: Any) -> bool:
    return bool(head.get("ImageOrientationPatient")) and bool(head.get("ImagePositionPatient"))
