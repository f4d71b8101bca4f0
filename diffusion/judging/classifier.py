"""`ClassifierUNet`: the contracting path with a class for the whole image; and how it is trained.

It judges generated images: whether they show the class that was asked for, and by the distance of
their features to those of real images (`diffusion.judging.features`).
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.data.images import DiffusionData
from diffusion.model import trained_size
from unet.config import UNetConfig
from unet.errors import InputError
from unet.training.batches import Key, sample_rng
from unet.training.fit import fit
from unet.training.options import FitOptions
from unet.training.plan import plan_fit
from unet.training.run import is_main_process, run_folder, upload
from unet.training.task import Batch, Processes, Task
from unet.weights.card import Usage
from unet.weights.folder import FolderModel
from unet.words import counted

PATCH = 2  # of the stem: three times as fast as whole pixels
COARSEST = 4  # pixels a side of the coarsest map, about
LEVELS, WIDEST = 5, 8  # at most: levels, and multiples of the finest level's channels
EVALUATED = 250  # held-out images at once


class ClassifierUNet(FolderModel):
    """Logits for the classes of an image: a U-Net's contracting path, mean, linear layer.

    Args:
        config: the trunk's shape, without time, class and context; its decoder is not built.
        out_channels: the number of classes.
        info: `classes`, their names, and `size`, height and width of the training images.
    """

    task: ClassVar[str] = "classification"

    def __init__(
        self, config: UNetConfig, out_channels: int, info: Mapping[str, Any] | None = None
    ) -> None:
        if config.time or config.classes or config.context_channels is not None:
            raise InputError(
                "a classifier has no timestep, class or context to be given: build its network "
                "with time=False, classes=0 and context_channels=None"
            )
        super().__init__(config, out_channels, info)
        self.trunk.decoder = nn.ModuleList()  # so that the trunk ends with the coarsest map
        self.head = nn.Linear(config.encoder_channels[-1], out_channels)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        names = self.info.get("classes")
        if not isinstance(names, list) or len(names) != self.out_channels:
            raise InputError(
                f"the classifier's config.json must name its {self.out_channels} classes in "
                f"info.classes, not {names!r}: train it with train_classifier.py"
            )
        return tuple(map(str, names))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on."""
        return trained_size(self.info)

    def features(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) in [-1, 1], any size, to (B, D): the coarsest map's mean."""
        return self.trunk(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) in [-1, 1], any size, to logits (B, out_channels)."""
        return self.head(self.features(x))

    def usage(self, where: str) -> Usage:
        return Usage(
            title="Classifier with the contracting path of a U-Net",
            summary="It judges generated images: whether they show the class that was asked for.",
            pipeline_tag="image-classification",
            tags=("classification",),
            python=(
                "from diffusion.judging.classifier import ClassifierUNet\n\n"
                f"model = ClassifierUNet.from_pretrained({json.dumps(where)})\n"
                "logits = model(images)  # (B, C, H, W) in [-1, 1] to (B, classes)"
            ),
            commands=(
                f"unet-eval-ddpm --classifier {shlex.quote(where)} --model RUN/model --data images",
            ),
            facts={
                "Images": counted(self.config.in_channels, "channel"),
                "Classes": str(self.info.get("classes")),
            },
        )


def classifier_config(size: tuple[int, int], channels: int, width: int) -> UNetConfig:
    """A network for images of this size: levels until the coarsest map is about 4 x 4.

    Args:
        channels: of the images.
        width: feature channels of the finest level.
    """
    levels = 1
    while levels < LEVELS and min(size) >= 1.5 * COARSEST * PATCH * 2 ** (levels - 1):
        levels += 1
    return UNetConfig(
        in_channels=channels,
        channels=width,
        multipliers=tuple(min(2**i, WIDEST) for i in range(levels)),
        patch=PATCH,
        init="he",
    )


def train(
    data: DiffusionData, options: FitOptions, *, width: int = 32, shift: int = 2
) -> dict[str, float]:
    """Trains a classifier on labelled images and returns the best held-out figures.

    Args:
        width: feature channels of the finest level.
        shift: augmentation: shifts by up to that many pixels either way, and no flips, which turn a
            digit into none.

    Raises:
        InputError: images without classes, or of one class only; options that do not fit.
    """
    plan = plan_fit(options)
    task = ClassifierTask(data, shift, plan.seed)
    torch.manual_seed(plan.seed)
    config = classifier_config(task.size, task.channels, width)
    coarsest = math.prod(-(-n // config.stride) for n in task.size)
    if plan.batch_size // plan.accumulate * coarsest < 2:
        raise InputError(
            f"a batch of one image of {task.size[0]} x {task.size[1]} is a single pixel at the "
            "coarsest level, and batch norm needs two to compare: give a larger --batch-size"
        )
    info = {
        "classes": list(task.classes),
        "size": list(task.size),
        "training": {"data": data.describe().splitlines()},
    }
    model = ClassifierUNet(config, len(task.classes), info)
    if is_main_process():
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{data.describe()}\nclassifier: {parameters / 1e6:.2f} M parameters", flush=True)
    with run_folder(plan):
        figures = fit(
            Task(
                model=model,
                samples=task,
                options=options,
                loss=task.loss,
                evaluate=task.evaluate,
            ),
            plan,
        )
        if is_main_process():
            upload(ClassifierUNet, plan)
    if is_main_process() and figures:
        accuracy, model_folder = figures["accuracy"], plan.out / "model"
        held_out = counted(len(data.val), "held-out image")
        print(f"{accuracy:.2%} of {held_out} recognised: {model_folder}")
    return figures


class ClassifierTask:
    """Shifted training samples, loss and held-out figures."""

    def __init__(self, data: DiffusionData, shift: int, seed: int) -> None:
        if not data.classes or len(data.classes) < 2:
            raise InputError(
                f"the images are of {counted(len(data.classes or ()), 'class')}, but a classifier "
                "tells two or more apart: give an .npz with labels, or a folder with a subfolder "
                "for each"
            )
        self.data, self.shift, self.seed = data, shift, seed
        self.samples = data.samples(seed)
        self.classes = data.classes
        height, width = data.size
        self.size, self.channels = (height, width), data.channels

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = self.samples[key]
        height, width = self.size
        rng = sample_rng(self.seed, *key)
        top, left = (int(n) for n in rng.integers(0, 2 * self.shift + 1, 2))
        padded = F.pad(sample["image"][None], [self.shift] * 4, mode="replicate")[0]
        image = padded[:, top : top + height, left : left + width]
        return {"image": image, "label": sample["label"]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["image"]).float(), batch["label"])

    def evaluate(self, model: ClassifierUNet, processes: Processes) -> Mapping[str, float]:
        """Cross-entropy and accuracy over the held-out images."""
        device = next(model.parameters()).device
        loss, right = 0.0, 0
        part = processes.share(self.data.val)
        for start in range(0, len(part), EVALUATED):
            images, labels = self.data.batch(part[start : start + EVALUATED])
            logits = model(images.to(device)).float().cpu()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
        losses, rights = zip(*processes.gather((loss, right)), strict=True)
        count = len(self.data.val)
        return {"loss": sum(losses) / count, "accuracy": sum(rights) / count}
