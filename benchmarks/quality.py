"""Minutes of training until cells are separated as well as requested: quality.py --data
ISBI_FOLDER.

Three trainings after one another on the same slices, scored alike on those held out: this code,
the recipe that tutorials of the challenge share, and MONAI's `BasicUNet` in the loop of
its own 2D tutorial. All clocks run during steps and their data alone, not while models are made and
scored; what our whole training takes, evaluation and report included, is given beside.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from segmentation.data.dataset import SegmentationData  # noqa: E402
from segmentation.judging.isbi import IsbiMetrics  # noqa: E402
from segmentation.model import SegmentationUNet  # noqa: E402
from segmentation.options import RECIPES, SegmentationOptions  # noqa: E402
from segmentation.predict import Predictor, TensorSource  # noqa: E402
from segmentation.training import load_data, train  # noqa: E402
from unet import PRESETS  # noqa: E402
from unet.errors import InputError  # noqa: E402
from unet.files.writing import write_text  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet.training.config_file import load_config  # noqa: E402
from unet.training.run import read_log  # noqa: E402

SIDES = ("ours", "tutorial", "monai")
Predict = Callable[[Tensor], Tensor]  # (1, 1, H, W) -> probabilities of cell, the same shape
Losses = Iterator[Tensor]  # one for each step, to be stepped on


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time until V_Rand is reached."""

    data: str
    """Folder with image/ and label/ of ISBI 2012, or isbi2012: downloaded once."""

    out: Path = Path("quality.json")
    """File for the figures."""

    sides: tuple[str, ...] = SIDES
    """Which trainings: ours, tutorial, monai."""

    v_rand: float = 0.945
    """V_Rand after border thinning, the mean over the slices held out, at its best threshold."""

    ours: float = 0.18
    """Minutes of our training; its figure is the one at its end."""

    recipe: str = "quick"
    """Recipe of our training."""

    theirs: float = 30.0
    """Minutes after which the others are stopped."""

    every: float = 0.25
    """Minutes of the others between scores."""

    threads: int = 2
    """Threads of the computation."""

    seed: int = 0
    """Seed of the trainings."""

    def __post_init__(self) -> None:
        for side in self.sides:
            if side not in SIDES:
                raise InputError(f"--sides {side} must be of {', '.join(SIDES)}")


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    recipe = load_config(SegmentationOptions, RECIPES / f"{options.recipe}.yaml")
    chosen = SegmentationOptions(
        data=options.data,
        val_names=("24-29",),
        max_minutes=options.ours,
        seed=options.seed,
        out=Path(),
        **recipe,
    )
    data = load_data(chosen)
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "sides": {}}
    for side in options.sides:
        curve = _ours(chosen, data) if side == "ours" else _theirs(side, data, options)
        reached = next((minutes for minutes, score in curve if score >= options.v_rand), None)
        found["sides"][side] = {"reached after minutes": reached, "curve": curve}
        best = max(score for _, score in curve)
        print(
            f"{side}: V_Rand {options.v_rand} "
            + (f"after {reached:.2f} minutes" if reached else f"not within {curve[-1][0]:.2f} min")
            + f", best {best:.4f}",
            flush=True,
        )
        write_text(options.out, json.dumps(found, indent=2) + "\n")


def _ours(options: SegmentationOptions, data: SegmentationData) -> list[tuple[float, float]]:
    """(minutes of the steps, V_Rand) at the end of the training."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.perf_counter()
        train(replace(options, out=out))
        whole = (time.perf_counter() - start) / 60
        log = read_log(out / "metrics.jsonl")
        predictor = Predictor([SegmentationUNet.from_pretrained(out / "model")])
    minutes = max(line["seconds"] for line in log if "seconds" in line) / 60
    print(f"ours: {minutes:.2f} min of steps, {whole:.2f} min with evaluation and report")

    def predict(image: Tensor) -> Tensor:
        return torch.as_tensor(predictor(TensorSource(image[0])))[None, -1:]

    return [(minutes, _score(predict, data))]


def _theirs(side: str, data: SegmentationData, options: Options) -> list[tuple[float, float]]:
    """(minutes, V_Rand) again and again, until it is reached or time is up."""
    torch.manual_seed(options.seed)
    model, optimizer, losses, predict = (_tutorial if side == "tutorial" else _monai)(data)
    curve: list[tuple[float, float]] = []
    seconds, due = 0.0, 60 * options.every
    model.train()
    while not curve or (curve[-1][1] < options.v_rand and seconds < 60 * options.theirs):
        start = time.perf_counter()
        optimizer.zero_grad()
        next(losses).backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if seconds >= due:
            model.eval()
            with torch.no_grad():
                curve.append((seconds / 60, _score(predict, data)))
            model.train()
            due = seconds + 60 * options.every
            print(f"{side}: {curve[-1][0]:.2f} min, V_Rand {curve[-1][1]:.4f}", flush=True)
    return curve


def _score(predict: Predict, data: SegmentationData) -> float:
    metrics = IsbiMetrics()
    for index in data.val:
        image, mask = data.load(index)
        probability = predict(torch.tensor(image)[None])[0, 0]
        metrics.add(np.clip(np.asarray(probability, np.float32), 0, 1), mask)
    return float(metrics.curves()["v_rand"].max())


def _slices(data: SegmentationData) -> tuple[list[Tensor], list[Tensor]]:
    images, masks = [], []
    for index in data.train:
        image, mask = data.load(index)
        images.append(torch.tensor(image))
        masks.append(torch.from_numpy(mask)[None].float())
    return images, masks


def _tutorial(data: SegmentationData) -> tuple[nn.Module, torch.optim.Optimizer, Losses, Predict]:
    """Whole slices one at a time, RMSprop at 1e-5, cross-entropy; the classic network."""
    model = SegmentationUNet(replace(PRESETS["tutorial"].config, in_channels=1), 1)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.9)
    loss = nn.BCEWithLogitsLoss()
    images, masks = _slices(data)

    def losses() -> Losses:
        while True:
            for i in torch.randperm(len(images)).tolist():
                yield loss(model(images[i][None]), masks[i][None])

    return model, optimizer, losses(), lambda image: model(image).sigmoid()


def _monai(data: SegmentationData) -> tuple[nn.Module, torch.optim.Optimizer, Losses, Predict]:
    """Four crops of 96 x 96 from each of four slices, flips and rotations, Dice loss, Adam at
    1e-3."""
    from monai import transforms
    from monai.data import DataLoader, Dataset, list_data_collate
    from monai.inferers import SlidingWindowInferer
    from monai.losses import DiceLoss
    from monai.networks.nets import BasicUNet

    both = ("image", "mask")
    chain = transforms.Compose(
        [
            transforms.RandCropByPosNegLabeld(
                both, label_key="mask", spatial_size=(96, 96), pos=1, neg=1, num_samples=4
            ),
            transforms.RandRotate90d(both, prob=0.5, spatial_axes=(0, 1)),
            transforms.RandFlipd(both, prob=0.5, spatial_axis=0),
        ]
    )
    pairs = [{"image": x, "mask": y} for x, y in zip(*_slices(data), strict=True)]
    loader = DataLoader(
        Dataset(pairs, chain), batch_size=4, shuffle=True, collate_fn=list_data_collate
    )
    model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = DiceLoss(sigmoid=True)

    def losses() -> Losses:
        while True:
            for batch in loader:
                yield loss(model(batch["image"]), batch["mask"])

    infer = SlidingWindowInferer(roi_size=(96, 96), sw_batch_size=4, overlap=0.25)
    return model, optimizer, losses(), lambda image: infer(image, model).sigmoid()


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
