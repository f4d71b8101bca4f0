"""HDF5 files: a dataset that is named behind a colon, as file.h5:/path, or the only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from unet.errors import InputError
from unet.files.pages import Volume, named_axes
from unet.files.volumes import split_hdf5


@contextmanager
def open_hdf5(path: Path) -> Iterator[Volume]:
    """A dataset of a file; its axes by the labels of its dimension scales, where it has some.

    Raises:
        InputError: there is none, or several.
    """
    name, inside = split_hdf5(path)
    if not name.is_file():
        raise InputError(f"there is no file {str(name)!r}")
    with h5py.File(name, "r") as file:
        if inside and inside not in file:
            raise InputError(f"there is no dataset {inside!r} in {str(name)!r}")
        node = file[inside or "/"]
        if isinstance(node, h5py.Group):
            found = _datasets(node)
            if len(found) != 1:
                several = f"several: {', '.join(found[:8])}" if found else "none"
                raise InputError(
                    f"which dataset is meant? It holds {several}; name one, as {name}:/PATH"
                )
            node = file[found[0]]
        if node.shape is None or node.dtype.kind not in "biufV":
            raise InputError(f"it holds objects or text ({node.dtype}), not numbers of pixels")
        letters = named_axes([dimension.label for dimension in node.dims])
        yield Volume(
            array=node,
            axes=letters if {"Y", "X"} <= set(letters) else "",
            chunks=node.chunks or (1,) * max(node.ndim - 2, 0) + node.shape[-2:],
        )


def _datasets(group: h5py.Group) -> list[str]:
    """The paths of all arrays of two axes and more below a group; links elsewhere do not count."""
    found: list[str] = []

    def look(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset) and len(node.shape or ()) > 1:
            found.append(node.name)

    group.visititems(look)
    return found
