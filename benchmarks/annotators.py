"""Compare sampled masks with those of annotators: annotators.py --out DIR.

Generated images with six masks each (`segmentation.data.annotators`); every way makes 16 masks of
each image that no training has seen, which are held against the six: a segmentation sampled pixel
by pixel, an ensemble, the annotators' own masks, and diffusion models of masks. IoU is that of the
membrane. Each figure is written when it is there, and a run that is started again goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from diffusion.options import DiffusionOptions, SamplingOptions  # noqa: E402
from diffusion.training import train as train_diffusion  # noqa: E402
from segmentation.data.annotators import annotated_stack  # noqa: E402
from segmentation.judging.distributions import energy_distance, matched_iou  # noqa: E402
from segmentation.options import SegmentationOptions  # noqa: E402
from segmentation.segmenter import load  # noqa: E402
from segmentation.training import train as train_segmentation  # noqa: E402
from unet.files.images import write_image  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet_diffusion.sampled import MaskSampler  # noqa: E402

WIDTH = 16  # channels of the finest level
Masks = NDArray[np.bool_]  # (N, H, W), where membrane is


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    out: Path
    """Folder for the data, the runs and annotators.jsonl."""

    images: int = 200
    """Images to train on."""

    tested: int = 12
    """Images to judge by."""

    side: int = 32
    """Pixels of a side."""

    steps: int = 400
    """Steps of each segmentation."""

    members: int = 3
    """Segmentations in the ensemble."""

    diffusion_steps: int = 1000
    """Steps of each diffusion model."""

    codings: tuple[str, ...] = ("bits", "one-hot")
    """Codings of the masks for these, a model each."""

    samples: int = 16
    """Masks of each image."""

    threads: int = 1
    """Threads of the computation."""


def main(options: Options) -> None:
    import torch

    torch.set_num_threads(options.threads)
    size = (options.side, options.side)
    images, masks = annotated_stack(options.images, size, 0)
    for i, (image, of) in enumerate(zip(images, masks, strict=True)):
        write_image(options.out / f"data/images/{i}.png", image)
        for a, mask in enumerate(of):
            write_image(options.out / f"data/masks/{a + 1}/{i}.png", mask)
    images, masks = annotated_stack(options.tested, size, 1)
    file = options.out / "annotators.jsonl"
    done = (
        {json.loads(line)["way"] for line in file.read_text().splitlines()}
        if file.exists()
        else set()
    )

    def judge(way: str, made: list[Masks], **facts: Any) -> None:
        pairs = [(found, of == 0) for found, of in zip(made, masks, strict=True)]
        row = {
            "way": way,
            f"GED{options.samples}": float(np.mean([energy_distance(*pair) for pair in pairs])),
            f"HM-IoU{options.samples}": float(np.mean([matched_iou(*pair) for pair in pairs])),
            **facts,
        }
        with file.open("a", encoding="utf-8") as lines:
            print(json.dumps(row), file=lines, flush=True)
        print(row, flush=True)

    rng, count = np.random.default_rng(0), options.samples
    if "annotators" not in done:
        judge("annotators", [(of == 0)[rng.integers(len(of), size=count)] for of in masks])
    models = [segmented(options, i) for i in range(options.members)]
    if "ensemble" not in done:
        cell = [load(model, device="cpu").probability(images) for model in models]
        for name, p in (("one segmentation", cell[0]), ("mean of the ensemble", np.mean(cell, 0))):
            once = [np.repeat(one[None] <= 0.5, count, axis=0) for one in p]
            judge(f"{name}, its mask", once)
            drawn = [rng.random((count, *size)) >= one for one in p]
            judge(f"{name}, pixel by pixel", drawn)
        each = [np.resize(np.stack(of) <= 0.5, (count, *size)) for of in zip(*cell, strict=True)]
        judge("ensemble", each, members=options.members)
    for coding in options.codings:
        if f"diffusion, {coding}" not in done:
            run = diffused(options, coding)
            sampler = MaskSampler(run / "model", count, SamplingOptions(device="cpu"))
            made = []
            for i, image in enumerate(images):
                write_image(options.out / f"tested/{i}.png", image)
                made.append(sampler(options.out / f"tested/{i}.png") == 0)
            evaluations = sampler.sampler.plans.from_noise().evaluations
            judge(f"diffusion, {coding}", made, evaluations=evaluations)


def segmented(options: Options, seed: int) -> Path:
    """A segmentation whose crops each have the mask of one annotator."""
    run = options.out / f"segmentation-{seed}"
    if not (run / "report.png").exists():
        train_segmentation(
            SegmentationOptions(
                out=run,
                data=str(options.out / "data"),
                width=WIDTH,
                crop=options.side,
                val=0.05,
                best_by="loss",
                evaluations=2,
                steps=options.steps,
                seed=seed,
                device="cpu",
            )
        )
    return run / "model"


def diffused(options: Options, coding: Any) -> Path:
    """A diffusion model of masks, each made from its image."""
    run = options.out / f"diffusion-{coding}"
    if not (run / "report.png").exists():
        train_diffusion(
            DiffusionOptions(
                out=run,
                data=str(options.out / "data/masks"),
                condition=str(options.out / "data/images"),
                target="mask",
                mask_coding=coding,
                width=WIDTH,
                batch_size=16,
                val=10,
                evaluations=2,
                steps=options.diffusion_steps,
                device="cpu",
            )
        )
    return run


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
