"""Real scripts as processes to which something happens: kills, full disks, files that go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unet.training.run import read_log

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "unet" / "training" / "toy_training.py"
TIMES = {"seconds"}  # of the log's entries, those that no two runs share
SOON = 60  # seconds within which anything must end that cannot go on


def start(script: Path, *arguments: object, launch: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A script as a process in a group of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*launch, sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Status, stdout and stderr of a process that must end by itself."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def run(script: Path, *arguments: object) -> tuple[int, str, str]:
    return ended(start(script, *arguments), 300)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Waits until something is so, while the process goes on."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "this never came"
        time.sleep(0.002)


def logged(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []


def assert_one_sentence(err: str) -> str:
    """That stderr ends with one sentence about the error and holds no traceback; gives it."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    return lines[0]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Weights, averages, optimizer, randomness and log alike to the last bit, and no leftovers."""
    ours, theirs = (torch.load(r / "state/state.pt", weights_only=True) for r in (found, wanted))
    for state in (ours, theirs):
        del state["seconds"], state["evaluated_seconds"], state["evaluation_seconds"]
        for group in state["optimizer"]["param_groups"]:
            del group["lr"]  # which each step sets anew; a kill at the very end leaves no step
    assert_equal(ours, theirs)
    best, expected = (load_file(r / "model/model.safetensors") for r in (found, wanted))
    assert_equal(best, expected)
    configs = [(r / "model/config.json").read_text() for r in (found, wanted)]
    assert configs[0] == configs[1]
    logs = [
        [{k: v for k, v in e.items() if k not in TIMES} for e in logged(r)] for r in (found, wanted)
    ]
    assert logs[0] == logs[1]
    assert not list(found.rglob("*.tmp"))


def assert_equal(a: Any, b: Any) -> None:
    """Nested tensors, lists and numbers that are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
