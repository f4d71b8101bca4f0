"""The tab Correct and learn: painted pixels train the model on, and held-out images judge it.

The human stays in the loop, as in ilastik (Berg et al., Nature Methods 16, 2019) and Cellpose 2
(Pachitariu and Stringer, Nature Methods 19, 2022). The folder and the run are ordinary ones.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from segmentation.data.classes import IGNORE, ClassTable, class_names
from segmentation.data.instances import CELL, INSTANCE_NAMES
from segmentation.data.pairs import Pair, find_pairs
from segmentation.data.splits import split_pairs
from segmentation.judging.evaluation import evaluate
from segmentation.judging.labelled import held_out, known_cells, labelled_data
from segmentation.options import SegmentationOptions
from segmentation.output import Slice
from segmentation.pictures import COLOURS, GREY
from segmentation.predict import Predictor
from segmentation.segmenter import Segmenter, load_models
from segmentation.training import find_data
from unet.errors import InputError
from unet.files.images import read_image
from unet.files.mask_values import Value
from unet.files.pages import Array
from unet.files.pictures import RGB, Legend
from unet.training.config_file import load_config
from unet.training.run import read_log
from unet.words import counted
from unet_diffusion.interactive import write_example
from unet_diffusion.page.label import Labelled, chosen, picture
from unet_diffusion.page.shared import (
    SEGMENTATION,
    Known,
    Page,
    interactive,
    sentences,
    swatches,
)

CANVAS = 640  # pixels a side to which small images are enlarged to be painted on
SURE = 250  # of a stroke's alpha: its soft edge says nothing
NEAR = 3  # levels by which a browser may change a colour
SCORES = {"ap": "mean AP", "v_rand": "V_Rand", "dice": "mean Dice"}  # the first that there is


@dataclass(frozen=True)
class Sheet:
    """An image that is painted on.

    Attributes:
        done: what was labelled, by which model.
        image: one of its images.
        classes: indices (H, W) of what was painted on it so far; elsewhere IGNORE.
        picture: what the editor shows of it (H, W, 3).
    """

    done: Labelled
    image: Slice
    classes: NDArray[np.uint8]
    picture: RGB

    @property
    def segmenter(self) -> Segmenter:
        return self.done.predictor.segmenter

    @property
    def key(self) -> Hashable:
        """The same for sheets of one image with the same classes, by any model with the same
        base."""
        place = self.image.path, self.image.page
        return base_of(self.done.model), self.segmenter.table.values, place

    def under(self, drawn: Mapping[str, Any]) -> bool:
        """Whether it is this sheet that is drawn on in the editor."""
        if drawn["background"] is None:
            return False
        shown = of_size(drawn["background"], self.classes.shape)[..., :3]
        return bool((abs(shown.astype(np.int16) - self.picture) <= NEAR).all())

    def painted(self, drawn: Mapping[str, Any]) -> Sheet:
        """The sheet with what is drawn over it in the editor."""
        brush = palette(self.segmenter.table)
        return replace(self, classes=painted(drawn["layers"], self.classes, brush))


Sheets = Mapping[Hashable, Sheet]


def put_by(sheets: Sheets, shown: Sheet | None, drawn: Mapping[str, Any] | None) -> Sheets:
    """The sheets with what is drawn in the editor; those on which nothing is painted left out.

    It belongs to the sheet whose picture is under it: the editor may still hold the one before
    `shown`, or have it again by its Undo.
    """
    if shown is None or drawn is None:
        return sheets
    found = {**sheets, shown.key: shown}
    if sheet := next((one for one in (shown, *sheets.values()) if one.under(drawn)), None):
        found[sheet.key] = sheet.painted(drawn)
    elif any(layer[..., 3].any() for layer in drawn["layers"]):
        gr.Warning(
            f"strokes that are not on the picture of {shown.image.name} are ignored: show the "
            "image, and paint on it"
        )
    return {key: one for key, one in found.items() if (one.classes != IGNORE).any()}


@dataclass(frozen=True)
class Lesson:
    """What one user has painted: a folder of images and masks, and the runs that learnt from it.

    Attributes:
        folder: holds labelled/ and held-out/, which `unet train-seg` reads, and run-1/, ....
        ignore: mask value of the pixels that were not painted.
        base: name of the model that it began with.
        runs: how many there are.
    """

    folder: Path
    ignore: Value
    base: str
    runs: int = 0


def palette(table: ClassTable) -> Legend:
    """The names and colours of the brush: a class each, as overlays have them, and 'don't know'."""
    names = class_names(table)
    colours = [tuple(map(int, colour)) for colour in COLOURS]
    if table.names == INSTANCE_NAMES:  # whose border follows from where cells touch
        names = names[: CELL + 1]
    if len(names) != 2:
        order = [(255, 255, 255), *colours]
    else:
        order = colours[:2] if table.shares[0] < table.shares[1] else colours[1::-1]
    found = [(name, (r, g, b)) for name, (r, g, b) in zip(names, order, strict=False)]
    return [*found, ("don't know", (GREY, GREY, GREY))]


