"""Trainings without most of their pictures, which take longer than the few steps of a test."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

SMALL = {
    "diffusion.data.sources.DRAWN": 500,
    "diffusion.training.SHOWN_LEVELS": 3,
    "diffusion.training.LEAST_JUDGED": 4,
    "diffusion.training.MOST_JUDGED": 4,
    "diffusion.sampling.STEPS": 3,
    "diffusion.judging.steps.STEPS": 3,
    "diffusion.judging.steps.FEWER": 2,
    "diffusion.judging.report.SHOWN": 4,
    "diffusion.judging.report.FRAMES": 4,
    "diffusion.judging.report.JUDGED": 4,
    "diffusion.judging.report.MOST_COMPARED": 200,
}


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Few shapes, pictures, sampling steps and held-out images for its figures, no report.png."""
    for name, value in SMALL.items():
        patch.setattr(name, value)
    for task in ("segmentation", "diffusion"):
        patch.setattr(f"{task}.training.write_report", _no_report)


def with_reports(patch: pytest.MonkeyPatch) -> None:
    """Short runs that draw report.png all the same, of few pictures."""
    for task in ("segmentation", "diffusion"):
        report = import_module(f"{task}.judging.report")  # not before: torch takes long to import
        patch.setattr(f"{task}.training.write_report", report.write_report)


def _no_report(run: Path, *_: object) -> Path:
    return run / "report.png"
