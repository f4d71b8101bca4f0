"""`SegmentationData`: pairs of images and masks, checked once and ready to load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.classes import (
    IGNORE,
    MAX_CLASSES,
    ClassTable,
    Value,
    code_values,
    some,
    value_codes,
)
from segmentation.data.instances import (
    INSTANCE_NAMES,
    OBJECT_NAMES,
    UNKNOWN,
    instance_classes,
    object_classes,
    object_numbers,
)
from segmentation.data.layouts import class_values
from segmentation.data.masks import VOID, Survey, are_instances, is_void
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import Pair, kind
from segmentation.data.polygons import Drawing
from segmentation.data.regions import Regions
from segmentation.data.slices import middle
from unet.errors import InputError
from unet.files.pages import Array, missing
from unet.words import counted

CACHE_BYTES = 2**30
USUAL_CLASSES = 8  # more values in masks may be numbers of objects
JUDGED = 20  # masks that decide whether they number objects, or have void edges


class SegmentationData:
    """Training and validation pairs with their class table and normalisation, ready to load.

    Everything is read once when it is built, so that a bad file is found before training starts.

    Args:
        synthetic: pairs to train on as well, of which nothing is found out: neither classes nor
            their shares nor statistics.
        ignore_value: mask value of pixels that do not count. Not given, it is the value that the
            masks' files declare to be no data, or 255 where that marks the edges of objects.
        table, normalisation: those of a trained model; found from the data if not given, the
            classes over all pairs, the statistics over the training pairs alone.
        instances: the masks number each cell; the classes are background and cell. Masks that
            clearly do say so by themselves, and so does a table with a border class, where two
            cells touch, of a model that parts them by it.
        names: of the classes, in the order of their values, or of some values.
        regions: unions of classes to find instead, which may overlap; None: those that a file says.
        left_out: images that were found and have no label, to be told.
        cache_bytes: loaded pairs are kept in memory up to this size, in each process.

    Attributes:
        slices: of a stack that an image has as its channels, each with channels of its own.
        notes: what was found out and decided about the masks and images, a sentence each.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        val: Sequence[Pair] = (),
        *,
        synthetic: Sequence[Pair] = (),
        ignore_value: Value | None = None,
        table: ClassTable | None = None,
        normalisation: Normalisation | None = None,
        instances: bool = False,
        names: Sequence[str] = (),
        regions: Mapping[str, Sequence[int]] | None = None,
        left_out: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.pairs = [*train, *val]
        self.train, self.val = range(len(train)), range(len(train), len(self.pairs))
        self.channels, self.dtype = self.pairs[0].info.channels, self.pairs[0].info.dtype
        self.slices = max(1, len(self.pairs[0].around))
        self.notes: list[str] = []
        self.bordered = table is not None and table.names == INSTANCE_NAMES
        self.instances = instances or self.bordered
        self.instances |= table is None and any(pair.instances for pair in self.pairs)
        self.left_out = left_out
        self.pairs = self._drawn_alike(table)
        if table is not None and isinstance(table.values[0], tuple):
            self.pairs = [replace(p, colours=p.palette is not None) for p in self.pairs]
        declared = {pair.nodata for pair in self.pairs} - {None}
        if isinstance(ignore_value, tuple) and self._palette() is not None:
            ignore_value = self._index_of(ignore_value)
        # What no pixel has is no matter, and 0 is declared by programs that mean the background.
        self._declared = declared.pop() if ignore_value is None and len(declared) == 1 else None
        if table is not None and self._drawings() and self._declared == VOID:
            # crowds, which the model need not know
            ignore_value, table = VOID, table.ignoring(VOID)
        self.ignore_value = ignore_value
        self.table = table or self._find_table(names)
        self.regions: Regions | None = None
        if values := regions or self.pairs[0].regions:
            if self.instances:
                raise InputError("regions are of classes, and the masks number objects")
            self.regions = Regions(values, self.table)
        self.normalisation = normalisation or self._find_normalisation()
        self._cache: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}
        self._objects: dict[int, NDArray[np.int32]] = {}
        self._free = cache_bytes
        real = len(self.pairs)
        self.pairs += [
            replace(pair, colours=self.pairs[0].colours, instances=self.instances)
            for pair in synthetic
        ]
        self.synthetic = range(real, len(self.pairs))
        for index in range(len(self.pairs)):
            mask = self.load(index)[1]
            if index in self.synthetic and (mask == IGNORE).all():
                raise InputError(
                    f"{self.pairs[index].where}: no pixel of this synthetic mask has a label: "
                    "leave it out"
                )

    def _drawings(self) -> list[Drawing]:
        return [pair.mask for pair in self.pairs if isinstance(pair.mask, Drawing)]

    def _drawn_alike(self, table: ClassTable | None) -> list[Pair]:
        """The pairs, with masks that are drawn as numbers or else with the same classes."""
        classes = class_values(self._drawings())
        values = [v for v in table.values if isinstance(v, int)] if table is not None else []
        if table is not None and (table.names or len(classes) == len(values) == 2):
            classes = dict(zip(values, table.names or classes.values(), strict=False))
        return [
            replace(pair, instances=self.instances, classes=classes)
            if isinstance(pair.mask, Drawing)
            else pair
            for pair in self.pairs
        ]

    def load(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Normalised image (C, H, W) and class indices (H, W), both read-only."""
        if index in self._cache:
            return self._cache[index]
        pair = self.pairs[index]
        stored = pair.read_image()
        image = self.normalisation(stored, pair.info.nodata)
        mask = self._encoded(pair, stored)
        image.flags.writeable = mask.flags.writeable = False
        if image.nbytes + mask.nbytes <= self._free:
            self._free -= image.nbytes + mask.nbytes
            self._cache[index] = image, mask
        return image, mask

    def objects(self, index: int) -> NDArray[np.int32]:
        """Numbers (H, W) of the objects, where the masks number some, read-only.

        They are from 1 on; 0 is background, and pixels that do not count are UNKNOWN.
        """
        if index in self._objects:
            return self._objects[index]
        pair = self.pairs[index]
        numbers = object_numbers(pair.read_mask(), self.ignore_value)
        numbers[self.load(index)[1] == IGNORE] = UNKNOWN
        numbers.flags.writeable = False
        if numbers.nbytes <= self._free:
            self._free -= numbers.nbytes
            self._objects[index] = numbers
        return numbers

    def _encoded(self, pair: Pair, image: Array) -> NDArray[np.uint8]:
        """Class indices (H, W), ignored where the image holds no data."""
        mask = self._read_mask(pair)
        nodata = pair.info.nodata if pair.info.nodata is not None else self._nodata
        unknown = missing(middle(image, self.slices), nodata)
        if not unknown.any():
            return self.table.encode(mask, pair.where)
        mask = np.where(
            unknown if mask.ndim == 2 else unknown[..., None], self.table.values[0], mask
        )
        return np.where(unknown, np.uint8(IGNORE), self.table.encode(mask, pair.where))

    @property
    def _nodata(self) -> float | None:
        known = getattr(self, "normalisation", None)
        return None if known is None else known.nodata

    def _read_mask(self, pair: Pair) -> Array:
        mask = pair.read_mask()
        if not self.instances:
            return mask
        return (instance_classes if self.bordered else object_classes)(mask, self.ignore_value)

    def _find_table(self, names: Sequence[str]) -> ClassTable:
        """The classes of the masks; see `segmentation.data.masks`."""
        if self.instances:
            self._take_declared(None)
            return self._instance_table()
        survey = Survey.of((pair.where, self._measured_mask(pair)) for pair in self.pairs)
        first = self.pairs[0].mask
        wide = self.pairs[0].read_mask().dtype != np.uint8  # as few masks of classes are
        as_cellpose = isinstance(first, Path) and first.stem.lower().endswith("_masks") and wide
        perhaps = as_cellpose or (len(survey.pixels) > USUAL_CLASSES and not self._drawings())
        if perhaps and are_instances(
            (pair.read_mask() for pair in self.pairs[:JUDGED]), expected=as_cellpose
        ):
            if as_cellpose or len(survey.pixels) > MAX_CLASSES:
                self.instances = True
                self._take_declared(survey)
                self.notes.append("the masks number objects, which are learnt to be told apart")
                return self._instance_table()
            self.notes.append(
                f"each of the {len(survey.pixels)} classes is in one piece in nearly every mask: "
                "if the masks number objects, give --instances"
            )
        self._take_declared(survey)
        if self._drawings():
            self._tell_of_drawings("classes")
        else:
            survey.check()
        if (
            self.ignore_value is None
            and not self._drawings()
            and is_void(survey, (pair.read_mask() for pair in self.pairs[:JUDGED]))
        ):
            self.ignore_value = VOID
            self.notes.append(
                f"mask value {VOID} marks the edges of objects, as in Pascal VOC, and is ignored"
            )
        if self.ignore_value is None:
            self.ignore_value = self._unmeasured(survey)
        return ClassTable.counted(
            survey.pixels, self.ignore_value, self._known(survey, names), self._palette()
        )

    def _take_declared(self, survey: Survey | None) -> None:
        """Ignores the value that the masks' files declare, if pixels have it."""
        value = self._declared
        if value and (survey is None or value in survey.pixels):
            self.ignore_value = value
            self.notes.append(f"mask value {value} has no label, as its files declare")

    def _measured_mask(self, pair: Pair) -> Array:
        """The mask's values (N, 1[, 3]) where the image holds data; all of it mostly."""
        mask = pair.read_mask()
        if pair.info.nodata is None:
            return mask
        known = ~missing(pair.read_shown(), pair.info.nodata)
        return mask if known.all() else mask[known][:, None]

    def _unmeasured(self, survey: Survey) -> Value | None:
        """The mask value of the pixels where nothing was measured, if no others have it."""
        found: set[Value] = set()
        for pair in self.pairs:
            if pair.info.nodata is not None:
                mask = pair.read_mask()
                codes = value_codes(mask[missing(pair.read_shown(), pair.info.nodata)][:, None])
                found |= set(code_values(np.unique(codes), mask.ndim == 3)) - set(survey.pixels)
        if len(found) != 1:
            return None
        value = found.pop()
        self.notes.append(f"mask value {value} is only where nothing was measured, and is ignored")
        # It counts as an ignored value though no measured pixel has it.
        survey.pixels[value] += 0
        return value

    def _instance_table(self) -> ClassTable:
        """Background and cell; tells of objects that overlap or have holes."""
        overlaps = holes = 0
        self._tell_of_drawings("objects")
        for pair in self.pairs:
            if isinstance(pair.mask, tuple):
                _, pixels, with_hole = pair.join_objects()
                overlaps, holes = overlaps + pixels, holes + with_hole
        if overlaps or holes:
            self.notes.append(
                f"{overlaps:,} pixels belong to two objects (the later file has them), {holes:,} "
                "objects have holes"
            )
        ignored = None if self.ignore_value is None else IGNORE
        return ClassTable.of((self._read_mask(p) for p in self.pairs), ignored, OBJECT_NAMES)

    def _tell_of_drawings(self, what: str) -> None:
        drawn = [pair.draw_objects() for pair in self.pairs if isinstance(pair.mask, Drawing)]
        overlaps, empty = sum(d[1] for d in drawn), sum(d[2] for d in drawn)
        if overlaps:
            self.notes.append(
                f"{counted(overlaps, 'pixel')} claimed by two {what}: the later one in the file "
                "has them"
            )
        if empty:
            self.notes.append(f"{counted(empty, 'object')} without a pixel of the image")

    def _known(self, survey: Survey, names: Sequence[str]) -> Mapping[Value, str]:
        """The names of the values: those that are given, or that a file of the folder says."""
        said: Mapping[int, str] = dict(enumerate(names)) or self.pairs[0].classes
        values = sorted(v for v in survey.pixels if isinstance(v, int) and v != self.ignore_value)
        if not said or not values or any(isinstance(v, tuple) for v in survey.pixels):
            if said:
                self.notes.append("names of classes are left out, as the masks are colours")
            return {}
        if set(values) <= set(said):
            return dict(said.items())
        if len(said) == len(values):  # such as two names for 0 and 255
            return dict(zip(values, said.values(), strict=True))
        raise InputError(
            f"{len(said)} classes have names ({some(said.values())}), but the masks hold "
            f"{some(values)}: give a name for each value, in their order"
        )

    def _index_of(self, colour: tuple[int, ...]) -> int:
        """The index of a palette's colour that the masks use."""
        table = np.frombuffer(self._palette() or b"", np.uint8).reshape(-1, 3)
        same = np.flatnonzero((table == colour).all(axis=1)).tolist()
        used = [i for i in same if any((p.read_mask() == i).any() for p in self.pairs)]
        if len(used) != 1:
            raise InputError(
                f"ignore value {colour}: the palette of the masks has this colour for the indices "
                f"{some(used or same) or 'none'}: give the index itself"
            )
        return int(used[0])

    def _palette(self) -> bytes | None:
        """The palette of the masks, where their values are its indices."""
        first = self.pairs[0]
        return None if any(p.colours or p.palette is None for p in self.pairs) else first.palette

    def _find_normalisation(self) -> Normalisation:
        """Statistics of the pixels of the training images that count."""
        train = [self.pairs[i] for i in self.train]
        declared = {p.info.nodata for p in train if p.info.nodata is not None}
        if any(math.isnan(value) for value in declared):
            declared = {value for value in declared if not math.isnan(value)} | {math.nan}
        if len(declared) > 1:
            raise InputError(
                f"the images declare {some(sorted(declared))} to be no data: give the value that "
                "all of them have with --nodata"
            )
        nodata = declared.pop() if declared else self._sentinel(train)
        images = (pair.read_image() for pair in train)
        counted = None if self.ignore_value is None else self._counted(train)
        return Normalisation.of(images, counted, nodata)

    def _counted(self, pairs: Sequence[Pair]) -> Iterator[NDArray[np.bool_]]:
        for pair in pairs:
            yield self._encoded(pair, pair.read_image()) != IGNORE

    def _sentinel(self, pairs: Sequence[Pair]) -> float | None:
        """A value that nobody declared: all pixels that are ignored have it, and no other one."""
        if self.ignore_value is None:
            return None
        found: set[float] = set()
        for pair, counts in zip(pairs, self._counted(pairs), strict=True):
            image = pair.read_shown()
            if counts.all() or not counts.any():
                continue
            ignored, known = image[~counts], image[counts]
            if ignored.min() != ignored.max() or known.min() <= ignored[0, 0] <= known.max():
                return None
            found.add(float(ignored[0, 0]))
        if len(found) != 1:
            return None
        value = found.pop()
        self.notes.append(f"image value {value:g} is taken for no data: all its pixels are ignored")
        return value

    def describe(self, *, names: bool = True) -> str:
        """What was found, for people: images, sizes, channels, bit depth, classes, split.

        Args:
            names: name some of the images.
        """
        infos = [pair.info for pair in self.pairs[: self.synthetic.start]]
        sizes = sorted({(info.height, info.width) for info in infos})
        size = " to ".join(f"{h} x {w}" for h, w in dict.fromkeys((sizes[0], sizes[-1])))
        lines = [f"{counted(len(infos), 'image')} of {size}, {kind(infos[0])}", *self.table.lines()]
        if greys := sum(pair.reading.rgb for pair in self.pairs):
            lines.append(f"{counted(greys, 'grey image')} among them, as RGB")
        if turned := {str(pair.mask) for pair in self.pairs if any(pair.turned)}:
            lines.append(
                f"{counted(len(turned), 'mask')} turned to lie as the image does, by the places in "
                "the body that both files say"
            )
        if alphas := sum(info.has_alpha for info in infos):
            lines.append(f"alpha channel dropped in {counted(alphas, 'image')}")
        scaling = self.normalisation
        if scaling.low is not None and scaling.high is not None:
            line = f"values from {scaling.low:g} to {scaling.high:g}"
            lines.append(line + _no_data(scaling.nodata))
        lines += self.notes
        whole = [p for p in self.pairs[: self.synthetic.start] if p.window is None]
        masks = Counter(pair.source for pair in whole)
        if several := sum(count > 1 for count in masks.values()):
            lines.append(
                f"{counted(several, 'image')} with several masks each, as of annotators: objects "
                "and classes of an image belong in one mask"
            )
        if self.left_out:
            lines.append(f"{counted(self.left_out, 'image')} without any label left out")
        one = len({pair.stack for pair in self.pairs}) == 1
        for part, indices in (("training", self.train), ("validation", self.val)):
            if indices:
                shown = f" ({some(self.pairs[i].name for i in indices)})" if names else ""
                stacks = {self.pairs[i].stack for i in indices}
                of = "" if one else f" of {counted(len(stacks), 'volume')}"
                lines.append(f"{part}: {counted(len(indices), 'image')}{of}{shown}")
        if self.synthetic:
            count = counted(len(self.synthetic), "image")
            lines.append(f"training beside them: {count}, synthetic or with labels of our own")
        if self.train and not self.val:
            lines.append("validation: nothing is held out, so no figure tells of other images")
        return "\n".join(lines)


def _no_data(value: float | None) -> str:
    return "" if value is None else f", {value:g} where nothing was measured, which is ignored"
