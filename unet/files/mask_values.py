"""The values of masks, numbers or colours, and what follows from their frequencies, for both
tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unet.errors import InputError
from unet.files.pages import Array

Value: TypeAlias = "int | tuple[int, ...]"  # of a mask pixel: a number or an RGB colour

MAX_CLASSES = 32
_BODY = 0.05  # share of a class's pixels that have only their like around them; of soft edges none
_COMMON = 0.01  # share of all pixels
_HANDFUL = 10  # pixels
APART = 16  # greys between two values that the noise of a JPEG does not mix up
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
        return known.astype(np.result_type(*map(np.min_scalar_type, known[[0, -1]])))[place]

    def said(self) -> str:
        """What is done, for people; nothing where nothing is."""
        if self.threshold:
            return "split in the middle"
        return f"each pixel the nearest of {', '.join(map(str, self.values))}" if self else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        return {"values": list(self.values), "threshold": self.threshold}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> MaskCleaning:
        """What `to_dict` gave, from JSON; KeyError, TypeError or ValueError if it is none."""
        return cls(tuple(map(int, saved["values"])), bool(saved["threshold"]))

    def _check_colours(self, mask: Array, grey: Array) -> None:
        """Refuses colours (H, W, 3) of which most are far from all values: greys of none."""
        coloured = grey[np.ptp(mask.astype(np.int64), axis=2) > 4 * APART]
        values = np.array((0, 255) if self.threshold else self.values)
        far = abs(coloured[:, None] - values).min(axis=1) > 2 * APART
        if far.sum() * 2 > len(coloured):
            raise InputError(
                "its classes are colours, whose greys are none of the values: save it as a PNG "
                "with the true colours, without --mask-values or --threshold-masks"
            )


NOT_CLEANED = MaskCleaning()


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
            found.add(name, mask)
            if len(found.pixels) > _MANY:
                break
        return found

    def add(self, name: str, mask: Array) -> None:
        """Counts a mask (H, W) or (H, W, 3) as well."""
        codes, colour = value_codes(mask), mask.ndim == 3
        inside = _has_its_like_around(codes)
        unique, counts = np.unique(codes, return_counts=True)
        # Twice without the inverse is many times faster than once with it.
        some_inside, bodies_inside = np.unique(codes[inside], return_counts=True)
        bodies = np.zeros_like(counts)
        bodies[np.searchsorted(unique, some_inside)] = bodies_inside
        values = code_values(unique, colour)
        self.masks += 1
        for value, count, body in zip(values, counts.tolist(), bodies.tolist(), strict=True):
            self.pixels[value] += count
            self.inside[value] += body
            self.files[value] = self.files.get(value, 0) + 1
            self.first.setdefault(value, name)
        if len(values) <= 8:
            self.kinds.setdefault(frozenset(values), name)

    def soft(self) -> tuple[list[Value], list[Value]] | None:
        """The true values, and those between them, if edges are soft; None: they are not."""
        thin = sorted(self._thin(), key=as_colour)
        if len(thin) < 3:
            return None
        common = _COMMON * sum(self.pixels.values())
        true = [v for v, n in self.pixels.items() if n >= common and v not in thin]
        if len(true) >= 2:
            return sorted(true, key=as_colour), thin
        if soft_edges(self.pixels):
            first, *between, last = sorted(self.pixels, key=as_colour)
            return [first, last], between
        return None

    def check(self) -> None:
        """Refuses masks whose values contradict each other.

        Raises:
            InputError: two encodings of one thing, soft edges, or a value of a few stray pixels.
        """
        self._check_encodings()
        if soft := self.soft():
            raise InputError(self._told_soft(*soft))
        if len(self.pixels) <= MAX_CLASSES:  # more are no classes, of which a few stray
            self._check_strays()

    def _thin(self) -> set[Value]:
        """The values that have no area of their own."""
        return {v for v, n in self.pixels.items() if self.inside[v] < _BODY * n}

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

    def _told_soft(self, true: Sequence[Value], thin: Sequence[Value]) -> str:
        edges = sum(self.pixels[v] for v in thin) / sum(self.pixels.values())
        where = self.first[max(thin, key=lambda v: self.pixels[v])]
        shown = some(f"{v} ({self.pixels[v]:,})" for v in thin)
        grey = [v if isinstance(v, int) else round(sum(v) / 3) for v in true]
        if any(isinstance(v, tuple) and max(v) - min(v) > APART for v in true):
            cure = "save them anew as PNG with the true colours, resized to the nearest pixel"
        else:
            cure = f"--mask-values {' '.join(map(str, grey))} gives each pixel the nearest of these"
            if len(true) == 2:
                cure += ", --threshold-masks splits them in the middle"
        return (
            f"the masks hold {len(self.pixels)} values, of which {len(thin)} have no area of their "
            f"own and {edges:.2%} of the pixels, such as in {where}: {shown}; soft edges, "
            f"or the noise of a JPEG file, around {listed(true)}? {cure}"
        )

    def _check_strays(self) -> None:
        for value in sorted(self._thin(), key=as_colour):
            count = self.pixels[value]
            if self.masks < 3 or self.files[value] > 1 or count > _HANDFUL or len(self.pixels) < 3:
                continue
            others = [v for v in sorted(self.pixels, key=as_colour) if v != value]
            named = all(isinstance(v, int) for v in others) and len(others) < 30
            cure = f", or give --mask-values {' '.join(map(str, others))}" if named else ""
            raise InputError(
                f"the value {value} is in one mask only, {self.first[value]}, in {count} pixels "
                f"without an area of their own, where the other values are {some(others)}: correct "
                f"the mask{cure}"
            )


def value_codes(mask: Array) -> NDArray[np.int64]:
    """One number (H, W) for each mask value (H, W) or colour (H, W, 3), in their order."""
    return codes_of(mask, mask.ndim == 3)


def codes_of(values: Array, colour: bool) -> NDArray[np.int64]:
    """One number for each value, in the order of the values."""
    values = values.astype(np.int64)
    return values @ np.array([2**32, 2**16, 1]) if colour else values


def code_values(codes: NDArray[np.int64], colour: bool) -> list[Value]:
    """The values that `value_codes` made these numbers of."""
    if not colour:
        return list(codes.tolist())
    return [(code >> 32, code >> 16 & 0xFFFF, code & 0xFFFF) for code in codes.tolist()]


def places(
    codes: NDArray[np.int64], values: Sequence[Value]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each of `codes_of` its place among rising values, and whether it is one of them."""
    table = codes_of(np.array(values), isinstance(values[0], tuple))
    found = np.searchsorted(table, codes).clip(max=len(table) - 1)
    return found, table[found] == codes


