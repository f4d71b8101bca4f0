"""The tab Label: images in; masks, probabilities and areas out, as of `unet predict-seg`."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from segmentation.data.classes import IGNORE, class_names
from segmentation.data.depths import Depth
from segmentation.data.inputs import Inputs
from segmentation.output import AT_ONCE, FilePredictor, Slice, find_slices
from segmentation.pictures import (
    class_colours,
    class_legend,
    instance_overlay,
    overlay,
    overlay_legend,
)
from segmentation.predict import Probability
from segmentation.segmenter import RasterSource
from segmentation.uncertainty import entropy_map
from unet.errors import InputError
from unet.files.pages import AS_STORED
from unet.files.pictures import RGB
from unet.files.writing import write_text
from unet.words import counted
from unet_diffusion.page.shared import SEGMENTATION, Page, packed, sentences, swatches

LAYERS = ("overlay", "mask", "probability", "uncertainty")
COLUMNS = ("image", "class", "mask value", "pixels", "share", "objects")
VIEW = 1024  # pixels a side of what is shown, at most


@dataclass
class Labelled:
    """The images of one user and their predictions; probabilities are kept on the disk."""

    folder: Path
    model: str
    predictor: FilePredictor
    images: list[Slice] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)

    def source(self, image: Slice) -> RasterSource:
        return RasterSource(image.open(self.predictor.reading), image.info.nodata)

    def found(self, image: Slice) -> tuple[Probability, Depth | None]:
        with np.load(self._file(image), allow_pickle=False) as kept:
            return kept["probability"], kept.get("depth")

    def predict(self, image: Slice) -> None:
        """Predicts an image, writes the files of `predict-seg`, and counts."""
        source = self.source(image)
        found, depth = self.predictor.segmenter.predict.found(source)
        kept = {"probability": found} if depth is None else {"probability": found, "depth": depth}
        np.savez(self._file(image), allow_pickle=False, **kept)
        self.images.append(image)
        self._write(image, source, found, depth)

    def decide(self, threshold: float) -> None:
        """Decides all images again at another threshold; nothing is predicted again."""
        old = self.predictor
        parts = old.segmenter.predict, old.segmenter.table, threshold
        self.predictor = FilePredictor(*parts, labels=old.labels, reading=old.reading)
        self.rows = []
        for image in self.images:
            self._write(image, self.source(image), *self.found(image))

    def files(self) -> list[Path]:
        """Masks, probabilities, overlays, numbered objects, and the table."""
        made = [file for i in self.images for file in self.predictor.files(i, self.folder)]
        return [*made, self.folder / "areas.csv"]

    def _write(
        self, image: Slice, source: RasterSource, found: Probability, depth: Depth | None
    ) -> None:
        self.predictor.write(image, self.folder, source, found, depth)
        decided = self.predictor.segmenter.decided(found, source)
        self.rows += areas(image.name, decided, depth, self.predictor)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *self.rows])
        write_text(self.folder / "areas.csv", text.getvalue())

    def _file(self, image: Slice) -> Path:
        return self.folder / f"{image.name}.npz"


def areas(
    name: str, decided: NDArray[np.uint8], depth: Depth | None, predictor: FilePredictor
) -> list[list[Any]]:
    """A row of the table for each class: its pixels, their share, and its objects.

    Objects are the 4-connected parts of a class, of a model of numbered masks the cells.
    """
    segmenter, known = predictor.segmenter, int((decided != IGNORE).sum())
    rows: list[list[Any]] = []
    for i, kind in enumerate(class_names(segmenter.table)):
        own = decided == i
        if segmenter.instances:
            count = int(segmenter.numbered(decided, depth).max(initial=0)) if i == 1 else 0
        else:
            count = int(ndimage.label(own)[1])
        pixels, value = int(own.sum()), segmenter.table.values[i]
        rows.append([name, kind, str(value), pixels, round(pixels / max(known, 1), 4), count])
    return rows


def heat(values: NDArray[np.floating[Any]]) -> RGB:
    """Values (H, W) from 0 to 1 as colours, dark to bright."""
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](values, bytes=True)[..., :3])


def picture(done: Labelled, image: Slice, layer: str, opacity: float) -> RGB:
    """An image (H, W, 3) with a layer over it; at opacity 0 the image alone."""
    source, (found, depth) = done.source(image), done.found(image)
    segmenter = done.predictor.segmenter
    shown = segmenter.picture(source)
    if layer == "probability":
        over = heat(found.max(axis=0))
    elif layer == "uncertainty" and segmenter.of_regions:
        raise InputError(
            "uncertainty needs classes that exclude each other, but this model predicts regions "
            "that overlap"
        )
    elif layer == "uncertainty":
        over = heat(entropy_map(found))
    else:
        decided = segmenter.decided(found, source)
        if layer == "mask":
            over = class_colours(decided, len(segmenter.table.values))
        elif done.predictor.numbers:
            over = instance_overlay(shown, segmenter.numbered(decided, depth))
        else:
            over = overlay(shown, decided, segmenter.table)
    mixed = (1 - opacity) * shown + opacity * over
    return np.rint(mixed).astype(np.uint8)


def meaning(done: Labelled, layer: str) -> str:
    """The legend of the colours of a layer."""
    table = done.predictor.segmenter.table
    if layer == "mask":
        return swatches(class_legend(table))
    if layer == "overlay":
        return "" if done.predictor.numbers else swatches(overlay_legend(table))
    if layer == "uncertainty":
        return "entropy of the probabilities: dark is sure, bright is not"
    of = class_names(table)[1] if len(table.values) == 2 else "the chosen class"
    return f"probability of {html.escape(of)}: dark is 0, bright is 1"


def zoomed(whole: RGB, zoom: float, middle: tuple[float, float]) -> tuple[RGB, tuple[int, ...]]:
    """The part around a point of an image, enlarged pixel by pixel, and its box in the image.

    Args:
        middle: row and column, as shares of the height and the width.

    Returns:
        The picture, and top, left, height and width of what it shows.
    """
    h, w = whole.shape[:2]
    high, wide = max(1, round(h / zoom)), max(1, round(w / zoom))
    top = int(np.clip(round(middle[0] * h - high / 2), 0, h - high))
    left = int(np.clip(round(middle[1] * w - wide / 2), 0, w - wide))
    part = Image.fromarray(np.ascontiguousarray(whole[top : top + high, left : left + wide]))
    scale = VIEW / max(high, wide)
    if scale > 1:
        size = (wide * int(scale), high * int(scale))
        part = part.resize(size, Image.Resampling.NEAREST)
    else:
        part.thumbnail((VIEW, VIEW), Image.Resampling.BOX)
    return np.asarray(part), (top, left, high, wide)


def found_slices(page: Page, name: str, files: Sequence[str]) -> tuple[Labelled, list[str]]:
    """The images of uploaded files, none of them predicted yet, and what is wrong with others.

    Raises:
        InputError: no image among them; more pixels than the page takes.
    """
    segmenter = page.segmenter(name)
    parts = segmenter.predict, segmenter.table, segmenter.threshold
    reading = page.known(name, SEGMENTATION).reading or AS_STORED
    predictor = FilePredictor(*parts, labels=segmenter.has_labels, reading=reading)
    slices: list[Slice] = []
    wrong: list[str] = []
    pixels = 0
    for file in map(Path, files):
        try:
            found, _ = find_slices(
                Inputs([file]), predictor.reading, segmenter.check, segmenter.slices
            )
        except InputError as error:
            text = str(error).replace(str(file), file.name)
            wrong.append(text if file.name in text else f"'{file.name}': {text}")
            continue
        for one in found:
            pixels += one.info.height * one.info.width
            if one.info.height * one.info.width > AT_ONCE or pixels > page.most_pixels:
                raise InputError(
                    f"{file.name} has {counted(found[0].info.pages, 'image')} of "
                    f"{one.info.height} x {one.info.width} pixels, more than the page takes "
                    f"(one of {AT_ONCE:,} at most, {page.most_pixels:,} together): label it with "
                    "unet predict-seg"
                )
        taken = {one.name for one in slices}
        if twice := [one.name for one in found if one.name in taken]:
            wrong.append(f"'{file.name}' is left out: another image is {twice[0]}, too; rename it")
            continue
        slices += found
    if not slices:
        raise InputError(" | ".join(wrong))
    return Labelled(page.results(), name, predictor, slices), wrong


def tab(page: Page, current: gr.State, model: gr.Dropdown) -> None:
    """Builds the tab.

    Args:
        current: the state that holds what was labelled, for the next tab.
        model: the segmentation that is chosen.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            files = gr.File(
                label="Images (PNG, TIFF, JPEG, BMP, NPY ...; 8 or 16 bit, stacks)",
                file_count="multiple",
                elem_id="label-files",
            )
            layer = gr.Radio(LAYERS, value=LAYERS[0], label="Over the image", elem_id="layer")
            opacity = gr.Slider(0, 1, 1, step=0.05, label="Opacity", elem_id="opacity")
            threshold = gr.Slider(
                0, 0.99, 0.5, step=0.01, label="Threshold", visible=False, elem_id="threshold"
            )
            zoom = gr.Slider(
                1, 16, 1, step=1, label="Zoom (click the picture to move)", elem_id="zoom"
            )
        with gr.Column(scale=2):
            shown = gr.Dropdown([], label="Image", interactive=True, elem_id="label-image")
            view = gr.Image(
                label="Found",
                format="png",
                interactive=False,
                elem_id="label-view",
                buttons=["fullscreen", "download"],
                height=480,
            )
            legend = gr.HTML()
    table = gr.Dataframe(
        headers=list(COLUMNS), label="Areas", interactive=False, elem_id="areas", max_height=300
    )
    downloads = gr.File(
        label="Files: masks with the original values, probabilities, overlays, objects, table",
        file_count="multiple",
        interactive=False,
        elem_id="label-downloads",
    )
    middle, box = gr.State((0.5, 0.5)), gr.State((0, 0, 1, 1))

    @sentences
    def label(name: str, given: list[str] | None) -> Iterator[Any]:
        if not given:  # another model is chosen, before there is an image
            yield [gr.skip()] * 5
            return
        done, wrong = found_slices(page, name, given)
        waiting, done.images = done.images, []
        for text in wrong:
            gr.Warning(text, duration=None)
        for i, image in enumerate(waiting):
            done.predict(image)
            last = i + 1 == len(waiting)
            names = [one.name for one in done.images]
            segmenter = done.predictor.segmenter
            two = len(segmenter.table.values) == 2
            first = gr.update(choices=names, value=names[0])
            usual = gr.update(visible=two, value=round(segmenter.threshold, 2))
            yield (  # after the first image others may be chosen while the rest is predicted
                replace(done, images=list(done.images)),
                gr.update(choices=names) if i else first,
                gr.skip() if i else usual,
                done.rows,
                _given(done) if last else None,
            )

    @sentences
    def decide(done: Labelled | None, value: float) -> Any:
        if done is None:
            return [gr.skip()] * 4
        done.decide(value)
        return done, value, done.rows, _given(done)

    @sentences
    def look(
        done: Labelled | None, name: str, kind: str, over: float, times: float, at: Any
    ) -> tuple[Any, Any, str]:
        image = chosen(done, name)
        if done is None or image is None:
            return None, (0, 0, 1, 1), ""
        return *zoomed(picture(done, image, kind, over), times, at), meaning(done, kind)

    @sentences
    def move(
        done: Labelled | None, name: str, part: Any, event: gr.SelectData
    ) -> tuple[float, float]:
        image = chosen(done, name)
        if image is None:
            return 0.5, 0.5
        top, left, high, wide = part
        scale = VIEW / max(high, wide)
        x, y = (c / (int(scale) if scale > 1 else scale) for c in event.index)
        return (top + y) / image.info.height, (left + x) / image.info.width

    looked = [current, shown, layer, opacity, zoom, middle]
    work: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1}
    hidden: dict[str, Any] = {"api_visibility": "private"}
    found = [current, shown, threshold, table, downloads]
    for event in (files.upload, model.change):
        event(label, [model, files], found, **work, **hidden).success(
            look, looked, [view, box, legend], **hidden
        )
    threshold.release(
        decide, [current, threshold], [current, threshold, table, downloads], **work, **hidden
    ).success(look, looked, [view, box, legend], **hidden)
    for changed in (shown.select, layer.input, opacity.release, zoom.release):
        changed(look, looked, [view, box, legend], **work, **hidden)
    view.select(move, [current, shown, box], middle, **hidden).then(
        look, looked, [view, box, legend], **hidden
    )


def chosen(done: Labelled | None, name: str) -> Slice | None:
    """The image of that name, of those that were labelled."""
    return next((i for i in done.images if i.name == name), None) if done else None


def _given(done: Labelled) -> list[str]:
    files = done.files()
    return [str(file) for file in (packed(files, done.folder, "all.zip"), *files)]
