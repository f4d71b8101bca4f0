"""What a task gives to `fit`, and the processes that share the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from PIL import Image
from torch import Tensor, nn

from unet.errors import InputError
from unet.training.batches import Samples
from unet.training.options import FitOptions
from unet.training.plan import Decision
from unet.weights.folder import FolderModel

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
Batch = dict[str, Any]


def join(*, cpu: bool) -> PartialState:
    """This process's place among those that torchrun started, the first time with waiting set up.

    One that has done its share of the images waits for the slowest: longer than NCCL's ten minutes.
    """
    return PartialState(cpu=cpu, timeout=PATIENCE)


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def started(cls, device: str) -> Processes:
        """Those that torchrun started, each from now on with a GPU of its own where there are any.

        Args:
            device: `auto` or what a command line names.

        Raises:
            InputError: not all of them are there.
        """
        if (started := int(os.environ.get("WORLD_SIZE", 1))) == 1:
            return cls()
        state = join(cpu=device == "cpu" or not torch.accelerator.is_available())
        if state.num_processes != started:
            raise InputError(
                f"{started} processes were started, but {state.num_processes} found each other: "
                "start them with torchrun --nproc-per-node, or one of them alone"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints what was done."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items; the parts of all processes are all items, once each."""
        return items[self.rank :: self.count]

    def batches(self, count: int, size: int) -> Sequence[range]:
        """This process's batches of the numbers below `count`; those of all hold each of them once.

        They are of `size` numbers or, lest a process be idle, of fewer.
        """
        size = min(size, -(-count // self.count))
        return self.share([range(i, min(i + size, count)) for i in range(0, count, size)])

    def gather(self, part: T) -> list[T]:
        """What each process gives, in order, on every process."""
        return list(gather_object([part])) if self.count > 1 else [part]

    def gather_numbers(
        self, numbers: Sequence[float], device: torch.device
    ) -> Sequence[Sequence[float]]:
        """The same for as many numbers each, in one transfer: for every step."""
        if self.count == 1:
            return [numbers]
        mine = torch.tensor([numbers], dtype=torch.float64, device=device)
        found: list[list[float]] = gather(mine).tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task hands to `fit`."""

    model: FolderModel
    samples: Samples
    options: FitOptions
    """The command line, with what was left open filled in: config.yaml, which repeats the run."""
    decisions: Sequence[Decision] = ()
    """What was decided and why, kept in config.yaml as comments."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) to the mean loss over the batch."""
    evaluate: Callable[[Any, Processes], Mapping[str, float]] | None = None
    """Figures over held-out data, the same on every process; None: nothing is held out."""
    held_out: str = "held out"
    """What the figures are of, in words."""
    finish: Callable[[Batch], Batch] | None = None
    """What is made of a whole batch, in the process that prepares it, to which it is pickled."""
    score: str = "loss"
    """The figure that decides which weights are best: the smallest wins, of "-x" the largest x."""
    save: Callable[[Any, Path], object] = FolderModel.save_pretrained
    """Writes a model to a folder: of the best weights, RUN/model."""
    first_pictures: Callable[[], Mapping[str, Image.Image]] | None = None
    """Pictures by name, made once when the run starts."""
    pictures: Callable[[Any], Mapping[str, Image.Image]] | None = None
    """Pictures by name, made at each evaluation by the main process."""
