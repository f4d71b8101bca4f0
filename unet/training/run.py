"""A run folder: the lock, the log, the pictures, and the state from which a run resumes.

config.yaml    the options, so that --config repeats the run
metrics.jsonl  one JSON object a line: training every few steps, evaluations
samples/       pictures made during training
model/         the best weights so far, a model folder
state/         everything that resuming needs
snapshots/     averages of the weights, of which others are put together (with --snapshots)
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from unet.errors import DiskError, InputError, RunError
from unet.files.writing import replacing, write_text
from unet.training.ema import Profile
from unet.training.options import FitOptions, check_paths
from unet.training.plan import FitPlan
from unet.weights.folder import FolderModel, make_repository, save_weights
from unet.weights.pickles import load_pickle

_PARTS = ("config.yaml", "metrics.jsonl", "samples", "model", "state", "snapshots")


class RunFolder:
    """One run's files. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.model = path / "model"
        self.state = path / "state" / "state.pt"
        self.snapshots = path / "snapshots"

    def check(self, *, resume: bool) -> None:
        """Refuses the folder where `locked` would; nothing is made.

        Raises:
            InputError: the folder holds another run, or nothing to resume, or is in use.
        """
        self._check_parts(resume)
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise InputError(f"--out {self.path} cannot be a folder: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"--out {self.path} cannot be written: {there} does not permit it")
        if (self.path / ".lock").exists():
            with self._lock():
                pass

    @contextmanager
    def locked(self, *, resume: bool) -> Iterator[None]:
        """Makes the folder, or takes up the run in it, and keeps other processes out.

        Raises:
            InputError: the folder holds another run, or nothing to resume, or is in use.
        """
        self._check_parts(resume)
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise InputError(f"--out {self.path} cannot be a folder: {error.strerror}") from error
        lock = self._lock()
        try:
            for folder in (self.path, self.model, self.state.parent, self.samples, self.snapshots):
                for leftover in folder.glob(".*.tmp"):  # of a kill in the middle of a write
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()
            if made and {p.name for p in self.path.iterdir()} <= {".lock"}:  # refused at once
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()

    def _check_parts(self, resume: bool) -> None:
        holds_run = any(os.path.exists(self.path / part) for part in _PARTS)
        if resume and not holds_run:
            raise InputError(f"{self.path} holds no run to resume: start it without --resume")
        if holds_run and not resume:
            raise InputError(
                f"{self.path} holds a run already: give another --out, or --resume to go on with it"
            )

    def _lock(self) -> FileLock:
        """The lock of the folder, taken."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process is training in {self.path}: wait for it, or give another --out"
            ) from error
        return lock

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl in one write; what a full disk cuts is taken back."""
        line = (json.dumps(values) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut_log(self, step: int) -> None:
        """Drops the lines after `step` and a half-written one, so that none occurs twice."""
        if self.metrics.exists():
            kept = [json.dumps(e) + "\n" for e in read_log(self.metrics) if e["step"] <= step]
            write_text(self.metrics, "".join(kept))

    def save_snapshot(self, profile: Profile, weights: Mapping[str, Tensor]) -> None:
        """Keeps an average of the weights, by the name of its width and step."""
        save_weights(weights, self.snapshots / f"{profile.step:08d}-{profile.std:.2f}.safetensors")

    def kept_snapshots(self) -> dict[Profile, Path]:
        """The averages that are kept, in the order of their steps."""
        names = (
            re.fullmatch(r"(\d{8,})-(0\.\d\d)", p.stem)
            for p in self.snapshots.glob("*.safetensors")
        )
        found = sorted((int(name[1]), float(name[2])) for name in names if name)
        return {
            Profile(std, step): self.snapshots / f"{step:08d}-{std:.2f}.safetensors"
            for step, std in found
        }

    def cut_snapshots(self, step: int) -> None:
        """Drops those after `step`, which a resumed run takes again."""
        for profile, file in self.kept_snapshots().items():
            if profile.step > step:
                file.unlink()

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the state whole. It holds tensors, numbers, strings, and lists of them only."""
        with replacing(self.state) as temporary:
            try:
                torch.save(dict(state), temporary)
            except RuntimeError as error:  # which is how torch reports a full disk
                raise DiskError(
                    f"{self.state} cannot be written, is the disk full? {error}"
                ) from error

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state, or None before the first one."""
        if not self.state.exists():
            return None
        state = load_pickle(self.state, "a saved state")
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise InputError(f"{self.state} is no saved state of a training run")
        return state


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, of those of `accelerate launch`."""
    return int(os.environ.get("RANK", 0)) == 0


def check_first(options: FitOptions) -> None:
    """Refuses what the options alone show to be wrong, before data are read, which can take
    minutes.

    Raises:
        InputError: see `RunFolder.check` and `check_paths`.
    """
    if is_main_process():
        RunFolder(options.out).check(resume=options.resume)
    check_paths(options)


@contextmanager
def run_folder(plan: FitPlan) -> Iterator[None]:
    """Locks the run folder of a command line, in the main process.

    Raises:
        InputError: see `RunFolder.locked`; the Hub does not take the model of --push-to-hub.
    """
    if not is_main_process():
        yield
        return
    with RunFolder(plan.out).locked(resume=plan.resume):
        if plan.push_to_hub is not None:
            make_repository(plan.push_to_hub)
        yield


def upload(kind: type[FolderModel], plan: FitPlan) -> None:
    """Uploads the model in RUN/model, which is of this class, where --push-to-hub asks for it.

    Raises:
        RunError: the Hub does not take it now.
    """
    if plan.push_to_hub is None:
        return
    folder = RunFolder(plan.out).model
    try:
        model = kind.from_pretrained(folder)
        where = model.save_pretrained(folder, repo_id=plan.push_to_hub, push_to_hub=True)
    except InputError as error:
        raise RunError(
            f"the run is over and its model is in {folder}, but {error}; the same command with "
            "--resume uploads it later"
        ) from error
    print(f"uploaded: {where}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, up to a line that a kill cut short or that is no entry."""
    entries: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        if not all(isinstance(value, (int, float)) for value in entry.values()):
            break
        entries.append(entry)
    return entries


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of the first one; the second one kills."""
    caught: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def catch(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, previous[signal.Signals(signum)])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """PyTorch's random numbers of this process, to be saved."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Goes on with the random numbers of an earlier process."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
