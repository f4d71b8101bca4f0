"""Shared by the tabs: models, jobs, errors as sentences."""

from __future__ import annotations

import functools
import html
import inspect
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion.model import DiffusionUNet
from diffusion.sampling import load_for_sampling
from segmentation.predict import Predictor
from segmentation.segmenter import Segmenter, load_models
from unet.errors import InputError, RunError
from unet.files.pages import Reading
from unet.files.pictures import Legend
from unet.weights.folder import read_config
from unet_diffusion.interactive import Command, sentence

SEGMENTATION, DIFFUSION = "segmentation", "diffusion"


@dataclass(frozen=True)
class Known:
    """A model that the page offers."""

    name: str
    path: Path
    task: str
    reading: Reading | None = None
    """How files are read for it, where its own `config.json` no longer says it."""


@dataclass(frozen=True)
class Job:
    """A training of the page: the session that began it, its run folder, and its command."""

    session: str | None
    run: Path
    command: Command


@dataclass
class Page:
    """The state of the page.

    Attributes:
        folder: holds everything that the page writes.
        models: by name, those of both tasks.
        runs: the folder whose runs are shown.
        held_out: labelled images by which new models are judged; None: those of a model's run.
        most_pixels: of the images of one upload together.
        job: the training that was begun last; one is at work at a time.
        learner: the session whose training is about to begin; None: it was stopped before.
    """

    folder: Path
    models: dict[str, Known]
    runs: Path
    held_out: Path | None = None
    most_pixels: int = 2**26
    job: Job | None = None
    learner: str | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}

    def names(self, task: str) -> list[str]:
        return [known.name for known in self.models.values() if known.task == task]

    def known(self, name: object, task: str) -> Known:
        """The model of that name, of the list: a name from a browser is never a path."""
        found = self.models.get(str(name))
        if found is None or found.task != task:
            kind = "labels pixels" if task == SEGMENTATION else "draws"
            raise InputError(
                f"no model is chosen that {kind}: unet app --model RUN/model gives one"
            )
        return found

    def segmenter(self, name: object) -> Segmenter:
        def load(folder: Path) -> Segmenter:
            models, table, threshold = load_models([folder])
            return Segmenter(Predictor(models, precision="auto"), table, threshold)

        found: Segmenter = self._once(self.known(name, SEGMENTATION), load)
        return found

    def drawer(self, name: object) -> DiffusionUNet:
        load = functools.partial(load_for_sampling, device="auto")
        found: DiffusionUNet = self._once(self.known(name, DIFFUSION), load)
        return found

    def _once(self, known: Known, load: Callable[[Path], Any]) -> Any:
        with self._lock:
            if known.name not in self._loaded:
                self._loaded[known.name] = load(known.path)
            return self._loaded[known.name]

    def results(self) -> Path:
        """A new folder for the results of one user; its name cannot be guessed."""
        place = self.folder / "files" / "results"
        place.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=place))

    def check_free(self) -> None:
        """Refuses a second training at a time."""
        if self.job is not None and self.job.command.running:
            name = self.job.run.name
            raise InputError(f"{name} is being trained: wait for its end, or stop it")

    def started(self, session: str | None, run: Path, *words: object) -> Command:
        """A training, as the job of a session."""
        self.check_free()
        if self.job is not None:
            self.job.command.stop()  # it has ended: the end of the page has not to see to it
        self.job = Job(session, run, Command(*words))
        return self.job.command

    def ended(self, session: str | None) -> None:
        """Ends the job of a tab that was closed or stopped, saving its state; a job that has not
        begun does not begin."""
        if self.learner == session:
            self.learner = None
        if self.job is not None and self.job.session == session is not None:
            self.job.command.stop()


def known_model(path: Path, name: str) -> Known:
    """A model folder to offer under a name.

    Raises:
        InputError: no model, or one of another task.
    """
    task = read_config(path).get("task")
    if task not in (SEGMENTATION, DIFFUSION):
        raise InputError(
            f"--model {path} is of the task {task!r}: give segmentations and diffusion"
        )
    return Known(name, path, str(task))


def interactive(components: Sequence[Any], value: bool) -> dict[str, Any]:
    """An event that locks components, or gives them back, in the browser, before any other answer.

    Locked until an event has filled them in they take no choice that it would overwrite.
    """
    update = f"{{__type__: 'update', interactive: {str(value).lower()}}}"
    return {
        "fn": None,
        "inputs": None,
        "outputs": [*components],
        "js": f"() => Array({len(components)}).fill({update})",
        "api_visibility": "private",
    }


def sentences(work: Callable[..., Any]) -> Callable[..., Any]:
    """An error in an event of the page becomes a sentence there, without the paths of uploads."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        text = _without_folders(sentence(error))
        if isinstance(error, (InputError, RunError)):
            return gr.Error(text, duration=None, print_exception=False)
        return gr.Error(text, print_exception=False)

    if inspect.isgeneratorfunction(work):

        @functools.wraps(work)
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from work(*args, **kwargs)
            except Exception as error:
                raise told(error) from None

        return steps

    @functools.wraps(work)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return work(*args, **kwargs)
        except Exception as error:
            raise told(error) from None

    return once


def _without_folders(text: str) -> str:
    """The sentence with the names of absolute paths alone: where they lie is not for the page."""
    return re.sub(r"(?<![\w./:])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "", text)


def swatches(legend: Legend) -> str:
    """The legend of colours as HTML, with names escaped."""
    box = "display:inline-block;width:1em;height:1em;border:1px solid #888;background:"
    return " &emsp; ".join(
        f"<span style='{box}rgb({r}, {g}, {b})'></span> {html.escape(name)}"
        for name, (r, g, b) in legend
    )


def packed(files: Sequence[Path], folder: Path, name: str) -> Path:
    """One archive of the files, each under its own name."""
    path = folder / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # pictures are deflated already
        for file in files:
            archive.write(file, file.name)
    return path
