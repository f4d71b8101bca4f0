"""`SegmentationData`: pairs of images and masks, checked once and ready to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.classes import IGNORE, ClassTable, Value, some
from segmentation.data.instances import INSTANCE_NAMES, instance_classes
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import Pair, kind
from unet.files.images import Array
from unet.words import counted

CACHE_BYTES = 2**30


class SegmentationData:
    """Training and validation pairs with their class table and normalisation, ready to load.

    Everything is read once when it is built, so that a bad file is found before training starts.

    Args:
        ignore_value: mask value of pixels that do not count.
        table, normalisation: those of a trained model; found from the data if not given, the
            classes over all pairs, the statistics over the training pairs alone.
        instances: the masks number each cell; its classes are background, cell, and border where
            two touch. A table of these classes says so by itself.
        left_out: images that were found and have no label, to be told.
        cache_bytes: loaded pairs are kept in memory up to this size, in each process.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        val: Sequence[Pair] = (),
        *,
        ignore_value: Value | None = None,
        table: ClassTable | None = None,
        normalisation: Normalisation | None = None,
        instances: bool = False,
        left_out: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.pairs = [*train, *val]
        self.train, self.val = range(len(train)), range(len(train), len(self.pairs))
        self.channels, self.dtype = self.pairs[0].info.channels, self.pairs[0].info.dtype
        self.instances = instances or (table is not None and table.names == INSTANCE_NAMES)
        self.ignore_value, self.left_out = ignore_value, left_out
        masks = (self._read_mask(pair) for pair in self.pairs)
        if table is None and self.instances:
            ignored = None if ignore_value is None else IGNORE
            table = ClassTable.of(masks, ignored, INSTANCE_NAMES)
        self.table = table or ClassTable.of(masks, ignore_value)
        images = (pair.read_image() for pair in train)
        self.normalisation = normalisation or Normalisation.of(images)
        self._cache: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}
        self._free = cache_bytes
        for index in range(len(self.pairs)):
            self.load(index)

    def load(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Normalised image (C, H, W) and class indices (H, W), both read-only."""
        if index in self._cache:
            return self._cache[index]
        pair = self.pairs[index]
        where = repr(str(pair.mask)) if isinstance(pair.mask, Path) else pair.name
        where += "" if pair.page is None else f" page {pair.page}"
        image = self.normalisation(pair.read_image())
        mask = self.table.encode(self._read_mask(pair), where)
        image.flags.writeable = mask.flags.writeable = False
        if image.nbytes + mask.nbytes <= self._free:
            self._free -= image.nbytes + mask.nbytes
            self._cache[index] = image, mask
        return image, mask

    def _read_mask(self, pair: Pair) -> Array:
        mask = pair.read_mask()
        return instance_classes(mask, self.ignore_value) if self.instances else mask

    def describe(self, *, names: bool = True) -> str:
        """What was found, for people: images, sizes, channels, bit depth, classes, split.

        Args:
            names: name some of the images.
        """
        infos = [pair.info for pair in self.pairs]
        sizes = sorted({(info.height, info.width) for info in infos})
        size = " to ".join(f"{h} x {w}" for h, w in dict.fromkeys((sizes[0], sizes[-1])))
        lines = [f"{counted(len(infos), 'image')} of {size}, {kind(infos[0])}", *self.table.lines()]
        if alphas := sum(info.has_alpha for info in infos):
            lines.append(f"alpha channel dropped in {counted(alphas, 'image')}")
        if self.left_out:
            lines.append(f"{counted(self.left_out, 'image')} without any label left out")
        for part, indices in (("training", self.train), ("validation", self.val)):
            if indices:
                shown = f" ({some(self.pairs[i].name for i in indices)})" if names else ""
                lines.append(f"{part}: {counted(len(indices), 'image')}{shown}")
        if self.train and not self.val:
            lines.append("validation: nothing is held out, so no figure tells of other images")
        return "\n".join(lines)
