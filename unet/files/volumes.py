"""Volumes that need not fit into memory: Zarr stores, HDF5 and NIfTI files, folders of DICOM.

Each becomes a `unet.files.pages.Volume`, whose slices are read like the pages of a stack. The
packages that read them are extras; a missing one is named with the command that installs it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet.errors import InputError, is_address, not_there, with_extras
from unet.files.pages import Volume

_HDF5 = re.compile(r"(?P<file>.*\.(?:h5|hdf5|hdf))(?::/*(?P<inside>.*))?", re.IGNORECASE)
_NIFTI = re.compile(r".*\.nii(\.gz)?", re.IGNORECASE)
_ALIKE = 0.9  # cosine of an angle that scanners are tilted by, 26 degrees, and no turn
_AS_THEY_LIE = (False, False, False)


def is_volume(path: Path) -> bool:
    """Whether a path names a volume.

    It does by its name (`x.zarr`, `x.zarr/path/in/it`, `x.h5`, `x.h5:/path`, `x.nii`, `x.nii.gz`),
    and a folder by the DICOM file that it begins with.
    """
    return _kind(path) != ""


def is_volume_file(path: Path) -> bool:
    """Whether a file or folder is a whole volume by its own name, as they lie in a folder; so is a
    link to nothing, which cannot be read.
    """
    name = path.name.lower()
    if name.endswith(".zarr"):
        return not path.is_file()
    return bool(_HDF5.fullmatch(name) or _NIFTI.fullmatch(name)) and not path.is_dir()


def volume_name(path: Path) -> str:
    """The name for files made from it: "x" for x.ome.zarr and x.nii.gz, "x_raw" for x.h5:/raw."""
    kind = _kind(path)
    if kind == "zarr":
        root, inside = split_zarr(path)
        parts = [re.sub(r"(\.ome)?\.zarr$", "", root.name, flags=re.IGNORECASE), *inside.split("/")]
    elif kind == "hdf5":
        file, inside = split_hdf5(path)
        parts = [file.stem, *inside.split("/")]
    elif kind == "nifti":
        parts = [re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)]
    else:
        parts = [path.resolve().name if kind else path.stem.removesuffix(".ome")]
    return "_".join(part for part in parts if part)


def split_zarr(path: Path) -> tuple[Path, str]:
    """The store that ends in .zarr, and the path inside of it."""
    at = next(i for i, part in enumerate(path.parts) if part.lower().endswith(".zarr"))
    return Path(*path.parts[: at + 1]), "/".join(path.parts[at + 1 :])


def split_hdf5(path: Path) -> tuple[Path, str]:
    """The file, and the path inside of it, behind a colon."""
    found = _HDF5.fullmatch(str(path))
    assert found is not None
    return Path(found["file"]), (found["inside"] or "").strip("/")


@contextmanager
def open_volume(path: Path) -> Iterator[Volume]:
    """The array of a file, or folder, of which `is_volume` is true.

    Raises:
        InputError: there is none, or several; a package that reads it is not installed.
    """
    if is_address(path):
        raise InputError(not_there(path))
    with with_extras():
        reader = _reader(_kind(path))
    with reader(path) as volume:
        yield volume


def flipped_axes(image: Path, mask: Path) -> tuple[bool, bool, bool]:
    """Which of slices, rows and columns run the other way in a mask than in its image, of one size.

    Both files say it by their positions in the body, as DICOM and NIfTI do. If one of them does
    not, or both run the same way, none is flipped.

    Raises:
        InputError: they run otherwise, and no flip of these axes brings the voxels together.
    """
    asked = []
    for path in (image, mask):
        if not is_volume(path):
            return _AS_THEY_LIE
        with open_volume(path) as volume:
            if volume.places is None or not _invertible(volume.places):
                return _AS_THEY_LIE
            asked.append((volume.places, volume.array.shape[:3]))
    (theirs, shape), (own, _) = asked
    cosines = _directions(own).T @ _directions(theirs)
    along = cosines.diagonal()
    found = tuple(bool(cosine < 0) for cosine in along)
    if min(along) > _ALIKE:
        return _AS_THEY_LIE
    last = np.array(shape) - 1
    corners = np.array(list(itertools.product(*([0, n] for n in last)))).T
    wanted = np.where(np.array(found)[:, None], last[:, None] - corners, corners)
    at = (np.linalg.inv(own) @ theirs @ np.vstack([corners, np.ones(8)]))[:3]
    if np.abs(at - wanted).max() < 0.5:
        return found[0], found[1], found[2]
    raise InputError(
        f"slices, rows and columns run to {_towards(theirs)} in {str(image)!r}, but to "
        f"{_towards(own)} in {str(mask)!r}, by the positions in the body that the files give: "
        "resample the mask onto the image or, if its voxels do match the image's, save it with "
        "the affine of the image, or with sform_code and qform_code 0 (unknown)"
    )


def _invertible(places: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(places).all() and abs(np.linalg.det(_directions(places))) > 0.1)


def _directions(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """The directions of slices, rows and columns, a column each; NaN where one is of no length."""
    with np.errstate(invalid="ignore"):
        return places[:3, :3] / np.linalg.norm(places[:3, :3], axis=0)


def _towards(places: NDArray[np.float64]) -> str:
    """Where slices, rows and columns run to, such as S, P, L: to the top, the back and the left."""
    columns = _directions(places).T
    axes = np.abs(columns).argmax(axis=1)
    return ", ".join("LPIRAS"[a + 3 * (c[a] > 0)] for a, c in zip(axes, columns, strict=True))


def _reader(kind: str) -> Callable[[Path], AbstractContextManager[Volume]]:
    if kind == "zarr":
        from unet.files.zarrs import open_zarr

        return open_zarr
    if kind == "hdf5":
        from unet.files.hdf5 import open_hdf5

        return open_hdf5
    if kind == "nifti":
        from unet.files.nifti import open_nifti

        return open_nifti
    from unet.files.dicom import open_dicom

    return open_dicom


def _kind(path: Path) -> str:
    if any(part.lower().endswith(".zarr") for part in path.parts):
        return "" if os.path.isfile(path) else "zarr"
    if _HDF5.fullmatch(str(path)):
        return "hdf5"
    if _NIFTI.fullmatch(path.name):
        return "nifti"
    return "dicom" if os.path.isdir(path) and _begins_with_dicom(path) else ""


def _begins_with_dicom(folder: Path) -> bool:
    try:
        shown = (p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
        first = min(shown, key=lambda p: p.name, default=None)
        return first is not None and is_dicom(first)
    except OSError:
        return False


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM's do: 128 bytes, then DICM."""
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
