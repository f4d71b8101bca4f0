"""`fit`: the one training loop."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from unet.device import pick_device, pick_precision, repeatable, training_format
from unet.errors import DiskError, InputError, Interrupted, RunError
from unet.files.writing import DISK_FULL
from unet.training.batches import BatchKeys, make_batches, next_batch
from unet.training.config_file import keep_config
from unet.training.ema import EMA, KEPT, PowerEMA, Profile
from unet.training.optimizer import make_optimizer
from unet.training.plan import FitPlan, told
from unet.training.run import RunFolder, rng_state, set_rng_state, signals_caught
from unet.training.shard import shard, whole
from unet.training.state import RunState
from unet.training.step import Stepper
from unet.training.task import Batch, Processes, Task, join
from unet.training.timetable import Progress, Timetable
from unet.training.trackers import Trackers

FEW = 4  # samples over which the statistics of batch norm are unsteady


def fit(task: Task, plan: FitPlan) -> dict[str, float]:
    """Trains a model and leaves its best weights in the run folder's model/.

    The caller holds the lock of the run folder (`RunFolder.locked`). The learning rate is planned
    over the budget. With a budget in steps or epochs, a run on the CPU that is killed and resumed
    ends with the very same weights as one that is not. Losses do not depend on the number of
    processes and of accumulated parts where the loss is a plain mean over the samples and the
    network does not mix them: batch norm takes its statistics over each part.

    Returns:
        The figures of the best evaluation; empty where nothing is held out.

    Raises:
        InputError: options that do not fit the data, the model or the saved state.
        RunError: the loss or the gradient is not finite; memory ran out; with `deterministic`, an
            operation of which the device has no such form.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    with repeatable() if plan.deterministic else nullcontext():
        return Trainer(task, plan).run()


