"""`Normalisation`: the statistics that images are scaled by, saved with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from segmentation.data.classes import DTYPES, IGNORE
from segmentation.data.pairs import Pair
from segmentation.data.slices import shown
from unet.errors import InputError
from unet.files.images import white
from unet.files.mask_values import some
from unet.files.pages import Array, missing
from unet.words import counted


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Statistics of the pixels of one image that are not ignored: (C,) float64, and over all
    channels."""

    dtype: str  # of the image
    count: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    low: float = np.inf
    high: float = -np.inf
    beyond_unit: bool = False  # whether more than a few values are meant to go far beyond 1

    @classmethod
    def of(cls, image: Array, known: NDArray[np.bool_]) -> Moments:
        """The statistics of the pixels of an image (H, W, C) where `known` (H, W) is true."""
        pixels = image[known] if not known.all() else image.reshape(-1, image.shape[2])
        if not len(pixels):
            return cls(dtype=image.dtype.name, count=0, mean=np.zeros(1), variance=np.zeros(1))
        return cls(
            dtype=image.dtype.name,
            count=len(pixels),
            mean=pixels.mean(0, dtype=np.float64),
            variance=pixels.var(0, dtype=np.float64),
            low=float(pixels.min()),
            high=float(pixels.max()),
            beyond_unit=_beyond_unit(pixels),
        )


