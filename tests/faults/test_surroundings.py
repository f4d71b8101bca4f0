"""What happens around a run: full disks, folders that go away, files that change, short memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.faults.harness import (
    ROOT,
    SOON,
    TOY,
    assert_equal,
    assert_one_sentence,
    assert_same_run,
    ended,
    logged,
    run,
    start,
    wait_for,
)
from tests.unet.training.toy_training import ToyOptions, toy_task
from unet.errors import RunError
from unet.training import cli
from unet.training.fit import fit
from unet.training.plan import plan_fit
from unet.training.run import RunFolder, run_folder

TOY_RUN = ("--steps", 30, "--norm", "batch", "--log-every", 2, "--save-every", 3)
SCRIPTS = ROOT / "scripts"


# -- the disk -------------------------------------------------------------------------------------


def on_a_small_disk(part: str, folder: Path, kilobytes: int) -> dict[str, object]:
    """Runs a function of this module with `folder` on a disk of its own of that size."""
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$0" && exec "$@"'
    child = f"import sys; from tests.faults.test_surroundings import {part} as p; p(sys.argv[1])"
    command = ["unshare", "-rm", "sh", "-c", mount, folder, sys.executable, "-c", child, folder]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs the right to mount a disk in a namespace (unshare -rm)")
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def _train_while_the_disk_fills_and_empties(disk: str) -> None:
    folder = Path(disk) / "run"
    process = start(TOY, "--out", folder, *TOY_RUN, "--wait", 0.1)
    wait_for(lambda: (folder / "state/state.pt").exists(), process)
    ballast = fill(Path(disk))
    lines: list[str] = []
    assert process.stdout is not None
    while not any("the state cannot be written" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()[1]
    held = RunFolder(folder).load_state()["step"]
    ballast.unlink()
    status, out, err = ended(process)
    state = RunFolder(folder).load_state()
    finite = all(
        bool(v.isfinite().all()) for v in load_file(folder / "model/model.safetensors").values()
    )
    print(json.dumps({"status": status, "err": err, "held": held, "step": state["step"],
                      "said": "".join(lines) + out, "finite": finite}))  # fmt: skip


@pytest.mark.slow
def test_training_goes_on_where_the_disk_is_full_for_a_while(tmp_path):
    found = on_a_small_disk("_train_while_the_disk_fills_and_empties", tmp_path, 4000)
    assert found["status"] == 0, found["err"]
    assert found["held"] > 0  # the state on the full disk could be read
    assert found["step"] == 30
    assert found["finite"]
    assert str(found["said"]).count("the state cannot be written, is the disk full?") == 1


def _train_until_the_end_on_a_full_disk(disk: str) -> None:
    folder = Path(disk) / "run"
    process = start(TOY, "--out", folder, *TOY_RUN, "--wait", 0.05)
    wait_for(lambda: (folder / "state/state.pt").exists(), process)
    ballast = fill(Path(disk))
    status, _, err = ended(process, SOON)
    held = RunFolder(folder).load_state()["step"]
    leftovers = [str(f) for f in folder.rglob("*.tmp")]
    ballast.unlink()
    again, _, later = run(TOY, "--out", folder, *TOY_RUN, "--resume")
    print(json.dumps({"status": status, "err": err, "held": held, "leftovers": leftovers,
                      "again": again, "later": later,
                      "step": RunFolder(folder).load_state()["step"]}))  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_stays_full_is_one_sentence_and_the_last_state_stays(tmp_path):
    found = on_a_small_disk("_train_until_the_end_on_a_full_disk", tmp_path, 4000)
    assert found["status"] in (1, 2)
    assert "disk" in assert_one_sentence(str(found["err"]))
    assert 0 < found["held"] < 30
    assert not found["leftovers"]
    assert found["again"] == 0, found["later"]
    assert found["step"] == 30


def _log_a_long_line_onto_little_room(disk: str) -> None:
    folder = RunFolder(Path(disk))
    folder.log(step=1)
    ballast = fill(Path(disk))
    refused = 0
    for step in range(2, 5):  # the first page still has room for some of it
        try:
            folder.log(step=step, **{f"x{i}": 0.123456789 for i in range(200)})
        except OSError:
            refused += 1
    ballast.unlink()
    folder.log(step=9)
    print(json.dumps({"refused": refused, "steps": [e["step"] for e in logged(Path(disk))]}))


def test_half_a_line_of_the_log_is_taken_back(tmp_path):
    found = on_a_small_disk("_log_a_long_line_onto_little_room", tmp_path, 400)
    assert found["refused"] > 0
    assert found["steps"] == [1, *range(2, 5 - int(found["refused"])), 9]


def _predict_on_a_full_disk(disk: str) -> None:
    images, trained, out = (Path(disk) / name for name in ("images", "run", "out"))
    options = ("--data", "phantom", "--width", 4, "--crop", 32, "--steps", 2)
    assert run(SCRIPTS / "train_seg.py", "--out", trained, *options)[0] == 0
    images.mkdir()
    for i in range(30):
        noise = np.random.default_rng(i).integers(0, 256, (128, 128), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    ballast = fill(Path(disk))
    os.truncate(ballast, ballast.stat().st_size - 300_000)
    command = ("--model", trained / "model", "--input", images, "--out", out)
    status, _, err = run(SCRIPTS / "predict_seg.py", *command)
    written = sorted(f.name for f in out.rglob("*") if f.is_file())
    sizes = [Image.open(out / name).size for name in written]  # of whole files
    ballast.unlink()
    again, _, later = run(SCRIPTS / "predict_seg.py", *command, "--overwrite")
    masks = len(list(out.glob("*_mask.png")))
    print(json.dumps({"status": status, "err": err, "written": written, "sizes": sizes,
                      "again": again, "later": later, "masks": masks}))  # fmt: skip


@pytest.mark.slow
def test_predictions_onto_a_full_disk_end_with_one_sentence_and_whole_files(tmp_path):
    found = on_a_small_disk("_predict_on_a_full_disk", tmp_path, 6000)
    assert found["status"] == 2
    assert "free some space" in assert_one_sentence(str(found["err"]))
    assert found["written"]
    assert all(name.endswith(".png") for name in found["written"])
    assert all(size == [128, 128] for size in found["sizes"])
    assert found["again"] == 0, found["later"]
    assert found["masks"] == 30


# -- folders and files ----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_output_folder_that_becomes_read_only(tmp_path):
    launch = ()
    if os.geteuid() == 0:  # who may write anywhere, unless that right is dropped
        if not shutil.which("setpriv"):
            pytest.skip("as root this needs setpriv")
        launch = ("setpriv", "--bounding-set", "-dac_override")
    folder = tmp_path / "run"
    process = start(TOY, "--out", folder, *TOY_RUN, "--wait", 0.1, launch=launch)
    wait_for(lambda: (folder / "state/state.pt").exists(), process)
    parts = [folder, *(p for p in folder.iterdir() if p.name != ".lock")]
    for part in parts:
        part.chmod(0o555)
    status, _, err = ended(process, SOON)
    for part in parts:
        part.chmod(0o755)
    assert status == 2
    told = assert_one_sentence(err)
    assert f"cannot use '{folder}/" in told
    assert "Permission denied" in told
    assert RunFolder(folder).load_state()["step"] > 0
    assert run(TOY, "--out", folder, *TOY_RUN, "--resume")[0] == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(300):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


STEPS = 150
FROM_DISK = Path(__file__).parent / "large_data.py"
DIFFUSION = (
    *("--width", 8, "--batch-size", 2, "--steps", STEPS, "--val", 20, "--flips", True),
    *("--save-every", 1000, "--log-every", 1, "--evaluations", 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(SCRIPTS / "train_ddpm.py", "--data", photos, "--out", folder, *DIFFUSION)[0] == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["folder", "truncated"])
def test_data_that_go_away_while_training(photos, undisturbed, tmp_path, what, workers):
    """The step before is saved; with the data back, the run ends as if nothing had been."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos, data)
    options = ("--data", data, "--out", folder, *DIFFUSION, "--workers", workers)
    process = start(FROM_DISK, *options)
    wait_for(lambda: len(logged(folder)) > 2, process)
    if what == "folder":
        data.rename(tmp_path / "elsewhere")
    else:
        for file in data.iterdir():
            os.truncate(file, 60)
    status, _, err = ended(process, SOON)
    assert status == 2, err
    assert f"{data}/" in assert_one_sentence(err)
    held = RunFolder(folder).load_state()
    assert held["step"] == logged(folder)[-1]["step"] < STEPS
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(photos, data)
    assert run(FROM_DISK, *options, "--resume")[0] == 0
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_images_that_fit_into_memory_are_needed_no_more(photos, undisturbed, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos, data)
    process = start(SCRIPTS / "train_ddpm.py", "--data", data, "--out", folder, *DIFFUSION)
    wait_for(lambda: logged(folder), process)
    data.rename(tmp_path / "elsewhere")
    status, _, err = ended(process)
    assert status == 0, err
    assert_same_run(folder, undisturbed)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan_at", "bad_gradient_at"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_left_out_where_asked(tmp_path, capsys, fault, accumulate):
    folder = tmp_path / "run"
    options = ToyOptions(
        out=folder,
        steps=9,
        norm="batch",
        log_every=3,
        accumulate=accumulate,
        nonfinite="skip",
        **{fault: 20},
    )
    with run_folder(plan_fit(options)):
        fit(toy_task(options), plan_fit(options))
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("left out: ")]
    assert len(told) == 3  # one of each epoch's three batches
    assert all("disc-20.png" in line for line in told)
    assert [e["skipped"] for e in logged(folder) if "skipped" in e][-1] == 3
    state = RunFolder(folder).load_state()
    weights = [load_file(folder / "model/model.safetensors"), state["model"], state["ema"]]
    assert all(v.isfinite().all() for w in weights for v in w.values())
    assert all(math.isfinite(e["loss"]) for e in logged(folder) if "loss" in e)


