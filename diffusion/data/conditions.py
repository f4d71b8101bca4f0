"""Conditions: the picture that an image is made from, as channels beside the noise.

It is either derived from the image itself by a recipe (a small version, its greys, a noisy copy,
all but a hole), or read from a folder of pictures or masks with the images' names. Networks see it
joined to the noisy image (Palette, arXiv 2111.05826): in [-1, 1], masks as one channel of 0 and 1
per value, and 0 everywhere where the condition is left out.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.data.masks import find_masks, find_palette, read_cleaned, survey_of
from diffusion.data.pixels import (
    Pixels,
    ValueRange,
    as_levels,
    as_tensor,
    check_channels,
    resized,
    to_unit,
)
from diffusion.data.ranges import RangeFinder
from diffusion.data.sources import HowToRead, saved_colour
from unet.errors import InputError
from unet.files.folders import readings
from unet.files.images import WHITE, Colour, image_info, images_below, read_image
from unet.files.mask_values import MAX_CLASSES, NOT_CLEANED, MaskCleaning
from unet.files.pages import Array, Reading
from unet.words import counted

RECIPES = ("lowres", "grey", "noise", "hole")
_LOOKED_AT = 50  # files that say what a folder holds


@dataclass(frozen=True)
class Unread:
    """A picture that is read each time its pixels are needed, so that a million take no memory.

    Attributes:
        shape: (K, H, W) of what `read` gives.
    """

    shape: tuple[int, int, int]
    read: Callable[[], Tensor]


Picture: TypeAlias = Tensor | Unread


class Asked(NamedTuple):
    """The class or text of an image, and the picture (K, H, W) that it is made from; None: any
    class, no picture.
    """

    shown: int | str | None = None
    picture: Picture | None = None

    @classmethod
    def of(cls, wanted: Ask) -> Asked:
        """An `Asked` from a class or text, a picture, or neither."""
        if isinstance(wanted, Asked):
            return wanted
        return cls(picture=wanted) if isinstance(wanted, Picture) else cls(shown=wanted)

    def read(self) -> Tensor | None:
        """The picture (K, H, W), in memory."""
        return self.picture.read() if isinstance(self.picture, Unread) else self.picture


Ask: TypeAlias = int | str | Picture | Asked | None  # class, text, picture, or both; None: any


@dataclass(frozen=True, kw_only=True)
class ImageKind:
    """The kind of images that are made from conditions in files.

    Attributes:
        size: to which a condition is cropped and resized; None: its own size, for lowres that of
            the small picture times the factor.
        channels: of images.
        ranges: the values of each type that are -1 and 1 in images, where not all that it has.
        fine: whether images have more than 8 bits.
        nodata: see `Condition.read`.
        background: the colour under transparent pixels; None: alpha is a channel of its own.
    """

    size: tuple[int, int] | None
    channels: int
    ranges: Mapping[str, ValueRange] = field(default_factory=dict)
    fine: bool = False
    nodata: float | None = None
    background: Colour | None = WHITE

    def levels(self, pixels: Array, channels: int, nodata: float | None) -> Pixels:
        """Pixels (H, W, C) as levels like those of the images, with so many channels."""
        known = self.ranges.get(pixels.dtype.name)
        return as_levels(pixels, channels, known, nodata, fine=self.fine)

    def resized(self, pixels: Pixels, *, alpha: bool = False) -> Pixels:
        """Pixels (H, W, C) cut and resized to the size of the images, if they have one.

        Args:
            alpha: see `diffusion.data.pixels.resized`.
        """
        return pixels if self.size is None else resized(pixels, self.size, alpha=alpha)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How a condition is made, saved with a model in `info["condition"]`.

    Attributes:
        kind: a recipe, "mask" or "picture".
        amount: of lowres the factor, of noise the standard deviation as a share of black to white.
        channels: that the network gets.
        values: of a mask: the value of each channel.
        cleaning: of a mask: what is done to the values in files.
        dtype, low, high: of a picture: what becomes -1 and 1.
        fine: of a picture: whether it keeps more than 8 bits, as it does but in older models.
        background: of a picture: the colour under transparent pixels; None: white, as no training
            picture had any.
        soft: of a picture that would be a mask if its edges were not soft: the values between which
            they are.
    """

    kind: str
    channels: int
    amount: float = 0.0
    values: tuple[int, ...] = ()
    cleaning: MaskCleaning = NOT_CLEANED
    dtype: str = "uint8"
    low: float = 0.0
    high: float = 255.0
    fine: bool = False
    background: Colour | None = None
    soft: tuple[int, ...] = ()

    def said(self) -> str:
        """The condition in words."""
        if self.kind == "mask":
            cleaned = f" ({self.cleaning.said()})" if self.cleaning else ""
            return f"masks of the values {', '.join(map(str, self.values))}{cleaned}"
        if self.kind == "picture":
            over = f", transparent pixels over the colour {_said(self.background)}"
            edges = f", not masks, as the edges between {', '.join(map(str, self.soft))} are soft"
            values = f"{self.low:g} to {self.high:g}"
            values += (over if self.background else "") + (edges if self.soft else "")
            return f"pictures of {counted(self.channels, 'channel')}, {values}"
        words = {
            "lowres": f"the image, {self.amount:g} times smaller",
            "grey": "the greys of the image",
            "noise": f"the image with noise of {self.amount:g}",
            "hole": "the image with a hole",
        }
        return words[self.kind]

    @property
    def from_image(self) -> bool:
        """Whether it is made from the image itself."""
        return self.kind in RECIPES

    @property
    def image_name(self) -> str:
        """What `as_image` gives, in words."""
        words = {
            "lowres": "bicubic enlargement",
            "grey": "the greys",
            "noise": "the noisy image",
            "hole": "the image with a hole",
        }
        return words.get(self.kind, "the picture itself")

    def as_image(self, picture: Tensor, channels: int) -> Tensor | None:
        """The condition (K, H, W) as an image (C, H, W) in [-1, 1]: the baseline for a model. None:
        it is a mask, or a picture with other channels.
        """
        if self.kind == "mask":
            return None
        if self.kind == "hole":
            picture = picture[:-1]
        if len(picture) == 1:
            picture = picture.expand(channels, -1, -1)
        return picture.clamp(-1, 1) if len(picture) == channels else None

    def make(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The condition (K, H, W) of an image (C, H, W) in [-1, 1], by the recipe."""
        if self.kind == "grey":
            weights = image.new_tensor(
                [0.299, 0.587, 0.114] if len(image) == 3 else [1 / len(image)]
            )
            return (image * weights.view(-1, 1, 1)).sum(0, keepdim=True)
        if self.kind == "lowres":
            size, factor = image.shape[-2:], self.amount
            small = [max(1, round(n / factor)) for n in size]
            coarse = F.interpolate(image[None], small, mode="area")
            return F.interpolate(coarse, size, mode="bicubic")[0].clamp(-1, 1)
        if self.kind == "noise":
            noise = rng.standard_normal(image.shape, dtype=np.float32)
            return image + 2 * self.amount * torch.from_numpy(noise)
        hole = torch.zeros(1, *image.shape[-2:])
        for _ in range(rng.integers(1, 4)):
            sides = [int(rng.integers(max(1, n // 8), max(2, n // 2))) for n in image.shape[-2:]]
            top, left = (
                int(rng.integers(0, n - side + 1))
                for n, side in zip(image.shape[-2:], sides, strict=True)
            )
            hole[:, top : top + sides[0], left : left + sides[1]] = 1
        return torch.cat([image * (1 - hole), hole])

    def read(self, file: Path, nodata: float | None = None) -> Pixels:
        """The condition in a file, (H, W, K): one channel a value of 0 and 255, or pixels.

        Args:
            nodata: the value of a picture's pixels where nothing was measured; None: what its file
                declares.

        Raises:
            InputError: a mask with another value; a picture with other channels, or in the very
                colour under its transparent pixels.
        """
        if self.kind == "mask":
            mask = read_cleaned(file, self.cleaning)
            if mask.ndim == 3:
                raise InputError(f"{str(file)!r} holds colours, but the conditions are numbers")
            known = np.isin(mask, self.values)
            if not known.all():
                strange = np.unique(mask[~known])[:5].tolist()
                raise InputError(
                    f"{str(file)!r} holds the values {strange}, but the conditions have "
                    f"{list(self.values)}"
                )
            return ((mask[..., None] == np.array(self.values)) * np.uint8(255)).astype(np.uint8)
        background = self.background or WHITE
        pixels, nodata = _read(file, nodata, background)
        if _vanishes(file, pixels):
            raise InputError(
                f"{str(file)!r}: all that is painted in it has the colour {_said(background)}, "
                "which is also put under its transparent pixels, so that nothing of it can be "
                "seen: fill these with another colour, or train with another --background"
            )
        known_range = ValueRange(self.low, self.high) if pixels.dtype.name == self.dtype else None
        try:
            return as_levels(pixels, self.channels, known_range, nodata, fine=self.fine)
        except InputError as error:
            raise InputError(f"{str(file)!r}: {error}") from error

    def given(self, file: Path, images: ImageKind) -> Tensor:
        """The condition (K, H, W) in a file that an image of this kind is to be made from.

        Of lowres the file is the small picture (or, where a size is given, a whole one, which is
        made smaller first), of noise the noisy one, of grey a grey one, and of hole one whose hole
        is transparent.

        Raises:
            InputError: a file that cannot be read, or is none of these.
        """
        if self.kind in ("mask", "picture"):
            return self.as_tensor(images.resized(self.read(file, images.nodata)))
        try:
            if self.kind == "hole":
                return _around_hole(file, images)
            channels = 1 if self.kind == "grey" else images.channels
            over = images.background or (WHITE if self.kind == "grey" else None)
            read, nodata = _read(file, images.nodata, over)
            pixels = images.levels(read, channels, nodata)
        except InputError as error:
            said = str(error)
            raise InputError(said if str(file) in said else f"{str(file)!r}: {said}") from error
        if self.kind != "lowres":
            return as_tensor(images.resized(pixels, alpha=over is None))
        if images.size is None:
            height, width = (round(n * self.amount) for n in pixels.shape[:2])
            return self._enlarged(pixels, (height, width))
        small = [max(1, round(n / self.amount)) for n in images.size]
        if pixels.shape[0] > small[0] + 1 or pixels.shape[1] > small[1] + 1:
            whole = as_tensor(images.resized(pixels, alpha=over is None))
            return self.make(whole, np.random.default_rng(0))
        return self._enlarged(pixels, images.size)

    def unread(self, file: Path, images: ImageKind) -> Unread:
        """What `given` will read of a file, once its header was looked at.

        Raises:
            InputError: a file that is no image, or whose header says that it is no such condition.
        """
        info = image_info(file)
        try:
            if info.pages > 1:
                raise InputError(f"it is a stack of {info.pages} pages: give a file for each")
            if self.kind == "mask":
                if not self.cleaning and info.channels != 1 and info.palette is None:
                    raise InputError("it holds colours, but the conditions are numbers")
                if not self.cleaning and info.lossy:
                    raise InputError("JPEG and WebP change the values of masks: save it as PNG")
            else:
                image_based = self.kind in ("lowres", "noise", "hole")
                check_channels(info.channels, images.channels if image_based else self.channels)
            if self.kind == "hole" and not info.has_alpha:
                raise InputError("no pixel of it is transparent, and transparency marks the hole")
        except InputError as error:
            raise InputError(f"{str(file)!r}: {error}") from error
        factor = self.amount if self.kind == "lowres" else 1
        size = images.size or (round(info.height * factor), round(info.width * factor))
        return Unread((self.channels, *size), lambda: self.given(file, images))

    def _enlarged(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        return F.interpolate(as_tensor(pixels)[None], size, mode="bicubic")[0].clamp(-1, 1)

    def as_tensor(self, pixels: Pixels) -> Tensor:
        """Pixels (H, W, K) of `read` as (K, H, W): masks from 0 to 1, pictures from -1 to 1."""
        found = torch.from_numpy(np.moveaxis(pixels, -1, 0).copy())
        return found.float() / 255 if self.kind == "mask" else to_unit(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        background = self.background and list(self.background)
        saved = {"values": list(self.values), "background": background, "soft": list(self.soft)}
        return {**vars(self), **saved, "cleaning": self.cleaning.to_dict()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Condition:
        """What `to_dict` gave, from JSON; InputError if it is none."""
        try:
            found = cls(
                kind=str(saved["kind"]),
                channels=int(saved["channels"]),
                amount=float(saved["amount"]),
                values=tuple(map(int, saved["values"])),
                cleaning=MaskCleaning.from_dict(saved.get("cleaning", NOT_CLEANED.to_dict())),
                dtype=str(saved["dtype"]),
                low=float(saved["low"]),
                high=float(saved["high"]),
                fine=bool(saved.get("fine", False)),
                background=saved_colour(saved.get("background")),
                soft=tuple(map(int, saved.get("soft", ()))),
            )
            if found.kind not in (*RECIPES, "mask", "picture") or not 0 < found.channels < 1000:
                raise ValueError(f"{found.kind!r} of {found.channels} channels")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the model's condition is damaged: {error}") from error
        return found


def _around_hole(file: Path, images: ImageKind) -> Tensor:
    """The image in a file, zero where it is transparent, and as a last channel where that is."""
    pixels, nodata = _read(file, images.nodata, None)
    if not image_info(file).has_alpha:
        raise InputError("no pixel of it is transparent, and transparency marks the hole")
    cover = as_levels(pixels[..., -1:], 1)
    seen = images.levels(pixels[..., :-1], images.channels, nodata)
    pixels = images.resized(np.dstack([seen, cover]), alpha=True)
    hole = torch.from_numpy(pixels[..., -1] < 128).float()[None]
    return torch.cat([as_tensor(pixels[..., :-1]) * (1 - hole), hole])


def _read(
    file: Path, nodata: float | None, background: Colour | None
) -> tuple[Array, float | None]:
    """The pixels of a file, and its no-data value: the one given, or what the file declares."""
    reading = Reading(nodata=nodata)
    pixels = HowToRead(reading=reading, background=background).image(file)
    return pixels, image_info(file, reading).nodata


def _vanishes(file: Path, pixels: Array) -> bool:
    """Whether a file has something painted that is invisible in its pixels over a colour (H, W,
    C)."""
    if (pixels != pixels[0, 0]).any() or not image_info(file).has_alpha:
        return False
    cover = read_image(file, alpha=True)[..., -1]
    return bool((cover != cover[0, 0]).any())


def _said(colour: Colour | None) -> str:
    return " ".join(map(str, colour or ()))


def find_condition(
    said: str,
    channels: int,
    nodata: float | None = None,
    files: Sequence[str] = (),
    background: Colour = WHITE,
    cleaning: MaskCleaning = NOT_CLEANED,
) -> Condition:
    """The condition that a recipe or a folder stands for, for images of so many channels.

    Args:
        nodata: see `Condition.read`.
        said: "lowres:4", "grey", "noise:0.2", "hole", or a folder. Files there that all hold a few
            whole numbers (or are indices of one palette) are masks, others are pictures, among them
            such whose edges are soft.
        files: those of the folder that go with images; none given: all in it and below it.
        background: the colour under transparent pixels of pictures, if all pictures stay visible on
            it; else white, or black.
        cleaning: of the values of masks; with one, all files are masks.

    Raises:
        InputError: neither; an amount out of range; files that are no images, or no masks.
    """
    name, _, amount = said.partition(":")
    if name not in RECIPES or os.path.isdir(said):
        return _of_folder(Path(said), nodata, files, background, cleaning)
    if cleaning:
        raise InputError(
            f"--condition {said} is made from the image itself, and --mask-values and "
            "--threshold-masks say what masks mean: leave these out"
        )
    if name in ("lowres", "noise"):
        least = 1.0 if name == "lowres" else 0.0
        number = float(amount) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,9})?", amount) else -1.0
        if not least < number <= 1000:
            raise InputError(
                f"--condition {said}: give lowres:4 for a small version, a factor above 1, or "
                "noise:0.2 for a standard deviation above 0"
            )
        return Condition(kind=name, channels=channels, amount=number)
    if amount:
        raise InputError(f"--condition {said}: {name} takes no number")
    return Condition(kind=name, channels=1 if name == "grey" else channels + 1)


def _of_folder(
    folder: Path,
    nodata: float | None,
    given: Sequence[str],
    background: Colour,
    cleaning: MaskCleaning,
) -> Condition:
    if not folder.is_dir():
        raise InputError(
            f"--condition {folder} is neither a folder nor one of lowres:4, grey, noise:0.2, hole"
        )
    files = [Path(file) for file in dict.fromkeys(given)] or images_below(folder)
    if cleaning:
        cleaned = find_masks(list(map(str, files)), "bits", cleaning).values
        known = tuple(value for value in cleaned if isinstance(value, int))  # as cleaned ones are
        return Condition(kind="mask", channels=len(known), values=known, cleaning=cleaning)
    kinds: dict[tuple[int, str, bytes | None, bool], None] = {}
    transparent = False
    for info in map(image_info, files):
        kinds[info.channels, info.dtype, info.palette, info.lossy] = None
        transparent |= info.has_alpha
    masks = all(
        (channels == 1 or palette is not None) and dtype != "float32" and not lossy
        for channels, dtype, palette, lossy in kinds
    )
    if masks and len({palette for _, _, palette, _ in kinds}) > 1:
        masks = not find_palette(files)[1]
    survey = survey_of(files if masks else [], NOT_CLEANED)
    values = sorted(value for value in survey.pixels if isinstance(value, int))
    soft = len(values) <= MAX_CLASSES and survey.soft()
    if 1 < len(values) <= MAX_CLASSES and not soft:
        return Condition(kind="mask", channels=len(values), values=tuple(values))
    channels = {kind[0] for kind in kinds}
    if len(channels) > 1 and channels != {1, 3}:
        raise InputError(
            f"the pictures in {str(folder)!r} have {sorted(channels)} channels: save them alike"
        )
    looked_at = files[:: max(1, len(files) // _LOOKED_AT)]
    if transparent:
        background = _showing(looked_at, nodata, (background, WHITE, (0, 0, 0)))
    dtype = next(iter(kinds))[1]
    finder = RangeFinder(dtype)
    for file in looked_at:
        pixels, unknown = _read(file, nodata, background)
        if pixels.dtype.name == dtype:
            finder.add(pixels, str(file), unknown)
    low, high = finder.found().each(1)
    return Condition(
        kind="picture",
        channels=max(channels),
        dtype=dtype,
        low=low[0],
        high=high[0],
        fine=dtype != "uint8",
        background=background if transparent else None,
        soft=tuple(value for value in soft[0] if isinstance(value, int)) if soft else (),
    )


def _showing(files: Sequence[Path], nodata: float | None, colours: Sequence[Colour]) -> Colour:
    """The first colour on which all pictures stay visible; the first one if there is none."""
    for colour in colours:
        if not any(_vanishes(file, _read(file, nodata, colour)[0]) for file in files):
            return colour
    return colours[0]


def partners(
    images: Sequence[str], folder: Path, what: str = "condition", root: Path | None = None
) -> list[str]:
    """The file of a folder that goes with each image: of the same name, whatever its suffix.

    It lies at the place below the folder where the image lies below its own, or is the only one of
    that name that lies at the place of no image. Else, names are equal but for an ending or a
    beginning that all files share, and for a beginning or an ending that all images share.

    Args:
        what: what these files are, for messages.
        root: the folder of the images; None: they lie in none.

    Raises:
        InputError: an image without one, with several, or that is the file itself.
    """
    here = os.path.join(os.curdir, "")  # which a walk puts before names, and Path does not
    images = [image.removeprefix(here) for image in images]
    files = [str(file) for file in images_below(folder)]
    own = set(images).intersection(files)
    files = [file for file in files if file not in own]
    of_images, ends = _places(images, root), _places(files, folder)
    # Of trees of recurring names, one that lacks a file must not take that of another image.
    taken = set(of_images).intersection(ends)
    places: defaultdict[str, list[str]] = defaultdict(list)
    names: defaultdict[str, list[str]] = defaultdict(list)
    for file, end in zip(files, ends, strict=True):
        places[end].append(file)
        if end not in taken:
            names[os.path.basename(end)].append(file)
    found, alone = [], []
    for image, place in zip(images, of_images, strict=True):
        fitting = places.get(place) or names.get(os.path.basename(place), [])
        if len(fitting) > 1:
            raise InputError(
                f"{fitting[0]!r} and {fitting[1]!r} could both be the {what} of {image!r}: give "
                "each the name of its image, in a folder of the same name"
            )
        if fitting:
            found += fitting
        else:
            alone.append(image)
    if itself := next((image for image in alone if image in own), None):
        raise InputError(
            f"{itself!r} would be its own {what}: give --data the folder of the images alone"
        )
    if alone:
        by_name = [dict(zip(names, files, strict=True)) for names in readings(ends)]
        for of_image, of_file in product(map(dict.fromkeys, readings(of_images)), by_name):
            if of_image.keys() == of_file.keys():
                return [of_file[name] for name in of_image]
        raise InputError(
            f"{str(folder)!r} has no {what} for {counted(len(alone), 'image')}, such as "
            f"{alone[0]!r}: give each {what} its image's name, in folders like those of the images"
        )
    return found


def _places(files: Sequence[str], root: Path | None) -> list[str]:
    """The paths of files from a folder, without their endings, with letters as one character each;
    None: as they are.
    """
    start = 0 if root is None else len(str(root / "_")) - 1
    ends = (os.path.splitext(file[start:])[0].removesuffix(".ome") for file in files)
    return [unicodedata.normalize("NFC", end) for end in ends]
