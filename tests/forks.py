"""Scripts in processes that find torch imported, which takes longer than a small run of theirs."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.short_runs import shorten

SCRIPTS = Path(__file__).parents[1] / "scripts"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("tests.unet.training.toy_training", "torch._dynamo", "torch.distributed.tensor"),
        *("diffusion.training", "segmentation.training"),
    ]
)


def run_forked(
    script: str | Path, *arguments: object, processes: int = 1, short: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a script, as several processes with the environment that torchrun gives each.

    Args:
        short: whether it draws few pictures and no report, as with the fixture `short_runs`.

    Returns:
        The first status that is not 0, and what the processes said, one after the other.
    """
    group: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        group = [known | {"LOCAL_WORLD_SIZE": str(processes)} | rank for rank in ranks]
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [[Path(folder, f"{name}{i}") for name in ("out", "err")] for i in range(len(group))]
        started = [
            _FORKS.Process(target=_run, args=(command, environ, short, *files))
            for environ, files in zip(group, texts, strict=True)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(120)
            statuses = [process.exitcode for process in started]
        finally:
            for process in started:
                process.kill()
        out, err = ("".join(files[i].read_text() for files in texts) for i in (0, 1))
        assert None not in statuses, f"{script} hangs: {err}"
    status = next((s for s in statuses if s), 0)
    return subprocess.CompletedProcess(command, status, out, err)


class _WithoutNetworks(pickle.Pickler):
    def reducer_override(self, part: Any) -> Any:
        assert not isinstance(part, (nn.Module, nn.Parameter)), f"{type(part)} goes along"
        return NotImplemented


def as_spawned(samples: Any) -> Any:
    """Samples as a process gets them that is spawned to prepare batches (macOS; forkserver, Linux
    from Python 3.14): pickled, and without a network, whose weights may be on a GPU."""
    file = io.BytesIO()
    _WithoutNetworks(file).dump(samples)
    file.seek(0)
    return pickle.load(file)


def _run(command: list[str], environ: dict[str, str], short: bool, out: Path, err: Path) -> None:
    """In a process of its own: the script, with its output in two files."""
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environ)
    multiprocessing.set_start_method(None, force=True)  # the usual one, not that of these forks
    if short:
        shorten(pytest.MonkeyPatch())
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
