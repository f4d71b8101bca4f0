"""The values that become black and white, found from the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from diffusion.data.pixels import WHOLE, ValueRange
from diffusion.data.sources import Source
from unet.errors import InputError
from unet.files.pages import Array, ImageInfo, missing

LOOKED_AT = 2**28  # values, of each type of images
RARE = 1e-4  # share of the pixels that may lie beyond a range


def find_ranges(
    source: Source,
    infos: Mapping[int, ImageInfo],
    nodata: Callable[[int], float | None],
    *,
    known: Mapping[str, ValueRange],
    parts: int,
) -> dict[str, ValueRange]:
    """The range of each type of the images except uint8, from images spread over the set.

    Args:
        infos: what the headers say, of all images or of some.
        nodata: of an image: its value where nothing was measured.
        known: ranges that are taken as they are.
        parts: 1, or the number of channels, each of which gets a range of its own.

    Raises:
        InputError: floats, of which some images go to 1 and others far beyond.
    """
    of: dict[str, list[int]] = {}
    for image, info in infos.items():
        if info.dtype != "uint8" and info.dtype not in known:
            of.setdefault(info.dtype, []).append(image)
    if source.kind and source.kind.dtype in of:
        of[source.kind.dtype] = list(range(len(source.names)))
    found = dict(known)
    for dtype, images in of.items():
        finders, left = [RangeFinder(dtype) for _ in range(parts)], LOOKED_AT
        for image in np.random.default_rng(0).permutation(images).tolist():
            try:
                pixels = source.read(image)
            except InputError:
                continue  # which is raised, or left out, where the image is used
            pieces = [pixels] if parts == 1 else np.split(pixels, pixels.shape[2], axis=2)
            for finder, piece in zip(finders, pieces, strict=False):
                finder.add(piece, source.names[image], nodata(image))
            left -= pixels.size
            if left < 0:
                break
        found[dtype] = ValueRange.of_channels([finder.found() for finder in finders])
    return found


class RangeFinder:
    """The range of values that images of one type use, from as many of them as are shown to it.

    uint8 is 0 to 255. Of larger whole numbers it is 0 to the largest value of so many bits as all
    but one in 10,000 pixels need, 4095 for a camera of 12 bits; or from the lowest to the highest
    where they use less than an eighth of that. Of floats it is 0 to 1, -1 to 1 or 0 to 255 where
    all values are in it and seem meant so, else from the lowest to the highest, without one in
    10,000 at either end if these lie far out.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.counts = np.zeros(65536, np.int64)  # of uint16
        self.sample: list[Array] = []  # of floats
        self.lowest, self.highest, self.whole = math.inf, -math.inf, True
        self.brightest: list[tuple[float, str]] = []  # the largest value of each image

    def add(self, pixels: Array, name: str, nodata: float | None = None) -> None:
        """Looks at an image (H, W, C), but for pixels that hold no data."""
        known = pixels[~missing(pixels, nodata)]
        if not known.size:
            return
        self.lowest = min(self.lowest, float(known.min()))
        self.highest = max(self.highest, float(known.max()))
        self.brightest.append((float(known.max()), name))
        if pixels.dtype == np.uint16:
            self.counts += np.bincount(known.reshape(-1), minlength=65536)
        else:
            flat = known.reshape(-1)
            self.sample.append(flat[:: max(1, flat.size // 20_000)])
            self.whole &= bool((self.sample[-1] == np.rint(self.sample[-1])).all())

    def found(self) -> ValueRange:
        """The range of what was shown.

        Raises:
            InputError: floats, of which some images go to 1 and others far beyond.
        """
        if self.dtype == "uint8" or self.lowest > self.highest:
            return WHOLE[self.dtype]
        if self.dtype == "uint16":
            below = np.cumsum(self.counts)
            first, top = (
                int(np.searchsorted(below, below[-1] * share, "right"))
                for share in (RARE, 1 - RARE)
            )
            top = min(top, int(self.highest))
            return _bits(top) if top - first > top / 8 else ValueRange(first, max(top, first + 1))
        low, high = self.lowest, self.highest
        if low >= 0 and high <= 1:
            return WHOLE["float32"]
        unit = [name for most, name in self.brightest if 0.5 < most <= 1]
        if unit and low >= 0 and high > 2:
            raise InputError(
                f"the values of '{unit[0]}' go up to 1, those of '{max(self.brightest)[1]}' up to "
                f"{high:g}: scale all images the same way"
            )
        if low >= -1 and high <= 1:
            return ValueRange(-1, 1)
        if low >= 0 and self.whole:
            return _bits(int(high))
        inner = np.quantile(np.concatenate(self.sample), [RARE, 1 - RARE])
        span = float(inner[1] - inner[0])
        low = low if low > inner[0] - span / 4 else float(inner[0])
        high = high if high < inner[1] + span / 4 else float(inner[1])
        return ValueRange(low, high if high > low else low + 1)


def _bits(top: int) -> ValueRange:
    """0 to the largest value of as many bits as this one needs, at least 8."""
    return ValueRange(0, 2 ** max(8, top.bit_length()) - 1)