class Trainer:
    """The state of `fit`, with a method for each part of the loop."""

    def __init__(self, task: Task, plan: FitPlan) -> None:
        self.task, self.plan = task, plan
        self.folder = RunFolder(plan.out)
        on_cpu = plan.device == "cpu" or not torch.accelerator.is_available()
        AcceleratorState._reset_state()  # of an earlier run in this process, in another precision
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=pick_precision(plan.precision, join(cpu=on_cpu).device),
            gradient_accumulation_steps=plan.accumulate,
        )
        self.device = pick_device(str(self.accelerator.device))
        self.processes = Processes.started(plan.device)
        self.main = self.processes.main
        self.keys = BatchKeys(
            len(task.samples),
            plan.batch_size,
            seed=plan.seed,
            accumulate=plan.accumulate,
            process=self.processes.rank,
            processes=self.processes.count,
        )
        self.timetable = Timetable(plan, len(task.samples))

        model = task.model.to(self.device).train()
        model.trunk.checkpointing = plan.checkpointing
        self.whole = copy.deepcopy(model).cpu() if plan.shard else None  # judged and saved
        if not plan.shard:  # which takes no other format
            model.to(memory_format=training_format(self.device))  # type: ignore[call-overload]
        shares = not plan.shard
        self.ema = EMA(model, plan.ema, shares=shares) if plan.ema else None
        kept = KEPT if plan.snapshots else ()
        self.powers = [PowerEMA(model, std, shares=shares) for std in kept]
        self.model = self.accelerator.prepare_model(model, evaluation_mode=plan.shard)
        if plan.shard:
            averaged = [ema.model for ema in (self.ema, *self.powers) if ema]
            half = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
            shard([model, *averaged], self.processes.count, self.device, half)
        self.optimizer = self.accelerator.prepare(make_optimizer(model, plan))
        if plan.compile:
            model.compile()
        self.stepper = Stepper(
            task, plan, self.accelerator, self.model, self.optimizer, self.processes, self._say
        )
        self.progress = Progress()
        self.figures: dict[str, float] = {}  # of the best evaluation
        self.going_on = True  # a full disk may be passed over
        self.unwritten: set[str] = set()
        self.state = RunState(
            self.accelerator, model, self.ema, self.optimizer, self.processes, plan, self.powers
        )
        set_seed(plan.seed, device_specific=True)  # dropout differs between processes
        if plan.resume:
            self._restore()
        self._remark_on_batch_norm()
        self.trackers = Trackers(plan, self.progress.step, vars(task.options), main=self.main)
        # Nothing of a run that is refused is left behind, so this comes last.
        if self.main:
            self.folder.samples.mkdir(parents=True, exist_ok=True)
            keep_config(task.options, plan.out, told(task.decisions))
            if task.first_pictures and self.progress.step == 0:
                for name, picture in task.first_pictures().items():
                    picture.save(self.folder.samples / f"{name}.png")

    def run(self) -> dict[str, float]:
        progress, plan = self.progress, self.plan
        self.keys.start_step = progress.step
        batches = make_batches(
            self.task.samples,
            self.keys,
            plan.workers,
            pin=self.device.type == "cuda",
            finish=self.task.finish,
        )
        self.started = time.monotonic() - progress.seconds
        with signals_caught() as caught, closing(batches), self._bar() as bar:
            while (share := self.timetable.share(progress)) < 1:
                loss = self._step(batches)
                progress.step += 1
                if loss is not None:
                    progress.loss_sum += loss
                    progress.loss_count += 1
                signum = self._agree(max(caught, default=0))
                self._advance(bar)
                if self.powers and self.timetable.snapshot_due(progress, share):
                    self._save_snapshots()
                if progress.step % plan.log_every == 0:
                    self._log_training()
                due = self.timetable.evaluation_due(progress)
                if due:
                    self._evaluate()
                if due or signum or progress.step % plan.save_every == 0:
                    self.going_on = not signum
                    self._save_state()
                if signum:
                    self._stop(signum)
            self._finish()
            if signum := self._agree(max(caught, default=0)):
                self._stop(signum)
        return self.figures

    def _stop(self, signum: int) -> None:
        self._say(f"stopped at step {self.progress.step}, whose state is saved")
        raise Interrupted(128 + signum)

    # -- a step -----------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Batch]) -> float | None:
        """One optimizer step; the mean loss over the batch of all processes.

        None: the loss or the gradient is not finite, and the step was left out.
        """
        try:
            parts = [next_batch(batches) for _ in range(self.plan.accumulate)]
        except (InputError, RunError):
            if self.progress.step and self.processes.count == 1:
                self._save_state()  # of the last whole step
            raise
        for group in self.optimizer.param_groups:
            lr = self.plan.lr * group.get("lr_scale", 1.0)
            group["lr"] = lr * self.timetable.rate(self.progress)
        loss = self.stepper(parts, self.progress)
        for ema in (self.ema, *self.powers):
            if ema and loss is not None:
                ema.update(self.stepper.plain, self.progress.step)
        return loss

    def _agree(self, signum: int) -> int:
        """The signal that any process caught, and the main process's clock, for all of them."""
        seconds = time.monotonic() - self.started
        if self.processes.count > 1:
            parts = self.processes.gather_numbers([signum, seconds], self.device)
            signum, seconds = int(max(p[0] for p in parts)), parts[0][1]
        self.progress.seconds = seconds
        return signum

    # -- evaluation -------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluates the averaged weights, keeps them where they are the best, logs and draws."""
        task, progress, start = self.task, self.progress, time.monotonic()
        model: Any = self.ema.model if self.ema else self.stepper.plain
        if self.whole:
            self.whole.load_state_dict(whole(model.state_dict()))
            model = self.whole.to(self.device)
        model.eval()
        if self.processes.count > 1:  # each has followed its own statistics since the last forward
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        figures: dict[str, float] = {}
        # Training goes on with the random numbers that it would have had without an evaluation.
        random = rng_state(self.device)
        with torch.no_grad(), self.accelerator.autocast():
            if task.evaluate:
                figures = dict(task.evaluate(model, self.processes))
            pictures = task.pictures(model) if task.pictures and self.main else {}
        set_rng_state(self.device, random)
        score = -math.inf  # nothing held out: the last weights
        if figures:
            name = task.score.removeprefix("-")
            score = figures[name] if name == task.score else -figures[name]
        kept = score < progress.best or score == -math.inf
        if kept and self.main:
            about = model.info.setdefault("training", {})
            about["figures"] = {k: v for k, v in figures.items() if math.isfinite(v)}
            save = functools.partial(task.save, model, self.folder.model)
            kept = self._written("the best weights", save)
        if kept:
            progress.best, self.figures = score, figures
        if self.whole:
            self.whole.cpu()
        elif not self.ema:
            model.train()
        progress.evaluated_step, progress.evaluated_seconds = progress.step, progress.seconds
        progress.evaluation_seconds = self.processes.gather(time.monotonic() - start)[0]
        if self.main:
            for name, picture in pictures.items():
                file = self.folder.samples / f"{name}-{progress.step:06d}.png"
                self._written("pictures", functools.partial(picture.save, file))
            held_out = {f"val_{k}": v for k, v in figures.items()}
            self._log(**held_out, kept=kept)
            self.trackers.log(figures, "val", self.progress.step)
            if figures:
                shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
                self._say(f"step {progress.step}: {task.held_out}: {shown}")

    def _finish(self) -> None:
        self.going_on = False
        if self.progress.loss_count:
            self._log_training()
        if self.progress.evaluated_step != self.progress.step:
            self._save_state()
            self._evaluate()
        self._agree(0)
        self._save_state()
        if self.task.evaluate and self.progress.best == math.inf:
            name = self.task.score.removeprefix("-")
            raise RunError(
                f"no evaluation gave a finite {name}, so no weights "
                f"were kept in {self.folder.model}: look at {self.folder.metrics}"
            )
        self.trackers.close()

    # -- files ------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        state = self.state.capture(self.progress, self.figures)
        if self.main:
            self._written("the state", lambda: self.folder.save_state(state))

    def _save_snapshots(self) -> None:
        for power in self.powers:
            weights, profile = (
                whole(power.model.state_dict()),
                Profile(power.std, self.progress.step),
            )
            if self.main:
                save = functools.partial(self.folder.save_snapshot, profile, weights)
                self._written("a snapshot", save)

    def _written(self, what: str, write: Callable[[], object]) -> bool:
        """Writes to the run folder. A full disk is reported once and otherwise ignored during the
        run, as there may be room again when the next state is saved."""
        try:
            write()
        except (OSError, DiskError) as error:
            full = isinstance(error, DiskError) or error.errno in DISK_FULL
            if not (full and self.going_on):
                raise
            if what not in self.unwritten:
                self._say(
                    f"step {self.progress.step}: {what} cannot be written, is the disk full? The "
                    "run goes on and tries again: free some space"
                )
            self.unwritten.add(what)
            return False
        self.unwritten.discard(what)
        return True

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            if self.folder.samples.exists():  # else nothing was begun: see train-seg --unlabelled
                self._say("no state is saved yet: starting at the first step")
        else:
            self.progress, self.figures = self.state.restore(state, self._say)
            self._say(f"resuming {self.folder.path} at step {self.progress.step}")
        if self.main:
            self.folder.cut_log(self.progress.step if state else -1)
            self.folder.cut_snapshots(self.progress.step)

    # -- what a person sees -----------------------------------------------------------------------

    def _remark_on_batch_norm(self) -> None:
        """Processes do not share its statistics, nor do parts of a batch."""
        together = self.keys.part
        if together < min(FEW, self.plan.batch_size) and any(
            isinstance(m, _BatchNorm) for m in self.task.model.modules()
        ):
            self._say(
                f"note: batch norm takes its statistics over the {together} samples that go "
                f"through the network together, fewer than {FEW}: a larger --batch-size or a "
                "smaller --accumulate steadies them"
            )

    def _say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def _bar(self) -> tqdm[Any]:
        """One line with loss, speed and time left; none without a terminal."""
        total = self.timetable.steps or round(self.timetable.seconds)
        unit = "step" if self.timetable.steps else "s"
        hidden = None if self.main else True
        return tqdm(total=total, unit=unit, disable=hidden, dynamic_ncols=True, smoothing=0.1)

    def _advance(self, bar: tqdm[Any]) -> None:
        progress = self.progress
        done = (
            progress.step if self.timetable.steps else min(progress.seconds, self.timetable.seconds)
        )
        loss = progress.loss_sum / progress.loss_count if progress.loss_count else math.nan
        bar.set_postfix_str(
            f"loss {loss:.4f}, step {progress.step}, "
            f"{progress.step / max(progress.seconds, 1e-9):.2f} steps/s",
            refresh=False,
        )
        bar.update(round(done - bar.n, 1))

    def _log_training(self) -> None:
        progress = self.progress
        values = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self.stepper.gradient_norm,
            "epoch": progress.step * self.plan.batch_size / len(self.task.samples),
            "seconds": round(progress.seconds, 3),
        }
        if progress.loss_count:
            values = {"loss": progress.loss_sum / progress.loss_count, **values}
        if progress.skipped:
            values["skipped"] = progress.skipped
        progress.loss_sum, progress.loss_count = 0.0, 0
        if self.main:
            self._log(**values)
            self.trackers.log(values, "train", self.progress.step)

    def _log(self, **values: Any) -> None:
        self._written("the log", lambda: self.folder.log(step=self.progress.step, **values))
