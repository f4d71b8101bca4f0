"""The position of a run in its budget, and what follows from it: learning rate, evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unet.training.plan import FitPlan

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


class Timetable:
    """When each thing is due, in a run over so many samples.

    Attributes:
        steps: all that the run takes; 0: it ends by the clock.
        seconds: that it takes where there are no steps.
    """

    def __init__(self, plan: FitPlan, samples: int) -> None:
        self.plan, (amount, unit) = plan, plan.budget
        self.steps, self.seconds = 0, 60 * amount
        if unit != "minutes":
            epochs = amount * samples / plan.batch_size if unit == "epochs" else amount
            self.steps = math.ceil(epochs)

    def share(self, progress: Progress) -> float:
        """The share that is used; of the minutes, the last evaluation's are set aside."""
        if self.steps:
            return progress.step / self.steps
        return progress.seconds / max(self.seconds - progress.evaluation_seconds, 1e-9)

    def rate(self, progress: Progress) -> float:
        """The learning rate's factor: linear warm-up, then half a cosine (arXiv 1608.03983)."""
        share, warmup = self.share(progress), self.plan.warmup
        if share < warmup:
            one_step = 1 / self.steps if self.steps else 0.0
            return min(1.0, (share + one_step) / warmup)
        if self.plan.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))

    def evaluation_due(self, progress: Progress) -> bool:
        """Whether one of the plan's evaluations is due; by the clock so seldom that they take at
        most EVALUATION_SHARE of the time.
        """
        count = self.plan.evaluations
        if self.steps:
            done = count * progress.step // self.steps
            return done > count * progress.evaluated_step // self.steps
        spacing = max(self.seconds / max(count, 1), progress.evaluation_seconds / EVALUATION_SHARE)
        return count > 0 and progress.seconds - progress.evaluated_seconds >= spacing

    def snapshot_due(self, progress: Progress, before: float) -> bool:
        """Whether one of the plan's moments is passed; `before`: the share of a step ago."""
        count = self.plan.snapshots
        if self.steps:
            return count * progress.step // self.steps > count * (progress.step - 1) // self.steps
        return int(count * min(1.0, self.share(progress))) > int(count * before)
