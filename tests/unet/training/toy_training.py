"""A small training run as a script: toy_training.py --out DIR [options] [--die-at STEP]."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.model import SegmentationUNet
from unet import UNetConfig
from unet.training.batches import Key, sample_rng
from unet.training.cli import run_script
from unet.training.fit import fit
from unet.training.options import FitOptions
from unet.training.plan import plan_fit
from unet.training.run import run_folder
from unet.training.task import Batch, Processes, Task


@dataclass(frozen=True, kw_only=True)
class ToyOptions(FitOptions):
    """Options of the toy run."""

    norm: str = "group"
    """Normalisation of the network."""

    dropout: float = 0.0
    """Dropout of the network."""

    die_at: int = 0
    """Kill this process in the middle of that step; 0: never."""

    with_signal: int = int(signal.SIGKILL)
    """The signal to die of."""

    whole_group: bool = False
    """Send it to the processes that prepare batches as well, as a terminal does."""

    nan_at: int = -1
    """Index of a sample that is not a number; -1: none, -2: all."""

    bad_gradient_at: int = -1
    """Index of a sample whose loss is finite and whose gradient is not; -1: none."""

    wait: float = 0.0
    """Seconds to wait in each step."""

    memory: int = 1_000_000
    """Samples above which a step runs out of memory."""


class ToySamples:
    """Noisy discs to be told from noise, each drawn from (seed, epoch, index)."""

    def __init__(self, options: ToyOptions) -> None:
        self.options = options

    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        rng = sample_rng(self.options.seed, epoch, index)
        row, column = rng.uniform(3, 13, 2)
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        disc = ((y - row) ** 2 + (x - column) ** 2 < 9).float()[None]
        image = disc + 0.5 * torch.from_numpy(rng.standard_normal((1, 16, 16))).float()
        if self.options.nan_at in (index, -2):
            image = image * torch.nan
        return {"image": image, "mask": disc}

    def name(self, index: int) -> str:
        return f"disc-{index}.png"


def toy_task(options: ToyOptions) -> Task:
    torch.manual_seed(options.seed)
    config = UNetConfig(
        channels=8, multipliers=(1, 2), norm=options.norm, groups=4, dropout=options.dropout
    )
    samples = ToySamples(options)
    held_out = [samples[10_000, i] for i in range(7)]
    steps = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        time.sleep(options.wait)
        if len(batch["index"]) > options.memory:
            raise torch.OutOfMemoryError("a stand-in for a full GPU")
        if steps == options.die_at:
            (os.killpg if options.whole_group else os.kill)(os.getpid(), options.with_signal)
        found = F.binary_cross_entropy_with_logits(model(batch["image"]), batch["mask"])
        if (batch["index"] == options.bad_gradient_at).any():
            found = found + (0 * found).sqrt()  # adds 0, and 0 times infinity to the gradient
        return found

    def evaluate(model: nn.Module, processes: Processes) -> Mapping[str, float]:
        part = [
            float(F.binary_cross_entropy_with_logits(model(s["image"][None]), s["mask"][None]))
            for s in processes.share(held_out)
        ]
        losses = [value for given in processes.gather(part) for value in given]
        assert len(losses) == len(held_out)
        return {"loss": sum(losses) / len(losses)}

    return Task(
        model=SegmentationUNet(config, 1),
        samples=samples,
        options=options,
        loss=loss,
        evaluate=evaluate,
    )


def compiled_in_one_graph(function: Any) -> Any:
    """As torch.compile does, but for the code at the end, which takes a minute and a compiler."""
    return compile_anyhow(function, backend="aot_eager", fullgraph=True)


compile_anyhow = torch.compile


def main(options: ToyOptions) -> None:
    if options.whole_group:
        os.setsid()  # a group of its own
    torch.set_num_threads(1)
    torch.compile = compiled_in_one_graph
    with run_folder(plan_fit(options)):
        fit(toy_task(options), plan_fit(options))
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        print(torch.distributed.get_world_size(), "processes")


if __name__ == "__main__":
    sys.exit(run_script(main, ToyOptions))
