"""What is measured: each row is a piece of work, each side does it with another code."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.model import DiffusionUNet
from diffusion.pipeline_folder import read_unet
from diffusion.prediction import diffusion_loss
from diffusion.samplers import finish, sample
from diffusion.schedule import NoiseSchedule
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor, TensorSource
from unet import PRESETS
from unet.training.options import FitOptions
from unet.training.plan import make_optimizer

MILESIAL = "MILESIAL_UNET"  # environment variable: a checkout of the classic PyTorch U-Net


@dataclass(frozen=True)
class Work:
    """One side of a row, set up."""

    run: Callable[[], object]
    model: nn.Module | None = None
    check: Callable[[], np.ndarray] | None = None  # what is compared with the other sides'

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) if self.model else 0


@dataclass(frozen=True)
class Row:
    """A piece of work."""

    what: str
    sides: Mapping[str, Callable[[Path], Work]]  # of a folder that the sides share; ours first
    repeats: int = 1  # runs a round
    tolerance: float | None = None  # by which the sides' `check` may differ, where they share one
    prepare: Callable[[Path], None] | None = None  # fills that folder, in a process of its own
    target: Mapping[str, float] | None = None  # side -> ratio of seconds that is aimed at
    needs: str | None = None  # an environment variable


# ----------------------------------------------------------------------------------------------
# Segmentation


def _image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def _trained(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> Work:
    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    model.train()
    return Work(run, model)


def _segmentation_step(model: nn.Module, shape: tuple[int, ...], *, ours: bool) -> Work:
    image = _image(*shape)
    mask = (_image(shape[0], 1, *shape[2:]) > 0.5).float()
    if ours:  # as the trainer does
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
        image = image.contiguous(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, FitOptions(out=Path(), steps=1))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(model(image), mask)

    return _trained(model, loss, optimizer)


def _classic() -> SegmentationUNet:
    return SegmentationUNet(replace(PRESETS["classic"].config, in_channels=1), 1)


def _narrow_classic() -> SegmentationUNet:
    """The classic network with as many parameters as our default has."""
    wanted = sum(p.numel() for p in _default().parameters())
    sizes = {}
    for channels in range(8, 65):
        with torch.device("meta"):
            config = replace(PRESETS["classic"].config, in_channels=1, channels=channels)
            sizes[channels] = sum(p.numel() for p in SegmentationUNet(config, 1).parameters())
    best = min(sizes, key=lambda c: abs(sizes[c] - wanted))
    return SegmentationUNet(replace(PRESETS["classic"].config, in_channels=1, channels=best), 1)


def _default() -> SegmentationUNet:
    return SegmentationUNet(replace(PRESETS["segmentation"].config, in_channels=1), 1)


def _basic_unet() -> nn.Module:
    from monai.networks.nets import BasicUNet

    features = (64, 128, 256, 512, 1024, 64)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=features)


def _milesial() -> nn.Module:
    """The checkout's own network, with bilinear enlarging, one grey channel and one logit."""
    folder = Path(os.environ[MILESIAL]) / "unet"
    spec = importlib.util.spec_from_file_location(
        "milesial", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} is no package: set {MILESIAL} to a checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules["milesial"] = module
    spec.loader.exec_module(module)
    return module.UNet(n_channels=1, n_classes=1, bilinear=True)


def _predicted(side: int) -> Work:
    model = _classic().eval()
    predictor = Predictor([model])
    source = TensorSource(_image(1, side, side))
    return Work(lambda: predictor(source), model)


def _predicted_by_monai(model: nn.Module, side: int) -> Work:
    from monai.inferers import SlidingWindowInferer

    image = _image(1, 1, side, side)
    model.eval()
    infer = SlidingWindowInferer(roi_size=(512, 512), sw_batch_size=1, overlap=0.125)

    @torch.no_grad()
    def run() -> Tensor:
        return infer(image, model).sigmoid() if side > 512 else model(image).sigmoid()

    return Work(run, model)


# ----------------------------------------------------------------------------------------------
# Diffusion, with diffusers' own random weights

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


