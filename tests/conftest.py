"""Fixtures that all tests share: the folders of real data, where this machine has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: the networks are tiny, and
# two threads that wait for each other on a busy machine are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A machine under load is no failure. (Hypothesis makes its choices repeatable by itself under CI.)
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def _data_folder(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names a folder with {holds}")
    folder = Path(value)
    if not (folder / holds).exists():
        pytest.fail(f"{variable} is {value}, which has no {holds}")
    return folder


@pytest.fixture(scope="session")
def isbi2012() -> Path:
    """The ISBI 2012 training slices: image/0.png ... 29.png and label/0.png ... 29.png."""
    return _data_folder("ISBI2012_DIR", "image/0.png")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """MNIST as mnist_train.npz and mnist_test.npz."""
    return _data_folder("MNIST_DIR", "mnist_train.npz")


@pytest.fixture
def two_processes() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script with its arguments as two processes of torchrun, or of accelerate launch."""
    launchers = {
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        "accelerate launch": (
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "0"),  # a free one
        ),
    }

    def run(
        script: str, *arguments: object, launcher: str = "torchrun"
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *launchers[launcher], script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run
