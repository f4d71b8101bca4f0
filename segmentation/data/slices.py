"""Neighbouring slices of a stack as further channels of an image (2.5D)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segmentation.data.layouts import stem_of
from segmentation.data.pairs import Pair
from unet.errors import InputError
from unet.files.images import Blocks
from unet.files.mask_values import some
from unet.files.pages import Array, ImageInfo
from unet.words import counted


@dataclass(frozen=True)
class Layers:
    """Slices (H, W, C) as one image (H, W, N C), of which `layers[rows, columns]` is read on
    demand.

    Attributes:
        parts: the slices in order; the middle one is the slice to label.
    """

    parts: Sequence[Array | Blocks]

    @property
    def middle(self) -> Array | Blocks:
        return self.parts[len(self.parts) // 2]

    @property
    def shape(self) -> tuple[int, int, int]:
        h, w, c = self.middle.shape
        return h, w, c * len(self.parts)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.middle.dtype

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Array:
        return np.concatenate([np.asarray(part[key]) for part in self.parts], axis=2)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:, :].astype(dtype or self.dtype, copy=False)


def near(index: int, count: int, slices: int) -> list[int]:
    """The indices of the slices around a slice of a stack; at the ends the nearest one is repeated.

    Args:
        count: of the stack's slices.
        slices: odd, how many are taken together.
    """
    half = slices // 2
    return [min(max(index + k, 0), count - 1) for k in range(-half, half + 1)]


def near_page(page: int, info: ImageInfo, slices: int) -> list[int]:
    """`near` of a page of a file, in which several series of slices may follow each other."""
    count = info.series or info.pages
    first = page // count * count
    return [first + i for i in near(page - first, count, slices)]


def middle(image: Array, slices: int) -> Array:
    """The middle slice, (H, W, C), of an image (H, W, slices C)."""
    channels = image.shape[2] // slices
    return image[..., slices // 2 * channels :][..., :channels]


def shown(pair: Pair, image: Array) -> Array:
    """The middle slice, (H, W, C), of what the pair's `read_image` gave."""
    return middle(image, max(1, len(pair.around)))


def known_slices(info: Mapping[str, Any]) -> int:
    """How many slices a model takes together, by its config.json.

    Raises:
        InputError: a damaged model.
    """
    found = info.get("slices", 1)
    if type(found) is not int or found < 1 or found % 2 == 0:
        raise InputError(
            f"a model has the slices {found!r} in its config.json, which must be an odd number"
        )
    return found


def channel_names(names: Sequence[str], channels: int, slices: int) -> tuple[str, ...]:
    """Names for the channels of `Layers`, from the number of channels of a slice or their names."""
    if slices == 1:
        return tuple(names)
    each = list(names) or ([""] if channels == 1 else [f"channel {i}" for i in range(channels)])
    places = range(-(slices // 2), slices // 2 + 1)
    return tuple(
        f"{name} slice {place:+d}".strip().replace("+0", "0") for place in places for name in each
    )


def with_neighbours(pairs: Sequence[Pair], slices: int) -> list[Pair]:
    """The same pairs, whose images have the neighbouring slices of their stack as further channels.

    The slices of a file or volume are a stack, and so are the files of a folder that have one size
    and are numbered without a gap.

    Args:
        slices: odd, how many are taken together; 1: the pairs as they are.

    Raises:
        InputError: single images.
    """
    if slices == 1:
        return list(pairs)
    slice_of = {pair.source: pair for pair in reversed(pairs)}  # several masks are of one slice
    alone = [pair for pair in pairs if slice_of[pair.source] is pair]
    places = around_each([_place(pair, slices) for pair in alone], [p.info for p in alone], slices)
    around = {
        pair.source: tuple(alone[i] for i in place)
        for pair, place in zip(alone, places, strict=True)
    }
    return [
        replace(
            pair,
            around=around[pair.source],
            info=replace(
                pair.info,
                channels=pair.info.channels * slices,
                names=channel_names(pair.info.names, pair.info.channels, slices),
            ),
        )
        for pair in pairs
    ]


@dataclass(frozen=True)
class Place:
    """Where a slice is: in a stack, or in a folder as a file whose name ends in its number."""

    stack: str | Path
    name: str = ""  # of a file

    @property
    def key(self) -> tuple[str | Path, str]:
        """What the slices of one stack have in common."""
        return self.stack, self.name[: len(self.name) - len(self.number)]

    @property
    def number(self) -> str:
        """The digits at the end of a file's name."""
        found = re.search("[0-9]*$", self.name)
        assert found is not None
        return found[0]


def around_each(
    places: Sequence[Place], infos: Sequence[ImageInfo], slices: int
) -> list[list[int]]:
    """For each slice the positions of those that are taken together with it, as `near` gives them.

    Args:
        places: of the slices, those of a stack in their order.
        infos: of their files.

    Raises:
        InputError: files that are not the slices of a stack.
    """
    stacks: dict[object, list[int]] = defaultdict(list)
    for i, place in enumerate(places):
        stacks[place.key].append(i)
    found: list[list[int]] = [[] for _ in places]
    for members in stacks.values():
        if places[members[0]].name:
            _check_numbered([places[i] for i in members], [infos[i] for i in members], slices)
        series = infos[members[0]].series or len(members)
        for at, i in enumerate(members):
            first = at // series * series
            count = min(series, len(members) - first)
            found[i] = [members[first + k] for k in near(at - first, count, slices)]
    return found


def _place(pair: Pair, slices: int) -> Place:
    if pair.stack:
        return Place(pair.stack)
    several = isinstance(pair.image, tuple)
    file = pair.image[0] if isinstance(pair.image, tuple) else pair.image
    if not isinstance(file, Path):
        raise InputError(
            f"--slices {slices} takes neighbouring slices together, and these images are single "
            "ones: leave it out, or give a stack or a volume"
        )
    return Place(file.parent, pair.name if several else stem_of(file))


def _check_numbered(files: Sequence[Place], infos: Sequence[ImageInfo], slices: int) -> None:
    """Refuses files that are not the slices of one stack, in their order."""
    rule = (
        f"--slices {slices} takes neighbouring pages of a stack, slices of a volume, or files of "
        f"one size that are numbered without a gap, but in {str(files[0].stack)!r}"
    )
    sizes = sorted({(i.height, i.width) for i in infos})
    if len(sizes) > 1:
        shown = some(f"{h} x {w}" for h, w in sizes)
        raise InputError(f"{rule} there are {len(sizes)} sizes, {shown}")
    if len(files) < 2 or not files[0].number:
        raise InputError(f"{rule} {files[0].name} is a single image")
    numbers = [int(file.number) for file in files]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        gone = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
        lost = f"without {some(gone)}" if gone else "in another order"
        raise InputError(f"{rule} the numbers go from {numbers[0]} to {numbers[-1]}, {lost}")


def told_stacks(pairs: Sequence[Pair]) -> str:
    """Which slices were taken as neighbours, in words."""
    places = {pair.source: _place(pair, len(pair.around)) for pair in pairs}
    stacks = Counter(place.key for place in places.values())
    sizes = sorted(set(stacks.values()))
    of = counted(sizes[0], "slice") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} slices"
    first = next(iter(places.values()))
    name = Path(first.stack).name
    name += f"/{first.key[1]}*" if first.name else ""
    return f"neighbours within {counted(len(stacks), 'stack')} of {of} ({name})"
