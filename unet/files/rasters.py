"""Images larger than memory: mapped or read in parts, and written from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from unet.errors import InputError
from unet.files.images import Blocks, image_info, map_image, read_image, tiff_colours
from unet.files.pages import AS_STORED, MAX_PIXELS, Array, ImageInfo, Reading
from unet.files.volumes import is_volume
from unet.files.writing import replacing

MAX_SIDE = 2**20  # pixels of a mapped image
IN_MEMORY = 2**24  # pixels of a slice of a volume that is read as a whole


def open_raster(
    path: Path,
    page: int | None = None,
    info: ImageInfo | None = None,
    reading: Reading = AS_STORED,
) -> Array | Blocks:
    """An image (H, W, C) to slice: decoded where it is small, else mapped from its file.

    Mapped are uncompressed TIFF (of any axes, not turned) and NPY files, which `read_image` would
    refuse for having more than MAX_PIXELS. Of a slice of a volume with more than IN_MEMORY pixels,
    rectangles are read on demand.

    Args:
        info: what `image_info` says of the file, where it is known already.
        reading: how to read the file, beyond what it says itself.

    Raises:
        InputError: as `read_image`; a large image that cannot be mapped.
    """
    info = info or image_info(path, reading)
    if info.height * info.width <= (IN_MEMORY if is_volume(path) else MAX_PIXELS):
        return read_image(path, page, reading)
    if max(info.height, info.width) > MAX_SIDE:
        raise InputError(
            f"'{path}' has {info.height} x {info.width} pixels, more than {MAX_SIDE} a side: cut it"
        )
    pixels = map_image(path, page, reading)
    if pixels is None:
        raise InputError(
            f"'{path}' has {info.height} x {info.width} pixels, too many to decode at once: save "
            "it as an uncompressed TIFF or NPY, unturned and with black as zero, which is read in "
            "parts"
        )
    return pixels


class BandWriter:
    """A TIFF that is written a band at a time; see `writing_bands`."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        palette: bytes | None = None,
    ) -> None:
        kind = "rgb" if len(shape) == 3 else "minisblack"
        mapped = tifffile.memmap(
            path, shape=shape, dtype=dtype, **tiff_colours(palette, dtype, kind)
        )
        self.offset = int(mapped.offset)
        self.row = mapped[:1].nbytes
        del mapped
        self.path, self.dtype = path, dtype

    def write(self, top: int, band: Array) -> None:
        """Writes rows from `top` on."""
        # Through the file, not the map: a full disk is then an error instead of a bus error.
        with self.path.open("rb+") as file:
            file.seek(self.offset + top * self.row)
            file.write(np.ascontiguousarray(band, self.dtype).tobytes())


@contextmanager
def writing_bands(
    path: Path, shape: tuple[int, ...], dtype: Any, palette: bytes | None = None
) -> Iterator[BandWriter]:
    """A writer of (H, W) or (H, W, 3) in bands; at the end the file appears, whole.

    Args:
        palette: of indices, as `write_image` takes it.
    """
    with replacing(path) as temporary:
        yield BandWriter(temporary, shape, np.dtype(dtype), palette)
