"""How long whole trainings take, and how busy they keep a GPU: trainings.py [--only folder isbi].

Each is what a command does, data and evaluations included. `folder`: a segmentation of a folder of
PNGs; `cifar10`: a diffusion model of DDPM's network of 32 x 32; `isbi` and `mnist`, of the folders
that ISBI2012_DIR and MNIST_DIR name: budgets that double until the membranes are parted and the
digits are recognised as well as asked. Each figure is written when it is there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from unet.errors import InputError  # noqa: E402
from unet.files.images import write_image  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet.training.run import read_log  # noqa: E402

TRAININGS = ("folder", "cifar10", "isbi", "mnist")
DATA = {"isbi": "ISBI2012_DIR", "mnist": "MNIST_DIR"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, and for how long."""

    only: tuple[str, ...] = TRAININGS
    """Which trainings: folder, cifar10, isbi, mnist."""

    images: int = 512
    """Generated images of 256 x 256 in the folder."""

    minutes: float = 1.0
    """Budget of folder, and the first one of isbi and mnist."""

    budgets: int = 5
    """Budgets of isbi and mnist, each twice the one before."""

    steps: int = 5000
    """Steps of cifar10."""

    network: str = "ddpm-cifar10"
    """Preset of cifar10's network."""

    v_rand: float = 0.945
    """V_Rand that isbi is to reach on slices 24 to 29."""

    recognised: float = 0.98
    """Share of 2,000 digits that mnist is to reach."""

    out: Path = Path("trainings.json")
    """File for the figures."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in TRAININGS:
                raise InputError(f"--only {name}: choose from {', '.join(TRAININGS)}")


def main(options: Options) -> None:
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    kinds: dict[str, Callable[[Options, Path], dict[str, Any]]] = {
        "folder": folder,
        "cifar10": cifar10,
        "isbi": isbi,
        "mnist": mnist,
    }
    for name in options.only:
        if (needs := DATA.get(name)) and needs not in os.environ:
            print(f"{name}: left out, as {needs} is not set", flush=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = kinds[name](options, Path(scratch))
        print(f"{name}: {found[name]}", flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def folder(options: Options, scratch: Path) -> dict[str, Any]:
    from segmentation.data.phantom import phantom_slice
    from segmentation.options import SegmentationOptions
    from segmentation.training import train

    for i in range(options.images):
        image, mask = phantom_slice(i)
        write_image(scratch / f"data/image/{i}.png", image)
        write_image(scratch / f"data/label/{i}.png", mask)
    run = scratch / "run"
    with watched() as seen:
        train(SegmentationOptions(data=str(scratch / "data"), out=run, max_minutes=options.minutes))
    return seen | speed(run)


def cifar10(options: Options, scratch: Path) -> dict[str, Any]:
    from diffusion.options import DiffusionOptions
    from diffusion.training import train

    run = scratch / "run"
    with watched() as seen:
        train(DiffusionOptions(out=run, network=options.network, steps=options.steps))
    return seen | speed(run)


def isbi(options: Options, scratch: Path) -> dict[str, Any]:
    from segmentation.options import SegmentationOptions
    from segmentation.training import train

    def reached(run: Path, minutes: float) -> float:
        data, held_out = os.environ["ISBI2012_DIR"], ("24-29",)
        options = SegmentationOptions(data=data, val_names=held_out, out=run, max_minutes=minutes)
        return train(options)["v_rand"]

    return doubled(options, scratch, options.v_rand, reached)


def mnist(options: Options, scratch: Path) -> dict[str, Any]:
    from diffusion.options import DiffusionOptions
    from diffusion.training import train

    digits = Path(os.environ["MNIST_DIR"])
    judge = scratch / "judge"
    data = str(digits / "mnist_train.npz")
    command("train-classifier", "--data", data, "--out", judge, "--max-minutes", 4)

    def reached(run: Path, minutes: float) -> float:
        train(DiffusionOptions(data=data, classes=True, out=run, max_minutes=minutes))
        file = run / "judged.json"
        judged = ("--data", digits / "mnist_test.npz", "--classifier", judge / "model")
        command("eval-ddpm", "--model", run / "model", *judged, "--count", 2000, "--out", file)
        return float(json.loads(file.read_text(encoding="utf-8"))["rows"][0]["class accuracy"])

    return doubled(options, scratch, options.recognised, reached)


def command(*words: object) -> None:
    """Runs one of the package's commands."""
    subprocess.run([sys.executable, "-m", "unet_diffusion", *map(str, words)], check=True, cwd=ROOT)


def doubled(
    options: Options, scratch: Path, wanted: float, reached: Callable[[Path, float], float]
) -> dict[str, Any]:
    """The figures of budgets that double, until one of them is reached."""
    figures: dict[float, float] = {}
    for k in range(options.budgets):
        minutes = options.minutes * 2**k
        figures[minutes] = round(float(reached(scratch / f"run-{k}", minutes)), 4)
        print(f"  {minutes:g} minutes: {figures[minutes]}", flush=True)
        if figures[minutes] >= wanted:
            break
    enough = [minutes for minutes, figure in figures.items() if figure >= wanted]
    return {"minutes": min(enough) if enough else None, "figures": figures}


def speed(run: Path) -> dict[str, Any]:
    """Images a second of the steps, from the run's own log."""
    last = [line for line in read_log(run / "metrics.jsonl") if "seconds" in line][-1]
    return {"steps": last["step"], "steps/s": round(last["step"] / last["seconds"], 3)}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Seconds, on a GPU its peak of memory and how busy it was, of what is done meanwhile."""
    seen: dict[str, Any] = {}
    shares: list[int] = []
    over = threading.Event()
    gpu = torch.cuda.is_available()

    def look() -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not over.wait(0.5):
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            shares.append(int(said.splitlines()[torch.cuda.current_device()]))

    watcher = threading.Thread(target=look, daemon=True)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        watcher.start()
    start = time.perf_counter()
    try:
        yield seen
    finally:
        over.set()
        seen["seconds"] = round(time.perf_counter() - start, 1)
        if gpu:
            watcher.join()
            seen["MiB"] = torch.cuda.max_memory_allocated() // 2**20
            seen["busy"] = round(statistics.mean(shares) / 100, 3) if shares else None


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
