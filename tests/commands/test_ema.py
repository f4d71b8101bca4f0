"""unet-ema: averages of a run's weights, put together when it is over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmentation.model import SegmentationUNet
from tests.unet.training.toy_training import ToyOptions, toy_task
from unet.training.ema import Profile
from unet.training.fit import fit
from unet.training.plan import plan_fit
from unet.training.run import RunFolder
from unet.weights.folder import load_weights
from unet_diffusion.ema import command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "toy"
    options = ToyOptions(out=out, steps=32, snapshots=16, norm="batch")
    fit(toy_task(options), plan_fit(options))
    return out


def test_a_width_that_was_kept_comes_back_and_others_are_models(run: Path, capsys) -> None:
    assert command(["--run", str(run), "--std", "0.1", "0.08"]) == 0
    assert "% from the wanted profile" in capsys.readouterr().out
    kept = load_weights(RunFolder(run).kept_snapshots()[Profile(0.1, 32)])
    found = SegmentationUNet.from_pretrained(run / "model-0.1")
    torch.testing.assert_close(dict(found.state_dict()), kept, atol=1e-5, rtol=1e-4)
    assert "figures" not in found.info.get("training", {})
    other = SegmentationUNet.from_pretrained(run / "model-0.08").state_dict()
    assert any((other[k] != v).any() for k, v in kept.items())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--std", "0.001"], "cannot make an average of the width 0.001 at step 32"),
        (["--std", "0.5"], "the width 0.5 of an average must be above 0 and at most 0.28"),
        (["--std", "0.1", "--step", "33"], "--step 33 must be from 1 to the last snapshot's, 32"),
        (["--std", "0.1", "--run", "elsewhere"], "elsewhere has no snapshots/"),
    ],
)
def test_what_cannot_be_put_together_is_refused(run: Path, more, told: str, capsys) -> None:
    given = more if "--run" in more else ["--run", str(run), *more]
    assert command(given) == 2
    assert told in capsys.readouterr().err
