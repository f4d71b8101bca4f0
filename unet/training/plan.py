"""A run's budget, where the run stands in it, and what follows: learning rate, evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from unet.training.muon import Muon
from unet.training.options import FitOptions

DEFAULT_MINUTES = 10.0  # of a run without a budget
EVALUATION_SHARE = 0.1  # of the minutes of a run, at most


@dataclass
class Progress:
    """Where a run stands, as it is saved and restored."""

    step: int = 0
    seconds: float = 0.0  # of work so far, over all sittings
    evaluated_step: int = 0  # of the last evaluation
    evaluated_seconds: float = 0.0
    evaluation_seconds: float = 0.0  # that the last evaluation took
    best: float = math.inf
    loss_sum: float = 0.0  # over the steps since the last line of the log
    loss_count: int = 0
    skipped: int = 0  # steps left out as their loss or gradient was not finite


class Budget:
    """Steps or seconds that a run may take."""

    def __init__(self, options: FitOptions, samples: int) -> None:
        self.options = options
        self.steps = options.steps
        if options.epochs is not None:
            self.steps = math.ceil(options.epochs * samples / options.batch_size)
        self.seconds = 60 * (options.max_minutes or DEFAULT_MINUTES)  # without steps

    def share(self, progress: Progress) -> float:
        """The share that is used; of the minutes, the last evaluation's are set aside."""
        if self.steps:
            return progress.step / self.steps
        return progress.seconds / max(self.seconds - progress.evaluation_seconds, 1e-9)

    def rate(self, progress: Progress) -> float:
        """The learning rate's factor: linear warm-up, then half a cosine (arXiv 1608.03983)."""
        share, warmup = self.share(progress), self.options.warmup
        if share < warmup:
            one_step = 1 / self.steps if self.steps else 0.0
            return min(1.0, (share + one_step) / warmup)
        if self.options.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))

    def evaluation_due(self, progress: Progress) -> bool:
        count = self.options.evaluations
        if self.steps:
            done = count * progress.step // self.steps
            return done > count * progress.evaluated_step // self.steps
        spacing = max(self.seconds / max(count, 1), progress.evaluation_seconds / EVALUATION_SHARE)
        return count > 0 and progress.seconds - progress.evaluated_seconds >= spacing


def make_optimizer(model: nn.Module, options: FitOptions) -> torch.optim.Optimizer:
    """The optimizer that the options name."""
    parameters, lr, decay = model.parameters(), options.lr, options.weight_decay
    momentum = options.momentum
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    if options.optimizer == "muon":
        beta2 = options.beta2
        return Muon(model, lr=lr, momentum=momentum, beta2=beta2, weight_decay=decay)
    betas = (momentum, options.beta2)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay, fused=True)
