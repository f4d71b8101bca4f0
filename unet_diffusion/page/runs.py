"""The tab Runs: the live state of the runs in a folder; those of the page can be stopped and
resumed."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import gradio as gr
import yaml
from filelock import FileLock, Timeout
from PIL import Image

from unet.errors import InputError
from unet.files.images import natural_key
from unet.words import counted
from unet_diffusion.page.learn import curve
from unet_diffusion.page.shared import Page, sentences

DEPTH = 3  # folders below --runs in which runs are looked for
PICTURES = 12  # of a run's samples/, the newest


def find_runs(folder: Path) -> dict[str, Path]:
    """The run folders below a folder by their names, in natural order; links are passed over."""
    found = {}
    for depth in range(1, DEPTH + 1):
        for file in folder.glob("/".join(["*"] * depth + ["config.yaml"])):
            parts = file.relative_to(folder).parts[:-1]
            places = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
            if not any(place.is_symlink() or place.name.startswith(".") for place in places):
                found["/".join(parts)] = file.parent
    return {name: found[name] for name in sorted(found, key=natural_key)}


def shown_runs(page: Page) -> dict[str, Path]:
    """The runs of the folder, and before them those that learnt on this page."""
    lessons = find_runs(page.folder / "lessons")
    return {f"lessons/{name}": run for name, run in lessons.items()} | find_runs(page.runs)


def command_of(run: Path) -> str:
    """The command that trains a run, found by the options of the run.

    Raises:
        InputError: none that goes on.
    """
    with (run / "config.yaml").open("rb") as file:
        text = file.read(2**16)
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"the config.yaml of {run.name} is not readable") from error
    if isinstance(options, dict) and "prediction" in options:
        return "train-ddpm"
    if isinstance(options, dict) and "border_weight" in options:
        return "train-seg"
    raise InputError(
        f"{run.name} is no run of train-seg or train-ddpm, so it cannot be resumed here"
    )


def state_of(run: Path) -> str:
    """Whether somebody trains in a run folder."""
    if (run / ".lock").exists():
        try:
            with FileLock(run / ".lock", blocking=False):
                pass
        except Timeout:
            return "running"
    return "ended" if (run / "report.png").exists() else "stopped"


def pictures(run: Path) -> list[tuple[Image.Image, str]]:
    """The newest samples, and the report."""
    folder = run / "samples"
    files = sorted(folder.glob("*.png"), key=lambda p: p.stat().st_mtime)[-PICTURES:]
    shown = [*([run / "report.png"] if (run / "report.png").is_file() else []), *files[::-1]]
    found = []
    for file in shown:
        if file.is_symlink():
            continue
        with Image.open(file) as opened:
            found.append((opened.convert("RGB"), file.name))
    return found


def tab(page: Page) -> None:
    """Builds the tab."""
    names = list(shown_runs(page))
    with gr.Row():
        name = gr.Dropdown(
            names, value=names[-1] if names else None, label="Run", elem_id="run", scale=2
        )
        minutes = gr.Number(
            0, label="Minutes in all (0: unchanged)", minimum=0, elem_id="more-minutes"
        )
        again = gr.Button("Resume", variant="primary", elem_id="resume")
        stop = gr.Button("Stop", elem_id="stop-run")
    said = gr.Markdown(elem_id="run-said")
    plot = gr.LinePlot(x="step", y="loss", color="images", height=280)
    gallery = gr.Gallery(
        label="Report and samples",
        columns=3,
        object_fit="contain",
        format="png",
        elem_id="samples",
        buttons=["fullscreen", "download"],
    )
    timer, seen = gr.Timer(2), gr.State(None)

    def chosen(given: object) -> Path:
        found = shown_runs(page).get(str(given))
        if found is None:
            raise InputError(f"choose a run: {page.runs.name} has none of that name")
        return found

    @sentences
    def look(given: str | None, before: Any) -> Any:
        found = shown_runs(page)
        names, old = before or (None, None)
        listed = gr.skip() if names == list(found) else gr.update(choices=list(found))
        if given not in found:
            text = (
                counted(len(found), "run") if found else f"there is no run in {page.runs.name}/ yet"
            )
            if given:  # a value that is not listed would be refused at each tick
                gr.Warning(f"{given} is no longer there")
                listed = gr.update(choices=list(found), value=None)
            return listed, text, gr.skip(), gr.skip(), (list(found), None)
        run = found[given]
        shown = [run / "report.png", run / "metrics.jsonl", *(run / "samples").glob("*.png")]
        stamp = (given, [(p.name, p.stat().st_mtime) for p in shown if p.exists()])
        text = f"**{given}**: {state_of(run)}"
        if stamp == old:
            return listed, text, gr.skip(), gr.skip(), (list(found), old)
        return listed, text, curve(run), pictures(run), (list(found), stamp)

    @sentences
    def resume(given: str, budget: float | None, request: gr.Request) -> str:
        run = chosen(given)
        more = ["--max-minutes", budget] if budget else []
        command = page.started(
            request.session_hash, run, command_of(run), "--out", run, "--resume", *more
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(8)  # in which most mistakes are told
            command.check()
        return f"**{given}** is resumed"

    @sentences
    def halt(given: str) -> str:
        run = chosen(given)
        job = page.job
        if job is None or job.run != run or not job.command.running:
            if state_of(run) == "running":
                raise InputError(
                    f"{given} was not started on this page: press Ctrl-C where it runs, and its "
                    "state is saved"
                )
            raise InputError(f"{given} is not running")
        job.command.stop()
        gr.Info(f"{given} has stopped, and its state is saved")  # the timer tells the line anew
        return f"**{given}**: {state_of(run)}"

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    outputs = [name, said, plot, gallery, seen]
    for event in (timer.tick, name.select):
        event(look, [name, seen], outputs, **hidden)
    again.click(
        resume, [name, minutes], said, concurrency_id="training", concurrency_limit=1, **hidden
    )
    stop.click(halt, name, said, **hidden)
