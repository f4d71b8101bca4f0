"""A page in the browser to label, correct, learn and draw: unet-app --model RUN/model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from unet.errors import InputError, RunError
from unet.training.cli import run_script, say_next
from unet.training.options import check_paths

if TYPE_CHECKING:
    from segmentation.data.pairs import Pair
    from unet_diffusion.page.shared import Known

# The two quick trainings of the demo, with their shares of the minutes: the arguments of `unet`.
QUICK = {
    "membranes": ("train-seg", "--recipe", "quick", "--max-minutes", "0.75"),
    "shapes": ("train-ddpm", "--batch-size", "16", "--max-minutes", "1.75"),
}


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """A page in the browser."""

    model: tuple[str, ...] = ()
    """Model folders, such as RUN/model, of segmentations and diffusion models; none given: two
    small ones, which are trained on generated images the first time, in three minutes, and kept
    in --folder."""

    runs: Path = Path("runs")
    """Folder whose runs are shown."""

    held_out: Path | None = None
    """Labelled images on which corrected models are scored; none given: those that the run of the
    model that was corrected first held out."""

    folder: Path = Path("unet-app")
    """Folder for all that the page writes: what is painted, and the runs that learn from it."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only, 0.0.0.0 from any."""

    port: int | None = None
    """Port to listen on; none given: the first free one from 7860 on."""

    password_file: Path | None = None
    """File whose first line a browser is asked for, with any user name."""

    max_upload: int = 256
    """Megabytes of an upload, at most."""

    max_pixels: int = 2**26
    """Pixels of the images of an upload together, at most."""

    def __post_init__(self) -> None:
        for name in ("max_upload", "max_pixels"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be at least 1")
        if self.port is not None and not 1 <= self.port < 2**16:
            raise InputError(f"--port {self.port} must be from 1 to {2**16 - 1}")


def main(options: AppOptions) -> None:
    check_paths(options, made=("folder", "runs"))
    password = read_password(options.password_file)
    held: list[Pair] = []
    if options.held_out is not None:
        from segmentation.data.pairs import find_pairs

        held = find_pairs(options.held_out)  # which is read again by each training
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another page is open in --folder {options.folder}: close it, or give another folder"
        ) from error
    with lock:
        # Uploads and results of an earlier page; what was painted and learnt lies beside them.
        shutil.rmtree(folder / "files", ignore_errors=True)
        serve(options, folder, password, held)


def serve(
    options: AppOptions, folder: Path, password: str | None, held: Sequence[Pair] = ()
) -> None:
    """Opens the page, and waits until it is to be closed.

    Args:
        held: the pairs of --held-out.
    """
    # Read by Gradio as it is imported: no reports to its makers, and uploads in our own folder.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")
    try:
        import gradio  # noqa: F401  # is it there?
    except ImportError as error:
        raise InputError(
            "the page needs Gradio: pip install 'unet-diffusion[app]', in a clone pip install "
            "-e '.[app]'"
        ) from error
    from unet.training.run import signals_caught
    from unet_diffusion.page.build import serve as open_page
    from unet_diffusion.page.shared import Page

    models = given(options.model) if options.model else quick_ones(folder / "models")
    if options.held_out is not None:
        for note in unfit(options.held_out, held, models):
            print(note, file=sys.stderr)
    page = Page(
        folder,
        {known.name: known for known in models},
        options.runs,
        options.held_out,
        options.max_pixels,
    )
    blocks, address = open_page(
        page,
        host=options.host,
        port=options.port,
        password=password,
        most_megabytes=options.max_upload,
    )
    if options.host not in ("127.0.0.1", "localhost", "::1") and password is None:
        print("note: anybody who reaches this address can use the page: give --password-file")
    print(f"the page: {address} (Ctrl-C closes it)", flush=True)
    try:
        with signals_caught() as caught:
            while not caught:
                time.sleep(0.5)
        print("closing as soon as what is running has saved its state", flush=True)
    finally:
        if page.job is not None:
            page.job.command.stop()
        blocks.close(verbose=False)
    labels = next(
        (str(known.path) for known in models if known.task == "segmentation"), "RUN/model"
    )
    say_next("predict-seg", "--model", labels, "--input", "new_images", "--out", "predictions")


def read_password(file: Path | None) -> str | None:
    """The first line of a file; InputError where there is none."""
    if file is None:
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise InputError(f"--password-file {file}: its first line is empty, and is the password")
    return lines[0].strip()


def given(folders: Sequence[str]) -> list[Known]:
    """The models of the command line, each under the name of its run or its folder."""
    from unet_diffusion.page.shared import known_model

    found: dict[str, Known] = {}
    for text in folders:
        path = Path(text).resolve()
        base = path.parent.name if path.name == "model" else path.name
        name, number = base, 1
        while name in found:
            number += 1
            name = f"{base} {number}"
        found[name] = known_model(path, name)
    return list(found.values())


def unfit(held_out: Path, held: Sequence[Pair], models: Sequence[Known]) -> list[str]:
    """What is to be said of the segmentations that the pairs of --held-out cannot judge.

    Raises:
        InputError: it is all of them.
    """
    from segmentation.judging.labelled import labelled_data
    from segmentation.segmenter import load_models

    said, judged = [], 0
    for known in models:
        if known.task != "segmentation":
            continue
        networks, table, _ = load_models([known.path], "cpu")
        info = networks[0].info
        if info.get("regions") or info.get("slices", 1) != 1:
            continue  # the page teaches no such model
        judged += 1
        try:
            labelled_data(networks, held, table)
        except InputError as error:
            said.append(f"--held-out {held_out} does not go with the model {known.name}: {error}")
    if said and len(said) == judged:
        raise InputError(said[0])
    return [f"note: {sentence}" for sentence in said]


def quick_ones(folder: Path) -> list[Known]:
    """Two small models of generated images, trained as in the demo unless they exist already. A
    training that an earlier start left unfinished is resumed.
    """
    from unet_diffusion.page.shared import known_model

    for name, words in QUICK.items():
        run = folder / name
        if (run / "report.png").is_file():
            continue
        print(f"training a small model of generated {name}, once:", flush=True)
        more = ["--resume"] if (run / "config.yaml").is_file() else []
        line = [sys.executable, "-m", "unet_diffusion", *words, "--out", str(run), *more]
        if subprocess.run(line, check=False).returncode:
            raise RunError(f"the small model of {name} was not trained: start the page again")
    return [known_model(folder / name / "model", name) for name in QUICK]


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, AppOptions, argv, description=__doc__)
