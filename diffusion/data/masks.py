"""Masks that a diffusion model generates: each class is a code of -1 and 1, one channel per digit.

Codes are analog bits (arXiv 2208.04202), the digits of the class's number, or one-hot. A generated
pixel is of the class whose code is nearest. The codes are generated alone, or as channels behind
those of an image that is generated with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.data.pixels import Pixels
from unet.errors import InputError
from unet.files.images import image_info, read_mask
from unet.files.mask_values import (
    MAX_CLASSES,
    MaskCleaning,
    Survey,
    Value,
    as_colour,
    check_colours,
    code_values,
    codes_of,
    joint_palette,
    listed,
    places,
)
from unet.files.pages import Array, colour_table, naming

Coding = Literal["bits", "one-hot"]


@dataclass(frozen=True, kw_only=True)
class MaskCoding:
    """The classes of masks and their codes, saved with a model in `info["target"]`, or in
    `info["joint"]` where images are made with them.

    Attributes:
        values: of the masks, rising: all of them numbers from 0 to 255, or all RGB colours.
        palette: of masks of indices: red, green and blue of each in turn.
    """

    values: tuple[Value, ...]
    coding: Coding = "bits"
    palette: bytes | None = field(default=None, compare=False)

    @property
    def channels(self) -> int:
        """Digits of a code."""
        return self.codes.shape[1]

    @property
    def of_colours(self) -> bool:
        """Whether the values are colours."""
        return isinstance(self.values[0], tuple)

    @property
    def depth(self) -> int:
        """Channels of a mask's values: 3 of colours, else 1."""
        return 3 if self.of_colours else 1

    @property
    def codes(self) -> Pixels:
        """The code (K, C) of each class, of 0 and 255, which are -1 and 1 to the network."""
        count = len(self.values)
        if self.coding == "one-hot":
            return np.eye(count, dtype=np.uint8) * np.uint8(255)
        digits = np.arange(max(1, (count - 1).bit_length()))
        return ((np.arange(count)[:, None] >> digits & 1) * 255).astype(np.uint8)

    def read(self, file: Path, cleaning: MaskCleaning) -> Pixels:
        """The codes (H, W, C) of a mask file, once its values were cleaned.

        Raises:
            InputError: it cannot be read, or holds another value than these.
        """
        mask = read_cleaned(file, cleaning, colours=self.of_colours)
        if self.of_colours and mask.ndim == 2:
            mask = mask[..., None].repeat(3, axis=2)
        colour = mask.ndim == 3
        codes = codes_of(mask, colour)
        indices, known = places(codes, self.values)
        known &= colour == self.of_colours
        if not known.all():
            strange = code_values(np.unique(codes[~known])[:5], colour)
            raise InputError(
                f"{str(file)!r} holds {listed(strange)}, but masks have {listed(self.values)}"
            )
        return self.codes[indices]

    def classes(self, mask: Array) -> NDArray[np.uint8]:
        """The classes (..., H, W) of these values (..., H, W, V) alone, where V is `depth`."""
        codes = codes_of(mask if self.of_colours else mask[..., 0], self.of_colours)
        return places(codes, self.values)[0].astype(np.uint8)

    def indices(self, pixels: Pixels) -> NDArray[np.uint8]:
        """The class (..., H, W) whose code is nearest to pixels (..., H, W, C)."""
        signs = self.codes.astype(np.float32) / 127.5 - 1  # all of one length
        found: NDArray[np.uint8] = (pixels.astype(np.float32) - 127.5).dot(signs.T).argmax(-1)
        return found.astype(np.uint8)

    def nearest(self, pixels: Pixels) -> Pixels:
        """Pixels (..., H, W, C) with the nearest code in the place of each."""
        return self.codes[self.indices(pixels)]

    def decode(self, made: Pixels) -> Array:
        """The channels (..., H, W, I) before the codes, unchanged, and then the mask's values, of
        which each has `depth` channels.

        Args:
            made: (..., H, W, I + C); I is 0 where masks alone are made.
        """
        images, codes = np.split(made, [made.shape[-1] - self.channels], axis=-1)
        values = np.array(self.values, np.uint8).reshape(-1, self.depth)[self.indices(codes)]
        return np.concatenate([images, values], axis=-1)

    def shown(self, decoded: Array) -> NDArray[np.uint8]:
        """What `decode` gives of bytes, for people: mask values in their colours, or as greys from
        black to white where they have none or the image is neither grey nor RGB; alone (H, W, C),
        or to the right of their image (H, 2 W, C).
        """
        images, masks = np.split(decoded, [decoded.shape[-1] - self.depth], axis=-1)
        channels = images.shape[-1]
        table = self._colours() if channels in (0, 1, 3) else self._greys()
        pictures = table[self.classes(masks)]
        if not channels:
            return pictures
        wide = max(channels, pictures.shape[-1])
        both = (side.repeat(wide // side.shape[-1], axis=-1) for side in (images, pictures))
        return np.concatenate([*both], axis=-2)

    def _greys(self) -> NDArray[np.uint8]:
        """A grey (K, 1) for each class."""
        return np.linspace(0, 255, len(self.values)).round().astype(np.uint8)[:, None]

    def _colours(self) -> NDArray[np.uint8]:
        """The colour (K, 3) of each class, or a grey (K, 1) where they have none."""
        if self.of_colours:
            return np.array(self.values, np.uint8)
        return self._greys() if self.palette is None else colour_table(self.palette)[[*self.values]]

    def said(self) -> str:
        """The coding in words."""
        kind = "colours" if self.of_colours else "values"
        return f"masks of the {kind} {', '.join(map(str, self.values))}, as {self.coding}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        saved: dict[str, Any] = {"values": list(self.values), "coding": self.coding}
        return saved if self.palette is None else {**saved, "palette": self.palette.hex()}

    @classmethod
    def from_dict(cls, saved: Any) -> MaskCoding:
        """What `to_dict` gave, from JSON; InputError if it is none."""
        try:
            values = [tuple(v) if isinstance(v, list) else v for v in saved["values"]]
            numbers = [n for v in values for n in (v if isinstance(v, tuple) else (v,))]
            palette = saved.get("palette")
            palette = None if palette is None else bytes.fromhex(palette)
            if (
                not all(type(n) is int and 0 <= n <= 255 for n in numbers)
                or np.shape(values)[1:] not in ((), (3,))
                or not 2 <= len(values) <= MAX_CLASSES
                or sorted(set(values)) != values
                or saved["coding"] not in get_args(Coding)
                or (palette is not None and len(palette) < 3 * (max(numbers) + 1))
            ):
                raise ValueError("no masks")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the model's target is damaged: {saved!r:.200}") from error
        return cls(values=tuple(values), coding=saved["coding"], palette=palette)


def find_masks(files: Sequence[str], coding: Coding, cleaning: MaskCleaning) -> MaskCoding:
    """The classes of mask files, all of which are read, and their values cleaned.

    Raises:
        InputError: they are no masks: values beyond 0 to 255, more than MAX_CLASSES or one; values
            that contradict each other, or soft edges (`Survey.check`, `check_colours`).
    """
    paths = [Path(file) for file in files]
    palette, colours = (None, False) if cleaning else find_palette(paths)
    for path in paths if colours else ():
        if (own := image_info(path).palette) is not None:
            check_colours(own, read_mask(path), repr(str(path)))
    survey = survey_of(paths, cleaning, colours=colours)
    survey.check()
    found: set[Value] = {*survey.pixels}
    if any(isinstance(value, tuple) for value in found):  # greys among colours are colours
        found = {as_colour(value) for value in found}
    values = sorted(found, key=as_colour)
    numbers = [n for value in values for n in as_colour(value)]
    if len(values) > MAX_CLASSES or not 0 <= min(numbers) <= max(numbers) <= 255:
        last = max(survey.pixels, key=as_colour)
        raise InputError(
            f"the files up to {survey.first[last]} hold {len(values)} values from {values[0]} to "
            f"{values[-1]}, but masks have up to {MAX_CLASSES} values of 0 to 255: name a folder "
            "of masks, in which a value stands for a class; numbers of objects are not learnt"
        )
    if len(values) < 2:
        raise InputError(f"all pixels of the masks have the value {values[0]}; two are needed")
    return MaskCoding(values=tuple(values), coding=coding, palette=palette)


def find_palette(files: Sequence[Path]) -> tuple[bytes | None, bool]:
    """The palette of mask files, if all are of indices and agree on their colours, and whether
    the classes are colours instead, as some files have another palette or none.
    """
    palettes = {image_info(file).palette for file in files}
    if len(palettes) == 1:
        return palettes.pop(), False
    found = joint_palette((image_info(file).palette, read_mask(file)) for file in files)
    return found, found is None


def survey_of(files: Iterable[Path], cleaning: MaskCleaning, *, colours: bool = False) -> Survey:
    """The cleaned values of mask files, read until there are more than classes can be.

    Args:
        colours: the values of palette files are their colours, not their indices.

    Raises:
        InputError: one that cannot be read.
    """
    survey = Survey()
    for file in files:
        survey.add(repr(str(file)), read_cleaned(file, cleaning, colours=colours))
        if len(survey.pixels) > MAX_CLASSES:
            break
    return survey


def read_cleaned(file: Path, cleaning: MaskCleaning, *, colours: bool = False) -> Array:
    """The values (H, W) or (H, W, 3) of a mask file that count.

    Args:
        colours: see `survey_of`.

    Raises:
        InputError: it cannot be read, or its colours are none of the values.
    """
    mask = read_mask(file, colours=colours, lossy=bool(cleaning))
    with naming(file):
        return cleaning(mask)
