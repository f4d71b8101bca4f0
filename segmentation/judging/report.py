"""The report of an evaluation: `report.png`, a run on one page, and files of scores and
pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.classes import IGNORE, class_names
from segmentation.data.dataset import SegmentationData
from segmentation.data.instances import UNKNOWN
from segmentation.judging.evaluation import Evaluation, ImageScores
from segmentation.pictures import (
    class_colours,
    class_legend,
    error_legend,
    errors,
    grey_or_rgb,
    object_colours,
)
from unet.files.pages import missing
from unet.files.pictures import RGB, Legend, fit_axis, marker_of, panel, shortened
from unet.files.writing import replacing, write_text
from unet.training.run import read_log
from unet.words import counted

if TYPE_CHECKING:  # it takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH = 13.0  # inches
DPI = 110
SIDE = 640  # pixels of a picture, at most
TRAINING, HELD_OUT = "#0072b2", "#d55e00"
TITLES = ("image", "mask", "prediction", "errors")
SHOWN = {
    "ap50": "AP 0.5",
    "ap": "mean AP",
    "pq": "PQ",
    "dice": "Dice",
    "iou": "IoU",
    "accuracy": "accuracy",
    "v_rand": "V_Rand",
    "v_info": "V_Info",
    "pixel_error": "pixel error (1 − F)",
}


def write_report(run: Path, evaluation: Evaluation, data: SegmentationData) -> Path:
    """Writes `report.png` into a run folder.

    Loss and learning rate come from the run's metrics.jsonl; best, median and worst image, by mean
    Dice or of objects by average precision, from the evaluation.

    Args:
        data: the data that the evaluation's images are from.

    Returns:
        The path of the picture.
    """
    log = read_log(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    figure = report_figure(run.resolve().name, log, evaluation, data)
    path = run / "report.png"
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name in another script
        figure.savefig(temporary, format="png")
    return path


def report_figure(
    title: str, log: Sequence[dict[str, Any]], evaluation: Evaluation, data: SegmentationData
) -> Figure:
    """The page, to save as a picture; `log` holds the entries of a metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = [shortened(name, 20) for name in class_names(evaluation.table)]
    shown = _best_median_worst(evaluation, "held-out" if data.val else "training")
    legend = class_legend(evaluation.table)
    columns = max(1, 150 // (max(len(name) for name, _ in legend) + 8))
    lines = math.ceil(len(legend) / columns)
    heights = [5.0, *(_height(image) for _, image in shown), 0.5 + 0.18 * lines]
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    top, *rows, bottom = parts[:, 0]
    _title(top, title, evaluation, "held-out" if data.val else "training")
    left, right = top.subfigures(1, 2, width_ratios=[1.7, 1])
    loss, rate = left.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    _curves(loss, rate, log)
    _confusion(right.subplots(), evaluation, names)
    for row, (rank, image) in zip(rows, shown, strict=True):
        _pictures(row, rank, image, data)
    _legend(bottom, legend, error_legend(evaluation.table), columns)
    return figure


def write_scores(
    folder: Path,
    evaluation: Evaluation,
    data: SegmentationData,
    *,
    pictures: int = 50,
    **facts: object,
) -> None:
    """Writes scores.json, scores.csv (an image a line), reliability.png and pictures/, the worst
    images first.

    Args:
        data: the data that the evaluation's images are from.
        pictures: how many images are shown: image, mask, prediction, error map.
        facts: JSON values to put before the scores, such as the models' names.
    """
    images, text = evaluation.worst_first(), io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", *images[0].scores])
    table.writerows([image.name, *image.scores.values()] for image in images)
    write_text(folder / "scores.csv", text.getvalue())
    for old in (folder / "pictures").glob("[0-9][0-9][0-9]*_*.png"):  # of an earlier evaluation
        old.unlink()
    legend = [*class_legend(evaluation.table), *error_legend(evaluation.table)]
    for rank, image in enumerate(images[:pictures], 1):
        with replacing(folder / "pictures" / f"{rank:03d}_{image.name}.png") as temporary:
            picture = panel([picture_row(data, image)], titles=TITLES, legend=legend)
            picture.save(temporary, format="png")
    if evaluation.calibration.scores():
        with replacing(folder / "reliability.png") as temporary:
            reliability_figure(evaluation).savefig(temporary, format="png")
    else:
        (folder / "reliability.png").unlink(missing_ok=True)
    # Last, so that where it is all of it is.
    content = {**facts, **evaluation.to_dict()}
    write_text(folder / "scores.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def reliability_figure(evaluation: Evaluation) -> Figure:
    """A reliability diagram: the observed share for each probability, and the number of pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    calibration, scores = evaluation.calibration, evaluation.calibration.scores()
    bins = calibration.bins()
    predicted, observed = ([one[key] for one in bins] for key in ("predicted", "observed"))
    above.plot([0, 1], [0, 1], color="#888888", lw=1, label="ideal")
    above.plot(predicted, observed, "o-", color=TRAINING, label="found")
    name = shortened(class_names(evaluation.table)[1], 40)
    what = f"pixels that are {name}" if evaluation.has_threshold else "pixels that are right"
    above.set_ylabel(f"share of {what}", parse_math=False)
    title = f"calibration error {scores['ece']:.4f}   Brier score {scores['brier']:.4f}"
    above.set_title(title, fontsize=12)
    above.legend(frameon=False)
    count = len(calibration.counts)
    middles = (np.arange(count) + 0.5) / count
    below.bar(middles, calibration.counts, width=0.9 / count, color=TRAINING)
    below.set_yscale("log")
    below.set_ylabel("pixels")
    of = name if evaluation.has_threshold else "the most probable class"
    below.set_xlabel(f"probability of {of}", parse_math=False)
    for axes in (above, below):
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.25)
    return figure


def picture_row(
    data: SegmentationData, image: ImageScores, largest: int | None = None
) -> tuple[RGB, RGB, RGB, RGB]:
    """Image, mask, prediction and error map, each (H, W, 3), of an evaluated image.

    Where masks number objects, mask and prediction show these, each in another colour than its
    neighbours.

    Args:
        largest: pixels a side to which they are scaled down, at most.
    """
    pair, mask, table = data.pairs[image.index], data.load(image.index)[1], data.table
    if data.regions:
        mask, table = data.regions.true_map(mask), data.regions.table
    count = len(table.values)
    shown, nodata = pair.read_shown(), data.nodata(image.index)
    grey, unknown = grey_or_rgb(shown, nodata), missing(shown, nodata)
    found = np.where(unknown, np.uint8(IGNORE), image.prediction)
    objects = None if image.objects is None else np.where(unknown, UNKNOWN, image.objects)
    if objects is None:
        true, predicted = class_colours(mask, count), class_colours(found, count)
    else:
        true, predicted = object_colours(data.objects(image.index)), object_colours(objects)
    return (
        _reduced(grey, largest),
        _reduced(true, largest),
        _reduced(predicted, largest),
        _reduced(errors(grey, found, mask, count), largest),
    )


def _reduced(picture: RGB, largest: int | None) -> RGB:
    if largest is None or max(picture.shape[:2]) <= largest:
        return picture
    small = Image.fromarray(picture)
    small.thumbnail((largest, largest), Image.Resampling.BOX)
    return np.asarray(small)


def _best_median_worst(evaluation: Evaluation, kind: str) -> list[tuple[str, ImageScores]]:
    ranked = evaluation.worst_first()[::-1]
    key = evaluation.ranked_by
    ranked.sort(key=lambda image: math.isnan(image.scores[key]))  # nothing to see there
    if len(ranked) == 1:
        return [(f"{kind} image", ranked[0])]
    places = {"best": 0, "median": (len(ranked) - 1) // 2, "worst": len(ranked) - 1}
    if len(ranked) == 2:
        del places["median"]
    return [(name, ranked[place]) for name, place in places.items()] if ranked else []


def _height(image: ImageScores) -> float:
    """Inches of a row with that image."""
    h, w = image.shape
    return float(np.clip(h / w, 0.2, 1.3)) * WIDTH / 4 + 0.55


def _title(figure: SubFigure, name: str, evaluation: Evaluation, kind: str) -> None:
    found = evaluation.scores()
    figures = [f"{text} {found[key]:.4f}" for key, text in SHOWN.items() if key in found]
    facts = [counted(len(evaluation.images), f"{kind} image"), *figures]
    if evaluation.has_threshold:
        facts.append(f"threshold {evaluation.threshold:g}")
    text = f"{shortened(name, 80)}\n{'   '.join(facts)}"
    if never := evaluation.never_predicted():
        text += f"\nno pixel was predicted as {shortened(' or '.join(never), 80)}"
    figure.suptitle(text, fontsize=12, fontweight="bold", parse_math=False)


def _curves(loss: Axes, rate: Axes, log: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = _column(log, "loss")
    crowded = len(steps) > 60
    if len(steps):
        label = None if crowded else "training"
        loss.plot(
            steps,
            values,
            marker=marker_of(steps),
            color=TRAINING,
            alpha=0.3 if crowded else 1,
            lw=1,
            label=label,
        )
    if crowded:
        parts = [p.mean() for p in np.array_split(values, 50)]
        middles = [p.mean() for p in np.array_split(steps, 50)]
        loss.plot(middles, parts, color=TRAINING, lw=2, label="training")
    held_steps, held = _column(log, "val_loss")
    if len(held):
        loss.plot(held_steps, held, "o-", color=HELD_OUT, lw=2, ms=5, label="held out")
    kept = [(e["step"], e["val_loss"]) for e in log if e.get("kept") and "val_loss" in e][-1:]
    for step, value in kept:
        text = f"kept: {value:.4f} at step {step}"
        loss.plot(step, value, "o", color=HELD_OUT, ms=10, mfc="none", label=text)
    known = np.concatenate([values, held])
    known = known[np.isfinite(known)]
    if not known.size:
        loss.text(0.5, 0.5, "no losses were logged", ha="center", transform=loss.transAxes)
        loss.set_yticks([])
        rate.set_yticks([])
    else:
        loss.legend(frameon=False, fontsize=10)
        loss.margins(x=0.02)
        fit_axis(loss, known)
    loss.set_title("loss", fontsize=12)
    loss.grid(alpha=0.25)
    steps, values = _column(log, "lr")
    if len(steps):
        rate.plot(steps, values, marker=marker_of(steps), color="#444444", lw=1.5)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    rate.yaxis.set_major_formatter("{x:g}")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.grid(alpha=0.25)


def _column(log: Sequence[dict[str, Any]], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and values of the entries that have the key."""
    entries = [(entry["step"], float(entry[key])) for entry in log if key in entry]
    steps, values = zip(*entries, strict=True) if entries else ((), ())
    return np.array(steps), np.array(values, np.float64)


def _confusion(axes: Axes, evaluation: Evaluation, names: Sequence[str]) -> None:
    counts = evaluation.confusion.counts
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    n = len(names)
    size = float(np.clip(72 / n, 5, 13))
    if n <= 20:
        for i, j in np.ndindex(n, n):
            if n <= 6 or shares[i, j] >= 0.5:
                text = f"{shares[i, j]:.1f} %" if n <= 4 else f"{shares[i, j]:.0f}"
                color = "white" if shares[i, j] > 60 else "#222222"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=size)
    long = n * max(map(len, names)) > 30  # letters beside each other
    label_size = float(np.clip(72 / n, 7 if n <= 20 else 5, 11))
    axes.set_xticks(range(n), names, rotation=90 if long else 0, fontsize=label_size)
    axes.set_yticks(range(n), names, fontsize=label_size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("confusion: % of each true class", fontsize=12)


def _pictures(figure: SubFigure, rank: str, image: ImageScores, data: SegmentationData) -> None:
    figures = [f"{text} {image.scores[k]:.4f}" for k, text in SHOWN.items() if k in image.scores]
    title = f"{rank}: {shortened(image.name, 40)}     {'   '.join(figures)}"
    figure.suptitle(title, fontsize=11, x=0.012, ha="left", parse_math=False)
    axes = figure.subplots(1, 4)
    for plot, title, picture in zip(axes, TITLES, picture_row(data, image, SIDE), strict=True):
        plot.imshow(picture)
        plot.set_title(title, fontsize=10)
        plot.set_xticks([])
        plot.set_yticks([])


def _legend(figure: SubFigure, classes: Legend, wrong: Legend, columns: int) -> None:
    """What the colours of masks and error maps mean."""
    from matplotlib.patches import Patch

    def patches(legend: Legend) -> list[Patch]:
        return [Patch(fc=np.array(c) / 255, ec="#888888", label=name) for name, c in legend]

    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 1.2}
    figure.legend(handles=patches(wrong), loc="upper right", ncols=2, **style)
    figure.legend(handles=patches(classes), loc="lower right", ncols=columns, **style)