def of_size(image: Array, size: tuple[int, ...]) -> Array:
    """An image (H, W, channels), which may have been enlarged, with the height and width given."""
    if image.shape[:2] == size:
        return image
    small = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(small)


def painted(layers: Sequence[Array], before: NDArray[np.uint8], brush: Legend) -> NDArray[np.uint8]:
    """Class indices (H, W) of what was painted in the colours of `palette`.

    Args:
        layers: (h, w, 4), the later ones above; of the size of the image or of its enlargement.
        before: class indices (H, W) where nothing is painted.
        brush: the colours in the order of the classes, the last one 'don't know'. Any other colour,
            such as that of a soft edge between two strokes, is IGNORE, too.
    """
    found, size = before.copy(), before.shape
    colours = np.array([colour for _, colour in brush[:-1]], np.int64)
    for layer in layers:
        layer = of_size(layer, size)
        distance = abs(layer[..., None, :3].astype(np.int64) - colours).max(axis=-1)
        nearest, touched = distance.argmin(axis=-1), layer[..., 3] > 0
        clear = (layer[..., 3] >= SURE) & (distance.min(axis=-1) <= NEAR)
        found[touched] = np.where(clear, nearest, IGNORE)[touched]
    return found


def mask_values(
    classes: NDArray[np.uint8], table: ClassTable, ignore: Value, *, instances: bool
) -> Array:
    """The mask (H, W[, 3]) of painted classes, with the values of the training masks.

    Of a model of numbered objects each patch of cell is one.
    """
    if not instances:
        return table.ignoring(ignore).decode(classes)
    numbers = np.asarray(ndimage.label(classes == CELL)[0], np.uint16)
    return np.where(classes == IGNORE, np.uint16(ignore), numbers)  # type: ignore[arg-type]


def free_value(segmenter: Segmenter) -> Value:
    """A mask value for pixels without a label: the model's, or one that no class has."""
    table = segmenter.table
    if segmenter.instances:
        return 65535
    if table.ignore_value is not None:
        return table.ignore_value
    choices: list[Value] = [255, *range(255)]
    if isinstance(table.values[0], tuple):
        choices = [(v, v, v) for v in (224, *range(255))]
    return next(value for value in choices if value not in table.values)


def judges(page: Page, known: Known) -> list[Pair]:
    """The labelled images for scoring: those of --held-out, or those that the model's run held out.

    Raises:
        InputError: there are none.
    """
    if page.held_out is not None:
        return find_pairs(page.held_out)
    config = known.path.parent / "config.yaml"
    if not config.is_file():
        raise InputError(
            f"there is nothing to compare the old and the new model on: {known.name} is in no run "
            "folder; start the page with --held-out and a folder of labelled images"
        )
    run = SegmentationOptions(**load_config(SegmentationOptions, config))
    pairs = find_data(run)
    if not split_pairs(pairs, run.val, run.fold, run.val_names or None)[1]:
        raise InputError(
            f"the run of {known.name} held nothing out: start the page with --held-out and a "
            "folder of labelled images"
        )
    return held_out(pairs, [run])


