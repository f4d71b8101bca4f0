"""Masks that a diffusion model generates: each class is a code of -1 and 1, one channel per digit.

Codes are analog bits (arXiv 2208.04202), the digits of the class's number, or one-hot. A generated
pixel is of the class whose code is nearest. The codes are generated alone, or as channels behind
those of an image that is generated with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.data.pixels import Pixels
from unet.errors import InputError
from unet.files.images import read_mask
from unet.files.mask_values import MAX_CLASSES, MaskCleaning, Survey
from unet.files.pages import Array, naming

Coding = Literal["bits", "one-hot"]


@dataclass(frozen=True, kw_only=True)
class MaskCoding:
    """The classes of masks and their codes, saved with a model in `info["target"]`, or in
    `info["joint"]` where images are made with them.

    Attributes:
        values: of the masks, from 0 to 255, rising.
    """

    values: tuple[int, ...]
    coding: Coding = "bits"

    @property
    def channels(self) -> int:
        """Digits of a code."""
        return self.codes.shape[1]

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
            InputError: it cannot be read, holds colours, or another value than these.
        """
        mask = read_cleaned(file, cleaning)
        indices = np.searchsorted(self.values, mask).clip(max=len(self.values) - 1)
        known = mask.ndim == 2 and np.array(self.values)[indices] == mask
        if not np.all(known):
            strange = "colours" if mask.ndim == 3 else np.unique(mask[~known])[:5].tolist()
            raise InputError(f"{str(file)!r} holds {strange}, but masks have {list(self.values)}")
        return self.codes[indices]

    def indices(self, pixels: Pixels) -> NDArray[np.uint8]:
        """The class (..., H, W) whose code is nearest to pixels (..., H, W, C)."""
        signs = self.codes.astype(np.float32) / 127.5 - 1  # all of one length
        found: NDArray[np.uint8] = (pixels.astype(np.float32) - 127.5).dot(signs.T).argmax(-1)
        return found.astype(np.uint8)

    def nearest(self, pixels: Pixels) -> Pixels:
        """Pixels (..., H, W, C) with the nearest code in the place of each."""
        return self.codes[self.indices(pixels)]

    def decode(self, made: Pixels) -> Array:
        """The channels (..., H, W, I) before the codes, unchanged, and then the mask's values.

        Args:
            made: (..., H, W, I + C); I is 0 where masks alone are made.
        """
        images, codes = np.split(made, [made.shape[-1] - self.channels], axis=-1)
        values = np.array(self.values, np.uint8)[self.indices(codes)]
        return np.concatenate([images, values[..., None]], axis=-1)

    def shown(self, decoded: Array) -> NDArray[np.uint8]:
        """What `decode` gives of bytes, for people: mask values as greys from black to white,
        (H, W, 1), or to the right of their image (H, 2 W, I).
        """
        images, masks = np.split(decoded, [decoded.shape[-1] - 1], axis=-1)
        indices = np.searchsorted(self.values, masks)
        greys = np.round(indices * (255 / (len(self.values) - 1))).astype(np.uint8)
        if not (channels := images.shape[-1]):
            return greys
        return np.concatenate([images, greys.repeat(channels, axis=-1)], axis=-2)

    def said(self) -> str:
        """The coding in words."""
        return f"masks of the values {', '.join(map(str, self.values))}, as {self.coding}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        return {"values": list(self.values), "coding": self.coding}

    @classmethod
    def from_dict(cls, saved: Any) -> MaskCoding:
        """What `to_dict` gave, from JSON; InputError if it is none."""
        values = saved.get("values") if isinstance(saved, Mapping) else None
        if (
            not isinstance(values, list)
            or not all(type(value) is int and 0 <= value <= 255 for value in values)
            or not 2 <= len(values) <= MAX_CLASSES
            or sorted(set(values)) != values
            or saved.get("coding") not in get_args(Coding)
        ):
            raise InputError(f"the model's target is damaged: {saved!r:.200}")
        return cls(values=tuple(values), coding=saved["coding"])


def find_masks(files: Sequence[str], coding: Coding, cleaning: MaskCleaning) -> MaskCoding:
    """The classes of mask files, all of which are read, and their values cleaned.

    Raises:
        InputError: they are no masks: colours, values beyond 255, more than MAX_CLASSES or one;
            values that contradict each other, or soft edges (`Survey.check`).
    """
    survey = survey_of(map(Path, files), cleaning)
    survey.check()
    values = sorted(value for value in survey.pixels if isinstance(value, int))
    if len(values) > MAX_CLASSES or values[-1] > 255:
        raise InputError(
            f"the files up to {survey.first[values[-1]]} hold {len(values)} values up to "
            f"{values[-1]}, but masks have up to {MAX_CLASSES} values of 0 to 255: name a folder "
            "of masks, in which a value stands for a class; numbers of objects are not learnt"
        )
    if len(values) < 2:
        raise InputError(f"all pixels of the masks have the value {values[0]}; two are needed")
    return MaskCoding(values=tuple(values), coding=coding)


def survey_of(files: Iterable[Path], cleaning: MaskCleaning) -> Survey:
    """The cleaned values of mask files, read until there are more than classes can be.

    Raises:
        InputError: one that cannot be read, or holds colours.
    """
    survey = Survey()
    for file in files:
        mask = read_cleaned(file, cleaning)
        if mask.ndim == 3:
            raise InputError(
                f"{str(file)!r} holds colours, but masks to learn from must hold numbers"
            )
        survey.add(repr(str(file)), mask)
        if len(survey.pixels) > MAX_CLASSES:
            break
    return survey


def read_cleaned(file: Path, cleaning: MaskCleaning) -> Array:
    """The values (H, W) or (H, W, 3) of a mask file that count.

    Raises:
        InputError: it cannot be read, or its colours are none of the values.
    """
    mask = read_mask(file, lossy=bool(cleaning))
    with naming(file):
        return cleaning(mask)
