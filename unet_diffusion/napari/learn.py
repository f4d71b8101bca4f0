"""The widget Train on labels: a painted labels layer becomes a data folder, and that a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from magicgui.widgets import (
    CheckBox,
    Container,
    FileEdit,
    FloatSpinBox,
    Label,
    PushButton,
    create_widget,
)
from napari.layers import Image, Labels

from unet.errors import InputError, RunError
from unet.files.pages import Array
from unet.training.run import read_log
from unet.words import counted
from unet_diffusion.interactive import Command, write_example
from unet_diffusion.napari.layers import PLUGIN, Planes, finest, in_thread, told

if TYPE_CHECKING:
    import napari

UNLABELLED = 0  # what a labels layer holds where nothing was painted
LOOK = 0.5  # seconds between two looks at what the command says


class LearnWidget(Container):
    """Trains a model on what was painted, by the command that anybody can type again.

    Args:
        napari_viewer: whose layers are offered.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        self.viewer = napari_viewer
        self.image = create_widget(annotation=Image, label="image")
        self.channels = CheckBox(label="first axis is channels")
        self.painted = create_widget(annotation=Labels, label="labels")
        self.minutes = FloatSpinBox(value=5, min=0.1, max=10_000, step=1, label="minutes")
        self.out = FileEdit(mode="d", value=Path.home() / "unet-napari", label="out folder")
        self.init = FileEdit(
            mode="d", nullable=True, value=None, label="start from", tooltip="a model, or nothing"
        )
        self.start = PushButton(text="Train")
        self.stop = PushButton(text="Stop", enabled=False)
        self.said = Label(value="", label="progress")
        self.said.native.setWordWrap(True)  # so that a long path does not widen the widget
        self.use = PushButton(text="Predict with the trained model", enabled=False)
        given = [self.image, self.channels, self.painted, self.minutes, self.out, self.init]
        super().__init__(widgets=[*given, self.start, self.stop, self.said, self.use])
        self.stopped = threading.Event()
        self.model: Path | None = None
        self.start.changed.connect(lambda _: told(self.learn))
        self.stop.changed.connect(lambda _: self.halt())
        self.use.changed.connect(lambda _: told(self.predict))

    def learn(self) -> None:
        """Writes the data folder, and starts the training.

        Raises:
            InputError: nothing is chosen or painted, or the layers do not belong together.
        """
        layer, labels = self.image.value, self.painted.value
        if layer is None or labels is None:
            raise InputError(
                "an image layer and a labels layer are needed: open an image, add a labels layer, "
                "and paint on it"
            )
        planes = Planes(layer, channels_first=self.channels.value)
        painted = painted_on(planes, labels)
        data, run = new_folders(self.out.value)
        count = write_data(planes, painted, data)
        words: list[object] = ["train-seg", "--data", data, "--ignore-value", UNLABELLED]
        # From random weights that recipe is the one for minutes; a model brings its own network.
        words += ["--init", self.init.value] if self.init.value else ["--recipe", "quick"]
        # Judged often enough that a training which is stopped leaves a model.
        words += ["--evaluations", 10, "--max-minutes", self.minutes.value, "--out", run]
        self.stopped.clear()
        self.said.value = f"learning from {counted(count, 'image')} of '{layer.name}'"
        in_thread(
            trained,
            words,
            run,
            self.stopped,
            total=0,
            what=f"training on {labels.name}",
            yielded=lambda line: setattr(self.said, "value", line),
            returned=self.done,
            failed=lambda sentence: setattr(self.said, "value", sentence),
            finished=self.ended,
        )
        self.start.enabled, self.stop.enabled, self.use.enabled = False, True, False

    def halt(self) -> None:
        """Stops the training, which can take a minute."""
        self.stopped.set()
        self.stop.enabled, self.said.value = False, "stopping, once the state is saved"

    def done(self, model: Path) -> None:
        """Offers a newly trained model for use."""
        self.model, self.said.value = model, f"trained: {model}"

    def ended(self) -> None:
        """Whatever the outcome, another training can begin, and the last model can be used."""
        self.start.enabled, self.stop.enabled = True, False
        self.use.enabled = self.model is not None

    def predict(self) -> None:
        """Opens the widget Predict, if it is not open, with the trained model and the image."""
        _, widget = self.viewer.window.add_plugin_dock_widget(PLUGIN, "Predict")
        widget.model.value = self.model
        if self.image.value is not None:
            widget.image.value, widget.channels.value = self.image.value, self.channels.value


