"""Runs, models and configs that were made before the packages were divided into rooms.

`legacy/` holds, of each task, a run that was stopped at step 3 of 6 and the model that the same
run ended with when it was not stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion import training as diffusion
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions
from segmentation import training as segmentation
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from unet.training.cli import parse

LEGACY = Path(__file__).parent / "legacy"
TASKS: dict[str, tuple[Any, type, Callable[[Any], dict[str, float]]]] = {
    "segmentation": (SegmentationUNet, SegmentationOptions, segmentation.train),
    "diffusion": (DiffusionUNet, DiffusionOptions, diffusion.train),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_folder_is_read(task: str) -> None:
    model = TASKS[task][0].from_pretrained(LEGACY / task / "model")
    x = torch.zeros(1, model.config.in_channels, 16, 16)
    given = {} if task == "segmentation" else {"t": torch.tensor([7]), "classes": torch.tensor([2])}
    assert model(x, **given).isfinite().all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("again", ["--resume", "--config"])
def test_a_run_goes_on_and_is_repeated_to_the_same_weights(
    task: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_runs: None
) -> None:
    """The weights of another processor's arithmetic, so not bit by bit.

    A segmentation's options, given anew, make today's network, which refines its logits.
    """
    _, options, train = TASKS[task]
    shutil.copytree(LEGACY, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    shutil.rmtree(Path(task, "model"))
    arguments = ["--out", task, "--resume"]
    if again == "--config":
        arguments = ["--config", f"{task}/config.yaml", "--out", f"{task}-again"]
    train(parse(options, arguments))
    found = load_file(Path(arguments[arguments.index("--out") + 1], "model/model.safetensors"))
    wanted = load_file(LEGACY / task / "model/model.safetensors")
    if (task, again) == ("segmentation", "--config"):
        assert found.keys() == wanted.keys() | {"refine.weight"}
        return
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-3, msg=name)
