"""The parts of the page that need no browser, but Gradio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("gradio", reason="pip install -e '.[app]'")

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.instances import INSTANCE_NAMES
from segmentation.pictures import overlay, overlay_legend
from unet.errors import InputError
from unet_diffusion.page import shared
from unet_diffusion.page.label import zoomed
from unet_diffusion.page.learn import mask_values, painted, palette
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
    assert (painted([layer], (8, 9), brush) == wanted).all()
    enlarged = layer.repeat(5, axis=0).repeat(5, axis=1)
    assert (painted([enlarged], (8, 9), brush) == wanted).all()
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
