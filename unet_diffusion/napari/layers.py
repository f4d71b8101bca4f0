"""Shared by the widgets: the images of a layer, the placement of results, work in a thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from napari.layers import Image, Labels
from napari.qt.threading import GeneratorWorker, create_worker
from napari.utils.notifications import show_error

from segmentation.data.slices import near
from unet.errors import InputError
from unet.files.images import WHITE, laid_over
from unet.files.pages import Array
from unet_diffusion.interactive import sentence

PLUGIN = "unet-diffusion"  # its name in napari.yaml


class Planes:
    """The images (H, W, C) of a layer, which are read one by one: a stack has many.

    Args:
        channels_first: the first axis of the layer holds channels.

    Raises:
        InputError: a layer without such an axis.
    """

    def __init__(self, layer: Image, *, channels_first: bool) -> None:
        self.name, self.rgb, self.channels_first = layer.name, layer.rgb, channels_first
        self.data = finest(layer)
        if channels_first and (layer.rgb or layer.ndim < 3):
            kind = "its channels are red, green and blue" if layer.rgb else "it has but two axes"
            raise InputError(
                f"the first axis of '{layer.name}' holds no channels, as {kind}: untick "
                "'first axis is channels'"
            )
        shape = tuple(map(int, self.data.shape))
        self.shape = shape[:-1] if layer.rgb else shape[channels_first:]
        self.channels = shape[-1] if layer.rgb else shape[0] if channels_first else 1

    def __len__(self) -> int:
        return math.prod(self.shape[:-2])

    def place(self, number: int) -> tuple[int, ...]:
        """Where on the axes before height and width an image is."""
        return tuple(map(int, np.unravel_index(number, self.shape[:-2])))

    def around(self, number: int, slices: int) -> list[int]:
        """An image, in the middle of those next to it on the axis before height and width.

        Raises:
            InputError: a single image, of which several are wanted.
        """
        if slices == 1:
            return [number]
        if len(self) == 1:
            raise InputError(
                f"the model takes {slices} neighbouring slices together, and '{self.name}' is a "
                "single image: choose the stack that it is of"
            )
        count = self.shape[-3]
        first = number // count * count
        return [first + i for i in near(number - first, count, slices)]

    def read(self, number: int, *, opaque: bool) -> Array:
        """An image (H, W, C), as stored.

        Args:
            opaque: put transparent pixels of RGBA over white, as for files.
        """
        place = self.place(number)
        if self.channels_first:
            return np.moveaxis(np.asarray(self.data[(slice(None), *place)]), 0, -1)
        found = np.asarray(self.data[place])
        if not self.rgb:
            return found[..., None]
        return laid_over(found, WHITE) if opaque and self.channels == 4 else found


def finest(layer: Image | Labels) -> Any:
    """The array of a layer, of a pyramid its finest level."""
    return layer.data[0] if layer.multiscale else layer.data


def placement(layer: Image, ndim: int) -> dict[str, Any]:
    """How a result is placed on its image: the keywords of a layer, for the last `ndim` axes."""
    return {
        "scale": layer.scale[-ndim:],
        "translate": layer.translate[-ndim:],
        "rotate": layer.rotate[-ndim:, -ndim:],
        "shear": layer.shear[-(ndim * (ndim - 1) // 2) :],
        "affine": layer.affine.affine_matrix[-ndim - 1 :, -ndim - 1 :],
        "units": layer.units[-ndim:],
    }


def told(work: Callable[[], None]) -> None:
    """Runs the action of a button; an error becomes a sentence in napari's notification."""
    try:
        work()
    except Exception as error:
        show_error(sentence(error))


class Told(Exception):
    """A sentence about what went wrong in a thread."""


def guarded(
    steps: Callable[..., Generator[Any, None, Any]], *arguments: object
) -> Generator[Any, None, Any]:
    """The steps, with errors as `Told`: napari does not show a RuntimeError of a thread."""
    try:
        return (yield from steps(*arguments))
    except Exception as error:
        raise Told(sentence(error)) from error


def in_thread(
    steps: Callable[..., Generator[Any, None, Any]],
    *arguments: object,
    total: int,
    what: str,
    yielded: Callable[[Any], None],
    returned: Callable[[Any], None],
    failed: Callable[[str], None],
    finished: Callable[[], None],
) -> GeneratorWorker:
    """Works in a thread, with napari's progress bar; an error becomes a sentence in napari.

    Args:
        steps: a generator function, and its arguments.
        total: of the steps; 0: not known.
        what: what is done, for the progress bar.
        yielded, returned: are given each step, and the result.
        failed: is given the sentence about what went wrong, which napari shows for a while.
        finished: is called whatever came of it.
    """

    def errored(error: Exception) -> None:
        show_error(str(error))
        failed(str(error))

    return create_worker(
        guarded,
        steps,
        *arguments,
        _progress={"total": total, "desc": what},
        _connect={
            "yielded": yielded,
            "returned": returned,
            "errored": errored,
            "finished": finished,
        },
        _ignore_errors=True,
    )
