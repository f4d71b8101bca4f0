"""`SegmentationData`: pairs of images and masks, checked once and ready to load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.instances import UNKNOWN, object_numbers
from segmentation.data.labels import find_labels
from segmentation.data.normalisation import Normalisation, find_normalisation
from segmentation.data.pairs import Pair, kind
from unet.errors import InputError
from unet.files.mask_values import Value, some
from unet.files.pages import Array
from unet.words import counted

CACHE_BYTES = 2**30


class SegmentationData:
    """Training and validation pairs with their class table and normalisation, ready to load.

    Everything is read once when it is built, so that a bad file is found before training starts.

    Args:
        synthetic: pairs to train on as well, which count in no statistic: neither the classes nor
            their shares nor the normalisation.
        ignore_value: mask value of pixels that do not count. Not given, it is the value that the
            masks' files declare to be no data, or 255 where that marks the edges of objects.
        table, normalisation: those of a trained model; found from the data if not given, the
            classes over all pairs, the statistics over the training pairs alone.
        instances: the masks number each cell; the classes are background and cell. Masks that
            clearly do say so by themselves, and so does a table with a border class, where two
            cells touch, of a model that separates cells by it.
        names: of the classes, in the order of their values, or of some values.
        regions: unions of classes to find instead, which may overlap; None: those that a file says.
        left_out: number of images that were found without a label, for the description.
        cache_bytes: loaded pairs are kept in memory up to this size, in each process.

    Attributes:
        slices: number of slices of a stack that are the channels of an image, each with channels of
            its own.
        rare: the training images of each rare class (`ClassTable.rare`) that any of them has.
        notes: what was found and decided about the masks and images, one sentence each.
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
        pairs = [*train, *val]
        self.train, self.val = range(len(train)), range(len(train), len(pairs))
        self.synthetic = range(len(pairs), len(pairs) + len(synthetic))
        self.channels, self.dtype = pairs[0].info.channels, pairs[0].info.dtype
        self.slices = max(1, len(pairs[0].around))
        self.left_out = left_out
        images = _Decoded([*pairs, *synthetic], cache_bytes)
        pairs, self._labels = find_labels(
            pairs,
            images.read,
            ignore_value=ignore_value,
            table=table,
            instances=instances,
            names=names,
            regions=regions,
        )
        self.table, self.regions = self._labels.table, self._labels.regions
        self.instances, self.ignore_value = self._labels.instances, self._labels.ignore_value
        self.notes = list(self._labels.notes)
        if normalisation is None:
            encode = None if self.ignore_value is None else self._labels.encode
            normalisation, told = find_normalisation(pairs[: len(train)], images.read, encode)
            self.notes += told
        self.normalisation = normalisation
        self.pairs = pairs + [
            replace(pair, colours=pairs[0].colours, instances=self.instances) for pair in synthetic
        ]
        self._cache: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}
        self._objects: dict[int, NDArray[np.int32]] = {}
        self._free = cache_bytes
        rare: dict[int, list[int]] = {k: [] for k in (() if self.instances else self.table.rare)}
        for index, pair in enumerate(self.pairs):
            mask = self._prepared(index, images.take(index))[1]
            if index in self.train:
                for k, holding in rare.items():
                    if (mask == k).any():
                        holding.append(index)
            if index in self.synthetic and (mask == IGNORE).all():
                raise InputError(
                    f"{pair.where}: no pixel of this synthetic mask has a label: leave it out"
                )
        self.rare = {k: holding for k, holding in rare.items() if holding}

    def load(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Normalised image (C, H, W) and class indices (H, W), both read-only."""
        if index in self._cache:
            return self._cache[index]
        return self._prepared(index, self.pairs[index].read_image())

    def _prepared(self, index: int, stored: Array) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """What `load` gives for the image as it is stored; kept where there is room."""
        pair = self.pairs[index]
        image = self.normalisation(stored, pair.info.nodata)
        mask = self._labels.encode(pair, stored, self.nodata(index))
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

    def nodata(self, index: int) -> float | None:
        """The value of an image's pixels where nothing was measured, if there is one."""
        return self.normalisation.nodata_of(self.pairs[index].info.nodata)

    def describe(self, *, names: bool = True) -> str:
        """A printable description: images, sizes, channels, bit depth, classes, split.

        Args:
            names: name some of the images.
        """
        infos = [pair.info for pair in self.pairs[: self.synthetic.start]]
        sizes = sorted({(info.height, info.width) for info in infos}, key=math.prod)
        size = " to ".join(f"{h} x {w}" for h, w in dict.fromkeys((sizes[0], sizes[-1])))
        lines = [f"{counted(len(infos), 'image')} of {size}, {kind(infos[0])}", *self.table.lines()]
        if greys := sum(pair.reading.rgb for pair in self.pairs):
            lines.append(f"{counted(greys, 'grey image')} among them, as RGB")
        if flipped := {str(pair.mask) for pair in self.pairs if any(pair.flipped)}:
            lines.append(
                f"{counted(len(flipped), 'mask')} reoriented to match the image, by the positions "
                "in the body that both files give"
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
            lines.append(f"also for training: {count}, synthetic or with predicted labels")
        if self.train and not self.val:
            lines.append(
                "validation: nothing is held out, so no figure tells how the model does on new "
                "images"
            )
        return "\n".join(lines)


class _Decoded:
    """Images as they are stored, kept until they are taken if the cache has room for them. So
    images that stay in memory are decoded once, though several passes read them.
    """

    def __init__(self, pairs: Sequence[Pair], cache_bytes: int) -> None:
        self._pairs, self._free = pairs, cache_bytes
        self._kept: dict[int, Array] = {}

    def read(self, index: int) -> Array:
        """(H, W, C), kept for the next call."""
        if index in self._kept:
            return self._kept[index]
        pair = self._pairs[index]
        image = pair.read_image()
        height, width, channels = image.shape
        cached = height * width * (4 * channels + 1)  # float32, and the mask
        if cached <= self._free:
            self._free -= cached
            self._kept[index] = image if pair.window is None else image.copy()  # not the whole
        return image

    def take(self, index: int) -> Array:
        """(H, W, C), for the last time."""
        return self._kept.pop(index) if index in self._kept else self._pairs[index].read_image()


def _no_data(value: float | None) -> str:
    return "" if value is None else f", {value:g} where nothing was measured, which is ignored"