def joint_palette(masks: Iterable[tuple[bytes | None, Array]]) -> bytes | None:
    """The palette of masks of indices (H, W), from that of each; None: one has none, or they have
    different colours for an index that they use.
    """
    known: dict[int, bytes] = {}
    for palette, mask in masks:
        if palette is None:
            return None
        for index in np.unique(mask).tolist():
            colour = palette[3 * index : 3 * index + 3].ljust(3, b"\0")
            if known.setdefault(index, colour) != colour:
                return None
    return b"".join(known.get(index, bytes(3)) for index in range(256))


def check_colours(palette: bytes, mask: Array, where: str) -> None:
    """Refuses a mask of indices (H, W) whose colours cannot be its values.

    Raises:
        InputError: it uses two indices of one colour; names `where`.
    """
    table = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    first: dict[tuple[int, ...], int] = {}
    for index in np.unique(mask).tolist():
        colour = tuple(table[index].tolist())
        if (twin := first.setdefault(colour, index)) != index:
            raise InputError(
                f"{where}: the indices {twin} and {index} of its palette both have the "
                f"colour {colour}, and other masks have other palettes or none, so that only "
                "colours could say what is meant: give all masks one palette"
            )


def as_colour(value: Value) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value, value)


def listed(values: Iterable[Value]) -> str:
    """Some values in order, for a sentence."""
    ordered: list[Value] = sorted(values, key=as_colour)
    return some(ordered)


def some(values: Iterable[object]) -> str:
    """The first few of them and the last, for a sentence."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 9 else [*texts[:7], "...", texts[-1]])


def soft_edges(pixels: Counter[Value]) -> bool:
    """Whether the lowest and the highest value are the most frequent, with little in between."""
    ordered = sorted(pixels, key=as_colour)
    counts = [pixels[value] for value in ordered]
    if len(counts) < 3 or max(as_colour(ordered[-1])) - min(as_colour(ordered[0])) < 16:
        return False
    return max(counts[1:-1]) < min(counts[0], counts[-1]) and sum(counts[1:-1]) < sum(counts) / 5


def _has_its_like_around(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the four neighbours have the same value; beyond the border is what is next to it."""
    found = np.ones(codes.shape, bool)
    found[1:] &= codes[1:] == codes[:-1]
    found[:-1] &= codes[:-1] == codes[1:]
    found[:, 1:] &= codes[:, 1:] == codes[:, :-1]
    found[:, :-1] &= codes[:, :-1] == codes[:, 1:]
    return found
