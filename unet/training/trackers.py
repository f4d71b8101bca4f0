"""Programs that follow a run beside its own log, by accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.errors import InputError, said
from unet.files.writing import read_json, write_text
from unet.training.plan import FitPlan

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "unet-diffusion"  # the project or experiment, where the environment names none


class Trackers:
    """The trackers of a run; those of a resumed run are resumed, too, if they can be.

    Args:
        step: at which the run stands.
        settings: its options, which are told to each.
        main: whether this process is the one that writes.

    Raises:
        InputError: the package of one is missing, or it cannot be started.
    """

    def __init__(
        self, plan: FitPlan, step: int, settings: Mapping[str, object], *, main: bool
    ) -> None:
        self.started: list[GeneralTracker] = []
        for name in plan.trackers if main else ():
            known = _kept(plan.out, name) is not None  # where the first settings stay
            try:
                tracker = _START[name](plan, step)
                tracker.start()
                if name != "tensorboard" and not known:  # which makes a run of its own of them
                    tracker.store_init_configuration({k: str(v) for k, v in settings.items()})
            except ImportError as error:
                raise InputError(
                    f"--trackers {name} needs a package that is missing: pip install "
                    f'"unet-diffusion[{name}]"'
                ) from error
            except Exception as error:  # theirs: no login, no server, no connection
                raise InputError(f"--trackers {name} cannot be started: {said(error)}") from error
            self.started.append(tracker)
            if name in _NAMED:  # once it is there, so that a run that is refused leaves nothing
                _keep(plan.out, name, _NAMED[name](tracker.tracker))

    def log(self, values: Mapping[str, float], group: str, step: int) -> None:
        """Logs figures at a step, each named group/name."""
        for tracker in self.started:
            tracker.log({f"{group}/{name}": float(v) for name, v in values.items()}, step=step)

    def close(self) -> None:
        for tracker in self.started:
            tracker.finish()


def _tensorboard(plan: FitPlan, step: int) -> GeneralTracker:
    import torch.utils.tensorboard  # noqa: F401  # which accelerate would replace by another one
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", plan.out, purge_step=step + 1)


def _wandb(plan: FitPlan, step: int) -> GeneralTracker:
    import wandb  # noqa: F401  # before anything is written
    from accelerate.tracking import WandBTracker

    known = _kept(plan.out, "wandb")
    return WandBTracker(PROJECT, dir=plan.out, id=known, name=plan.out.name, resume="allow")


def _mlflow(plan: FitPlan, step: int) -> GeneralTracker:
    import mlflow  # noqa: F401
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=_kept(plan.out, "mlflow"), run_name=plan.out.name)


_START = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
_NAMED: dict[str, Callable[[Any], str]] = {  # what a tracker calls the run that it has started
    "wandb": lambda run: str(run.id),
    "mlflow": lambda run: str(run.info.run_id),
}


def _kept(run: Path, tracker: str) -> str | None:
    """The tracker's name of the run, from before it was resumed."""
    file = run / "state" / "trackers.json"
    return read_json(file).get(tracker) if file.is_file() else None


def _keep(run: Path, tracker: str, name: str) -> None:
    file = run / "state" / "trackers.json"
    names = read_json(file) if file.is_file() else {}
    write_text(file, json.dumps({**names, tracker: name}) + "\n")
