"""The plugin of napari in a viewer without a screen: its manifest, both widgets, what they refuse.

Run where napari is: pip install -e '.[napari]' pyqt6 pytest-qt, and QT_QPA_PLATFORM=offscreen or an
X server such as Xvfb.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("napari", reason="pip install -e '.[napari]' pyqt6 pytest-qt")
pytest.importorskip("pytestqt", reason="pip install pytest-qt")

import npe2
from napari.layers import Image

from segmentation import load
from segmentation.data.instances import INSTANCE_NAMES
from segmentation.data.pairs import find_pairs
from tests.segmentation.test_segmenter import COLOURS, GREY, saved
from unet.errors import InputError, RunError
from unet_diffusion.napari import layers
from unet_diffusion.napari import learn as learn_module
from unet_diffusion.napari import predict as predict_module
from unet_diffusion.napari.layers import PLUGIN, Planes
from unet_diffusion.napari.learn import LearnWidget, new_folders, write_data
from unet_diffusion.napari.predict import PredictWidget

# napari and Qt warn of their own affairs
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "unet_diffusion/napari/napari.yaml"
RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 256, (3, 40, 56), dtype=np.uint8)
RGB = {"mean": [128.0] * 3, "std": [40.0] * 3, "dtype": "uint8"}


@pytest.fixture
def errors(monkeypatch) -> list[str]:
    """The sentences that napari's notification is given."""
    found: list[str] = []
    monkeypatch.setattr(layers, "show_error", found.append)
    return found


@pytest.fixture
def manifest() -> npe2.PluginManifest:
    return npe2.PluginManifest.from_file(MANIFEST)


@pytest.fixture
def plugin(manifest) -> Iterator[None]:
    """The plugin as one that is installed."""
    manager = npe2.PluginManager.instance()
    known = PLUGIN in manager
    if not known:
        manager.register(manifest)
    yield
    if not known:
        manager.unregister(PLUGIN)


def click(button, qtbot) -> None:
    """Presses a button, and waits for the end of what it starts."""
    button.changed.emit(True)
    qtbot.waitUntil(lambda: button.enabled, timeout=240_000)


def test_the_manifest_is_valid_and_names_widgets(manifest) -> None:
    manifest.validate_imports()
    commands = {c.id: c.python_name for c in manifest.contributions.commands}
    widgets = [commands[widget.command] for widget in manifest.contributions.widgets]
    assert [name.rpartition(":")[2] for name in widgets] == ["PredictWidget", "LearnWidget"]
    assert not manifest.contributions.readers
    assert manifest.name == PLUGIN


@pytest.mark.parametrize(
    ("values", "names", "image", "channels_first"),
    [
        ([0, 255], (), STACK[0], False),
        ([7, 300], (), STACK[None], False),
        ([0, 1, 2], INSTANCE_NAMES, STACK, False),
        ([0, 1, 2], (), STACK, True),
        (COLOURS, (), np.moveaxis(STACK, 0, -1), False),
    ],
    ids=["grey", "stack of stacks", "instances", "channels", "RGB and colours"],
)
def test_masks_are_those_of_a_call(
    make_napari_viewer, qtbot, errors, tmp_path, values, names, image, channels_first
) -> None:
    colour = image.shape[-1] == 3
    three = colour or channels_first
    folder = saved(tmp_path / "model", values, RGB if three else GREY, names)
    viewer = make_napari_viewer()
    layer = viewer.add_image(image, name="x", rgb=colour, scale=[2.0] * (image.ndim - colour))
    widget = PredictWidget(viewer)
    viewer.window.add_dock_widget(widget)
    assert widget.image.value is layer
    widget.model.value, widget.channels.value = folder, channels_first
    click(widget.start, qtbot)
    assert errors == []

    model = load(folder, device="cpu")
    given = np.moveaxis(image, 0, -1) if channels_first else image
    batch = given[0] if image.ndim == 4 else given
    mask = model.labels(batch) if names else model(batch)
    if mask.shape[-1] == 3:
        mask = (mask[..., None, :] == np.array(COLOURS)).all(-1).argmax(-1)
    probability = model.probability(batch)
    if len(values) > 2:
        probability = probability.max(axis=-1)
    shape = image.shape[:-1] if colour else image.shape[channels_first:]
    found = viewer.layers["x objects" if names else "x mask"]
    assert np.array_equal(found.data, mask.reshape(shape))
    assert len(np.unique(found.data)) > 1
    assert np.array_equal(viewer.layers["x probability"].data, probability.reshape(shape))
    assert np.array_equal(found.scale, [2.0] * len(shape))


