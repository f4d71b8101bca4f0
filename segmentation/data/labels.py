"""`Labels`: what the masks of a set mean, found from all of them together.

Which values are classes, or whether they number objects, and which pixels have no label. Each
decision is recorded as a sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.instances import (
    INSTANCE_NAMES,
    OBJECT_NAMES,
    instance_classes,
    object_classes,
)
from segmentation.data.layouts import class_values
from segmentation.data.masks import VOID, are_instances, is_void
from segmentation.data.pairs import Pair
from segmentation.data.polygons import Drawing
from segmentation.data.regions import Regions
from segmentation.data.slices import shown
from unet.errors import InputError
from unet.files.mask_values import (
    MAX_CLASSES,
    Survey,
    Value,
    as_colour,
    code_values,
    some,
    value_codes,
)
from unet.files.pages import Array, missing
from unet.words import counted

USUAL_CLASSES = 8  # more values in masks may be numbers of objects
JUDGED = 20  # masks that decide whether they number objects, or have void edges


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the masks of a set mean.

    Attributes:
        ignore_value: mask value of pixels that do not count.
        instances: the masks number objects; the classes are background and cell, and of a table of
            earlier versions a border where two cells touch.
        regions: unions of classes to find instead, which may overlap.
        notes: what was found and decided, one sentence each.
    """

    table: ClassTable
    ignore_value: Value | None = None
    instances: bool = False
    regions: Regions | None = None
    notes: tuple[str, ...] = ()

    def encode(self, pair: Pair, image: Array, nodata: float | None = None) -> NDArray[np.uint8]:
        """Class indices (H, W) of a mask, IGNORE where it or the image (H, W, C) says so.

        Args:
            nodata: value of the image where nothing was measured; None: what its file declares.
        """
        mask, unknown = pair.read_mask(), _unmeasured(pair, image, nodata)
        if self.instances:
            bordered = self.table.names == INSTANCE_NAMES
            mask = (instance_classes if bordered else object_classes)(mask, self.ignore_value)
        if not unknown.any():
            return self.table.encode(mask, pair.where)
        mask = np.where(
            unknown if mask.ndim == 2 else unknown[..., None], self.table.values[0], mask
        )
        return np.where(unknown, np.uint8(IGNORE), self.table.encode(mask, pair.where))


def find_labels(
    pairs: Sequence[Pair],
    read: Callable[[int], Array],
    *,
    ignore_value: Value | None = None,
    table: ClassTable | None = None,
    instances: bool = False,
    names: Sequence[str] = (),
    regions: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[Pair], Labels]:
    """The same pairs, with masks that are all read in the same way, and what the masks mean.

    Args:
        read: gives the image of the i-th pair; called if its file declares a no-data value.
        ignore_value, table, instances, names, regions: what is known already, see
            `segmentation.data.dataset.SegmentationData`.

    Raises:
        InputError: masks that contradict each other or what is known; see `Survey.check`,
            `ClassTable.counted` and `Regions`.
    """
    if table is None:
        instances = instances or any(pair.instances for pair in pairs)
    else:
        instances = instances or table.names == INSTANCE_NAMES
    pairs = _read_alike(pairs, table, instances)
    palette = _palette(pairs)
    if isinstance(ignore_value, tuple) and palette is not None:
        ignore_value = _index_of(ignore_value, palette, pairs)
    # 0 is declared by programs that mean the background; what no pixel has is no matter.
    values = {pair.nodata for pair in pairs if pair.nodata is not None}
    declared = (values.pop() or None) if ignore_value is None and len(values) == 1 else None
    notes: list[str] = []
    if table is not None:
        if _drawings(pairs) and declared == VOID:  # crowds, which the model need not know
            ignore_value, table = VOID, table.ignoring(VOID)
        labels = Labels(table=table, ignore_value=ignore_value, instances=instances)
    elif instances:
        if declared is not None:
            ignore_value = declared
            notes.append(_told_declared(declared))
        labels = _of_objects(pairs, ignore_value, notes)
    else:
        survey, others = _survey(pairs, read)
        alike, instances = _like_objects(survey, pairs)
        if alike and not instances:
            notes.append(
                f"each of the {len(survey.pixels)} classes is in one piece in nearly every mask: "
                "if the masks number objects, give --instances"
            )
        if declared is not None and declared in survey.pixels:
            ignore_value = declared
            notes.append(_told_declared(declared))
        if instances:
            notes.append("the masks number objects, and training learns to separate them")
            labels = _of_objects(pairs, ignore_value, notes)
        else:
            labels = _of_classes(pairs, survey, others, ignore_value, names, notes)
    if names and labels.instances:
        told = "names of classes are left out, as the masks number objects"
        labels = replace(labels, notes=(*labels.notes, told))
    if found := regions or pairs[0].regions:
        if labels.instances:
            raise InputError("regions are made of classes, but the masks number objects")
        labels = replace(labels, regions=Regions(found, labels.table))
    return pairs, labels


