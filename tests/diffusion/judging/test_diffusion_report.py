"""The report of a diffusion run: what its axes show."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion.judging.report import _curves


@pytest.mark.parametrize("falls", [0.001, 0.3, 3.0])
@pytest.mark.parametrize("evaluations", [0, 1, 6])
def test_the_losses_fill_their_axis(falls, evaluations):
    """However far they fall, however high they were at first, and whenever they are judged."""
    steps = np.arange(10, 610, 10)
    losses = 0.1 + falls * np.exp(-steps / 100) + 5 * (steps < 50)
    log = [{"step": int(s), "loss": float(v)} for s, v in zip(steps, losses, strict=True)]
    for k in range(1, evaluations + 1):
        step = 600 * k // evaluations
        log.append({"step": step, "val_loss": 0.09 + falls / 8**k, "val_seen": 0.08})
    axes = Figure().subplots()
    _curves(axes, log)
    first = min(600 // evaluations, 150) if evaluations else 0
    seen = [e[k] for e in log if e["step"] >= first for k in e if k != "step"]
    limits = np.array(axes.get_ylim())
    if axes.get_yscale() == "log":
        seen, limits = np.log(seen), np.log(limits)
    assert limits[0] < min(seen) <= max(seen) < limits[1]
    assert np.ptp(seen) > 0.85 * np.ptp(limits)


def test_a_run_without_losses_has_an_empty_plot():
    axes = Figure().subplots()
    _curves(axes, [])
    assert axes.get_title() == "loss"
    assert not axes.get_lines()


def test_a_single_loss_is_a_dot_and_steps_are_whole():
    axes = Figure().subplots()
    _curves(axes, [{"step": 2, "loss": 1.0}, *({"step": s, "val_loss": 1.0} for s in (1, 2, 3, 4))])
    assert [line.get_marker() for line in axes.get_lines()] == [".", "o"]
    assert all(tick == int(tick) for tick in axes.get_xticks())
