"""What a GPU would wait for or refuse, found without one: see `fake_device`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import run_forked

SCRIPT = Path(__file__).with_name("fake_device.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["presets", "losses", "diffusion_losses", "steps", "samplers"])
def test_nothing_waits_for_a_value_or_mixes_devices(part: str) -> None:
    done = run_forked(SCRIPT, part)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("a_wait", "DataDependentOutputException"),
        ("two_devices", "FakeTensorDeviceMismatchError"),
    ],
)
def test_what_waits_is_found(part: str, said: str) -> None:
    """The rehearsal itself: a value that is asked for, and two devices in one sum."""
    done = run_forked(SCRIPT, part)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_through_without_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu"}
    environment |= {"TEST_SECONDS": "20", "ROW_SECONDS": "400"}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" in (tmp_path / "machine.txt").read_text()
    assert (tmp_path / "tests.txt").exists()
    assert "one network evaluation" in (tmp_path / "table.md").read_text()
