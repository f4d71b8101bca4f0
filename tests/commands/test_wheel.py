"""The wheel in an empty environment, far from the checkout: commands, and three lines of Python."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from segmentation.data.phantom import phantom_stack
from unet.files.images import read_image, write_image
from unet_diffusion.main import NAMES

ROOT = Path(__file__).parents[2]
PACKAGES = ("unet", "diffusion", "segmentation", "unet_diffusion")
SMALL = ("--width", 8, "--batch-size", 2, "--steps", 3, "--evaluations", 1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PACKAGES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert held == {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    assert "segmentation/recipes/quick.yaml" in held


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel and what it needs (a few minutes of pip)."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True)
    return python.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and masks in data/, and images in new_images/."""
    folder = tmp_path_factory.mktemp("work")
    images, labels = phantom_stack(6, (64, 64), seed=1)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        write_image(folder / f"data/image/{i}.png", image)
        write_image(folder / f"data/label/{i}.png", label)
        write_image(folder / f"new_images/{i}.png", image)
    return folder


def installed(programs: Path, work: Path, *command: object) -> str:
    """What an installed program prints, where the shell finds it and no checkout is near."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environ["PATH"] = os.pathsep.join([str(programs), environ["PATH"]])
    program, *arguments = map(str, command)
    done = subprocess.run(
        [programs / program, *arguments], capture_output=True, text=True, cwd=work, env=environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def test_unet_lists_the_installed_commands(programs: Path, work: Path) -> None:
    assert installed(programs, work, "unet", "--version").startswith("unet-diffusion ")
    text = installed(programs, work, "unet")
    for name in NAMES:
        assert name in text
        assert f"usage: unet-{name}" in installed(programs, work, f"unet-{name}", "--help")


@pytest.fixture(scope="module")
def trained(programs: Path, work: Path) -> str:
    """What unet-train-seg said, whose run is run/."""
    train = ("--data", "data", "--out", "run", "--crop", 32, "--recipe", "quick", *SMALL)
    return installed(programs, work, "unet-train-seg", *train)


def test_segmentation_by_the_installed_commands(programs: Path, work: Path, trained: str) -> None:
    assert last_line(trained) == (
        "next: unet-predict-seg --model run/model --input new_images --out predictions"
    )
    said = installed(programs, work, *last_line(trained).split()[1:])
    assert "6 of 6 images predicted" in said
    assert last_line(said).startswith("next: unet-eval-seg --model run/model --data ")
    mask = read_image(work / "predictions/0_mask.png")
    assert mask.shape[:2] == (64, 64)

    scores = ("--model", "run/model", "--data", "data", "--split", "all", "--out", "scores")
    said = installed(programs, work, "unet", "eval-seg", *scores)
    assert last_line(said).startswith("next: unet predict-seg --model run/model ")
    assert (work / "scores/scores.json").is_file()


@pytest.mark.usefixtures("trained")
def test_three_lines_of_python_on_the_model(programs: Path, work: Path) -> None:
    lines = (
        "import numpy as np\n"
        "image = np.zeros((64, 64), np.uint8)\n"
        "from segmentation import load\n"
        "model = load('run/model')\n"
        "mask = model(image)\n"
        "assert mask.shape == (64, 64), mask.shape\n"
        "import segmentation; print(segmentation.__file__)\n"
    )
    file = Path(installed(programs, work, "python", "-c", lines).strip())
    assert file.is_relative_to(programs.parent)


def test_diffusion_by_the_installed_commands(programs: Path, work: Path) -> None:
    train = ("--data", "data/image", "--size", 16, "--out", "drawn", "--val", 2, *SMALL)
    said = installed(programs, work, "unet-train-ddpm", *train)
    assert last_line(said) == "next: unet-sample-ddpm --model drawn/model --out samples"
    said = installed(programs, work, *last_line(said).split()[1:], "--count", 2, "--steps", 2)
    assert "images: samples/grid.png" in said
    assert last_line(said) == "next: unet-eval-ddpm --model drawn/model --data data/image"
    assert len(list((work / "samples/images").glob("*.png"))) == 2
