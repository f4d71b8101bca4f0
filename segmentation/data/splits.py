"""Which images are trained on and which are held out, and strips of an image where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data.layouts import stem_of
from segmentation.data.pairs import Pair
from unet.errors import InputError
from unet.files.mask_values import Value
from unet.words import counted

THINNEST = 16  # pixels of a strip


def split_pairs(
    pairs: Sequence[Pair],
    val: float = 0.2,
    fold: str | None = None,
    val_names: Sequence[str] | None = None,
    *,
    ignore_value: Value | None = None,
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs, by name, by fold, or else the last `val` of them.

    By default validation is one contiguous block, since neighbouring slices of a stack look alike.
    Masks of one image by several annotators are on one side, and so are the slices of a volume
    where there are several volumes, which then are what is counted. Images that have no label at
    all are left out. A single image with labels is cut into strips of as many labelled pixels,
    which are images of their own: nothing that is trained on shows a pixel that is held out.

    Where folders say which images are held out (`Pair.part`), these are, unless names or a fold are
    given.

    Args:
        val: share for validation, from 0 (nothing is held out) and below 1; else at least one pair
            is on each side.
        fold: "k/n": the k-th of n contiguous blocks, from 1.
        val_names: names, 0-based positions, or ranges "24-29" of either, or names of volumes; a
            name goes first.
        ignore_value: mask value of pixels without a label.

    Raises:
        InputError: no pair with a label, a bad share, fold or name, or nothing left to train on.
    """
    if val_names is not None and fold is not None:
        raise InputError("give a fold or validation images, not both")
    if not 0 <= val < 1:
        raise InputError(f"validation share {val}: give a number from 0 to below 1")
    held_out = {name for entry in val_names or () for name in _named(entry, pairs)}
    if ignore_value is not None:
        pairs = [pair for pair in pairs if _labels(pair, ignore_value).any()]
    # Slices that are named are held out by themselves.
    unit = unit_of(pairs) if val_names is None else lambda pair: pair.source
    sources = list(dict.fromkeys(map(unit, pairs)))
    count = len(sources)
    if not count:
        raise InputError("no image has a label: every pixel of the masks is ignored")
    if val_names is not None:
        chosen = _of(sources, {pair.source for pair in pairs if pair.name in held_out})
        if not 0 < len(chosen) < count:
            raise InputError(
                f"{len(chosen)} of {counted(count, 'image')} for validation; leave "
                "some on each side"
            )
    elif fold is None and any(pair.part == "val" for pair in pairs):
        chosen = _of(sources, {unit(pair) for pair in pairs if pair.part == "val"})
        if len(chosen) == count:
            raise InputError("no image is left to train on: all of them are held out")
    elif fold is not None:
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", fold)
        k, n = map(int, match.groups()) if match else (0, 0)
        most = count if count > 1 else 10
        if not 1 <= k <= n or not 2 <= n <= most:
            what = "volume" if isinstance(sources[0], str) else "image"
            raise InputError(
                f"fold {fold!r} of {counted(count, what)}: give k/n, such as 1/{min(5, most)}, "
                f"k <= n <= {most}"
            )
        if count == 1:
            _check_alone(pairs)
            return _strips(pairs[0], (k - 1) / n, k / n, ignore_value)
        chosen = set(range(count * (k - 1) // n, count * k // n))
    elif val == 0:
        chosen = set()
    elif count == 1:
        _check_alone(pairs)
        return _strips(pairs[0], 1 - val, 1.0, ignore_value)
    else:
        chosen = set(range(count - min(max(round(val * count), 1), count - 1), count))
    unseen = {sources[i] for i in chosen}
    train = [pair for pair in pairs if unit(pair) not in unseen]
    return train, [pair for pair in pairs if unit(pair) in unseen]


def unit_of(pairs: Sequence[Pair]) -> Callable[[Pair], object]:
    """What a split keeps together: the volume of a pair if there are several volumes, since slices
    look alike, else its image.
    """
    if len({pair.stack for pair in pairs if pair.stack}) > 1:
        return lambda pair: pair.stack or pair.source
    return lambda pair: pair.source


def _named(entry: str, pairs: Sequence[Pair]) -> list[str]:
    """The names of the pairs that an entry of `val_names` means."""
    names = [pair.name for pair in pairs]
    slices = [p.name for p in pairs if p.stack and stem_of(Path(p.stack)) == entry]
    return slices if slices and entry not in names else [names[i] for i in _positions(entry, names)]


def _of(sources: Sequence[object], wanted: set[Any]) -> set[int]:
    return {i for i, source in enumerate(sources) if source in wanted}


def _check_alone(pairs: Sequence[Pair]) -> None:
    if len(pairs) > 1:
        raise InputError(
            f"there is a single image, with {len(pairs)} masks: hold out nothing with --val 0, or "
            "give more images"
        )


def _strips(
    pair: Pair, start: float, end: float, ignore_value: Value | None
) -> tuple[list[Pair], list[Pair]]:
    """An image's parts to train on, and the strip that holds these shares of its labelled pixels.

    It is cut across the longer side of what is labelled.
    """
    labels = _labels(pair, ignore_value)
    extents = [np.flatnonzero(labels.any(axis=1 - axis)) for axis in (0, 1)]
    axis = int(np.argmax([places[-1] - places[0] for places in extents]))
    counts = np.cumsum(labels.sum(axis=1 - axis))
    length = labels.shape[axis]
    # The first and the last strip reach to the border of the image.
    first = 0 if start <= 0 else int(np.searchsorted(counts, start * counts[-1], "right"))
    last = length if end >= 1 else int(np.searchsorted(counts, end * counts[-1], "right"))
    parts = [(0, first), (first, last), (last, length)]
    if any(0 < stop - begin < THINNEST for begin, stop in parts) or first >= last:
        raise InputError(
            f"{pair.name} is the only image with labels, and they are too few to hold out a strip "
            f"of them of at least {THINNEST} pixels: label more, or hold out nothing with --val 0"
        )
    found = [_part(pair, axis, *part) if part[0] < part[1] else None for part in parts]
    train = [part for part in (found[0], found[2]) if part and _labels(part, ignore_value).any()]
    if not train or found[1] is None:
        raise InputError(f"{pair.name} has no labels beside those that are held out")
    return train, [found[1]]


def _part(pair: Pair, axis: int, start: int, stop: int) -> Pair:
    """Rows or columns of an image, as an image of its own."""
    info = pair.info
    window = [slice(0, info.height), slice(0, info.width)]
    window[axis] = slice(start, stop)
    rows, columns = window
    return replace(
        pair,
        name=f"{pair.name}_{('rows', 'columns')[axis]}_{start}-{stop - 1}",
        info=replace(info, height=rows.stop - rows.start, width=columns.stop - columns.start),
        window=(rows, columns),
    )


def _labels(pair: Pair, ignore_value: Value | None) -> NDArray[np.bool_]:
    """Where a mask has a label, (H, W)."""
    mask = pair.read_mask()
    if ignore_value is None:
        return np.ones(mask.shape[:2], bool)
    differs = mask != np.asarray(ignore_value)
    return differs if mask.ndim == 2 else differs.any(axis=2)


def _positions(entry: str, names: list[str]) -> range:
    ends = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", entry)
    found = []
    for name in ends.groups() if ends and entry not in names else (entry,):
        if name in names:
            found.append(names.index(name))
        elif re.fullmatch("[0-9]{1,9}", name) and int(name) < len(names):
            found.append(int(name))
        else:
            raise InputError(f"validation image {name!r}: neither a name nor one of {len(names)}")
    return range(found[0], found[-1] + 1)
