"""Predictions as files: masks with the original values, probabilities, overlays, labels."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from segmentation.data.classes import ClassTable
from segmentation.data.depths import Depth
from segmentation.data.inputs import Inputs
from segmentation.data.layouts import stem_of
from segmentation.data.regions import file_name
from segmentation.data.slices import Layers, Place, around_each
from segmentation.pictures import instance_overlay, overlay, overlay_legend
from segmentation.predict import Predictor, Probability
from segmentation.segmenter import RasterSource, Segmenter
from segmentation.uncertainty import disagreement_map, entropy_map
from unet.errors import InputError
from unet.files.images import Blocks, image_info, write_image
from unet.files.pages import AS_STORED, Array, ImageInfo, Reading
from unet.files.pictures import key
from unet.files.rasters import open_raster, writing_bands
from unet.files.volumes import volume_name
from unet.training.task import Processes
from unet.words import counted

AT_ONCE = 2**24  # pixels of an image that is predicted and written as a whole
WRITERS = 8  # threads that compress and write, at most
PREVIEW = 2048  # pixels a side of the overlay of a larger one, at most


@dataclass(frozen=True, kw_only=True)
class Slice:
    """An image to predict: a file, or a page of a stack; `around` are those that go with it.

    Its name is a path from the folder that it was found in or below, without the ending.
    """

    name: str
    path: Path
    info: ImageInfo
    page: int | None = None
    around: tuple[Slice, ...] = ()

    def open(self, reading: Reading) -> Array | Blocks | Layers:
        """Its pixels (H, W, C), with those around it as further channels."""
        if self.around:
            return Layers([open_raster(s.path, s.page, s.info, reading) for s in self.around])
        return open_raster(self.path, self.page, self.info, reading)


class FilePredictor:
    """Predicts image files and writes what was found beside each other in one folder.

    For an image NAME, or NAME_PAGE of a stack: NAME_mask.png with the values of the training masks
    (a TIFF where these are negative or large), NAME_probability.png (of the second of two classes,
    or of the chosen class of more; 16-bit, 65535 is 1), NAME_overlay.png, and on request
    NAME_labels.tif, NAME_entropy.png and, where several predictions are averaged,
    NAME_disagreement.png (16-bit, too; see `segmentation.uncertainty`). Of regions NAME_REGION.png
    is 255 where each is. The overlay has the image's size and shows instances, numbered, where the
    model or `labels` makes them, else classes. Of an image with more than AT_ONCE pixels all but
    the overlay are TIFFs, written in bands, and the overlay is small and shows classes.

    Args:
        min_size: connected parts of fewer pixels become the class that surrounds them, and
            instances of fewer pixels are left out; None: see `Segmenter`.
        reading: how to read the files, beyond what they say themselves; None: as the
            training images were read.
        labels: also number the connected parts of class 1 (4-connected, 0 is the rest), or the
            instances of a model that was trained with --instances.
        uncertainty: also write the maps of `segmentation.uncertainty`.
    """

    def __init__(
        self,
        predict: Predictor,
        table: ClassTable,
        threshold: float,
        *,
        min_size: int | None = None,
        labels: bool = False,
        uncertainty: bool = False,
        reading: Reading = AS_STORED,
    ) -> None:
        self.segmenter = Segmenter(predict, table, threshold, min_size=min_size)
        known = self.segmenter.reading
        self.reading = known if reading == AS_STORED else replace(reading, rgb=known.rgb)
        if labels and not self.segmenter.has_labels:
            raise InputError(
                "--labels numbers the parts of the second of two classes, but the model has "
                f"{len(self.segmenter.classes)} classes: leave it out"
            )
        if uncertainty and self.segmenter.of_regions:
            raise InputError(
                "--uncertainty needs classes that exclude each other, but this model predicts "
                "regions that overlap: leave it out"
            )
        self.labels, self.parts = labels, labels or bool(min_size)
        self.numbers = labels or self.segmenter.instances
        self.unsure: list[str] = []  # the names of the maps
        if uncertainty:
            self.unsure = ["entropy", *["disagreement"] * (predict.members > 1)]

    def files(self, image: Slice, out: Path) -> list[Path]:
        """The files that `run` writes."""
        kind = "png" if image.info.height * image.info.width <= AT_ONCE else "tif"
        mask = self.segmenter.table.suffix if kind == "png" else kind
        names = [f"mask.{mask}", f"probability.{kind}", "overlay.png"]
        names += [f"{name}.{kind}" for name in (*self.unsure, *self.regions)]
        return [out / f"{image.name}_{n}" for n in [*names, *["labels.tif"] * self.labels]]

    @property
    def dtypes(self) -> list[type[np.integer]]:
        """The types of the probability, and of the maps that `parted` gives."""
        return [np.uint16] * (1 + len(self.unsure)) + [np.uint8] * len(self.regions)

    @property
    def regions(self) -> list[str]:
        """The file names of the model's regions."""
        return [file_name(name) for name in self.segmenter.region_names]

    def run(self, image: Slice, out: Path) -> None:
        """Predicts one image and writes what was found."""
        self.predict(image, out)()

    def predict(self, image: Slice, out: Path) -> Callable[[], None]:
        """Predicts one image, and returns a function that writes it, to be called once, in any
        thread.

        A large image is written as it is predicted.
        """
        source = RasterSource(image.open(self.reading), image.info.nodata)
        if math.prod(source.shape) > AT_ONCE:
            self._run_in_bands(source, self.files(image, out))
            return lambda: None
        found, depth = self.segmenter.predict.found(source, entropies=bool(self.unsure))
        return functools.partial(self.write, image, out, source, found, depth)

    def parted(self, found: Probability) -> tuple[Probability, list[Array]]:
        """Probabilities (K, H, W) of what was predicted, and the maps (H, W) that go with them: of
        what is unsure, and of each region 255 where it is.
        """
        if known := self.segmenter.of_regions:
            inside = known.found(found, self.segmenter.threshold)
            return found, [np.where(one, np.uint8(255), np.uint8(0)) for one in inside]
        if not self.unsure:
            return found, []
        found, entropies = found[:-1], found[-1]
        made = {"entropy": entropy_map(found), "disagreement": disagreement_map(found, entropies)}
        return found, [as_16_bit(made[name][None]) for name in self.unsure]

    def write(
        self,
        image: Slice,
        out: Path,
        source: RasterSource,
        found: Probability,
        depth: Depth | None,
    ) -> None:
        """Writes what `Predictor.found` gave for one image: these files, at this threshold."""
        mask, probability, picture, *others = self.files(image, out)
        found, unsure = self.parted(found)
        for file, values in zip(others, unsure, strict=False):
            write_image(file, values)
        decided = self.segmenter.decided(found, source)
        table = self.segmenter.table
        write_image(mask, table.decode(decided), palette=table.palette)
        write_image(probability, as_16_bit(found))
        shown = self.segmenter.picture(source)
        if not self.numbers:
            write_image(picture, overlay(shown, decided, table))
            return
        numbers = self.segmenter.numbered(decided, depth)
        write_image(picture, instance_overlay(shown, numbers))
        for file in others[len(unsure) :]:
            if (count := int(numbers.max())) > 65535:
                raise InputError(f"{image.name} has {count} parts, more than a 16-bit label holds")
            write_image(file, numbers.astype(np.uint16))

    def _run_in_bands(self, source: RasterSource, files: Sequence[Path]) -> None:
        mask, probability, picture, *others = files
        segmenter, table = self.segmenter, self.segmenter.table
        if self.parts:
            raise InputError(
                f"an image of {source.shape[0]} x {source.shape[1]} pixels is predicted in bands, "
                "across which connected parts are not found: leave out --min-size and --labels"
            )
        h, w = source.shape
        step = -(-max(h, w) // PREVIEW)
        small: list[NDArray[np.uint8]] = []
        with contextlib.ExitStack() as stack:
            shape = (h, w, *np.shape(table.values[0]))
            masks = stack.enter_context(writing_bands(mask, shape, table.dtype, table.palette))
            probabilities, *unsure = (
                stack.enter_context(writing_bands(file, (h, w), dtype))
                for file, dtype in zip((probability, *others), self.dtypes, strict=True)
            )
            for top, found in segmenter.predict.bands(source, entropies=bool(self.unsure)):
                band, mapped = self.parted(found)
                decided = segmenter.decided(band, source, slice(top, top + band.shape[1]))
                masks.write(top, table.decode(decided))
                probabilities.write(top, as_16_bit(band))
                for writer, values in zip(unsure, mapped, strict=True):
                    writer.write(top, values)
                small.append(decided[-top % step :: step, ::step])
        preview = segmenter.picture(source, step)
        write_image(picture, overlay(preview, np.concatenate(small), table))


def as_16_bit(probability: Probability) -> NDArray[np.uint16]:
    """The largest of the probabilities (K, H, W), as 0 to 65535."""
    return np.round(probability.max(axis=0) * 65535).astype(np.uint16)


def predict_files(
    predictor: FilePredictor,
    inputs: Inputs,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> list[str]:
    """Predicts images, into a tree of the folders that they lie in; legend.png explains the colours
    of the overlays.

    Args:
        processes: share the images.

    Returns:
        What went wrong with the images that failed, a sentence each; the others are written.

    Raises:
        InputError: files in the way, before anything is predicted.
    """
    processes = processes or Processes()
    segmenter = predictor.segmenter
    slices, failed = find_slices(inputs, predictor.reading, segmenter.check, segmenter.slices)
    count = len(slices) + len(failed)
    check_free([(image, predictor.files(image, out)) for image in slices], overwrite=overwrite)
    processes.wait()  # so that none finds what another has written already
    mine = _predict_each(predictor, processes.share(slices), out, quiet=not processes.main)
    failed += [message for part in processes.gather(mine) for message in part]
    if not processes.main:
        return failed
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    legend = out / "legend.png"
    if len(failed) < count and not predictor.numbers and (overwrite or not legend.exists()):
        write_image(legend, np.asarray(key(overlay_legend(predictor.segmenter.table), 480)))
    print(f"{count - len(failed)} of {counted(count, 'image')} predicted, in {out}")
    return failed


def check_free(writes: Iterable[tuple[Slice, Sequence[Path]]], *, overwrite: bool) -> None:
    """Raises an InputError for two images with files of one name, and for files in the way."""
    made: dict[Path, Path] = {}  # from which image each file comes
    for image, files in writes:
        for file in files:
            if file in made:
                raise InputError(
                    f"{made[file]} and {image.path} would both be written to {file}: rename one"
                )
            made[file] = image.path
            if file.exists() and not overwrite:
                raise InputError(f"{file} exists already: give --overwrite or another --out")


def _predict_each(
    predictor: FilePredictor, images: Sequence[Slice], out: Path, *, quiet: bool
) -> list[str]:
    """Predicts images one by one, while threads compress and write those before: of a small one
    that takes longer than a GPU does. Returns what went wrong, in the order of the images."""
    wrong: dict[int, str] = {}

    @contextlib.contextmanager
    def noted(i: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            path = str(images[i].path)
            wrong[i] = str(error) if path in str(error) else f"{path!r}: {error}"

    waiting: deque[tuple[int, Future[None]]] = deque()

    def crowded() -> bool:
        infos = [images[i].info for i, _ in waiting]  # together no more than one image may have
        return sum(info.height * info.width for info in infos) > AT_ONCE

    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as threads:
        for i, image in enumerate(tqdm(images, unit="image", disable=True if quiet else None)):
            with noted(i):
                waiting.append((i, threads.submit(predictor.predict(image, out))))
            last = i + 1 == len(images)
            while waiting and (last or crowded() or waiting[0][1].done()):
                first, writing = waiting.popleft()
                with noted(first):
                    writing.result()
    return [wrong[i] for i in sorted(wrong)]


def find_slices(
    inputs: Inputs,
    reading: Reading = AS_STORED,
    check: Callable[[ImageInfo, str], None] | None = None,
    together: int = 1,
) -> tuple[list[Slice], list[str]]:
    """The images of files or volumes, a stack page by page, and what is wrong with others.

    Args:
        reading: how to read the files, beyond what they say themselves.
        check: raises InputError for an image that cannot be predicted.
        together: neighbouring slices that the model takes; see `with_neighbours`.

    Raises:
        InputError: a single file that is no image; single images, where neighbouring slices are
            taken together.
    """
    slices: list[Slice] = []
    failed: list[str] = []
    for path in inputs.files:
        try:
            info = image_info(path, reading)
            if check:
                check(info, repr(str(path)))
        except InputError as error:
            if inputs.root is None:
                raise
            failed.append(str(error))
            continue
        name = (inputs.place(path) / volume_name(path)).as_posix()
        if info.pages == 1:
            slices.append(Slice(name=name, path=path, info=info))
            continue
        digits = len(str(info.pages - 1))
        slices += [
            Slice(name=f"{name}_{page:0{digits}d}", path=path, info=info, page=page)
            for page in range(info.pages)
        ]
    return _surrounded(slices, together), failed


def _surrounded(slices: list[Slice], together: int) -> list[Slice]:
    """The same slices, with those that are next to each in its stack or folder."""
    if together == 1:
        return slices
    places = [
        Place(str(s.path)) if s.page is not None else Place(s.path.parent, stem_of(s.path))
        for s in slices
    ]
    around = around_each(places, [s.info for s in slices], together)
    return [
        replace(image, around=tuple(slices[i] for i in near))
        for image, near in zip(slices, around, strict=True)
    ]