def _ddpm_step(model: nn.Module, size: int, *, ours: bool, precision: str = "fp32") -> Work:
    batch = 64 if size == 32 else 16
    x0, noise = _image(batch, 3, size, size) * 2 - 1, _image(batch, 3, size, size)
    t = torch.arange(batch) * 1000 // batch
    schedule = NoiseSchedule("linear")
    if ours:
        optimizer = make_optimizer(model, FitOptions(out=Path(), steps=1, lr=1e-4))

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return diffusion_loss(model, schedule, "eps", x0, t, noise).mean()
    else:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def loss() -> Tensor:
            noisy = scheduler.add_noise(x0, noise, t)
            return F.mse_loss(model(noisy, t).sample, noise)

    work = _trained(model, loss, optimizer)
    return replace(work, check=lambda: loss().detach().numpy())


def _evaluation(model: Any, *, ours: bool) -> Work:
    model.eval()
    x, t = _image(64, 3, 32, 32), torch.full((64,), 500)

    @torch.inference_mode()
    def run() -> Tensor:
        return model(x, t) if ours else model(x, t).sample

    return Work(run, model, lambda: run().numpy())


def _sampled(model: Any, steps: int, kind: str) -> Work:
    """64 samples of 32 x 32 from the same noise."""
    model.eval()
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    if kind == "ours":
        denoiser = Denoiser(model, NoiseSchedule("linear"), "eps")
        timesteps = denoiser.schedule.timesteps(steps, "trailing")

        @torch.inference_mode()
        def run() -> Tensor:
            return finish(sample(denoiser, noise, timesteps, "ddim"))
    else:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing")

        @torch.no_grad()
        def run() -> Tensor:
            scheduler.set_timesteps(steps)
            x = noise
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample
            return x

    return Work(run, model, lambda: run().numpy())


def _sd_v1(folder: Path, *, ours: bool) -> Work:
    x, context = _image(2, 4, 64, 64), _image(2, 77, 768)
    t = torch.full((2,), 500)
    if ours:
        mine = read_unet(folder / "sd-v1").eval()
        mine.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = lambda: mine(x, t, context)  # noqa: E731
        model: Any = mine
    else:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_pretrained(folder / "sd-v1").eval()
        forward = lambda: model(x, t, context).sample  # noqa: E731

    @torch.inference_mode()
    def run() -> Tensor:
        return forward()

    return Work(run, model, lambda: run().numpy())


# ----------------------------------------------------------------------------------------------
# Data and metrics


def _crops(kind: str) -> Work:
    """A batch of four augmented crops of 256 x 256 with their masks."""
    image, mask = _image(1, 512, 512), (_image(1, 512, 512) > 0.5).to(torch.uint8)
    size = (256, 256)
    if kind == "ours":
        from segmentation.augment import Augmentation, augmented_crop

        rng = np.random.default_rng(0)
        augmentation = Augmentation()

        def run() -> object:
            return [augmented_crop(image, [mask[0]], rng, augmentation, size) for _ in range(4)]
    else:
        from monai import transforms

        both = ("image", "mask")
        modes = ("bilinear", "nearest")
        chain = transforms.Compose(
            [
                transforms.Rand2DElasticd(
                    both, (32, 32), (1, 4), prob=1, rotate_range=3.14, scale_range=0.1,
                    spatial_size=(512, 512), mode=modes, padding_mode="reflection",
                ),
                transforms.RandSpatialCropd(both, size, random_size=False),
                transforms.RandFlipd(both, 0.5, 0),
                transforms.RandGaussianNoised("image", 1),
                transforms.RandAdjustContrastd("image", 1),
            ]
        )  # fmt: skip

        def run() -> object:
            return [chain({"image": image, "mask": mask}) for _ in range(4)]

    return Work(run)