def write_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Images and masks as files of a folder that `unet train-seg` reads."""
    for i, pair in enumerate(pairs):
        write_example(folder, f"{i:04d}", pair.read_image(), pair.read_mask(), pair.palette)


def score(folder: Path, held: Path, ignore: Value | None) -> tuple[str, float]:
    """The name and the figure of a model on held-out images, at its own threshold."""
    models, table, threshold = load_models([folder])
    data = labelled_data(models, find_pairs(held), table, ignore)
    cells = known_cells(models, data)
    found = evaluate(
        Predictor(models), data, data.val, threshold=threshold, thresholds=(), cells=cells
    ).scores()
    key = next(key for key in SCORES if key in found)
    return SCORES[key], found[key]


def canvas(image: RGB) -> RGB:
    """The image to be painted on, enlarged by a whole number where it is small."""
    factor = max(1, CANVAS // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def save_lesson(page: Page, lesson: Lesson | None, known: Known, sheets: Sequence[Sheet]) -> Lesson:
    """Writes the images of the sheets, with what is painted, into the folder of the lesson.

    It is made the first time, and holds no image on which everything painted was undone.
    """
    if lesson is None or lesson.base != base_of(known.name):
        pairs = judges(page, known)
        place = page.folder / "lessons"
        place.mkdir(parents=True, exist_ok=True)
        number = 1 + len(list(place.iterdir()))
        folder = place / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
        lesson = Lesson(folder, free_value(sheets[0].segmenter), base_of(known.name))
        write_pairs(pairs, folder / "held-out")
    names: list[str] = []
    for sheet in sheets:
        image, of = sheet.image, sheet.segmenter
        name, number = image.name, 1
        while name in names:  # two files of one name
            number += 1
            name = f"{image.name}-{number}"
        names.append(name)
        pixels = read_image(image.path, image.page, sheet.done.predictor.reading)
        values = mask_values(sheet.classes, of.table, lesson.ignore, instances=of.instances)
        write_example(lesson.folder / "labelled", name, pixels, values)
    for file in (lesson.folder / "labelled").glob("*/*"):
        if file.stem not in names:
            file.unlink()
    return lesson


def base_of(name: str) -> str:
    """The name of the model that a model started from; its own name if there is none."""
    return name.partition(" + ")[0]


def check_teachable(segmenter: Segmenter) -> None:
    """Refuses a model that strokes on single images cannot train, as each stroke has one class."""
    what = ""
    if segmenter.of_regions:
        what = "knows regions that overlap"
    elif segmenter.slices > 1:
        what = f"takes {segmenter.slices} neighbouring slices together"
    if what:
        raise InputError(
            f"this model {what}, which strokes on single images cannot teach: train it on by unet "
            "train-seg --init"
        )


def curve(run: Path) -> pd.DataFrame:
    """The losses of a run so far, for a plot: step, loss, of which images."""
    file = run / "metrics.jsonl"
    log = read_log(file) if file.exists() else []
    names = {"loss": "training", "val_loss": "held out"}
    rows = [(e["step"], float(e[k]), n) for e in log for k, n in names.items() if k in e]
    return pd.DataFrame(rows, columns=["step", "loss", "images"])


def tab(page: Page, current: gr.State, model: gr.Dropdown) -> None:
    """Builds the tab; `current` holds what was labelled in the tab before, `model` is chosen."""
    lesson, sheet, sheets, better = gr.State(None), gr.State(None), gr.State({}), gr.State(None)
    gr.Markdown(
        "Paint over what is wrong, in the colour of the right class. Unpainted pixels and *don't "
        "know* are ignored. What you painted on other images, or before you showed this one "
        "again, still counts."
    )
    with gr.Row():
        shown = gr.Dropdown([], label="Image", interactive=True, elem_id="learn-image", scale=2)
        see = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the prediction", scale=2)
        take = gr.Button("Show the image", elem_id="learn-show", scale=1)
    legend = gr.HTML()
    editor = gr.ImageEditor(
        label="Brush",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        image_mode="RGBA",
        height=760,
        elem_id="editor",
        buttons=["fullscreen"],
        brush=gr.Brush(default_size=12, colors=["#00dce6"], color_mode="fixed"),
    )
    with gr.Row():
        minutes = gr.Slider(0.1, 60, 2, step=0.1, label="Minutes", elem_id="learn-minutes", scale=3)
        learn = gr.Button("Learn from this", variant="primary", elem_id="learn", scale=1)
        stop = gr.Button("Stop", elem_id="learn-stop", scale=1)
    verdict = gr.Markdown(elem_id="verdict")
    plot = gr.LinePlot(x="step", y="loss", color="images", height=260)

    @sentences
    def begin(
        done: Labelled | None,
        name: str,
        opacity: float,
        before: Sheet | None,
        drawn: dict[str, Any] | None,
        kept: Sheets,
    ) -> Any:
        image = chosen(done, name) or (done.images[0] if done and done.images else None)
        if done is None or image is None:
            raise InputError("label an image first: drop it into the tab Label")
        segmenter = done.predictor.segmenter
        check_teachable(segmenter)
        kept = put_by(kept, before, drawn)
        seen = picture(done, image, "overlay", opacity)
        new = Sheet(done, image, np.full(seen.shape[:2], IGNORE, np.uint8), seen)
        if old := kept.get(new.key):
            new = replace(new, classes=old.classes)
        colours = palette(segmenter.table)
        codes = [f"rgb({r}, {g}, {b})" for _, (r, g, b) in colours]
        for i, (_, colour) in enumerate(colours[:-1]):
            new.picture[new.classes == i] = colour
        value = canvas(new.picture)
        brush = gr.Brush(12, colors=codes, default_color=codes[0], color_mode="fixed")
        names = [one.name for one in done.images]
        return (
            new,
            kept,
            gr.update(choices=names, value=image.name),
            swatches(colours),
            gr.update(
                value={"background": value, "layers": [], "composite": None},
                brush=brush,
                canvas_size=value.shape[1::-1],
            ),
        )

    @sentences
    def study(
        shown: Sheet | None,
        chosen: str | None,
        drawn: dict[str, Any] | None,
        kept: Sheets,
        before: Lesson | None,
        length: float,
        request: gr.Request,
    ) -> Iterator[Any]:
        if shown is None:
            raise InputError("show an image first, and paint on it")
        page.check_free()
        page.learner = request.session_hash
        base = base_of(shown.done.model)
        # The model that is chosen learns, which may have learnt since the sheet was shown.
        name = chosen if chosen and base_of(chosen) == base else shown.done.model
        segmenter, known = shown.segmenter, page.known(name, SEGMENTATION)
        painted_on = put_by(kept, shown, drawn).values()
        mine = [one for one in painted_on if base_of(one.done.model) == base]
        count = sum(int((one.classes != IGNORE).sum()) for one in mine)
        if not count:
            raise InputError(
                "nothing is painted yet: choose the brush, and paint over what is wrong"
            )
        lesson = save_lesson(page, before, known, mine)
        lesson = replace(lesson, runs=lesson.runs + 1)
        run, held = lesson.folder / f"run-{lesson.runs}", lesson.folder / "held-out"
        of = mine[0].image.name if len(mine) == 1 else counted(len(mine), "image")
        said = f"{known.name} learns from {counted(count, 'painted pixel')} of {of}"
        yield lesson, f"{said}: scoring the model as it is", curve(run), None
        figure, old = score(known.path, held, segmenter.table.ignore_value)
        if page.learner != request.session_hash:
            raise InputError("it was stopped before it began: what is painted stays")
        command = page.started(
            request.session_hash, run, *command_line(known, lesson, run, length, shown)
        )
        end = time.monotonic() + 60 * length
        while command.running:
            left = max(0, end - time.monotonic())
            text = f"{said}: {figure} {old:.3f} on held-out images so far; {left:.0f} s left"
            yield lesson, text, curve(run), None
            time.sleep(1)
        command.check()
        if not (run / "model").is_dir():
            raise InputError("it was stopped before its first evaluation: the old model is kept")
        _, new = score(run / "model", held, segmenter.table.ignore_value)
        what = f"{figure} on {counted(len(find_pairs(held)), 'held-out image')}"
        place = run.relative_to(page.folder)
        if not new > old:
            text = (
                f"**kept the old model**: {what} is {old:.3f} with it, {new:.3f} with the new one"
            )
            yield lesson, f"{text}, which is in {place}", curve(run), None
            return
        name = f"{lesson.base} + {lesson.folder.name.rpartition('-')[2]}.{lesson.runs}"
        reading = known.reading or shown.done.predictor.reading
        page.models[name] = Known(name, run / "model", SEGMENTATION, reading)
        text = f"**{name} is better**: {what} rose from {old:.3f} to {new:.3f}"
        yield lesson, f"{text}; the run is {place}", curve(run), (known.name, name)

    def adopt(chosen: str, found: tuple[str, str] | None) -> Any:
        if found is None:
            return gr.skip()
        old, new = found
        listed = page.names(SEGMENTATION)
        # Whoever has chosen another model while this one learnt keeps it.
        return gr.update(choices=listed, **({"value": new} if chosen == old else {}))

    work: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
    locked = [shown, take]
    # A list is chosen from by `select`: its `input` comes again when it loses the focus.
    for asked in (take.click, shown.select):
        asked(**interactive(locked, False))
    begun = gr.on(
        [take.click, shown.select],
        begin,
        [current, shown, see, sheet, editor, sheets],
        [sheet, sheets, shown, legend, editor],
        show_progress_on=editor,
        **work,
    )
    for ended in (begun.success, begun.failure):
        ended(**interactive(locked, True))
    learn.click(
        study,
        [sheet, model, editor, sheets, lesson, minutes],
        [lesson, verdict, plot, better],
        show_progress="minimal",
        concurrency_id="training",
        **work,
    ).success(adopt, [model, better], model, api_visibility="private")

    def halt(request: gr.Request) -> None:
        page.ended(request.session_hash)

    stop.click(halt, None, None, api_visibility="private")


def command_line(
    known: Known, lesson: Lesson, run: Path, minutes: float, sheet: Sheet
) -> list[object]:
    """The command that learns from a lesson, which can be repeated in a terminal."""
    table, instances = sheet.segmenter.table, sheet.segmenter.instances
    value = lesson.ignore if isinstance(lesson.ignore, tuple) else (lesson.ignore,)
    words: list[object] = ["train-seg", "--data", lesson.folder / "labelled"]
    words += ["--val-data", lesson.folder / "held-out", "--ignore-value", *value]
    words += ["--init", known.path, "--out", run, "--max-minutes", minutes]
    nodata = sheet.done.predictor.reading.nodata
    words += [] if nodata is None else ["--nodata", nodata]
    if instances:
        return [*words, "--instances"]
    if table.names and table.values in ((*range(len(table.values)),), (0, 255)):
        words += ["--class-names", *table.names]
    return words