def test_the_steps_that_are_not_left_out_are_those_of_any_run(tmp_path):
    """Nothing of a step that is left out stays behind, in statistics of batch norm for one."""
    weights = []
    for name, fault in (("nan", {"nan_at": 20}), ("gradient", {"bad_gradient_at": 20})):
        options = ToyOptions(
            out=tmp_path / name, steps=6, norm="batch", nonfinite="skip", precision="fp32", **fault
        )
        with run_folder(plan_fit(options)):
            fit(toy_task(options), plan_fit(options))
        weights.append(RunFolder(options.out).load_state()["model"])
    assert_equal(*weights)


@pytest.mark.parametrize("fault", ["nan_at", "bad_gradient_at"])
def test_a_step_that_is_not_finite_stops_the_run_otherwise(tmp_path, fault):
    options = ToyOptions(out=tmp_path / "run", steps=9, **{fault: 20})
    with pytest.raises(RunError, match=r"disc-20\.png"), run_folder(plan_fit(options)):
        fit(toy_task(options), plan_fit(options))
    weights = load_file(tmp_path / "run/model/model.safetensors")  # of an evaluation before it
    assert all(v.isfinite().all() for v in weights.values())


def test_a_hundred_steps_left_out_in_a_row_stop_the_run(tmp_path, capsys):
    options = ToyOptions(out=tmp_path / "run", steps=400, nan_at=-2, nonfinite="skip")
    told = "99 steps in a row were left out, and the loss is nan"
    with pytest.raises(RunError, match=told), run_folder(plan_fit(options)):
        fit(toy_task(options), plan_fit(options))
    assert capsys.readouterr().out.count("left out: ") == 99


