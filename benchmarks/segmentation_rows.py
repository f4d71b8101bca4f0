"""Rows of segmentation: training steps, prediction, augmentation and metrics."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import DEVICE, Row, Work, random_image, trained
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor, TensorSource
from unet import PRESETS
from unet.device import training_format
from unet.memory import PREDICTED, keep_freed_memory
from unet.training.optimizer import make_optimizer
from unet.training.options import FitOptions
from unet.training.plan import plan_fit

MILESIAL = "MILESIAL_UNET"  # environment variable: a checkout of the classic PyTorch U-Net


def _segmentation_step(
    model: nn.Module, shape: tuple[int, ...], *, ours: bool, precision: str = "fp32"
) -> Work:
    image = random_image(*shape)
    model.to(DEVICE)
    mask = (random_image(shape[0], 1, *shape[2:]) > 0.5).float()
    if ours:  # as the trainer does
        model.to(memory_format=training_format(image.device))  # type: ignore[call-overload]
        optimizer = make_optimizer(model, plan_fit(FitOptions(out=Path(), steps=1)))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            return F.binary_cross_entropy_with_logits(model(image), mask)

    return trained(model, loss, optimizer)


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
    """The checkout's own network, one grey channel and one logit."""
    folder = Path(os.environ[MILESIAL]) / "unet"
    spec = importlib.util.spec_from_file_location(
        "milesial", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} is no package: set {MILESIAL} to a checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules["milesial"] = module
    spec.loader.exec_module(module)
    return module.UNet(n_channels=1, n_classes=1, bilinear=False)


def _predicted(side: int) -> Work:
    keep_freed_memory(PREDICTED)  # as predict_seg.py does
    predictor = Predictor([_classic().to(DEVICE).eval()])
    source = TensorSource(random_image(1, side, side).cpu())
    return Work(lambda: predictor(source), predictor.models[0])


def _predicted_by_monai(model: nn.Module, side: int) -> Work:
    from monai.inferers import SlidingWindowInferer

    image = random_image(1, 1, side, side)
    model.to(DEVICE).eval()
    infer = SlidingWindowInferer(roi_size=(512, 512), sw_batch_size=1, overlap=0.125)

    @torch.no_grad()
    def run() -> Tensor:
        return infer(image, model).sigmoid() if side > 512 else model(image).sigmoid()

    return Work(run, model)


def _crops(kind: str) -> Work:
    """A batch of four augmented crops of 256 x 256 with their masks."""
    image, mask = random_image(1, 512, 512), (random_image(1, 512, 512) > 0.5).to(torch.uint8)
    size = (256, 256)
    if kind == "ours":
        from segmentation.data.augment import Augmentation, augmented_crop

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
    from segmentation.judging.isbi import components, overlap, rand_score, thin_borders

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
        images=1,
    ),
    "classic-step-milesial": Row(
        _STEP + "classic with 64 channels, 1 x 256 x 256, float32",
        {
            "ours": lambda _: _segmentation_step(_classic(), (1, 1, 256, 256), ours=True),
            "milesial": lambda _: _segmentation_step(_milesial(), (1, 1, 256, 256), ours=False),
        },
        target={"milesial": 0.85},
        needs=MILESIAL,
        images=1,
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
        images=4,
    ),
    "default-step-bf16": Row(
        _STEP + "32 x 256 x 256 in bfloat16: our default, and MONAI's BasicUNet of 64 channels",
        {
            "ours": lambda _: _segmentation_step(
                _default(), (32, 1, 256, 256), ours=True, precision="bf16"
            ),
            "MONAI BasicUNet": lambda _: _segmentation_step(
                _basic_unet(), (32, 1, 256, 256), ours=False, precision="bf16"
            ),
        },
        gpu=True,
        images=32,
    ),
    "classic-step-bf16": Row(
        _STEP + "classic with 64 channels, 8 x 256 x 256, bfloat16",
        {
            "ours": lambda _: _segmentation_step(
                _classic(), (8, 1, 256, 256), ours=True, precision="bf16"
            ),
            "MONAI BasicUNet": lambda _: _segmentation_step(
                _basic_unet(), (8, 1, 256, 256), ours=False, precision="bf16"
            ),
        },
        target={"MONAI BasicUNet": 0.60},
        gpu=True,
        images=8,
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
    "predict-16384": Row(
        "segmentation of 16384 x 16384 by classic with 64 channels, in tiles",
        {
            "ours": lambda _: _predicted(16384),
            "MONAI sliding window": lambda _: _predicted_by_monai(_basic_unet(), 16384),
        },
        gpu=True,
    ),
    "augmentation": Row(
        "four augmented crops of 256 x 256 with masks",
        {"ours": lambda _: _crops("ours"), "MONAI": lambda _: _crops("MONAI")},
        repeats=5,
        images=4,
    ),
    "v-rand": Row(
        "V_Rand of a 512 x 512 slice at one threshold",
        {"ours": lambda _: _rand("ours"), "scikit-image": lambda _: _rand("scikit-image")},
        repeats=10,
        tolerance=1e-5,  # scikit-image leaves out the pairs of a pixel with itself
    ),
}