@dataclass(frozen=True)
class Normalisation:
    """Per channel (x - mean) / std, on pixel values as stored; of the training images only."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # 1 where a channel is constant
    dtype: str  # of the images: values of another depth mean something else
    nodata: float | None = None  # value of pixels where nothing was measured, NaN among them
    low: float | None = None  # the smallest and the largest value that was found
    high: float | None = None

    @classmethod
    def of(cls, images: Iterable[Array], nodata: float | None = None) -> Normalisation:
        """Statistics of images (H, W, C), one at a time, in float64 (Chan et al. 1979).

        Args:
            nodata: value of pixels where nothing was measured.
        """
        return cls.joined((Moments.of(i, ~missing(i, nodata)) for i in images), nodata)

    @classmethod
    def joined(cls, images: Iterable[Moments], nodata: float | None = None) -> Normalisation:
        """Statistics of a set of images, from those of each image.

        Raises:
            InputError: values that go up to 1 in some images and far beyond in others; no pixel.
        """
        count, mean, squares = 0, np.zeros(1), np.zeros(1)  # squares: sum of (x - mean)^2
        dtype, low, high = "", np.inf, -np.inf
        unit = wide = False  # images whose values go to 1, and far beyond
        for image in images:
            dtype = image.dtype
            if not (n := image.count):
                continue
            delta = image.mean - mean
            mean = mean + delta * n / (count + n)
            squares = squares + image.variance * n + delta**2 * (count * n / (count + n))
            count += n
            low, high = min(low, image.low), max(high, image.high)
            unit |= 0.5 < image.high <= 1
            wide |= image.beyond_unit
            if dtype == "float32" and unit and wide and low >= 0:
                raise InputError(
                    f"the values of some images go up to 1, those of others up to {high:g}: scale "
                    "all images the same way"
                )
        if not dtype:
            raise ValueError("statistics of no images")
        if not count:
            raise InputError(
                "no pixel of the training images has a label and a value: there is nothing to "
                "learn from"
            )
        std = np.sqrt(squares / count)
        return cls(
            tuple(mean.tolist()),
            tuple(np.where(std > 0, std, 1.0).tolist()),
            dtype,
            nodata,
            low,
            high,
        )

    def __call__(self, image: Array, nodata: float | None = None) -> NDArray[np.float32]:
        """(H, W, C) as stored -> float32 (C, H, W), 0 where nothing was measured.

        Args:
            nodata: what the image's file declares, instead of what the training images did.
        """
        if image.shape[2] != len(self.mean) or image.dtype != self.dtype:
            raise InputError(
                f"an image with {counted(image.shape[2], 'channel')} of {image.dtype}, but the "
                f"training images have {len(self.mean)} of {self.dtype}; convert it"
            )
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = rearrange(image, "h w c -> c h w").astype(np.float32, order="C", copy=True)
        scaled -= mean[:, None, None]  # in place: tiles of many channels are large
        scaled /= std[:, None, None]
        unknown = missing(image, self.nodata_of(nodata))
        unit = self.low is not None and self.high is not None and 0 <= self.low <= self.high <= 1
        if unit and self.dtype == "float32" and _beyond_unit(image[~unknown]):
            raise InputError(
                f"its values go up to {image[~unknown].max():g}, but those of the training images "
                "are from 0 to 1: scale it the same way"
            )
        if unknown.any():
            scaled[:, unknown] = 0
        return scaled

    def nodata_of(self, declared: float | None) -> float | None:
        """The value of an image's pixels where nothing was measured: what its file declares, else
        that of the training images; None: there is none.
        """
        return self.nodata if declared is None else declared

    def for_images(self, channels: int, dtype: str) -> Normalisation:
        """The same scaling of images of another depth, or of grey as colour and the reverse.

        A value is the same share of the largest one; floats go from 0 to 1.
        """
        factor = white(dtype) / white(self.dtype)
        mean, std = ([v * factor for v in values] for values in (self.mean, self.std))
        if channels != len(mean):
            mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
        found = replace(self, mean=tuple(mean), std=tuple(std), dtype=dtype)
        return found if factor == 1 else replace(found, nodata=None, low=None, high=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        saved = asdict(self)
        nodata = self.nodata
        if nodata is not None and not np.isfinite(nodata):
            saved["nodata"] = str(nodata)  # JSON has no NaN
        return {key: value for key, value in saved.items() if value is not None}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Normalisation:
        """The statistics that `to_dict` gave, from JSON; InputError if they are none."""
        try:
            mean, std = (tuple(float(x) for x in saved[key]) for key in ("mean", "std"))
            known = saved["dtype"] in DTYPES and len(mean) > 0
            fits = len(mean) == len(std) and np.isfinite(mean + std).all() and min(std) > 0
            if not known or not fits:
                raise ValueError(f"mean {mean}, std {std} of {saved['dtype']!r}")
            nodata, low, high = (
                None if saved.get(key) is None else float(saved[key])
                for key in ("nodata", "low", "high")
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"the model's normalisation is damaged: {error}") from error
        return cls(mean, std, saved["dtype"], nodata, low, high)


def known_normalisation(info: Mapping[str, Any]) -> Normalisation:
    """The statistics of a model's training images, from its `info`.

    Raises:
        InputError: it has none; a damaged model.
    """
    if "normalisation" not in info:
        raise InputError(
            "the model's info has no 'normalisation', so its images cannot be scaled: put in what "
            "Normalisation.to_dict gives of the training images"
        )
    return Normalisation.from_dict(info["normalisation"])


def joint_normalisation(infos: Iterable[Mapping[str, Any]]) -> Normalisation:
    """The statistics of the first of several models, with the no-data value that any of them knows.

    Raises:
        InputError: no-data values that differ; as `known_normalisation`.
    """
    found = [known_normalisation(info) for info in infos]
    values = {f"{one.nodata:g}": one.nodata for one in found if one.nodata is not None}
    if len(values) > 1:
        raise InputError(
            f"the models take different values for no data, {' and '.join(values)}: average models "
            "for the same images"
        )
    return replace(found[0], nodata=next(iter(values.values()), None))


def find_normalisation(
    pairs: Sequence[Pair],
    read: Callable[[int], Array],
    encode: Callable[[Pair, Array], NDArray[np.uint8]] | None = None,
) -> tuple[Normalisation, list[str]]:
    """Statistics of the images of pairs, and a note on pixels where nothing was measured.

    Their value is what the images' files declare, or else one that all pixels have that the masks
    ignore, and no other ones. Each image is read once, and once more if pixels that count may have
    the value that was found.

    Args:
        read: gives the image of the i-th pair.
        encode: gives the classes (H, W) of a pair with this image, as `Labels.encode` in
            `segmentation.data.labels`; not given: no mask ignores a pixel.

    Raises:
        InputError: declared values that differ; as `Normalisation.joined`.
    """
    values = {pair.info.nodata for pair in pairs if pair.info.nodata is not None}
    if any(math.isnan(value) for value in values):
        values = {value for value in values if not math.isnan(value)} | {math.nan}
    if len(values) > 1:
        raise InputError(
            f"the images declare {some(sorted(values))} to be no data: give the value that all of "
            "them have with --nodata"
        )
    nodata = values.pop() if values else None
    if encode is None:
        return Normalisation.of(map(read, range(len(pairs))), nodata), []
    moments: list[Moments] = []
    found: set[float | None] = set()
    for i, pair in enumerate(pairs):
        image = read(i)
        counts = encode(pair, image) != IGNORE
        moments.append(Moments.of(image, counts & ~missing(image, nodata)))
        if nodata is None and None not in found and counts.any() and not counts.all():
            found.add(_value_of_rest(shown(pair, image), counts))
    value = found.pop() if len(found) == 1 else None
    if value is None:
        return Normalisation.joined(moments, nodata), []
    for i, pair in enumerate(pairs):
        if moments[i].low <= value <= moments[i].high:
            image = read(i)
            known = (encode(pair, image) != IGNORE) & ~missing(image, value)
            moments[i] = Moments.of(image, known)
    told = f"image value {value:g} is taken for no data: all its pixels are ignored"
    return Normalisation.joined(moments, value), [told]


def _value_of_rest(image: Array, counts: NDArray[np.bool_]) -> float | None:
    """The value of all ignored pixels (H, W, C), if all other pixels are beyond it."""
    rest, known = image[~counts], image[counts]
    if rest.min() != rest.max() or known.min() <= rest[0, 0] <= known.max():
        return None
    return float(rest[0, 0])


def _beyond_unit(pixels: Array) -> bool:
    """Whether more than a few pixels have values that are meant to go far beyond 1."""
    return bool((pixels > 2).sum() > 0.01 * pixels.size)
