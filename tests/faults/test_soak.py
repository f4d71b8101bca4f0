"""Hours in small: training, predicting and sampling on and on, in memory that stays as it is.

SOAK_MINUTES sets how long the training lasts (30); predictions and samples are 2,000 each.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.model import DiffusionUNet
from diffusion.networks import automatic_config
from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.predict import Predictor, TensorSource
from segmentation.training import train
from unet import PRESETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
]
COUNT = 2000
ROOM = 100.0  # MiB by which memory may grow from the first quarter's end on


def resident() -> float:
    """MiB in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def assert_flat(times: list[float], memory: list[float], unit: str) -> None:
    """The line through memory after the first quarter grows by less than ROOM to the end."""
    x, y = np.array(times), np.array(memory)
    late = x > x[0] + (x[-1] - x[0]) / 4
    slope = float(np.polyfit(x[late], y[late], 1)[0])
    grown = slope * (x[late][-1] - x[late][0])
    print(f"{y[late].min():.0f} to {y[late].max():.0f} MiB, slope {slope:.4f} MiB a {unit}")
    assert grown < ROOM


def test_training_in_flat_memory(tmp_path):
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    times: list[float] = []
    memory: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            times.append(time.monotonic() / 60)
            memory.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(SegmentationOptions(out=tmp_path / "run", max_minutes=minutes, width=16, crop=128))
    finally:
        over.set()
        watcher.join()
    assert times[-1] - times[0] > 0.8 * minutes
    assert_flat(times, memory, "minute")


def test_predictions_in_flat_memory():
    torch.manual_seed(0)
    config = PRESETS["segmentation"].config
    predictor = Predictor([SegmentationUNet(config, 1).eval()], tile=128, overlap=32)
    rng = np.random.default_rng(0)
    memory = []
    for _ in range(COUNT):
        size = rng.integers(20, 200, 2).tolist()  # whole, and in tiles
        predictor(TensorSource(torch.randn(config.in_channels, *size)))
        memory.append(resident())
    assert_flat(list(range(COUNT)), memory, "prediction")


def test_samples_in_flat_memory():
    torch.manual_seed(0)
    config, _ = automatic_config(3, (32, 32), 20_000, 1, accelerator=False)
    info = {
        "schedule": NoiseSchedule().to_dict(),
        "prediction": "v",
        "size": [32, 32],
        "classes": [],
    }
    sampler = ImageSampler(DiffusionUNet(config, 3, info), SamplingOptions(steps=5, batch_size=10))
    memory = []
    for _ in sampler.batches(COUNT, [None] * COUNT):
        memory.append(resident())
    assert len(memory) == COUNT // 10
    assert_flat([10.0 * i for i in range(len(memory))], memory, "sample")
