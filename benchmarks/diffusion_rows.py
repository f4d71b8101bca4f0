"""Rows of diffusion: training steps, evaluations and sampling, with diffusers' random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import DEVICE, Row, Work, random_image, trained
from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Denoiser
from diffusion.process.loss import diffusion_loss
from diffusion.process.samplers import SamplerName, finish, sample
from diffusion.process.schedule import NoiseSchedule
from diffusion.stable.folder import read_unet
from unet.device import training_format
from unet.training.optimizer import make_optimizer
from unet.training.options import FitOptions
from unet.training.plan import plan_fit

_CHANNELS = (64, 128, 128)


def _save_ddpm(folder: Path) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        block_out_channels=_CHANNELS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "ddpm")


def _save_ddpm_256(folder: Path) -> None:
    """DDPM's network of images of 256 x 256 (arXiv 2006.11239, appendix B)."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        layers_per_block=2,
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    ).save_pretrained(folder / "ddpm")


def _save_sd_v1(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(folder / "sd-v1")


def _theirs(folder: Path) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(folder / "ddpm")


def _ours(folder: Path) -> DiffusionUNet:
    model = read_unet(folder / "ddpm")
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _ddpm_step(
    model: nn.Module, size: int, *, ours: bool, precision: str = "fp32", compiled: bool = False
) -> Work:
    batch = {32: 64, 64: 16, 256: 16}[size]
    x0, noise = random_image(batch, 3, size, size) * 2 - 1, random_image(batch, 3, size, size)
    t = torch.arange(batch, device=DEVICE) * 1000 // batch
    schedule = NoiseSchedule(kind="linear")
    model.to(DEVICE)
    if compiled:
        model.compile()
    if ours:
        model.to(memory_format=training_format(x0.device))  # type: ignore[call-overload]
        optimizer = make_optimizer(model, plan_fit(FitOptions(out=Path(), steps=1, lr=1e-4)))

        def loss() -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                return diffusion_loss(model, schedule, "eps", x0, t, noise).mean()
    else:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def loss() -> Tensor:
            noisy = scheduler.add_noise(x0, noise, t)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                return F.mse_loss(model(noisy, t).sample, noise)

    work = trained(model, loss, optimizer)
    return replace(work, check=lambda: loss().detach().cpu().numpy())


def _evaluation(model: Any, *, ours: bool) -> Work:
    model.to(DEVICE).eval()
    x, t = random_image(64, 3, 32, 32), torch.full((64,), 500, device=DEVICE)

    @torch.inference_mode()
    def run() -> Tensor:
        return model(x, t) if ours else model(x, t).sample

    return Work(run, model, lambda: run().cpu().numpy())


def _sampled(
    model: Any, steps: int, sampler: SamplerName, *, ours: bool, compiled: bool = False
) -> Work:
    """64 samples of 32 x 32 from the same noise, compiled ones in bfloat16."""
    model.to(DEVICE).eval()
    if compiled:
        model.compile()
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    if ours:
        denoiser = Denoiser(model, NoiseSchedule(kind="linear"), "eps")
        timesteps = denoiser.schedule.timesteps(steps, "trailing")

        @torch.inference_mode()
        def run() -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=compiled):
                return finish(sample(denoiser, noise, timesteps, sampler))
    else:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        if sampler == "ddim":
            scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing")
        else:
            scheduler = DPMSolverMultistepScheduler(1000, timestep_spacing="trailing")

        @torch.no_grad()
        def run() -> Tensor:
            scheduler.set_timesteps(steps)
            x = noise
            for t in scheduler.timesteps:
                with torch.autocast(DEVICE, torch.bfloat16, enabled=compiled):
                    predicted = model(x, t).sample
                x = scheduler.step(predicted.float(), t, x).prev_sample
            return x

    return Work(run, model, lambda: run().cpu().numpy())


def _sd_v1(folder: Path, *, ours: bool) -> Work:
    x, context = random_image(2, 4, 64, 64), random_image(2, 77, 768)
    t = torch.full((2,), 500, device=DEVICE)
    if ours:
        mine = read_unet(folder / "sd-v1").to(DEVICE).eval()
        mine.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = lambda: mine(x, t, context)  # noqa: E731
        model: Any = mine
    else:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_pretrained(folder / "sd-v1").to(DEVICE).eval()
        forward = lambda: model(x, t, context).sample  # noqa: E731

    @torch.inference_mode()
    def run() -> Tensor:
        return forward()

    return Work(run, model, lambda: run().cpu().numpy())


