"""Prediction of volumes: masks and probabilities are written into OME-Zarr slab by slab, and an
interrupted prediction can be continued."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segmentation.data.inputs import Inputs
from segmentation.data.slices import Layers, near, near_page
from segmentation.output import AT_ONCE, FilePredictor, as_16_bit
from segmentation.predict import Predictor, Probability
from segmentation.segmenter import RasterSource
from unet.errors import InputError, with_extras
from unet.files.images import Blocks
from unet.files.pages import ALL, CHANNELS, Array, ImageInfo, Stored, Volume, as_read, naming
from unet.files.volumes import open_volume, volume_name
from unet.files.writing import write_text
from unet.training.task import Processes
from unet.words import counted

SLAB_BYTES = 2**28  # of the slices that are read, predicted and written together
TILE = 1024  # side of the chunks, where the volume has none
TOLD_EVERY = 60  # seconds between lines that say how far it is, where no terminal shows a bar
# What models say of themselves that decides nothing, or that a plan holds as it is used.
_TOLD = (
    "training",
    "calibration",
    "cells",
    "classes",
    "threshold",
    "smallest_object",
    "symmetries",
)


@dataclass(frozen=True)
class Slab:
    """Slices that share chunks, and so are written at once.

    Attributes:
        at: their places along each axis of slices.
        pages: their numbers in the volume.
    """

    at: tuple[slice, ...]
    pages: Sequence[int]


class Progress:
    """A file beside the results: what is being made, in JSON, and below it a digit for each slab.

    A digit becomes 1 once the chunks of its slab are written. Processes set digits of their own,
    so that they need not wait for each other.
    """

    def __init__(self, file: Path, plan: dict[str, Any], count: int) -> None:
        self.file, self.plan, self.count = file, plan, count
        self.head = json.dumps(plan) + "\n"

    def begin(self) -> None:
        """Writes the file anew: nothing is done."""
        write_text(self.file, self.head + "0" * self.count)

    def differs(self) -> str:
        """The first setting in which the prediction of the file differs; "" if there is none.

        Raises:
            InputError: the file is none of this class's.
        """
        try:
            said, digits = self.file.read_text(encoding="utf-8").split("\n", 1)
            begun = json.loads(said)
            known = isinstance(begun, dict) and not set(digits) - {"0", "1"}
        except (OSError, ValueError):
            known = False
        if not known:
            raise InputError(f"{self.file} is damaged: remove it, and give --overwrite")
        other = [key for key in {**self.plan, **begun} if begun.get(key) != self.plan.get(key)]
        return other[0] if other else ""

    def left(self) -> list[int]:
        """The slabs that are not done."""
        digits = self.file.read_text(encoding="utf-8")[len(self.head) :]
        return [i for i in range(self.count) if digits[i : i + 1] != "1"]

    def done(self, slab: int) -> None:
        """Marks the chunks of a slab as written."""
        with self.file.open("rb+") as file:
            file.seek(len(self.head.encode()) + slab)
            file.write(b"1")


class _Told:
    """The progress of a prediction, over all its processes: a bar in a terminal, else a line from
    time to time."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self.progress, self.quiet = progress, quiet
        self.first = self._done()
        self.begun = self.told = time.monotonic()
        hidden = True if quiet else None
        self.bar = tqdm(
            total=progress.count, initial=self.first, unit="slab", disable=hidden, smoothing=0.1
        )

    def _done(self) -> int:
        return self.progress.count - len(self.progress.left())

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt and not self.quiet:
            slabs = counted(self.progress.count, "slab")
            print(f"{self._done():,} of {slabs} are done: the same command continues", flush=True)

    def now(self) -> None:
        """Prints the progress."""
        done, now = self._done(), time.monotonic()
        self.bar.update(done - self.bar.n)
        soon = now - self.told < TOLD_EVERY or done in (self.first, self.progress.count)
        if self.quiet or not self.bar.disable or soon:
            return
        self.told = now
        left = (self.progress.count - done) * (now - self.begun) / (done - self.first)
        slabs = counted(self.progress.count, "slab")
        minutes = counted(math.ceil(left / 60), "minute")
        print(f"{done:,} of {slabs} are done, {minutes} left", flush=True)


