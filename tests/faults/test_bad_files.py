"""Damaged and hostile files through every reader: each is read, or refused in one sentence.

SECONDS, REFUSED and READ are what a file may take.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from diffusion.data.images import DiffusionData
from diffusion.model import DiffusionUNet
from diffusion.stable.folder import read_unet
from segmentation.data.inputs import find_inputs
from segmentation.data.pairs import find_pairs
from segmentation.model import SegmentationUNet
from tests.faults.bad_files import GREY, READERS, Bench, picture, refusal, write_model
from tests.faults.damage import HOSTILE, ZEROS, mutated, tiff
from tests.faults.harness import ROOT, run
from unet.files.images import image_info, read_image
from unet.files.pages import MAX_PIXELS
from unet.training.cli import run_script
from unet_diffusion import describe, predict_seg, sample_ddpm, train_ddpm, train_seg

SECONDS = 10.0
REFUSED = 64.0  # MiB, of a hostile file
READ = 16 * MAX_PIXELS / 2**20  # MiB, of any file: 2 GiB
LONGEST = 7000  # characters of a sentence
FILES = 250  # damaged ones for each reader, in the long form


# -- laws -----------------------------------------------------------------------------------------


def resident(what: str) -> float:
    """MiB in memory: VmRSS now, or VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s*(\d+)", status)[1]) / 1024


@contextmanager
def bounded(mebibytes: float) -> Iterator[dict[str, float]]:
    """Holds what is done to time and, where the system can tell, to memory; gives what it took."""
    peak, took, start = Path("/proc/self/clear_refs"), {"memory": 0.0}, time.monotonic()
    if peak.exists():
        peak.write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
    yield took
    took["seconds"] = time.monotonic() - start
    if peak.exists():
        took["memory"] = resident("VmHWM") - before
    assert took["seconds"] < SECONDS
    assert took["memory"] < mebibytes


def assert_one_sentence(said: str | None) -> None:
    assert said is None or (said.isprintable() and 0 < len(said) < LONGEST)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ä bad\nfiles"))


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(bench: Bench, name: str) -> None:
    for seed in bench.prepared(name)[1]:
        assert bench.read(name, seed) is None


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file_is_read_or_refused(bench: Bench, name: str, seed: int) -> None:
    rng = random.Random(seed)
    data = mutated(rng.choice(bench.prepared(name)[1]), rng)
    with bounded(READ):
        assert_one_sentence(bench.read(name, data))


BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
MAY_BE_EMPTY = {"yaml: options", "jsonl: log", "txt: classes", "txt: captions"}


@pytest.mark.parametrize("name", READERS)
def test_an_empty_file_is_refused(bench: Bench, name: str) -> None:
    said = bench.read(name, b"")
    assert_one_sentence(said)
    assert (said is None) == (name in MAY_BE_EMPTY)


# What is not there yet is made, or is no log to read; all others are refused.
MAY_BE_MISSING = {"json: latents", "jsonl: log", "pickle: state", "jsonl: captions"}
MAY_BE_MISSING |= {"txt: classes", "json: nnU-Net"}


@pytest.mark.parametrize("name", READERS)
def test_a_link_to_itself_is_as_good_as_missing(bench: Bench, name: str) -> None:
    file, _ = bench.prepared(name)
    file.unlink(missing_ok=True)
    file.symlink_to(file)
    said = refusal(READERS[name].read, file)
    assert_one_sentence(said)
    assert said is not None or name in MAY_BE_MISSING


@pytest.mark.parametrize(
    "read",
    [
        DiffusionData,
        find_pairs,
        find_inputs,
        SegmentationUNet.from_pretrained,
        DiffusionUNet.from_pretrained,
        read_unet,
        image_info,
    ],
)
def test_a_folder_that_leads_to_itself(tmp_path: Path, read: Callable[[Path], object]) -> None:
    loop = tmp_path / "a\nloop"
    loop.symlink_to(loop)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    for path in (loop, folder):
        said = refusal(read, path)
        assert said is not None
        assert_one_sentence(said)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_at_once(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    name, make = HOSTILE[kind]
    data = make()
    bench.prepared(name)
    with bounded(REFUSED):
        said = bench.read(name, data)
    assert said is not None
    assert_one_sentence(said)
    assert not os.listdir(tmp_path)  # nothing ran


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("json: diffusers", {key: [] for key in BLOCKS}),
        ("json: scheduler", {"num_train_timesteps": 10**400}),
        ("json: scheduler", {"beta_end": math.nan}),
        ("json: segmentation", {"unet": {"norm_eps": 10**400}}),
        ("json: segmentation", {"info": {"threshold": "half"}}),
        ("json: diffusion", {"info": {"prediction": ["v"]}}),
        ("json: diffusion", {"info": {"size": 8}}),
        ("json: diffusion", {"info": {"size": [0, 8]}}),
        ("json: diffusion", {"info": {"classes": 7}}),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    bench: Bench, name: str, changed: dict[str, Any]
) -> None:
    found = json.loads(bench.prepared(name)[1][0])
    for key, value in changed.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    said = bench.read(name, json.dumps(found).encode())
    assert said is not None
    assert_one_sentence(said)


def test_a_caption_may_hold_any_character(bench: Bench) -> None:
    lines = bench.prepared("jsonl: captions")[1][0].decode().replace("\\u00e4", "a\u2028\x85b")
    assert "\u2028" in lines
    assert bench.read("jsonl: captions", lines.encode()) is None


def test_weights_of_eight_bits_are_refused(bench: Bench) -> None:
    name = "safetensors: segmentation"
    state = {key: value.half() for key, value in load(bench.prepared(name)[1][0]).items()}
    counters = {key for key in state if key.endswith("tracked")}
    state |= {key: state[key].long() for key in counters}
    assert "float16" not in (bench.read(name, save(state)) or "")
    eight = {k: v if k in counters else v.to(torch.float8_e4m3fn) for k, v in state.items()}
    said = bench.read(name, save(eight))
    assert said is not None
    assert "of type torch.float8_e4m3fn" in said