ROWS: dict[str, Row] = {
    "ddpm-step-32": Row(
        "DDPM training step, 64 x 3 x 32 x 32, the same weights, float32",
        {
            "ours": lambda d: _ddpm_step(_ours(d), 32, ours=True),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 32, ours=False),
        },
        tolerance=1e-4,
        prepare=_save_ddpm,
        target={"diffusers": 0.80},
        images=64,
    ),
    "ddpm-step-32-bf16": Row(
        "the same in bfloat16, as the trainer takes by itself on this processor",
        {
            "ours": lambda d: _ddpm_step(_ours(d), 32, ours=True, precision="bf16"),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 32, ours=False),
        },
        prepare=_save_ddpm,
        images=64,
    ),
    "ddpm-step-64": Row(
        "DDPM training step, 16 x 3 x 64 x 64, the same weights, float32",
        {
            "ours": lambda d: _ddpm_step(_ours(d), 64, ours=True),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 64, ours=False),
        },
        tolerance=1e-4,
        prepare=_save_ddpm,
        target={"diffusers": 0.80},
        images=16,
    ),
    "ddpm-step-64-compiled": Row(
        "DDPM training step, 16 x 3 x 64 x 64, the same weights, bfloat16",
        {
            "ours, compiled": lambda d: _ddpm_step(
                _ours(d), 64, ours=True, precision="bf16", compiled=True
            ),
            "ours": lambda d: _ddpm_step(_ours(d), 64, ours=True, precision="bf16"),
            "diffusers, compiled": lambda d: _ddpm_step(
                _theirs(d), 64, ours=False, precision="bf16", compiled=True
            ),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 64, ours=False, precision="bf16"),
        },
        prepare=_save_ddpm,
        target={"diffusers, compiled": 0.80, "diffusers": 0.60},
        gpu=True,
        images=16,
    ),
    "ddpm-256-step": Row(
        "training step of ddpm-256, 16 x 3 x 256 x 256, the same weights, bfloat16",
        {
            "ours, compiled": lambda d: _ddpm_step(
                _ours(d), 256, ours=True, precision="bf16", compiled=True
            ),
            "ours": lambda d: _ddpm_step(_ours(d), 256, ours=True, precision="bf16"),
            "diffusers, compiled": lambda d: _ddpm_step(
                _theirs(d), 256, ours=False, precision="bf16", compiled=True
            ),
        },
        prepare=_save_ddpm_256,
        target={"diffusers, compiled": 0.80},
        gpu=True,
        images=16,
    ),
    "evaluation": Row(
        "one network evaluation, 64 x 3 x 32 x 32, the same weights",
        {
            "ours": lambda d: _evaluation(_ours(d), ours=True),
            "diffusers": lambda d: _evaluation(_theirs(d), ours=False),
        },
        tolerance=1e-4,
        prepare=_save_ddpm,
        target={"diffusers": 0.80},
        images=64,
    ),
    "sampling": Row(
        "64 samples of 32 x 32 in 10 DDIM steps, the same weights and noise",
        {
            "ours": lambda d: _sampled(_ours(d), 10, "ddim", ours=True),
            "diffusers": lambda d: _sampled(_theirs(d), 10, "ddim", ours=False),
        },
        tolerance=1e-3,
        prepare=_save_ddpm,
        images=64,
    ),
    "sampling-compiled": Row(
        "64 samples of 32 x 32 in 10 DDIM steps, the same weights and noise, bfloat16, compiled",
        {
            "ours": lambda d: _sampled(_ours(d), 10, "ddim", ours=True, compiled=True),
            "diffusers": lambda d: _sampled(_theirs(d), 10, "ddim", ours=False, compiled=True),
        },
        prepare=_save_ddpm,
        target={"diffusers": 0.60},
        gpu=True,
        images=64,
    ),
    "sampling-dpm": Row(
        "64 samples of 32 x 32 in 10 steps of DPM-Solver++(2M), the same weights and noise",
        {
            "ours": lambda d: _sampled(_ours(d), 10, "dpmpp-2m", ours=True),
            "diffusers": lambda d: _sampled(_theirs(d), 10, "dpmpp-2m", ours=False),
        },
        tolerance=1e-3,
        prepare=_save_ddpm,
        images=64,
    ),
    "sd-v1": Row(
        "sd-v1 U-Net forward, 2 x 4 x 64 x 64, the same weights, float32",
        {
            "ours": lambda d: _sd_v1(d, ours=True),
            "diffusers": lambda d: _sd_v1(d, ours=False),
        },
        tolerance=1e-4,
        prepare=_save_sd_v1,
        target={"diffusers": 0.95},
    ),
}
