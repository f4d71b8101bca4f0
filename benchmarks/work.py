"""What a row of the benchmarks is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")  # of networks and images; bench.py sets it


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
    gpu: bool = False  # too much for a processor: left out there unless it is named
    axis: str | None = None  # what the sides' names, numbers then, count
    images: int | None = None  # that one run sees or makes


def random_image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def trained(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Work:
    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    model.to(DEVICE).train()
    return Work(run, model)
