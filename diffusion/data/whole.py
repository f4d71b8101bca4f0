"""`WholeImages`: the images of a source, brought to levels of one type, and kept where they fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.data.conditions import Condition, find_condition, partners
from diffusion.data.masks import Coding, find_masks
from diffusion.data.pixels import WHOLE, Pixels, ValueRange, as_levels, resized
from diffusion.data.ranges import find_ranges
from diffusion.data.sources import HowToRead, Source
from unet.errors import InputError
from unet.files.images import WHITE
from unet.files.mask_values import NOT_CLEANED, MaskCleaning
from unet.files.pages import ImageInfo
from unet.words import counted

CACHE_BYTES = 2**31  # images that together take no more are kept in memory, in each process
CHECKED = 20_000  # files whose headers are read before training; of more, as many spread evenly
CHECKED_PIXELS = 2**28  # up to so many in all, these files are decoded before training, too
CROP = 64  # side of a crop where no size is given


class WholeImages:
    """Whole images by number, as levels (H, W, C) of one type, and of one size unless crops are
    cut. Behind the channels of an image lie the codes of its mask, if this is made with it, and
    then the picture that it is made from, if it is made from one of a folder.

    Args:
        source, how: the images, and how they were read.
        size, channels, crops, skip_bad, ranges, fine, condition, pictures, masks, joint,
            cleaning: see `diffusion.data.images.DiffusionData`.

    Attributes:
        size, channels, codes, dtype, ranges, condition, masks, joint: see there.
        infos: what headers say: of all readable images, or of a sample of a large set.
        partners: the picture of each image, or else the mask, if there is one.
        left_out: the images that were found to be unreadable.

    Raises:
        InputError: see there.
    """

    def __init__(
        self,
        source: Source,
        how: HowToRead,
        *,
        size: int | None,
        channels: int | None,
        crops: bool,
        skip_bad: bool,
        ranges: Mapping[str, ValueRange],
        fine: bool,
        condition: str | Condition | None,
        pictures: str | Path | None,
        masks: Coding | None,
        joint: str | Path | None,
        cleaning: MaskCleaning,
    ) -> None:
        self.source, self._how, self._cleaning = source, how, cleaning
        self._crops, self._skip_bad, self._alike = crops, skip_bad, size is None and not crops
        self.left_out: set[int] = set()
        self._cache: dict[int, Pixels] = {}
        self.infos = self._read_headers()
        self.joint = joint is not None
        self._mask_files: list[str] = []
        if joint is not None:
            masks = masks or "bits"
            self._mask_files = self._named_as_images("--joint", Path(joint), "mask")
        self.masks = None
        if masks is not None:
            self.masks = find_masks(self._mask_files or source.files, masks, cleaning)
        self.codes = 0 if self.masks is None else self.masks.channels
        self.ranges, self.dtype, pictured = dict(ranges), "uint8", 0
        if self.masks is None or self.joint:
            types = {info.dtype for info in self.infos.values()}
            self.dtype = types.pop() if fine and len(types) == 1 else "uint8"
            pictured = channels or max(info.channels for info in self.infos.values())
            self.ranges = self._find_ranges(pictured)
        self.channels = pictured + self.codes
        if isinstance(condition, str):
            pictures = condition if os.path.isdir(condition) else None
        elif condition is None or condition.from_image:
            pictures = None
        self._pictures: list[str] = []
        if pictures is not None:
            self._pictures = self._named_as_images("--condition", Path(pictures), "condition")
        self.partners = self._pictures or self._mask_files
        if isinstance(condition, str):
            known, files = how.reading.nodata, self._pictures
            over = how.background or WHITE
            means = cleaning if self.masks is None else NOT_CLEANED
            shown = pictured or self.codes  # what a recipe makes the condition of
            condition = find_condition(condition, shown, known, files, over, means)
        self.condition = condition
        self.size = self._find_size(size)
        self._keeps = self._bytes() <= CACHE_BYTES
        if self._checkable():
            self.infos = {i: info for i, info in self.infos.items() if self.load(i) is not None}

    def __len__(self) -> int:
        return len(self.source.names)

    def load(self, image: int) -> Pixels | None:
        """The levels of an image and of what goes with it; None: it is left out, as unreadable.

        Raises:
            InputError: it cannot be read, or is not as the others, and bad ones are not skipped.
        """
        if image in self._cache or image in self.left_out:
            return self._cache.get(image)
        try:
            parts = self._read(image)
        except InputError as error:
            self._leave_out(image, error)
            return None
        if not self._crops:
            parts = self._resized(parts)
        pixels = np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
        if self._keeps:
            self._cache[image] = pixels
        return pixels

    def info(self, image: int) -> ImageInfo:
        """What the header of an image says."""
        return self.infos.get(image) or self.source.info(image)

    def groups(self) -> NDArray[np.int64]:
        """A number for each image (N,): the same for those that are made from one picture."""
        if not self.partners:
            return np.arange(len(self))
        return np.unique(self.partners, return_inverse=True)[1]

    @property
    def resized(self) -> bool:
        """Whether images are seen smaller or larger than they are."""
        return not self._crops and any(
            (info.height, info.width) != self.size for info in self.infos.values()
        )

    def lines(self) -> list[str]:
        """A printable description: images, sizes, colours and values."""
        infos = self.infos.values()
        sizes = sorted({(info.height, info.width) for info in infos}, key=math.prod)
        size = " to ".join(f"{h} x {w}" for h, w in dict.fromkeys((sizes[0], sizes[-1])))
        if self._crops:
            size = f"{size} for crops of {self.size[0]} x {self.size[1]}"
        elif sizes != [self.size]:
            size = f"{size}, resized to {self.size[0]} x {self.size[1]} and cropped at the centre"
        lines = [f"{counted(len(self) - len(self.left_out), 'image')} of {size}"]
        kinds = sorted({f"{_colour(info.channels)} {info.dtype}" for info in infos})
        pictured = self.channels - self.codes
        if pictured:
            used = f"{_colour(pictured)} {self.dtype}"
            converted = "" if kinds == [used] else f", all converted to {used}"
            lines.append(", ".join(kinds) + converted)
        if self.masks is not None:
            lines.append(f"{'with ' if pictured else ''}{self.masks.said()}")
        for dtype in sorted({info.dtype for info in infos} - {"uint8"}):
            found = self.ranges.get(dtype, WHOLE[dtype])
            kept = f"; images are made as {dtype}" if dtype == self.dtype else ""
            lines.append(f"values of {dtype}: {found} fill the range of the network{kept}")
        if any(info.has_alpha for info in infos):
            colour = " ".join(map(str, self._how.background or ()))
            lines.append(f"transparent pixels are put over the colour {colour}")
        for files in (self._pictures, self._mask_files):
            if files and Path(files[0]).stem != (image := Path(self.source.files[0])).stem:
                lines.append(f"{Path(files[0]).name} goes with {image.name}")
        return lines

    # ------------------------------------------------------------------------------------------
    # What all images have in common

    def _read_headers(self) -> dict[int, ImageInfo]:
        """What the headers say: of all images, or of some where these are many."""
        infos, chosen = {}, list(range(len(self)))
        if self.source.kind:
            chosen = chosen[:1]
        elif len(self) > CHECKED and not self._crops:
            chosen = np.linspace(0, len(self) - 1, CHECKED).astype(int).tolist()
        for image in chosen:
            try:
                infos[image] = self.source.info(image)
            except InputError as error:
                self._leave_out(image, error)
        if not infos:
            raise InputError(f"none of {len(self):,} images can be read")
        return infos

    def _named_as_images(self, flag: str, folder: Path, what: str) -> list[str]:
        """The file of a folder that goes with each image."""
        if not self.source.files or self.source.names != self.source.files:
            raise InputError(
                f"{flag} {folder} goes with a folder of images, one per file, not with stacks, "
                "archives or generated pictures"
            )
        return partners(self.source.files, folder, what, self.source.root)

    def _find_ranges(self, channels: int) -> dict[str, ValueRange]:
        """The range of each type; where channels are no colours, which belong together, of each."""
        rgba = channels == 4 and self._how.background is None
        parts = 1 if channels in (1, 3) or rgba else channels
        return find_ranges(self.source, self.infos, self._nodata, known=self.ranges, parts=parts)

    def _find_size(self, size: int | None) -> tuple[int, int]:
        side = size or CROP
        first = next((info.height, info.width) for info in self.infos.values())
        for image, info in self.infos.items():
            if self._alike:
                self._check_size(image, (info.height, info.width), first)
            elif self._crops and min(info.height, info.width) < side:
                raise InputError(
                    f"'{self.source.names[image]}' is {info.height} x {info.width}, too small for "
                    f"crops of {side} x {side}: give a smaller size, or leave crops off"
                )
        return first if self._alike else (side, side)

    def _bytes(self) -> int:
        """Of all images as they would be kept, as far as those say that were looked at."""
        sizes = [(i.height, i.width) for i in self.infos.values()] if self._crops else [self.size]
        mean = sum(height * width for height, width in sizes) / len(sizes)
        fine = self.dtype != "uint8" or (self.condition is not None and self.condition.fine)
        return round(mean * len(self) * self.channels * (4 if fine else 1))

    def _checkable(self) -> bool:
        """Whether the files are few enough to be decoded before training, to find a bad one."""
        pixels = sum(info.height * info.width for info in self.infos.values())
        return not self.source.kind and len(self) <= CHECKED and pixels <= CHECKED_PIXELS

    # ------------------------------------------------------------------------------------------
    # A single image

    def _read(self, image: int) -> list[Pixels]:
        """The levels of an image, and those of the files that go with it, as large as they are."""
        pixels = self._read_image(image)
        if self._alike:
            self._check_size(image, pixels.shape[:2], self.size)
        parts = [pixels]
        if self._mask_files and self.masks is not None:
            file = Path(self._mask_files[image])
            parts.append(_fitting(self.masks.read(file, self._cleaning), file, pixels))
        if self._pictures and self.condition is not None:
            file = Path(self._pictures[image])
            read = self.condition.read(file, self._how.reading.nodata)
            parts.append(_fitting(read, file, pixels))
        return parts

    def _read_image(self, image: int) -> Pixels:
        if self.masks is not None and not self.joint:
            return self.masks.read(Path(self.source.files[image]), self._cleaning)
        pixels, channels = self.source.read(image), self.channels - self.codes
        try:
            known, fine = self.ranges.get(pixels.dtype.name), self.dtype != "uint8"
            return as_levels(pixels, channels, known, self._nodata(image), fine=fine)
        except InputError as error:
            raise InputError(f"'{self.source.names[image]}': {error}") from error

    def _resized(self, parts: list[Pixels]) -> list[Pixels]:
        """The parts in the size of all images; pixels of masks are of a class then, too."""
        rgba = self.channels - self.codes == 4 and self._how.background is None
        parts = [resized(p, self.size, alpha=rgba and i == 0) for i, p in enumerate(parts)]
        if self.masks is not None:
            mask = 1 if self.joint else 0
            parts[mask] = self.masks.nearest(parts[mask])
        return parts

    def _nodata(self, image: int) -> float | None:
        info = self.infos.get(image)
        return self._how.reading.nodata if info is None else info.nodata

    def _check_size(self, image: int, size: tuple[int, ...], first: tuple[int, ...]) -> None:
        if size != first:
            name = self.source.names[next(iter(self.infos))]
            raise InputError(
                f"the images have different sizes, such as {first[0]} x {first[1]} ('{name}') and "
                f"{size[0]} x {size[1]} ('{self.source.names[image]}'): give a size to which all "
                "are resized and cropped, such as 64"
            )

    def _leave_out(self, image: int, error: InputError) -> None:
        if not self._skip_bad and len(self) == 1:
            raise error
        if not self._skip_bad:
            raise InputError(
                f"{error} (a training with --skip-bad leaves such files out)"
            ) from error
        self.left_out.add(image)
        print(f"left out: {error}", file=sys.stderr)


def _fitting(beside: Pixels, file: Path, pixels: Pixels) -> Pixels:
    """What a file holds, which must have the size of its image."""
    if beside.shape[:2] != pixels.shape[:2]:
        raise InputError(
            f"'{file}' is {beside.shape[0]} x {beside.shape[1]}, but its image "
            f"{pixels.shape[0]} x {pixels.shape[1]}"
        )
    return beside


def _colour(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels of")
