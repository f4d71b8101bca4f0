"""`FitOptions`: the options of every training command. Does not import torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from unet.errors import InputError, not_there

if TYPE_CHECKING:
    from unet.files.mask_values import MaskCleaning
    from unet.files.pages import Reading

OptimizerName = Literal["adamw", "muon", "sgd", "rmsprop"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]  # as `unet.device` reads them
BUDGETS = ("steps", "epochs", "max_minutes")  # options of which one is given


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How image files are read, beyond what they say themselves."""

    axes: str | None = None
    """Axes of TIFF and NPY files and volumes that do not name them, such as CYX or ZYXC: C are
    channels, Y and X rows and columns, all others slices."""

    channels: tuple[str, ...] = ()
    """Channels to use of each image, in this order: numbers from 0, or the names that the files
    give; none given: all."""

    nodata: float | None = None
    """Value of pixels where nothing was measured (nan where it is NaN), instead of what the files
    declare; it is in no statistic, and such pixels are ignored."""

    @property
    def reading(self) -> Reading:
        """These options, as the readers take them."""
        from unet.files.pages import Reading

        return Reading(axes=self.axes, channels=self.channels, nodata=self.nodata)


@dataclass(frozen=True, kw_only=True)
class MaskOptions(ReadingOptions):
    """What a command line says of the values of masks, where they do not say it themselves."""

    mask_values: tuple[int, ...] = ()
    """True values of the masks, such as 0 255, where edges are soft or files were saved as JPEG:
    each pixel takes the nearest."""

    threshold_masks: bool = False
    """Make two classes of masks with 0 and 1, 0 and 255, values between, or a mixture of these."""

    def __post_init__(self) -> None:
        if self.mask_values and self.threshold_masks:
            raise InputError(
                "--mask-values and --threshold-masks both say what masks mean: give one"
            )
        if len(set(self.mask_values)) == 1:
            raise InputError(f"--mask-values {self.mask_values[0]}: name two values or more")

    @property
    def cleaning(self) -> MaskCleaning:
        """What is done to the values of masks."""
        from unet.files.mask_values import MaskCleaning

        return MaskCleaning(values=self.mask_values, threshold=self.threshold_masks)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The part of a training command's options that is about the loop.

    None means not given: each task decides it from its data (`unet.training.plan`).
    """

    out: Path
    """Run folder to make: config.yaml, metrics.jsonl, samples/, model/, state/."""

    resume: bool = False
    """Go on with the run in --out: data, network and seed stay; budget, --lr ... may change."""

    steps: int | None = None
    """Budget: optimizer steps. Give one of --steps, --epochs, --max-minutes; none: 10 minutes."""

    epochs: float | None = None
    """Budget: passes over the training samples."""

    max_minutes: float | None = None
    """Budget: minutes of wall-clock time, evaluations included; the schedule is planned over it."""

    batch_size: int | None = None
    """Samples per optimizer step, over all processes and accumulated parts together; none given: 8.
    """

    accumulate: int = 1
    """Parts in which each batch goes through the network, to save memory."""

    optimizer: OptimizerName | None = None
    """Optimizer. muon makes the steps of matrices orthogonal and leaves the rest to adamw; its --lr
    is about 20 times that of adamw. None given: adamw."""

    lr: float | None = None
    """Highest learning rate; none given: 1e-3."""

    momentum: float | None = None
    """Momentum of muon, sgd and rmsprop, beta1 of adamw; none given: 0.9."""

    beta2: float | None = None
    """Decay of adamw's mean of squared gradients; none given: 0.999."""

    weight_decay: float = 0.0
    """Weight decay."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero along half a cosine, or constant."""

    warmup: float = 0.03
    """Share of the budget over which the learning rate rises linearly."""

    clip: float = 1.0
    """Largest norm of the whole gradient; 0: no limit."""

    ema: float = 0.999
    """Decay of the exponential moving average of the weights, after its warm-up; 0: none."""

    snapshots: int = 0
    """Moments, evenly spread, at which two averages of the weights are saved in snapshots/. From
    these `unet ema` computes averages of any width after the run. Each is as large as the model;
    0: none."""

    precision: Precision = "auto"
    """Arithmetic of the network; auto: bf16 where the processor computes in it, else fp32."""

    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    shard: bool = False
    """Split weights, gradients and the optimizer's state among the processes of torchrun (FSDP),
    for networks that do not fit into the memory of one."""

    compile: bool = False
    """Compile the network with torch.compile, which takes a minute or more. On the CPU where it was
    measured it never saved time (docs/benchmarks.md); GPUs were not measured."""

    deterministic: bool = False
    """On a GPU: use only algorithms that give the same bits each time, which are slower. On a CPU
    all are such algorithms."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite: stop, or leave it out and say so (100 in a
    row stop the run)."""

    seed: int = 0
    """Seed of everything random: weights, order, augmentation, noise, dropout."""

    workers: int | None = None
    """Processes that prepare batches; 0: the training process itself; none given: by device."""

    evaluations: int = 10
    """Evaluations on held-out data, evenly spread (fewer if they would take over 10 % of
    --max-minutes). The weights that score best are kept in model/."""

    save_every: int = 500
    """Steps between saved states; one is saved at each evaluation, too."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl."""

    trackers: tuple[TrackerName, ...] = ()
    """Programs that follow the run as well: tensorboard (events in OUT/tensorboard), wandb, mlflow.
    They are set up by their own environment variables, such as WANDB_MODE=offline."""

    push_to_hub: str | None = None
    """OWNER/NAME of a repository on the Hugging Face Hub, to which OUT/model goes when the run is
    over, with its card. It is made before training, for everybody to see, where there is none."""

    def __post_init__(self) -> None:
        for name in _paths_of(type(self)):
            if isinstance(value := getattr(self, name), str):  # from Python
                object.__setattr__(self, name, Path(value))
        for name in BUDGETS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value} must be a number above 0")
        given = [f"--{n.replace('_', '-')}" for n in BUDGETS if getattr(self, n) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are both budgets: give one of them")
        for name in ("batch_size", "accumulate", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        for name in ("evaluations", "snapshots", "clip", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be 0 or more")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"--lr {self.lr} must be above 0")
        if self.seed >= 2**32:
            raise InputError(f"--seed {self.seed} must be below 2^32")
        for name in ("ema", "warmup", "momentum", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name} {value} must be in [0, 1)")
        unshared = {
            "--compile": self.compile,
            "--precision fp16": self.precision == "fp16",
            "--optimizer muon": self.optimizer == "muon",
        }
        for other in (name for name, chosen in unshared.items() if self.shard and chosen):
            raise InputError(f"--shard does not go with {other}: drop one of the two")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers {self.workers} must be 0 or more")


def _paths_of(kind: type) -> list[str]:
    """The fields of a dataclass that are one path, or may be None."""
    hints = get_type_hints(kind)
    return [name for name, hint in hints.items() if hint in (Path, Path | None)]


def check_paths(options: Any, made: Sequence[str] = ("out",)) -> None:
    """Refuses paths that do not exist, before anything is read, which can take minutes.

    Args:
        options: a dataclass; a field that is a Path, or a tuple of them, names what is read.
        made: fields that name what is written.

    Raises:
        InputError: names the option and the path.
    """
    from unet.files.shards import find_shards
    from unet.files.volumes import is_volume

    for name in (field.name for field in fields(options) if field.name not in made):
        value = getattr(options, name)
        for path in value if isinstance(value, tuple) else (value,):
            if not isinstance(path, Path) or os.path.exists(path):
                continue
            if not (is_volume(path) or find_shards(path)):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {str(path)!r}: {not_there(path)}")
