"""Predictions as files: masks with the original values, probabilities, overlays, labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from segmentation.data.classes import ClassTable
from segmentation.data.instances import INSTANCE_NAMES, instances_from_classes
from segmentation.data.normalisation import Normalisation
from segmentation.model import SegmentationUNet
from segmentation.pictures import grey_or_rgb, overlay
from segmentation.predict import Predictor, Probability, classes
from unet.device import pick_device
from unet.errors import InputError
from unet.files.images import Array, ImageInfo, image_info, list_images, write_image
from unet.files.rasters import open_raster, writing_bands
from unet.training.task import Processes

AT_ONCE = 2**24  # pixels of an image that is predicted and written as a whole
PREVIEW = 2048  # pixels a side of the overlay of a larger one, at most


@dataclass(frozen=True)
class RasterSource:
    """An image as stored, normalised for each model as it is read."""

    pixels: Array  # (H, W, C), in memory or mapped from a file

    @property
    def shape(self) -> tuple[int, int]:
        h, w = self.pixels.shape[:2]
        return h, w

    def read(self, rows: slice, columns: slice, model: SegmentationUNet) -> Tensor:
        normalisation = Normalisation.from_dict(model.info["normalisation"])
        return torch.from_numpy(normalisation(np.asarray(self.pixels[rows, columns])))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """An image to predict: a file, or a page of a stack."""

    name: str
    path: Path
    info: ImageInfo
    page: int | None = None


def load_models(
    folders: Sequence[str], device: str = "auto"
) -> tuple[list[SegmentationUNet], ClassTable, float]:
    """Models for the same classes, their table, and the mean of their thresholds.

    Raises:
        InputError: no usable model, or models for other classes.
    """
    models: list[SegmentationUNet] = []
    tables: list[ClassTable] = []
    for folder in folders:
        model = SegmentationUNet.from_pretrained(folder).to(pick_device(device)).float()
        for name in ("classes", "normalisation", "threshold"):
            if name not in model.info:
                raise InputError(
                    f"{folder} lacks '{name}' in its config.json: it was not saved by train-seg"
                )
        Normalisation.from_dict(model.info["normalisation"])
        tables.append(ClassTable.from_dict(model.info["classes"]))
        threshold = model.info["threshold"]
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise InputError(
                f"{folder} has the threshold {threshold!r} in its config.json, which must be a "
                "number from 0 to 1"
            )
        models.append(model)
        if tables[-1].values != tables[0].values:
            raise InputError(
                f"{folder} knows the classes {tables[-1].values}, but {folders[0]} "
                f"{tables[0].values}: average models for the same classes"
            )
    return models, tables[0], float(np.mean([float(m.info["threshold"]) for m in models]))


class FilePredictor:
    """Predicts image files and writes what was found beside each other in one folder.

    For an image NAME, or NAME_PAGE of a stack: NAME_mask.png with the values of the training masks,
    NAME_probability.png (of the second of two classes, or of the chosen class of more; 16-bit,
    65535 is 1), NAME_overlay.png, and NAME_labels.tif on request. Of an image with more than
    AT_ONCE pixels, mask and probability are TIFFs, written in bands, and the overlay is small.

    Args:
        min_size: connected parts of fewer pixels become the class that surrounds them.
        labels: also number the connected parts of class 1 (4-connected, 0 is the rest), or the
            instances of a model that was trained with --instances.
    """

    def __init__(
        self,
        predict: Predictor,
        table: ClassTable,
        threshold: float,
        *,
        min_size: int = 0,
        labels: bool = False,
    ) -> None:
        self.cells = table.names == INSTANCE_NAMES
        if labels and not self.cells and len(table.values) != 2:
            raise InputError(
                f"labels number the parts of the second of two classes, but the model knows "
                f"{len(table.values)}: leave out --labels"
            )
        self.predict, self.table, self.threshold = predict, table, threshold
        self.min_size, self.labels = min_size, labels

    def files(self, image: Slice, out: Path) -> list[Path]:
        """The files that `run` writes."""
        kind = "png" if image.info.height * image.info.width <= AT_ONCE else "tif"
        names = [f"mask.{kind}", f"probability.{kind}", "overlay.png"]
        return [out / f"{image.name}_{n}" for n in [*names, *["labels.tif"] * self.labels]]

    def run(self, image: Slice, out: Path) -> None:
        """Predicts one image."""
        source = RasterSource(open_raster(image.path, image.page, image.info))
        mask, probability, picture, *labels = self.files(image, out)
        h, w = source.shape
        if h * w > AT_ONCE:
            self._run_in_bands(source, mask, probability, picture)
            return
        found = self.predict(source)
        decided = without_specks(classes(found, self.threshold), self.min_size)
        write_image(mask, self.table.decode(decided))
        write_image(probability, as_16_bit(found))
        shown = overlay(grey_or_rgb(source.pixels), decided, len(self.table.values))
        write_image(picture, shown)
        for file in labels:
            numbers = (
                instances_from_classes(decided) if self.cells else ndimage.label(decided == 1)[0]
            )
            if (count := int(numbers.max())) > 65535:
                raise InputError(f"{image.name} has {count} parts, more than a 16-bit label holds")
            write_image(file, numbers.astype(np.uint16))

    def _run_in_bands(
        self, source: RasterSource, mask: Path, probability: Path, picture: Path
    ) -> None:
        if self.min_size or self.labels:
            raise InputError(
                f"an image of {source.shape[0]} x {source.shape[1]} pixels is predicted in bands, "
                "which know no connected parts: leave out --min-size and --labels"
            )
        h, w = source.shape
        values = self.table.decode(np.zeros((1, 1), np.uint8))
        step = -(-max(h, w) // PREVIEW)
        small: list[NDArray[np.uint8]] = []
        with (
            writing_bands(mask, (h, w, *values.shape[2:]), values.dtype) as masks,
            writing_bands(probability, (h, w), np.uint16) as probabilities,
        ):
            for top, band in self.predict.bands(source):
                decided = classes(band, self.threshold)
                masks.write(top, self.table.decode(decided))
                probabilities.write(top, as_16_bit(band))
                small.append(decided[-top % step :: step, ::step])
        preview = grey_or_rgb(np.asarray(source.pixels[::step, ::step]))
        write_image(picture, overlay(preview, np.concatenate(small), len(self.table.values)))


def as_16_bit(probability: Probability) -> NDArray[np.uint16]:
    """The largest of the probabilities (K, H, W), as 0 to 65535."""
    return np.round(probability.max(axis=0) * 65535).astype(np.uint16)


def without_specks(found: NDArray[np.uint8], min_size: int) -> NDArray[np.uint8]:
    """Classes (H, W) whose 4-connected parts of fewer pixels took the class most around them."""
    if min_size < 2:
        return found
    found = found.copy()
    for value in np.unique(found):
        parts, count = ndimage.label(found == value)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        boxes = ndimage.find_objects(parts)
        for i in np.flatnonzero(sizes[1:] < min_size):
            rows, columns = (slice(max(s.start - 1, 0), s.stop + 1) for s in boxes[i])
            part = parts[rows, columns] == i + 1
            ring = ndimage.binary_dilation(part) & ~part
            if ring.any():
                around = np.bincount(found[rows, columns][ring]).argmax()
                found[rows, columns][part] = around
    return found


def predict_files(
    predictor: FilePredictor,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> list[str]:
    """Predicts a file or all images of a folder.

    Args:
        processes: share the images.

    Returns:
        What went wrong with the images that failed, a sentence each; the others are written.

    Raises:
        InputError: no image, or files in the way, before anything is predicted.
    """
    processes = processes or Processes()
    slices, failed = find_slices(source)
    count = len(slices) + len(failed)
    made: dict[Path, Path] = {}  # from which image each file comes
    for image in slices:
        for file in predictor.files(image, out):
            if file in made:
                raise InputError(
                    f"{made[file]} and {image.path} would both be written to {file}: rename one"
                )
            made[file] = image.path
            if file.exists() and not overwrite:
                raise InputError(f"{file} exists already: give --overwrite or another --out")
    processes.wait()  # lest one finds what another has written already
    mine = []
    quiet = None if processes.main else True
    for image in tqdm(processes.share(slices), unit="image", disable=quiet):
        try:
            predictor.run(image, out)
        except InputError as error:
            mine.append(str(error))
    failed += [message for part in processes.gather(mine) for message in part]
    if not processes.main:
        return failed
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    print(f"{count - len(failed)} of {count} images predicted, in {out}")
    return failed


def find_slices(source: Path) -> tuple[list[Slice], list[str]]:
    """The images of a file or folder, a stack page by page, and what is wrong with the others.

    Raises:
        InputError: no such file or folder, nothing in it, or a single file that is no image.
    """
    if not source.exists():
        raise InputError(f"--input {source} does not exist: give an image or a folder of images")
    slices: list[Slice] = []
    failed: list[str] = []
    for path in list_images(source) if source.is_dir() else [source]:
        try:
            info = image_info(path)
        except InputError as error:
            if source.is_file():
                raise
            failed.append(str(error))
            continue
        if info.pages == 1:
            slices.append(Slice(name=path.stem, path=path, info=info))
            continue
        digits = len(str(info.pages - 1))
        slices += [
            Slice(name=f"{path.stem}_{page:0{digits}d}", path=path, info=info, page=page)
            for page in range(info.pages)
        ]
    return slices, failed