def test_of_neighbouring_slices_each_is_predicted_with_those_of_its_stack(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", [0, 255], RGB, slices=3)
    stacks = RNG.integers(0, 256, (2, 3, 40, 56), dtype=np.uint8)
    planes = Planes(Image(stacks), channels_first=False)
    steps = predict_module.predicted(folder, planes, threading.Event())
    results = []

    def followed() -> Iterator[int]:
        results.append((yield from steps))

    assert [*followed()] == [1, 2, 3, 4, 5, 6]
    model = load(folder, device="cpu")
    assert np.array_equal(results[0][1], np.stack([model(stack) for stack in stacks]))
    planes = Planes(Image(STACK[0]), channels_first=False)
    steps = predict_module.predicted(folder, planes, threading.Event())
    with pytest.raises(InputError, match="is a single image: choose the stack"):
        next(steps)


def test_what_is_stopped_ends_after_the_image_at_work_without_a_result(tmp_path: Path) -> None:
    stopped = threading.Event()
    planes = Planes(Image(STACK), channels_first=False)
    steps = predict_module.predicted(saved(tmp_path / "model", [0, 255]), planes, stopped)
    assert next(steps) == 1
    stopped.set()
    with pytest.raises(StopIteration) as ended:
        next(steps)
    assert ended.value.value is None


def test_a_prediction_that_is_stopped_adds_nothing_and_another_can_begin(
    make_napari_viewer, qtbot, errors, tmp_path, monkeypatch
) -> None:
    viewer = make_napari_viewer()
    widget = PredictWidget(viewer)
    viewer.window.add_dock_widget(widget)
    viewer.add_image(STACK, name="x")
    widget.model.value = saved(tmp_path / "model", [0, 255], GREY)
    real, gate = predict_module.load, threading.Event()

    def load_later(folder: Path) -> object:
        gate.wait(60)
        return real(folder)

    monkeypatch.setattr(predict_module, "load", load_later)
    widget.start.changed.emit(True)
    assert (widget.start.enabled, widget.stop.enabled) == (False, True)
    widget.stop.changed.emit(True)
    assert not widget.stop.enabled
    gate.set()
    qtbot.waitUntil(lambda: widget.start.enabled, timeout=60_000)
    assert [layer.name for layer in viewer.layers] == ["x"]
    click(widget.start, qtbot)
    assert "x mask" in [layer.name for layer in viewer.layers]
    assert not widget.stop.enabled
    assert errors == []


@pytest.mark.slow  # two trainings, each in a process of its own
def test_a_painted_stack_becomes_a_run_whose_model_predicts(
    make_napari_viewer, qtbot, errors, plugin, tmp_path
) -> None:
    viewer = make_napari_viewer()
    image = np.full((2, 64, 64), 60, np.uint8)
    image[:, 16:48, 16:48] = 160
    image += RNG.integers(0, 30, image.shape, dtype=np.uint8)
    labels = np.zeros(image.shape, np.int32)
    labels[1, 2:14], labels[1, 24:40, 20:44] = 1, 2
    layer = viewer.add_image(image, name="x")
    viewer.add_labels(labels, name="painted")
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Train on labels")
    widget.minutes.value, widget.out.value = 0.1, tmp_path
    click(widget.start, qtbot)
    assert errors == []
    (pair,) = find_pairs(tmp_path / "labelled-1")
    assert np.array_equal(pair.read_image()[..., 0], image[1])
    assert np.array_equal(pair.read_mask(), labels[1])
    model = tmp_path / "run-1/model"
    assert widget.said.value == f"trained: {model}"
    assert load(model).classes == (1, 2)

    widget.use.changed.emit(True)
    _, predict = viewer.window.add_plugin_dock_widget(PLUGIN, "Predict")
    assert (predict.model.value, predict.image.value) == (model, layer)
    click(predict.start, qtbot)
    assert np.array_equal(viewer.layers["x mask"].data, load(model)(image))

    widget.init.value, widget.minutes.value = model, 60
    widget.start.changed.emit(True)
    qtbot.waitUntil(lambda: widget.said.value.startswith("step "), timeout=240_000)
    widget.stop.changed.emit(True)
    qtbot.waitUntil(lambda: widget.start.enabled, timeout=240_000)
    assert "stopped before its first evaluation" in errors[0]
    assert (tmp_path / "run-2/state").is_dir()


def test_a_training_that_fails_leaves_its_sentence_and_the_model_of_the_one_before(
    make_napari_viewer, qtbot, errors, tmp_path, monkeypatch
) -> None:
    viewer = make_napari_viewer()
    widget = LearnWidget(viewer)
    viewer.window.add_dock_widget(widget)
    viewer.add_image(STACK[0], name="x")
    painted = np.zeros((40, 56), int)
    painted[:9], painted[20:] = 1, 2
    viewer.add_labels(painted, name="painted")
    widget.out.value = tmp_path

    def trained(words: object, run: Path, stopped: object) -> Generator[str, None, Path]:
        yield "step 1"
        if run.name == "run-2":
            raise RunError("the loss is not finite")
        return run / "model"

    monkeypatch.setattr(learn_module, "trained", trained)
    click(widget.start, qtbot)
    for sentence in (f"trained: {tmp_path / 'run-1/model'}", "the loss is not finite"):
        assert (widget.said.value, widget.model) == (sentence, tmp_path / "run-1/model")
        assert (widget.start.enabled, widget.stop.enabled) == (True, False)
        assert widget.use.enabled
        click(widget.start, qtbot)
    assert errors == ["the loss is not finite"]


def test_mistakes_are_sentences(make_napari_viewer, qtbot, errors, tmp_path, monkeypatch) -> None:
    viewer = make_napari_viewer()
    predict, learn = PredictWidget(viewer), LearnWidget(viewer)
    for widget in (predict, learn):
        viewer.window.add_dock_widget(widget)
    learn.out.value = tmp_path / "out"

    def said(button) -> str:
        errors.clear()
        click(button, qtbot)
        (sentence,) = errors
        return sentence

    assert "no image layer" in said(predict.start)
    assert "an image layer and a labels layer" in said(learn.start)
    viewer.add_image(STACK[0], name="x")
    assert "no model is chosen" in said(predict.start)
    predict.model.value = tmp_path
    assert "config.json is missing" in said(predict.start)
    predict.model.value = saved(tmp_path / "model", [0, 255], RGB)
    assert "tick 'first axis is channels'" in said(predict.start)
    predict.channels.value = True
    assert "untick 'first axis is channels'" in said(predict.start)

    def stopped(folder: Path) -> None:
        raise RunError("it was stopped")  # a RuntimeError, which threads of napari pass over

    predict.channels.value = False
    with monkeypatch.context() as patched:
        patched.setattr(predict_module, "load", stopped)
        assert said(predict.start) == "it was stopped"

    painted = viewer.add_labels(np.zeros((40, 56), int), name="painted")
    assert "nothing is painted" in said(learn.start)
    painted.data[:9] = 3
    assert "only the label 3 is painted" in said(learn.start)
    painted.data[20:] = 70_000
    assert "the labels go from 3 to 70000" in said(learn.start)
    painted.data = np.ones((9, 9), int)
    assert "has the shape (9, 9), but the images of 'x' (40, 56)" in said(learn.start)
    learn.image.value = viewer.add_image(STACK, name="channels")
    painted.data = np.ones((40, 56), int)
    assert "or tick 'first axis is channels'" in said(learn.start)
    painted.data[:9] = 2
    learn.channels.value, learn.out.value = True, MANIFEST
    assert f"cannot use '{MANIFEST}" in said(learn.start)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["uint16", "float64", "int64", "bool"])
def test_layers_of_any_type_become_files(tmp_path: Path, dtype: str) -> None:
    image = (STACK > 99).astype(bool) if dtype == "bool" else STACK.astype(dtype)
    painted = np.zeros((40, 56), np.int64)
    painted[:5], painted[9:12] = 1, 2
    planes = Planes(Image(image), channels_first=True)
    assert write_data(planes, painted, tmp_path / "labelled-1") == 1
    (pair,) = find_pairs(tmp_path / "labelled-1")
    assert np.array_equal(pair.read_image(), np.moveaxis(image, 0, -1))
    assert np.array_equal(pair.read_mask(), painted)
    assert new_folders(tmp_path) == (tmp_path / "labelled-2", tmp_path / "run-2")
    with pytest.raises(InputError, match="two axes"):
        Planes(Image(image[0]), channels_first=True)