def test_a_run_that_is_never_judged_by_a_number_does_not_end_well(tmp_path):
    options = ToyOptions(out=tmp_path / "run", steps=2, nan_at=3, nonfinite="skip")  # is held out
    with (
        pytest.raises(RunError, match="no evaluation gave a finite loss"),
        run_folder(plan_fit(options)),
    ):
        fit(toy_task(options), plan_fit(options))


# -- memory ---------------------------------------------------------------------------------------


def test_short_memory_is_told_with_an_estimate_and_a_cure(tmp_path):
    options = ToyOptions(out=tmp_path / "run", steps=3, memory=4)
    with pytest.raises(RunError) as told, run_folder(plan_fit(options)):
        fit(toy_task(options), plan_fit(options))
    text = str(told.value)
    assert text.startswith("the memory of cpu ran out at step 1: the backward pass needs about")
    sample, total = (float(text.split(unit)[0].split()[-1]) for unit in (" GiB per", " GiB for"))
    assert total == pytest.approx(8 * sample, rel=0.01)
    # Four maps of 8 channels at 16 x 16 are kept at least, and not a hundred of them.
    assert 4 * 8 * 16 * 16 * 4 < sample * 2**30 < 100 * 8 * 16 * 16 * 4
    assert "--accumulate 2 needs half of it" in text
    cured = ToyOptions(out=tmp_path / "run", steps=3, memory=4, accumulate=2, resume=True)
    with run_folder(plan_fit(cured)):
        assert fit(toy_task(cured), plan_fit(cured))


def test_what_a_step_held_is_given_back_before_its_need_is_measured(tmp_path, monkeypatch):
    """On a full card there is no room for the measurement else."""
    options = ToyOptions(out=tmp_path / "run", steps=3)
    task, held, freed = toy_task(options), [], []

    def loss(model, batch):
        if len(batch["index"]) > 4:
            x = model(batch["image"])
            held.append(weakref.ref(x))
            raise torch.OutOfMemoryError("a stand-in for a full GPU")
        return task.loss(model, batch)

    def give_back(device):
        assert held[0]() is None
        assert all(p.grad is None for p in task.model.parameters())
        freed.append(device.type)

    monkeypatch.setattr("unet.training.step.give_back", give_back)
    with pytest.raises(RunError, match="GiB per sample"), run_folder(plan_fit(options)):
        fit(dataclasses.replace(task, loss=loss), plan_fit(options))
    assert freed == ["cpu"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_process_that_failed_waits_for_no_other(monkeypatch, status):
    """They may be in a collective, where NCCL's farewell would wait for them, and they for it."""
    ended, done = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("farewell"))
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    monkeypatch.setattr("os._exit", ended.append)
    cli._leave_group(status)
    assert (ended, done) == ([status], [] if status else ["farewell"])


@pytest.mark.slow
def test_a_process_that_gets_no_more_memory(tmp_path):
    """The real thing: an address space in which the weights fit, and the batch does not."""

    def short() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    command = [sys.executable, SCRIPTS / "train_seg.py", "--out", tmp_path / "run", "--steps", 2]
    command += ["--crop", 512, "--batch-size", 64, "--precision", "fp32"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, preexec_fn=short, timeout=300
    )
    assert done.returncode == 1
    assert "--accumulate 2 needs half of it" in assert_one_sentence(done.stderr)