def predict_volumes(
    predictor: FilePredictor,
    inputs: Inputs,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> list[str]:
    """Predicts volumes one after the other, into a tree of the folders that they lie in; see
    `predict_volume`.

    All that are to be predicted get an empty NAME_progress first, so that an interrupted prediction
    goes on with those that have one, and leaves the others as they are.

    Returns:
        What went wrong with the volumes or slices that failed, a sentence each.

    Raises:
        InputError: two volumes of one name; results in the way.
    """
    processes = processes or Processes()
    volumes = inputs.volumes
    folders = [out / inputs.place(path) for path in volumes]
    names = [place / volume_name(path) for place, path in zip(folders, volumes, strict=True)]
    times = Counter(names)
    if twins := [path for path, name in zip(volumes, names, strict=True) if times[name] > 1]:
        raise InputError(f"{twins[0]} and {twins[1]} would have results of one name: rename one")
    marks, masks = ([Path(f"{n}_{end}") for n in names] for end in ("progress", "mask.zarr"))
    begun, made = ([file.exists() for file in files] for files in (marks, masks))
    if any(made) and not any(begun) and not overwrite:
        file = masks[made.index(True)]
        raise InputError(f"{file} exists already: give --overwrite or another --out")
    todo = [i for i in range(len(volumes)) if begun[i] or not (made[i] and any(begun))]
    processes.wait()  # so that none finds what another has begun
    if processes.main and len(volumes) > 1:
        for i in todo:
            folders[i].mkdir(parents=True, exist_ok=True)
            marks[i].touch()
    processes.wait()
    failed: list[str] = []
    for i in todo:
        if processes.main and len(volumes) > 1:
            print(f"{volumes[i]}:")
        try:
            failed += predict_volume(
                predictor, volumes[i], folders[i], overwrite=overwrite, processes=processes
            )
        except InputError as error:
            if len(volumes) == 1:
                raise
            failed.append(str(error))
            if processes.main:
                print(f"error: {error}", file=sys.stderr)
    return failed


def predict_volume(
    predictor: FilePredictor,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> list[str]:
    """Predicts a volume into NAME_mask.zarr and NAME_probability.zarr in a folder, as OME-Zarr; and
    into NAME_entropy.zarr and NAME_disagreement.zarr where the predictor gives such maps.

    They have the axes of the volume but for the channels, its scale, and its chunks, or thinner
    ones where their slices do not fit into SLAB_BYTES. In memory are the slices of a chunk, or of a
    slice of more than AT_ONCE pixels a band of tiles. NAME_progress says which slices are written;
    an interrupted prediction goes on by it, and its end removes it.

    Args:
        overwrite: replace what is there, unless it is this prediction, unfinished.
        processes: share the slices.

    Returns:
        What went wrong with the slices that failed, a sentence each; they are left for another run.

    Raises:
        InputError: no volume, or one that the model does not fit; results in the way.
    """
    processes = processes or Processes()
    _check(predictor)
    with ExitStack() as stack:
        with naming(source):
            volume = stack.enter_context(open_volume(source))
            stored = volume.stored(predictor.reading)
            info = predictor.reading.of(volume.pages(predictor.reading)(0).info)
        predictor.segmenter.check(info, repr(str(source)))
        if info.pages == 1 and predictor.segmenter.slices > 1:
            raise InputError(
                f"the model takes {predictor.segmenter.slices} neighbouring slices together, and "
                f"{str(source)!r} has a single one"
            )
        if info.height * info.width > AT_ONCE and predictor.segmenter.min_size:
            raise InputError(
                f"slices of {info.height} x {info.width} pixels are predicted in bands, across "
                "which connected parts are not found: leave out --min-size"
            )
        work = _Work(predictor, source, volume, stored, info, out)
        progress = Progress(out / f"{work.name}_progress", work.plan(), len(work.slabs))
        going_on = _going_on(progress, work.results, overwrite)
        processes.wait()  # so that none finds what another has begun
        todo: list[int] = []
        if processes.main:
            if not going_on:
                progress.begin()
                work.create()
            todo = progress.left()
            if going_on:
                done = len(work.slabs) - len(todo)
                print(
                    f"continuing: {done:,} of {counted(len(work.slabs), 'slab')} are done already",
                    flush=True,
                )
        todo = processes.gather(todo)[0]
        mine = []
        with _Told(progress, quiet=not processes.main) as told:
            for i in processes.share(todo):
                try:
                    work.run(work.slabs[i])
                    progress.done(i)
                except InputError as error:
                    mine.append(f"slices from {work.slabs[i].pages[0]} on: {error}")
                told.now()
        failed = [message for part in processes.gather(mine) for message in part]
    if processes.main:
        for message in failed:
            print(f"error: {message}", file=sys.stderr)
        if not failed:
            progress.file.unlink()
        slabs = counted(len(work.slabs), "slab")
        print(f"{len(work.slabs) - len(failed):,} of {slabs} predicted, in {out}")
    return failed


def _check(predictor: FilePredictor) -> None:
    """Refuses what a volume of masks does not hold."""
    cure = "leave it out, or predict the slices as files of their own"
    if predictor.labels:
        raise InputError(f"--labels numbers the parts of a slice, not those of a volume: {cure}")
    if isinstance(predictor.segmenter.table.values[0], tuple):
        raise InputError("the masks of this model are colours, which a volume of masks cannot hold")


def _going_on(progress: Progress, results: Sequence[Path], overwrite: bool) -> bool:
    """Whether there are partial results of this very prediction.

    Raises:
        InputError: others are in the way.
    """
    if progress.file.exists() and progress.file.stat().st_size:
        other = progress.differs()
        if not other:
            begun = len(progress.left()) < progress.count
            return begun and all(file.exists() for file in results)
        if not overwrite:
            raise InputError(
                f"{results[0]} was started with another {other}, as {progress.file} says: give "
                "the same again, or give --overwrite or another --out"
            )
    for file in results:
        if file.exists() and not overwrite:
            raise InputError(f"{file} exists already: give --overwrite or another --out")
    return False


class _Work:
    """One volume to predict: its slabs, and what is made of each."""

    def __init__(
        self,
        predictor: FilePredictor,
        source: Path,
        volume: Volume,
        stored: Stored,
        info: ImageInfo,
        out: Path,
    ) -> None:
        self.predictor, self.reading = predictor, predictor.reading
        self.segmenter = predictor.segmenter
        self.source, self.volume, self.stored, self.info = source, volume, stored, info
        self.name = volume_name(source)
        names = ("mask", "probability", *predictor.unsure, *predictor.regions)
        self.results = [out / f"{self.name}_{name}.zarr" for name in names]
        self.dtype = self.segmenter.table.dtype
        self.slices = [i for i, axis in enumerate(stored.axes) if axis not in "YX" + CHANNELS]
        self.kept = [i for i, axis in enumerate(stored.axes) if axis not in CHANNELS]
        self.depths = self._depths()
        self.slabs = self._slabs()

    def _depths(self) -> list[int]:
        """How many slices share a chunk, along each axis of slices."""
        unit, shape = self.volume.shards or self.volume.chunks, self.stored.shape
        height, width = self.stored.size
        if height * width > AT_ONCE:
            return [1] * len(self.slices)
        pixel = self.stored.channels * self.volume.array.dtype.itemsize + self.dtype.itemsize + 2
        found = [min(unit[i], shape[i]) for i in self.slices]
        while math.prod(found) * height * width * pixel > SLAB_BYTES and max(found, default=1) > 1:
            largest = found.index(max(found))
            found[largest] = -(-found[largest] // 2)
        return found

    def _slabs(self) -> list[Slab]:
        lengths = [self.stored.shape[i] for i in self.slices]
        numbers = np.arange(math.prod(lengths)).reshape(lengths)
        spans = [
            [slice(start, min(start + depth, n)) for start in range(0, n, depth)]
            for n, depth in zip(lengths, self.depths, strict=True)
        ]
        return [Slab(at, numbers[at].ravel().tolist()) for at in itertools.product(*spans)]

    def plan(self) -> dict[str, Any]:
        """The settings that identify this prediction."""
        predict = self.segmenter.predict
        return {
            "input": str(self.source.resolve()),
            "shape": list(self.stored.shape),
            "axes": self.stored.axes,
            "slabs": self.depths,
            "model": _fingerprint(predict),
            "classes": list(self.segmenter.table.values),
            "threshold": self.segmenter.threshold,
            "min_size": self.segmenter.min_size,
            "tile": predict.tile,
            "overlap": predict.overlap,
            "tta": [list(turns) for turns in predict.symmetries],
            "precision": str(predict.dtype),
            **({"uncertainty": self.predictor.unsure} if self.predictor.unsure else {}),
            "reading": self.reading.to_dict(),
        }

    def create(self) -> None:
        """Makes the arrays, empty."""
        with with_extras():
            from unet.files.zarrs import ZarrImage, create_ome_zarr
        volume, stored = self.volume, self.stored
        depth = dict(zip(self.slices, self.depths, strict=True))
        chunks, shards = list(volume.chunks), volume.shards
        rows, columns = (stored.axes.index(axis) for axis in "YX")
        if shards and (
            any(depth[i] < min(shards[i], stored.shape[i]) for i in depth)
            or shards[rows] * shards[columns] > AT_ONCE
        ):
            shards = None
        if not shards:
            chunks = [depth.get(i, min(n, stored.shape[i])) for i, n in enumerate(chunks)]
        if chunks[rows] * chunks[columns] > AT_ONCE:  # as of a file that is not stored in chunks
            chunks[rows], chunks[columns] = min(chunks[rows], TILE), min(chunks[columns], TILE)

        def kept(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[i] for i in self.kept)

        for i, file in enumerate(self.results):
            dtype = np.dtype(self.predictor.dtypes[i - 1]) if i else self.dtype
            image = ZarrImage(
                shape=tuple(stored.shape[i] for i in self.kept),
                axes="".join(stored.axes[i] for i in self.kept),
                dtype=dtype,
                chunks=tuple(chunks[i] for i in self.kept),
                shards=kept(shards),
                scale=kept(volume.scale),
                translation=kept(volume.translation),
                units=kept(volume.units),
                zarr_format=volume.zarr_format,
            )
            create_ome_zarr(file, image)

    def run(self, slab: Slab) -> None:
        """Predicts the slices of a slab, and writes them.

        Raises:
            InputError: they cannot be read.
        """
        if self.info.height * self.info.width > AT_ONCE:
            self._run_in_bands(slab)
            return
        found = [self._found(pixels) for pixels in self._pixels(slab)]
        for file, blocks in zip(self.results, zip(*found, strict=True), strict=True):
            self._write(file, slab, ALL, np.stack(blocks))

    def _run_in_bands(self, slab: Slab) -> None:
        for page in slab.pages:
            around = [
                Blocks(self.source, i, self.reading, self.info)
                for i in near_page(page, self.info, self.segmenter.slices)
            ]
            pixels = Layers(around) if len(around) > 1 else around[0]
            source = RasterSource(pixels, self.info.nodata)
            for top, blocks in _in_whole_chunks(self._bands(source), self._chunk_rows()):
                rows = slice(top, top + len(blocks[0]))
                for file, block in zip(self.results, blocks, strict=True):
                    self._write(file, slab, rows, block[None])

    def _bands(self, source: RasterSource) -> Iterator[tuple[int, list[Array]]]:
        """What is written of the bands of a slice, and the first row of each."""
        for top, band in self.segmenter.predict.bands(source, entropies=self._unsure):
            yield top, self._blocks(band, source, slice(top, top + band.shape[1]))

    def _chunk_rows(self) -> int:
        from unet.files.zarrs import open_to_write

        array = open_to_write(self.results[0])
        at = [self.stored.axes[i] for i in self.kept].index("Y")
        return int((array.shards or array.chunks)[at])

    @property
    def _unsure(self) -> bool:
        return bool(self.predictor.unsure)

    def _found(self, pixels: Array | Layers) -> list[Array]:
        """What is written of a slice (H, W, C)."""
        source = RasterSource(pixels, self.info.nodata)
        return self._blocks(self.segmenter.predict(source, entropies=self._unsure), source)

    def _blocks(self, found: Probability, source: RasterSource, rows: slice = ALL) -> list[Array]:
        """Mask and probability (rows, W) of what was predicted, and the maps that go with them."""
        found, unsure = self.predictor.parted(found)
        decided = self.segmenter.table.decode(self.segmenter.decided(found, source, rows))
        return [decided, as_16_bit(found), *unsure]

    def _pixels(self, slab: Slab) -> Iterator[Array | Layers]:
        """The slices (H, W, C) of a slab, with those next to them where they are taken together."""
        together = self.segmenter.slices
        if together == 1:
            yield from self._read(slab.at)
            return
        along = max(
            (i for i, axis in enumerate(self.slices) if self.stored.shape[axis] > 1), default=0
        )
        span, length = slab.at[along], self.stored.shape[self.slices[along]]
        wide = slice(max(span.start - together // 2, 0), min(span.stop + together // 2, length))
        found = list(self._read([*slab.at[:along], wide, *slab.at[along + 1 :]]))
        count = wide.stop - wide.start
        for first in range(0, len(found), count):
            for i in range(span.start - wide.start, span.stop - wide.start):
                yield Layers([found[first + k] for k in near(i, count, together)])

    def _read(self, places: Sequence[slice]) -> Iterator[Array]:
        """The slices (H, W, C) at places along the axes of slices, read at once."""
        at = dict(zip(self.slices, places, strict=True))
        with naming(self.source):
            key = tuple(at.get(i, ALL) for i in range(len(self.stored.axes)))
            block = np.asarray(self.volume.array[key])
        part = replace(self.stored, shape=block.shape, read=lambda _: block)
        chosen = self.reading.chosen(self.volume.pages(self.reading)(0).info)
        for i in range(part.pages):
            with naming(self.source):
                pixels = part.page(i) if chosen is None else part.page(i)[..., chosen]
                pixels = as_read(np.ascontiguousarray(pixels), self.info)
            yield pixels

    def _write(self, file: Path, slab: Slab, rows: slice, blocks: Array) -> None:
        """Writes rows (slices, rows, W) of a slab in the order of the volume's axes."""
        from unet.files.zarrs import open_to_write

        axes = self.stored.axes
        ours = "".join(axes[i] for i in self.slices) + "YX"
        lengths = [span.stop - span.start for span in slab.at]
        blocks = blocks.reshape(*lengths, *blocks.shape[1:])
        places = dict(zip(ours, (*slab.at, rows, ALL), strict=True))
        theirs = [axes[i] for i in self.kept]
        turned = blocks.transpose([ours.index(axis) for axis in theirs])
        open_to_write(file)[tuple(places[axis] for axis in theirs)] = turned


def _in_whole_chunks(
    bands: Iterable[tuple[int, list[Array]]], rows: int
) -> Iterator[tuple[int, list[Array]]]:
    """The same bands (first row, blocks of rows), cut where chunks of so many rows end.

    So no chunk is read to be written: one that a killed process left in part stops nothing.
    """
    top = 0
    held: list[Array] = []
    for _, blocks in bands:
        held = [np.concatenate(pair) for pair in zip(held, blocks, strict=True)] if held else blocks
        if whole := len(held[0]) // rows * rows:
            yield top, [block[:whole] for block in held]
            top, held = top + whole, [block[whole:] for block in held]
    if len(held[0]):
        yield top, held


def _fingerprint(predict: Predictor) -> str:
    """Of the weights, and of what else of the models decides what they give.

    Of their configs it knows what is not as by default, so that a field that is new in a later
    version ends no prediction that an earlier one began.
    """
    found = hashlib.sha256()
    for model in predict.models:
        shape = {
            f.name: value
            for f in fields(model.config)
            if (value := getattr(model.config, f.name)) != f.default
        }
        info = {key: value for key, value in model.info.items() if key not in _TOLD}
        found.update(json.dumps([shape, info], sort_keys=True, default=str).encode())
        for name, weight in model.state_dict().items():
            found.update(name.encode())
            found.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()
