"""A browser, tiny models, and the page that serves them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from unet.files.images import write_image

ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds, of a busy machine
SIDE = 64  # pixels of the images
NAMES = ("chromium", "chromium-browser", "google-chrome")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """The default run does not import Gradio, which takes seconds."""
    return True if "not browser" in config.option.markexpr else None


def unet(*words: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "unet_diffusion", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        line, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*words: object) -> None:
    process = unet(*words)
    said, _ = process.communicate()
    assert process.returncode == 0, said


def square(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on a dark ground, with noise, and its mask of 0 and 7."""
    rng = np.random.default_rng(seed)
    image, mask = rng.normal(70, 12, (SIDE, SIDE)), np.zeros((SIDE, SIDE), np.uint8)
    top, left = rng.integers(8, 24, 2)
    mask[top : top + 32, left : left + 32] = 7
    image[mask > 0] += 70
    return image.clip(0, 255).astype(np.uint8), mask


@dataclass(frozen=True)
class Served:
    """A page that is open, and what it was given."""

    address: str
    folder: Path
    runs: Path
    model: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Runs that have hardly begun: a segmentation, a model of shapes with captions, one that makes
    images from masks, and one that makes masks from images."""
    folder = tmp_path_factory.mktemp("page")
    for i in range(4):
        for name, array in zip(("image", "label"), square(i), strict=True):
            write_image(folder / "data" / name / f"{i}.png", array)
    common = ("--workers", 0, "--device", "cpu")
    seg = ("--network", "segmentation-quick", "--width", 8, "--steps", 1, "--val", 0.5)
    run("train-seg", "--data", folder / "data", *seg, *common, "--out", folder / "runs/squares")
    ddpm = ("--data", "shapes", "--captions", "--size", 16, "--width", 8, "--steps", 2)
    run("train-ddpm", *ddpm, *common, "--out", folder / "runs/shapes")
    image, label = (folder / "data" / name for name in ("image", "label"))
    for name, of, given, more in (
        ("from-masks", image, label, ()),
        ("to-masks", label, image, ("--target", "mask")),
    ):
        said = ("--data", of, "--condition", given, "--size", 16, "--width", 8, "--steps", 2, *more)
        run("train-ddpm", *said, *common, "--out", folder / "runs" / name)
    return folder / "runs"


@contextmanager
def opened(*words: object) -> Iterator[str]:
    """A page that is served by the command, at the address that it says."""
    process = unet("app", *words)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("the page: "):
            break
    assert said[-1].startswith("the page: http://127.0.0.1:"), said
    yield said[-1].split()[2]
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert "unet_diffusion/page" not in rest, rest  # a traceback of ours
    assert process.returncode == 0


@pytest.fixture(scope="session")
def served(runs, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("app")
    models = [runs / name / "model" for name in ("squares", "shapes", "from-masks", "to-masks")]
    limits = ("--max-upload", 1, "--max-pixels", 300_000)
    with opened("--model", *models, "--folder", folder, "--runs", runs, *limits) as address:
        yield Served(address, folder, runs, models[0])


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A Chromium that is on this machine: named by CHROMIUM, or found by its usual names."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[app,browser]'")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium: apt install chromium, or name one by CHROMIUM")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser, served) -> Iterator[object]:
    """A window of a reader of the page. Nothing in it may ask another machine for anything."""
    window = browser.new_context(viewport={"width": 800, "height": 900})
    page = window.new_page()
    page.set_default_timeout(PATIENCE)
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(served.address)
    page.wait_for_selector("#label-files")
    yield page
    window.close()
    local = (served.address, "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []
