"""How the values of masks stand for classes, found from the masks themselves.

Masks that contradict each other or themselves are refused with the evidence: which file holds which
values in how many pixels. What a person has to say then is one option.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segmentation.data.classes import MAX_CLASSES, Value, code_values, listed, some, value_codes
from unet.errors import InputError
from unet.files.pages import Array

VOID = 255  # by convention the value of pixels that nobody labelled, such as the edges of objects
VOID_WIDTH = 5  # pixels from the rim of such an edge to its middle, at most
_BODY = 0.05  # share of a class's pixels that have only their like around them; of soft edges none
_COMMON = 0.01  # share of all pixels
_HANDFUL = 10  # pixels
_APART = 16  # greys between two values that the noise of a JPEG does not mix up
_MANY = 3000  # distinct values, from which on no more masks need to be looked at


@dataclass(frozen=True)
class MaskCleaning:
    """What is done to the stored values of masks before they stand for classes.

    Attributes:
        values: each pixel takes the nearest of them; of colours, the mean of the channels does.
        threshold: two classes, 0 and 255: above half of the largest value that the mask's kind has,
            which is 1, 255 or 65535.
    """

    values: tuple[int, ...] = ()
    threshold: bool = False

    def __bool__(self) -> bool:
        return bool(self.values) or self.threshold

    def __call__(self, mask: Array) -> Array:
        """(H, W) or (H, W, 3) as stored -> the values that count."""
        if not self:
            return mask
        grey = mask if mask.ndim == 2 else mask.mean(axis=2)
        if mask.ndim == 3:
            self._check_colours(mask, grey)
        if self.threshold:
            highest = grey.max()
            white = 1 if highest <= 1 else 255 if highest <= 255 else 65535
            return np.where(grey > white / 2, np.uint8(255), np.uint8(0))
        known = np.array(sorted(set(self.values)))
        place = np.searchsorted((known[1:] + known[:-1]) / 2, grey)
        return known.astype(np.min_scalar_type(int(known.max())))[place]

    def _check_colours(self, mask: Array, grey: Array) -> None:
        """Refuses colours (H, W, 3) of which most are far from all values: greys of none."""
        coloured = grey[np.ptp(mask.astype(np.int64), axis=2) > 4 * _APART]
        values = np.array((0, 255) if self.threshold else self.values)
        far = abs(coloured[:, None] - values).min(axis=1) > 2 * _APART
        if far.sum() * 2 > len(coloured):
            raise InputError(
                "its classes are colours, whose greys are none of the values: save it as a PNG "
                "with the true colours, without --mask-values or --threshold-masks"
            )


@dataclass
class Survey:
    """The values of a set of masks: pixels, those inside an area of their value, and files."""

    pixels: Counter[Value] = field(default_factory=Counter)
    inside: Counter[Value] = field(default_factory=Counter)  # with only their like around them
    files: dict[Value, int] = field(default_factory=dict)  # the number of masks with it
    first: dict[Value, str] = field(default_factory=dict)  # the name of one of them
    kinds: dict[frozenset[Value], str] = field(default_factory=dict)  # values that meet, in which
    masks: int = 0

    @classmethod
    def of(cls, masks: Iterable[tuple[str, Array]]) -> Survey:
        """The survey of named masks (H, W) or (H, W, 3); of colours if any of them has some."""
        found = cls()
        for name, mask in masks:
            codes, colour = value_codes(mask), mask.ndim == 3
            inside = _has_its_like_around(codes)
            unique, counts = np.unique(codes, return_counts=True)
            # Twice without the inverse is many times faster than once with it.
            some_inside, bodies_inside = np.unique(codes[inside], return_counts=True)
            bodies = np.zeros_like(counts)
            bodies[np.searchsorted(unique, some_inside)] = bodies_inside
            values = code_values(unique, colour)
            found.masks += 1
            for value, count, body in zip(values, counts.tolist(), bodies.tolist(), strict=True):
                found.pixels[value] += count
                found.inside[value] += body
                found.files[value] = found.files.get(value, 0) + 1
                found.first.setdefault(value, name)
            if len(values) <= 8:
                found.kinds.setdefault(frozenset(values), name)
            if len(found.pixels) > _MANY:
                break
        return found

    def check(self) -> None:
        """Refuses masks whose values contradict each other.

        Raises:
            InputError: two encodings of one thing, soft edges, or a value of a few stray pixels.
        """
        self._check_encodings()
        total = sum(self.pixels.values())
        thin = [v for v, n in self.pixels.items() if self.inside[v] < _BODY * n]
        true = [
            v
            for v, n in self.pixels.items()
            if n >= _COMMON * total and self.inside[v] >= _BODY * n
        ]
        if len(thin) >= 3 and len(true) >= 2:
            raise InputError(self._soft(sorted(true, key=_key), thin, total))
        if len(thin) >= 3 and soft_edges(self.pixels):
            ends = sorted(self.pixels, key=_key)
            raise InputError(self._soft([ends[0], ends[-1]], ends[1:-1], total))
        if len(self.pixels) <= MAX_CLASSES:  # more are no classes, of which a few stray
            self._check_strays(thin)

    def _check_encodings(self) -> None:
        """0 and 1 in some files, 0 and 255 in others: one class or two?"""
        for white in (255, 65535):
            low = next((n for k, n in self.kinds.items() if 1 in k and white not in k), None)
            high = next((n for k, n in self.kinds.items() if white in k and 1 not in k), None)
            only = all(k <= {0, 1} or k <= {0, white} for k in self.kinds)
            if (
                low
                and high
                and only
                and sum(self.files.values())
                and set(self.pixels) <= {0, 1, white}
            ):
                counts = self.pixels
                raise InputError(
                    f"some masks hold 0 and 1, such as {low} ({self.files[1]} of {self.masks} "
                    f"masks, {counts[1]:,} pixels of 1), others 0 and {white}, such as {high} "
                    f"({self.files[white]} masks, {counts[white]:,} pixels), and no mask both: two "
                    "encodings of one class? --threshold-masks unites them"
                )

        self._check_scales()

    def _check_scales(self) -> None:
        """1, 2, ... n in some files, and as many even steps, such as 127 and 255, in others."""
        used = sorted({v for v in self.pixels if isinstance(v, int) and v > 0})
        low = [v for v in used if v < MAX_CLASSES]
        high = used[len(low) :]
        meet = any(kind & set(low) and kind & set(high) for kind in self.kinds)
        if meet or len(low) < 2 or low != list(range(1, len(high) + 1)):
            return
        if all(abs(v - high[-1] * i / len(low)) <= 1 for i, v in enumerate(high, 1)):
            raise InputError(
                f"some masks hold {listed(low)}, such as {self.first[low[-1]]}, others "
                f"{listed(high)}, such as {self.first[high[-1]]}, and no mask both: two encodings "
                "of the same classes? Save all masks with the values of the first"
            )

    def _soft(self, true: Sequence[Value], thin: Sequence[Value], total: int) -> str:
        edges = sum(self.pixels[v] for v in thin)
        where = self.first[max(thin, key=lambda v: self.pixels[v])]
        shown = some(f"{v} ({self.pixels[v]:,})" for v in sorted(thin, key=_key))
        grey = [v if isinstance(v, int) else round(sum(v) / 3) for v in true]
        if any(isinstance(v, tuple) and max(v) - min(v) > _APART for v in true):
            cure = "save them anew as PNG with the true colours, resized to the nearest pixel"
        else:
            cure = f"--mask-values {' '.join(map(str, grey))} gives each pixel the nearest of these"
            if len(true) == 2:
                cure += ", --threshold-masks splits them in the middle"
        return (
            f"the masks hold {len(self.pixels)} values, of which {len(thin)} have no area of their "
            f"own and {edges / total:.2%} of the pixels, such as in {where}: {shown}; soft edges, "
            f"or the noise of a JPEG file, around {listed(true)}? {cure}"
        )

    def _check_strays(self, thin: Sequence[Value]) -> None:
        for value in sorted(thin, key=_key):
            count = self.pixels[value]
            if self.masks < 3 or self.files[value] > 1 or count > _HANDFUL or len(self.pixels) < 3:
                continue
            others = [v for v in sorted(self.pixels, key=_key) if v != value]
            grey = all(isinstance(v, int) for v in others)
            cure = (
                f"--mask-values {' '.join(map(str, others))}" if grey and len(others) < 30 else ""
            )
            raise InputError(
                f"the value {value} is in one mask only, {self.first[value]}, in {count} pixels "
                f"without an area of their own, where the other values are {some(others)}: correct "
                f"the mask{', or give ' + cure if cure else ''}"
            )


def is_void(survey: Survey, masks: Iterable[Array]) -> bool:
    """Whether 255 marks the edges of objects, as in Pascal VOC, which have no label.

    That is where the other values are 0, 1, 2 ..., and of the pixels of 255 three quarters are
    within VOID_WIDTH of another value, and as many in a part that touches two other values.

    Args:
        masks: some of them, (H, W).
    """
    others = sorted(v for v in survey.pixels if isinstance(v, int) and v != VOID)
    if VOID not in survey.pixels or len(others) != len(survey.pixels) - 1:
        return False
    if len(others) < 2 or others[0] > 1 or others[-1] >= VOID // 2:
        return False
    near = between = count = 0
    for mask in masks:
        void = mask == VOID
        near += int((ndimage.distance_transform_edt(void)[void] <= VOID_WIDTH).sum())
        count += int(void.sum())
        parts = ndimage.label(void, np.ones((3, 3)))[0]
        for number, box in enumerate(ndimage.find_objects(parts), 1):
            around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
            part = parts[around] == number
            rim = ndimage.binary_dilation(part, np.ones((3, 3))) & ~part
            between += int(part.sum()) if len(np.unique(mask[around][rim])) > 1 else 0
    return min(near, between) >= 0.75 * count > 0


def are_instances(masks: Iterable[Array], *, expected: bool = False) -> bool:
    """Whether masks (H, W) number objects: 0 and one connected part for each other value.

    In each mask 9 of 10 values are one part, of 9 pixels or more on average; there are on average
    more than three in a mask, and the highest one differs between masks, or they are more than
    classes can be.

    Args:
        expected: the files are named and stored as numbered masks are: parts are enough.
    """
    values = count = 0
    highest = set()
    for mask in masks:
        if mask.ndim != 2 or mask.min() < 0:
            return False
        numbers, places = np.unique(mask, return_inverse=True)
        order = places.reshape(mask.shape)
        whole = several = 0
        for i, box in enumerate(ndimage.find_objects(order + 1)):
            if box is not None and numbers[i] != 0:
                parts = ndimage.label(order[box] == i, np.ones((3, 3)))[1]
                whole, several = whole + (parts == 1), several + (parts > 1)
        if several > 0.1 * (whole + several) or (mask != 0).sum() < 9 * whole:
            return False
        highest.add(int(numbers[-1]))
        values, count = values + whole, count + 1
    if expected:
        return values > 0
    return values > 3 * count and (len(highest) > 1 or max(highest) > MAX_CLASSES)


def joined(parts: Sequence[Array]) -> tuple[NDArray[np.int32], int, int]:
    """One numbered mask of the masks (H, W) of single objects, from 1 on.

    Returns:
        The mask, the number of pixels that two objects claim (the later one has them), and the
        number of objects with a hole.
    """
    numbers = np.zeros(parts[0].shape[:2], np.int32)
    overlaps = holes = 0
    for number, part in enumerate(parts, 1):
        whole = np.asarray(part.any(axis=2) if part.ndim == 3 else part != 0)
        for box in ndimage.find_objects(whole.astype(np.uint8)):
            inside, region = whole[box], numbers[box]
            overlaps += int((inside & (region > 0)).sum())
            holes += bool((ndimage.binary_fill_holes(inside) != inside).any())
            region[inside] = number
    return numbers, overlaps, holes


def soft_edges(pixels: Counter[Value]) -> bool:
    """Whether the lowest and the highest value are the most frequent, with little in between."""
    ordered = sorted(pixels, key=_key)
    counts = [pixels[value] for value in ordered]
    if len(counts) < 3 or max(_key(ordered[-1])) - min(_key(ordered[0])) < 16:
        return False
    return max(counts[1:-1]) < min(counts[0], counts[-1]) and sum(counts[1:-1]) < sum(counts) / 5


def _key(value: Value) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value, value)


def _has_its_like_around(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the four neighbours have the same value; beyond the border is what is next to it."""
    found = np.ones(codes.shape, bool)
    found[1:] &= codes[1:] == codes[:-1]
    found[:-1] &= codes[:-1] == codes[1:]
    found[:, 1:] &= codes[:, 1:] == codes[:, :-1]
    found[:, :-1] &= codes[:, :-1] == codes[:, 1:]
    return found
