"""One optimizer step, and what to do with a step that fails."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from unet.errors import RunError
from unet.memory import give_back, kept_for_backward, ran_out_of_memory
from unet.training.plan import FitPlan
from unet.training.task import Batch, Processes, Task
from unet.training.timetable import Progress

ON_THE_HOST = ("index", "position")  # of a batch: what only messages and its making need
MOST_SKIPPED = 100  # steps in a row that may be left out


class Stepper:
    """Takes optimizer steps.

    Args:
        model, optimizer: as the accelerator prepared them.
        say: prints a sentence, in the main process.

    Attributes:
        gradient_norm: of the last step, before it was clipped.
    """

    def __init__(
        self,
        task: Task,
        plan: FitPlan,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        self.task, self.plan, self.accelerator = task, plan, accelerator
        self.model, self.optimizer, self.processes = model, optimizer, processes
        self.plain = accelerator.unwrap_model(model)  # without the wrapper of several processes
        self.say = say
        self.gradient_norm = 0.0
        self.skipped_in_row = 0

    def __call__(self, parts: list[Batch], progress: Progress) -> float | None:
        """A step on a batch in parts: its mean loss over all processes, or None: it was left out.

        Raises:
            RunError: the loss or the gradient is not finite; memory ran out.
        """
        buffers = [*self.plain.buffers()] if self.plan.nonfinite == "skip" else []
        spared = [buffer.clone() for buffer in buffers]
        try:
            loss = self._optimize(parts, progress)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            short = error.with_traceback(None)  # whose frames hold the memory
        else:
            if loss is None:
                for buffer, value in zip(buffers, spared, strict=True):
                    buffer.copy_(value)  # statistics of batch norm
            return loss
        # Not while the error is handled, which holds its frames, too.
        raise RunError(self._too_large(parts[0], progress)) from short

    def _optimize(self, parts: list[Batch], progress: Progress) -> float | None:
        """Losses and gradient are read once, at the end of the last part: a GPU waits for that."""
        accelerator, losses = self.accelerator, []
        mean: float | None = None
        for batch in parts:
            inputs = {
                k: v.to(accelerator.device, non_blocking=True)
                if isinstance(v, Tensor) and k not in ON_THE_HOST
                else v
                for k, v in batch.items()
            }
            with accelerator.accumulate(self.model):
                loss = self.task.loss(self.model, inputs)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    mean = self._clip(losses, parts, progress)
                    # A scaler leaves out such a step by itself.
                    if mean is not None or accelerator.scaler:
                        self.optimizer.step()
                self.optimizer.zero_grad()
        if mean is None:
            progress.skipped += 1
            self.skipped_in_row += 1
            return None
        self.skipped_in_row = 0
        return mean

    def _clip(self, losses: list[Tensor], parts: list[Batch], progress: Progress) -> float | None:
        """Clips the gradient, and gives the mean loss of all parts; None: it or the gradient is not
        finite."""
        accelerator, limit = self.accelerator, self.plan.clip or math.inf
        norm: Any = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shared weights
        values = accelerator.reduce(torch.stack(losses).float(), "mean")
        *found, gradient = torch.cat([values, norm.float().view(1)]).tolist()
        for value, part in zip(found, parts, strict=True):
            if not math.isfinite(value):
                self._not_finite("loss", value, [part], progress)
                return None
        # With fp16 an overflow is normal.
        if not math.isfinite(gradient) and accelerator.scaler is None:
            self._not_finite("gradient", gradient, parts, progress)
            return None
        self.gradient_norm = gradient
        return float(sum(found) / len(found))

    def _not_finite(self, what: str, value: float, parts: list[Batch], progress: Progress) -> None:
        """Reports the step that is left out, and stops if it may not be."""
        names = [self.task.samples.name(int(i)) for batch in parts for i in batch["index"]]
        names = sorted({n for part in self.processes.gather(names) for n in part})
        text = f"the {what} is {value} at step {progress.step + 1}, in a batch of "
        text += ", ".join(names)
        skip = self.plan.nonfinite == "skip"
        if skip and self.skipped_in_row + 1 < MOST_SKIPPED:
            self.say(f"left out: {text}")
            return
        clip = f"a lower --clip than {self.plan.clip:g}" if self.plan.clip else "a --clip such as 1"
        again = f"{self.skipped_in_row} steps in a row were left out, and " if skip else ""
        raise RunError(
            f"{again}{text}: look at these files, or try a lower --lr than {self.plan.lr:g}, "
            f"{clip}, or --precision fp32"
        )

    def _too_large(self, batch: Batch, progress: Progress) -> str:
        """What a step needs where memory ran out, measured on a single sample, and what to do."""
        self.optimizer.zero_grad()
        give_back(self.accelerator.device)
        device, count = self.accelerator.device, len(batch["index"])
        one = {k: v[:1].to(device) if isinstance(v, Tensor) else v[:1] for k, v in batch.items()}
        text = f"the memory of {device} ran out at step {progress.step + 1}"
        if not self.plan.shard:  # where all processes would have to take part in a forward pass
            with contextlib.suppress(RuntimeError, ValueError, MemoryError):
                kept = kept_for_backward(
                    lambda: self.task.loss(self.plain, one), self.plain.parameters()
                )
                text += (
                    f": the backward pass needs about {kept / 2**30:.3g} GiB per sample, "
                    f"{kept * count / 2**30:.3g} GiB for the {count} that go through the network "
                    "together"
                )
        return (
            f"{text}; --accumulate {2 * self.plan.accumulate} needs half of it for the same "
            "result; --checkpointing, a smaller --batch-size and smaller images need less, too"
        )
