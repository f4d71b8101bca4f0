"""Compute other averages of a run's weights after training: unet-ema --run RUN --std 0.05 0.10.

The run keeps what it needs with --snapshots (Karras et al., EDM2, arXiv 2312.02696, sec. 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.words import counted

if TYPE_CHECKING:
    from torch import Tensor

    from unet.training.ema import Profile

LARGEST_ERROR = 0.05  # share of a profile that the snapshots may fail to meet


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Path
    """Run folder that was trained with --snapshots."""

    std: tuple[float, ...]
    """Widths of the averages: standard deviations of the weight of each step, as a share of the
    steps. Each is written to RUN/model-WIDTH."""

    step: int | None = None
    """Step up to which weights are averaged; none given: the last snapshot's."""


def main(options: Options) -> None:
    from unet.training.ema import Profile, put_together
    from unet.training.run import RunFolder

    kept = RunFolder(options.run).kept_snapshots()
    if not kept:
        raise InputError(
            f"{options.run} has no snapshots/ to make an average of: train with --snapshots 32"
        )
    last = max(profile.step for profile in kept)
    step = last if options.step is None else options.step
    if not 1 <= step <= last:
        raise InputError(f"--step {step} must be from 1 to the last snapshot's, {last}")
    plans = []
    for std in options.std:
        factors, left = put_together(list(kept), Profile(std, step))
        if left > LARGEST_ERROR:
            raise InputError(
                f"{counted(len(kept), 'snapshot')} cannot make an average of the width {std} at "
                f"step {step}: its error would be {left:.0%}; give a larger --std, or "
                "train with more --snapshots"
            )
        plans.append((std, factors.tolist(), left))
    for std, factors, left in plans:
        folder = options.run / f"model-{std:g}"
        save(options.run / "model", weighted(kept, factors), folder)
        made = f"the average of width {std:g} at step {step}"
        print(f"{folder}: {made}, {left:.2%} from the wanted profile")
    say_next("describe", folder)


def weighted(kept: Mapping[Profile, Path], factors: Sequence[float]) -> dict[str, Tensor]:
    """The sum in float64 of the kept averages, each times its factor; only one of them is in memory
    at a time.

    Raises:
        InputError: one of them cannot be read, or is of another network.
    """
    from unet.weights.folder import check_fit, load_weights

    total: dict[str, Tensor] = {}
    for factor, file in zip(factors, kept.values(), strict=True):
        state = load_weights(file)
        check_fit(total or state, state, str(file))
        for name, value in state.items():
            if not value.is_floating_point():  # a counter: the latest
                total[name] = value
            else:
                total[name] = total.get(name, 0) + factor * value.double()
    return total


def save(like: Path, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a model folder with these weights, and all else as in another one."""
    from unet.weights.folder import load_strictly
    from unet_diffusion.starting import read_model

    model = read_model(like)
    names = model.state_dict()
    load_strictly(
        model, {k: v.to(names[k].dtype) for k, v in weights.items() if k in names}, str(folder)
    )
    training = model.info.get("training")
    if isinstance(training, dict):
        training.pop("figures", None)  # which are of other weights
    model.save_pretrained(folder)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, Options, argv, description=__doc__)
