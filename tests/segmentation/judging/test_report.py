"""The report of a run: readable for any classes, images and logs, and showing the right images."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from segmentation.data.dataset import SegmentationData
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import Pair
from segmentation.judging.evaluation import Evaluation
from segmentation.judging.report import picture_row, report_figure, write_report, write_scores
from segmentation.pictures import GREY, class_colours
from tests.forks import run_forked
from unet.files.pages import ImageInfo


def evaluation_of(
    classes: int,
    count: int,
    *,
    dtype: str = "uint8",
    channels: int = 1,
    size: tuple[int, int] = (24, 32),
    colours: bool = False,
    name: str = "image",
) -> tuple[Evaluation, SegmentationData]:
    """Images of noise; of image i each pixel is wrong with probability i / (count + 1)."""
    rng = np.random.default_rng(0)
    values = np.arange(classes) * (255 // classes)
    table = np.stack([values, values[::-1], values], 1) if colours else values
    info = ImageInfo(height=size[0], width=size[1], channels=channels, dtype=dtype)
    pairs, found, masks = [], [], []
    for i in range(count):
        mask = rng.integers(0, classes, size)
        mask[0, :classes] = range(classes)
        masks.append(mask)
        image = (rng.random((*size, channels)) * (1 if dtype == "float32" else 255)).astype(dtype)
        stored = table[mask].astype(np.uint8)
        pairs.append(Pair(name=f"{name} {i}", image=image, mask=stored, info=info))
        other = np.where(rng.random(size) < i / (count + 1), (mask + 1) % classes, mask)
        found.append(np.stack([other == k for k in range(classes)]).astype(np.float32))
    normalisation = Normalisation((0.0,) * channels, (1.0,) * channels, dtype)
    data = SegmentationData((), pairs, normalisation=normalisation)
    evaluation = Evaluation(data.table, thresholds=())
    for i, pair in enumerate(pairs):
        p = found[i][1:] if classes == 2 else found[i]
        evaluation.add(i, pair.name, p, data.load(i)[1])
    return evaluation, data


def log_of(steps: int, evaluations: int = 3, loss: float = 1.0) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        entries.append({"step": step, "loss": loss * 30 / step, "lr": 1e-3 * (1 - step / steps)})
    for k in range(1, evaluations + 1):
        held_out = {"val_loss": loss / k, "val_dice": 0.5, "kept": k % 2 == 1}
        entries.append({"step": k * steps // evaluations, **held_out})
    return entries


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn, wherever it lies."""
    drawn: list[Text] = []
    figure.set_layout_engine("none")  # which takes longer than all else
    with mock.patch.object(Text, "draw", lambda text, renderer: drawn.append(text)):
        figure.draw_without_rendering()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def check_layout(figure: Figure) -> None:
    """All text is inside of the page, and no two texts lie on each other."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    page, seen = figure.bbox, []
    for text in texts_of(figure):
        box = text.get_window_extent()
        assert box.x0 >= page.x0 - 1, text
        assert box.x1 <= page.x1 + 1, text
        assert box.y0 >= page.y0 - 1, text
        assert box.y1 <= page.y1 + 1, text
        for other, there in seen:
            apart = (
                box.x1 <= there.x0 + 1
                or there.x1 <= box.x0 + 1
                or box.y1 <= there.y0 + 1
                or there.y1 <= box.y0 + 1
            )
            assert apart, (text, other)
        seen.append((text, box))


@pytest.mark.parametrize(
    ("evaluation", "log"),
    [
        ({"classes": 2, "count": 1}, log_of(10, 1)),
        ({"classes": 2, "count": 2, "dtype": "uint16", "size": (12, 90)}, log_of(5000, 20)),
        ({"classes": 3, "count": 3, "dtype": "float32", "size": (90, 20)}, []),
        ({"classes": 4, "count": 3, "colours": True, "channels": 3}, log_of(300, 0)),
        ({"classes": 12, "count": 100, "name": "a name much too long for " * 9}, log_of(90)),
        ({"classes": 32, "count": 2, "size": (48, 64), "colours": True}, log_of(90, 3, 1e-6)),
    ],
)
def test_nothing_overlaps(evaluation, log):
    check_layout(report_figure("runs $a$", log, *evaluation_of(**evaluation)))


@pytest.mark.parametrize("count", [2, 3, 12, 32])
def test_long_names_overlap_nothing(count):
    evaluation, data = evaluation_of(count, 2, size=(40, 50))
    names = tuple(f"class {i} with a name that is much longer than a label" for i in range(count))
    evaluation.table = data.table = replace(data.table, names=names)
    figure = report_figure("run", log_of(90), evaluation, data)
    check_layout(figure)
    legends = [t for t in texts_of(figure) if t.get_text().startswith("class 1 ")]
    assert len(legends) >= 3  # on two axes, and beside the colour


def test_a_text_on_another_would_be_found():
    figure = Figure()
    figure.text(0.5, 0.5, "this")
    figure.text(0.51, 0.5, "that")
    with pytest.raises(AssertionError):
        check_layout(figure)


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (1, {"held-out image": 0}),
        (2, {"best": 0, "worst": 1}),
        (5, {"best": 0, "median": 2, "worst": 4}),
        (6, {"best": 0, "median": 2, "worst": 5}),
    ],
)
def test_best_median_and_worst_are_shown(count, named):
    evaluation, data = evaluation_of(2, count)
    figure = report_figure("run", [], evaluation, data)
    rows = [t.get_text() for t in texts_of(figure) if ": image " in t.get_text()]
    found = [row.split("     ")[0] for row in rows]
    assert found == [f"{rank}: image {i}" for rank, i in named.items()]
    titles = ("image", "mask", "prediction", "errors")
    pictures = [a.images[0].get_array() for a in figure.axes if a.get_title() in titles]
    expected = [p for i in named.values() for p in picture_row(data, evaluation.images[i])]
    assert len(pictures) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, expected, strict=True))


def test_curves_are_those_of_the_log():
    log = [*log_of(100, 4), {"step": 100, "val_loss": float("nan")}]
    figure = report_figure("run", log, *evaluation_of(2, 1))
    loss, rate = (axes for axes in figure.axes if axes.get_lines())
    lines = {line.get_label(): line.get_xydata() for line in loss.get_lines()}
    assert lines["training"].tolist() == [[e["step"], e["loss"]] for e in log if "loss" in e]
    held = [[e["step"], e["val_loss"]] for e in log if "val_loss" in e]
    np.testing.assert_array_equal(lines["held out"], held)
    assert lines["kept: 0.3333 at step 75"].tolist() == [[75, 1 / 3]]
    assert rate.get_lines()[0].get_ydata().tolist() == [e["lr"] for e in log if "lr" in e]


def test_a_single_logged_loss_is_a_dot_as_a_line_has_no_length():
    for steps, marker in ((10, "."), (20, "")):
        figure = report_figure("run", log_of(steps), *evaluation_of(2, 1))
        loss, rate = (axes for axes in figure.axes if axes.get_lines())
        lines = {line.get_label(): line for line in loss.get_lines()}
        assert lines["training"].get_marker() == marker
        assert rate.get_lines()[0].get_marker() == marker


def test_confusion_shows_shares_of_the_true_classes():
    evaluation, data = evaluation_of(3, 2)
    counts = evaluation.confusion.counts
    figure = report_figure("run", [], evaluation, data)
    shown = [t.get_text() for t in texts_of(figure)]
    for share in (100 * counts / counts.sum(1, keepdims=True)).ravel():
        assert f"{share:.1f} %" in shown


def test_the_report_is_a_picture_in_the_run_folder(tmp_path):
    evaluation, data = evaluation_of(2, 3, name="细胞")  # no font at hand need have it
    log = "".join(json.dumps(e) + "\n" for e in log_of(50)) + '{"step": 6'  # cut by a kill
    (tmp_path / "metrics.jsonl").write_text(log)
    assert write_report(tmp_path, evaluation, data) == tmp_path / "report.png"
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "report.png"}


def test_pictures_mark_what_is_wrong():
    evaluation, data = evaluation_of(3, 3, channels=3)
    image = evaluation.images[2]
    picture, mask, prediction, errors = picture_row(data, image)
    target = data.load(2)[1]
    assert np.array_equal(picture, data.pairs[2].image)
    assert np.array_equal(mask, class_colours(target, 3))
    assert np.array_equal(prediction, class_colours(image.prediction, 3))
    coloured = errors.max(2) != errors.min(2)
    assert np.array_equal(coloured, image.prediction != target)
    assert len(np.unique(errors[coloured], axis=0)) == 1  # three classes have no order
    shown = [t.get_text() for t in texts_of(report_figure("", [], evaluation, data))]
    assert "error: another class" in shown
    assert not any(word in text for text in shown for word in ("above", "below", "threshold"))
    assert [p.shape for p in picture_row(data, image, 16)] == [(12, 16, 3)] * 4


def test_pictures_show_where_nothing_was_measured() -> None:
    """The image black and as bright as without it, the prediction grey: nothing was found there."""
    evaluation, data = evaluation_of(3, 1, dtype="uint16", channels=2)
    image, pair = evaluation.images[0], data.pairs[0]
    whole = picture_row(data, image)
    hole = np.zeros(image.prediction.shape, bool)
    hole[:8] = True
    stored = np.where(hole[..., None], np.uint16(60000), pair.read_image())
    stored[8:16] = pair.read_image()[:8]  # the same values as before, but for those of the hole
    data.pairs[0] = replace(pair, image=stored, info=replace(pair.info, nodata=60000))
    picture, _, prediction, _ = picture_row(data, image)
    assert (picture[hole] == 0).all()
    assert picture[~hole].max() == whole[0].max()
    assert (prediction[hole] == GREY).all()
    assert np.array_equal(prediction[~hole], whole[2][~hole])


def test_scores_as_files(tmp_path):
    evaluation, data = evaluation_of(2, 4)
    write_scores(tmp_path, evaluation, data, pictures=4)
    write_scores(tmp_path, evaluation, data, pictures=2, model="m")
    names = [p.name for p in sorted((tmp_path / "pictures").iterdir())]
    assert names == ["001_image 3.png", "002_image 2.png"]
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert facts == {"model": "m", **evaluation.to_dict()}
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["image 3", "image 2", "image 1", "image 0"]
    assert [float(row["dice"]) for row in rows] == [i["dice"] for i in facts["per_image"]]


def test_ignored_pixels_are_in_the_legend_where_there_are_some():
    evaluation, data = evaluation_of(3, 1)
    shown = [t.get_text() for t in texts_of(report_figure("", [], evaluation, data))]
    assert "ignored" not in shown
    data = SegmentationData((), data.pairs, ignore_value=0, normalisation=data.normalisation)
    evaluation = Evaluation(data.table)
    evaluation.add(0, "image", np.zeros((1, 24, 32), np.float32), data.load(0)[1])
    figure = report_figure("", [], evaluation, data)
    check_layout(figure)
    assert "ignored" in [t.get_text() for t in texts_of(figure)]


def test_matplotlib_is_imported_when_a_report_is_drawn(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, segmentation.judging.report; assert 'matplotlib' not in sys.modules"
    )
    assert run_forked(script).returncode == 0


def test_the_report_names_a_class_that_is_never_predicted():
    evaluation, data = evaluation_of(3, 2)
    said = "no pixel was predicted as"
    assert not any(said in t.get_text() for t in texts_of(report_figure("", [], evaluation, data)))
    found = Evaluation(data.table)
    for i in range(2):
        only = np.zeros((3, *data.load(i)[1].shape), np.float32)
        only[0] = 1
        found.add(i, str(i), only, data.load(i)[1])
    shown = [t.get_text() for t in texts_of(report_figure("", [], found, data))]
    assert any(f"{said} 85 or 170" in text for text in shown)
