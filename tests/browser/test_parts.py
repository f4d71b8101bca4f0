"""The parts of the page that need no browser, but Gradio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("gradio", reason="pip install -e '.[app]'")

from segmentation import load
from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.instances import INSTANCE_NAMES
from segmentation.data.pairs import find_pairs
from segmentation.options import SegmentationOptions
from segmentation.pictures import overlay, overlay_legend
from tests.segmentation.test_segmenter import saved
from unet.errors import InputError
from unet.files.images import read_image, read_mask, write_image
from unet.training.cli import parse
from unet_diffusion.interactive import write_example
from unet_diffusion.page import shared
from unet_diffusion.page.label import Labelled, found_slices, picture, zoomed
from unet_diffusion.page.learn import (
    Sheet,
    canvas,
    check_teachable,
    command_line,
    mask_values,
    painted,
    palette,
    put_by,
    save_lesson,
)
from unet_diffusion.page.runs import command_of, find_runs
from unet_diffusion.page.shared import Page, _without_folders, known_model

pytestmark = pytest.mark.browser


def table(count: int, **more: object) -> ClassTable:
    shares = tuple((i + 1) / sum(range(count + 1)) for i in range(count))
    return ClassTable(values=tuple(range(0, 3 * count, 3)), shares=shares, **more)


@pytest.mark.parametrize("count", [2, 3, 31])
def test_what_is_painted_in_a_class_s_colour_is_that_class(count: int) -> None:
    brush, rng = palette(table(count)), np.random.default_rng(0)
    assert len(brush) == count + 1
    assert len({colour for _, colour in brush}) == count + 1
    classes = rng.integers(0, count, (8, 9))
    layer = np.full((8, 9, 4), 255, np.uint8)
    layer[..., :3] = np.array([colour for _, colour in brush])[classes]
    layer[0, 0] = (*brush[-1][1], 255)  # don't know
    layer[1, 1, 3] = 90  # the soft edge of a stroke
    layer[2, 2] = (1, 60, 7, 255)  # where two strokes mix
    layer[3, 3] = 0  # not painted
    wanted = classes.copy()
    for i in range(4):
        wanted[i, i] = IGNORE
    blank = np.full((8, 9), IGNORE, np.uint8)
    assert (painted([layer], blank, brush) == wanted).all()
    enlarged = layer.repeat(5, axis=0).repeat(5, axis=1)
    assert (painted([enlarged], blank, brush) == wanted).all()
    wanted[3, 3] = 1  # what was painted before stays where nothing is painted
    assert (painted([layer], np.full_like(blank, 1), brush) == wanted).all()
    # What the model found is marked in the colours that the brush has.
    assert set(overlay_legend(table(count))) <= set(brush)
    shown = overlay(np.zeros((8, 9, 3), np.uint8), classes, table(count))
    assert shown.any()


def test_masks_that_number_objects_are_painted_as_patches() -> None:
    cells = ClassTable(values=(0, 1, 2), shares=(0.5, 0.4, 0.1), names=INSTANCE_NAMES)
    assert [name for name, _ in palette(cells)] == ["background", "cell", "don't know"]
    classes = np.full((5, 7), IGNORE, np.uint8)
    classes[:, 3], classes[1:3, :2], classes[1:3, 5:] = 0, 1, 1
    mask = mask_values(classes, cells, 65535, instances=True)
    assert np.unique(mask).tolist() == [0, 1, 2, 65535]
    assert ((mask == 65535) == (classes == IGNORE)).all()


def test_a_zoomed_picture_shows_the_pixels_of_its_box() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    for middle in ((0.5, 0.5), (0, 1), (0.9, 0.1)):
        shown, (top, left, high, wide) = zoomed(image, 4, middle)
        assert (high, wide) == (10, 15)
        factor = shown.shape[0] // high
        part = image[top : top + high, left : left + wide]
        assert (shown == part.repeat(factor, axis=0).repeat(factor, axis=1)).all()


def labelled(page: Page, model: str, *files: Path) -> Labelled:
    """What the tab Label makes of uploaded files."""
    done, wrong = found_slices(page, model, [str(file) for file in files])
    waiting, done.images = done.images, []
    for image in waiting:
        done.predict(image)
    assert len(wrong) == len(files) - len({file.stem for file in files})
    return done


def drawn_on(sheet: Sheet, *layers: np.ndarray) -> dict[str, Any]:
    """What the editor gives back: of other colours by a rounding, enlarged, and with an alpha."""
    levels = np.minimum(sheet.picture, 254) + np.uint8(1)
    background = np.dstack([levels, np.full_like(levels[..., 0], 255)])
    return {"background": canvas(background), "layers": [*layers], "composite": None}


def test_what_is_painted_on_each_image_is_learnt_from_until_it_is_taken_back(tmp_path) -> None:
    """Two uploads of one name are two images, and a sheet that is left keeps its strokes."""
    rng = np.random.default_rng(0)
    write_example(tmp_path / "held", "a", *(np.eye(32, dtype=np.uint8)[..., None],) * 2)
    saved(tmp_path / "cells/model", [0, 1], names=("ground", "cell"))
    known = known_model(tmp_path / "cells/model", "cells")
    page = Page(tmp_path / "page", {"cells": known}, tmp_path, held_out=tmp_path / "held")
    sheets: list[Sheet] = []
    strokes: list[np.ndarray] = []
    for i in range(2):
        write_image(tmp_path / f"upload-{i}/x.png", rng.integers(0, 255, (32, 48), np.uint8))
        done = labelled(page, "cells", tmp_path / f"upload-{i}/x.png")
        seen = picture(done, done.images[0], "overlay", 0.5)
        sheets.append(Sheet(done, done.images[0], np.full((32, 48), IGNORE, np.uint8), seen))
        strokes.append(np.zeros((32, 48, 4), np.uint8))
        strokes[i][4 * i : 4 * i + 3] = (*palette(sheets[i].segmenter.table)[i][1], 255)
    first, second = sheets
    kept = put_by({}, first, drawn_on(first, strokes[0]))
    # The second is shown, but the editor still holds the first, or its Undo has brought it back.
    kept = put_by(kept, second, drawn_on(first, strokes[0]))
    assert [*kept] == [first.key]
    with pytest.warns(UserWarning, match="not on the picture of x are ignored"):
        assert put_by({}, second, drawn_on(first, strokes[0])) == {}
    kept = put_by(kept, second, drawn_on(second, strokes[1]))
    lesson = save_lesson(page, None, known, [*kept.values()])
    pairs = {pair.name: pair for pair in find_pairs(lesson.folder / "labelled")}
    for i, pair in enumerate((pairs["x"], pairs["x-2"])):
        drawn = pair.read_mask()
        assert (drawn[4 * i : 4 * i + 3] == i).all()
        assert (drawn != 255).sum() == 3 * 48
        assert (pair.read_image() == read_image(tmp_path / f"upload-{i}/x.png")).all()
    _, *line = map(str, command_line(known, lesson, tmp_path / "run", 1, second))
    options = parse(SegmentationOptions, line)
    assert (options.class_names, options.ignore_value) == (("ground", "cell"), 255)
    kept = put_by(kept, second, drawn_on(second))  # the last strokes are rubbed out
    assert save_lesson(page, lesson, known, [*kept.values()]) == lesson
    assert [pair.name for pair in find_pairs(lesson.folder / "labelled")] == ["x"]


def test_a_model_of_neighbouring_slices_labels_stacks_and_is_not_taught_by_strokes(
    tmp_path,
) -> None:
    stack = np.random.default_rng(0).integers(0, 255, (4, 32, 48), np.uint8)
    np.save(tmp_path / "stack.npy", stack)
    scaled = {"mean": [128.0] * 3, "std": [40.0] * 3, "dtype": "uint8"}
    saved(tmp_path / "model", [0, 1], scaled, slices=3)
    page = Page(tmp_path, {"near": known_model(tmp_path / "model", "near")}, tmp_path)
    done = labelled(page, "near", tmp_path / "stack.npy")
    model = load(tmp_path / "model", device="cpu")
    for image, mask in zip(done.images, model(stack), strict=True):
        assert (read_mask(done.files()[done.images.index(image) * 4]) == mask).all()
    with pytest.raises(InputError, match="takes 3 neighbouring slices together"):
        check_teachable(done.predictor.segmenter)


def test_of_two_images_of_one_name_the_first_is_labelled(tmp_path: Path) -> None:
    page = Page(tmp_path, {"a": known_model(Path(saved(tmp_path / "a", [0, 1])), "a")}, tmp_path)
    for name in ("x.png", "x.tif"):
        write_image(tmp_path / name, np.zeros((32, 48), np.uint8))
    done = labelled(page, "a", tmp_path / "x.png", tmp_path / "x.tif")
    assert [image.path.name for image in done.images] == ["x.png"]


def test_runs_are_found_by_name_and_links_are_not_followed(tmp_path: Path) -> None:
    for name in ("runs/b10", "runs/b2", "runs/demo/seg", "outside/secret"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"border_weight": None}))
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside/secret")
    found = find_runs(tmp_path / "runs")
    assert list(found) == ["b2", "b10", "demo/seg"]
    assert command_of(found["b2"]) == "train-seg"


def test_a_model_is_chosen_by_its_name_alone(tmp_path: Path) -> None:
    page = Page(tmp_path, {}, tmp_path)
    for name in (str(tmp_path), "../x", None):
        with pytest.raises(ValueError, match="no model is chosen"):
            page.known(name, "segmentation")
    (tmp_path / "model.safetensors").touch()
    described = {"task": "classifier", "out_channels": 1, "unet": {}, "info": {}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="'classifier'"):
        known_model(tmp_path, "x")


def test_one_training_is_at_work_and_ends_with_its_tab_alone(tmp_path: Path, monkeypatch) -> None:
    class Work:
        running = True

        def __init__(self, *words: object) -> None: ...

        def stop(self) -> None:
            self.running = False

    monkeypatch.setattr(shared, "Command", Work)
    page = Page(tmp_path, {}, tmp_path)
    work = page.started("ours", tmp_path / "a")
    with pytest.raises(InputError, match="a is being trained: wait"):
        page.started("theirs", tmp_path / "b")
    for session, running in (("theirs", True), (None, True), ("ours", False)):
        page.ended(session)
        assert work.running == running
    work = page.started(None, tmp_path / "b")
    page.ended(None)
    assert work.running


def test_a_sentence_names_no_folder_of_the_server() -> None:
    text = "cannot read '/srv/lab/files/ab12/my.png': see https://gradio.app/docs, 1/2 of it"
    wanted = "cannot read 'my.png': see https://gradio.app/docs, 1/2 of it"
    assert _without_folders(text) == wanted