def _drawings(pairs: Sequence[Pair]) -> list[Drawing]:
    return [pair.mask for pair in pairs if isinstance(pair.mask, Drawing)]


def _read_alike(pairs: Sequence[Pair], table: ClassTable | None, instances: bool) -> list[Pair]:
    """The pairs, with drawings as object numbers or with the same classes; colours as in a
    table."""
    classes = class_values(_drawings(pairs))
    values = [v for v in table.values if isinstance(v, int)] if table is not None else []
    if table is not None and (table.names or len(classes) == len(values) == 2):
        classes = dict(zip(values, table.names or classes.values(), strict=False))
    found = [
        replace(pair, instances=instances, classes=classes)
        if isinstance(pair.mask, Drawing)
        else pair
        for pair in pairs
    ]
    if table is not None and isinstance(table.values[0], tuple):
        found = [replace(pair, colours=pair.palette is not None) for pair in found]
    return found


def _palette(pairs: Sequence[Pair]) -> bytes | None:
    """The palette of the masks, where their values are its indices."""
    return None if any(p.colours or p.palette is None for p in pairs) else pairs[0].palette


def _index_of(colour: tuple[int, ...], palette: bytes, pairs: Sequence[Pair]) -> int:
    """The index of a colour of the palette, among those that the masks use."""
    colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    same = np.flatnonzero((colours == colour).all(axis=1)).tolist()
    used = [i for i in same if any((pair.read_mask() == i).any() for pair in pairs)]
    if len(used) != 1:
        raise InputError(
            f"ignore value {colour}: the palette of the masks has this colour for the indices "
            f"{some(used or same) or 'none'}: give the index itself"
        )
    return int(used[0])


def _unmeasured(pair: Pair, image: Array, nodata: float | None = None) -> NDArray[np.bool_]:
    """Where (H, W) an image holds no data, by its file's value, or else by this one."""
    return missing(shown(pair, image), pair.info.nodata if nodata is None else nodata)


def _survey(pairs: Sequence[Pair], read: Callable[[int], Array]) -> tuple[Survey, set[Value]]:
    """The values of pixels where something was measured, and those of all other pixels."""
    others: set[Value] = set()

    def measured() -> Iterator[tuple[str, Array]]:
        for i, pair in enumerate(pairs):
            mask = pair.read_mask()
            if pair.info.nodata is not None:
                unknown = _unmeasured(pair, read(i))
                codes = value_codes(mask[unknown][:, None])
                others.update(code_values(np.unique(codes), mask.ndim == 3))
                mask = mask[~unknown][:, None] if unknown.any() else mask  # (N, 1[, 3]), or all
            yield pair.where, mask

    return Survey.of(measured()), others


def _declare_nodata(pairs: Sequence[Pair]) -> bool:
    """Whether some image has a value for pixels where nothing was measured."""
    return any(pair.info.nodata is not None for pair in pairs)


def _like_objects(survey: Survey, pairs: Sequence[Pair]) -> tuple[bool, bool]:
    """Whether the masks look as if they numbered objects, and whether they clearly do."""
    first, wide = pairs[0].mask, pairs[0].read_mask().dtype != np.uint8  # as few of classes are
    as_cellpose = isinstance(first, Path) and first.stem.lower().endswith("_masks") and wide
    many = len(survey.pixels) > USUAL_CLASSES and not _drawings(pairs)
    alike = (as_cellpose or many) and are_instances(
        (pair.read_mask() for pair in pairs[:JUDGED]), expected=as_cellpose
    )
    return alike, alike and (as_cellpose or len(survey.pixels) > MAX_CLASSES)


