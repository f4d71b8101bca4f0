"""Rows whose sides are the same work at growing sizes: how seconds and memory grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.work import Row, Work, random_image, trained
from diffusion.model import DiffusionUNet
from diffusion.networks import automatic_config
from diffusion.process.denoiser import Denoiser
from diffusion.process.loss import diffusion_loss
from diffusion.process.samplers import finish, sample
from diffusion.process.schedule import NoiseSchedule
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor, TensorSource
from unet import PRESETS
from unet.attention import Attention
from unet.device import training_format
from unet.memory import PREDICTED, keep_freed_memory
from unet.training.optimizer import make_optimizer
from unet.training.options import FitOptions
from unet.training.plan import plan_fit

SIDE = 32  # pixels of a diffusion model's images


def _predicted(side: int) -> Work:
    """As predict_seg.py does: larger images in tiles, a band at a time."""
    keep_freed_memory(PREDICTED)
    predictor = Predictor([SegmentationUNet(PRESETS["segmentation"].config, 1).eval()])
    source = TensorSource(random_image(1, side, side))

    def run() -> None:
        for _ in predictor.bands(source):
            pass

    return Work(run, predictor.models[0])


def _network(channels: int) -> DiffusionUNet:
    config, _ = automatic_config(3, (SIDE, SIDE), 20_000, 10, accelerator=False)
    model = DiffusionUNet(replace(config, channels=channels), 3)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _step(*, batch: int = 32, channels: int = 32) -> Work:
    model, schedule = _network(channels), NoiseSchedule()
    x0, noise = random_image(batch, 3, SIDE, SIDE) * 2 - 1, random_image(batch, 3, SIDE, SIDE)
    t = torch.arange(batch) * 1000 // batch
    model.to(memory_format=training_format(x0.device))  # type: ignore[call-overload]
    optimizer = make_optimizer(model, plan_fit(FitOptions(out=Path(), steps=1)))
    return trained(
        model, lambda: diffusion_loss(model, schedule, "v", x0, t, noise).mean(), optimizer
    )


def _attention(tokens: int) -> Work:
    model, x = Attention(64, 2), random_image(4, tokens, 64)

    @torch.inference_mode()
    def run() -> object:
        return model(x)

    return Work(run, model)


def _sampled(steps: int) -> Work:
    model = _network(32).eval()
    denoiser = Denoiser(model, NoiseSchedule(), "v")
    noise = random_image(16, 3, SIDE, SIDE)
    timesteps = denoiser.schedule.timesteps(steps, "trailing")

    @torch.inference_mode()
    def run() -> object:
        return finish(sample(denoiser, noise, timesteps, "dpmpp-2m"))

    return Work(run, model)


def _row(what: str, axis: str, sizes: Sequence[int], work: Callable[[int], Work]) -> Row:
    return Row(what, {str(n): lambda _, n=n: work(n) for n in sizes}, axis=axis)  # type: ignore[misc]


ROWS: dict[str, Row] = {
    "scale-image": _row(
        "segmentation of an image by the default network",
        "pixels a side",
        (256, 512, 1024, 2048, 4096, 8192),
        _predicted,
    ),
    "scale-batch": _row(
        "diffusion training step, 32 x 32, 32 channels",
        "images a batch",
        (4, 8, 16, 32, 64, 128),
        lambda n: _step(batch=n),
    ),
    "scale-channels": _row(
        "diffusion training step, 32 images of 32 x 32",
        "channels of level 0",
        (16, 32, 64, 128),
        lambda n: _step(channels=n),
    ),
    "scale-attention": _row(
        "self-attention of 4 maps, 64 channels, 2 heads",
        "tokens (pixels of the map)",
        (256, 1024, 4096, 16384),
        _attention,
    ),
    "scale-steps": _row(
        "16 samples of 32 x 32",
        "sampling steps",
        (5, 10, 20, 40, 80),
        _sampled,
    ),
}
