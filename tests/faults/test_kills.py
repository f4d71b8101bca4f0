"""Whatever kills a process of a run, the run goes on and ends as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.harness import (
    ROOT,
    SOON,
    TOY,
    assert_one_sentence,
    assert_same_run,
    ended,
    logged,
    run,
    start,
    wait_for,
)
from tests.forks import run_forked
from unet.training.run import RunFolder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills with signals")

TWO = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "--no-python",
)
TOY_RUN = ("--steps", 30, "--dropout", 0.2, "--norm", "batch", "--log-every", 3, "--save-every", 4)
SEGMENTATION = (
    *("--data", "phantom", "--width", 4, "--crop", 32, "--batch-size", 2, "--steps", 60),
    *("--save-every", 7, "--log-every", 3, "--evaluations", 4),
)  # fmt: skip
DIFFUSION = (
    *("--data", "shapes", "--width", 8, "--batch-size", 4, "--steps", 60, "--val", 40),
    *("--save-every", 7, "--log-every", 3, "--evaluations", 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "run"
    assert run_forked(TOY, "--out", folder, *TOY_RUN).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("part", ["state/.state.pt", "model/.model.safetensors"])
def test_a_kill_in_the_middle_of_a_save(uninterrupted, tmp_path, part):
    folder = tmp_path / "run"
    folder.mkdir()
    where = folder / Path(part).parent
    for _ in range(20):
        again = ("--resume",) if (folder / "config.yaml").exists() else ()
        process = start(TOY, "--out", folder, *TOY_RUN, *again, "--wait", 0.01)
        with contextlib.suppress(AssertionError):  # it came to its end
            wait_for(lambda: list(where.glob(f"{Path(part).name}.*.tmp")), process)
        process.kill()
        ended(process)
        if list(where.glob("*.tmp")):
            break
    assert list(where.glob("*.tmp")), "twenty kills, none of them in a save"
    assert run(TOY, "--out", folder, *TOY_RUN, "--resume")[0] == 0
    assert_same_run(folder, uninterrupted)


def test_a_killed_data_worker_is_one_sentence_and_loses_no_step(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(TOY, "--out", folder, *TOY_RUN, "--workers", 2, "--wait", 0.1)
    wait_for(lambda: len(logged(folder)) > 1, process)
    for worker in _children(process.pid):
        os.kill(worker, signal.SIGKILL)
    status, _, err = ended(process, SOON)
    assert status == 1
    assert "a process that prepares batches was killed" in assert_one_sentence(err)
    assert RunFolder(folder).load_state()["step"] >= logged(folder)[-1]["step"]
    assert run_forked(TOY, "--out", folder, *TOY_RUN, "--resume").returncode == 0
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path):
    folder = tmp_path / "run"
    process = start(TOY, "--out", folder, *TOY_RUN, "--wait", 0.2, launch=TWO)
    wait_for(lambda: (folder / "state/state.pt").exists(), process)
    victims = _children(process.pid)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    status, _, _ = ended(process, SOON)
    assert status != 0
    at = RunFolder(folder).load_state()["step"]
    assert at > 0
    status, out, _ = run(TOY, "--out", folder, *TOY_RUN, "--resume")
    assert status == 0
    assert f"at step {at}" in out


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs /proc to find the processes")
    return [int(child) for child in children.read_text().split()]


@pytest.mark.slow
def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    first = start(TOY, "--out", folder, "--steps", 10_000, "--log-every", 1, "--wait", 0.2)
    try:
        wait_for(lambda: logged(folder), first)
        before = (folder / "config.yaml").read_bytes()
        for again in ((), ("--resume",)):
            status, _, err = run(TOY, "--out", folder, *TOY_RUN, "--lr", 0.5, *again)
            assert status == 2
            assert str(folder) in assert_one_sentence(err)
        assert (folder / "config.yaml").read_bytes() == before
    finally:
        first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert ended(first, SOON)[0] == 128 + signal.SIGTERM
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"), [("train_seg", SEGMENTATION), ("train_ddpm", DIFFUSION)]
)
def test_twenty_five_kills_at_random_moments(tmp_path, script, options):
    """SIGKILL 25 times in one run, at moments spread over start, steps, saves and evaluations."""
    file, draw = ROOT / "scripts" / f"{script}.py", random.Random(0)
    began = time.monotonic()
    assert run(file, "--out", tmp_path / "whole", *options)[0] == 0
    whole = time.monotonic() - began
    folder, kills, finished = tmp_path / "run", 0, False
    while kills < 25:
        if finished:  # early: the same again from the start
            assert_same_run(folder, tmp_path / "whole")
            folder, finished = tmp_path / f"run{kills}", False
        again = ("--resume",) if (folder / "config.yaml").exists() else ()
        process = start(file, "--out", folder, *options, *again)
        try:
            status, _, err = ended_or_killed(process, draw.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            kills += 1
            continue
        assert status == 0, err
        finished = True
    if not finished:
        again = ("--resume",) if (folder / "config.yaml").exists() else ()
        assert run(file, "--out", folder, *options, *again)[0] == 0
    assert_same_run(folder, tmp_path / "whole")
    state = torch.load(folder / "state/state.pt", weights_only=True)
    assert state["step"] == 60


def ended_or_killed(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err
