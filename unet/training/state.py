"""What is saved of a run, and how it is resumed from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from unet.errors import InputError, said
from unet.memory import ran_out_of_memory
from unet.training.ema import EMA
from unet.training.plan import FitPlan
from unet.training.run import RunFolder, rng_state, set_rng_state
from unet.training.shard import load_whole, optimizer_parts, whole
from unet.training.task import Processes
from unet.training.timetable import Progress
from unet.weights.folder import check_fit


class RunState:
    """The weights, the optimizer and the random numbers of a run, as one dictionary.

    Weights that are not trained are left out: a resumed run loads them from its start again.

    Args:
        model: as it is trained, without the wrapper of several processes.
        optimizer: as the accelerator prepared it.
        powers: the averages that are kept in snapshots.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        ema: EMA | None,
        optimizer: AcceleratedOptimizer,
        processes: Processes,
        plan: FitPlan,
        powers: Sequence[EMA] = (),
    ) -> None:
        self.accelerator, self.model, self.ema = accelerator, model, ema
        self.powers = powers
        self.optimizer, self.processes, self.plan = optimizer, processes, plan
        self.file = RunFolder(plan.out).state

    def capture(self, progress: Progress, figures: Mapping[str, float]) -> dict[str, Any]:
        """Tensors, numbers, strings, and lists of them: whole ones, whatever the processes share.

        All processes call it.
        """
        scaler = self.accelerator.scaler
        return {
            **dataclasses.asdict(progress),
            "figures": dict(figures),
            "model": whole(self._trained(self.model.state_dict())),
            "ema": whole(self._trained(self.ema.model.state_dict())) if self.ema else None,
            "powers": [whole(self._trained(p.model.state_dict())) for p in self.powers],
            "optimizer_name": self.plan.optimizer,
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler else None,
            "rng": self.processes.gather(rng_state(self.accelerator.device)),
        }

    def _trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}

    def restore(
        self, state: Mapping[str, Any], say: Callable[[str], None]
    ) -> tuple[Progress, dict[str, float]]:
        """Restores what `capture` gave: the progress of that run, and its best figures.

        Raises:
            InputError: it is of another network or optimizer, or no state at all.
        """
        try:
            return self._restore(state, say)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if ran_out_of_memory(error):
                raise
            raise InputError(f"{self.file} is no saved state of this run: {said(error)}") from error

    def _restore(
        self, state: Mapping[str, Any], say: Callable[[str], None]
    ) -> tuple[Progress, dict[str, float]]:
        # An earlier version saved what is not trained, too.
        parts = {key: state[key] and self._trained(state[key]) for key in ("model", "ema")}
        for part in filter(None, parts.values()):
            check_fit(self._trained(self.model.state_dict()), part, str(self.file))
        for key, mine in (("optimizer_name", self.plan.optimizer), ("ema", self.ema)):
            theirs = state[key]
            if (theirs is None) != (mine is None) or (key == "optimizer_name" and theirs != mine):
                raise InputError(
                    f"{self.file} was saved with other settings of --optimizer or --ema: resume "
                    f"with those of {self.plan.out / 'config.yaml'}"
                )
        load_whole(self.model, parts["model"])
        if self.ema:
            load_whole(self.ema.model, parts["ema"])
        for power, saved in zip(self.powers, state.get("powers", []), strict=True):
            load_whole(power.model, saved)
        settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(optimizer_parts(state["optimizer"], self.optimizer))
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # the options decide, not what was saved
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.processes.count:
            set_rng_state(self.accelerator.device, state["rng"][self.processes.rank])
        else:
            say("resuming with another number of processes: dropout starts from the seed")
        names = {f.name for f in dataclasses.fields(Progress)} & state.keys()
        return Progress(**{name: state[name] for name in names}), state["figures"]