def painted_on(planes: Planes, labels: Labels) -> Array:
    """What was painted on each image (..., H, W).

    If the layer also has the axis of the channels, a pixel counts as painted if it is on any of
    them.

    Raises:
        InputError: a layer of another size.
    """
    found = np.asarray(finest(labels))
    if planes.channels_first and found.shape == (planes.channels, *planes.shape):
        found = found.max(axis=0)
    if found.shape != planes.shape:
        cure = "choose the labels that were painted on this image"
        if found.shape == planes.shape[1:]:
            cure += ", or tick 'first axis is channels'"
        raise InputError(
            f"'{labels.name}' has the shape {found.shape}, but the images of '{planes.name}' "
            f"{planes.shape}: {cure}"
        )
    return found


def write_data(planes: Planes, painted: Array, folder: Path) -> int:
    """The images with a label, and their masks, as a data folder; returns how many there are.

    Raises:
        InputError: fewer than two classes; values that are no classes.
    """
    values = np.unique(painted[painted != UNLABELLED])
    if len(values) < 2:
        some = f"only the label {values[0]} is" if len(values) else "nothing is"
        raise InputError(
            f"{some} painted: paint some pixels of each class, of the background as well, with the "
            "labels 1, 2, ..."
        )
    if values[0] < 0 or values[-1] > 65535:
        raise InputError(
            f"the labels go from {values[0]} to {values[-1]}: paint classes with 1, 2, ..."
        )
    count = 0
    for number in range(len(planes)):
        mask = painted[planes.place(number)]
        if (mask != UNLABELLED).any():
            pixels = storable(planes.read(number, opaque=True))
            write_example(folder, f"{number:04d}", pixels, mask)
            count += 1
    return count


def storable(pixels: Array) -> Array:
    """Pixels in a type that image files have: a range of values, or else float32."""
    if pixels.dtype.name in ("uint8", "uint16", "float32"):
        return pixels
    return pixels.astype(np.float32)


def new_folders(out: Path) -> tuple[Path, Path]:
    """The folders of a training, OUT/labelled-N and OUT/run-N, with the first N that is free."""
    number = 1
    while any((out / f"{name}-{number}").exists() for name in ("labelled", "run")):
        number += 1
    return out / f"labelled-{number}", out / f"run-{number}"


def trained(words: list[object], run: Path, stopped: threading.Event) -> Generator[str, None, Path]:
    """Runs a training, and yields its progress.

    Returns:
        The folder of the model.

    Raises:
        RunError: it failed, or was stopped before there was a model.
    """
    command = Command(*words)
    try:
        while command.running and not stopped.is_set():
            yield progress(command, run)
            time.sleep(LOOK)
    finally:
        command.stop()  # also where napari is closed
    command.check()
    model = run / "model"
    if not model.is_dir():
        raise RunError("it was stopped before its first evaluation, so there is no model yet")
    return model


def progress(command: Command, run: Path) -> str:
    """The last line of a run's figures; before there are any, the last line that it printed."""
    log = run / "metrics.jsonl"
    entries = [entry for entry in read_log(log) if "loss" in entry] if log.exists() else []
    if entries:
        last = entries[-1]
        return f"step {last['step']}, loss {last['loss']:.4f}, after {last['seconds']:.0f} s"
    said = (" ".join(line.split()) for line in reversed(command.said()))
    return next(filter(None, said), "starting")
