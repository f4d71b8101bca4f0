"""Shared by the page in the browser and the plugin of napari: running commands, and error
messages."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

from unet.errors import InputError, RunError
from unet.files.images import write_image
from unet.files.pages import Array
from unet.files.writing import file_trouble
from unet.memory import ran_out_of_memory

PATIENCE = 60.0  # seconds in which a command that is to end saves its state


class Command:
    """A command of this project in its own process, as from a terminal: its run is an ordinary
    one."""

    def __init__(self, *words: object) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unet_diffusion", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends it as Ctrl-C does: its state is saved, so that it can be resumed.

        Windows sends no such signal: there its state is the one that it saved last.
        """
        atexit.unregister(self.stop)
        if not self.running:
            return
        if os.name == "nt":
            self.process.terminate()
        else:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> list[str]:
        """The lines that it has written so far."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace").splitlines()

    def check(self) -> None:
        """Raises RunError with its last sentence, where it ended in an error."""
        if self.process.returncode in (None, 0, 128 + signal.SIGINT, -signal.SIGINT):
            return
        lines = [line for line in self.said() if line.strip()] or ["it gave no reason"]
        errors = [line for line in lines if line.startswith("error: ")] or lines
        raise RunError(errors[-1].removeprefix("error: "))


def sentence(error: Exception) -> str:
    """The message for an error; an unexpected one also prints its traceback in the terminal."""
    if isinstance(error, (InputError, RunError)):
        return str(error)
    if ran_out_of_memory(error):
        return "the memory ran out: give smaller images, or fewer at a time"
    if isinstance(error, OSError) and (trouble := file_trouble(error)):
        return trouble
    traceback.print_exception(error)
    return f"{type(error).__name__}, which is our mistake: the terminal has the details"


def write_example(
    folder: Path, name: str, image: Array, mask: Array, palette: bytes | None = None
) -> None:
    """An image (H, W, C) and its mask (H, W[, 3]) in a data folder, as `unet train-seg` reads it.

    Args:
        palette: of a mask of indices: red, green and blue of each in turn.
    """
    write_image(folder / "image" / f"{name}.tif", image)
    wide = mask.astype(np.uint16) if mask.max() > 255 else mask.astype(np.uint8)
    write_image(folder / "label" / f"{name}.png", wide, palette)
