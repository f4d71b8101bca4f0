"""The plan of a training run: decided once, before it starts, from the options and the data.

Each task has one function that decides. All later code reads its plan, in which nothing is open.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from unet.config import UNetConfig
from unet.device import pick_device
from unet.training.options import FitOptions, OptimizerName, Precision, TrackerName
from unet.weights.start import Start
from unet.words import counted

DEFAULT_MINUTES = 10.0  # of a run without a budget
AS_ASKED = "as requested"  # the reason of what was given
Options = TypeVar("Options", bound=FitOptions)
_TOLD = re.compile(r"^# (.+?) {2,}(.+?) {2,}\((.*)\)\r?$", re.M)  # a decision in config.yaml
GPU_WORKERS = 4  # processes that prepare batches for a GPU


class Decision(NamedTuple):
    """One decision: printed before training, and kept in config.yaml."""

    what: str
    value: str
    why: str


class Budget(NamedTuple):
    """The budget of a run."""

    amount: float
    unit: Literal["steps", "epochs", "minutes"]


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How `fit` trains. Fields that are not explained here are those of `FitOptions`."""

    out: Path
    resume: bool
    budget: Budget
    batch_size: int
    accumulate: int
    optimizer: OptimizerName
    lr: float
    momentum: float
    beta2: float
    weight_decay: float
    schedule: Literal["cosine", "constant"]
    warmup: float
    clip: float
    ema: float
    snapshots: int
    precision: Precision
    device: Literal["auto", "cpu"]
    checkpointing: bool
    shard: bool
    compile: bool
    deterministic: bool
    nonfinite: Literal["stop", "skip"]
    seed: int
    workers: int
    evaluations: int
    save_every: int
    log_every: int
    trackers: tuple[TrackerName, ...]
    push_to_hub: str | None = None

    def together(self, processes: int = 1) -> int:
        """Samples that go through the network together in a step: as they fit into memory with a
        backward pass, as many fit without one."""
        return max(1, self.batch_size // (self.accumulate * processes))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What every task decides; a task adds its own fields.

    Attributes:
        decisions: what was decided and why.
        network, outputs, info: of the model, as `FolderModel` takes them.
        start: the weights to start from; None: random ones.
    """

    decisions: tuple[Decision, ...]
    fit: FitPlan
    network: UNetConfig
    outputs: int
    info: Mapping[str, Any]
    start: Start | None

    def lines(self) -> list[str]:
        """The decisions as text, one line each."""
        return told(self.decisions)


def choose_optimizer(
    options: FitOptions, against_muon: Mapping[str, object]
) -> tuple[OptimizerName, str]:
    """The optimizer where none is named, and why.

    From random weights muon learns in minutes what adamw does not (docs/experiments.md).

    Args:
        against_muon: reasons to use adamw, and whether each of them holds.
    """
    if options.optimizer:
        return options.optimizer, AS_ASKED
    reasons = {
        **against_muon,
        "muon does not go with --shard": options.shard,
        "--lr without --optimizer is taken as adamw's": options.lr is not None,
    }
    for why, holds in reasons.items():
        if holds:
            return "adamw", why
    return "muon", "learns fastest from random weights"


def filled(options: Options, fit: FitPlan, **decided: Any) -> Options:
    """The command line with every open choice filled in, which repeats the run."""
    names = ("batch_size", "optimizer", "lr", "momentum", "beta2")
    return dataclasses.replace(options, **{n: getattr(fit, n) for n in names}, **decided)


def plan_fit(
    options: FitOptions,
    *,
    batch_size: int = 8,
    optimizer: OptimizerName = "adamw",
    lr: float = 1e-3,
    momentum: float = 0.9,
    beta2: float = 0.999,
) -> FitPlan:
    """The plan of a command line; the arguments are a task's choices where it leaves them open."""
    on_cpu = options.device == "cpu" or pick_device("auto").type == "cpu"
    decided: dict[str, Any] = {
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "beta2": beta2,
        "workers": 0 if on_cpu else GPU_WORKERS,
    }
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(FitPlan)
        if getattr(options, field.name, None) is not None
    }
    return FitPlan(**{**decided, **values, "budget": given_budget(options)})


def given_budget(options: FitOptions) -> Budget:
    """The budget that the options name, else ten minutes."""
    if options.steps is not None:
        return Budget(options.steps, "steps")
    if options.epochs is not None:
        return Budget(options.epochs, "epochs")
    return Budget(options.max_minutes or DEFAULT_MINUTES, "minutes")


def told_budget(options: FitOptions) -> Decision:
    """The budget as a decision."""
    amount, unit = given_budget(options)
    given = any((options.steps, options.epochs, options.max_minutes))
    return Decision(
        "budget", counted(amount, unit.removesuffix("s")), AS_ASKED if given else "the default"
    )


def remembered(decisions: Iterable[Decision], fit: FitPlan) -> tuple[Decision, ...]:
    """The decisions; of a resumed run with the reasons in its config.yaml where they are the same.

    Such a run finds its choices made, and would take all of them for requested.
    """
    file, reasons = fit.out / "config.yaml", {}
    if fit.resume and file.is_file():
        # `save_config` escapes what is not ASCII
        head = file.read_bytes().decode("unicode_escape", "replace")
        for what, value, why in _TOLD.findall(head):
            reasons[what, value] = why
    return tuple(d._replace(why=reasons.get((d.what, d.value), d.why)) for d in decisions)


def told(decisions: Iterable[Decision]) -> list[str]:
    """A line for each decision, in columns."""
    decisions = list(decisions)
    widths = [max((len(d[i]) for d in decisions), default=0) for i in (0, 1)]
    return [f"{d.what:{widths[0]}}  {d.value:{min(widths[1], 40)}}  ({d.why})" for d in decisions]