def _of_objects(pairs: Sequence[Pair], ignore_value: Value | None, notes: list[str]) -> Labels:
    """The classes background and cell; notes objects that overlap or have holes."""
    overlaps = holes = 0
    notes = [*notes, *_told_drawings(pairs, "objects")]
    for pair in pairs:
        if isinstance(pair.mask, tuple):
            _, pixels, with_hole = pair.join_objects()
            overlaps, holes = overlaps + pixels, holes + with_hole
    if overlaps or holes:
        notes.append(
            f"{overlaps:,} pixels belong to two objects (the later file has them), {holes:,} "
            "objects have holes"
        )
    marked = None if ignore_value is None else IGNORE
    if marked is None and _declare_nodata(pairs):
        marked = IGNORE
        notes.append(_told_marked(marked))
    classes = (object_classes(pair.read_mask(), ignore_value) for pair in pairs)
    table = ClassTable.of(classes, marked, OBJECT_NAMES)
    return Labels(table=table, ignore_value=ignore_value, instances=True, notes=tuple(notes))


def _of_classes(
    pairs: Sequence[Pair],
    survey: Survey,
    others: set[Value],
    ignore_value: Value | None,
    names: Sequence[str],
    notes: list[str],
) -> Labels:
    """The classes of surveyed masks; `others` are the values where nothing was measured."""
    notes, pixels = [*notes, *_told_drawings(pairs, "classes")], Counter(survey.pixels)
    if not _drawings(pairs):
        survey.check()
        if ignore_value is None and is_void(survey, (p.read_mask() for p in pairs[:JUDGED])):
            ignore_value = VOID
            notes.append(
                f"mask value {VOID} marks the edges of objects, as in Pascal VOC, and is ignored"
            )
    only = others - set(pixels)
    if ignore_value is None and len(only) == 1:
        ignore_value = only.pop()
        pixels[ignore_value] = 0  # it counts as an ignored value though no measured pixel has it
        notes.append(
            f"mask value {ignore_value} is only where nothing was measured, and is ignored"
        )
    said: Mapping[int, str] = dict(enumerate(names)) or pairs[0].classes
    marked = ignore_value
    if marked is None and _declare_nodata(pairs):
        taken = {as_colour(value) for value in (*pixels, *said)}
        marked = next(v for v in (VOID, 128, *range(VOID)) if as_colour(v) not in taken)
        pixels[marked] = 0
        notes.append(_told_marked(marked))
    values = sorted(v for v in pixels if isinstance(v, int) and v != marked)
    if said and (not values or any(isinstance(v, tuple) for v in pixels)):
        notes.append("names of classes are left out, as the masks are colours")
        said = {}
    table = ClassTable.counted(pixels, marked, _named(values, said), _palette(pairs))
    return Labels(table=table, ignore_value=ignore_value, notes=tuple(notes))


def _named(values: Sequence[int], said: Mapping[int, str]) -> Mapping[Value, str]:
    """The names of the values, as they were given or a file of the folder says them."""
    if set(values) <= set(said):
        return dict(said.items())
    if not said:
        return {}
    if len(said) == len(values):  # such as two names for 0 and 255
        return dict(zip(values, said.values(), strict=True))
    raise InputError(
        f"{len(said)} classes have names ({some(said.values())}), but the masks hold "
        f"{some(values)}: give a name for each value, in their order"
    )


def _told_declared(value: int) -> str:
    return f"mask value {value} has no label, as its files declare"


def _told_marked(value: int) -> str:
    return f"predicted masks have the value {value} where nothing was measured"


def _told_drawings(pairs: Sequence[Pair], what: str) -> list[str]:
    drawn = [pair.draw_objects() for pair in pairs if isinstance(pair.mask, Drawing)]
    overlaps, empty = sum(d[1] for d in drawn), sum(d[2] for d in drawn)
    told = []
    if overlaps:
        told.append(
            f"{counted(overlaps, 'pixel')} claimed by two {what}: the later one in the file "
            "has them"
        )
    if empty:
        told.append(f"{counted(empty, 'object')} without a pixel of the image")
    return told