def _rand(kind: str) -> Work:
    """V_Rand of a 512 x 512 slice at one threshold."""
    from segmentation.metrics import components, overlap, rand_score, thin_borders

    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((2, 1, 512, 512))).float()
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 9, 1, 4), 9, 1, 4).numpy()
    truth, mask = smooth[0, 0].astype(float) > -0.05, smooth[1, 0] + smooth[0, 0] > -0.05
    wanted = thin_borders(truth)

    def ours() -> float:
        return rand_score(overlap(wanted, components(mask))).f

    def theirs() -> float:
        from skimage.measure import label
        from skimage.metrics import adapted_rand_error

        found = label(mask, connectivity=1)
        found[~mask] = found.max() + 1 + np.arange((~mask).sum())  # membranes: pixels on their own
        return 1 - adapted_rand_error(wanted, found, ignore_labels=(0,))[0]

    run = ours if kind == "ours" else theirs
    return Work(run, check=lambda: np.asarray(run()))


_STEP = "segmentation training step, "
ROWS: dict[str, Row] = {
    "classic-step": Row(
        _STEP + "classic with 64 channels, 1 x 256 x 256, float32",
        {
            "ours": lambda _: _segmentation_step(_classic(), (1, 1, 256, 256), ours=True),
            "MONAI BasicUNet": lambda _: _segmentation_step(
                _basic_unet(), (1, 1, 256, 256), ours=False
            ),
        },
        target={"MONAI BasicUNet": 0.85},
    ),
    "classic-step-milesial": Row(
        _STEP + "classic with 64 channels, 1 x 256 x 256, float32",
        {
            "ours": lambda _: _segmentation_step(_classic(), (1, 1, 256, 256), ours=True),
            "milesial": lambda _: _segmentation_step(_milesial(), (1, 1, 256, 256), ours=False),
        },
        target={"milesial": 0.85},
        needs=MILESIAL,
    ),
    "default-step": Row(
        _STEP + "4 x 256 x 256, float32: our default, and a classic network of as many parameters",
        {
            "ours": lambda _: _segmentation_step(_default(), (4, 1, 256, 256), ours=True),
            "classic, NCHW": lambda _: _segmentation_step(
                _narrow_classic(), (4, 1, 256, 256), ours=False
            ),
        },
        target={"classic, NCHW": 0.75},
    ),
    "predict-512": Row(
        "segmentation of 512 x 512 by classic with 64 channels",
        {
            "ours": lambda _: _predicted(512),
            "MONAI BasicUNet": lambda _: _predicted_by_monai(_basic_unet(), 512),
        },
        target={"MONAI BasicUNet": 0.65},
    ),
    "predict-4096": Row(
        "segmentation of 4096 x 4096 by classic with 64 channels, in tiles",
        {
            "ours": lambda _: _predicted(4096),
            "MONAI sliding window": lambda _: _predicted_by_monai(_basic_unet(), 4096),
        },
    ),
    "ddpm-step-32": Row(
        "DDPM training step, 64 x 3 x 32 x 32, the same weights, float32",
        {
            "ours": lambda d: _ddpm_step(_ours(d), 32, ours=True),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 32, ours=False),
        },
        tolerance=1e-4,
        prepare=_save_ddpm,
        target={"diffusers": 0.80},
    ),
    "ddpm-step-32-bf16": Row(
        "the same in bfloat16, as the trainer takes by itself on this processor",
        {
            "ours": lambda d: _ddpm_step(_ours(d), 32, ours=True, precision="bf16"),
            "diffusers": lambda d: _ddpm_step(_theirs(d), 32, ours=False),
        },
        prepare=_save_ddpm,
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
    ),
    "sampling": Row(
        "64 samples of 32 x 32 in 10 DDIM steps, the same weights and noise",
        {
            "ours": lambda d: _sampled(_ours(d), 10, "ours"),
            "diffusers": lambda d: _sampled(_theirs(d), 10, "diffusers"),
        },
        tolerance=1e-3,
        prepare=_save_ddpm,
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
    "augmentation": Row(
        "four augmented crops of 256 x 256 with masks",
        {"ours": lambda _: _crops("ours"), "MONAI": lambda _: _crops("MONAI")},
        repeats=5,
    ),
    "v-rand": Row(
        "V_Rand of a 512 x 512 slice at one threshold",
        {"ours": lambda _: _rand("ours"), "scikit-image": lambda _: _rand("scikit-image")},
        repeats=10,
        tolerance=1e-5,  # scikit-image leaves out the pairs of a pixel with itself
    ),
}
