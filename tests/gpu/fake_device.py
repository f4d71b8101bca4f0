"""A rehearsal on an accelerator that computes nothing: `python fake_device.py PART`.

Tensors have a shape, a type and the device "fake" and no values. So whatever waits for a value of
theirs fails here, and whatever mixes devices does, as it would on a GPU, where the first costs
time and the second ends the run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration

from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.guidance import Guided
from diffusion.process.loss import Weighting, diffusion_loss
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.samplers import SamplerName, finish, sample
from diffusion.process.schedule import NoiseSchedule
from segmentation.losses import LOSSES, make_loss
from segmentation.model import SegmentationUNet
from unet import PRESETS, UNetConfig
from unet.training.ema import EMA
from unet.training.muon import Muon

SCHEDULE = NoiseSchedule(kind="cosine")


def shortest(config: UNetConfig) -> UNetConfig:
    """Each kind of layer once, in two levels: a second one waits where the first does."""
    config = replace(config, blocks=1, transformer_depth=1)
    if config.decoder != "unet":  # that adds maps of several levels
        return config
    decoder = config.decoder_multipliers
    return replace(
        config,
        multipliers=config.multipliers[:2],
        decoder_multipliers=decoder and decoder[:1],
        attention_levels=(1,) if config.attention_levels else (),
    )


CONFIG = shortest(PRESETS["diffusion"].config)
# Where the network is not what is rehearsed.
SMALLEST = replace(CONFIG, multipliers=(1,), attention_levels=(), middle_attention=False)

MODE = FakeTensorMode()  # one for all, as tables are kept between calls


def fake() -> FakeTensorMode:
    return MODE


def on_it(kind: Any, *arguments: Any) -> Any:
    """A model whose weights are there."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = kind(*arguments)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device="fake"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="fake")
    return model


def given(config: UNetConfig, side: int) -> dict[str, Tensor]:
    """What the forward of a config takes."""
    inputs = {"x": torch.randn(2, config.in_channels, side, side)}
    if config.time:
        inputs["t"] = torch.randint(0, 1000, (2,))
    if config.context_channels is not None:
        inputs["context"] = torch.randn(2, 77, config.context_channels)
        inputs["mask"] = torch.ones(2, 77, dtype=torch.bool)
    if config.vector_channels:
        inputs["vector"] = torch.randn(2, config.vector_channels)
    return {name: value.to("fake") for name, value in inputs.items()}


def presets() -> None:
    for name, preset in PRESETS.items():
        with fake():
            kind: Any = DiffusionUNet if preset.config.time else SegmentationUNet
            config = shortest(preset.config)
            model = on_it(kind, config, preset.out_channels)
            found = model(**given(config, 188 if name == "paper" else 64))
            found.square().mean().backward()
            assert all(p.grad is not None for p in model.parameters()), name


def losses() -> None:
    for name in LOSSES:
        for classes in (1,) if name == "bce" else (1, 3):
            with fake():
                logits = torch.randn(2, classes, 16, 16, device="fake", requires_grad=True)
                target = torch.randint(0, max(2, classes), (2, 16, 16), device="fake")
                weight = torch.ones(2, 16, 16, device="fake")
                make_loss(name, classes)(logits, target, weight).backward()


def diffusion_losses() -> None:
    with fake():
        models = {channels: on_it(DiffusionUNet, SMALLEST, channels) for channels in (3, 6)}
        for prediction in PREDICTIONS:
            for weighting in get_args(Weighting):
                for model in models.values():
                    x0, t = (given(SMALLEST, 32)[name] for name in "xt")
                    noise = torch.randn_like(x0)
                    loss = diffusion_loss(
                        model, SCHEDULE, prediction, x0, t, noise, weighting=weighting
                    )
                    loss.mean().backward()


def steps() -> None:
    """Gradients, their norm, the optimizers and the average of the weights."""
    with fake():
        model, average = (on_it(DiffusionUNet, CONFIG, 3) for _ in "12")
        ema = object.__new__(EMA)  # whose copy of the model would leave the mode
        ema.model, ema.decay = average, 0.999
        ema.followed = None
        model(**given(CONFIG, 32)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        Muon(model, lr=0.02, momentum=0.8, beta2=0.99, weight_decay=0.1).step()
        torch.optim.AdamW(model.parameters(), lr=0.02, fused=True).step()
        ema.update(model, 3)


class Noise(NoiseSource):
    """Noise without generators, which would have to draw."""

    def __init__(self) -> None:
        pass

    def like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape).to(x)

    def check(self, x: Tensor) -> None:
        pass


def samplers() -> None:
    with fake():
        model = on_it(DiffusionUNet, replace(SMALLEST, classes=4, jumps=True), 3)
        denoiser: Any = Denoiser(model, SCHEDULE, "v")
        wanted, none = (torch.zeros(n, dtype=torch.long, device="fake") for n in (2, 1))
        for kind in (denoiser, Guided(denoiser, 2.0, {"classes": none})):
            for name in get_args(SamplerName):
                x, times = given(SMALLEST, 32)["x"], SCHEDULE.timesteps(4)
                given_classes = {"classes": wanted}
                run = sample(
                    Clipped(kind), x, times, name, noise=Noise(), conditioning=given_classes
                )
                finish(run)


def a_wait() -> None:
    with fake():
        float(torch.ones(1, device="fake"))


def two_devices() -> None:
    with fake():
        torch.ones(3, device="fake") + torch.ones(3)


if __name__ == "__main__":
    level = NoiseSchedule.level

    def on_the_host(schedule: NoiseSchedule, t: float) -> Any:
        """The level of one timestep is of numbers on the host, whatever computes the images."""
        with unset_fake_temporarily():
            return level(schedule, t)

    NoiseSchedule.level = on_the_host  # type: ignore[method-assign]
    backend_registration._setup_privateuseone_for_python_backend("fake")
    globals()[sys.argv[1]]()
    os._exit(0)  # the device has a thread for the backward pass that nothing ends
