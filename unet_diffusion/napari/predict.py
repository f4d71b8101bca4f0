"""The widget Predict: a model and an image layer in; a mask and its probability out, as layers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import CheckBox, Container, FileEdit, PushButton, create_widget
from napari.layers import Image

from segmentation.data.classes import class_names
from segmentation.segmenter import Segmenter, load
from unet.errors import InputError
from unet.files.pages import Array
from unet.words import channels_said
from unet_diffusion.napari.layers import Planes, in_thread, placement, told

if TYPE_CHECKING:
    import napari

Found = tuple[Segmenter, Array, Array]


class PredictWidget(Container):
    """Labels the pixels of an image layer by the model of a run.

    Args:
        napari_viewer: whose layers are offered, and that is given the results.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        self.viewer = napari_viewer
        self.model = FileEdit(
            mode="d",
            nullable=True,
            value=None,
            label="model",
            tooltip="the folder of a model, such as RUN/model",
        )
        self.image = create_widget(annotation=Image, label="image")
        self.channels = CheckBox(label="first axis is channels")
        self.start = PushButton(text="Predict")
        self.stop = PushButton(text="Stop", enabled=False)
        super().__init__(widgets=[self.model, self.image, self.channels, self.start, self.stop])
        self.stopped = threading.Event()
        self.start.changed.connect(lambda _: told(self.predict))
        self.stop.changed.connect(lambda _: self.halt())

    def predict(self) -> None:
        """Starts the work, whose results become layers.

        Raises:
            InputError: nothing is chosen, or a layer without such channels.
        """
        layer, folder = self.image.value, self.model.value
        if layer is None:
            raise InputError("there is no image layer: open an image first")
        if folder is None:
            raise InputError("no model is chosen: give the folder of one, such as RUN/model")
        planes = Planes(layer, channels_first=self.channels.value)
        placed = placement(layer, len(planes.shape))
        self.stopped.clear()
        in_thread(
            predicted,
            folder,
            planes,
            self.stopped,
            total=len(planes),
            what=f"predicting {layer.name}",
            yielded=lambda _: None,
            returned=lambda found: self.done(layer.name, found, placed),
            failed=lambda _: None,
            finished=self.ended,
        )
        self.start.enabled, self.stop.enabled = False, True

    def halt(self) -> None:
        """Lets the prediction end, once the image at work is done; nothing is added."""
        self.stopped.set()
        self.stop.enabled = False

    def done(self, name: str, found: Found | None, placed: dict[str, Any]) -> None:
        """Adds the results, if it was not stopped before there were all."""
        if found is not None:
            self.add_results(name, found, placed)

    def ended(self) -> None:
        """Whatever came of it, another prediction can begin."""
        self.start.enabled, self.stop.enabled = True, False

    def add_results(self, name: str, found: Found, placed: dict[str, Any]) -> None:
        """Adds the results as layers."""
        segmenter, mask, probability = found
        self.viewer.add_image(
            probability,
            name=f"{name} probability",
            colormap="inferno",
            contrast_limits=(0, 1),
            visible=False,
            **placed,
        )
        kind = "objects" if segmenter.instances else "mask"
        features = None if segmenter.instances else names(segmenter)
        self.viewer.add_labels(mask, name=f"{name} {kind}", features=features, **placed)


def predicted(
    folder: Path, planes: Planes, stopped: threading.Event
) -> Generator[int, None, Found | None]:
    """Labels the images one by one, and yields how many are done.

    Returns:
        The model; for each pixel of the stack (..., H, W) its mask value, of a model of colours the
        number of its class, of numbered objects its object, in each image from 1; and the
        probability of the second of two classes, of more that of the chosen one. None, if it was
        stopped before the last image.

    Raises:
        InputError: no model, or one for other images.
    """
    segmenter = load(folder)
    opaque = segmenter.channels != 4
    given = 3 if planes.rgb and opaque else planes.channels
    if given != segmenter.channels:
        tick = "untick" if planes.channels_first else "tick"
        raise InputError(
            f"'{planes.name}' gives {channels_said(given)} images, but the model takes "
            f"{channels_said(segmenter.channels)} ones: choose another layer or model"
            + ("" if planes.rgb else f", or {tick} 'first axis is channels'")
        )
    slices = segmenter.slices
    masks: list[Array] = []
    probabilities = []
    for number in range(len(planes)):
        if stopped.is_set():
            return None
        # Of a model of neighbouring slices it is the middle one of those around it.
        around = [planes.read(i, opaque=opaque) for i in planes.around(number, slices)]
        sources, _ = segmenter.sources(around[0] if len(around) == 1 else np.stack(around))
        source = next(itertools.islice(sources, slices // 2, None))
        found, depth = segmenter.predict.found(source)
        decided = segmenter.decided(found, source)
        if segmenter.instances:
            masks.append(segmenter.numbered(decided, depth))
        elif isinstance(segmenter.classes[0], tuple):
            masks.append(decided)
        else:
            masks.append(segmenter.table.decode(decided))
        probabilities.append(found.max(axis=0))
        yield number + 1
    shape = planes.shape
    return segmenter, np.reshape(masks, shape), np.reshape(probabilities, shape)


def names(segmenter: Segmenter) -> dict[str, list[Any]]:
    """What each value of the mask is called, which napari shows under the pointer."""
    numbered = isinstance(segmenter.classes[0], tuple)
    values = range(len(segmenter.classes)) if numbered else segmenter.classes
    return {"index": list(values), "class": list(class_names(segmenter.table))}