# -- whole runs -----------------------------------------------------------------------------------

SCRIPTS: dict[str, tuple[Callable[[Any], int | None], type]] = {
    "describe": (describe.main, describe.Options),
    "predict_seg": (predict_seg.main, predict_seg.PredictOptions),
    "sample_ddpm": (sample_ddpm.main, sample_ddpm.SampleOptions),
    "train_ddpm": (train_ddpm.main, train_ddpm.DiffusionOptions),
    "train_seg": (train_seg.main, train_seg.SegmentationOptions),
}


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder of files that no script can use, beside a model folder that one can."""
    folder = tmp_path / "bad\nfiles ü"
    for name in ("model", "broken"):
        write_model("segmentation", folder / name)
    (folder / "broken" / "model.safetensors").write_bytes(b"")
    (folder / "x.tif").write_bytes(b"II*\0")
    (folder / "x.npz").write_bytes(HOSTILE["an NPZ with pickled objects"][1]())
    (folder / "x.yaml").write_bytes(HOSTILE["YAML that runs a command"][1]())
    (folder / "image").symlink_to(folder / "image")
    return folder


RUNS = [
    ("describe", "{bad}/broken"),
    ("predict_seg", "--model {bad}/model --input {bad}/x.tif --out {out}"),
    ("predict_seg", "--model {bad}/model --input {bad}/image --out {out}"),
    ("predict_seg", "--model {bad}/broken --input {bad} --out {out}"),
    ("sample_ddpm", "--model {bad}/model --out {out}"),
    ("train_ddpm", "--data {bad}/x.npz --out {out}"),
    ("train_ddpm", "--data {bad}/image --out {out}"),
    ("train_seg", "--data {bad} --out {out}"),
    ("train_seg", "--config {bad}/x.yaml --out {out}"),
]


def filled(arguments: str, bad: Path) -> list[str]:
    return [part.format(bad=bad, out=bad.parent / "out") for part in arguments.split()]


def assert_refused(status: int, err: str, bad: Path, before: list[Path]) -> None:
    assert status == 2
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert sorted(bad.parent.rglob("*")) == before  # nothing is left behind


@pytest.mark.parametrize(("script", "arguments"), RUNS)
def test_a_script_refuses_in_one_line(
    bad: Path, script: str, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bad.parent.rglob("*"))
    status = run_script(*SCRIPTS[script], filled(arguments, bad))
    assert_refused(status, capsys.readouterr().err, bad, before)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), RUNS)
def test_a_process_refuses_in_one_line(bad: Path, script: str, arguments: str) -> None:
    before = sorted(bad.parent.rglob("*"))
    status, _, err = run(ROOT / "scripts" / f"{script}.py", *filled(arguments, bad))
    assert_refused(status, err, bad, before)


def test_files_of_any_name_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most locales
    names = ["a b", "c\nd", "ü \u2603 \u2028", os.fsdecode(b"\xff"), "'\"{}", "-x"]
    images, out = tmp_path / "im\nages", tmp_path / os.fsdecode(b"o\nut \xff")
    images.mkdir()
    for name in names:
        (images / f"{name}.png").write_bytes(picture("PNG", GREY))
    write_model("segmentation", tmp_path / "mo\ndel")
    arguments = ("--model", tmp_path / "mo\ndel", "--input", images, "--out", out)
    status, _, err = run(ROOT / "scripts" / "predict_seg.py", *arguments)
    assert status == 0, err
    assert {path.name for path in out.glob("*_mask.png")} == {f"{name}_mask.png" for name in names}


# -- the long form --------------------------------------------------------------------------------


def fuzz(root: Path) -> dict[str, Any]:
    """FILES damaged files through each reader: how many were read and refused, and the worst."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)  # lest the machine goes with it
    bench, counts = Bench(root), {name: [0, 0] for name in READERS}
    worst = {"memory": 0.0, "seconds": 0.0}
    for name in READERS:
        _, seeds = bench.prepared(name)
        bench.read(name, seeds[0])  # what is imported when it is needed counts for no file
        for number in range(FILES):
            rng = random.Random(f"{name} {number}")
            data = mutated(rng.choice(seeds), rng)
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
            with bounded(READ) as took:
                said = bench.read(name, data)
            faulthandler.cancel_dump_traceback_later()
            assert_one_sentence(said)
            counts[name][said is not None] += 1
            worst = {key: max(value, took[key]) for key, value in worst.items()}
    return {"read, refused": counts, **worst}


@pytest.mark.slow
def test_the_largest_pictures_take_what_is_stated(tmp_path: Path) -> None:
    side, file = int(MAX_PIXELS**0.5), tmp_path / "x"
    file.write_bytes(picture("PNG", np.zeros((side, side, 3), np.uint8)))
    with bounded(READ):
        assert read_image(file).shape == (side, side, 3)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(ZEROS) for _ in range(12)) + packer.flush()
    sides = {"_256": side, "_257": side, "_278": side}
    file.write_bytes(tiff(body, **sides, _258=64, _259=8, _262=2, _277=3, _339=3))
    with bounded(REFUSED):
        assert "its values of 8 bytes" in str(refusal(read_image, file))


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    child = (
        "import json, sys, pathlib; from tests.faults.test_bad_files import fuzz;"
        "print(json.dumps(fuzz(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", child, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    read, refused = map(sum, zip(*found["read, refused"].values(), strict=True))
    assert read + refused >= 2000
    assert min(read, refused) > 200  # neither is all that ever happens
